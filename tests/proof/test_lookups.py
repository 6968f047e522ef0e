"""How far look-ups count, and where new entries would lie."""

from __future__ import annotations

import pytest
import sympy

from fxgrow.algebra import Axis, Unifier, concat, product
from fxgrow.proof.appending import starts_with_old
from fxgrow.proof.lookups import largest, longest

T, S = sympy.symbols("T S", integer=True, positive=True)


@pytest.mark.parametrize(
    ("need", "entries", "found"),
    [
        (T + 2, 10, (T, 8)),
        (2 * T, 9, (T, 4)),
        (5 - T, 9, None),  # longer inputs need fewer
        (T * T, 9, None),
        (T + S, 9, None),
        (7, 9, None),
        (None, 9, None),
    ],
)
def test_the_longest_input_for_a_table(need: object, entries: int, found: object) -> None:
    assert longest(need, entries) == found


@pytest.mark.parametrize(
    ("need", "most"),
    [
        (7, 7),
        (T, None),
        (sympy.Min(T, 8), 8),
        (sympy.Min(T, 8) + 2, 10),
        (sympy.Max(sympy.Min(T, 3), 4), 4),
        (sympy.Max(T, 4), None),
        (None, None),
    ],
)
def test_what_a_look_up_never_exceeds(need: object, most: float | None) -> None:
    assert largest(need) == most


def test_new_entries_follow_all_old_ones_or_lie_between_them() -> None:
    u = Unifier()
    axis, other = u.fresh(3), u.fresh(2)
    assert isinstance(axis, Axis)
    assert starts_with_old(axis, axis)
    assert starts_with_old(product([axis, other]), axis)
    assert not starts_with_old(product([other, axis]), axis)
    assert starts_with_old(concat([other, axis]), axis)
    assert not starts_with_old(concat([axis, other]), axis)
    assert not starts_with_old(product([axis, axis]), axis)
