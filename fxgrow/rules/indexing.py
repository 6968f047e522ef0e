"""Look-ups by index: embeddings, gathers, advanced indexing; losses that index classes; tensor constructors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fxgrow.algebra import Conflict, Expr, is_static, resolve, same_size, size_of
from fxgrow.ir.ops import bound_arguments
from fxgrow.rules.annotation import Content, Dims, Info, annotate, infos
from fxgrow.rules.base import Rule, register_rule
from fxgrow.rules.context import Context, GrowthContext
from fxgrow.rules.forms import Opaque
from fxgrow.rules.resize import Resize


def picked(index: Expr) -> Expr:
    """A dim of an index as a dim of what it picks: entry 0, which is picked where the index is zero, is not zero."""
    return annotate(
        index, lambda info: info if info.content is Content.CONST else info.becomes(Content.FREE, zeroable=False)
    )


class Embedding(Rule):
    """Rows picked by number: the rows' axis is an index, the columns pass."""

    linear = True

    def relate(self, ctx: Context) -> Dims | list[Dims] | None:
        weight, index = ctx.dims("weight"), ctx.dims("indices")
        assert weight is not None and index is not None
        role = "vocab" if ctx.from_input(ctx.args["indices"]) else "positions"
        ctx.role(weight[0], role, 100)
        ctx.freeze(weight[0], "its entries are looked up by number")
        return [*index, *weight[1:]]

    def grow(self, ctx: GrowthContext) -> Dims | list[Dims] | None:
        weight, index = ctx.dims("weight"), ctx.dims("indices")
        assert weight is not None and index is not None
        return [*(picked(ctx.close(d)) for d in index), *map(ctx.close, weight[1:])]


register_rule("aten.embedding.default", Embedding())


class OneHot(Rule):
    """A number as a unit vector: the classes' axis is numbered; no old number sets a new class's entry."""

    def relate(self, ctx: Context) -> Dims | list[Dims] | None:
        index = ctx.dims("self")
        assert index is not None
        classes = ctx.sized(ctx.shape[-1])
        ctx.role(classes, "vocab", 100)
        ctx.freeze(classes, "its entries are picked by number")
        return [*index, classes]

    def grow(self, ctx: GrowthContext) -> Dims | list[Dims] | None:
        index = ctx.dims("self")
        assert index is not None
        classes = ctx.constant_dim(len(index))
        return [*(picked(ctx.close(d)) for d in index), annotate(classes, lambda info: info.becomes(Content.ZERO))]

    def resize(self, ctx: Resize) -> None:
        classes = ctx.dims(ctx.node)[-1]
        if ctx.changed(classes):
            ctx.set("num_classes", ctx.new_size(classes))


register_rule("aten.one_hot.default", OneHot())


class Index(Rule):
    """``x[..., idx, ...]``: the indexed dims are looked up by number, the others pass."""

    linear = True

    def relate(self, ctx: Context) -> Dims | list[Dims] | None:
        return self._run(ctx)

    def grow(self, ctx: GrowthContext) -> Dims | list[Dims] | None:
        return self._run(ctx)

    def _run(self, ctx: Context) -> Dims:
        dims = ctx.operand("self")
        part = self._part(ctx, dims)
        if part is not None:
            return part
        found = indexed_dims(ctx.args["indices"])
        at = [i for _, covered in found for i in covered]
        why = "its entries are looked up by number"
        role = _looked_up(ctx, [node for node, _ in found], dims)
        for i in at:
            ctx.freeze(dims[i], why)
            if role and len(at) == 1:
                ctx.role(dims[i], role, 100)
        for node, _ in found:
            for d in ctx.dims(node) or []:
                ctx.freeze(d, "it indexes another tensor")
        kept = [ctx.close(d) for i, d in enumerate(dims) if i not in at]
        shape = ctx.shape
        width = len(shape) - len(kept)
        adjacent = at == list(range(at[0], at[-1] + 1)) if at else True
        place = at[0] if at and adjacent else 0
        fresh = [ctx.opaque(shape[place + j], why) for j in range(width)]
        return [*kept[:place], *fresh, *kept[place:]]

    @staticmethod
    def _part(ctx: Context, dims: Dims) -> Dims | None:
        """``x[..., [-2], ...]``: a constant list of consecutive numbers, counted from the end, is a slice."""
        found = [(i, x) for i, x in enumerate(ctx.args["indices"]) if x is not None]
        if len(found) != 1 or not is_static(size_of(dims[found[0][0]])):
            return None
        at, node = found[0]
        numbers = ctx.constant(node)
        if numbers is None or numbers.dim() != 1 or numbers.is_floating_point() or numbers.dtype == torch.bool:
            return None
        listed = [int(x) for x in numbers.tolist()]
        total = size_of(dims[at])
        if not listed or listed != list(range(listed[0], listed[0] + len(listed))):
            return None
        if (listed[0] < 0) != (listed[-1] < 0) or not -total <= listed[0] <= listed[-1] < total:
            return None
        start = listed[0] % total
        sizes = [s for s in (start, len(listed), total - start - len(listed)) if s > 0]
        pieces = list(ctx.split(dims[at], sizes)) if len(sizes) > 1 else [dims[at]]
        taken = pieces[1 if start > 0 else 0]
        # the numbers stay as they are: neither what they pick nor what they are counted from may grow
        counted = pieces[pieces.index(taken) + 1 :] if listed[0] < 0 else pieces[: pieces.index(taken)]
        for piece in (taken, *counted):
            ctx.freeze(piece, "its entries are looked up by number")
        return [ctx.close(d) for d in (*dims[:at], taken, *dims[at + 1 :])]


