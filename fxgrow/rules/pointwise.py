"""Element-wise ops: activations, arithmetic with broadcasting, casts, comparisons, dropout."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx

from fxgrow.algebra import UNIT, Expr, is_unit
from fxgrow.ir.dtypes import is_fine
from fxgrow.rules.annotation import Content, Dims, Info, Site, annotate, infos
from fxgrow.rules.base import moves, register_rule, rule_of
from fxgrow.rules.context import Context, GrowthContext
from fxgrow.rules.forms import Opaque, Pointwise, Structural


def _with_in_place(names: str) -> list[str]:
    out = []
    for name in names.split():
        base, _, overload = name.partition(".")
        out += [f"aten.{base}.{overload or 'default'}", f"aten.{base}_.{overload or 'default'}"]
    return out


@dataclass(frozen=True, eq=False)
class Finite(Pointwise):
    """An element-wise op that is not finite everywhere: newborn entries of unknown value may become NaN or infinite."""

    everywhere: bool = False  # every operand has a domain, not the last one alone
    jumps: bool | Callable[[fx.Node], list[fx.Node]] = True

    def grow(self, ctx: GrowthContext) -> Dims | list[Dims] | None:
        risky = {Content.FREE, Content.ZERO, Content.MEAN}
        operands = ctx.tensor_operands()
        for name, dims in operands if self.everywhere else operands[-1:]:
            for dim in dims:
                for info in infos(dim):
                    if ctx.newborn and info.content in risky:
                        raise ctx.refuse(
                            f"the new units' values may be outside the domain of {ctx.op} (operand {name})"
                        )
        return super().grow(ctx)


class Sum(Pointwise):
    """``a + b``; where one of them is a tensor of zeros, new entries are those of the other."""

    def grow(self, ctx: GrowthContext) -> Dims | list[Dims] | None:
        out = super().grow(ctx)
        for name, other in (("self", "other"), ("other", "self")):
            kept = ctx.dims(name)
            if out is None or not kept or not ctx.is_zero(ctx.args[other]) or ctx.args.get("alpha", 1) != 1:
                continue
            for i in range(-len(kept), 0):
                if not is_unit(kept[i]):
                    cast(Dims, out)[i] = ctx.close(kept[i])
        return out


class Difference(Sum):
    """``a - b``; ``x - mean(x)`` is known to be zero where newborn entries hold the mean."""

    def grow(self, ctx: GrowthContext) -> Dims | list[Dims] | None:
        out = super().grow(ctx)
        a, b = ctx.args["self"], ctx.args["other"]
        reduced = ctx.mean_of(b)
        if out is None or reduced is None or reduced[0] is not a or ctx.args.get("alpha", 1) != 1:
            return out
        left = ctx.dims("self")
        assert left is not None
        wide = [i for i in reduced[1] if not is_unit(left[i])]
        if len(wide) == 1 and ctx.is_whole(left[wide[0]]):
            (i,) = wide
            if all(x.content is Content.MEAN for x in infos(left[i])):
                out[i] = annotate(out[i], lambda info: info.becomes(Content.ZERO))  # type: ignore[call-overload,arg-type]
        return out


ZERO = (
    "relu gelu silu tanh neg abs sin sinh asinh atan erf sign leaky_relu elu selu celu mish hardswish square expm1 "
    "relu6 rad2deg deg2rad frac tan softshrink hardshrink angle special_i1 special_i1e special_bessel_j1"
)


#: infinities become the largest numbers of the dtype, where nothing else is said
_LARGEST: Mapping[str, Callable[[torch.dtype], float]] = {
    "posinf": lambda dtype: torch.finfo(dtype).max,
    "neginf": lambda dtype: torch.finfo(dtype).min,
}


FREE = (
    "sigmoid exp exp2 cos cosh softplus hardsigmoid log_sigmoid sgn round floor ceil trunc logical_not bitwise_not "
    "isnan isinf isfinite isposinf isneginf isreal signbit sinc i0 erfc special_i0e special_ndtr special_log_ndtr "
    "special_erfcx special_bessel_j0 polar logaddexp logaddexp2 isclose heaviside atan2"
)
DOMAIN = "log log2 log10 log1p rsqrt sqrt reciprocal acos asin acosh atanh erfinv logit lgamma digamma special_ndtri"

JUMPS = "sign sgn signbit frac hardshrink angle round floor ceil trunc atan2 heaviside logical_not isinf isfinite"

for _name in ZERO.split():
    _affine = _name in ("neg", "rad2deg", "deg2rad")
    register_rule(_with_in_place(_name), Pointwise(zero=True, mean=_affine, jumps=_name in JUMPS.split()))
register_rule(_with_in_place("nan_to_num"), Pointwise(zero=True, implied=_LARGEST))
for _name in FREE.split():
    register_rule(_with_in_place(_name), Pointwise(jumps=_name in JUMPS.split()))
for _name in DOMAIN.split():
    register_rule(_with_in_place(_name), Finite())
register_rule(
    _with_in_place("hardtanh clamp") + ["aten.clamp.Tensor"],
    Pointwise(zero=lambda a: (a.get("min_val", a.get("min")) or 0) <= 0 <= (a.get("max_val", a.get("max")) or 0)),
)
register_rule(_with_in_place("clamp_min clamp_max"), Pointwise())
register_rule(_with_in_place("threshold round.decimals"), Pointwise(jumps=True))
register_rule("aten.fake_quantize_per_tensor_affine.default", Pointwise(zero=True, jumps=True))
register_rule(["aten.positive.default"], Pointwise(zero=True, mean=True))
register_rule(["aten.special_entr.default", "aten.polygamma.default", "aten.mvlgamma.default"], Finite())


@dataclass(frozen=True, eq=False)
class Drawn(Pointwise):
    """An op that draws at random in train mode, and in eval mode where its flag is a plain True.

    What it draws there is part of the function, and every copy would have a draw of its own.
    """

    drawn: int | None = None  # number of leading dims that the draws run over

    def grow(self, ctx: GrowthContext) -> Dims | list[Dims] | None:
        always = ctx.args.get("train", ctx.args.get("training")) is True and ctx.args.get("p", 1) != 0
        drawn = ctx.operand(ctx.first)[: self.drawn]
        if always and ctx.in_eval and any(ctx.grows(d) for d in drawn):
            raise ctx.refuse(
                "it draws at random in eval mode too, and every copy would have a draw of its own. Give it the mode of "
                "the module: training=self.training"
            )
        return super().grow(ctx)


register_rule(_with_in_place("rrelu"), Drawn(zero=True))
register_rule(_with_in_place("dropout"), Drawn(zero=True, mean=True))
register_rule(_with_in_place("feature_dropout"), Drawn(drawn=2, zero=True, mean=True))
register_rule(_with_in_place("alpha_dropout"), Drawn())  # what it drops is not zero
register_rule(_with_in_place("feature_alpha_dropout"), Drawn(drawn=2))

# arithmetic; with one tensor operand the other is a literal


def _adds_nothing(args: dict[str, Any]) -> bool:
    """``x + 0``, with which ``sum([...])`` begins, and ``x + alpha * 0``."""
    return any(isinstance(args.get(n), int | float) and args[n] == 0 for n in ("other", "alpha"))


_scalar_add: dict[str, Any] = {"zero": _adds_nothing, "mean": True}
register_rule(_with_in_place("add.Tensor add.Scalar"), Sum("add", **_scalar_add))
register_rule(_with_in_place("sub.Tensor sub.Scalar"), Difference("add", **_scalar_add))
register_rule(["aten.rsub.Scalar", "aten.rsub.Tensor"], Sum("add", **_scalar_add))
register_rule(_with_in_place("mul.Tensor mul.Scalar"), Pointwise("mul", zero=True, mean=True))


class Quotient(Pointwise):
    """``a / b``: like a product where b does not vary along the axis, refused where newborn entries of b may be 0."""

    def grow(self, ctx: GrowthContext) -> Dims | list[Dims] | None:
        if isinstance(ctx.args["other"], int | float):
            return super().grow(ctx)
        for dim in ctx.dims("other") or []:
            for info in infos(dim):
                if ctx.newborn and info.content is not Content.CONST:
                    raise ctx.refuse("divides by new units whose values may be 0")
        return super().grow(ctx)


def _divisor(node: fx.Node) -> list[fx.Node]:
    return [n for n in node.all_input_nodes[1:] if n is node.args[1]]


register_rule(_with_in_place("div.Tensor div.Scalar"), Quotient("mul", zero=True, mean=True, jumps=_divisor))


class QuotientInto(Quotient):
    """``torch.div(a, b, out=...)``: what ``out`` held is gone."""

    def grow(self, ctx: GrowthContext) -> Dims | list[Dims] | None:
        super().grow(ctx)  # refuses what may divide by zero
        a, b = ctx.dims("self"), ctx.dims("other") or []
        assert a is not None
        pairs = [(a[i], b[i] if -i <= len(b) else UNIT) for i in range(-len(a), 0)]
        return [ctx.close(ctx.combine(x, y, "mul")) for x, y in pairs]


register_rule("aten.div.out", QuotientInto("mul", jumps=_divisor))
register_rule(["aten.div.Tensor_mode", "aten.floor_divide.default", "aten.remainder.Scalar"], Finite())
register_rule(["aten.remainder.Tensor", "aten.fmod.Tensor", "aten.fmod.Scalar"], Finite())
register_rule(
    ["aten.float_power.Tensor_Tensor", "aten.xlogy.Tensor", "aten.special_xlog1py.default", "aten.ldexp.Tensor"]
    + ["aten.special_gammainc.default", "aten.special_gammaincc.default"],
    Finite(everywhere=True),
)


def _positive_power(args: dict[str, Any]) -> bool:
    return isinstance(args["exponent"], int | float) and args["exponent"] > 0


class Power(Pointwise):
    """``x ** p``: smooth everywhere for whole p >= 1 only."""

    def grow(self, ctx: GrowthContext) -> Dims | list[Dims] | None:
        exponent = ctx.args["exponent"]
        if ctx.newborn and not (isinstance(exponent, int | float) and exponent >= 1 and float(exponent).is_integer()):
            raise ctx.refuse(f"the new units' values may be outside the domain of x ** {exponent}")
        return super().grow(ctx)


def _rough_power(node: fx.Node) -> list[fx.Node]:
    exponent = node.args[1]
    whole = isinstance(exponent, int | float) and exponent > 0 and float(exponent).is_integer()
    return [] if whole else node.all_input_nodes


register_rule(
    ["aten.pow.Tensor_Scalar", "aten.pow_.Scalar", "aten.float_power.Tensor_Scalar"],
    Power(zero=_positive_power, jumps=_rough_power),
)
register_rule("aten.pow.Tensor_Tensor", Finite(everywhere=True))
register_rule("aten.pow.Scalar", Pointwise())
register_rule(
    [f"aten.{n}.default" for n in ("maximum", "minimum", "fmax", "fmin", "hypot", "complex")]
    + [f"aten.{n}" for n in ("max.other", "min.other", "clamp_min.Tensor", "clamp_max.Tensor")],
    Pointwise("zero"),
)
register_rule("aten.copysign.Tensor", Pointwise("zero", jumps=True))
register_rule(["aten.copysign.Scalar"], Pointwise(zero=True))


@dataclass(frozen=True, eq=False)
class Choice(Pointwise):
    """One of two values, entry by entry: zero where both are."""

    branches: tuple[str, ...] = ()

    def grow(self, ctx: GrowthContext) -> Dims | list[Dims] | None:
        out = super().grow(ctx)
        for i in range(-len(out or []), 0):
            found = [self._at(ctx, name, i) for name in self.branches]
            if out is not None and all(d is None or _all_zero(d) for d in found) and any(found):
                sources = frozenset().union(*(x.sources for d in found if d is not None for x in infos(d)))
                out[i] = annotate(cast(Expr, out[i]), functools.partial(_zero_of, sources))
        return out

    @staticmethod
    def _at(ctx: GrowthContext, name: str, i: int) -> Any:
        """A branch's dim; None for one of zeros."""
        if ctx.is_zero(ctx.args[name]):
            return None
        dims = ctx.dims(name) or []
        return dims[i] if -i <= len(dims) else UNIT


