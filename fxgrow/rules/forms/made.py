"""Tensors made of numbers alone."""

from __future__ import annotations

from dataclasses import dataclass, field

from fxgrow.rules.annotation import Dims
from fxgrow.rules.base import Row
from fxgrow.rules.context import Context, GrowthContext
from fxgrow.rules.resize import Resize


@dataclass(frozen=True, eq=False)
class Made(Row):
    """A tensor made of numbers alone: its literal sizes follow the axes that its dims meet, or it cannot grow.

    Attributes:
        sizes: the argument with the sizes of the result, along which its entries are all alike.
        why: why it cannot grow where its entries are told apart.
    """

    sizes: str = ""
    why: str = field(default="", kw_only=True)
    ignored: tuple[str, ...] = field(default=("self",), kw_only=True)

    def __post_init__(self) -> None:
        if bool(self.sizes) == bool(self.why):
            raise ValueError("a tensor made of numbers has either sizes that follow, or a reason why they cannot")

    @property
    def notation(self) -> str:
        return "-> …" if self.sizes else "-> …, frozen"

    def relate(self, ctx: Context) -> Dims | list[Dims] | None:
        return [ctx.opaque(s, self.why) if self.why else ctx.sized(s) for s in ctx.shape]

    def grow(self, ctx: GrowthContext) -> Dims | list[Dims] | None:
        if self.why:
            return list(ctx.result_dims)
        return [ctx.constant_dim(i) for i in range(len(ctx.shape))]

    def resize(self, ctx: Resize) -> None:
        if self.sizes:
            ctx.set_shape(self.sizes, ctx.dims(ctx.node), infer=False)
