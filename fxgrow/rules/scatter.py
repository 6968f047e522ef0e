"""Writes by index: scatter, index_add, index_copy, index_fill, index_put, select_scatter."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxgrow.algebra import Conflict, is_unit, resolve, same_size, size_of
from fxgrow.rules.annotation import Content, Dims, annotate, infos
from fxgrow.rules.base import Rule, register_rule
from fxgrow.rules.context import Context, GrowthContext
from fxgrow.rules.forms import Opaque
from fxgrow.rules.indexing import indexed_dims

WHY = "its entries are written by number"


def _both(base: str) -> list[str]:
    """An op and the one that writes in place."""
    name, _, overload = base.partition(".")
    return [f"aten.{name}.{overload}", f"aten.{name}_.{overload}"]


class Scatter(Rule):
    """``scatter(x, dim, index, src)``: entry by entry along every other dim, a write by number along ``dim``."""

    def relate(self, ctx: Context) -> Dims | list[Dims] | None:
        dims, index, source, at = self._operands(ctx)
        for i, (mine, theirs) in enumerate(zip(dims, index, strict=True)):
            column = [mine, theirs, *([source[i]] if source is not None else [])]
            if i == at or not all(same_size(size_of(d), size_of(mine)) for d in column):
                for d in column:
                    ctx.freeze(d, WHY if i == at else "only its first entries are written")
                continue
            for other in column[1:]:
                ctx.unify(mine, other)
        return [resolve(d) for d in dims]

    def grow(self, ctx: GrowthContext) -> Dims | list[Dims] | None:
        dims, index, source, at = self._operands(ctx)
        out = []
        for i, (mine, theirs) in enumerate(zip(dims, index, strict=True)):
            if not ctx.grows(mine):
                out.append(mine)
                continue
            if i == at:
                raise ctx.refuse(WHY)
            if ctx.newborn and any(x.content not in (Content.CONST, Content.ZERO) for x in infos(theirs)):
                raise ctx.refuse("the new entries of an index are not known")
            total = ctx.close(mine)
            if source is not None:
                total = ctx.combine(total, source[i], "zero")
            zeros = source is not None and all(x.content is Content.ZERO for x in infos(total))
            total = total if zeros else ctx.combine(total, theirs, "any")
            out.append(ctx.close(annotate(total, lambda info: info.becomes(info.content, zeroable=False))))
        return out

    @staticmethod
    def _operands(ctx: Context) -> tuple[Dims, Dims, Dims | None, int]:
        dims, index, source = ctx.dims("self"), ctx.dims("index"), ctx.dims("src")
        if not dims or not index:
            raise Conflict("writes into a scalar")
        return dims, index, source, int(ctx.args["dim"]) % len(dims)


register_rule(
    [x for o in ("src", "value", "reduce", "value_reduce") for x in _both(f"scatter.{o}")]
    + [*_both("scatter_add.default"), *_both("scatter_reduce.two")],
    Scatter(),
)


class IndexWrite(Rule):
    """``index_add(x, dim, index, source)`` and its like: along ``dim`` a write by number, else entry by entry."""

    def relate(self, ctx: Context) -> Dims | list[Dims] | None:
        dims, source, at = self._operands(ctx)
        for d in (dims[at], *(ctx.dims("index") or []), *([source[at]] if source is not None else [])):
            ctx.freeze(d, WHY)
        for i, (mine, theirs) in enumerate(zip(dims, source or dims, strict=True)):
            if i != at:
                ctx.unify(mine, theirs)
        return [resolve(d) for d in dims]

    def grow(self, ctx: GrowthContext) -> Dims | list[Dims] | None:
        dims, source, at = self._operands(ctx)
        if ctx.grows(dims[at]):
            raise ctx.refuse(WHY)
        if source is None:
            value = ctx.args.get("value")
            zero = isinstance(value, int | float) and value == 0
            keep = (Content.CONST, Content.MEAN) + ((Content.ZERO,) if zero else ())
            return [
                annotate(
                    ctx.close(d),
                    lambda info: info.becomes(info.content if info.content in keep else Content.FREE, zeroable=zero),
                )
                for d in dims
            ]
        return [d if i == at else ctx.close(ctx.combine(d, source[i], "add")) for i, d in enumerate(dims)]

    @staticmethod
    def _operands(ctx: Context) -> tuple[Dims, Dims | None, int]:
        dims, source = ctx.dims("self"), ctx.dims("source")
        if not dims or (source is not None and len(source) != len(dims)):
            raise Conflict("writes into a scalar, or of one")
        return dims, source, int(ctx.args["dim"]) % len(dims)


register_rule(
    [x for n in ("add.default", "copy.default", "fill.int_Scalar", "fill.int_Tensor") for x in _both(f"index_{n}")],
    IndexWrite(),
)


class IndexPut(Rule):
    """``x[..., idx, ...] = values``: the indexed dims are written by number, the others entry by entry."""

    def relate(self, ctx: Context) -> Dims | list[Dims] | None:
        dims, at, values = self._operands(ctx)
        for i in at:
            ctx.freeze(dims[i], WHY)
        for node in ctx.args["indices"]:
            for d in (ctx.dims(node) or []) if isinstance(node, fx.Node) else []:
                ctx.freeze(d, "it indexes another tensor")
        kept = [d for i, d in enumerate(dims) if i not in at]
        for k, theirs in values.items():
            if k < 0:
                ctx.freeze(theirs, WHY)
            elif not is_unit(theirs):
                ctx.unify(kept[k], theirs)
        return [resolve(d) for d in dims]

    def grow(self, ctx: GrowthContext) -> Dims | list[Dims] | None:
        dims, at, values = self._operands(ctx)
        if any(ctx.grows(dims[i]) for i in at):
            raise ctx.refuse(WHY)
        kept = [i for i in range(len(dims)) if i not in at]
        out = list(dims)
        for k, i in enumerate(kept):
            other = values.get(k)
            if other is None or is_unit(other):
                other = ctx.constant_like(dims[i])
            out[i] = ctx.close(ctx.combine(dims[i], other, "add"))
        return out

    @staticmethod
    def _operands(ctx: Context) -> tuple[Dims, list[int], dict[int, Any]]:
        """Dims, places of the indexed ones, and the dims of the values by the number of the kept dim they belong to."""
        dims, values = ctx.operand("self"), ctx.operand("values")
        at: list[int] = []
        groups: list[int] = []  # where runs of indexed dims start
        rank = 0
        for node, covered in indexed_dims(ctx.args["indices"]):
            value = node.meta["val"]
            rank = max(rank, 1 if value.dtype in (torch.bool, torch.uint8) else value.dim())
            if not at or at[-1] != covered.start - 1:
                groups.append(covered.start)
            at += covered
        first = groups[0] if len(groups) == 1 else 0
        kept = len(dims) - len(at)
        order = [
            *range(first),
            *[-1] * rank,
            *range(first, kept),
        ]  # the kept dim that each dim of the values belongs to
        if values is None or len(values) > len(order):
            raise Conflict("its values do not fit what they are written to")
        tail = order[len(order) - len(values) :]
        return dims, at, {(-1 - j if k < 0 else k): v for j, (k, v) in enumerate(zip(tail, values, strict=True))}


register_rule(_both("index_put.default"), IndexPut())


class SelectScatter(Rule):
    """One entry of a dim replaced."""

    def relate(self, ctx: Context) -> Dims | list[Dims] | None:
        dims, rest, source, at = self._operands(ctx)
        ctx.freeze(dims[at], WHY)
        for mine, theirs in zip(rest, source, strict=True):
            ctx.unify(mine, theirs)
        return [resolve(d) for d in dims]

    def grow(self, ctx: GrowthContext) -> Dims | list[Dims] | None:
        dims, rest, source, at = self._operands(ctx)
        if ctx.grows(dims[at]):
            raise ctx.refuse(WHY)
        out = [ctx.close(ctx.combine(a, b, "add")) for a, b in zip(rest, source, strict=True)]
        return [*out[:at], dims[at], *out[at:]]

    @staticmethod
    def _operands(ctx: Context) -> tuple[Dims, Dims, Dims, int]:
        dims, source = ctx.operand("self"), ctx.operand("src")
        at = int(ctx.args["dim"]) % len(dims)
        return dims, [*dims[:at], *dims[at + 1 :]], source, at


register_rule("aten.select_scatter.default", SelectScatter())


class SliceScatter(SelectScatter):
    """A range of entries of a dim replaced."""

    @staticmethod
    def _operands(ctx: Context) -> tuple[Dims, Dims, Dims, int]:
        dims, source = ctx.operand("self"), ctx.operand("src")
        at = int(ctx.args["dim"]) % len(dims)
        ctx.freeze(source[at], WHY)
        return dims, [*dims[:at], *dims[at + 1 :]], [*source[:at], *source[at + 1 :]], at


register_rule("aten.slice_scatter.default", SliceScatter())
register_rule(
    [*_both("masked_scatter.default"), "aten.take.default", *_both("put.default")],
    Opaque("its entries are taken or written in their order"),
)
