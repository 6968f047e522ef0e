"""Every column of an op that writes by number is found where it says something wrong."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from fxgrow.rules import RULES
from fxgrow.rules.context import Context
from fxgrow.rules.forms import Written
from fxgrow.rules.forms.written import Places
from fxgrow.rules.scatter import slice_by_slice
from fxgrow.testing.judge import Report, Sample, check


def r(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


ROWS = torch.tensor([2, 0])


def judged(op: str, sample: Sample, patch: pytest.MonkeyPatch, **columns: Any) -> Report:
    """The judge's report of an op whose row has other columns."""
    row = RULES[op]
    assert isinstance(row, Written)
    patch.setitem(RULES, op, dataclasses.replace(row, **columns))
    return check(op, [sample])


def first_dim(ctx: Context, source: Any) -> Places:
    return Places({0: "by number"}, {1: source[1]}, frozen=[(source[0], "by number"), (ctx.operand("index")[0], "")])


def nowhere(ctx: Context, source: Any) -> Places:
    return Places({}, dict(enumerate(source)), frozen=[(d, "by number") for d in ctx.operand("index")])


def test_places_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    along_last = Sample(r(3, 3), 1, torch.tensor([2, 0, 1]), r(3, 3))
    assert not check("aten.index_copy.default", [along_last]).wrong
    for where in (first_dim, nowhere):
        report = judged("aten.index_copy.default", along_last, monkeypatch, where=where)
        assert any("grown op fails" in f.detail for f in report.wrong), report


def test_a_wrong_source_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    report = judged("aten.index_copy.default", Sample(r(3, 4), 0, ROWS, r(2, 4)), monkeypatch, source="self")
    assert any("grown op fails" in f.detail for f in report.wrong), report


def test_a_value_that_is_not_zero_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number 0 among the arguments is the dim, and not the value."""
    report = judged("aten.index_fill.int_Scalar", Sample(r(3, 4), 0, ROWS, 1.0), monkeypatch, source="dim")
    assert any("said to be zero" in f.detail for f in report.wrong), report


def test_an_index_whose_new_entries_are_not_known_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forgotten, its numbers may be out of range, or write elsewhere."""
    sample = Sample(r(3, 4), 1, torch.tensor([[0, 2], [1, 3], [3, 0]]), r(3, 2))
    report = judged("aten.scatter.src", sample, monkeypatch, where=slice_by_slice)
    assert report.wrong or report.strict


@pytest.mark.parametrize("zero", [0.0, torch.zeros((), dtype=torch.float64)])
def test_zeros_that_are_written_keep_zeros(zero: Any) -> None:
    """Judged by what it gives: new entries of zeros stay zeros."""
    overload = "int_Tensor" if isinstance(zero, Tensor) else "int_Scalar"
    report = check(f"aten.index_fill.{overload}", [Sample(r(3, 4), 0, ROWS, zero)])
    assert not report.wrong
    assert report.accepted
