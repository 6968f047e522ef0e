"""Distances and angles: cosine similarity, pairwise distances."""

from __future__ import annotations

import math

from torch import fx

from fxgrow.algebra import UNIT, Conflict, Expr, is_unit, resolve
from fxgrow.ir.ops import bound_arguments
from fxgrow.rules.annotation import Content, Dims, Info, annotate, infos
from fxgrow.rules.base import Rule, register_table
from fxgrow.rules.context import Context, GrowthContext


def table() -> dict[str, Rule]:
    """No two are alike: each is a function of two vectors of its own, and copies are taken back in its own way."""
    return {
        "aten.cosine_similarity": CosineSimilarity(),
        "aten.cdist aten._cdist_forward": PairwiseDistances(),
        "aten.pairwise_distance": RowDistance(),
        "aten.pdist": PairsOfRows(),
    }


def _zero_together(ctx: GrowthContext, exprs: list[Expr]) -> int:
    """Copies of each term of a sum over a dim of two operands, whose new entries must be zero in both."""
    for e in exprs:
        if len(infos(e)) != len(infos(exprs[0])):
            raise ctx.refuse("its operands carry the axis in different places")
        ctx.close(e)
    n = ctx.uniform_factor(exprs[:1])
    for e in exprs if ctx.newborn else ():
        for info in infos(e):
            if info.content is not Content.ZERO:
                ctx.demand(info, Content.ZERO, "a distance is taken over the axis")
    ctx.multiplies(silenced=ctx.newborn)  # where both are zero, so is the gradient of either
    return n


class CosineSimilarity(Rule):
    """The angle between two vectors: copies in both leave it; ``eps``, the least norm, grows like the norms."""

    special = "copies cancel, but for the least norm"
    jumps = True  # a direction, which a vector of zeros has none of

    def relate(self, ctx: Context) -> Dims | list[Dims] | None:
        a, b, at = self._operands(ctx)
        out = []
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            if is_unit(x) != is_unit(y) and i == at:
                raise Conflict("a vector of one entry meets one of several")
            if not is_unit(x) and not is_unit(y):
                ctx.unify(x, y)
            if i != at:
                out.append(resolve(y if is_unit(x) else x))
        return out

    def grow(self, ctx: GrowthContext) -> Dims | list[Dims] | None:
        a, b, at = self._operands(ctx)
        out = [
            annotate(ctx.close(ctx.combine(x, y, "any")), Info.changed)
            for i, (x, y) in enumerate(zip(a, b, strict=True))
            if i != at
        ]
        if ctx.grows(a[at]):
            n = _zero_together(ctx, [a[at], b[at]])
            if n != 1:
                ctx.edit("eps", float(ctx.args["eps"]) * n**0.5)
        return out

    @staticmethod
    def _operands(ctx: Context) -> tuple[Dims, Dims, int]:
        a, b = ctx.dims("x1"), ctx.dims("x2")
        if not a or not b or len(a) != len(b):
            raise Conflict("its operands differ in rank")
        return a, b, int(ctx.args["dim"]) % len(a)


class PairwiseDistances(Rule):
    """``cdist``: "... p m, ... r m -> ... p r"; over m, a 2-norm of differences."""

    special = "a norm of differences, of every two rows"

    def jumps(self, node: fx.Node) -> list[fx.Node]:
        return node.all_input_nodes if bound_arguments(node)["p"] == 0 else []  # a number of differences

    def relate(self, ctx: Context) -> Dims | list[Dims] | None:
        a, b = self._operands(ctx)
        ctx.unify(a[-1], b[-1])
        if ctx.args["p"] != 2:
            ctx.freeze(a[-1], f"distances of order {ctx.args['p']} are taken over it")
        for x, y in zip(a[:-2], b[:-2], strict=True):
            ctx.unify(x, y)
        return [*map(resolve, a[:-1]), resolve(b[-2])]

    def grow(self, ctx: GrowthContext) -> Dims | list[Dims] | None:
        a, b = self._operands(ctx)
        lead = [ctx.close(ctx.combine(x, y, "any")) for x, y in zip(a[:-2], b[:-2], strict=True)]
        out = [annotate(d, Info.changed) for d in (*lead, ctx.close(a[-2]), ctx.close(b[-2]))]
        if ctx.grows(a[-1]):
            n = _zero_together(ctx, [a[-1], b[-1]])
            if n != 1:
                ctx.rescale_output(n**-0.5)
        return out

    @staticmethod
    def _operands(ctx: Context) -> tuple[Dims, Dims]:
        a, b = ctx.dims("x1"), ctx.dims("x2")
        if not a or not b or len(a) != len(b) or any(is_unit(x) != is_unit(y) for x, y in zip(a[:-2], b[:-2])):  # noqa: B905
            raise Conflict("its operands differ in rank")
        return a, b


