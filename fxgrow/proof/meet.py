"""What new entries hold where two operands meet, entry by entry."""

from __future__ import annotations

from collections.abc import Callable

from fxgrow.algebra import Axis, Conflict, Expr, Leaf, is_unit, leaves, map_leaves
from fxgrow.rules.annotation import COMBINE, Content, Info, Site

Meeting = Callable[[Content, Content], Content]


def meet(a: Expr, b: Expr, how: str) -> Expr:
    """The dim of the result of an element-wise op of two operands; one of size 1 is broadcast.

    Args:
        how: a name in :data:`~fxgrow.rules.annotation.COMBINE`, or ``mul_first``: a * f(b) with f(0) != 0.

    Raises:
        Conflict: the growing axis is not at the same places of the two.
    """
    f = _mul_first if how == "mul_first" else COMBINE[how]
    constant = Info(Content.CONST)
    if is_unit(b):
        return map_leaves(a, lambda x: Leaf(x.axis, _met(x.info, constant, f)) if isinstance(x, Leaf) else x)
    if is_unit(a):
        return map_leaves(b, lambda x: Leaf(x.axis, _met(constant, x.info, f)) if isinstance(x, Leaf) else x)
    mine, other = list(leaves(a)), list(leaves(b))
    if [isinstance(x, Leaf) for x in mine] != [isinstance(y, Leaf) for y in other]:
        raise Conflict("its operands hold these units in different places")
    theirs = iter(other)

    def one(x: Axis | Leaf) -> Expr:
        y = next(theirs)
        return Leaf(x.axis, _met(x.info, y.info, f)) if isinstance(x, Leaf) and isinstance(y, Leaf) else x

    return map_leaves(a, one)


def _met(a: Info, b: Info, f: Meeting) -> Info:
    return Info(f(a.content, b.content), _deciding(a, b, f), zeroable=_zeroable(a, b, f))


def _mul_first(a: Content, b: Content) -> Content:
    if a is Content.ZERO:
        return Content.ZERO
    return Content.CONST if a is b is Content.CONST else Content.FREE


def _deciding(a: Info, b: Info, f: Meeting) -> frozenset[Site]:
    """The parameters to ask for another content: one factor of a product is enough to make it zero.

    Were both asked, each would wait for the other to get a gradient.
    """
    if f not in (COMBINE["mul"], _mul_first):
        return a.sources | b.sources
    for one, other in ((a, b), (b, a)):
        if one.content is Content.CONST and other.content is not Content.CONST:
            return other.sources
    for one in (a, b):
        if one.content is Content.ZERO:
            return one.sources
    for one in (b, a):
        if one.zeroable and one.sources:
            return one.sources
    return a.sources | b.sources


def _zeroable(a: Info, b: Info, f: Meeting) -> bool:
    return (a.zeroable or b.zeroable) if f is COMBINE["mul"] else (a.zeroable and b.zeroable)


__all__ = ["meet"]
