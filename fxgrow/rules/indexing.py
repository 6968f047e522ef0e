"""Look-ups by number: embeddings, gathers, advanced indexing, buckets."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx

from fxgrow.algebra import Conflict, Expr, is_static, resolve, same_size, size_of
from fxgrow.ir.nodes import info_of
from fxgrow.ir.ops import bound_arguments
from fxgrow.ir.sizes import sizes_of
from fxgrow.rules import values
from fxgrow.rules.annotation import Content, Dims, Info, annotate, infos
from fxgrow.rules.base import Picked, Rule, register_table
from fxgrow.rules.context import Context, GrowthContext
from fxgrow.rules.forms import Opaque, Structural
from fxgrow.rules.resize import Resize


def table() -> dict[str, Rule]:
    """The rows of this family."""
    return {
        # the same for all that is not looked up
        "aten.index.Tensor": Structural(index, moves=False, linear=True, picks=picked_by_indices),
        "aten.index_select": Structural(index_select, moves=False, linear=True, picks=picked_by_index),
        # look-ups in which numbers, or what they pick, grow too
        "aten.gather": Gather(),
        "aten.take_along_dim": TakeAlongDim(),
        "aten.embedding": Embedding(),
        "aten.embedding_bag aten.embedding_bag.padding_idx": EmbeddingBag(),
        "aten.embedding_renorm_": Renorm(),
        "aten.one_hot": OneHot(),
        "aten.bucketize.Tensor": Bucketize(),
        # as many as their entries say
        "aten.nonzero aten.nonzero_static aten.argwhere aten.masked_select": Opaque(_BY_VALUE),
        "aten._unique2 aten.unique_consecutive aten.unique_dim aten.bincount aten.histc": Opaque(_BY_VALUE),
        "aten.isin.Tensor_Tensor aten.searchsorted.Tensor": Opaque(_BY_VALUE),
        "aten.repeat_interleave.Tensor aten.repeat_interleave.self_Tensor": Opaque(_BY_VALUE),
    }


_BY_NUMBER = "its entries are looked up by number"
_BY_VALUE = "what it gives depends on the values of its entries"


# rows ---------------------------------------------------------------------------------------------------------------


def index(ctx: Context, dims: Dims) -> Dims:
    """… a …, b -> … b …, the two frozen: entries of one dim by number, or of several by a mask or by several numbers"""
    part = _part(ctx, dims)
    if part is not None:
        return part
    found = indexed_dims(ctx.args["indices"])
    at = [i for _, covered in found for i in covered]
    role = _looked_up(ctx, [node for node, _ in found], dims)
    for i in at:
        ctx.freeze(dims[i], _BY_NUMBER)
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
    fresh = [ctx.opaque(shape[place + j], _BY_NUMBER) for j in range(width)]
    return [*kept[:place], *fresh, *kept[place:]]


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
        ctx.freeze(piece, _BY_NUMBER)
    return [ctx.close(d) for d in (*dims[:at], taken, *dims[at + 1 :])]


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


def index_select(ctx: Context, dims: Dims) -> Dims:
    """… a …, b -> … b …, the two frozen: entries of one dim by number"""
    i = ctx.args["dim"] % max(len(dims), 1)  # a scalar counts as one dim
    for d in dims[i : i + 1]:
        ctx.freeze(d, _BY_NUMBER)
    for d in ctx.dims("index") or []:
        ctx.freeze(d, "it indexes another tensor")
    size = ctx.shape[i : i + 1]  # nothing is left of the dim where the index is a scalar
    return [*map(ctx.close, dims[:i]), *(ctx.opaque(s, _BY_NUMBER) for s in size), *map(ctx.close, dims[i + 1 :])]


def picked_by_indices(node: fx.Node) -> list[Picked]:
    """the dims that indices stand for, by theirs"""
    args = bound_arguments(node)
    found = indexed_dims(args["indices"])
    return [Picked(args["self"], i, numbers=numbers) for numbers, covered in found for i in covered]


def picked_by_index(node: fx.Node) -> list[Picked]:
    """dim, by index"""
    args = bound_arguments(node)
    return [Picked(args["self"], int(args["dim"]) % max(1, len(sizes_of(args["self"]) or [])), numbers=args["index"])]


def gathered(node: fx.Node) -> list[Picked]:
    """dim, by index, and of the others the first ones, where index has fewer"""
    (looked_up,), args = picked_by_index(node), bound_arguments(node)
    pairs = enumerate(zip(sizes_of(args["self"]) or [], sizes_of(args["index"]) or [], strict=False))
    shorter = [(i, theirs) for i, (mine, theirs) in pairs if i != looked_up.dim and not same_size(mine, theirs)]
    return [looked_up, *(Picked(args["self"], i, first=theirs) for i, theirs in shorter)]


def picked_rows(node: fx.Node) -> list[Picked]:
    """the rows of a table, by indices"""
    args = bound_arguments(node)
    return [Picked(args["weight" if "weight" in args else "self"], 0, numbers=args["indices"])]


# classes ------------------------------------------------------------------------------------------------------------


def picked(index: Expr) -> Expr:
    """A dim of an index as a dim of what it picks: entry 0, which is picked where the index is zero, is not zero."""
    return annotate(
        index, lambda info: info if info.content is Content.CONST else info.becomes(Content.FREE, zeroable=False)
    )


class Embedding(Rule):
    """Rows picked by number: the rows' axis is an index, the columns pass."""

    picks = staticmethod(picked_rows)
    special = "the dims of the numbers, which may grow, come first, and those of the table after its first follow"
    linear = True

    def relate(self, ctx: Context) -> Dims | list[Dims] | None:
        weight, index = ctx.operand("weight"), ctx.operand("indices")
        ctx.role(weight[0], "vocab" if ctx.from_input(ctx.args["indices"]) else "positions", 100)
        ctx.freeze(weight[0], _BY_NUMBER)
        for other in _of_one_vocabulary(ctx.node):
            table = ctx.dims(bound_arguments(other)["weight"])
            if table and size_of(table[0]) == size_of(weight[0]):
                ctx.unify(weight[0], table[0])
        return [*index, *weight[1:]]

    def grow(self, ctx: GrowthContext) -> Dims | list[Dims] | None:
        weight, index = ctx.operand("weight"), ctx.operand("indices")
        return [*(picked(ctx.close(d)) for d in index), *map(ctx.close, weight[1:])]


