"""From an outcome to the map of one dim of a tensor, entry by entry: index, shares, gradients and fills."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np

from fxgrow.algebra import Axis, Expr, Leaf, Product
from fxgrow.plan import FILL_RANDOM, FILL_ZERO, DimPlan
from fxgrow.proof.outcome import Outcome
from fxgrow.rules.annotation import Content, Site

_KEPT = -1.0  # in place of a fill: the entry is not new


@dataclass(frozen=True)
class _Map:
    """The map of a part of a dim.

    ``index``, ``split``, ``gradient`` and ``fill`` have one number for each entry after the growth, as in
    :class:`~fxgrow.plan.DimPlan`; ``old`` is how many entries there were, and ``extended`` how many there are with one
    for each id of new ones.
    """

    index: np.ndarray
    split: np.ndarray
    gradient: np.ndarray
    fill: np.ndarray
    old: int
    extended: int


def dim_plan(
    dim: Expr, tensor: str, i: int, axis: Axis, outcome: Outcome, carrier_fill: Callable[[Site], int]
) -> DimPlan:
    """The map of dim ``i`` of a tensor when ``axis`` grows.

    Args:
        dim: as analysis has it.
        carrier_fill: the fill code of new entries where the tensor carries the axis.
    """
    growth = outcome.growth
    counter = iter(range(1 << 30))

    def grown() -> _Map:
        site = (tensor, i, next(counter))
        reads = site in outcome.readers and site not in outcome.carriers
        ones = np.ones(growth.new)
        paired = growth.ids < growth.newborn  # +z and -z are not drawn as a fill
        code = (FILL_ZERO if paired else reader_fill(outcome.readers[site])) if reads else carrier_fill(site)
        return _Map(
            index=growth.index,
            split=growth.share if reads else ones,
            gradient=ones if reads else growth.share,
            fill=np.where(growth.index < 0, float(code), _KEPT),
            old=growth.old,
            extended=growth.old + growth.ids,
        )

    def walk(e: Expr) -> _Map:
        if isinstance(e, Axis | Leaf):
            return grown() if e is axis else _unchanged(int(e.size))
        if isinstance(e, Product):
            out = _unchanged(1)
            for f in e.factors:
                out = _outer(out, walk(f))
            return out
        return _end_to_end([walk(p) for p in e.parts])

    found = walk(dim)
    return DimPlan(
        index=found.index,
        split=None if np.all(found.split == 1) else found.split,
        gradient=None if np.all(found.gradient == 1) else found.gradient,
        fill=None if np.all(found.fill < 0) else np.maximum(found.fill, 0.0),
    )


def reader_fill(contents: Collection[Content]) -> int:
    """Fill of a reader's new entries: free where they only ever meet zeros."""
    return FILL_RANDOM if all(c is Content.ZERO for c in contents) else FILL_ZERO


def _unchanged(n: int) -> _Map:
    return _Map(np.arange(n), np.ones(n), np.ones(n), np.full(n, _KEPT), n, n)


def _end_to_end(parts: list[_Map]) -> _Map:
    """Maps one after the other; the ids of new entries are unique across the parts."""
    index, old, extended = [], 0, 0
    for p in parts:
        index.append(np.where(p.index >= 0, p.index + old, p.index - extended))
        old += p.old
        extended += p.extended
    return _Map(
        index=np.concatenate(index),
        split=np.concatenate([p.split for p in parts]),
        gradient=np.concatenate([p.gradient for p in parts]),
        fill=np.concatenate([p.fill for p in parts]),
        old=old,
        extended=old + extended,
    )


def _outer(a: _Map, b: _Map) -> _Map:
    """Row-major product of two maps; a new entry's id is its coordinate in the extended product."""
    ia, ib = a.index[:, None], b.index[None, :]
    xa = np.where(ia >= 0, ia, a.old + (-ia - 1))
    xb = np.where(ib >= 0, ib, b.old + (-ib - 1))
    both = (ia >= 0) & (ib >= 0)
    fa, fb = a.fill[:, None], b.fill[None, :]
    zero = (fa == FILL_ZERO) | (fb == FILL_ZERO)
    return _Map(
        index=np.where(both, ia * b.old + ib, -(xa * b.extended + xb) - 1).reshape(-1),
        split=(a.split[:, None] * b.split[None, :]).reshape(-1),
        gradient=(a.gradient[:, None] * b.gradient[None, :]).reshape(-1),
        fill=np.where(zero, float(FILL_ZERO), np.maximum(fa, fb)).reshape(-1),
        old=a.old * b.old,
        extended=a.old * b.old + a.extended * b.extended,
    )


__all__ = ["dim_plan", "reader_fill"]
