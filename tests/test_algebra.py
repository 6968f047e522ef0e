"""The algebra of axes: properties that hold for any refinement, by hypothesis."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxgrow.algebra import (
    Axis,
    Concat,
    Conflict,
    Expr,
    Frozen,
    Product,
    Unifier,
    axes_of,
    concat,
    is_unit,
    leaves,
    product,
    resolve,
    size_of,
)

fast = settings(max_examples=120, deadline=None)
sizes = st.lists(st.integers(1, 4), min_size=1, max_size=4)


def coordinates(expr: Expr) -> list[tuple[object, ...]]:
    """The elements of a dim in memory order, each as a path of (axis or part, position): what an expression means."""
    expr = resolve(expr)
    if isinstance(expr, Product):
        out: list[tuple[object, ...]] = [()]
        for f in expr.factors:
            out = [a + b for a in out for b in coordinates(f)]
        return out
    if isinstance(expr, Concat):
        return [((id(expr), k), *c) for k, p in enumerate(expr.parts) for c in coordinates(p)]
    assert isinstance(expr, Axis)
    return [((expr.id, i),) for i in range(expr.size)]


def canonical(expr: Expr) -> bool:
    """A product of unbound axes whose last factor may be a concatenation of such products."""
    if isinstance(expr, Axis):
        return expr.binding is None
    if isinstance(expr, Concat):
        return len(expr.parts) != 1 and all(canonical(p) and not isinstance(p, Concat) for p in expr.parts)
    assert isinstance(expr, Product)
    if len(expr.factors) == 1 or any(isinstance(f, Product) for f in expr.factors):
        return False
    return all(canonical(f) for f in expr.factors) and not any(isinstance(f, Concat) for f in expr.factors[:-1])


def expressions(u: Unifier, draw: st.DrawFn, depth: int = 2) -> Expr:
    kind = draw(st.sampled_from(["axis", "product", "concat"] if depth else ["axis"]))
    if kind == "axis":
        return u.fresh(draw(st.integers(1, 6)))
    parts = [expressions(u, draw, depth - 1) for _ in range(draw(st.integers(1, 3)))]
    return product(parts) if kind == "product" else concat(parts)


@st.composite
def dims(draw: st.DrawFn) -> tuple[Unifier, list[Expr]]:
    u = Unifier()
    return u, [expressions(u, draw) for _ in range(draw(st.integers(1, 3)))]


@fast
@given(dims())
def test_resolving_gives_the_canonical_form_of_the_same_size(case: tuple[Unifier, list[Expr]]) -> None:
    for expr in case[1]:
        done = resolve(expr)
        assert canonical(done), done
        assert size_of(done) == size_of(expr)
        assert len(coordinates(done)) == size_of(expr)
        assert repr(resolve(done)) == repr(done)


@fast
@given(dims(), sizes)
def test_regrouping_keeps_the_elements_and_their_order(case: tuple[Unifier, list[Expr]], shape: list[int]) -> None:
    u, before = case
    total = size_of(product(before))
    new = [*shape, total // int(np.prod(shape))] if total % int(np.prod(shape)) == 0 else [total]
    try:
        after = u.regroup(before, new)
    except Conflict:
        return
    assert [size_of(d) for d in after] == new
    assert all(canonical(d) for d in after)
    if not any(isinstance(x, Concat) for d in [*after, *map(resolve, before)] for x in _nodes(d)):
        assert coordinates(product(after)) == coordinates(product([resolve(b) for b in before]))


def _nodes(expr: Expr) -> list[Expr]:
    below = expr.factors if isinstance(expr, Product) else expr.parts if isinstance(expr, Concat) else ()
    return [expr, *(n for b in below for n in _nodes(b))]


@fast
@given(dims(), st.integers(1, 40))
def test_cutting_a_dim_in_two_keeps_its_sizes_and_order(case: tuple[Unifier, list[Expr]], head: int) -> None:
    u, (expr, *_) = case
    total = size_of(expr)
    if not 0 < head < total:
        with pytest.raises(Conflict):
            u.split_concat(expr, head)
        return
    try:
        a, b = u.split_concat(expr, head)
    except Conflict:
        return
    assert (size_of(a), size_of(b)) == (head, total - head)
    assert canonical(resolve(a))
    assert canonical(resolve(b))
    joined = resolve(concat([resolve(a), resolve(b)]))
    assert [x.id for x in leaves(joined)] == [x.id for x in leaves(resolve(expr))]
    assert size_of(resolve(expr)) == total


@fast
@given(dims(), st.integers(1, 12))
def test_splitting_a_product_keeps_its_sizes(case: tuple[Unifier, list[Expr]], inner: int) -> None:
    u, (expr, *_) = case
    total = size_of(expr)
    try:
        outer, rest = u.split_product(expr, inner)
    except Conflict:
        assert size_of(resolve(expr)) == total
        return
    assert size_of(rest) == inner
    assert size_of(outer) * inner == total
    assert size_of(resolve(expr)) == total


@fast
@given(st.data())
def test_two_unified_dims_list_the_same_axes_in_the_same_order(data: st.DataObject) -> None:
    u = Unifier()
    factors = data.draw(st.lists(st.integers(2, 4), min_size=1, max_size=4))
    total = int(np.prod(factors))
    other = data.draw(st.permutations(factors))
    a, b = product([u.fresh(f) for f in factors]), product([u.fresh(f) for f in other])
    before = [x.size for x in u.axes]
    try:
        u.unify(a, b)
    except Conflict:
        assert size_of(resolve(a)) == size_of(resolve(b)) == total
        return
    assert [x.id for x in leaves(resolve(a))] == [x.id for x in leaves(resolve(b))]
    assert coordinates(a) == coordinates(b)
    assert [x.size for x in u.axes[: len(before)]] == before
    u.unify(a, b)  # again: nothing left to do
    assert coordinates(a) == coordinates(b)


@fast
@given(st.data())
def test_concatenations_unify_by_common_cuts(data: st.DataObject) -> None:
    u = Unifier()
    pieces = data.draw(st.lists(st.integers(1, 5), min_size=2, max_size=5))
    total = sum(pieces)
    cut = data.draw(st.integers(1, total - 1))
    a, b = concat([u.fresh(x) for x in pieces]), concat([u.fresh(cut), u.fresh(total - cut)])
    u.unify(a, b)
    assert [x.id for x in leaves(resolve(a))] == [x.id for x in leaves(resolve(b))]
    assert size_of(resolve(a)) == size_of(resolve(b)) == total


@fast
@given(st.data())
def test_conflicts_leave_every_dim_the_size_it_had(data: st.DataObject) -> None:
    u = Unifier()
    known = [expressions(u, data.draw, 2) for _ in range(4)]
    had = [size_of(e) for e in known]
    for _ in range(6):
        a, b = data.draw(st.sampled_from(known)), data.draw(st.sampled_from(known))
        action = data.draw(st.sampled_from(["unify", "split", "cut", "regroup"]))
        try:
            if action == "unify":
                u.unify(a, b)
            elif action == "split":
                u.split_product(a, data.draw(st.integers(1, 6)))
            elif action == "cut":
                u.split_concat(a, data.draw(st.integers(1, 6)))
            else:
                u.regroup([a, b], [size_of(b), size_of(a)])
        except Conflict:
            pass
        assert [size_of(resolve(e)) for e in known] == had
        assert all(canonical(resolve(e)) for e in known)


def test_an_axis_never_contains_itself() -> None:
    u = Unifier()
    a = u.fresh(4)
    outer, inner = u.split_product(a, 2)
    with pytest.raises(Conflict, match="size 2 meets size 4"):
        u.unify(outer, a)
    u.unify(outer, inner)  # a square: both factors are one axis
    assert [x.id for x in leaves(resolve(a))] == [resolve(inner).id] * 2  # type: ignore[union-attr]


def test_freezing_and_roles_travel_with_a_refinement() -> None:
    u = Unifier()
    a, b = u.fresh(12), u.fresh(12)
    u.freeze(a, Frozen("because", "aten.test", "file.py:1"))
    u.role(b, "heads")
    u.unify(a, b)
    outer, inner = u.split_product(b, 4)
    for axis in [*axes_of(outer), *axes_of(inner)]:
        assert axis.frozen is not None
        assert axis.roles == {"heads": 1}
    assert str(axes_of(outer)[0].frozen) == "aten.test at file.py:1: because"


def test_the_first_reason_to_freeze_is_kept() -> None:
    u = Unifier()
    a = u.fresh(3)
    u.freeze(a, Frozen("one"))
    u.freeze(a, Frozen("two"))
    assert [x.frozen.reason for x in axes_of(a) if x.frozen] == ["one"]


def test_a_dim_of_size_one_has_no_axis() -> None:
    u = Unifier()
    assert is_unit(u.fresh(1))
    assert not u.axes
