"""Changes of dtype."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from fxgrow.ir.dtypes import is_fine
from fxgrow.rules.annotation import Content, Dims, Info, annotate
from fxgrow.rules.base import Row
from fxgrow.rules.context import Context, GrowthContext


@dataclass(frozen=True, eq=False)
class Cast(Row):
    """A change of dtype: linear among real and complex numbers, up to the rounding that the model has anyway.

    Rounding to integers, or to the few numbers that 8 bits can hold, is not linear; it keeps zeros and broadcasts, and
    not the mean. Truth values jump at 0, where a zero may be one up to rounding only (``x - mean(x)``).
    """

    casts: bool = field(default=True, kw_only=True)
    moves: bool = field(default=True, kw_only=True)
    zero: bool = field(default=True, kw_only=True)

    @property
    def notation(self) -> str:
        return "... -> ..."

    def relate(self, ctx: Context) -> Dims:
        return ctx.operand("self")

    def grow(self, ctx: GrowthContext) -> Dims:
        dims = ctx.operand("self")
        if holds_numbers(ctx.node.meta.get("val")):
            return dims
        to_truth = ctx.node.meta["val"].dtype is torch.bool and holds_numbers(ctx.node.all_input_nodes[0].meta["val"])
        return [annotate(d, Info.changed if to_truth else _rounded) for d in dims]


def holds_numbers(value: Any) -> bool:
    """Whether a tensor's numbers are real or complex ones, to the precision that models compute in."""
    return isinstance(value, torch.Tensor) and is_fine(value.dtype)


def _rounded(info: Info) -> Info:
    return info.becomes(Content.FREE) if info.content is Content.MEAN else info