register_rule("aten.index.Tensor", Index())


def indexed_dims(indices: Sequence[fx.Node | None]) -> list[tuple[fx.Node, range]]:
    """Every index of ``x[i, j, ...]`` and the dims of x that it stands for: a mask covers as many as it has."""
    out: list[tuple[fx.Node, range]] = []
    place = 0
    for node in indices:
        width = 1
        if node is not None:
            value = node.meta["val"]
            width = value.dim() if value.dtype in (torch.bool, torch.uint8) else 1
            out.append((node, range(place, place + width)))
        place += width
    return out


def _looked_up(ctx: Context, indices: list[Any], dims: Dims) -> str:
    """What a parameter's entries are that are picked by number."""
    if not ctx.from_parameter(ctx.args["self"]):
        return ""
    if not any(ctx.from_input(x) for x in indices if x is not None):
        return "positions"
    return "experts" if len(dims) > 2 else "vocab"


class IndexSelect(Rule):
    """Entries of one dim looked up by number; the other dims pass."""

    linear = True

    def relate(self, ctx: Context) -> Dims | list[Dims] | None:
        return self._run(ctx)

    def grow(self, ctx: GrowthContext) -> Dims | list[Dims] | None:
        return self._run(ctx)

    def _run(self, ctx: Context) -> Dims:
        dims = ctx.operand("self")
        i = ctx.args["dim"] % max(len(dims), 1)  # a scalar counts as one dim
        why = "its entries are looked up by number"
        for d in dims[i : i + 1]:
            ctx.freeze(d, why)
        for d in ctx.dims("index") or []:
            ctx.freeze(d, "it indexes another tensor")
        size = ctx.shape[i : i + 1]  # nothing is left of the dim where the index is a scalar
        return [*map(ctx.close, dims[:i]), *(ctx.opaque(s, why) for s in size), *map(ctx.close, dims[i + 1 :])]


register_rule("aten.index_select.default", IndexSelect())


class Gather(Rule):
    """``gather(x, dim, index)``: entry by entry along every other dim, a look-up along ``dim``."""

    linear = True

    def relate(self, ctx: Context) -> Dims | list[Dims] | None:
        dims, index, at = self._operands(ctx)
        why = "its entries are looked up by number"
        ctx.freeze(dims[at], why)
        for i, (mine, theirs) in enumerate(zip(dims, index, strict=True)):
            if i == at:
                continue
            if same_size(size_of(mine), size_of(theirs)):
                ctx.unify(mine, theirs)
            else:
                ctx.freeze(mine, "only its first entries are looked up")
                ctx.freeze(theirs, "only its first entries are looked up")
        return [resolve(d) for d in index]

    def grow(self, ctx: GrowthContext) -> Dims | list[Dims] | None:
        dims, index, at = self._operands(ctx)
        ctx.freeze(dims[at], "its entries are looked up by number")
        out = []
        for i, (mine, theirs) in enumerate(zip(dims, index, strict=True)):
            if ctx.newborn and any(x.content not in (Content.CONST, Content.ZERO) for x in infos(theirs)):
                raise ctx.refuse("the new entries of an index are not known")
            out.append(picked(ctx.close(theirs)) if i == at else ctx.close(ctx.combine(mine, theirs, "any")))
        return out

    @staticmethod
    def _operands(ctx: Context) -> tuple[Dims, Dims, int]:
        dims, index = ctx.operand("self"), ctx.operand("index")
        if not dims:
            raise Conflict("a gather from a scalar")
        return dims, index, int(ctx.args["dim"]) % len(dims)


