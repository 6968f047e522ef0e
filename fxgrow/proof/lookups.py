"""Where entries of a dim are picked by number, how many there have to be, and which dims are too small for more.

How far a look-up counts is an expression of the input's sizes (:mod:`fxgrow.analysis.ranges`). It tells which tables
and masks have to follow so that longer inputs run, and whether new rows would ever be used.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import sympy
from torch import fx

from fxgrow.algebra import Expr, is_static, resolve, size_of
from fxgrow.analysis.axes import Axes
from fxgrow.analysis.ranges import Bound, Ranges
from fxgrow.rules.annotation import Dims
from fxgrow.rules.base import picks


@dataclass
class Lookup:
    """A place where entries of a dim are picked by number: ``need`` is how many there have to be, None if any number
    may come in with the input."""

    node: fx.Node
    operand: fx.Node
    dim: int
    need: Bound


def lookups_of(node: fx.Node, ranges: Ranges) -> Iterator[Lookup]:
    """The dims of its operands from which an op picks entries by number, and how many entries it needs there."""
    for one in picks(node):
        high = ranges.of(one.numbers).high
        last = ranges.size(one.first) if isinstance(one.first, fx.Node) else one.first
        yield Lookup(node, one.operand, one.dim, last if one.numbers is None else None if high is None else high + 1)


def longest(need: Bound, size: int) -> tuple[sympy.Symbol, int] | None:
    """The input size at which a look-up needs ``size`` entries: (symbol, its largest value), None if there is none."""
    symbols = list(getattr(need, "free_symbols", ()))
    if len(symbols) != 1:
        return None
    (symbol,) = symbols
    line = sympy.Poly(need, symbol) if sympy.sympify(need).is_polynomial(symbol) else None
    if line is None or line.degree() != 1:
        return None
    slope, offset = line.all_coeffs()
    return (symbol, int((size - offset) // slope)) if slope > 0 else None


def largest(need: Bound) -> float | None:
    """A number that an expression of sizes never exceeds, where there is one."""
    if need is None:
        return None
    need = sympy.sympify(need)
    if need.is_number:
        return float(need)
    parts = [largest(a) for a in need.args]
    if isinstance(need, sympy.Min):
        return min((p for p in parts if p is not None), default=None)
    if isinstance(need, sympy.Add | sympy.Max) and None not in parts:
        known = [p for p in parts if p is not None]
        return sum(known) if isinstance(need, sympy.Add) else max(known)
    return None


@dataclass
class ShortDim:
    """A dim of fixed size that is too small for longer inputs."""

    lookup: Lookup
    dim: Expr
    size: int


def short_dims(axes: Axes, ranges: Ranges, symbol: sympy.Symbol, most: int) -> Iterator[ShortDim]:
    """The dims of tables and masks that have to grow before the input's size ``symbol`` can be ``most``."""
    for node in axes.program.graph.nodes:
        for one in lookups_of(node, ranges):
            if one.need is None or symbol not in getattr(one.need, "free_symbols", ()):
                continue
            dims: Dims | None = axes.dims.get(one.operand)
            if not dims or not is_static(size_of(dims[one.dim])):
                continue
            size = one.need.subs(symbol, most)
            if not size.is_number:
                continue  # depends on other sizes of the input too
            if int(size) > size_of(dims[one.dim]):
                yield ShortDim(one, resolve(dims[one.dim]), int(size))


__all__ = ["Lookup", "ShortDim", "largest", "longest", "lookups_of", "short_dims"]