def _zero_of(sources: frozenset[Site], info: Info) -> Info:
    return Info(Content.ZERO, sources)


def _all_zero(dim: Any) -> bool:
    found = infos(dim)
    return bool(found) and all(x.content is Content.ZERO for x in found)


register_rule(
    ["aten.where.self", "aten.where.ScalarOther", "aten.where.ScalarSelf", "aten.where.Scalar"],
    Choice(branches=("self", "other")),
)
register_rule(_with_in_place("masked_fill.Scalar masked_fill.Tensor"), Choice(branches=("self", "value")))
register_rule(
    [f"aten.{n}.{o}" for n in ("eq", "ne", "lt", "le", "gt", "ge") for o in ("Scalar", "Tensor")]
    + [f"aten.{n}.default" for n in ("logical_and", "logical_or", "logical_xor")]
    + [f"aten.bitwise_{n}.{o}" for n in ("and", "or", "xor") for o in ("Tensor", "Scalar")]
    + [f"aten.__{n}__.{o}" for n in ("and", "or", "xor") for o in ("Tensor", "Scalar")],
    Pointwise(jumps=True),
)
register_rule(_with_in_place("lerp.Tensor lerp.Scalar addcmul.default"), Pointwise())
register_rule(_with_in_place("addcdiv"), Finite())


