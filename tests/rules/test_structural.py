"""Every column of a row that moves elements, with something wrong in it, is found."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import pytest
import torch
from rows import judging
from samples import SAMPLES
from torch import Tensor

from fxgrow.rules import RULES, Structural, layout
from fxgrow.rules.base import FAMILIES, Row
from fxgrow.testing.judge import Sample, check


def r(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


judged = judging(Structural)


@pytest.mark.parametrize(
    ("op", "sample", "columns", "complaint"),
    [
        ("aten.permute.default", Sample(r(4, 4, 4), [1, 2, 0]), {"dims": layout.reverse}, "claims the shape"),
        ("aten.index.Tensor", Sample(r(4, 4), [torch.tensor([3, 1, 0, 2])]), {"dims": layout.at_least_1d}, "claims"),
        ("aten.view.default", None, {"literals": None}, "the grown op fails"),
        ("aten.slice.Tensor", Sample(r(3, 8), 1, 2, 6), {"literals": None}, "claims the shape"),
        ("aten.slice.Tensor", Sample(r(3, 8), 1, 2, 6), {"literals": layout.resize_expand}, "literals fails"),
        ("aten.expand_as.default", Sample(r(3, 4), r(3, 4)), {"operand": "other"}, "the grown op fails"),
    ],
)
def test_a_wrong_column_is_found(
    op: str, sample: Sample | None, columns: dict[str, Any], complaint: str, judged: Any
) -> None:
    report = judged(op, *([sample] if sample is not None else []), **columns)
    assert any(complaint in finding.detail for finding in report.wrong), report


def test_an_op_that_does_more_than_move_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, "aten.abs.default", Structural(layout.at_least_1d))
    report = check("aten.abs.default", SAMPLES["aten.abs.default"])
    assert any("said to be linear" in finding.detail for finding in report.wrong), report


def test_an_op_that_is_not_said_to_move_grows_less(monkeypatch: pytest.MonkeyPatch) -> None:
    def product(x: Tensor, w: Tensor) -> Tensor:
        return x @ w.transpose(0, 1)  # the weight is seen through it, and takes shares

    sample = Sample(r(1, 2), r(1, 2))
    before = check(product, [sample])
    row = RULES["aten.transpose.int"]
    assert isinstance(row, Row)
    monkeypatch.setitem(RULES, "aten.transpose.int", dataclasses.replace(row, moves=False))
    after = check(product, [sample])
    assert not before.wrong and not after.wrong
    assert after.accepted < before.accepted


def test_a_list_of_tensors_is_given_as_a_list_of_dims() -> None:
    for name in ("aten.cat.default", "aten.stack.default", "aten.meshgrid.indexing"):
        assert check(name, SAMPLES[name]).accepted


def test_every_dim_of_three_is_reversed() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch would rather see mT
        report = check("aten.numpy_T.default", [Sample(r(2, 3, 4))])
    assert not report.wrong and not report.strict and report.accepted


def test_a_row_that_moves_says_how() -> None:
    for name, row in RULES.items():
        if isinstance(row, Structural) and FAMILIES.get(name) in ("shape", "indexing"):
            assert "->" in row.notation, name
