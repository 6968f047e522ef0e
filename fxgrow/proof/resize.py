"""The literal arguments of a graph that follow the size of a growing axis."""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import fx

from fxgrow.algebra import Axis, Concat, Expr, Product, Size
from fxgrow.analysis.axes import Axes
from fxgrow.errors import GrowthRefused
from fxgrow.plan import Edit
from fxgrow.rules.base import rule_of
from fxgrow.rules.resize import Resize


def size_edits(axes: Axes, axis: Axis, new: int, refuse: Callable[[fx.Node, str], GrowthRefused]) -> list[Edit]:
    """Literal arguments that have to follow when ``axis`` takes its new size.

    Args:
        refuse: the error to raise where an op cannot be told its new sizes.
    """

    def new_size(dim: Expr) -> Size:
        if isinstance(dim, Axis):
            return new if dim is axis else dim.size
        if isinstance(dim, Product):
            total: Size = 1
            for f in dim.factors:
                total = total * new_size(f)
            return total
        assert isinstance(dim, Concat)
        total = 0
        for p in dim.parts:
            total = total + new_size(p)
        return total

    out = []
    for node in axes.uses.get(axis.id, []):
        rule = rule_of(node)
        if rule is None:
            continue
        ctx = Resize(node, axes.dims.get, new_size, functools.partial(refuse, node))
        rule.resize(ctx)
        if ctx.edit is not None:
            out.append(ctx.edit)
    return out


__all__ = ["size_edits"]
