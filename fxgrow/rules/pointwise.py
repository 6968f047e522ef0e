"""Element-wise ops: activations, arithmetic with broadcasting, casts, comparisons, dropout."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxgrow.algebra import is_unit
from fxgrow.rules import values
from fxgrow.rules.annotation import Dims
from fxgrow.rules.base import Rule, casts, moves, register_table
from fxgrow.rules.context import Context, GrowthContext
from fxgrow.rules.forms import Cast, Opaque, Pointwise, Structural
from fxgrow.rules.forms.cast import holds_numbers
from fxgrow.rules.forms.pointwise import through


def table() -> dict[str, Rule]:
    """Element-wise ops."""
    return {
        # functions of one number, f(0) = 0
        "aten.relu(_) aten.abs(_)": Pointwise(zero=True, idempotent=True, range=values.absolute),
        "aten.relu6(_)": Pointwise(zero=True, idempotent=True, range=values.from_zero),
        "aten.square(_)": Pointwise(zero=True, range=values.from_zero),
        "aten.neg(_) aten.rad2deg(_) aten.deg2rad(_) aten.positive": Pointwise(zero=True, mean=True),
        (
            "aten.gelu(_) aten.silu(_) aten.mish(_) aten.elu(_) aten.selu(_) aten.celu(_) aten.leaky_relu(_) "
            "aten.hardswish(_) aten.softshrink"
        ): Pointwise(zero=True),
        (
            "aten.sin(_) aten.tan(_) aten.atan(_) aten.sinh(_) aten.tanh(_) aten.asinh(_) aten.expm1(_) aten.erf(_) "
            "aten.special_i1 aten.special_i1e aten.special_bessel_j1"
        ): Pointwise(zero=True),
        "aten.hardshrink": Pointwise(zero=True, jumps=True, idempotent=True),
        "aten.frac(_)": Pointwise(zero=True, jumps=True),
        # these jump at 0 itself, and a zero may be one up to rounding only: x - mean(x) in new entries
        "aten.sign(_)": Pointwise(jumps=True, idempotent=True),
        "aten.angle": Pointwise(jumps=True),
        "aten.nan_to_num(_)": Pointwise(zero=True, implied={"posinf": largest, "neginf": lowest}, idempotent=True),
        "aten.hardtanh(_)": Pointwise(zero=zero_is_between, idempotent=True),
        "aten.clamp(_)": Pointwise(zero=zero_is_between, idempotent=True, range=values.clamped),
        "aten.fake_quantize_per_tensor_affine": Pointwise(zero=True, jumps=True),
        "aten.prelu": PReLU(),
        "aten.glu": Glu(),
        # other functions of one number, finite everywhere
        (
            "aten.exp(_) aten.exp2(_) aten.cosh(_) aten.i0(_) aten.special_i0e aten.erfc(_) aten.special_erfcx"
        ): Pointwise(range=values.from_zero),
        "aten.softplus": Pointwise(range=values.ramp),
        "aten.sigmoid(_) aten.hardsigmoid(_) aten.special_ndtr": Pointwise(range=values.fraction),
        ("aten.log_sigmoid aten.cos(_) aten.sinc(_) aten.special_log_ndtr aten.special_bessel_j0"): Pointwise(),
        "aten.pow.Scalar": Pointwise(),  # a number to the power of a tensor
        "aten.clamp_min(_) aten.clamp_max(_)": Pointwise(idempotent=True, range=values.clamped),
        "aten.clamp.Tensor": Pointwise(range=values.clamped),
        "aten.sgn(_) aten.round(_) aten.floor(_) aten.ceil(_) aten.trunc(_)": Pointwise(jumps=True, idempotent=True),
        "aten.round(_).decimals": Pointwise(jumps=True),
        "aten.threshold(_)": Pointwise(jumps=True, idempotent=True),
        # functions of one number that are not finite everywhere
        "aten.sqrt(_) aten.rsqrt(_) aten.acos(_) aten.acosh(_)": Pointwise(
            domain=("self",), jumps=True, range=values.from_zero
        ),
        (
            "aten.log(_) aten.log2(_) aten.log10(_) aten.log1p(_) aten.logit(_) aten.reciprocal(_) aten.asin(_) "
            "aten.atanh(_) aten.erfinv(_) aten.special_ndtri aten.special_entr aten.lgamma(_) aten.digamma(_) "
            "aten.polygamma aten.mvlgamma"
        ): Pointwise(domain=("self",), jumps=True),
        "aten.pow.Tensor_Scalar aten.pow_.Scalar aten.float_power.Tensor_Scalar": Pointwise(
            zero=positive_power,
            domain=base_of_power,
            why="the new units' values may be outside the domain of x ** {exponent}",
            jumps=rough_power,
        ),
        # sums; with one tensor operand the other is a literal
        "aten.add(_).Tensor aten.add(_).Scalar": Pointwise(
            "add", zero=adds_nothing, mean=True, neutral=True, range=values.total
        ),
        "aten.sub(_).Tensor aten.sub(_).Scalar": Pointwise(
            "add", zero=adds_nothing, mean=True, neutral=True, centres=True, range=values.difference
        ),
        "aten.rsub.Tensor aten.rsub.Scalar": Pointwise("add", zero=other_is_zero, mean=True, neutral=True),
        # products and quotients
        "aten.mul(_).Tensor aten.mul(_).Scalar": Pointwise("mul", zero=True, mean=True, range=values.times),
        "aten.div(_).Tensor aten.div(_).Scalar": Pointwise(
            "mul",
            zero=by_a_number,
            mean=True,
            domain=("other",),
            why="divides by new units whose values may be 0",
            jumps=divisor,
        ),
        "aten.div.out": Pointwise(
            "mul",
            zero=by_a_number,
            mean=True,
            into="out",
            domain=("other",),
            why="divides by new units whose values may be 0",
            jumps=divisor,
        ),
        "aten.div.Tensor_mode aten.floor_divide aten.fmod.Tensor": Pointwise(domain=("other",), jumps=True),
        "aten.fmod.Scalar": Pointwise(jumps=True),
        "aten.remainder.Tensor": Pointwise(domain=("other",), jumps=True, range=values.remainder),
        "aten.remainder.Scalar": Pointwise(jumps=True, range=values.remainder),
        "aten.addcmul(_)": Pointwise(),
        "aten.addcdiv(_)": Pointwise(domain=("tensor2",), jumps=True),
        # other functions of two numbers
        "aten.pow.Tensor_Tensor aten.float_power.Tensor_Tensor": Pointwise(domain=("self", "exponent"), jumps=True),
        (
            "aten.xlogy.Tensor aten.special_xlog1py aten.ldexp.Tensor aten.special_gammainc aten.special_gammaincc "
            "aten.igamma(_) aten.igammac(_)"
        ): Pointwise(domain=("self", "other"), jumps=True),
        "aten.maximum aten.max.other": Pointwise("zero", range=values.larger),
        "aten.minimum aten.min.other": Pointwise("zero", range=values.smaller),
        "aten.clamp_min.Tensor aten.clamp_max.Tensor": Pointwise("zero", range=values.clamped),
        "aten.fmax aten.fmin aten.complex": Pointwise("zero"),
        "aten.hypot": Pointwise("zero", range=values.from_zero),
        "aten.copysign.Tensor": Pointwise("zero", jumps=True),
        "aten.copysign.Scalar": Pointwise(zero=True),
        "aten.polar aten.logaddexp aten.logaddexp2": Pointwise(),
        "aten.atan2(_) aten.heaviside(_)": Pointwise(jumps=True),
        "aten.lerp(_).Tensor aten.lerp(_).Scalar": Pointwise(),
        # one of two values
        "aten.where.self aten.where.ScalarOther aten.where.ScalarSelf aten.where.Scalar": Pointwise(
            branches=("self", "other"), range=values.chosen
        ),
        "aten.masked_fill(_).Scalar aten.masked_fill(_).Tensor": Pointwise(branches=("self", "value")),
        # truth values
        "aten.isnan aten.isposinf aten.isneginf aten.isreal aten.isclose": Pointwise(),
        "aten.isinf aten.isfinite aten.signbit": Pointwise(jumps=True),
        (
            "aten.eq.Scalar aten.ne.Scalar aten.lt.Scalar aten.le.Scalar aten.gt.Scalar aten.ge.Scalar "
            "aten.eq.Tensor aten.ne.Tensor aten.lt.Tensor aten.le.Tensor aten.gt.Tensor aten.ge.Tensor"
        ): Pointwise(jumps=True),
        "aten.logical_not(_) aten.logical_and aten.logical_or aten.logical_xor": Pointwise(jumps=True),
        "aten.bitwise_not(_)": Pointwise(),
        (
            "aten.bitwise_and.Tensor aten.bitwise_or.Tensor aten.bitwise_xor.Tensor "
            "aten.bitwise_and.Scalar aten.bitwise_or.Scalar aten.bitwise_xor.Scalar "
            "aten.__and__.Tensor aten.__or__.Tensor aten.__xor__.Tensor "
            "aten.__and__.Scalar aten.__or__.Scalar aten.__xor__.Scalar"
        ): Pointwise(jumps=True),
        # dropout
        "aten.dropout(_)": Pointwise(zero=True, mean=True, drawn="all"),
        "aten.feature_dropout(_)": Pointwise(zero=True, mean=True, drawn=2),
        "aten.alpha_dropout(_)": Pointwise(drawn="all"),  # what it drops is not zero
        "aten.feature_alpha_dropout(_)": Pointwise(drawn=2),
        "aten.rrelu(_)": Pointwise(zero=True, drawn="all"),
        # what a tensor held is written over, or does not matter
        "aten.copy_": Pointwise(zero=takes_zeros, mean=takes_means, into="self", jumps=rounded_operands),
        "aten.fill_.Tensor aten.fill_.Scalar": Pointwise(into="self", value="value"),
        "aten.zero_ aten.zeros_like": Pointwise(into="self", value=0),
        "aten.ones_like": Pointwise(into="self", value=1),
        "aten.full_like": Pointwise(into="self", value="fill_value"),
        (
            "aten.empty_like aten.rand_like aten.randn_like aten.bernoulli aten.bernoulli.p aten.bernoulli_.float "
            "aten.bernoulli_.Tensor aten.multinomial aten.uniform_ aten.normal_ aten.exponential_"
        ): Opaque("its entries are drawn at random or not set"),
        # casts and copies
        ("aten.to.dtype aten.to.device aten.to.dtype_layout aten.to.other aten._to_copy aten.type_as"): Cast(
            ignored=("other",), linear=keeps_numbers, jumps=rounded_operands, range=values.of_operand
        ),
        "aten.clone aten.contiguous aten.alias aten.lift_fresh_copy aten.resolve_conj aten.resolve_neg": Structural(
            same, copies=True
        ),
        "aten.detach(_)": Structural(same, copies=True, detaches=True),
        "aten.conj aten.conj_physical aten.real aten.imag": Structural(same),
    }


# arithmetic -----------------------------------------------------------------------------------------------------------


def adds_nothing(args: dict[str, Any]) -> bool:
    """``x + 0``, with which ``sum([...])`` begins, and ``x + alpha * 0``"""
    return any(isinstance(args.get(n), int | float) and args[n] == 0 for n in ("other", "alpha"))


def other_is_zero(args: dict[str, Any]) -> bool:
    """``0 - x``"""
    return isinstance(args["other"], int | float) and args["other"] == 0


def zero_is_between(args: dict[str, Any]) -> bool:
    """where 0 is between the bounds"""
    low, high = (args.get(f"{n}_val", args.get(n)) or 0 for n in ("min", "max"))
    return isinstance(low, int | float) and isinstance(high, int | float) and low <= 0 <= high


def by_a_number(args: dict[str, Any]) -> bool:
    """where the divisor is a number"""
    other = args["other"]
    return not (isinstance(other, fx.Node) and isinstance(other.meta.get("val"), torch.Tensor))


def divisor(node: fx.Node) -> list[fx.Node]:
    """in the divisor, at 0"""
    return [n for n in node.all_input_nodes[1:] if n is node.args[1]]


def positive_power(args: dict[str, Any]) -> bool:
    """where the exponent is positive"""
    return isinstance(args["exponent"], int | float) and args["exponent"] > 0


def base_of_power(args: dict[str, Any]) -> tuple[str, ...]:
    """``self``, but for whole exponents from 1 on, which are smooth everywhere"""
    exponent = args["exponent"]
    whole = isinstance(exponent, int | float) and exponent >= 1 and float(exponent).is_integer()
    return () if whole else ("self",)


def rough_power(node: fx.Node) -> list[fx.Node]:
    """in ``self``, but for positive whole exponents"""
    exponent = node.args[1]
    whole = isinstance(exponent, int | float) and exponent > 0 and float(exponent).is_integer()
    return [] if whole else node.all_input_nodes


def largest(dtype: torch.dtype) -> float:
    """the largest number of the dtype"""
    return torch.finfo(dtype).max


def lowest(dtype: torch.dtype) -> float:
    """the lowest number of the dtype"""
    return torch.finfo(dtype).min


# casts and copies -----------------------------------------------------------------------------------------------------


def same(ctx: Context, dims: Dims) -> Dims:
    """... -> ..."""
    return dims


def takes_zeros(args: dict[str, Any]) -> bool:
    """unless ``self`` holds truth values, which jump at 0"""
    return args["self"].meta["val"].dtype is not torch.bool


def takes_means(args: dict[str, Any]) -> bool:
    """where ``self`` holds real or complex numbers"""
    return holds_numbers(args["self"].meta.get("val"))


def rounded_operands(node: fx.Node) -> list[fx.Node]:
    """where the result holds whole numbers"""
    return [] if holds_numbers(node.meta.get("val")) else node.all_input_nodes


def keeps_numbers(node: fx.Node) -> bool:
    """between real or complex numbers, and not down to a coarser dtype and up again

    What follows such a pair computes more finely than its numbers are.
    """
    source = node.all_input_nodes[0]
    if not holds_numbers(node.meta.get("val")) or not holds_numbers(source.meta.get("val")):
        return False
    return _step(node) >= _step(source) or not _was_rounded(source)


def _was_rounded(node: fx.Node) -> bool:
    """Whether a value comes from a cast to a coarser dtype, seen through ops that move elements."""
    while moves(node) and node.all_input_nodes:
        source = node.all_input_nodes[0]
        if casts(node) and holds_numbers(source.meta.get("val")) and _step(source) < _step(node):
            return True
        node = source
    return False


def _step(node: fx.Node) -> float:
    """The distance from 1 to the next number of the value's dtype."""
    return torch.finfo(node.meta["val"].dtype).eps