def _of_one_vocabulary(node: fx.Node) -> Iterator[fx.Node]:
    """Earlier look-ups by the same numbers in the same layer: of a table and of its low-rank adapter."""
    path = info_of(node).module_path
    for other in bound_arguments(node)["indices"].users:
        if other is node:
            return
        if other.target != node.target or not path:
            continue
        if info_of(other).inside(path) or info_of(node).inside(info_of(other).module_path):
            yield other


class OneHot(Rule):
    """A number as a unit vector: the classes' axis is numbered; no old number sets a new class's entry."""

    special = "it makes a dim of its own, which is zero in new entries"

    def relate(self, ctx: Context) -> Dims | list[Dims] | None:
        index = ctx.operand("self")
        classes = ctx.sized(ctx.shape[-1])
        ctx.role(classes, "vocab", 100)
        ctx.freeze(classes, "its entries are picked by number")
        return [*index, classes]

    def grow(self, ctx: GrowthContext) -> Dims | list[Dims] | None:
        index = ctx.operand("self")
        classes = ctx.constant_dim(len(index))
        return [*(picked(ctx.close(d)) for d in index), annotate(classes, lambda info: info.becomes(Content.ZERO))]

    def resize(self, ctx: Resize) -> None:
        classes = ctx.dims(ctx.node)[-1]
        if ctx.changed(classes):
            ctx.set("num_classes", ctx.new_size(classes))


