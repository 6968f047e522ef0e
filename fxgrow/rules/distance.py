"""Distances and angles: cosine similarity, pairwise distances."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fxgrow.axes.expr import Conflict, Expr, is_unit, resolve
from fxgrow.rules.base import Content, Dims, Info, Rule, annotate, infos, register_rule

if TYPE_CHECKING:
    from fxgrow.axes.analysis import Relate
    from fxgrow.propagate import Grow


def _nonlinear(info: Info) -> Info:
    return info.becomes(info.content if info.content is Content.CONST else Content.FREE, zeroable=False)


def _zero_together(ctx: Grow, exprs: list[Expr]) -> int:
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
    ctx.outcome.multiplied = True
    return n


class CosineSimilarity(Rule):
    """The angle between two vectors: copies in both leave it; ``eps``, the least norm, grows like the norms."""

    def relate(self, ctx: Relate) -> Dims | list[Dims] | None:
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

    def grow(self, ctx: Grow) -> Dims | list[Dims] | None:
        a, b, at = self._operands(ctx)
        out = [
            annotate(ctx.close(ctx.combine(x, y, "any")), _nonlinear)
            for i, (x, y) in enumerate(zip(a, b, strict=True))
            if i != at
        ]
        if ctx.grows(a[at]):
            n = _zero_together(ctx, [a[at], b[at]])
            if n != 1:
                ctx.edit("eps", float(ctx.args["eps"]) * n**0.5)
        return out

    @staticmethod
    def _operands(ctx: Any) -> tuple[Dims, Dims, int]:
        a, b = ctx.dims("x1"), ctx.dims("x2")
        if not a or not b or len(a) != len(b):
            raise Conflict("its operands differ in rank")
        return a, b, int(ctx.args["dim"]) % len(a)


register_rule("aten.cosine_similarity.default", CosineSimilarity())


class PairwiseDistances(Rule):
    """``cdist``: "... p m, ... r m -> ... p r"; over m, a 2-norm of differences."""

    def relate(self, ctx: Relate) -> Dims | list[Dims] | None:
        a, b = self._operands(ctx)
        ctx.unify(a[-1], b[-1])
        if ctx.args["p"] != 2:
            ctx.freeze(a[-1], f"distances of order {ctx.args['p']} are taken over it")
        for x, y in zip(a[:-2], b[:-2], strict=True):
            ctx.unify(x, y)
        return [*map(resolve, a[:-1]), resolve(b[-2])]

    def grow(self, ctx: Grow) -> Dims | list[Dims] | None:
        a, b = self._operands(ctx)
        lead = [ctx.close(ctx.combine(x, y, "any")) for x, y in zip(a[:-2], b[:-2], strict=True)]
        out = [annotate(d, _nonlinear) for d in (*lead, ctx.close(a[-2]), ctx.close(b[-2]))]
        if ctx.grows(a[-1]):
            n = _zero_together(ctx, [a[-1], b[-1]])
            if n != 1:
                ctx.rescale_output(n**-0.5)
        return out

    @staticmethod
    def _operands(ctx: Any) -> tuple[Dims, Dims]:
        a, b = ctx.dims("x1"), ctx.dims("x2")
        if not a or not b or len(a) != len(b) or any(is_unit(x) != is_unit(y) for x, y in zip(a[:-2], b[:-2])):  # noqa: B905
            raise Conflict("its operands differ in rank")
        return a, b


register_rule(["aten.cdist.default", "aten._cdist_forward.default"], PairwiseDistances())
