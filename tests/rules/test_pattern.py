"""Every column of a pattern that says something wrong is found."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from rows import judging
from torch import Tensor, nn

from fxgrow.program import capture
from fxgrow.rules import RULES, Pattern, Pointwise
from fxgrow.rules.forms.pattern import missing_in_result
from fxgrow.testing.judge import Sample, check


def r(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


judged = judging(Pattern)


def batch_in_the_middle(ctx: Any) -> str:
    return "b m k, b k n -> m b n"


@pytest.mark.parametrize(
    ("op", "sample", "columns", "complaint"),
    [
        ("aten.linear.default", None, {"sum": ""}, "copies do not hold"),
        ("aten.einsum.default", None, {"sum": ""}, "copies do not hold"),
        ("aten.linear.default", Sample(r(3, 4), r(4, 4)), {"pattern": "... i, i o, o? -> ... o"}, "op fails"),
        ("aten.bmm.default", Sample(r(3, 3, 3), r(3, 3, 3)), {"pattern": batch_in_the_middle}, "claims the shape"),
        ("aten.mm.default", Sample(r(4, 4), r(4, 4)), {"operands": ["mat2", "self"]}, "claims the shape"),
        ("aten.baddbmm.default", None, {"bias": ()}, "said to be zero"),
        ("aten.linear.default", None, {"bias": ()}, "said to be zero"),
    ],
)
def test_a_wrong_column_is_found(
    op: str, sample: Sample | None, columns: dict[str, Any], complaint: str, judged: Any
) -> None:
    report = judged(op, *([sample] if sample else []), **columns)
    assert any(complaint in f.detail for f in report.wrong), report


@pytest.mark.parametrize(
    ("op", "columns", "reason"),
    [
        ("aten.mm.default", {"blocked": "m", "why": "no reason"}, "no reason"),
        ("aten.conv2d.default", {"literals": {}}, "sizes of ('g', 'i') are not known"),
        ("aten.matmul.default", {"pattern": "m k, k n -> m n"}, "3 dims do not fit the pattern's 2"),
    ],
)
def test_a_column_that_refuses_without_need_is_found(
    op: str, columns: dict[str, Any], reason: str, judged: Any
) -> None:
    assert any(reason in f.detail for f in judged(op, **columns).strict)


def test_new_entries_of_a_wrong_value_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    operands = ["input", "weight", "bias", "running_mean", "running_var"]
    x = Sample(r(2, 3, 4), r(3), r(3), r(3), r(3).abs(), False, 0.1, 1e-5, False)
    for value, finite in ((1.0, True), (-1.0, False)):
        norm = Pattern("b c ..., c?, c?, c?, c? -> b c ...", operands, newborn={"running_var": value})
        monkeypatch.setitem(RULES, "aten.batch_norm.default", norm)
        found = [f for f in check("aten.batch_norm.default", [x]).wrong if "not finite" in f.detail]
        assert bool(found) is not finite


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (2, 3)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return (q @ k.transpose(-1, -2)).softmax(-1).type_as(v).mul(0.5) @ v


def test_roles_name_axes(monkeypatch: pytest.MonkeyPatch) -> None:
    def names() -> set[str]:
        return {axis.name.removeprefix("./") for axis in capture(Attention(), (torch.randn(2, 5, 6),)).axes}

    row = RULES["aten.matmul.default"]
    assert isinstance(row, Pattern)
    assert {"heads", "head_dim", "value_dim"} <= names()
    monkeypatch.setitem(RULES, "aten.matmul.default", dataclasses.replace(row, roles={}))
    assert not {"heads", "head_dim", "value_dim"} & names()


def test_letters_that_a_result_lacks() -> None:
    assert missing_in_result("... i *x, o (i j) -> ... o") == "i j"


@pytest.mark.parametrize(
    ("op", "weights"),
    [
        ("aten.addmm.default", ("mat2", "mat1")),
        ("aten.linear.default", ("weight",)),
        ("aten.conv1d.default", ("bias",)),
    ],
)
def test_weights_in_which_the_result_is_not_linear_are_found(op: str, weights: tuple[str, ...], judged: Any) -> None:
    report = judged(op, weights=weights)
    assert any("linear in its weights" in f.detail for f in report.wrong), report


@pytest.mark.parametrize(("op", "operand"), [("aten.add.Tensor", "t0"), ("aten.div.Tensor", "t1")])
def test_factors_that_do_not_make_the_result_zero_are_found(
    op: str, operand: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = RULES[op]
    assert isinstance(row, Pointwise)
    monkeypatch.setitem(RULES, op, dataclasses.replace(row, combine="mul", jumps=False))
    report = check(op, [Sample(r(3, 4), r(3, 4).exp())])
    assert any(f"zero where its operand {operand} is" in f.detail for f in report.wrong), report
