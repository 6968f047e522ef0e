"""Reductions over dims: means, sums, variances, extrema, softmax, pooling."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from fxgrow.algebra import UNIT, Size, is_static, is_unit, product, quotient, resolve, size_of
from fxgrow.ir.ops import used
from fxgrow.rules.annotation import Content, Dims, Info, annotate, infos
from fxgrow.rules.base import Rule, register_rule
from fxgrow.rules.context import Context, GrowthContext
from fxgrow.rules.forms import Opaque, Structural


def reduced_dims(args: dict[str, Any], rank: int) -> list[int]:
    """The dims a reduction runs over, as non-negative numbers; all of them where none is named."""
    value = args.get("dim")
    if value is None or value == []:
        return list(range(rank))
    return sorted(v % rank for v in (value if isinstance(value, list | tuple) else [value])) if rank else []


class Reduce(Rule):
    """A reduction that growth along the reduced dims may keep exact.

    Args:
        kind: ``mean`` and ``sum`` are linear; ``count`` is the number of entries that are not zero; ``square`` is a
            norm; ``extremum`` is unchanged by copies (of truth values: any and all); ``blocked`` does not allow growth
            along the reduced dims.
    """

    def __init__(self, kind: str, operand: str = "self") -> None:
        self.kind, self.operand = kind, operand

    def selects(self, node: fx.Node) -> bool:
        return self.kind == "extremum"

    def jumps(self, node: fx.Node) -> list[fx.Node]:
        value = node.meta.get("val")
        whole = not isinstance(value, torch.Tensor) or not (value.is_floating_point() or value.is_complex())
        return node.all_input_nodes if whole or self.kind == "blocked" else []

    def relate(self, ctx: Context) -> Dims | list[Dims] | None:
        dims = ctx.dims(self.operand)
        assert dims is not None
        over = reduced_dims(ctx.args, len(dims))
        if self.kind == "blocked":
            for i in over:
                ctx.freeze(dims[i], "its entries are reduced in a way that growth would change")
        if self.kind == "extremum" and used(ctx.node, 1):
            for i in over:
                ctx.freeze(dims[i], "the number of its largest or smallest entry is used")
        keep = bool(ctx.args.get("keepdim"))
        out = [UNIT if i in over else d for i, d in enumerate(dims) if keep or i not in over]
        return out if ctx.result_count is None else [list(out) for _ in range(ctx.result_count)]

    def grow(self, ctx: GrowthContext) -> Dims | list[Dims] | None:
        dims = ctx.dims(self.operand)
        assert dims is not None
        over = reduced_dims(ctx.args, len(dims))
        grown = [dims[i] for i in over if ctx.grows(dims[i])]
        if grown:
            self._statistic(ctx, grown, [dims[i] for i in over if not is_unit(dims[i])])
        keep = bool(ctx.args.get("keepdim"))
        out: Dims = []
        for i, dim in enumerate(dims):
            if i in over:
                if keep:
                    out.append(UNIT)
            elif self.kind in ("mean", "sum"):
                out.append(ctx.close(dim))
            else:
                out.append(annotate(ctx.close(dim), _nonlinear))
        return out if ctx.result_count is None else [list(out) for _ in range(ctx.result_count)]

    def _statistic(self, ctx: GrowthContext, grown: Dims, over: Dims) -> None:
        contents = {i.content for d in grown for i in infos(d)}
        growth = ctx.growth
        for d in grown:
            ctx.close(d)
        if self.kind == "extremum":
            ctx.selects_among(one=ctx.result_count is not None)  # amax shares a gradient evenly among equal copies
            if ctx.newborn and contents != {Content.CONST} and contents != {Content.MEAN}:
                raise ctx.refuse("an extremum over new units")
            return
        if not ctx.newborn:
            n = ctx.uniform_factor(grown)
            if self.kind != "mean":
                ctx.rescale_output(n**-0.5 if self.kind == "square" else 1.0 / n)
            return
        wanted = Content.MEAN if self.kind == "mean" else Content.ZERO
        if len(grown) != 1 or not ctx.is_factor(grown[0], False):
            raise ctx.refuse("a statistic over a dim of which the growing axis is only a part")
        if self.kind == "mean" and contents == {Content.ZERO}:
            ctx.uniform_factor(grown)
            ctx.rescale_output(growth.new / (growth.copies * growth.old))
            return
        for info in infos(grown[0]):
            if info.content is Content.FREE:
                # a mean of squares is a root mean square's: zeros are what it can take
                square = self.kind == "mean" and ctx.of_square()
                ctx.demand(info, Content.ZERO if square else wanted, "a statistic runs over the axis")
        if len(contents) != 1:
            raise ctx.refuse("new units hold different things in the parts that a statistic runs over")
        (content,) = contents
        if content in (Content.MEAN, Content.CONST) and self.kind == "mean":
            ctx.uniform_factor(grown)
            return
        if content is Content.ZERO and self.kind != "mean":
            n = ctx.uniform_factor(grown)
            if n != 1:
                ctx.rescale_output(n**-0.5 if self.kind == "square" else 1.0 / n)
            return
        raise ctx.refuse(f"new units hold {content.value} where {wanted.value} would be exact")


def _nonlinear(info: Info) -> Info:
    return info.becomes(info.content if info.content is Content.CONST else Content.FREE, zeroable=False)


class Variance(Reduce):
    """Variance and standard deviation, with their correction c: S / (N - c) for N entries.

    n copies make S n times as large, new entries at the mean leave it; the rest is a constant.
    """

    def __init__(self, root: bool = False) -> None:
        super().__init__("variance")
        self.root = root

    def _statistic(self, ctx: GrowthContext, grown: Dims, over: Dims) -> None:
        for d in grown:
            ctx.close(d)
        if ctx.newborn:
            self._check_new(ctx, grown, over)
        n = ctx.uniform_factor(grown)
        before: Size = 1
        for d in over:
            before = before * size_of(d)
        after = ctx.growth.new if ctx.newborn else n * before
        c = self._correction(ctx.args)
        if c == 0 and not ctx.newborn:
            return
        if not is_static(before) or before <= c:
            raise ctx.refuse("an unbiased variance over a dynamic number of entries, or over one alone")
        factor = (after - c) / (n * (before - c))
        if factor != 1.0:
            if ctx.result_count is not None:
                raise ctx.refuse("variance and mean come from one op; take var() and mean() by themselves")
            ctx.rescale_output(factor**0.5 if self.root else factor)

    @staticmethod
    def _check_new(ctx: GrowthContext, grown: Dims, over: Dims) -> None:
        if len(grown) != 1 or len(infos(grown[0])) != 1 or not ctx.is_whole(grown[0]):
            raise ctx.refuse("a statistic over a dim of which the growing axis is only a part")
        if len(over) != 1:
            raise ctx.refuse("a variance over several dims, where new units that hold the mean of one still vary")
        (info,) = infos(grown[0])
        if info.content is Content.FREE:
            ctx.demand(info, Content.MEAN, "a statistic runs over the axis")
        if info.content is not Content.MEAN:
            raise ctx.refuse(f"new units hold {info.content.value} where mean would be exact")

    @staticmethod
    def _correction(args: dict[str, Any]) -> float:
        if "correction" in args:
            return 1.0 if args["correction"] is None else float(args["correction"])
        return 1.0 if args.get("unbiased", True) else 0.0


class VectorNorm(Reduce):
    """The 2-norm: copies make it larger by the root of their number, zeros leave it; other norms do not grow."""

    def __init__(self) -> None:
        super().__init__("square")

    def relate(self, ctx: Context) -> Dims | list[Dims] | None:
        return self._kind(ctx).relate(ctx)

    def grow(self, ctx: GrowthContext) -> Dims | list[Dims] | None:
        return self._kind(ctx).grow(ctx)

    @staticmethod
    def _kind(ctx: Context) -> Reduce:
        order = ctx.args.get("ord", ctx.args.get("p", 2))
        return Reduce("square" if order in (2, 2.0, None) else "blocked")


register_rule(["aten.mean.dim", "aten.mean.default"], Reduce("mean"))
register_rule(["aten.sum.dim_IntList", "aten.sum.default"], Reduce("sum"))
register_rule(["aten.var.correction", "aten.var.dim", "aten.var.default"], Variance())
register_rule(["aten.var_mean.correction", "aten.var_mean.dim"], Variance())
register_rule(["aten.std.correction", "aten.std.dim", "aten.std.default"], Variance(root=True))
register_rule(["aten.amax.default", "aten.amin.default", "aten.max.dim", "aten.min.dim"], Reduce("extremum"))
register_rule(["aten.max.default", "aten.min.default"], Reduce("extremum"))
register_rule([f"aten.{n}.{o}" for n in ("any", "all") for o in ("default", "dim", "dims")], Reduce("extremum"))
register_rule(["aten.count_nonzero.default", "aten.count_nonzero.dim_IntList"], Reduce("count"))
register_rule(
    ["aten.argmax.default", "aten.argmin.default", "aten.prod.dim_int"]
    + ["aten.var_mean.default", *(f"aten.std_mean.{o}" for o in ("correction", "dim", "default"))]
    + [f"aten.{n}.default" for n in ("logsumexp", "prod", "aminmax", "nansum", "nanmean", "median", "nanmedian")]
    + ["aten.median.dim", "aten.nanmedian.dim", "aten.mode.default", "aten.kthvalue.default"]
    + ["aten.quantile.scalar"],
    Reduce("blocked"),
)
register_rule(["aten.trapezoid.dx", "aten.trapz.dx"], Reduce("blocked", "y"))
register_rule(["aten.trapezoid.x", "aten.trapz.x"], Opaque("it is integrated over places of its own"))
register_rule("aten.quantile.default", Opaque("its entries are reduced in a way that growth would change"))
register_rule(["aten.linalg_vector_norm.default", "aten.norm.ScalarOpt_dim"], VectorNorm())


class Softmax(Rule):
    """Normalised exponentials: n copies of every entry share its weight, so that the result times n is as it was.

    What sums over the dim afterwards (attention, split attention) takes the n out again. A logarithm cannot be scaled.
    """

    def __init__(self, logarithm: bool = False) -> None:
        self.logarithm = logarithm

    def relate(self, ctx: Context) -> Dims | list[Dims] | None:
        dims = ctx.dims("self")
        assert dims is not None
        if dims and self.logarithm:
            ctx.freeze(dims[ctx.args["dim"] % len(dims)], "softmax runs over it")
        return dims

    def grow(self, ctx: GrowthContext) -> Dims | list[Dims] | None:
        dims = ctx.dims("self")
        assert dims is not None
        over = dims[ctx.args["dim"] % len(dims)]
        out: Dims = [annotate(ctx.close(d), _nonlinear) for d in dims]
        if ctx.grows(over):
            n = ctx.uniform_factor([over])
            if ctx.newborn:
                raise ctx.refuse("new units under a softmax; grow by whole copies instead")
            if n != 1:
                ctx.rescale_output(float(n))
        return out


register_rule(["aten._safe_softmax.default", "aten.softmax.int", "aten._softmax.default"], Softmax())
register_rule(["aten.log_softmax.int", "aten._log_softmax.default"], Softmax(logarithm=True))


class Sampled(Rule):
    """``grid_sample``: channels pass, pixels are interpolated at places that another tensor names."""

    def relate(self, ctx: Context) -> Dims | list[Dims] | None:
        dims, grid = ctx.dims("input"), ctx.dims("grid")
        assert dims is not None and grid is not None
        why = "its entries are interpolated"
        for d in (*dims[2:], *grid[1:]):
            ctx.freeze(d, why)
        ctx.unify(dims[0], grid[0])
        return [dims[0], dims[1], *(ctx.opaque(s, why) for s in ctx.shape[2:])]

    def grow(self, ctx: GrowthContext) -> Dims | list[Dims] | None:
        dims, grid = ctx.dims("input"), ctx.dims("grid")
        assert dims is not None and grid is not None
        batch = ctx.close(ctx.combine(dims[0], grid[0], "mul_first"))
        return [batch, ctx.close(dims[1]), *(ctx.opaque(s, "its entries are interpolated") for s in ctx.shape[2:])]


register_rule([f"aten.grid_sampler{n}.default" for n in ("", "_2d", "_3d")], Sampled())


def Pool(n: int, linear: bool, results: int = 1) -> Structural:
    """Pooling over the last ``n`` dims; the leading ones, channels among them, pass."""

    def f(ctx: Context, dims: Dims) -> Any:
        why = "pooling runs over it"
        for d in dims[-n:]:
            ctx.freeze(d, why)
        lead = [d if linear else annotate(d, _nonlinear) for d in map(ctx.close, dims[:-n])]
        space = [ctx.opaque(s, why) for s in ctx.shape[-n:]]
        for d in (*dims[-n:], *space):
            ctx.role(d, "spatial", 100)
        out = [*lead, *space]
        return out if ctx.result_count is None else [list(out) for _ in range(results)]

    return Structural(f, moves=False, jumps=results > 1)


for _n in (1, 2, 3):
    register_rule([f"aten.avg_pool{_n}d.default", f"aten.adaptive_avg_pool{_n}d.default"], Pool(_n, linear=True))
    register_rule(f"aten.max_pool{_n}d.default", Pool(_n, linear=False))
    register_rule(
        [f"aten.adaptive_max_pool{_n}d.default", f"aten.max_pool{_n}d_with_indices.default"],
        Pool(_n, linear=False, results=2),
    )
register_rule("aten._adaptive_avg_pool2d.default", Pool(2, linear=True))


class Unpool(Rule):
    """``max_unpool``: entries of a channel put where its indices say; the leading dims pass."""

    def __init__(self, n: int) -> None:
        self.n = n

    def relate(self, ctx: Context) -> Dims | list[Dims] | None:
        dims, indices = ctx.dims("self"), ctx.dims("indices")
        assert dims is not None and indices is not None
        why = "unpooling runs over it"
        for a, b in zip(dims[: -self.n], indices[: -self.n], strict=True):
            ctx.unify(a, b)
        for d in (*dims[-self.n :], *indices[-self.n :]):
            ctx.freeze(d, why)
        space = [ctx.opaque(s, why) for s in ctx.shape[-self.n :]]
        for d in (*dims[-self.n :], *space):
            ctx.role(d, "spatial", 100)
        return [*map(resolve, dims[: -self.n]), *space]

    def grow(self, ctx: GrowthContext) -> Dims | list[Dims] | None:
        dims, indices = ctx.dims("self"), ctx.dims("indices")
        assert dims is not None and indices is not None
        lead = zip(dims[: -self.n], indices[: -self.n], strict=True)
        own = ctx.result_dims
        return [*(ctx.close(ctx.combine(a, b, "any")) for a, b in lead), *own[-self.n :]]


for _n in (2, 3):
    register_rule(f"aten.max_unpool{_n}d.default", Unpool(_n))


def _patches(ctx: Context, dims: Dims) -> Dims:
    """``unfold``: every window of an image laid out beside its channel."""
    *lead, channels, height, width = dims
    size = math.prod(ctx.args["kernel_size"])
    for d in (height, width):
        ctx.freeze(d, "windows are cut out of it")
        ctx.role(d, "spatial", 100)
    window = ctx.inner(len(lead), size)
    ctx.freeze(window, "the window of an unfold")
    ctx.role(window, "kernel", 100)
    windows = ctx.opaque(ctx.shape[-1], "windows are cut out of it")
    return [*map(ctx.close, lead), product([ctx.close(channels), window]), windows]


def _folded(ctx: Context, dims: Dims) -> Dims:
    """``fold``: windows summed into an image, channel by channel."""
    *lead, columns, windows = dims
    size = math.prod(ctx.args["kernel_size"])
    ctx.freeze(windows, "windows are laid over each other")
    channels, window = ctx.regroup([ctx.close(columns)], [quotient(size_of(columns), size), size])
    ctx.freeze(window, "the window of a fold")
    ctx.role(window, "kernel", 100)
    space = [ctx.opaque(s, "windows are laid over each other") for s in ctx.shape[-2:]]
    for d in space:
        ctx.role(d, "spatial", 100)
    return [*map(ctx.close, lead), channels, *space]


register_rule("aten.im2col.default", Structural(_patches, moves=False))
register_rule("aten.col2im.default", Structural(_folded, moves=False))
register_rule(
    [f"aten.upsample_{m}.{o}" for m in ("nearest3d", "trilinear3d") for o in ("default", "vec")]
    + [f"aten._upsample_nearest_exact3d.{o}" for o in ("default", "vec")],
    Pool(3, linear=True),
)
register_rule(
    [
        f"aten.{m}.{o}"
        for m in ("_upsample_nearest_exact2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa")
        for o in ("default", "vec")
    ],
    Pool(2, linear=True),
)
register_rule([f"aten._upsample_nearest_exact1d.{o}" for o in ("default", "vec")], Pool(1, linear=True))
register_rule(
    [f"aten.upsample_{m}.{o}" for m in ("nearest2d", "bilinear2d", "bicubic2d") for o in ("default", "vec")],
    Pool(2, linear=True),
)
register_rule(
    [f"aten.upsample_{m}.{o}" for m in ("nearest1d", "linear1d") for o in ("default", "vec")], Pool(1, linear=True)
)
