"""Losses of two tensors, entry by entry, then averaged, summed or left alone."""

from __future__ import annotations

from dataclasses import dataclass

from fxgrow.algebra import is_unit
from fxgrow.rules.annotation import Content, Dims, annotate, infos
from fxgrow.rules.base import register_rule
from fxgrow.rules.context import Context, GrowthContext
from fxgrow.rules.forms import Pointwise

NONE, MEAN, SUM = 0, 1, 2


@dataclass(frozen=True, eq=False)
class ElementLoss(Pointwise):
    """A loss of two tensors and, for some, weights.

    An average bears n copies of every entry as it is, a sum is n times as large. Entries that are zero in both tensors
    add nothing where ``zero`` says so: then a sum stays, and an average is over more entries.

    Attributes:
        domain: only numbers between 0 and 1 are taken, so that new entries of unknown value are not.
    """

    domain: bool = False

    def relate(self, ctx: Context) -> Dims | list[Dims] | None:
        operands = [dims for _, dims in ctx.tensor_operands()]
        rank = max(map(len, operands), default=0)
        if ctx.args["reduction"] == NONE:
            return super().relate(ctx)
        for i in range(-rank, 0):
            exprs = [d[i] for d in operands if -i <= len(d) and not is_unit(d[i])]
            for other in exprs[1:]:
                ctx.unify(exprs[0], other)
        return []

    def grow(self, ctx: GrowthContext) -> Dims | list[Dims] | None:
        if ctx.args["reduction"] == NONE:
            if ctx.newborn and self.domain and any(ctx.grows(d) for _, dims in ctx.tensor_operands() for d in dims):
                raise ctx.refuse("new units may lie outside of 0 to 1, where the loss is not defined")
            out = super().grow(ctx)
            return [annotate(d, lambda info: info.becomes(info.content, zeroable=False)) for d in out or []]
        operands = [dims for _, dims in ctx.tensor_operands()]
        rank = max(map(len, operands), default=0)
        over = []
        for i in range(-rank, 0):
            here = [d[i] for d in operands if -i <= len(d) and ctx.grows(d[i])]
            if here:
                over.append(here)
        if not over:
            return []
        for dim in (d for here in over for d in here):
            ctx.close(dim)
        n = ctx.uniform_factor([here[0] for here in over])
        if ctx.newborn:
            self._check_new(ctx, over, n)
        elif ctx.args["reduction"] == SUM and n != 1:
            ctx.rescale_output(1.0 / n)
        return []

    def _check_new(self, ctx: GrowthContext, over: list[Dims], n: int) -> None:
        (first, *others) = over
        if not self.zero or others or not ctx.is_factor(first[0], False):
            raise ctx.refuse("the loss runs over it, and new units would add to it; grow by whole copies instead")
        if len(first) < len([d for _, d in ctx.tensor_operands() if d]):
            raise ctx.refuse("the loss runs over it, and one of its operands is broadcast along it")
        for info in (x for dim in first for x in infos(dim)):
            if info.content is not Content.ZERO:
                ctx.demand(info, Content.ZERO, "the loss runs over it")
        ctx.multiplies(silenced=True)  # where both are zero, so is the gradient of either
        factor = 1.0 / n
        if ctx.args["reduction"] == MEAN:
            factor = ctx.growth.new / (ctx.growth.copies * ctx.growth.old)
        if factor != 1.0:
            ctx.rescale_output(factor)


register_rule(
    [f"aten.{n}.default" for n in ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss")], ElementLoss(zero=True)
)
register_rule(
    [
        f"aten.{n}.default"
        for n in ("kl_div", "soft_margin_loss", "poisson_nll_loss", "hinge_embedding_loss")
        + ("binary_cross_entropy_with_logits",)
    ],
    ElementLoss(jumps=True),
)
register_rule("aten.binary_cross_entropy.default", ElementLoss(domain=True, jumps=True))
