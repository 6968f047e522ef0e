"""Ops of which nothing is known that growth could use."""

from __future__ import annotations

from dataclasses import dataclass

from fxgrow.rules.annotation import Dims
from fxgrow.rules.base import Row
from fxgrow.rules.context import Context, GrowthContext


@dataclass(frozen=True, eq=False)
class Opaque(Row):
    """An op nothing is known of: its operands' axes are frozen, its results have axes of their own, frozen too."""

    why: str

    @property
    def notation(self) -> str:
        return "frozen"

    def relate(self, ctx: Context) -> Dims | list[Dims] | None:
        for _, dims in ctx.tensor_operands():
            for dim in dims:
                ctx.freeze(dim, self.why)
        return ctx.opaque_results(self.why)

    def grow(self, ctx: GrowthContext) -> Dims | list[Dims] | None:
        raise ctx.refuse(self.why)