class Like(Pointwise):
    """A tensor of one value in the shape of another."""

    def grow(self, ctx: GrowthContext) -> Dims | list[Dims] | None:
        dims = ctx.dims("self")
        assert dims is not None
        return [ctx.constant_like(d) for d in dims]


register_rule(["aten.zeros_like.default", "aten.ones_like.default", "aten.full_like.default"], Like())
register_rule(
    [f"aten.{n}.default" for n in ("empty_like", "rand_like", "randn_like", "bernoulli", "multinomial")]
    + [f"aten.{n}_.default" for n in ("uniform", "normal", "exponential")]
    + ["aten.bernoulli.p", "aten.bernoulli_.float", "aten.bernoulli_.Tensor"],
    Opaque("its entries are drawn at random or not set"),
)


def _same(ctx: Context, dims: Dims) -> Dims:
    return dims


@dataclass(frozen=True, eq=False)
class Cast(Structural):
    """A change of dtype: linear among real and complex numbers, up to the rounding that the model has anyway.

    Rounding to integers, or to the few numbers that 8 bits can hold, is not linear; it keeps zeros and broadcasts, and
    not the mean. Nor is a cast down and up again: what follows computes more finely than its numbers are.
    """

    def grow(self, ctx: GrowthContext) -> Dims | list[Dims] | None:
        dims = ctx.dims("self")
        assert dims is not None
        return dims if _fine(ctx.node.meta.get("val")) else [annotate(d, _truncated) for d in dims]