def _copies_root(n: int, order: float) -> float:
    """By how much n copies of every term make a norm of that order larger."""
    if math.isinf(order):
        return 1.0
    return float(n) if order == 0 else n ** (1.0 / order)


class RowDistance(Rule):
    """``pairwise_distance``: a norm of ``x1 - x2 + eps`` over the last dim, row by row."""

    special = "a norm of differences, to each of which eps is added"

    def jumps(self, node: fx.Node) -> list[fx.Node]:
        return node.all_input_nodes if bound_arguments(node)["p"] == 0 else []  # a number of differences

    def relate(self, ctx: Context) -> Dims | list[Dims] | None:
        out = []
        for x, y in self._pairs(ctx):
            if not is_unit(x) and not is_unit(y):
                ctx.unify(x, y)
            out.append(resolve(y if is_unit(x) else x))
        return [*out[:-1], UNIT] if ctx.args["keepdim"] else out[:-1]

    def grow(self, ctx: GrowthContext) -> Dims | list[Dims] | None:
        *lead, last = self._pairs(ctx)
        out = [annotate(ctx.close(ctx.combine(x, y, "any")), Info.changed) for x, y in lead]
        over = [d for d in last if not is_unit(d)]
        if any(map(ctx.grows, over)):
            if ctx.newborn and ctx.args["eps"] != 0:
                raise ctx.refuse(
                    "it adds eps to every difference, to those of new units too; grow by whole copies instead"
                )
            if ctx.newborn and len(over) == 1:
                raise ctx.refuse("one of its operands is broadcast along the axis")
            factor = _copies_root(_zero_together(ctx, over), float(ctx.args["p"]))
            if factor != 1.0:
                ctx.rescale_output(1.0 / factor)
        return [*out, UNIT] if ctx.args["keepdim"] else out

    @staticmethod
    def _pairs(ctx: Context) -> list[tuple[Expr, Expr]]:
        a, b = ctx.dims("x1"), ctx.dims("x2")
        if not a or not b:
            raise Conflict("an operand has no dims")
        rank = max(len(a), len(b))
        return [(a[i] if -i <= len(a) else UNIT, b[i] if -i <= len(b) else UNIT) for i in range(-rank, 0)]


class PairsOfRows(Rule):
    """``pdist``: a norm of the difference of every two rows."""

    special = "its entries are pairs of the entries of one dim"
    jumps = True

    def relate(self, ctx: Context) -> Dims | list[Dims] | None:
        dims = ctx.dims("self")
        assert dims is not None
        ctx.freeze(dims[0], "every two of its entries make a pair")
        return [ctx.opaque(ctx.shape[0], "its entries are pairs")]

    def grow(self, ctx: GrowthContext) -> Dims | list[Dims] | None:
        dims = ctx.dims("self")
        assert dims is not None
        if ctx.grows(dims[1]):
            factor = _copies_root(_zero_together(ctx, [dims[1]]), float(ctx.args["p"]))
            if factor != 1.0:
                ctx.rescale_output(1.0 / factor)
        return ctx.result_dims


register_table(__name__, table())
