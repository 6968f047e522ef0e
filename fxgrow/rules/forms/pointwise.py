"""Element-wise ops with broadcasting."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fxgrow.algebra import UNIT, Expr, is_unit, resolve
from fxgrow.rules.annotation import Content, Dims, Info, annotate
from fxgrow.rules.base import Row, jumping_operands
from fxgrow.rules.context import Context, GrowthContext


@dataclass(frozen=True, eq=False)
class Pointwise(Row):
    """An element-wise op with broadcasting.

    Attributes:
        combine: how two operands' new entries meet: ``add``, ``mul``, ``zero`` (zero where all are zero) or ``any``
            (nothing is kept).
        zero: f(0) = 0 for the op with one tensor operand and its literals.
        mean: the op is affine, so that the mean of the results is the result of the mean.
    """

    combine: str = "any"
    zero: bool | Callable[[dict[str, Any]], bool] = field(default=False, kw_only=True)
    mean: bool | Callable[[dict[str, Any]], bool] = field(default=False, kw_only=True)

    @property
    def notation(self) -> str:
        return "..., ... -> ..."

    def factors(self, node: fx.Node) -> list[fx.Node]:
        """Those of a product; a quotient has a pole where its divisor is zero, and what ``out`` held does not count."""
        if self.combine != "mul":
            return []
        others = [*jumping_operands(node), node.kwargs.get("out")]
        return [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor) and n not in others]

    def relate(self, ctx: Context) -> Dims | list[Dims] | None:
        shape = ctx.shape
        out: Dims = []
        operands = ctx.tensor_operands()
        for i in range(-len(shape), 0):
            exprs = [d[i] for _, d in operands if -i <= len(d) and not is_unit(d[i])]
            for other in exprs[1:]:
                ctx.unify(exprs[0], other)
            out.append(resolve(exprs[0]) if exprs else ctx.sized(shape[i]))
        return out

    def grow(self, ctx: GrowthContext) -> Dims | list[Dims] | None:
        operands = ctx.tensor_operands()
        out: Dims = []
        rank = max((len(d) for _, d in operands), default=0)
        for i in range(-rank, 0):
            exprs = [d[i] if -i <= len(d) else UNIT for _, d in operands]
            present = [e for e in exprs if not is_unit(e)]
            if not present:
                out.append(UNIT)
                continue
            if not any(ctx.grows(e) for e in present):
                out.append(present[0])
                continue
            if len(operands) == 1:
                out.append(self._unary(ctx, present[0]))
                continue
            total = exprs[0]
            for e in exprs[1:]:
                total = ctx.combine(total, e, self.combine)
            out.append(ctx.close(total))
        return out

    def _unary(self, ctx: GrowthContext, expr: Expr) -> Expr:
        zero = self.zero(ctx.args) if callable(self.zero) else self.zero
        mean = self.mean(ctx.args) if callable(self.mean) else self.mean

        def one(info: Info) -> Info:
            keep = (
                info.content is Content.CONST
                or (info.content is Content.ZERO and zero)
                or (info.content is Content.MEAN and mean)
            )
            return info.becomes(info.content if keep else Content.FREE, zeroable=zero)

        return annotate(expr, one)
