"""Normalisation: statistics over an axis, with the recipes that keep them exact when it grows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from torch import fx

from fxgrow.algebra import UNIT, Concat, Conflict, Expr, Unifier, is_unit, resolve, size_of
from fxgrow.rules.annotation import Content, Dims, Info, annotate, infos
from fxgrow.rules.base import Rule, implied_arguments, register_rule
from fxgrow.rules.context import Context, GrowthContext, Regroups
from fxgrow.rules.forms import Pattern
from fxgrow.rules.resize import Resize


class LastDimsNorm(Rule):
    """LayerNorm and RMSNorm over the last dims.

    Copies with equal multiplicities leave every statistic as it is. Newborn entries are exact when they hold the mean
    of the others (LayerNorm; LEMON, ICLR 2024) or zero (RMSNorm): with k whole copies of d units in d' entries and
    eta^2 = k d / d', the weight is scaled by eta and eps by eta^2, and newborn entries normalise to zero.
    """

    def __init__(self, needed: Content, implied: Mapping[str, Callable[[torch.dtype], float]] | None = None) -> None:
        self.needed, self.implied = needed, implied or {}

    def relate(self, ctx: Context) -> Dims | list[Dims] | None:
        dims = ctx.dims("input")
        assert dims is not None
        lead = len(dims) - len(ctx.args["normalized_shape"])
        for name in ("weight", "bias"):
            for mine, theirs in zip(dims[lead:], ctx.dims(name) or [], strict=False):
                ctx.unify(mine, theirs)
        return [resolve(d) for d in dims]

    def grow(self, ctx: GrowthContext) -> Dims | list[Dims] | None:
        dims = ctx.dims("input")
        assert dims is not None
        lead = len(dims) - len(ctx.args["normalized_shape"])
        weight, bias = ctx.dims("weight"), ctx.dims("bias")
        zero = self.needed is Content.ZERO and bias is None
        out: Dims = [annotate(d, lambda info: _normalised(info, zero)) for d in map(ctx.close, dims[:lead])]
        _check_eps(ctx, dims[:lead], self._eps(ctx), dims[lead:])
        over = [d for d in dims[lead:] if ctx.grows(d)]
        eta = ctx.statistic(over, self.needed, len(dims) - lead) if over else 1.0
        for i, dim in enumerate(dims[lead:]):
            result: Expr = dim
            if ctx.grows(dim) and ctx.newborn:
                result = annotate(dim, lambda info: info.becomes(Content.ZERO))
            if weight is not None:
                ctx.newborn_constants({"weight": 1.0})
                result = ctx.combine(result, weight[i], "mul")
            if bias is not None:
                if ctx.newborn and ctx.grows(bias[i]):
                    ctx.pin(bias[i], Content.ZERO)
                result = ctx.combine(result, bias[i], "add")
            out.append(ctx.close(result))
        if eta != 1.0:
            ctx.edit("eps", self._eps(ctx) * eta**2)
            if bias is not None or weight is not None:
                if weight is None or not ctx.scale_shared("weight", eta):
                    raise ctx.refuse("the norm's weight is shared or missing, so that its scale cannot be adjusted")
            else:
                ctx.rescale_output(eta)
        return out

    def _eps(self, ctx: GrowthContext) -> float:
        eps = implied_arguments(ctx.node).get("eps", ctx.args.get("eps"))
        assert eps is not None
        return float(eps)

    def resize(self, ctx: Resize) -> None:
        dims = ctx.dims(ctx.args["input"])
        ctx.set_shape("normalized_shape", dims[len(dims) - len(ctx.args["normalized_shape"]) :])


def _check_eps(ctx: GrowthContext, dims: Dims, eps: float, over: Sequence[Expr] = ()) -> None:
    """Statistics of new units, or ones over a dim along which the tensor does not vary, must not be divided by zero."""
    alone = any(i.content is not Content.CONST for d in dims for i in infos(d))
    flat = any(i.content is Content.CONST for d in over for i in infos(d))
    if ctx.newborn and eps <= 0 and (alone or flat):
        raise ctx.refuse(f"entries without variance would be divided by 0, as eps is {eps}")


def _normalised(info: Info, zero: bool) -> Info:
    """Along a dim that a norm does not run over: nothing but broadcasts, and zeros where there is no bias, survives."""
    keep = info.content is Content.CONST or (info.content is Content.ZERO and zero)
    return info.becomes(info.content if keep else Content.FREE, zeroable=zero)


register_rule("aten.layer_norm.default", LastDimsNorm(Content.MEAN))


def _eps_of_sums(dtype: torch.dtype) -> float:
    """Half precision is summed in float32, and takes its eps."""
    return torch.finfo(torch.float64 if dtype is torch.float64 else torch.float32).eps


register_rule("aten.rms_norm.default", LastDimsNorm(Content.ZERO, implied={"eps": _eps_of_sums}))


class BatchNorm(Pattern):
    """Batch norm: each channel by itself; newborn channels get mean 0, variance 1, weight 1, bias 0.

    Without running statistics (weight standardisation, Qiao 2019, is one such call on a weight) the dims that it takes
    statistics over may grow by whole copies, which leave mean and variance as they are.
    """

    def relate(self, ctx: Context) -> Dims | list[Dims] | None:
        dims = ctx.dims("input")
        assert dims is not None
        if ctx.dims("running_var") is not None:
            for dim in (dims[0], *dims[2:]):
                ctx.freeze(dim, "batch norm takes statistics over it")
        return super().relate(ctx)

    def grow(self, ctx: GrowthContext) -> Dims | list[Dims] | None:
        dims = ctx.dims("input")
        assert dims is not None
        over = [d for d in (dims[0], *dims[2:]) if ctx.grows(d)]
        if over:
            ctx.uniform_factor(over)
            if ctx.newborn:
                raise ctx.refuse("new units in a dim it takes statistics over; grow by whole copies instead")
        out = super().grow(ctx)
        assert out is not None
        first, channels, *rest = cast(Dims, out)
        return [first, annotate(channels, lambda info: info.becomes(Content.FREE, zeroable=False)), *rest]


register_rule(
    "aten.batch_norm.default",
    BatchNorm(
        "b c ..., c?, c?, c?, c? -> b c ...",
        ["input", "weight", "bias", "running_mean", "running_var"],
        roles={"c": "channels"},
        newborn={"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0},
    ),
)


class InstanceNorm(Pattern):
    """Instance norm: each sample's channel by itself, over the spatial dims."""

    def relate(self, ctx: Context) -> Dims | list[Dims] | None:
        dims = ctx.dims("input")
        assert dims is not None
        for dim in dims[2:]:
            ctx.freeze(dim, self.why)
        if ctx.dims("running_mean") is not None:
            ctx.freeze(dims[0], "running statistics average over it")
        return super().relate(ctx)

    def grow(self, ctx: GrowthContext) -> Dims | list[Dims] | None:
        dims = ctx.dims("input")
        assert dims is not None
        _check_eps(ctx, dims[:2], float(ctx.args["eps"]))
        out = super().grow(ctx)
        assert out is not None
        return [annotate(d, lambda info: _normalised(info, False)) for d in cast(Dims, out)]


