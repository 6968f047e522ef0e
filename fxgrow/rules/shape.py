"""Ops that only move elements: reshapes, permutations, splits, concatenations, slices, broadcasts."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from fxgrow.algebra import (
    UNIT,
    Concat,
    Conflict,
    Expr,
    Size,
    Unifier,
    concat,
    is_static,
    is_unit,
    product,
    quotient,
    resolve,
    same_size,
    size_of,
)
from fxgrow.ir.sizes import literal_size
from fxgrow.rules.annotation import Dims
from fxgrow.rules.base import Rule, register_rule
from fxgrow.rules.context import Context, GrowthContext
from fxgrow.rules.forms import Structural
from fxgrow.rules.resize import Resize


def _dim(ctx: Context, dims: Dims, name: str = "dim", extra: int = 0) -> int:
    return int(ctx.args[name]) % (len(dims) + extra)


# reshape -----------------------------------------------------------------------------------------------------------


def _reshape(ctx: Context, dims: Dims) -> Dims:
    """Common refinement; where that fails, of the equal dims at both ends alone: what lies between is frozen."""
    shape = ctx.shape
    try:
        return list(ctx.regroup(dims, shape))
    except Conflict as conflict:
        first = last = 0
        shortest = min(len(dims), len(shape))
        while last < shortest and same_size(size_of(dims[-1 - last]), shape[-1 - last]):
            last += 1
        while first < shortest - last and same_size(size_of(dims[first]), shape[first]):
            first += 1
        between, new = dims[first : len(dims) - last], shape[first : len(shape) - last]
        if not between or not new or first + last == 0:
            raise
        for dim in between:
            ctx.freeze(dim, str(conflict))
        return [*dims[:first], *(ctx.opaque(s, str(conflict)) for s in new), *dims[len(dims) - last :]]


def _resize_shape(name: str) -> Callable[[Resize], None]:
    def resize(ctx: Resize) -> None:
        ctx.set_shape(name, ctx.dims(ctx.node))

    return resize


register_rule(["aten.view.default", "aten._unsafe_view.default"], Structural(_reshape, _resize_shape("size")))
register_rule("aten.reshape.default", Structural(_reshape, _resize_shape("shape")))
register_rule(["aten.flatten.using_ints", "aten.ravel.default"], Structural(_reshape))


def _resize_unflatten(ctx: Resize) -> None:
    source = ctx.dims(ctx.args["self"])
    dim = int(ctx.args["dim"]) % len(source)
    ctx.set_shape("sizes", ctx.dims(ctx.node)[dim : dim + len(ctx.args["sizes"])])


register_rule("aten.unflatten.int", Structural(_reshape, _resize_unflatten))


# permute -----------------------------------------------------------------------------------------------------------


def _transpose(ctx: Context, dims: Dims) -> Dims:
    if not dims:
        return dims
    a, b = (v % len(dims) for k, v in ctx.args.items() if k in ("dim0", "dim1", "axis0", "axis1"))
    out = list(dims)
    out[a], out[b] = out[b], out[a]
    return out


def _movedim(ctx: Context, dims: Dims) -> Dims:
    source, target = ctx.args["source"], ctx.args["destination"]
    if not dims:
        return dims
    source = [s % len(dims) for s in (source if isinstance(source, list | tuple) else [source])]
    target = [t % len(dims) for t in (target if isinstance(target, list | tuple) else [target])]
    rest = [d for i, d in enumerate(dims) if i not in source]
    moved = dict(zip(target, (dims[s] for s in source), strict=True))
    return [moved[i] if i in moved else rest.pop(0) for i in range(len(dims))]


register_rule(["aten.transpose.int", "aten.swapaxes.default"], Structural(_transpose))
register_rule("aten.permute.default", Structural(lambda ctx, dims: [dims[i] for i in ctx.args["dims"]]))
register_rule(
    [f"aten.{n}.default" for n in ("t", "numpy_T", "mT", "mH", "matrix_H", "adjoint")],
    Structural(lambda ctx, dims: dims[::-1] if len(dims) <= 2 else [*dims[:-2], dims[-1], dims[-2]]),
)
register_rule(["aten.movedim.int", "aten.movedim.intlist"], Structural(_movedim))


# dims of size 1 ----------------------------------------------------------------------------------------------------


def _unsqueeze(ctx: Context, dims: Dims) -> Dims:
    i = _dim(ctx, dims, extra=1)
    return [*dims[:i], UNIT, *dims[i:]]


def _squeeze(ctx: Context, dims: Dims) -> Dims:
    which = ctx.args.get("dim")
    if which is None:
        return [d for d in dims if not is_unit(d)]
    which = [w % max(len(dims), 1) for w in (which if isinstance(which, list | tuple) else [which])]
    return [d for i, d in enumerate(dims) if i not in which or not is_unit(d)]


register_rule("aten.unsqueeze.default", Structural(_unsqueeze))
register_rule(["aten.squeeze.default", "aten.squeeze.dim", "aten.squeeze.dims"], Structural(_squeeze))


def _at_least(rank: int) -> Callable[[Any, Dims], Dims]:
    """``atleast_1d`` and its like: dims of size 1 in front, and behind the second one where there are three."""

    def f(ctx: Context, dims: Dims) -> Dims:
        if rank == 3 and len(dims) == 2:
            return [*dims, UNIT]
        lead = [UNIT] if rank > 1 and len(dims) == 1 else []
        return dims if len(dims) >= rank else (lead + dims + [UNIT] * (rank - 1 - len(dims)) if dims else [UNIT] * rank)

    return f


for _n in (1, 2, 3):
    register_rule(f"aten.atleast_{_n}d.default", Structural(_at_least(_n)))


# broadcasts --------------------------------------------------------------------------------------------------------


def _expand(ctx: Context, dims: Dims) -> Dims:
    shape = ctx.shape
    lead = len(shape) - len(dims)
    out: Dims = []
    for i, size in enumerate(shape):
        dim = dims[i - lead] if i >= lead else UNIT
        out.append(dim if not is_unit(dim) or same_size(size, 1) else ctx.constant_dim(i))
        if is_unit(dim) and is_static(size):
            ctx.role(out[-1], "groups")
    return out


def _resize_expand(ctx: Resize) -> None:
    """A -1 among these sizes says that a dim stays as it is: it stands for no size of a broadcast."""
    before, after = ctx.dims(ctx.args["self"]), ctx.dims(ctx.node)
    sizes = list(ctx.args["size"])
    lead = len(after) - len(before)
    for i, dim in enumerate(after):
        if not ctx.changed(dim):
            continue
        if i >= lead and not is_unit(before[i - lead]):
            sizes[i] = -1
        else:
            sizes[i] = ctx.new_size(dim)
    if sizes != list(ctx.args["size"]):
        ctx.set("size", sizes)


register_rule(["aten.expand.default", "aten.broadcast_to.default"], Structural(_expand, _resize_expand))


def _expand_as(ctx: Context, dims: Dims) -> Dims:
    other = ctx.operand("other")
    lead = len(other) - len(dims)
    out: Dims = []
    for i, like in enumerate(other):
        dim = dims[i - lead] if i >= lead else UNIT
        if not is_unit(dim) and not is_unit(like):
            ctx.unify(dim, like)
        out.append(ctx.constant_like(like) if is_unit(dim) and not is_unit(like) else dim)
    return out


register_rule("aten.expand_as.default", Structural(_expand_as))


def _view_as(ctx: Context, dims: Dims) -> Dims:
    out = list(ctx.regroup(dims, ctx.shape))
    for mine, theirs in zip(out, ctx.operand("other"), strict=True):
        ctx.unify(mine, theirs)
    return out


class BroadcastTensors(Rule):
    """Every operand expanded to their common shape."""

    def relate(self, ctx: Context) -> Dims | list[Dims] | None:
        return self._join(ctx)

    def grow(self, ctx: GrowthContext) -> Dims | list[Dims] | None:
        return self._join(ctx)

    def _join(self, ctx: Context) -> list[Dims]:
        operands = [d for _, d in ctx.tensor_operands()]
        rank = max(map(len, operands))
        operands = [[UNIT] * (rank - len(d)) + d for d in operands]
        whole: Dims = []
        for column in zip(*operands, strict=True):
            present = [d for d in column if not is_unit(d)]
            for other in present[1:]:
                ctx.unify(present[0], other)
            whole.append(present[0] if present else UNIT)
        return [
            [
                ctx.constant_like(w) if is_unit(x) and not is_unit(w) else ctx.close(x)
                for x, w in zip(d, whole, strict=True)
            ]
            for d in operands
        ]


register_rule("aten.broadcast_tensors.default", BroadcastTensors())
register_rule(["aten.view_as.default", "aten.reshape_as.default"], Structural(_view_as))


def _repeat(ctx: Context, dims: Dims) -> Dims:
    """The tensor laid end to end: a new outer factor along every dim that is repeated."""
    repeats = list(ctx.args["repeats"])
    repeats = [1] * (len(dims) - len(repeats)) + repeats  # tile may name fewer dims
    padded = [UNIT] * (len(repeats) - len(dims)) + dims
    out: Dims = []
    for i, (n, dim) in enumerate(zip(repeats, padded, strict=True)):
        if isinstance(n, int) and n == 0:
            raise Conflict("repeated no times")
        if isinstance(n, int) and n == 1:
            out.append(dim)
        elif is_unit(dim):
            out.append(ctx.constant_dim(i))
        else:
            n = n if isinstance(n, int) else quotient(ctx.shape[i], size_of(dim))
            if n is None:
                raise Conflict("repeated a dynamic number of times")
            out.append(product([ctx.outer(i, n), dim]))
    return out


def _resize_repeat(ctx: Resize) -> None:
    before, after = ctx.dims(ctx.args["self"]), ctx.dims(ctx.node)
    repeats = list(ctx.args["repeats"])
    lead = len(repeats) - len(before)
    for i, dim in enumerate(after):
        inner = before[i - lead] if i >= lead else UNIT
        if ctx.changed(dim) or ctx.changed(inner):
            repeats[i] = quotient(ctx.new_size(dim), ctx.new_size(inner))
            if repeats[i] is None:
                raise ctx.refuse("it is repeated a number of times that is computed while the model runs")
    if repeats != list(ctx.args["repeats"]):
        ctx.set("repeats", repeats)


register_rule("aten.repeat.default", Structural(_repeat, _resize_repeat))


def _tile(ctx: Context, dims: Dims) -> Dims:
    ctx.args = {**ctx.args, "repeats": ctx.args["dims"]}
    return _repeat(ctx, dims)


def _resize_tile(ctx: Resize) -> None:
    ctx.args["repeats"] = [1] * (len(ctx.dims(ctx.args["self"])) - len(ctx.args["dims"])) + list(ctx.args["dims"])
    _resize_repeat(ctx)
    if ctx.edit is not None:
        ctx.edit.arguments["dims"] = ctx.edit.arguments.pop("repeats")


register_rule("aten.tile.default", Structural(_tile, _resize_tile))


def _repeat_interleave(ctx: Context, dims: Dims) -> Dims:
    """Each entry repeated in place: a new inner factor."""
    repeats, dim = ctx.args["repeats"], ctx.args["dim"]
    if not isinstance(repeats, int) or dim is None:
        raise Conflict("repeats that are not one number")
    i = int(dim) % len(dims)
    inner = ctx.inner(i, repeats)
    ctx.role(inner, "groups")
    return [*dims[:i], product([dims[i], inner]), *dims[i + 1 :]]


def _resize_repeat_interleave(ctx: Resize) -> None:
    i = int(ctx.args["dim"]) % len(ctx.dims(ctx.args["self"]))
    before, after = ctx.dims(ctx.args["self"])[i], ctx.dims(ctx.node)[i]
    ctx.set("repeats", ctx.new_size(after) // ctx.new_size(before))
    if ctx.args.get("output_size") is not None and ctx.changed(after):
        ctx.set("output_size", ctx.new_size(after))


register_rule("aten.repeat_interleave.self_int", Structural(_repeat_interleave, _resize_repeat_interleave))


# windows, diagonals and triangles of dims ----------------------------------------------------------------------------


def _channel_shuffle(ctx: Context, dims: Dims) -> Dims:
    """Channels as (groups, each) become (each, groups)."""
    groups = int(ctx.args["groups"])
    outer, inner = ctx.regroup([dims[1]], [groups, quotient(size_of(dims[1]), groups)])
    return [dims[0], product([inner, outer]), *dims[2:]]


def _resize_channel_shuffle(ctx: Resize) -> None:
    channels = ctx.dims(ctx.args["input" if "input" in ctx.args else "self"])[1]
    groups = int(ctx.args["groups"])
    outer, _ = Unifier().regroup([channels], [groups, size_of(channels) // groups])
    if ctx.changed(outer):
        ctx.set("groups", ctx.new_size(outer))


register_rule("aten.channel_shuffle.default", Structural(_channel_shuffle, _resize_channel_shuffle))
register_rule("aten.native_channel_shuffle.default", Structural(_channel_shuffle, _resize_channel_shuffle))


def _pixel_shuffle(ctx: Context, dims: Dims) -> Dims:
    """``(c r r) h w -> c (h r) (w r)``: channels pass, what is spread over space does not."""
    why = "pixel_shuffle spreads it over space"
    block = int(ctx.args["upscale_factor"]) ** 2
    channels, spread = ctx.regroup([dims[-3]], [quotient(size_of(dims[-3]), block), block])
    for d in (spread, *dims[-2:]):
        ctx.freeze(d, why)
    return [*dims[:-3], channels, *(ctx.opaque(s, why) for s in ctx.shape[-2:])]


def _pixel_unshuffle(ctx: Context, dims: Dims) -> Dims:
    """``c (h r) (w r) -> (c r r) h w``."""
    why = "pixel_unshuffle gathers it from space"
    for d in dims[-2:]:
        ctx.freeze(d, why)
    gathered = ctx.opaque(int(ctx.args["downscale_factor"]) ** 2, why)
    return [*dims[:-3], product([dims[-3], gathered]), *(ctx.opaque(s, why) for s in ctx.shape[-2:])]


register_rule("aten.pixel_shuffle.default", Structural(_pixel_shuffle))
register_rule("aten.pixel_unshuffle.default", Structural(_pixel_unshuffle))


def _unfold(ctx: Context, dims: Dims) -> Dims:
    """Windows along one dim; their entries stand in a new last dim."""
    i = int(ctx.args["dimension"]) % max(len(dims), 1)
    why = "windows slide over it"
    for d in dims[i : i + 1]:
        ctx.freeze(d, why)
    shape = ctx.shape
    return [ctx.opaque(s, why) if j in (i, len(dims)) or not dims else dims[j] for j, s in enumerate(shape)]


def _diagonal(ctx: Context, dims: Dims) -> Dims:
    a, b = (int(ctx.args[n]) % len(dims) for n in ("dim1", "dim2"))
    why = "a diagonal is taken of it"
    for i in (a, b):
        ctx.freeze(dims[i], why)
    return [*(d for i, d in enumerate(dims) if i not in (a, b)), ctx.opaque(ctx.shape[-1], why)]


def _diag_embed(ctx: Context, dims: Dims) -> Dims:
    shape, why = ctx.shape, "it becomes a diagonal"
    at = {int(ctx.args[n]) % len(shape) for n in ("dim1", "dim2")}
    ctx.freeze(dims[-1], why)
    rest = iter(dims[:-1])
    return [ctx.opaque(s, why) if i in at else next(rest) for i, s in enumerate(shape)]


register_rule("aten.unfold.default", Structural(_unfold))
register_rule("aten.diagonal.default", Structural(_diagonal))
register_rule("aten.diag_embed.default", Structural(_diag_embed))


def _view_as_real(ctx: Context, dims: Dims) -> Dims:
    return [*dims, ctx.opaque(2, "real and imaginary parts")]


def _view_as_complex(ctx: Context, dims: Dims) -> Dims:
    ctx.freeze(dims[-1], "real and imaginary parts")
    return dims[:-1]


register_rule("aten.view_as_real.default", Structural(_view_as_real))
register_rule("aten.view_as_complex.default", Structural(_view_as_complex))


class MeshGrid(Rule):
    """Every vector laid along a dim of its own, constant along the others."""

    moves = True

    def relate(self, ctx: Context) -> Dims | list[Dims] | None:
        return self._lay(ctx)

    def grow(self, ctx: GrowthContext) -> Dims | list[Dims] | None:
        return self._lay(ctx)

    @staticmethod
    def _lay(ctx: Context) -> list[Dims]:
        vectors = [d[0] if d else UNIT for _, d in ctx.tensor_operands()]
        order = list(range(len(vectors)))
        if ctx.args.get("indexing") == "xy" and len(order) > 1:
            order[:2] = [1, 0]
        return [[v if j == k else ctx.constant_like(vectors[j]) for j in order] for k, v in enumerate(vectors)]


register_rule(["aten.meshgrid.default", "aten.meshgrid.indexing"], MeshGrid())


# split and join ----------------------------------------------------------------------------------------------------


def _part_sizes(total: Size, size: int) -> list[int]:
    if not is_static(total):
        raise Conflict("splits a dim of dynamic size")
    return [min(size, total - s) for s in range(0, total, size)]


def _split_into(ctx: Context, dims: Dims, sizes: list[int]) -> list[Dims]:
    i = _dim(ctx, dims)
    parts = [p for p in sizes if p > 0]
    pieces = iter(ctx.split(dims[i], parts))
    return [[*dims[:i], next(pieces), *dims[i + 1 :]] for _ in parts]


def _split(ctx: Context, dims: Dims) -> list[Dims]:
    i = _dim(ctx, dims)
    dim, size = dims[i], literal_size(ctx.args["split_size"])
    if is_static(size_of(dim)) and isinstance(size, int):
        return _split_into(ctx, dims, _part_sizes(size_of(dim), size))
    # dynamic parts that were joined before
    if isinstance(dim, Concat) and all(same_size(size_of(p), size) for p in dim.parts):
        return [[*dims[:i], p, *dims[i + 1 :]] for p in dim.parts]
    raise Conflict("splits a dim of dynamic size")


def _split_with_sizes(ctx: Context, dims: Dims) -> list[Dims]:
    sizes = ctx.args["split_sizes" if "split_sizes" in ctx.args else "split_size"]
    if not all(isinstance(s, int) and s > 0 for s in sizes):
        raise Conflict("splits into parts of dynamic or empty size")
    return _split_into(ctx, dims, list(sizes))


def _chunk(ctx: Context, dims: Dims) -> list[Dims]:
    total = size_of(dims[_dim(ctx, dims)])
    n = int(ctx.args["chunks"])
    return _split_into(ctx, dims, _part_sizes(total, -(-total // n) if is_static(total) else 1))


def _resize_split(ctx: Resize) -> None:
    """Parts of unequal new size need ``split_with_sizes``."""
    source = ctx.dims(ctx.args["self"])
    i = int(ctx.args["dim"]) % len(source)
    if not ctx.changed(source[i]):
        return
    sizes = [ctx.new_size(part[i]) for part in ctx.dims(ctx.node)]
    ctx.retarget("aten.split_with_sizes.default", {"self": ctx.args["self"], "split_sizes": sizes, "dim": i})


register_rule(["aten.split.Tensor", "aten.unsafe_split.Tensor"], Structural(_split, _resize_split))
register_rule(
    ["aten.split_with_sizes.default", "aten.split.sizes", "aten.unsafe_split_with_sizes.default"],
    Structural(_split_with_sizes, _resize_split),
)
register_rule(["aten.chunk.default", "aten.unsafe_chunk.default"], Structural(_chunk, _resize_split))


def _tensor_split(along: int | None) -> Structural:
    """``tensor_split`` and its like: into a number of nearly equal parts, or at given places."""

    def dim(args: dict[str, Any], rank: int) -> int:
        i = args["dim"] if along is None else (0 if along == 1 and rank == 1 else along)
        return int(i) % rank

    def f(ctx: Context, dims: Dims) -> list[Dims]:
        ctx.args = {**ctx.args, "dim": dim(ctx.args, len(dims))}
        total = size_of(dims[ctx.args["dim"]])
        places = ctx.args.get("indices")
        if not is_static(total) or (places is not None and not all(isinstance(p, int) for p in places)):
            raise Conflict("splits a dim of dynamic size")
        if places is None:
            n = int(ctx.args["sections"])
            sizes = [total // n + (k < total % n) for k in range(n)]
        else:
            edges = [0, *(min(max(p + (total if p < 0 else 0), 0), total) for p in places), total]
            sizes = [b - a for a, b in itertools.pairwise(edges)]
        if not all(s > 0 for s in sizes):
            raise Conflict("splits into parts of dynamic or empty size")
        return _split_into(ctx, dims, sizes)

    def resize(ctx: Resize) -> None:
        ctx.args["dim"] = dim(ctx.args, len(ctx.dims(ctx.args["self"])))
        _resize_split(ctx)

    return Structural(f, resize)


register_rule(["aten.tensor_split.sections", "aten.tensor_split.indices"], _tensor_split(None))
for _name, _along in (("hsplit", 1), ("vsplit", 0), ("dsplit", 2)):
    register_rule([f"aten.{_name}.int", f"aten.{_name}.array"], _tensor_split(_along))


def _unbind(ctx: Context, dims: Dims) -> list[Dims]:
    i = _dim(ctx, dims)
    units = ctx.units(dims[i])
    if units is None:
        raise Conflict(f"every one of {size_of(dims[i])} entries is used by itself")
    return [[*dims[:i], *dims[i + 1 :]] for _ in units]


register_rule("aten.unbind.int", Structural(_unbind))


class Cat(Rule):
    """Concatenation along one dim; the other dims are shared."""

    moves = True

    def relate(self, ctx: Context) -> Dims | list[Dims] | None:
        return self._join(ctx)

    def grow(self, ctx: GrowthContext) -> Dims | list[Dims] | None:
        return self._join(ctx)

    def _join(self, ctx: Context) -> Dims:
        operands = [d for _, d in ctx.tensor_operands()]
        operands = [d for d in operands if not (len(d) == 1 and same_size(size_of(d[0]), 0))]
        i = int(ctx.args.get("dim") or 0) % len(operands[0])
        out: Dims = []
        for j in range(len(operands[0])):
            column = [d[j] for d in operands]
            out.append(concat([resolve(c) for c in column]) if j == i else ctx.merge(column))
        return out


register_rule(["aten.cat.default", "aten.concat.default", "aten.concatenate.default"], Cat())


class StackedCat(Cat):
    """``hstack`` and its like: operands of too few dims are given some, then concatenated."""

    def __init__(self, widen: Callable[[Any, Dims], Dims], dim: Callable[[int], int]) -> None:
        self.widen, self.dim = widen, dim

    def _join(self, ctx: Context) -> Dims:
        operands = [self.widen(ctx, d) for _, d in ctx.tensor_operands()]
        i = self.dim(len(operands[0]))
        columns = zip(*operands, strict=True)
        return [concat([resolve(c) for c in k]) if j == i else ctx.merge(list(k)) for j, k in enumerate(columns)]


register_rule("aten.hstack.default", StackedCat(_at_least(1), lambda rank: 0 if rank == 1 else 1))
register_rule(["aten.vstack.default", "aten.row_stack.default"], StackedCat(_at_least(2), lambda rank: 0))
register_rule("aten.dstack.default", StackedCat(_at_least(3), lambda rank: 2))
register_rule(
    "aten.column_stack.default",
    StackedCat(lambda ctx, d: d if len(d) > 1 else [*d, *[UNIT] * (2 - len(d))], lambda rank: 1),
)


class Stack(Rule):
    moves = True

    def relate(self, ctx: Context) -> Dims | list[Dims] | None:
        return self._join(ctx)

    def grow(self, ctx: GrowthContext) -> Dims | list[Dims] | None:
        return self._join(ctx)

    def _join(self, ctx: Context) -> Dims:
        operands = [d for _, d in ctx.tensor_operands()]
        i = int(ctx.args.get("dim") or 0) % (len(operands[0]) + 1)
        out = [ctx.merge([d[j] for d in operands]) for j in range(len(operands[0]))]
        out.insert(i, concat([UNIT] * len(operands)))
        return out


register_rule("aten.stack.default", Stack())


# slices ------------------------------------------------------------------------------------------------------------

_END = 2**63 - 1


def _slice_range(args: dict[str, Any], total: Size) -> tuple[Any, Any, int]:
    start, end = args.get("start"), args.get("end")
    start = 0 if start is None else start
    end = _END if end is None else end
    if is_static(total):
        if isinstance(start, int):
            start = max(0, start + total) if start < 0 else min(start, total)
        if isinstance(end, int):
            end = max(0, end + total) if end < 0 else min(end, total)
    return start, end, int(args.get("step") or 1)


def _cut(ctx: Context, dim: Expr, start: int, end: int) -> Expr:
    total = size_of(dim)
    sizes = [s for s in (start, end - start, total - end) if s > 0]
    return list(ctx.split(dim, sizes))[1 if start > 0 else 0] if len(sizes) > 1 else dim


def _slice(ctx: Context, dims: Dims) -> Dims:
    i = _dim(ctx, dims)
    total = size_of(dims[i])
    start, end, step = _slice_range(ctx.args, total)
    if (start, step) == (0, 1) and isinstance(end, int) and end in (_END, total):
        return dims
    out = list(dims)
    if not is_static(total) or not isinstance(start, int) or not isinstance(end, int):
        ctx.freeze(dims[i], "it is sliced to a dynamic length")
        out[i] = ctx.opaque(ctx.shape[i], "it is sliced to a dynamic length")
    elif step == 1 and end > start:
        out[i] = _cut(ctx, dims[i], start, end)
    elif end <= start:
        out[i] = concat([])
    elif step > 1 and total % step == 0 and start < step and -(-(end - start) // step) == total // step:
        outer, inner = ctx.regroup([dims[i]], [total // step, step])
        if ctx.units(inner) is None:
            raise Conflict(f"takes every {step}th entry")
        out[i] = outer
    else:
        raise Conflict(f"takes entries {start}:{end}:{step} of {total}")
    return out


def _resize_slice(ctx: Resize) -> None:
    dims = ctx.dims(ctx.args["self"])
    i = int(ctx.args["dim"]) % len(dims)
    total = size_of(dims[i])
    start, end, step = _slice_range(ctx.args, total)
    if not is_static(total) or not isinstance(start, int) or not isinstance(end, int) or not ctx.changed(dims[i]):
        return
    if step != 1:
        ctx.set("end", _END)
        return
    scratch = Unifier()
    if start == total:
        ctx.set("start", ctx.new_size(dims[i]))
    elif start > 0:
        ctx.set("start", ctx.new_size(scratch.split_concat(dims[i], start)[0]))
    if 0 < end < total:
        ctx.set("end", ctx.new_size(scratch.split_concat(dims[i], end)[0]))


register_rule("aten.slice.Tensor", Structural(_slice, _resize_slice))


def _narrow(ctx: Context, dims: Dims) -> Dims:
    i = _dim(ctx, dims)
    start, length = ctx.args["start"], ctx.args["length"]
    if not isinstance(start, int) or not isinstance(length, int) or not is_static(size_of(dims[i])):
        raise Conflict("narrows to a dynamic range")
    start += size_of(dims[i]) if start < 0 else 0
    part = _cut(ctx, dims[i], start, start + length) if length else concat([])
    return [*dims[:i], part, *dims[i + 1 :]]


def _resize_narrow(ctx: Resize) -> None:
    dims = ctx.dims(ctx.args["self"])
    i = int(ctx.args["dim"]) % len(dims)
    start = ctx.args["start"] + (size_of(dims[i]) if ctx.args["start"] < 0 else 0)
    if 0 < start < size_of(dims[i]):
        ctx.set("start", ctx.new_size(Unifier().split_concat(dims[i], start)[0]))
    ctx.set("length", ctx.new_size(ctx.dims(ctx.node)[i]))


register_rule("aten.narrow.default", Structural(_narrow, _resize_narrow))


def _select(ctx: Context, dims: Dims) -> Dims:
    i = _dim(ctx, dims)
    if ctx.units(dims[i]) is None:
        ctx.freeze(dims[i], f"entry {ctx.args['index']} is picked by its number")
    return [*dims[:i], *dims[i + 1 :]]


register_rule("aten.select.int", Structural(_select))
