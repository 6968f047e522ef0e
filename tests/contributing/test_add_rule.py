"""CONTRIBUTING.md, "A rule": an op of one's own is a line, and the judge finds every fact of it that is wrong."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxgrow
from fxgrow.errors import GrowthRefused
from fxgrow.rules import Pattern, Pointwise, Rule
from fxgrow.testing.judge import Sample, check


@torch.library.custom_op("contributing::relu2", mutates_args=())
def relu2(x: Tensor) -> Tensor:
    return x.clamp(min=0).square()


relu2.register_fake(torch.empty_like)
relu2.register_autograd(
    lambda ctx, g: 2 * g * ctx.saved_tensors[0].clamp(min=0),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]),
)


@torch.library.custom_op("contributing::read", mutates_args=())
def read(x: Tensor, w: Tensor) -> Tensor:
    return x @ w.T


read.register_fake(lambda x, w: x.new_empty(*x.shape[:-1], w.shape[0]))
read.register_autograd(
    lambda ctx, g: (g @ ctx.saved_tensors[1], g.flatten(0, -2).T @ ctx.saved_tensors[0].flatten(0, -2)),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)

READ = Pattern("... i, o i -> ... o", ["x", "w"], sum="i")


def floats(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.w = nn.Linear(3, 4), nn.Parameter(torch.randn(2, 4))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.contributing.read(torch.ops.contributing.relu2(self.up(x)), self.w)
        return out


def test_a_line_each_and_the_model_grows() -> None:
    torch.manual_seed(0)
    model, args = Model().double(), (floats(5, 3),)
    wider = {"op": "widen", "axis": "up.weight:0", "factor": 2}
    with pytest.raises(GrowthRefused, match=r"contributing\.relu2\.default"), pytest.warns(UserWarning, match="rule"):
        fxgrow.grow(model, wider, args)
    fxgrow.register_rule("contributing.relu2.default", Pointwise(zero=True))
    fxgrow.register_rule("contributing.read.default", READ)
    growth = fxgrow.grow(model, wider, args)
    assert growth.module.get_parameter("w").shape == (2, 8)
    assert growth.receipt.error_float64 is not None and growth.receipt.error_float64 < 1e-12


@pytest.mark.parametrize(
    ("op", "rule", "samples"),
    [
        ("contributing.relu2.default", Pointwise(zero=True), [Sample(floats(3, 4))]),
        ("contributing.read.default", READ, [Sample(floats(3, 4), floats(2, 4))]),
    ],
)
def test_the_judge_passes_what_is_so(op: str, rule: Rule, samples: list[Sample]) -> None:
    fxgrow.register_rule(op, rule)
    report = check(op, samples)
    assert not report.wrong and not report.strict and report.accepted > 0


@pytest.mark.parametrize(
    ("op", "wrong", "samples"),
    [
        pytest.param("relu2", Pointwise(zero=True, mean=True), [Sample(floats(3, 4))], id="both"),
        pytest.param("relu2", Pointwise(mean=True), [Sample(floats(3, 4))], id="it is affine"),
        pytest.param(
            "read", Pattern("... i, o i -> ... o", ["x", "w"]), [Sample(floats(3, 4), floats(2, 4))], id="no sum"
        ),
        pytest.param(
            "read",
            Pattern("... i, o i -> ... i", ["x", "w"], sum="o"),
            [Sample(floats(3, 4), floats(4, 4))],
            id="the wrong letter",
        ),
    ],
)
def test_the_judge_finds_a_wrong_fact(op: str, wrong: Rule, samples: list[Sample]) -> None:
    name = f"contributing.{op}.default"
    fxgrow.register_rule(name, wrong)
    assert check(name, samples).wrong
