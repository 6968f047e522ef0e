"""Every column of an element-wise rule that says something wrong is found."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from samples import SAMPLES
from torch import Tensor

import fxgrow
from fxgrow.rules import RULES, values
from fxgrow.rules.base import Row, op_names
from fxgrow.rules.forms import Cast, ElementLoss, Opaque, Pointwise, Structural
from fxgrow.rules.pointwise import table
from fxgrow.testing.judge import Report, Sample, check


def r(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=_generator, dtype=torch.float64)


def p(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=_generator, dtype=torch.float64) + 0.5


_generator = torch.Generator().manual_seed(0)


@pytest.fixture
def saying(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Give an op's row other columns."""

    def change(op: str, **columns: Any) -> None:
        row = RULES[op]
        assert isinstance(row, Row)
        monkeypatch.setitem(RULES, op, dataclasses.replace(row, **columns))

    return change


def judged(op: Any, *samples: Sample) -> Report:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return check(op, samples or SAMPLES[op])


@pytest.mark.parametrize(
    ("op", "sample", "columns", "complaint"),
    [
        ("aten.mul.Tensor", None, {"combine": "add"}, "said to hold the mean"),
        ("aten.add.Tensor", None, {"combine": "mul"}, "said to"),
        ("aten.logaddexp.default", None, {"combine": "zero"}, "said to be zero"),
        ("aten.sigmoid.default", None, {"zero": True}, "said to be zero"),
        ("aten.exp.default", None, {"mean": True}, "said to hold the mean"),
        ("aten.sqrt.default", None, {"domain": ()}, "not finite"),
        ("aten.log.default", None, {"domain": ()}, "not finite"),
        ("aten.div.Tensor", None, {"domain": ("self",)}, "not finite"),
        ("aten.xlogy.Tensor", None, {"domain": ("self",)}, "not finite"),
        ("aten.pow.Tensor_Scalar", Sample(p(3, 4), 0.5), {"domain": ()}, "not finite"),
        ("aten.dropout.default", Sample(r(3, 4), 0.5, True), {"drawn": 0}, "copies do not hold"),
        ("aten.feature_dropout.default", Sample(r(3, 4, 2), 0.5, True), {"drawn": 1}, "copies do not hold"),
        ("aten.dropout.default", Sample(r(3, 4, 2), 0.5, True), {"drawn": 2}, "copies do not hold"),
        ("aten.sub.Tensor", Sample(r(3, 4), r(3, 4)), {"into": "self"}, "said to hold the mean"),
        ("aten.div.out", None, {"into": "self"}, "said to"),
        ("aten.where.self", None, {"branches": ("self",)}, "said to be zero"),
        ("aten.masked_fill.Scalar", None, {"branches": ("self",)}, "said to be zero"),
        ("aten.maximum.default", None, {"ignored": ("other",)}, "the grown op fails"),
        ("aten.to.dtype", Sample(r(3, 4), torch.int64), {"jumps": False}, "jumps"),
        ("aten.to.dtype", Sample(r(3, 4), torch.int64), {"linear": True}, "linear"),
        ("aten.soft_margin_loss.default", None, {"zero": True}, "keep zeros"),
        ("aten.binary_cross_entropy.default", None, {"domain": ()}, "the grown op fails"),
        ("aten.kl_div.default", None, {"domain": ("self",)}, "not finite"),
        ("aten.silu.default", None, {"range": values.from_zero}, "said to be from 0"),
        ("aten.softplus.default", Sample(1 + p(3, 4)), {"range": values.fraction}, "from 0.0 to 1.0"),
        ("aten.softplus.default", Sample(r(3, 4), -1.0), {"range": values.from_zero}, "said to be from 0"),
        ("aten.log.default", None, {"range": values.absolute}, "said to be from 0"),
        ("aten.zeros_like.default", None, {"value": 1}, "from 1.0 to 1.0"),
    ],
)
def test_a_wrong_column_is_found(
    op: str, sample: Sample | None, columns: dict[str, Any], complaint: str, saying: Callable[..., None]
) -> None:
    saying(op, **columns)
    report = judged(op, *([sample] if sample else []))
    assert any(complaint in f.detail for f in report.wrong), report


