"""Ops that only move elements: one function on dims serves analysis and growth alike."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from fxgrow.rules.annotation import Dims
from fxgrow.rules.base import Row
from fxgrow.rules.context import Context, GrowthContext
from fxgrow.rules.resize import Resize
from fxgrow.rules.values import RangeOf, of_operand


@dataclass(frozen=True, eq=False)
class Structural(Row):
    """An op that only moves elements: one function from dims to dims serves analysis and growth alike.

    Attributes:
        dims: gets the context and the dims of ``operand``, and returns those of the result(s). The first line of its
            docstring is the row's notation.
        literals: re-emits the literal arguments that depend on sizes.
        operand: schema name of the operand that ``dims`` gets; the first tensor unless said. Of a list of tensors it
            gets a list of their dims.
    """

    noted: ClassVar[str] = "dims"

    dims: Callable[[Any, Any], Dims | list[Dims]]
    literals: Callable[[Resize], None] | None = None
    operand: str | None = None
    moves: bool = field(default=True, kw_only=True)
    range: RangeOf | None = field(default=of_operand, kw_only=True)

    @property
    def notation(self) -> str:
        return (inspect.getdoc(self.dims) or self.dims.__name__).partition("\n")[0]

    def relate(self, ctx: Context) -> Dims | list[Dims] | None:
        return self.dims(ctx, self._given(ctx))

    def grow(self, ctx: GrowthContext) -> Dims | list[Dims] | None:
        return self.dims(ctx, self._given(ctx))

    def _given(self, ctx: Context) -> Dims | list[Dims]:
        name = self.operand or ctx.first
        if isinstance(ctx.args.get(name), list | tuple):
            return [dims for owner, dims in ctx.tensor_operands() if owner == name]
        return ctx.dims(name) or []

    def resize(self, ctx: Resize) -> None:
        if self.literals is not None:
            self.literals(ctx)