register_rule("aten.gather.default", Gather())


class TakeAlongDim(Gather):
    """``take_along_dim``: a gather of tensors that broadcast; only those of one shape are followed."""

    @staticmethod
    def _operands(ctx: Context) -> tuple[Dims, Dims, int]:
        dims, index = ctx.operand("self"), ctx.operand("indices")
        at = ctx.args["dim"]
        if not dims or at is None:
            raise Conflict("takes entries of a flattened tensor")
        at = int(at) % len(dims)
        pairs = [(a, b) for i, (a, b) in enumerate(zip(dims, index, strict=True)) if i != at]
        if not all(same_size(size_of(a), size_of(b)) for a, b in pairs):
            raise Conflict("takes entries by an index that broadcasts")
        return dims, index, at


register_rule("aten.take_along_dim.default", TakeAlongDim())


class Bucketize(Rule):
    """The number of the bucket that each entry falls into; the buckets' edges are numbered."""

    def jumps(self, node: fx.Node) -> list[fx.Node]:
        return node.all_input_nodes

    def relate(self, ctx: Context) -> Dims | list[Dims] | None:
        for d in ctx.dims("boundaries") or []:
            ctx.freeze(d, "its entries are edges of numbered buckets")
        return list(ctx.dims("self") or [])

    def grow(self, ctx: GrowthContext) -> Dims | list[Dims] | None:
        if any(ctx.grows(d) for d in ctx.dims("boundaries") or []):
            raise ctx.refuse("its entries are edges of numbered buckets")

        def one(info: Info) -> Info:
            return info.becomes(info.content if info.content is Content.CONST else Content.FREE, zeroable=False)

        return [annotate(ctx.close(d), one) for d in ctx.dims("self") or []]


register_rule("aten.bucketize.Tensor", Bucketize())


BAG_MAX = 2


class EmbeddingBag(Rule):
    """Sums, means or maxima of rows picked by number: the rows' axis is an index, the columns pass."""

    def jumps(self, node: fx.Node) -> list[fx.Node]:
        return node.all_input_nodes if bound_arguments(node)["mode"] == BAG_MAX else []  # which row is largest

    def relate(self, ctx: Context) -> Dims | list[Dims] | None:
        weight = ctx.dims("weight")
        assert weight is not None
        ctx.role(weight[0], "vocab" if ctx.from_input(ctx.args["indices"]) else "positions", 100)
        why = "its entries are looked up by number"
        indices = [d for n in ("indices", "offsets", "per_sample_weights") for d in ctx.dims(n) or []]
        for d in (weight[0], *indices):
            ctx.freeze(d, why)
        first, *rest = ctx.opaque_results(why)
        if ctx.args.get("mode") == BAG_MAX:  # the rows that were largest, column by column
            rest[-1] = [rest[-1][0], weight[1]]
        return [[first[0], weight[1]], *rest]

    def grow(self, ctx: GrowthContext) -> Dims | list[Dims] | None:
        weight = ctx.dims("weight")
        assert weight is not None
        (bags, _), *rest = ctx.result_dims
        columns = ctx.close(weight[1])
        if ctx.args.get("mode") == BAG_MAX:
            columns = annotate(columns, lambda i: i.becomes(Content.FREE) if i.content is Content.MEAN else i)
            rest[-1] = [rest[-1][0], annotate(columns, lambda i: i.becomes(Content.FREE, zeroable=False))]
        return [[bags, columns], *rest]


register_rule(["aten.embedding_bag.default", "aten.embedding_bag.padding_idx"], EmbeddingBag())


class Renorm(Rule):
    """``embedding_renorm_``: the rows that are looked up are shortened to a norm, in the table itself.

    It divides by the norm plus 1e-7, a constant that no argument sets. Zeros leave a row's norm, copies do not.
    """

    def relate(self, ctx: Context) -> Dims | list[Dims] | None:
        dims = ctx.dims("self")
        assert dims is not None
        ctx.freeze(dims[0], "its entries are looked up by number")
        return dims

    def grow(self, ctx: GrowthContext) -> Dims | list[Dims] | None:
        dims = ctx.dims("self")
        assert dims is not None
        columns = [d for d in dims[1:] if ctx.grows(d)]
        if columns and ctx.args["norm_type"] != math.inf:
            if ctx.uniform_factor(columns) != 1:
                raise ctx.refuse(
                    "copies make the norm of a row larger, and it divides by the norm plus 1e-7, which max_norm cannot "
                    "make up for; add units instead, with `fill: add`"
                )
            for info in (i for d in columns for i in infos(d)) if ctx.newborn else ():
                if info.content is not Content.ZERO:
                    ctx.demand(info, Content.ZERO, "a norm runs over the axis")
        elif columns and ctx.newborn:
            raise ctx.refuse("new units could be the largest of their row; grow by whole copies instead")
        rows = annotate(dims[0], lambda i: i if i.content is Content.ZERO else i.becomes(Content.FREE))
        return [ctx.close(d) for d in (rows, *dims[1:])]


