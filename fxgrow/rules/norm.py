"""Normalisation: statistics over an axis, with the recipes that keep them exact when it grows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch

from fxgrow.algebra import UNIT, Concat, Conflict, Expr, Unifier, is_unit, resolve, size_of
from fxgrow.rules.annotation import Content, Dims, Info, annotate, infos
from fxgrow.rules.base import Rule, implied_arguments, register_table
from fxgrow.rules.context import Context, GrowthContext, Regroups
from fxgrow.rules.forms import Pattern
from fxgrow.rules.resize import Resize


def table() -> dict[str, Rule]:
    """Each has a recipe of its own: what new units hold, and what scales weight and eps then take."""
    return {
        "aten.layer_norm": LastDimsNorm(Content.MEAN),
        "aten.rms_norm": LastDimsNorm(Content.ZERO, implied={"eps": _eps_of_sums}),
        "aten.batch_norm": BatchNorm(),
        "aten.instance_norm": InstanceNorm(),
        "aten.group_norm": GroupNorm(),
        "aten._weight_norm": WeightNorm(),
    }


def _eps_of_sums(dtype: torch.dtype) -> float:
    """Half precision is summed in float32, and takes its eps."""
    return torch.finfo(torch.float64 if dtype is torch.float64 else torch.float32).eps


# over all entries of a dim ------------------------------------------------------------------------------------------


def _normalise(ctx: GrowthContext, over: Dims, needed: Content, eps: float) -> Dims:
    """The dims that a norm runs over, behind it and its weight and bias.

    Copies with equal multiplicities leave every statistic as it is. Newborn entries are exact when they hold the mean
    of the others (LayerNorm; LEMON, ICLR 2024) or zero (RMSNorm): with k whole copies of d units in d' entries and
    eta^2 = k d / d', the weight is scaled by eta and eps by eta^2, and newborn entries normalise to zero.
    """
    weight, bias = ctx.dims("weight"), ctx.dims("bias")
    grown = [d for d in over if ctx.grows(d)]
    eta = ctx.statistic(grown, needed, len(over)) if grown else 1.0
    out: Dims = []
    for i, dim in enumerate(over):
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
        ctx.edit("eps", eps * eta**2)
        if weight is None and bias is None:
            ctx.rescale_output(eta)
        elif weight is None or not ctx.scale_shared("weight", eta):
            raise ctx.refuse("the norm's weight is shared or missing, so that its scale cannot be adjusted")
    return out


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


class LastDimsNorm(Rule):
    """LayerNorm and RMSNorm, ``... n, n?, n? -> ... n`` over the last dims."""

    special = "new units in the mean, and scales of its weight and eps"
    weights = ("weight", "bias")

    def __init__(self, needed: Content, implied: Mapping[str, Callable[[torch.dtype], float]] | None = None) -> None:
        self.needed, self.implied = needed, implied or {}

    def relate(self, ctx: Context) -> Dims | list[Dims] | None:
        dims = ctx.operand("input")
        lead = len(dims) - len(ctx.args["normalized_shape"])
        for name in ("weight", "bias"):
            for mine, theirs in zip(dims[lead:], ctx.dims(name) or [], strict=False):
                ctx.unify(mine, theirs)
        return [resolve(d) for d in dims]

    def grow(self, ctx: GrowthContext) -> Dims | list[Dims] | None:
        dims = ctx.operand("input")
        lead = len(dims) - len(ctx.args["normalized_shape"])
        zero = self.needed is Content.ZERO and ctx.dims("bias") is None
        passing: Dims = [annotate(d, lambda info: _normalised(info, zero)) for d in map(ctx.close, dims[:lead])]
        eps = implied_arguments(ctx.node).get("eps", ctx.args.get("eps"))
        assert eps is not None
        _check_eps(ctx, dims[:lead], float(eps), dims[lead:])
        return [*passing, *_normalise(ctx, dims[lead:], self.needed, float(eps))]

    def resize(self, ctx: Resize) -> None:
        dims = ctx.dims(ctx.args["input"])
        ctx.set_shape("normalized_shape", dims[len(dims) - len(ctx.args["normalized_shape"]) :])


# channel by channel -------------------------------------------------------------------------------------------------

_OPERANDS = ("input", "weight", "bias", "running_mean", "running_var")
_NEWBORN = {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}


class BatchNorm(Rule):
    """``b c ..., c?, c?, c?, c? -> b c ...``: newborn channels get mean 0, variance 1, weight 1, bias 0.

    Without running statistics (weight standardisation, Qiao 2019, is one such call on a weight) the dims that it takes
    statistics over may grow by whole copies, which leave mean and variance as they are.
    """

    special = "the dims that it takes statistics over grow where nothing keeps a running average"
    weights = ("weight", "bias")

    channels = Pattern("b c ..., c?, c?, c?, c? -> b c ...", _OPERANDS, roles={"c": "channels"}, newborn=_NEWBORN)

    def relate(self, ctx: Context) -> Dims | list[Dims] | None:
        dims = ctx.operand("input")
        if ctx.dims("running_var") is not None:
            for dim in (dims[0], *dims[2:]):
                ctx.freeze(dim, "batch norm takes statistics over it")
        return self.channels.relate(ctx)

    def grow(self, ctx: GrowthContext) -> Dims | list[Dims] | None:
        dims = ctx.operand("input")
        over = [d for d in (dims[0], *dims[2:]) if ctx.grows(d)]
        if over:
            ctx.uniform_factor(over)
            if ctx.newborn:
                raise ctx.refuse("new units in a dim it takes statistics over; grow by whole copies instead")
        first, channels, *rest = cast(Dims, self.channels.grow(ctx))
        return [first, annotate(channels, lambda info: info.becomes(Content.FREE, zeroable=False)), *rest]


class InstanceNorm(Rule):
    """``b c *, c?, c?, c?, c? -> b c *``: each sample's channel by itself, over the spatial dims."""

    special = "running statistics freeze the batch, and new units of zeros are divided by eps"
    weights = ("weight", "bias")

    channels = Pattern(
        "b c *, c?, c?, c?, c? -> b c *",
        _OPERANDS,
        roles={"c": "channels"},
        newborn=_NEWBORN,
        why="instance norm takes statistics over it",
    )

    def relate(self, ctx: Context) -> Dims | list[Dims] | None:
        dims = ctx.operand("input")
        for dim in dims[2:]:
            ctx.freeze(dim, self.channels.why)
        if ctx.dims("running_mean") is not None:
            ctx.freeze(dims[0], "running statistics average over it")
        return self.channels.relate(ctx)

    def grow(self, ctx: GrowthContext) -> Dims | list[Dims] | None:
        _check_eps(ctx, ctx.operand("input")[:2], float(ctx.args["eps"]))
        return [annotate(d, lambda info: _normalised(info, False)) for d in cast(Dims, self.channels.grow(ctx))]