def _jumps_to_whole(node: fx.Node) -> list[fx.Node]:
    return [] if _fine(node.meta.get("val")) else node.all_input_nodes


def _keeps_numbers(node: fx.Node) -> bool:
    source = node.all_input_nodes[0]
    if not _fine(node.meta.get("val")) or not _fine(source.meta.get("val")):
        return False
    return _step(node) >= _step(source) or not _rounded(source)


def _rounded(node: fx.Node) -> bool:
    """Whether a value comes from a cast to a coarser dtype, seen through ops that move elements."""
    while moves(node) and node.all_input_nodes:
        source = node.all_input_nodes[0]
        if isinstance(rule_of(node), Cast) and _fine(source.meta.get("val")) and _step(source) < _step(node):
            return True
        node = source
    return False


def _step(node: fx.Node) -> float:
    """The distance from 1 to the next number of the value's dtype."""
    return torch.finfo(node.meta["val"].dtype).eps


def _fine(value: Any) -> bool:
    """Whether a tensor's numbers are real or complex ones, to the precision that models compute in."""
    return isinstance(value, torch.Tensor) and is_fine(value.dtype)


def _truncated(info: Info) -> Info:
    return info.becomes(Content.FREE) if info.content is Content.MEAN else info


register_rule(
    [
        "aten.to.dtype",
        "aten.to.device",
        "aten.to.dtype_layout",
        "aten.to.other",
        "aten._to_copy.default",
        "aten.type_as.default",
    ],
    Cast(_same, ignored=("other",), linear=_keeps_numbers, jumps=_jumps_to_whole),
)
register_rule(
    [
        "aten.contiguous.default",
        "aten.clone.default",
        "aten.detach.default",
        "aten.detach_.default",
        "aten.alias.default",
        "aten.lift_fresh_copy.default",
        "aten.conj.default",
        "aten.conj_physical.default",
        "aten.resolve_conj.default",
        "aten.resolve_neg.default",
        "aten.real.default",
        "aten.imag.default",
    ],
    Structural(_same),
)


