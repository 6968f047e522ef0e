"""Tensors into which an op writes by number."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from fxgrow.algebra import Expr, resolve
from fxgrow.rules.annotation import Content, Dims, Info, annotate, infos
from fxgrow.rules.base import Row
from fxgrow.rules.context import Context, GrowthContext


@dataclass(frozen=True)
class Places:
    """Where a call writes.

    Attributes:
        numbered: the dims whose entries are written by number, and why they cannot grow.
        source: by dim, the dim of the source that it meets entry by entry. Along any other the source is one value.
        index: by dim, the dim of the index that it meets entry by entry.
        frozen: other dims of the operands that cannot grow, and why.
    """

    numbered: Mapping[int, str]
    source: Mapping[int, Expr] = field(default_factory=dict)
    index: Mapping[int, Expr] = field(default_factory=dict)
    frozen: list[tuple[Expr, str]] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Written(Row):
    """A tensor with some entries replaced or added to: by number along some dims, entry by entry along the others.

    Attributes:
        where: from the call and the dims of the source, None where it is a number, to the places. The first line of its
            docstring says them in words.
        source: the operand that is written, a tensor or a number.
    """

    noted: ClassVar[str] = "where"

    where: Callable[[Context, Dims | None], Places]
    source: str

    @property
    def notation(self) -> str:
        return (inspect.getdoc(self.where) or self.where.__name__).partition("\n")[0]

    def relate(self, ctx: Context) -> Dims:
        dims, places = ctx.operand("self"), self.where(ctx, ctx.dims(self.source))
        for dim, why in (*((dims[i], why) for i, why in places.numbered.items()), *places.frozen):
            ctx.freeze(dim, why)
        for met in (places.source, places.index):
            for i, theirs in met.items():
                ctx.unify(dims[i], theirs)
        return [resolve(d) for d in dims]

    def grow(self, ctx: GrowthContext) -> Dims:
        dims, places = ctx.operand("self"), self.where(ctx, ctx.dims(self.source))
        for i, why in places.numbered.items():
            if ctx.grows(dims[i]):
                raise ctx.refuse(why)
        return [self._meet(ctx, i, dim, places) if ctx.grows(dim) else dim for i, dim in enumerate(dims)]

    def _meet(self, ctx: GrowthContext, i: int, dim: Expr, places: Places) -> Expr:
        index = places.index.get(i)
        if i in places.source:
            total = ctx.combine(dim, places.source[i], "add" if index is None else "zero")
        else:
            total = _one_value(ctx.close(dim), zero=ctx.is_zero(ctx.args[self.source]))
        if index is None:
            return ctx.close(total)
        if ctx.newborn and any(x.content not in (Content.CONST, Content.ZERO) for x in infos(index)):
            raise ctx.refuse("the new entries of an index are not known")
        if not all(x.content is Content.ZERO for x in infos(total)):
            total = ctx.combine(total, index, "any")
        return ctx.close(annotate(total, lambda info: info.becomes(info.content, zeroable=False)))


def _one_value(dim: Expr, zero: bool) -> Expr:
    """A dim along which one value is written everywhere."""
    keep = (Content.CONST, Content.MEAN) + ((Content.ZERO,) if zero else ())

    def one(info: Info) -> Info:
        return info.becomes(info.content if info.content in keep else Content.FREE, zeroable=zero)

    return annotate(dim, one)