class GroupNorm(Rule):
    """``b (g c) *, (g c)?, (g c)? -> b (g c) *``: groups are independent, each normalised with the spatial dims."""

    special = "groups that reach across concatenated parts, and one group, which is a layer norm"
    weights = ("weight", "bias")

    def relate(self, ctx: Context) -> Dims | list[Dims] | None:
        dims = ctx.operand("input")
        channels = resolve(dims[1])
        ctx.role(channels, "channels")
        for name in ("weight", "bias"):
            other = ctx.dims(name)
            if other is not None:
                ctx.unify(channels, other[0])
        g, each = ctx.args["num_groups"], size_of(channels) // ctx.args["num_groups"]
        try:
            ctx.regroup([channels], [g, each])
        except Conflict:
            # groups that reach across concatenated parts: what a group and every part are multiples of can still grow
            parts = resolve(channels)
            shared = _shared(parts, each)
            if shared == 1:
                raise
            outer, _ = ctx.regroup([channels], [size_of(channels) // shared, shared])
            ctx.freeze(outer, f"groups of {each} channels reach across concatenated parts")
        for dim in dims[2:]:
            ctx.freeze(dim, "group norm takes statistics over it")
        return [resolve(d) for d in dims]

    def grow(self, ctx: GrowthContext) -> Dims | list[Dims] | None:
        dims = ctx.operand("input")
        g, eps = ctx.args["num_groups"], float(ctx.args["eps"])
        groups, inner = _groups(ctx, dims[1], g)
        _check_eps(ctx, [dims[0], groups], eps)
        first = annotate(ctx.close(dims[0]), lambda info: _normalised(info, False))
        if ctx.grows(inner):
            if ctx.newborn and g == 1 and all(map(is_unit, dims[2:])):
                _check_eps(ctx, [dims[0]], eps, [dims[1]])
                return [first, *_normalise(ctx, [dims[1]], Content.MEAN, eps), *dims[2:]]
            if ctx.newborn:
                raise ctx.refuse(
                    "group norm takes its statistics over channels and positions together, so that new channels would "
                    "have to hold the mean of both at every position, which no weight gives (the mean of the channels "
                    "at each position would add to the variance); grow by whole copies instead"
                )
            ctx.uniform_factor([inner])
        total: Expr = dims[1]
        if ctx.grows(groups) and ctx.newborn:
            ctx.newborn_constants({"weight": 1.0, "bias": 0.0})
        for name, how in (("weight", "mul"), ("bias", "add")):
            other = ctx.dims(name)
            if other is not None:
                total = ctx.combine(total, other[0], how)
        total = annotate(total, lambda info: info.becomes(Content.FREE, zeroable=False))
        return [first, ctx.close(total), *dims[2:]]

    def resize(self, ctx: Resize) -> None:
        channels = ctx.dims(ctx.args["input"])[1]
        groups, _ = _groups(Unifier(), channels, ctx.args["num_groups"])
        if ctx.changed(groups):
            ctx.set("num_groups", ctx.new_size(groups))


def _groups(ctx: Regroups, channels: Expr, g: int) -> tuple[Expr, Expr]:
    """Groups, and channels inside a group; what stands outside a factor that divides both does not grow."""
    each = size_of(channels) // g
    try:
        groups, inner = ctx.regroup([channels], [g, each])
    except Conflict:
        if not isinstance(channels, Concat):
            raise
        shared = _shared(channels, each)
        _, inner = ctx.regroup([channels], [size_of(channels) // shared, shared])
        groups = UNIT
    return groups, inner


def _shared(channels: Expr, each: Any) -> int:
    """What the channels of a group and of every concatenated part are multiples of; 1 where there are no parts."""
    return math.gcd(each, *(size_of(p) for p in channels.parts)) if isinstance(channels, Concat) else 1


# weights ------------------------------------------------------------------------------------------------------------


class WeightNorm(Rule):
    """``g * v / |v|`` with one norm for each entry of ``dim`` (Salimans and Kingma 2016).

    n whole copies along another dim make every norm larger by the root of n; newborn entries must be zero.
    """

    special = "a product with a norm that may run over all dims but one"
    jumps = True

    def relate(self, ctx: Context) -> Dims | list[Dims] | None:
        dims, g = ctx.operand("v"), ctx.operand("g")
        if len(g) != len(dims):  # it broadcasts from the right, along dims that the norm takes no heed of
            for dim in (*dims, *g):
                ctx.freeze(dim, "a weight norm whose scale has another rank than the weight")
            return [resolve(d) for d in dims]
        for mine, theirs in zip(dims, g, strict=True):
            if not is_unit(theirs) and not is_unit(mine):
                ctx.unify(mine, theirs)
        return [resolve(d) for d in dims]

    def grow(self, ctx: GrowthContext) -> Dims | list[Dims] | None:
        dims, g = ctx.operand("v"), ctx.operand("g")
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


register_table(__name__, table())
