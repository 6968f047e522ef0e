"""Maps of dims, entry by entry, against a tensor whose entries are counted; fills of readers."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fxgrow.algebra import Axis, Expr, Product, Unifier, concat, leaves, product, resolve, size_of
from fxgrow.plan import FILL_RANDOM, FILL_ZERO, AxisMap
from fxgrow.proof.maps import dim_plan, reader_fill
from fxgrow.proof.outcome import Outcome
from fxgrow.rules.annotation import Content

fast = settings(max_examples=120, deadline=None)


def maps(n: int) -> st.SearchStrategy[AxisMap]:
    return st.one_of(
        st.builds(lambda k, s: AxisMap.copy(n, n + k, s), st.integers(1, 2 * n), st.sampled_from(["even", "uneven"])),
        st.builds(lambda k: AxisMap.copy(n, n + k, "even", "newborn"), st.integers(1, 2 * n)),
        st.builds(lambda k: AxisMap.add(n, n + k, paired=False), st.integers(1, 4)),
        st.builds(lambda k: AxisMap.add(n, n + 2 * k, paired=True), st.integers(1, 3)),
    )


@fast
@given(st.data())
def test_index_maps_of_a_dim_agree_with_indexing_an_enumerated_tensor(data: st.DataObject) -> None:
    """Grow one axis wherever it occurs in a product or concatenation of others, and compare element by element."""
    u = Unifier()
    n = data.draw(st.integers(2, 4))
    axis = u.fresh(n)
    assert isinstance(axis, Axis)

    def build(depth: int) -> Expr:
        kind = data.draw(st.sampled_from(["axis", "other", "product", "concat"] if depth else ["axis", "other"]))
        if kind == "axis":
            return axis
        if kind == "other":
            return u.fresh(data.draw(st.integers(2, 3)))
        parts = [build(depth - 1) for _ in range(data.draw(st.integers(2, 3)))]
        return product(parts) if kind == "product" else concat(parts)

    dim = resolve(build(2))
    growth = data.draw(maps(n))
    reads = data.draw(st.booleans())
    outcome = Outcome(growth)
    count = sum(x is axis for x in leaves(dim))
    if reads:
        outcome.readers = {("w", 0, k): {Content.FREE} for k in range(count)}
    plan = dim_plan(dim, "w", 0, axis, outcome, lambda _: FILL_RANDOM)

    def enumerate_dim(e: Expr) -> tuple[list[int], list[float], list[tuple[object, ...]], int]:
        """(old index or -1, share, identity of newborn entries, old size), one entry after the other."""
        if isinstance(e, Axis):
            if e is axis:
                share = growth.share if reads else np.ones(growth.new)
                return [max(int(i), -1) for i in growth.index], list(share), [(int(i),) for i in growth.index], n
            return list(range(e.size)), [1.0] * e.size, [(i,) for i in range(e.size)], e.size
        if isinstance(e, Product):
            out: tuple[list[int], list[float], list[tuple[object, ...]], int] = ([0], [1.0], [()], 1)
            for f in e.factors:
                i2, s2, d2, n2 = enumerate_dim(f)
                i1, s1, d1, n1 = out
                out = (
                    [-1 if a < 0 or b < 0 else a * n2 + b for a in i1 for b in i2],
                    [a * b for a in s1 for b in s2],
                    [(*a, *b) for a in d1 for b in d2],
                    n1 * n2,
                )
            return out
        index: list[int] = []
        share_: list[float] = []
        ident: list[tuple[object, ...]] = []
        offset = 0
        for k, p in enumerate(e.parts):
            i, s, d, m = enumerate_dim(p)
            index += [x + offset if x >= 0 else -1 for x in i]
            share_ += s
            ident += [(k, *x) for x in d]
            offset += m
        return index, share_, ident, offset

    index, share, ident, old = enumerate_dim(dim)
    assert old == size_of(dim)
    assert [max(int(i), -1) for i in plan.index] == index
    assert np.allclose(plan.split if plan.split is not None else np.ones(len(index)), share)
    ids = [(int(plan.index[k]), ident[k]) for k in range(len(index)) if index[k] < 0]
    assert len({a for a, _ in ids}) == len({b for _, b in ids}) == len(set(ids)), "newborn ids mix entries up"
    for k in range(len(index)):
        code = -1 if plan.fill is None else plan.fill[k]
        if index[k] < 0:
            assert code == (FILL_ZERO if reads else FILL_RANDOM)
    if reads and growth.newborn == 0:
        sums = np.bincount(index, weights=plan.split if plan.split is not None else np.ones(len(index)), minlength=old)
        assert np.allclose(sums, 1.0), "the shares of one old entry do not add up to 1"


@fast
@given(st.integers(1, 5), st.data())
def test_maps_of_one_axis_keep_every_unit_and_share_it_out(n: int, data: st.DataObject) -> None:
    growth = data.draw(maps(n))
    assert growth.new > growth.old == n
    assert set(range(n)) <= set(growth.index.tolist())
    kept = growth.index >= 0
    assert np.allclose(np.bincount(growth.index[kept], weights=growth.share[kept], minlength=n), 1.0)
    assert growth.newborn == int((~kept).sum())
    assert growth.copies in (0, int(growth.counts[0]))


def test_a_reader_is_filled_with_zeros_where_it_meets_anything_else() -> None:
    assert reader_fill({Content.ZERO}) == FILL_RANDOM
    assert reader_fill({Content.ZERO, Content.FREE}) == FILL_ZERO
    assert reader_fill({Content.MEAN}) == FILL_ZERO


def test_new_entries_of_a_reader_in_pairs_are_no_fill() -> None:
    axis = Unifier().fresh(2)
    assert isinstance(axis, Axis)
    outcome = Outcome(AxisMap.add(2, 4, paired=True), readers={("w", 1, 0): {Content.ZERO}})
    plan = dim_plan(axis, "w", 1, axis, outcome, lambda _: FILL_RANDOM)
    assert plan.fill is not None and plan.fill[2:].tolist() == [FILL_ZERO, FILL_ZERO]
    assert plan.index[2] == plan.index[3] == -1
