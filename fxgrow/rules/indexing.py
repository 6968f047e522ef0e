"""Look-ups by index: embeddings, gathers, advanced indexing; losses that index classes; tensor constructors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import fx

from fxgrow.axes.expr import is_static
from fxgrow.rules.base import Content, Dims, Info, Resize, Rule, annotate, register_rule

if TYPE_CHECKING:
    from fxgrow.axes.analysis import Relate
    from fxgrow.propagate import Grow


class Embedding(Rule):
    """Rows picked by number: the rows' axis is an index, the columns pass."""

    def relate(self, ctx: Relate) -> Dims | list[Dims] | None:
        weight, index = ctx.dims("weight"), ctx.dims("indices")
        assert weight is not None and index is not None
        role = "vocab" if ctx.from_input(ctx.args["indices"]) else "positions"
        ctx.role(weight[0], role, 100)
        ctx.freeze(weight[0], "its entries are looked up by number")
        return [*index, *weight[1:]]

    def grow(self, ctx: Grow) -> Dims | list[Dims] | None:
        weight, index = ctx.dims("weight"), ctx.dims("indices")
        assert weight is not None and index is not None
        return [*index, *map(ctx.close, weight[1:])]


register_rule("aten.embedding.default", Embedding())


class Index(Rule):
    """``x[..., idx, ...]``: the indexed dims are looked up by number, the others pass."""

    def relate(self, ctx: Relate) -> Dims | list[Dims] | None:
        return self._run(ctx)

    def grow(self, ctx: Grow) -> Dims | list[Dims] | None:
        return self._run(ctx)

    def _run(self, ctx: Any) -> Dims:
        dims = ctx.dims("self")
        indices = list(ctx.args["indices"]) + [None] * (len(dims) - len(ctx.args["indices"]))
        at = [i for i, x in enumerate(indices) if x is not None]
        why = "its entries are looked up by number"
        for i in at:
            ctx.freeze(dims[i], why)
        for node in indices:
            for d in (ctx.dims(node) or []) if isinstance(node, fx.Node) else []:
                ctx.freeze(d, "it indexes another tensor")
        kept = [ctx.close(d) for i, d in enumerate(dims) if i not in at]
        shape = ctx.shape
        width = len(shape) - len(kept)
        adjacent = at == list(range(at[0], at[-1] + 1)) if at else True
        place = at[0] if at and adjacent else 0
        fresh = [ctx.opaque(shape[place + j], why) for j in range(width)]
        return [*kept[:place], *fresh, *kept[place:]]


register_rule("aten.index.Tensor", Index())


class IndexSelect(Rule):
    def relate(self, ctx: Relate) -> Dims | list[Dims] | None:
        return self._run(ctx)

    def grow(self, ctx: Grow) -> Dims | list[Dims] | None:
        return self._run(ctx)

    def _run(self, ctx: Any) -> Dims:
        dims = ctx.dims("self")
        i = ctx.args["dim"] % len(dims)
        why = "its entries are looked up by number"
        ctx.freeze(dims[i], why)
        return [ctx.opaque(ctx.shape[i], why) if j == i else ctx.close(d) for j, d in enumerate(dims)]


register_rule("aten.index_select.default", IndexSelect())


class ClassLoss(Rule):
    """Losses over classes: the class dim is what the targets number, the result is a scalar or per sample."""

    def relate(self, ctx: Relate) -> Dims | list[Dims] | None:
        dims = ctx.dims("self")
        assert dims is not None
        classes = dims[1] if len(dims) > 1 else dims[0]
        ctx.role(classes, "vocab", 10)
        ctx.freeze(classes, "the loss runs over it and targets number its entries")
        for _, other in ctx.tensor_operands():
            for d in other:
                ctx.freeze(d, "the loss runs over it")
        return ctx.opaque_results("the loss runs over it")  # type: ignore[no-any-return]

    def grow(self, ctx: Grow) -> Dims | list[Dims] | None:
        raise ctx.refuse("the loss runs over it")


register_rule(["aten.cross_entropy_loss.default", "aten.nll_loss.default", "aten.nll_loss_nd.default"], ClassLoss())


class ElementLoss(Rule):
    """Losses that average over every element."""

    def relate(self, ctx: Relate) -> Dims | list[Dims] | None:
        a, b = (d for _, d in ctx.tensor_operands()[:2])
        for x, y in zip(reversed(a), reversed(b), strict=False):
            ctx.unify(x, y)
        for d in (*a, *b):
            ctx.freeze(d, "the loss averages over it")
        return ctx.opaque_results("the loss averages over it")  # type: ignore[no-any-return]

    def grow(self, ctx: Grow) -> Dims | list[Dims] | None:
        raise ctx.refuse("the loss averages over it")


register_rule(
    [f"aten.{n}.default" for n in ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "kl_div")]
    + ["aten.binary_cross_entropy.default", "aten.binary_cross_entropy_with_logits.default"],
    ElementLoss(),
)


class Create(Rule):
    """A tensor of one value: any size of it is the same; its literal sizes follow the axes they meet."""

    def __init__(self, shape_argument: str = "size") -> None:
        self.name = shape_argument

    def relate(self, ctx: Relate) -> Dims | list[Dims] | None:
        return [ctx.sized(s) for s in ctx.shape]

    def grow(self, ctx: Grow) -> Dims | list[Dims] | None:
        return [ctx.born(i) for i in range(len(ctx.shape))]

    def resize(self, ctx: Resize) -> None:
        ctx.set_shape(self.name, ctx.dims(ctx.node))


register_rule(
    [f"aten.{n}.{o}" for n, o in (("zeros", "default"), ("ones", "default"), ("full", "default"))]
    + [f"aten.new_{n}.default" for n in ("zeros", "ones", "full")],
    Create(),
)


class Enumerate(Rule):
    """``arange`` and its like: each entry is its own number."""

    def relate(self, ctx: Relate) -> Dims | list[Dims] | None:
        return [ctx.opaque(s, "its entries are consecutive numbers") for s in ctx.shape]

    def grow(self, ctx: Grow) -> Dims | list[Dims] | None:
        raise ctx.refuse("its entries are consecutive numbers")


register_rule(
    ["aten.arange.default", "aten.arange.start", "aten.arange.start_step", "aten.linspace.default"]
    + ["aten.eye.default", "aten.eye.m", "aten.scalar_tensor.default"],
    Enumerate(),
)
_ = (is_static, annotate, Content, Info)
