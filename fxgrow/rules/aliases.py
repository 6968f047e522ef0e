"""Second names of ops: what PyTorch calls by two names has one rule."""

from __future__ import annotations

from fxgrow.rules import pointwise, reduction, shape
from fxgrow.rules.base import RULES, Rule, op_names, register_table


def table() -> dict[str, Rule]:
    """The rules of ops under their second names."""
    _ = (pointwise, reduction, shape)  # whose rules come first
    pairs = [
        pair for second, first in SECOND_NAMES.items() for pair in zip(op_names(second), op_names(first), strict=True)
    ]
    return {second: RULES[first] for second, first in pairs}


#: an op's second name to its first
SECOND_NAMES = {
    "aten.absolute(_)": "aten.abs(_)",
    "aten.arccos(_)": "aten.acos(_)",
    "aten.arccosh(_)": "aten.acosh(_)",
    "aten.arcsin(_)": "aten.asin(_)",
    "aten.arcsinh(_)": "aten.asinh(_)",
    "aten.arctan(_)": "aten.atan(_)",
    "aten.arctan2(_)": "aten.atan2(_)",
    "aten.arctanh(_)": "aten.atanh(_)",
    "aten.clip(_) aten.clip.Tensor": "aten.clamp(_) aten.clamp.Tensor",
    "aten.divide(_).Tensor aten.divide(_).Scalar": "aten.div(_).Tensor aten.div(_).Scalar",
    "aten.divide.Tensor_mode aten.divide.out": "aten.div.Tensor_mode aten.div.out",
    "aten.true_divide(_).Tensor aten.true_divide(_).Scalar": "aten.div(_).Tensor aten.div(_).Scalar",
    "aten.true_divide.out": "aten.div.out",
    "aten.fix(_)": "aten.trunc(_)",
    "aten.greater.Tensor aten.greater.Scalar": "aten.gt.Tensor aten.gt.Scalar",
    "aten.greater_equal.Tensor aten.greater_equal.Scalar": "aten.ge.Tensor aten.ge.Scalar",
    "aten.less.Tensor aten.less.Scalar": "aten.lt.Tensor aten.lt.Scalar",
    "aten.less_equal.Tensor aten.less_equal.Scalar": "aten.le.Tensor aten.le.Scalar",
    "aten.moveaxis.int aten.moveaxis.intlist": "aten.movedim.int aten.movedim.intlist",
    "aten.multiply(_).Tensor aten.multiply(_).Scalar": "aten.mul(_).Tensor aten.mul(_).Scalar",
    "aten.negative(_)": "aten.neg(_)",
    "aten.not_equal.Tensor aten.not_equal.Scalar": "aten.ne.Tensor aten.ne.Scalar",
    "aten.special_digamma": "aten.digamma",
    "aten.special_erf": "aten.erf",
    "aten.special_erfc": "aten.erfc",
    "aten.special_erfinv": "aten.erfinv",
    "aten.special_exp2": "aten.exp2",
    "aten.special_expit": "aten.sigmoid",
    "aten.special_expm1": "aten.expm1",
    "aten.special_i0": "aten.i0",
    "aten.special_log1p": "aten.log1p",
    "aten.special_logit": "aten.logit",
    "aten.special_logsumexp": "aten.logsumexp",
    "aten.special_round": "aten.round",
    "aten.special_sinc": "aten.sinc",
    "aten.subtract(_).Tensor aten.subtract(_).Scalar": "aten.sub(_).Tensor aten.sub(_).Scalar",
    "aten.swapdims": "aten.swapaxes",
}


register_table(__name__, table())
