"""Second names of ops: what PyTorch calls by two names has one rule."""

from __future__ import annotations

import torch

from fxgrow.rules import pointwise, reduction, shape
from fxgrow.rules.base import RULES, register_rule

ALIASES = {
    "absolute": "abs",
    "arccos": "acos",
    "arccosh": "acosh",
    "arcsin": "asin",
    "arcsinh": "asinh",
    "arctan": "atan",
    "arctan2": "atan2",
    "arctanh": "atanh",
    "clip": "clamp",
    "divide": "div",
    "true_divide": "div",
    "fix": "trunc",
    "greater": "gt",
    "greater_equal": "ge",
    "less": "lt",
    "less_equal": "le",
    "moveaxis": "movedim",
    "multiply": "mul",
    "negative": "neg",
    "not_equal": "ne",
    "special_digamma": "digamma",
    "special_erf": "erf",
    "special_erfc": "erfc",
    "special_erfinv": "erfinv",
    "special_exp2": "exp2",
    "special_expit": "sigmoid",
    "special_expm1": "expm1",
    "special_i0": "i0",
    "special_log1p": "log1p",
    "special_log_softmax": "log_softmax",
    "special_logit": "logit",
    "special_logsumexp": "logsumexp",
    "special_round": "round",
    "special_sinc": "sinc",
    "special_softmax": "softmax",
    "special_xlogy": "xlogy",
    "subtract": "sub",
    "swapdims": "swapaxes",
}


def _register() -> None:
    _ = (pointwise, reduction, shape)  # whose rules come first
    for alias, name in ALIASES.items():
        for suffix in ("", "_"):
            packet = getattr(torch.ops.aten, alias + suffix, None)
            for overload in packet.overloads() if packet is not None else ():
                rule = RULES.get(f"aten.{name}{suffix}.{overload}")
                if rule is not None:
                    register_rule(f"aten.{alias}{suffix}.{overload}", rule)


_register()