def maximum_with_zeros(x: Tensor) -> Tensor:
    return torch.maximum(x, torch.zeros_like(x))


def added_mean(x: Tensor) -> Tensor:
    return x + x.mean(-1, keepdim=True)


@pytest.mark.parametrize(
    ("op", "columns", "call", "complaint"),
    [
        ("aten.maximum.default", {"neutral": True}, maximum_with_zeros, "said to hold the mean"),
        ("aten.add.Tensor", {"centres": True}, added_mean, "said to be zero"),
    ],
)
def test_a_wrong_column_is_found_in_a_function(
    op: str, columns: dict[str, Any], call: Callable[[Tensor], Tensor], complaint: str, saying: Callable[..., None]
) -> None:
    assert not judged(call, Sample(r(3, 4))).wrong
    saying(op, **columns)
    report = judged(call, Sample(r(3, 4)))
    assert any(complaint in f.detail for f in report.wrong), report


@pytest.mark.parametrize(
    ("op", "fact", "complaint"),
    [
        ("aten.silu.default", "idempotent", "idempotent"),
        ("aten.neg.default", "idempotent", "idempotent"),
        ("aten.cos.default", "zero", "keep zeros"),
        ("aten.neg.default", "casts", "hold its operand's numbers"),
        ("aten.neg.default", "copies", "hold its operand's numbers"),
        ("aten.to.dtype", "copies", "said to be a copy"),
        ("aten.clone.default", "detaches", "passes through"),
    ],
)
def test_a_wrong_fact_is_found(op: str, fact: str, complaint: str, saying: Callable[..., None]) -> None:
    saying(op, **{fact: True})
    report = judged(op)
    assert any(complaint in f.detail for f in report.wrong), report


def test_a_gradient_that_does_not_pass_is_found(saying: Callable[..., None]) -> None:
    saying("aten.detach.default", detaches=False)
    assert any("gradient does not pass" in f.detail for f in judged("aten.detach.default").wrong)


def test_domains_refuse_new_units_with_the_operand_or_the_exponent(saying: Callable[..., None]) -> None:
    class Model(torch.nn.Module):
        def __init__(self, f: Callable[[Tensor], Tensor]) -> None:
            super().__init__()
            self.up, self.out, self.f = torch.nn.Linear(3, 4), torch.nn.Linear(4, 2), f

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.f(self.up(x)))

    refused: dict[Callable[[Tensor], Tensor], str] = {
        lambda h: h.abs().log(): "outside the domain of aten.log.default (operand self)",
        lambda h: h.abs() ** 0.5: "outside the domain of x ** 0.5",
        lambda h: h / h.exp(): "divides by new units whose values may be 0",
    }
    for f, words in refused.items():
        with pytest.raises(fxgrow.GrowthRefused) as refusal:
            fxgrow.grow(Model(f), {"op": "widen", "axis": "up.weight:0", "by": 2, "fill": "add"}, (torch.randn(5, 3),))
        assert words in str(refusal.value)
    for f in (lambda h: h**2, lambda h: h / 3, lambda h: h % 2):
        model = Model(f)
        grown = fxgrow.grow(model, {"op": "widen", "axis": "up.weight:0", "by": 2, "fill": "add"}, (torch.randn(5, 3),))
        assert grown.receipt is not None and grown.receipt.error_float64 < 1e-12


def test_every_op_stands_in_one_row() -> None:
    names = [name for names in table() for name in op_names(names)]
    assert len(names) == len(set(names))
    apart = {type(rule) for rule in table().values()} - {Cast, ElementLoss, Opaque, Pointwise, Structural}
    assert all(kind.special for kind in apart)