class PReLU(Pointwise):
    """``x`` where positive, else ``weight * x``, one weight per entry of dim 1 (or one for all)."""

    def relate(self, ctx: Context) -> Dims | list[Dims] | None:
        dims, weight = ctx.operand("self"), ctx.operand("weight")
        if weight and not is_unit(weight[0]):
            ctx.unify(dims[1 if len(dims) > 1 else 0], weight[0])
        return list(dims)

    def grow(self, ctx: GrowthContext) -> Dims | list[Dims] | None:
        dims, weight = ctx.dims("self"), ctx.dims("weight")
        assert dims is not None
        ctx.newborn_constants({"weight": 0.25})
        out = [self._unary(ctx, ctx.close(d)) for d in dims]
        i = 1 if len(dims) > 1 else 0
        if weight and not is_unit(weight[0]) and ctx.grows(dims[i]):
            out[i] = ctx.combine(dims[i], weight[0], "mul_first")
        return out


register_rule("aten.prelu.default", PReLU(zero=True))


class Overwrite(Pointwise):
    """``self.copy_(src)`` and ``self.fill_(value)``: what ``self`` held is gone."""

    def grow(self, ctx: GrowthContext) -> Dims | list[Dims] | None:
        dims = ctx.dims("self")
        assert dims is not None
        source = ctx.dims("src") or []
        out = []
        for i, dim in zip(range(-len(dims), 0), dims, strict=True):
            other = source[i] if -i <= len(source) else UNIT
            out.append(ctx.constant_like(dim) if is_unit(other) else ctx.close(other))
        return out


register_rule(["aten.copy_.default", "aten.fill_.Tensor", "aten.fill_.Scalar", "aten.zero_.default"], Overwrite())


class Glu(Pointwise):
    """``glu(x, dim)``: the first half times the sigmoid of the second."""

    def relate(self, ctx: Context) -> Dims | list[Dims] | None:
        dims = ctx.operand("self")
        i = ctx.args["dim"] % len(dims)
        half = ctx.shape[i]
        a, b = ctx.split(dims[i], [half, half])
        return [*dims[:i], ctx.merge([a, b]), *dims[i + 1 :]]

    def grow(self, ctx: GrowthContext) -> Dims | list[Dims] | None:
        dims = ctx.dims("self")
        assert dims is not None
        i = ctx.args["dim"] % len(dims)
        a, b = ctx.split(dims[i], [ctx.shape[i], ctx.shape[i]])
        out = [self._unary(ctx, ctx.close(d)) for d in dims]
        out[i] = ctx.close(ctx.combine(a, b, "mul_first"))
        return out


register_rule("aten.glu.default", Glu(zero=True))
