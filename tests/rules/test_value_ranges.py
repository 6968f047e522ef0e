"""What rules say of the values of results, and of what is picked: a wrong claim is found; what a dtype leaves."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import sympy
import torch

from fxgrow.rules import RULES, values
from fxgrow.rules.base import Picked, Row
from fxgrow.rules.values import ANYTHING, FLAG, Range, RangeOf, held
from fxgrow.testing.judge import Sample, check


@pytest.mark.parametrize(
    ("op", "found", "sample"),
    [
        ("aten.index_select.default", values.absolute, Sample(torch.randn(3), 0, torch.arange(3))),
        ("aten.diag_embed.default", values.of_operand, Sample(1 + torch.rand(3))),
    ],
)
def test_a_wrong_range_is_found(op: str, found: RangeOf, sample: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    row = RULES[op]
    assert isinstance(row, Row)
    monkeypatch.setitem(RULES, op, dataclasses.replace(row, range=found))
    assert any("its entries are said to be" in x.detail for x in check(op, [sample]).wrong)


size = sympy.Symbol("s0", integer=True, positive=True)


@pytest.mark.parametrize(
    ("found", "dtype", "left"),
    [
        (Range(0, size), torch.int64, Range(0, size)),
        (Range(0, size), torch.float32, Range(0, size)),
        (Range(0, size), torch.bfloat16, Range(0, None)),  # sizes are rounded
        (Range(0, size), torch.int8, ANYTHING),  # and these wrap around
        (Range(-1, 3), torch.uint8, ANYTHING),
        (Range(0.5, 2.5), torch.int64, Range(0, 3)),
        (Range(-0.5, 0.25), torch.int64, Range(-1, 1)),
        (Range(0, 257), torch.bfloat16, Range(0, 256)),
        (Range(3, 4), torch.bool, FLAG),
        (Range(3, 4), torch.complex64, ANYTHING),
    ],
)
def test_what_a_dtype_leaves_of_a_range(found: Range, dtype: torch.dtype, left: Range) -> None:
    assert held(found, dtype) == left


def test_ranges_that_hold_others() -> None:
    assert Range(0, 3).holds(Range(1, 3)) and ANYTHING.holds(ANYTHING) and Range(0).holds(Range(0, math.inf))
    assert not Range(0, 3).holds(Range(1, 4)) and not Range(0, 3).holds(ANYTHING)


def columns(node: torch.fx.Node) -> list[Picked]:
    table, numbers = node.all_input_nodes
    return [Picked(table, 1, numbers=numbers)]


def the_first(node: torch.fx.Node) -> list[Picked]:
    return [Picked(node.all_input_nodes[0], 0, first=1)]


@pytest.mark.parametrize(
    ("op", "wrong", "sample"),
    [
        ("aten.index_select.default", columns, Sample(torch.randn(3, 4), 0, torch.tensor([1, 0]))),
        ("aten.flip.default", the_first, Sample(torch.randn(3), [0])),
    ],
)
def test_what_is_not_picked_by_number_is_found(
    op: str, wrong: Callable[[torch.fx.Node], list[Picked]], sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = RULES[op]
    assert isinstance(row, Row)
    monkeypatch.setitem(RULES, op, dataclasses.replace(row, picks=wrong))
    assert any("said to pick entries" in x.detail for x in check(op, [sample]).wrong)