class Gather(Rule):
    """``gather(x, dim, index)``: entry by entry along every other dim, a look-up along ``dim``."""

    picks: Callable[[fx.Node], list[Picked]] | None = staticmethod(gathered)
    special = "numbers are met entry by entry along some dims, of which they may be the first ones only"
    linear = True
    range = staticmethod(values.of_operand)

    def relate(self, ctx: Context) -> Dims | list[Dims] | None:
        dims, index, at = self._operands(ctx)
        ctx.freeze(dims[at], _BY_NUMBER)
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
        ctx.freeze(dims[at], _BY_NUMBER)
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


class TakeAlongDim(Gather):
    """``take_along_dim``: a gather of tensors that broadcast; only those of one shape are followed."""

    picks = None  # along a dim that broadcasts, all entries

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


class Bucketize(Rule):
    """The number of the bucket that each entry falls into; the buckets' edges are numbered."""

    special = "one operand passes, the other is a table that is compared with"

    def jumps(self, node: fx.Node) -> list[fx.Node]:
        return node.all_input_nodes

    def relate(self, ctx: Context) -> Dims | list[Dims] | None:
        for d in ctx.dims("boundaries") or []:
            ctx.freeze(d, "its entries are edges of numbered buckets")
        return list(ctx.dims("self") or [])

    def grow(self, ctx: GrowthContext) -> Dims | list[Dims] | None:
        if any(ctx.grows(d) for d in ctx.dims("boundaries") or []):
            raise ctx.refuse("its entries are edges of numbered buckets")
        return [annotate(ctx.close(d), Info.changed) for d in ctx.dims("self") or []]


BAG_MAX = 2


class EmbeddingBag(Rule):
    """Sums, means or maxima of rows picked by number: the rows' axis is an index, the columns pass."""

    picks = staticmethod(picked_rows)
    special = "what its results are depends on how it reduces"

    def jumps(self, node: fx.Node) -> list[fx.Node]:
        return node.all_input_nodes if bound_arguments(node)["mode"] == BAG_MAX else []  # which row is largest

    def relate(self, ctx: Context) -> Dims | list[Dims] | None:
        weight = ctx.operand("weight")
        ctx.role(weight[0], "vocab" if ctx.from_input(ctx.args["indices"]) else "positions", 100)
        indices = [d for n in ("indices", "offsets", "per_sample_weights") for d in ctx.dims(n) or []]
        for d in (weight[0], *indices):
            ctx.freeze(d, _BY_NUMBER)
        first, *rest = ctx.opaque_results(_BY_NUMBER)
        if ctx.args.get("mode") == BAG_MAX:  # the rows that were largest, column by column
            rest[-1] = [rest[-1][0], weight[1]]
        return [[first[0], weight[1]], *rest]

    def grow(self, ctx: GrowthContext) -> Dims | list[Dims] | None:
        weight = ctx.operand("weight")
        (bags, _), *rest = ctx.result_dims
        columns = ctx.close(weight[1])
        if ctx.args.get("mode") == BAG_MAX:
            columns = annotate(columns, lambda i: i.becomes(Content.FREE) if i.content is Content.MEAN else i)
            rest[-1] = [rest[-1][0], annotate(columns, lambda i: i.becomes(Content.FREE, zeroable=False))]
        return [[bags, columns], *rest]

    def resize(self, ctx: Resize) -> None:
        """The row that is left out keeps its number where that counts from the end."""
        rows, number = ctx.dims(ctx.args["weight"])[0], ctx.args.get("padding_idx")
        if isinstance(number, int) and number < 0 and ctx.changed(rows):
            ctx.set("padding_idx", number + size_of(rows))


class Renorm(Rule):
    """``embedding_renorm_``: the rows that are looked up are shortened to a norm, in the table itself.

    It divides by the norm plus 1e-7, a constant that no argument sets. Zeros leave a row's norm, copies do not.
    """

    picks = staticmethod(picked_rows)
    special = "it writes into the table, and divides by a norm plus a constant that is no argument"

    def relate(self, ctx: Context) -> Dims | list[Dims] | None:
        dims = ctx.operand("self")
        ctx.freeze(dims[0], _BY_NUMBER)
        return dims

    def grow(self, ctx: GrowthContext) -> Dims | list[Dims] | None:
        dims = ctx.operand("self")
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


register_table(__name__, table())
