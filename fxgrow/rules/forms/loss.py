"""Losses of two tensors, entry by entry, then averaged, summed or left alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fxgrow.algebra import is_unit
from fxgrow.rules.annotation import Content, Dims, annotate, infos
from fxgrow.rules.base import Row
from fxgrow.rules.context import Context, GrowthContext
from fxgrow.rules.forms.pointwise import Pointwise

NONE, MEAN, SUM = 0, 1, 2


@dataclass(frozen=True, eq=False)
class ElementLoss(Row):
    """A loss of two tensors and, for some, weights.

    An average bears n copies of every entry as it is, a sum is n times as large. Entries that are zero in both tensors
    add nothing where ``zero`` says so: then a sum stays, and an average is over more entries.

    Attributes:
        domain, why: as :class:`~fxgrow.rules.forms.Pointwise` has them.
    """

    domain: tuple[str, ...] | Callable[[dict[str, Any]], tuple[str, ...]] = field(default=(), kw_only=True)
    why: str = field(default=Pointwise.why, kw_only=True)

    @property
    def notation(self) -> str:
        return "..., ... -> ... or one number"

    @property
    def entries(self) -> Pointwise:
        """The loss of each entry."""
        return Pointwise(domain=self.domain, why=self.why)

    @property
    def depends_on_all(self) -> bool:
        return True

    def relate(self, ctx: Context) -> Dims:
        if ctx.args["reduction"] == NONE:
            return self.entries.relate(ctx)
        operands = [dims for _, dims in ctx.tensor_operands()]
        rank = max(map(len, operands), default=0)
        for i in range(-rank, 0):
            exprs = [d[i] for d in operands if -i <= len(d) and not is_unit(d[i])]
            for other in exprs[1:]:
                ctx.unify(exprs[0], other)
        return []

    def grow(self, ctx: GrowthContext) -> Dims:
        if ctx.args["reduction"] == NONE:
            out = self.entries.grow(ctx)
            return [annotate(d, lambda info: info.becomes(info.content, zeroable=False)) for d in out]
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
