"""What ops that move elements make of dims: one function an op, for analysis and growth alike.

The first line of a docstring is the relation: letters are dims, ``(a b)`` is a dim that is the product of two, outer
factor first, ``a + b`` one whose parts lie end to end, ``1`` a dim of size one, ``…`` any others, which stay. Beside a
function stands, as ``resize_…``, the one that re-emits the literal arguments of the op that depend on sizes: its first
line says which.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from torch import fx

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
from fxgrow.ir.ops import bound_arguments
from fxgrow.ir.sizes import literal_size, sizes_of
from fxgrow.rules.annotation import Dims
from fxgrow.rules.base import Picked
from fxgrow.rules.context import Context
from fxgrow.rules.resize import Resize


def _dim(ctx: Context, dims: Dims, name: str = "dim") -> int:
    return int(ctx.args[name]) % len(dims)


# other sizes --------------------------------------------------------------------------------------------------------


def reshape(ctx: Context, dims: Dims) -> Dims:
    """(a b) c -> a (b c)

    By common refinement; where that fails, of the equal dims at both ends alone: what lies between is frozen.
    """
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


def resize_view(ctx: Resize) -> None:
    """the sizes in size"""
    ctx.set_shape("size", ctx.dims(ctx.node))


def resize_reshape(ctx: Resize) -> None:
    """the sizes in shape"""
    ctx.set_shape("shape", ctx.dims(ctx.node))


def resize_unflatten(ctx: Resize) -> None:
    """the sizes in sizes, of the factors of one dim"""
    source = ctx.dims(ctx.args["self"])
    dim = int(ctx.args["dim"]) % len(source)
    ctx.set_shape("sizes", ctx.dims(ctx.node)[dim : dim + len(ctx.args["sizes"])])


def view_as(ctx: Context, dims: Dims) -> Dims:
    """(a b), a b -> a b: the sizes of another tensor"""
    out = list(ctx.regroup(dims, ctx.shape))
    for mine, theirs in zip(out, ctx.operand("other"), strict=True):
        ctx.unify(mine, theirs)
    return out


# another order ------------------------------------------------------------------------------------------------------


def transpose(ctx: Context, dims: Dims) -> Dims:
    """… a … b … -> … b … a …"""
    if not dims:
        return dims
    a, b = (v % len(dims) for k, v in ctx.args.items() if k in ("dim0", "dim1", "axis0", "axis1"))
    out = list(dims)
    out[a], out[b] = out[b], out[a]
    return out


def permute(ctx: Context, dims: Dims) -> Dims:
    """a b c -> c a b"""
    return [dims[i] for i in ctx.args["dims"]]


def swap_last(ctx: Context, dims: Dims) -> Dims:
    """… a b -> … b a"""
    return [*dims[:-2], *reversed(dims[-2:])]


def reverse(ctx: Context, dims: Dims) -> Dims:
    """a b c -> c b a"""
    return dims[::-1]


def movedim(ctx: Context, dims: Dims) -> Dims:
    """a … b … -> … b … a"""
    source, target = ctx.args["source"], ctx.args["destination"]
    if not dims:
        return dims
    source = [s % len(dims) for s in (source if isinstance(source, list | tuple) else [source])]
    target = [t % len(dims) for t in (target if isinstance(target, list | tuple) else [target])]
    rest = [d for i, d in enumerate(dims) if i not in source]
    moved = dict(zip(target, (dims[s] for s in source), strict=True))
    return [moved[i] if i in moved else rest.pop(0) for i in range(len(dims))]


# dims of size one ---------------------------------------------------------------------------------------------------


def unsqueeze(ctx: Context, dims: Dims) -> Dims:
    """a b -> a 1 b"""
    i = int(ctx.args["dim"]) % (len(dims) + 1)
    return [*dims[:i], UNIT, *dims[i:]]


def squeeze(ctx: Context, dims: Dims) -> Dims:
    """a 1 b -> a b"""
    which = ctx.args.get("dim")
    if which is None:
        return [d for d in dims if not is_unit(d)]
    which = [w % max(len(dims), 1) for w in (which if isinstance(which, list | tuple) else [which])]
    return [d for i, d in enumerate(dims) if i not in which or not is_unit(d)]


def at_least_1d(ctx: Context, dims: Dims) -> Dims:
    """a -> a, or a scalar -> 1"""
    return dims or [UNIT]


def at_least_2d(ctx: Context, dims: Dims) -> Dims:
    """a -> 1 a, or a scalar -> 1 1"""
    return dims if len(dims) >= 2 else [UNIT, *(dims or [UNIT])]


def at_least_3d(ctx: Context, dims: Dims) -> Dims:
    """a -> 1 a 1, a b -> a b 1, or a scalar -> 1 1 1"""
    return dims if len(dims) >= 3 else [*at_least_2d(ctx, dims), UNIT]


# broadcasts ---------------------------------------------------------------------------------------------------------


def expand(ctx: Context, dims: Dims) -> Dims:
    """a 1 -> n a m"""
    shape = ctx.shape
    lead = len(shape) - len(dims)
    out: Dims = []
    for i, size in enumerate(shape):
        dim = dims[i - lead] if i >= lead else UNIT
        out.append(dim if not is_unit(dim) or same_size(size, 1) else ctx.constant_dim(i))
        if is_unit(dim) and is_static(size):
            ctx.role(out[-1], "groups")
    return out


def resize_expand(ctx: Resize) -> None:
    """the sizes in size

    A -1 among them says that a dim stays as it is, and stands for no size of a broadcast.
    """
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


def expand_as(ctx: Context, dims: Dims) -> Dims:
    """a 1, n a m -> n a m"""
    other = ctx.operand("other")
    lead = len(other) - len(dims)
    out: Dims = []
    for i, like in enumerate(other):
        dim = dims[i - lead] if i >= lead else UNIT
        if not is_unit(dim) and not is_unit(like):
            ctx.unify(dim, like)
        out.append(ctx.constant_like(like) if is_unit(dim) and not is_unit(like) else dim)
    return out


def broadcast(ctx: Context, operands: list[Dims]) -> list[Dims]:
    """a 1, b -> a b, a b"""
    rank = max(map(len, operands))
    operands = [[UNIT] * (rank - len(d)) + d for d in operands]
    whole: Dims = []
    for column in zip(*operands, strict=True):
        present = [d for d in column if not is_unit(d)]
        for other in present[1:]:
            ctx.unify(present[0], other)
        whole.append(present[0] if present else UNIT)
    return [
        [ctx.constant_like(w) if is_unit(x) and not is_unit(w) else ctx.close(x) for x, w in zip(d, whole, strict=True)]
        for d in operands
    ]


def mesh_grid(ctx: Context, operands: list[Dims]) -> list[Dims]:
    """a, b -> a b, a b: every vector along a dim of its own, constant along the others"""
    vectors = [d[0] if d else UNIT for d in operands]
    order = list(range(len(vectors)))
    if ctx.args.get("indexing") == "xy" and len(order) > 1:
        order[:2] = [1, 0]
    return [[v if j == k else ctx.constant_like(vectors[j]) for j in order] for k, v in enumerate(vectors)]


# repetitions --------------------------------------------------------------------------------------------------------


def repeat(ctx: Context, dims: Dims) -> Dims:
    """a -> (n a): laid end to end"""
    return _laid_end_to_end(ctx, dims, ctx.args["repeats"])


def tile(ctx: Context, dims: Dims) -> Dims:
    """a -> (n a): laid end to end, along the last dims where fewer are named"""
    return _laid_end_to_end(ctx, dims, ctx.args["dims"])


def _laid_end_to_end(ctx: Context, dims: Dims, repeats: Sequence[Any]) -> Dims:
    repeats = [1] * (len(dims) - len(repeats)) + list(repeats)
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


def resize_repeat(ctx: Resize) -> None:
    """the numbers in repeats"""
    _resize_repeats(ctx, "repeats")


def resize_tile(ctx: Resize) -> None:
    """the numbers in dims"""
    _resize_repeats(ctx, "dims")


def _resize_repeats(ctx: Resize, name: str) -> None:
    before, after = ctx.dims(ctx.args["self"]), ctx.dims(ctx.node)
    old = [1] * (len(before) - len(ctx.args[name])) + list(ctx.args[name])
    repeats = list(old)
    lead = len(repeats) - len(before)
    for i, dim in enumerate(after):
        inner = before[i - lead] if i >= lead else UNIT
        if ctx.changed(dim) or ctx.changed(inner):
            repeats[i] = quotient(ctx.new_size(dim), ctx.new_size(inner))
            if repeats[i] is None:
                raise ctx.refuse("it is repeated a number of times that is computed while the model runs")
    if repeats != old:
        ctx.set(name, repeats)


def repeat_interleave(ctx: Context, dims: Dims) -> Dims:
    """a -> (a n): every entry repeated in place"""
    repeats, dim = ctx.args["repeats"], ctx.args["dim"]
    if not isinstance(repeats, int) or dim is None:
        raise Conflict("repeats that are not one number")
    i = int(dim) % len(dims)
    inner = ctx.inner(i, repeats)
    ctx.role(inner, "groups")
    return [*dims[:i], product([dims[i], inner]), *dims[i + 1 :]]


def resize_repeat_interleave(ctx: Resize) -> None:
    """the number in repeats, and the size in output_size"""
    i = int(ctx.args["dim"]) % len(ctx.dims(ctx.args["self"]))
    before, after = ctx.dims(ctx.args["self"])[i], ctx.dims(ctx.node)[i]
    ctx.set("repeats", ctx.new_size(after) // ctx.new_size(before))
    if ctx.args.get("output_size") is not None and ctx.changed(after):
        ctx.set("output_size", ctx.new_size(after))


# channels, windows, diagonals, complex numbers ----------------------------------------------------------------------


def channel_shuffle(ctx: Context, dims: Dims) -> Dims:
    """n (g c) … -> n (c g) …"""
    groups = int(ctx.args["groups"])
    outer, inner = ctx.regroup([dims[1]], [groups, quotient(size_of(dims[1]), groups)])
    return [dims[0], product([inner, outer]), *dims[2:]]


def resize_channel_shuffle(ctx: Resize) -> None:
    """the number in groups"""
    channels = ctx.dims(ctx.args["input" if "input" in ctx.args else "self"])[1]
    groups = int(ctx.args["groups"])
    outer, _ = Unifier().regroup([channels], [groups, size_of(channels) // groups])
    if ctx.changed(outer):
        ctx.set("groups", ctx.new_size(outer))


def pixel_shuffle(ctx: Context, dims: Dims) -> Dims:
    """… (c r r) h w -> … c (h r) (w r), all but c frozen"""
    why = "pixel_shuffle spreads it over space"
    block = int(ctx.args["upscale_factor"]) ** 2
    channels, spread = ctx.regroup([dims[-3]], [quotient(size_of(dims[-3]), block), block])
    for d in (spread, *dims[-2:]):
        ctx.freeze(d, why)
    return [*dims[:-3], channels, *(ctx.opaque(s, why) for s in ctx.shape[-2:])]


def pixel_unshuffle(ctx: Context, dims: Dims) -> Dims:
    """… c (h r) (w r) -> … (c r r) h w, all but c frozen"""
    why = "pixel_unshuffle gathers it from space"
    for d in dims[-2:]:
        ctx.freeze(d, why)
    gathered = ctx.opaque(int(ctx.args["downscale_factor"]) ** 2, why)
    return [*dims[:-3], product([dims[-3], gathered]), *(ctx.opaque(s, why) for s in ctx.shape[-2:])]


def unfold(ctx: Context, dims: Dims) -> Dims:
    """… a … -> … b … c, all three frozen: windows along one dim, whose entries stand in a new last one"""
    i = int(ctx.args["dimension"]) % max(len(dims), 1)
    why = "windows slide over it"
    for d in dims[i : i + 1]:
        ctx.freeze(d, why)
    shape = ctx.shape
    return [ctx.opaque(s, why) if j in (i, len(dims)) or not dims else dims[j] for j, s in enumerate(shape)]


def diagonal(ctx: Context, dims: Dims) -> Dims:
    """… a … b … -> … c, all three frozen"""
    a, b = (int(ctx.args[n]) % len(dims) for n in ("dim1", "dim2"))
    why = "a diagonal is taken of it"
    for i in (a, b):
        ctx.freeze(dims[i], why)
    return [*(d for i, d in enumerate(dims) if i not in (a, b)), ctx.opaque(ctx.shape[-1], why)]


def diag_embed(ctx: Context, dims: Dims) -> Dims:
    """… a -> … b … c …, all three frozen"""
    shape, why = ctx.shape, "it becomes a diagonal"
    at = {int(ctx.args[n]) % len(shape) for n in ("dim1", "dim2")}
    ctx.freeze(dims[-1], why)
    rest = iter(dims[:-1])
    return [ctx.opaque(s, why) if i in at else next(rest) for i, s in enumerate(shape)]


def view_as_real(ctx: Context, dims: Dims) -> Dims:
    """… -> … 2, frozen"""
    return [*dims, ctx.opaque(2, "real and imaginary parts")]


def view_as_complex(ctx: Context, dims: Dims) -> Dims:
    """… 2 -> …, the 2 frozen"""
    ctx.freeze(dims[-1], "real and imaginary parts")
    return dims[:-1]


# into parts ---------------------------------------------------------------------------------------------------------


def split(ctx: Context, dims: Dims) -> list[Dims]:
    """a + b -> a, b: of one size, but for the last"""
    i = _dim(ctx, dims)
    dim, size = dims[i], literal_size(ctx.args["split_size"])
    if is_static(size_of(dim)) and isinstance(size, int):
        return _split_into(ctx, dims, i, _part_sizes(size_of(dim), size))
    # dynamic parts that were joined before
    if isinstance(dim, Concat) and all(same_size(size_of(p), size) for p in dim.parts):
        return [[*dims[:i], p, *dims[i + 1 :]] for p in dim.parts]
    raise Conflict("splits a dim of dynamic size")


def split_with_sizes(ctx: Context, dims: Dims) -> list[Dims]:
    """a + b -> a, b: of the sizes that are given"""
    sizes = ctx.args["split_sizes" if "split_sizes" in ctx.args else "split_size"]
    if not all(isinstance(s, int) and s > 0 for s in sizes):
        raise Conflict("splits into parts of dynamic or empty size")
    return _split_into(ctx, dims, _dim(ctx, dims), list(sizes))


def chunk(ctx: Context, dims: Dims) -> list[Dims]:
    """a + b -> a, b: no more than a number of them"""
    i = _dim(ctx, dims)
    total = size_of(dims[i])
    n = int(ctx.args["chunks"])
    return _split_into(ctx, dims, i, _part_sizes(total, -(-total // n) if is_static(total) else 1))


def resize_split(ctx: Resize) -> None:
    """the sizes of the parts, to split_with_sizes"""
    _resize_parts(ctx, int(ctx.args["dim"]) % len(ctx.dims(ctx.args["self"])))


def tensor_split(ctx: Context, dims: Dims) -> list[Dims]:
    """a + b -> a, b: a number of nearly equal ones, or cut at given places"""
    return _split_at(ctx, dims, _dim(ctx, dims))


def hsplit(ctx: Context, dims: Dims) -> list[Dims]:
    """… (a + b) … -> … a …, … b …: of the second dim, or the only one"""
    return _split_at(ctx, dims, min(1, len(dims) - 1))


def resize_hsplit(ctx: Resize) -> None:
    """the sizes of the parts of the second dim, to split_with_sizes"""
    _resize_parts(ctx, min(1, len(ctx.dims(ctx.args["self"])) - 1))


def vsplit(ctx: Context, dims: Dims) -> list[Dims]:
    """(a + b) … -> a …, b …"""
    return _split_at(ctx, dims, 0)


def resize_vsplit(ctx: Resize) -> None:
    """the sizes of the parts of the first dim, to split_with_sizes"""
    _resize_parts(ctx, 0)


def dsplit(ctx: Context, dims: Dims) -> list[Dims]:
    """… (a + b) -> … a, … b: of the third dim"""
    return _split_at(ctx, dims, 2)


def resize_dsplit(ctx: Resize) -> None:
    """the sizes of the parts of the third dim, to split_with_sizes"""
    _resize_parts(ctx, 2)


def _part_sizes(total: Size, size: int) -> list[int]:
    if not is_static(total):
        raise Conflict("splits a dim of dynamic size")
    return [min(size, total - s) for s in range(0, total, size)]


def _split_into(ctx: Context, dims: Dims, i: int, sizes: list[int]) -> list[Dims]:
    parts = [p for p in sizes if p > 0]
    pieces = iter(ctx.split(dims[i], parts))
    return [[*dims[:i], next(pieces), *dims[i + 1 :]] for _ in parts]


def _split_at(ctx: Context, dims: Dims, i: int) -> list[Dims]:
    """Into ``sections`` nearly equal parts, or cut at ``indices``."""
    total, places = size_of(dims[i]), ctx.args.get("indices")
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
    return _split_into(ctx, dims, i, sizes)


def _resize_parts(ctx: Resize, i: int) -> None:
    if not ctx.changed(ctx.dims(ctx.args["self"])[i]):
        return
    sizes = [ctx.new_size(part[i]) for part in ctx.dims(ctx.node)]
    ctx.retarget("aten.split_with_sizes.default", {"self": ctx.args["self"], "split_sizes": sizes, "dim": i})


def unbind(ctx: Context, dims: Dims) -> list[Dims]:
    """(1 + 1) a -> a, a"""
    i = _dim(ctx, dims)
    units = ctx.units(dims[i])
    if units is None:
        raise Conflict(f"every one of {size_of(dims[i])} entries is used by itself")
    return [[*dims[:i], *dims[i + 1 :]] for _ in units]


# together -----------------------------------------------------------------------------------------------------------


def cat(ctx: Context, operands: list[Dims]) -> Dims:
    """a …, b … -> a + b …"""
    operands = [d for d in operands if not (len(d) == 1 and same_size(size_of(d[0]), 0))]
    return _joined(ctx, operands, int(ctx.args.get("dim") or 0) % len(operands[0]))


def hstack(ctx: Context, operands: list[Dims]) -> Dims:
    """… a …, … b … -> … a + b …: along the second dim, or the only one"""
    operands = [at_least_1d(ctx, d) for d in operands]
    return _joined(ctx, operands, min(1, len(operands[0]) - 1))


def vstack(ctx: Context, operands: list[Dims]) -> Dims:
    """a …, b … -> a + b …, of vectors 1 a"""
    return _joined(ctx, [at_least_2d(ctx, d) for d in operands], 0)


def dstack(ctx: Context, operands: list[Dims]) -> Dims:
    """… a, … b -> … a + b: along the third dim, of matrices a b 1"""
    return _joined(ctx, [at_least_3d(ctx, d) for d in operands], 2)


def column_stack(ctx: Context, operands: list[Dims]) -> Dims:
    """… a, … b -> … a + b: along the second dim, of vectors a 1"""
    return _joined(ctx, [[*d, *[UNIT] * (2 - len(d))] for d in operands], 1)


def stack(ctx: Context, operands: list[Dims]) -> Dims:
    """a, a -> (1 + 1) a"""
    i = int(ctx.args.get("dim") or 0) % (len(operands[0]) + 1)
    out = [ctx.merge([d[j] for d in operands]) for j in range(len(operands[0]))]
    out.insert(i, concat([UNIT] * len(operands)))
    return out


def _joined(ctx: Context, operands: list[Dims], i: int) -> Dims:
    """End to end along dim ``i``; the other dims are shared."""
    columns = [list(column) for column in zip(*operands, strict=True)]
    return [concat([resolve(c) for c in column]) if j == i else ctx.merge(column) for j, column in enumerate(columns)]


# one part -----------------------------------------------------------------------------------------------------------

_END = 2**63 - 1


def slice_range(ctx: Context, dims: Dims) -> Dims:
    """a + b + c -> b, or (a n) -> a with a step"""
    i = _dim(ctx, dims)
    total = size_of(dims[i])
    start, end, step = _bounds(ctx.args, total)
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


def resize_slice(ctx: Resize) -> None:
    """start and end"""
    dims = ctx.dims(ctx.args["self"])
    i = int(ctx.args["dim"]) % len(dims)
    total = size_of(dims[i])
    start, end, step = _bounds(ctx.args, total)
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


def narrow(ctx: Context, dims: Dims) -> Dims:
    """a + b + c -> b"""
    i = _dim(ctx, dims)
    start, length = ctx.args["start"], ctx.args["length"]
    if not isinstance(start, int) or not isinstance(length, int) or not is_static(size_of(dims[i])):
        raise Conflict("narrows to a dynamic range")
    start += size_of(dims[i]) if start < 0 else 0
    part = _cut(ctx, dims[i], start, start + length) if length else concat([])
    return [*dims[:i], part, *dims[i + 1 :]]


def resize_narrow(ctx: Resize) -> None:
    """start and length"""
    dims = ctx.dims(ctx.args["self"])
    i = int(ctx.args["dim"]) % len(dims)
    start = ctx.args["start"] + (size_of(dims[i]) if ctx.args["start"] < 0 else 0)
    if 0 < start < size_of(dims[i]):
        ctx.set("start", ctx.new_size(Unifier().split_concat(dims[i], start)[0]))
    ctx.set("length", ctx.new_size(ctx.dims(ctx.node)[i]))


def select(ctx: Context, dims: Dims) -> Dims:
    """a b -> b: one entry of a dim, which is frozen unless its entries are known one by one"""
    i = _dim(ctx, dims)
    if ctx.units(dims[i]) is None:
        ctx.freeze(dims[i], f"entry {ctx.args['index']} is picked by its number")
    return [*dims[:i], *dims[i + 1 :]]


def selected(node: fx.Node) -> list[Picked]:
    """entry index of dim"""
    args = bound_arguments(node)
    return [Picked(args["self"], int(args["dim"]) % len(sizes_of(args["self"]) or []), numbers=args["index"])]


def sliced(node: fx.Node) -> list[Picked]:
    """the first entries of dim, of a number that the model computes"""
    args = bound_arguments(node)
    end = args["end"] if isinstance(args["end"], fx.Node) else None
    return [Picked(args["self"], int(args["dim"]) % len(sizes_of(args["self"]) or []), first=end)]


def _bounds(args: dict[str, Any], total: Size) -> tuple[Any, Any, int]:
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