register_rule("aten.embedding_renorm_.default", Renorm())
register_rule(
    [f"aten.{n}.default" for n in ("nonzero", "argwhere", "masked_select", "bincount", "histc", "_unique2")]
    + [f"aten.{n}.default" for n in ("unique_consecutive", "unique_dim", "nonzero_static")]
    + ["aten.isin.Tensor_Tensor", "aten.searchsorted.Tensor", "aten.repeat_interleave.Tensor"]
    + ["aten.repeat_interleave.self_Tensor"],
    Opaque("what it gives depends on the values of its entries"),
)


class ClassLoss(Rule):
    """Losses over classes: the class dim is what the targets number, the result is a scalar or per sample."""

    def jumps(self, node: fx.Node) -> list[fx.Node]:
        return node.all_input_nodes

    def relate(self, ctx: Context) -> Dims | list[Dims] | None:
        dims = ctx.dims("self")
        assert dims is not None
        classes = dims[1] if len(dims) > 1 else dims[0]
        ctx.role(classes, "vocab", 10)
        ctx.freeze(classes, "the loss runs over it and targets number its entries")
        for _, other in ctx.tensor_operands():
            for d in other:
                ctx.freeze(d, "the loss runs over it")
        return ctx.opaque_results("the loss runs over it")

    def grow(self, ctx: GrowthContext) -> Dims | list[Dims] | None:
        raise ctx.refuse("the loss runs over it")


register_rule(["aten.cross_entropy_loss.default", "aten.nll_loss.default", "aten.nll_loss_nd.default"], ClassLoss())


register_rule(
    [f"aten.{n}.default" for n in ("cosine_embedding_loss", "margin_ranking_loss", "triplet_margin_loss")]
    + ["aten.multi_margin_loss.default", "aten.multilabel_margin_loss.default"]
    + ["aten.ctc_loss.IntList", "aten.ctc_loss.Tensor"],
    Opaque("the loss averages over it"),
)


class Create(Rule):
    """A tensor of one value: any size of it is the same; its literal sizes follow the axes they meet."""

    ignored = ("self", "fill_value")

    def __init__(self, shape_argument: str = "size") -> None:
        self.name = shape_argument

    def relate(self, ctx: Context) -> Dims | list[Dims] | None:
        return [ctx.sized(s) for s in ctx.shape]

    def grow(self, ctx: GrowthContext) -> Dims | list[Dims] | None:
        return [ctx.constant_dim(i) for i in range(len(ctx.shape))]

    def resize(self, ctx: Resize) -> None:
        ctx.set_shape(self.name, ctx.dims(ctx.node), infer=False)


register_rule(
    [f"aten.{n}.{o}" for n, o in (("zeros", "default"), ("ones", "default"), ("full", "default"))]
    + [f"aten.new_{n}.default" for n in ("zeros", "ones", "full")],
    Create(),
)


class Own(Rule):
    """A tensor whose entries are told apart, whatever its size: its axes are its own, and frozen."""

    ignored = ("self",)

    def __init__(self, why: str) -> None:
        self.why = why

    def relate(self, ctx: Context) -> Dims | list[Dims] | None:
        return [ctx.opaque(s, self.why) for s in ctx.shape]

    def grow(self, ctx: GrowthContext) -> Dims | list[Dims] | None:
        return ctx.result_dims


register_rule(
    ["aten.arange.default", "aten.arange.start", "aten.arange.start_step", "aten.linspace.default"]
    + ["aten.eye.default", "aten.eye.m", "aten.scalar_tensor.default"]
    + ["aten.tril_indices.default", "aten.triu_indices.default"],
    Own("its entries are consecutive numbers"),
)
register_rule(
    [f"aten.{n}.default" for n in ("rand", "randn", "randint", "randperm", "new_empty")]
    + ["aten.empty.memory_format", "aten.randint.low", "aten.normal.float_float"],
    Own("its entries are drawn at random or not set"),
)