# functions with parts -------------------------------------------------------------------------------------------------


class PReLU(Rule):
    """``x`` where positive, else ``weight * x``, one weight per entry of dim 1 (or one for all)."""

    special = "its weight meets dim 1, wherever that is"
    zero = True

    def relate(self, ctx: Context) -> Dims:
        dims, weight = ctx.operand("self"), ctx.operand("weight")
        if weight and not is_unit(weight[0]):
            ctx.unify(dims[1 if len(dims) > 1 else 0], weight[0])
        return list(dims)

    def grow(self, ctx: GrowthContext) -> Dims:
        dims, weight = ctx.operand("self"), ctx.dims("weight")
        ctx.newborn_constants({"weight": 0.25})
        out = [through(ctx.close(d), zero=True) for d in dims]
        i = 1 if len(dims) > 1 else 0
        if weight and not is_unit(weight[0]) and ctx.grows(dims[i]):
            out[i] = ctx.combine(dims[i], weight[0], "mul_first")
        return out


class Glu(Rule):
    """``glu(x, dim)``: the first half times the sigmoid of the second."""

    special = "the two halves of its operand meet"
    zero = True

    def relate(self, ctx: Context) -> Dims:
        dims = ctx.operand("self")
        i = ctx.args["dim"] % len(dims)
        half = ctx.shape[i]
        a, b = ctx.split(dims[i], [half, half])
        return [*dims[:i], ctx.merge([a, b]), *dims[i + 1 :]]

    def grow(self, ctx: GrowthContext) -> Dims:
        dims = ctx.operand("self")
        i = ctx.args["dim"] % len(dims)
        a, b = ctx.split(dims[i], [ctx.shape[i], ctx.shape[i]])
        out = [through(ctx.close(d), zero=True) for d in dims]
        out[i] = ctx.close(ctx.combine(a, b, "mul_first"))
        return out


register_table(__name__, table())