register_rule(
    "aten.instance_norm.default",
    InstanceNorm(
        "b c *, c?, c?, c?, c? -> b c *",
        ["input", "weight", "bias", "running_mean", "running_var"],
        roles={"c": "channels"},
        newborn={"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0},
        why="instance norm takes statistics over it",
    ),
)


class GroupNorm(Rule):
    """Group norm: groups are independent, a group's channels are normalised together with the spatial dims."""

    def relate(self, ctx: Context) -> Dims | list[Dims] | None:
        dims = ctx.dims("input")
        assert dims is not None
        g = ctx.args["num_groups"]
        channels = resolve(dims[1])
        ctx.role(channels, "channels")
        for name in ("weight", "bias"):
            other = ctx.dims(name)
            if other is not None:
                ctx.unify(channels, other[0])

        try:
            ctx.regroup([channels], [g, size_of(channels) // g])
        except Conflict:
            # groups that reach across concatenated parts: what a group and every part are multiples of can still grow
            parts = resolve(channels)
            sizes = [size_of(p) for p in parts.parts] if isinstance(parts, Concat) else []
            shared = math.gcd(size_of(channels) // g, *sizes)
            if shared == 1 or not sizes:
                raise
            outer, _ = ctx.regroup([channels], [size_of(channels) // shared, shared])
            ctx.freeze(outer, f"groups of {size_of(channels) // g} channels reach across concatenated parts")
        for dim in dims[2:]:
            ctx.freeze(dim, "group norm takes statistics over it")
        return [resolve(d) for d in dims]

    def grow(self, ctx: GrowthContext) -> Dims | list[Dims] | None:

        dims = ctx.dims("input")
        assert dims is not None
        g = ctx.args["num_groups"]
        groups, inner = self._groups(ctx, dims[1], g)
        _check_eps(ctx, [dims[0], groups], float(ctx.args["eps"]))
        if ctx.grows(inner):
            if ctx.newborn and g == 1 and all(map(is_unit, dims[2:])):
                return self._one_group(ctx, dims)
            if ctx.newborn:
                raise ctx.refuse(
                    "group norm takes its statistics over channels and positions together, so that new channels would "
                    "have to hold the mean of both at every position, which no weight gives (the mean of the channels "
                    "at each position would add to the variance); grow by whole copies instead"
                )
            ctx.uniform_factor([inner])
        out = list(dims)
        out[0] = annotate(ctx.close(dims[0]), lambda info: _normalised(info, False))
        total: Expr = dims[1]
        if ctx.grows(groups) and ctx.newborn:
            ctx.newborn_constants({"weight": 1.0, "bias": 0.0})
        for name, how in (("weight", "mul"), ("bias", "add")):
            other = ctx.dims(name)
            if other is not None:
                total = ctx.combine(total, other[0], how)
        out[1] = ctx.close(annotate(total, lambda info: info.becomes(Content.FREE, zeroable=False)))
        return out

    @staticmethod
    def _one_group(ctx: GrowthContext, dims: Dims) -> Dims:
        """One group and no positions: layer norm, whose new channels may hold the mean of the others."""
        weight, bias = ctx.dims("weight"), ctx.dims("bias")
        _check_eps(ctx, [dims[0]], float(ctx.args["eps"]), [dims[1]])
        eta = ctx.statistic([dims[1]], Content.MEAN, 1)
        result: Expr = annotate(dims[1], lambda info: info.becomes(Content.ZERO))
        if weight is not None:
            ctx.newborn_constants({"weight": 1.0})
            result = ctx.combine(result, weight[0], "mul")
        if bias is not None:
            ctx.pin(bias[0], Content.ZERO)
            result = ctx.combine(result, bias[0], "add")
        if eta != 1.0:
            ctx.edit("eps", float(ctx.args["eps"]) * eta**2)
            if weight is None and bias is None:
                ctx.rescale_output(eta)
            elif weight is None or not ctx.scale_shared("weight", eta):
                raise ctx.refuse("the norm's weight is shared or missing, so that its scale cannot be adjusted")
        first = annotate(ctx.close(dims[0]), lambda info: _normalised(info, False))
        return [first, ctx.close(result), *dims[2:]]

    @staticmethod
    def _groups(ctx: Regroups, channels: Expr, g: int) -> tuple[Expr, Expr]:
        """Groups, and channels inside a group; what stands outside a factor that divides both does not grow."""
        try:
            groups, inner = ctx.regroup([channels], [g, size_of(channels) // g])
        except Conflict:
            sizes = [size_of(p) for p in channels.parts] if isinstance(channels, Concat) else []
            if not sizes:
                raise
            shared = math.gcd(size_of(channels) // g, *sizes)
            _, inner = ctx.regroup([channels], [size_of(channels) // shared, shared])
            groups = UNIT
        return groups, inner

    def resize(self, ctx: Resize) -> None:
        channels = ctx.dims(ctx.args["input"])[1]
        g = ctx.args["num_groups"]
        groups, _ = self._groups(Unifier(), channels, g)
        if ctx.changed(groups):
            ctx.set("num_groups", ctx.new_size(groups))


register_rule("aten.group_norm.default", GroupNorm())


class WeightNorm(Rule):
    """Weight norm, ``g * v / |v|`` with one norm for each entry of ``dim`` (Salimans and Kingma 2016).

    n whole copies along another dim make every norm larger by the root of n; newborn entries must be zero.
    """

    def jumps(self, node: fx.Node) -> list[fx.Node]:
        return node.all_input_nodes

    def relate(self, ctx: Context) -> Dims | list[Dims] | None:
        dims, g = ctx.dims("v"), ctx.dims("g")
        assert dims is not None and g is not None
        if len(g) != len(dims):  # it broadcasts from the right, along dims that the norm takes no heed of
            for dim in (*dims, *g):
                ctx.freeze(dim, "a weight norm whose scale has another rank than the weight")
            return [resolve(d) for d in dims]
        for mine, theirs in zip(dims, g, strict=True):
            if not is_unit(theirs) and not is_unit(mine):
                ctx.unify(mine, theirs)
        return [resolve(d) for d in dims]

    def grow(self, ctx: GrowthContext) -> Dims | list[Dims] | None:
        dims, g = ctx.dims("v"), ctx.dims("g")
        assert dims is not None and g is not None
        keep = ctx.args["dim"] % len(dims) if ctx.args["dim"] != -1 else None
        over = [d for i, d in enumerate(dims) if i != keep and ctx.grows(d)]
        out: Dims = [ctx.close(d) for d in dims]
        if over:
            n = ctx.uniform_factor(over)
            for info in (i for d in over for i in infos(d)) if ctx.newborn else ():
                if info.content is not Content.ZERO:
                    ctx.demand(info, Content.ZERO, "a norm runs over the axis")
            if n != 1:
                ctx.rescale_output(n**0.5)
        if keep is not None and ctx.grows(dims[keep]):
            if ctx.newborn and any(i.content is Content.ZERO for i in infos(dims[keep])):
                raise ctx.refuse("new units of zeros have no direction to normalise")
            joined = ctx.combine(out[keep], g[keep], "any")
            out[keep] = annotate(ctx.close(joined), lambda info: info.becomes(Content.FREE, zeroable=False))
        return out


register_rule("aten._weight_norm.default", WeightNorm())
