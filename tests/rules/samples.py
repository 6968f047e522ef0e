"""Sample calls for every registered rule, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from fxgrow.rules.aliases import SECOND_NAMES
from fxgrow.rules.base import op_names
from fxgrow.testing.judge import Sample

_generator = torch.Generator().manual_seed(0)


def r(*shape: int) -> Tensor:
    return torch.randn(shape, generator=_generator, dtype=torch.float64)


def p(*shape: int) -> Tensor:
    """Positive."""
    return torch.rand(shape, generator=_generator, dtype=torch.float64) + 0.5


def i(high: int, *shape: int) -> Tensor:
    return torch.randint(0, high, shape, generator=_generator)


def b(*shape: int) -> Tensor:
    return r(*shape) > 0


S = Sample
SAMPLES: dict[str, list[Sample]] = {}

UNARY = (
    "relu gelu silu tanh neg abs sin sinh asinh atan erf sign leaky_relu elu selu celu mish hardswish square expm1 "
    "rad2deg deg2rad frac tan softshrink hardshrink nan_to_num angle special_i1 special_i1e special_bessel_j1 positive "
    "isposinf isneginf isreal signbit sinc i0 erfc special_i0e special_ndtr special_log_ndtr special_erfcx "
    "special_bessel_j0 conj_physical resolve_conj resolve_neg real "
    "relu6 sigmoid exp exp2 cos cosh softplus hardsigmoid log_sigmoid sgn round floor ceil trunc hardtanh"
)
POSITIVE = "log log2 log10 log1p rsqrt sqrt reciprocal lgamma digamma special_entr"
for _name in UNARY.split():
    SAMPLES[f"aten.{_name}.default"] = [S(r(3, 4))]
for _name in POSITIVE.split():
    SAMPLES[f"aten.{_name}.default"] = [S(p(3, 4))]
for _name in ("acos", "asin", "atanh", "erfinv"):
    SAMPLES[f"aten.{_name}.default"] = [S(r(3, 4).tanh())]
for _name in ("logit", "special_ndtri"):
    SAMPLES[f"aten.{_name}.default"] = [S(r(3, 4).sigmoid())]
SAMPLES["aten.acosh.default"] = [S(1 + p(3, 4))]
for _name in ("atan2", "logaddexp", "logaddexp2", "isclose", "heaviside", "fmax", "fmin", "hypot", "complex", "polar"):
    SAMPLES[f"aten.{_name}.default"] = [S(r(3, 4), r(4)), S(r(3, 1), r(3, 4))]
for _name in ("copysign.Tensor", "clamp_min.Tensor", "clamp_max.Tensor"):
    SAMPLES[f"aten.{_name}"] = [S(r(3, 4), r(4))]
for _name in (
    "remainder.Tensor",
    "fmod.Tensor",
    "float_power.Tensor_Tensor",
    "xlogy.Tensor",
    "special_xlog1py.default",
):
    SAMPLES[f"aten.{_name}"] = [S(p(3, 4), p(4))]
for _name in ("isnan", "isinf", "isfinite"):
    SAMPLES[f"aten.{_name}.default"] = [S(r(3, 4))]
for _name in ("logical_not", "bitwise_not"):
    SAMPLES[f"aten.{_name}.default"] = [S(b(3, 4))]
for _name in ("add", "sub", "mul", "div"):
    SAMPLES[f"aten.{_name}.Tensor"] = [S(r(3, 4), p(4)), S(r(3, 1), p(4)), S(r(3, 4), 2.0)]
    SAMPLES[f"aten.{_name}.Scalar"] = [S(r(3, 4), 2.0)]
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    SAMPLES[f"aten.{_name}.Tensor"] = [S(r(3, 4), r(4))]
    SAMPLES[f"aten.{_name}.Scalar"] = [S(r(3, 4), 0.0)]
for _name in ("and", "or", "xor"):
    SAMPLES[f"aten.logical_{_name}.default"] = [S(b(3, 4), b(4))]
    for _full in (f"bitwise_{_name}", f"__{_name}__"):
        SAMPLES[f"aten.{_full}.Tensor"] = [S(b(3, 4), b(4))]
        SAMPLES[f"aten.{_full}.Scalar"] = [S(b(3, 4), True)]
for _name in ("zeros_like", "ones_like", "empty_like", "rand_like", "randn_like", "bernoulli"):
    SAMPLES[f"aten.{_name}.default"] = [S(p(3, 4) / 2)]
for _name in ("contiguous", "clone", "detach", "detach_", "alias", "lift_fresh_copy"):
    SAMPLES[f"aten.{_name}.default"] = [S(r(3, 4))]
for _name in ("dropout", "dropout_", "alpha_dropout", "alpha_dropout_", "feature_dropout", "feature_dropout_"):
    SAMPLES[f"aten.{_name}.default"] = [S(r(3, 4), 0.5, False), S(r(3, 4, 2), 0.5, True)]
for _name in ("mean", "sum"):
    SAMPLES[f"aten.{_name}.default"] = [S(r(3, 4))]
for _name in ("mean.dim", "sum.dim_IntList", "amax.default", "amin.default"):
    SAMPLES[f"aten.{_name}"] = [S(r(3, 4), [1]), S(r(3, 4), [1], True), S(r(2, 3, 4), [1, 2], True)]
SAMPLES["aten.sum.dim_IntList"] += [S(b(3, 4), [1]), S(b(3, 4), [1], True, dtype=torch.int32)]
SAMPLES["aten.sum.default"].append(S(b(3, 4)))
for _name in ("max.dim", "min.dim", "any.dim", "all.dim", "prod.dim_int", "argmax.default", "argmin.default"):
    SAMPLES[f"aten.{_name}"] = [S(r(3, 4), 1), S(r(3, 4), 0, True)]
for _name in (
    "median.dim",
    "nanmedian.dim",
    "mode.default",
    "quantile.scalar",
    "std.dim",
    "var_mean.dim",
    "std_mean.dim",
):
    _second = 0.3 if "quantile" in _name else 1
    SAMPLES[f"aten.{_name}"] = [S(r(3, 4), 0.3, 1) if "quantile" in _name else S(r(3, 4), [1] if "_" in _name else 1)]
for _name in (
    "max",
    "min",
    "any",
    "all",
    "prod",
    "aminmax",
    "nansum",
    "nanmean",
    "median",
    "nanmedian",
    "count_nonzero",
):
    SAMPLES[f"aten.{_name}.default"] = [S(r(3, 4))]
for _name in ("softmax.int", "log_softmax.int"):
    SAMPLES[f"aten.{_name}"] = [S(r(2, 3, 4), -1)]
    SAMPLES[f"aten._{_name.partition('.')[0]}.default"] = [S(r(2, 3, 4), 1, False)]
for _n, _x in ((1, r(2, 3, 4)), (2, r(2, 3, 4, 4)), (3, r(2, 3, 4, 4, 4))):
    SAMPLES[f"aten.avg_pool{_n}d.default"] = [S(_x, [2] * _n)]
    SAMPLES[f"aten.max_pool{_n}d.default"] = [S(_x, [2] * _n)]
    SAMPLES[f"aten.max_pool{_n}d_with_indices.default"] = [S(_x, [2] * _n)]
    SAMPLES[f"aten.adaptive_avg_pool{_n}d.default"] = [S(_x, [2] * _n)]
    SAMPLES[f"aten.adaptive_max_pool{_n}d.default"] = [S(_x, [2] * _n)]
    for _o in ("default", "padding"):
        SAMPLES[f"aten.conv{_n}d.{_o}"] = [
            S(r(2, 3, *[4] * _n), r(4, 3, *[2] * _n), r(4)),
            S(
                r(2, 4, *[4] * _n),
                r(6, 2, *[2] * _n),
                r(6),
                [1] * _n,
                [0] * _n if _o == "default" else "valid",
                [1] * _n,
                2,
            ),
            S(
                r(2, 4, *[4] * _n),
                r(4, 1, *[2] * _n),
                None,
                [1] * _n,
                [1] * _n if _o == "default" else "same",
                [1] * _n,
                4,
            ),
            S(r(3, *[4] * _n), r(4, 3, *[2] * _n), r(4)),  # no batch
        ]
    SAMPLES[f"aten.conv_transpose{_n}d." + ("default" if _n == 1 else "input")] = [
        S(r(2, 3, *[4] * _n), r(3, 4, *[2] * _n), r(4)),
        S(r(2, 4, *[4] * _n), r(4, 3, *[2] * _n), r(6), [1] * _n, [0] * _n, [0] * _n, 2),
        S(r(3, *[4] * _n), r(3, 4, *[2] * _n), r(4)),
    ]
for _name, _n in (("nearest3d", 3), ("trilinear3d", 3)):
    _align = [] if "nearest" in _name else [False]
    SAMPLES[f"aten.upsample_{_name}.default"] = [S(r(2, 3, *[4] * _n), [6] * _n, *_align)]
    SAMPLES[f"aten.upsample_{_name}.vec"] = [S(r(2, 3, *[4] * _n), [6] * _n, *_align, None)]
for _n in (1, 2, 3):
    SAMPLES[f"aten._upsample_nearest_exact{_n}d.default"] = [S(r(2, 3, *[4] * _n), [6] * _n)]
    SAMPLES[f"aten._upsample_nearest_exact{_n}d.vec"] = [S(r(2, 3, *[4] * _n), [6] * _n, None)]
for _name in ("bilinear2d", "bicubic2d"):
    SAMPLES[f"aten._upsample_{_name}_aa.default"] = [S(r(2, 3, 4, 4), [6, 6], False)]
    SAMPLES[f"aten._upsample_{_name}_aa.vec"] = [S(r(2, 3, 4, 4), [6, 6], False, None)]
for _name in ("fft", "ifft", "rfft", "irfft", "hfft", "ihfft"):
    SAMPLES[f"aten.fft_{_name}.default"] = [S(r(3, 8), dim=1), S(r(3, 8), 4, 1)]
    for _n in ("2", "n"):
        SAMPLES[f"aten.fft_{_name}{_n}.default"] = [S(r(3, 4, 4), dim=[1, 2]), S(r(3, 4, 4), [4, 4])]
for _name in ("fftshift", "ifftshift"):
    SAMPLES[f"aten.fft_{_name}.default"] = [S(r(3, 4), [1])]
for _name in ("hsplit", "vsplit", "dsplit"):
    SAMPLES[f"aten.{_name}.int"] = [S(r(4, 4, 4), 2)]
    SAMPLES[f"aten.{_name}.array"] = [S(r(4, 4, 4), [1, -1])]
for _name in ("hstack", "vstack", "row_stack", "dstack", "column_stack"):
    SAMPLES[f"aten.{_name}.default"] = [S([r(3, 4), r(3, 4)]), S([r(4), r(4)])]
for _n in (1, 2, 3):
    SAMPLES[f"aten.atleast_{_n}d.default"] = [S(r(4)), S(r(3, 4)), S(r())]
for _name in ("scatter", "scatter_"):
    SAMPLES[f"aten.{_name}.src"] = [S(r(3, 4), 1, i(4, 3, 2), r(3, 2)), S(r(3, 4), 0, i(3, 2, 4), r(2, 4))]
    SAMPLES[f"aten.{_name}.value"] = [S(r(3, 4), 1, i(4, 3, 2), 0.5)]
    SAMPLES[f"aten.{_name}.reduce"] = [S(r(3, 4), 1, i(4, 3, 2), r(3, 2), reduce="add")]
    SAMPLES[f"aten.{_name}.value_reduce"] = [S(r(3, 4), 1, i(4, 3, 2), 0.5, reduce="multiply")]
    SAMPLES[f"aten.scatter_add{_name[7:]}.default"] = [S(r(3, 4), 1, i(4, 3, 2), r(3, 2))]
    SAMPLES[f"aten.scatter_reduce{_name[7:]}.two"] = [
        S(r(3, 4), 1, i(4, 3, 2), r(3, 2), reduce=how, include_self=own)
        for how, own in (("sum", True), ("mean", False), ("amax", True), ("prod", True))
    ]
_rows = torch.tensor([2, 0])
_cells = r(3, 4) > 0
for _end in ("", "_"):
    SAMPLES[f"aten.index_add{_end}.default"] = [S(r(3, 4), 0, _rows, r(2, 4)), S(r(3, 4), 0, _rows, r(2, 4), alpha=2.0)]
    SAMPLES[f"aten.index_copy{_end}.default"] = [S(r(3, 4), 0, _rows, r(2, 4))]
    SAMPLES[f"aten.index_fill{_end}.int_Scalar"] = [S(r(3, 4), 0, _rows, 0.0), S(r(3, 4), 0, _rows, 1.0)]
    SAMPLES[f"aten.index_fill{_end}.int_Tensor"] = [S(r(3, 4), 0, _rows, r())]
    SAMPLES[f"aten.index_put{_end}.default"] = [
        S(r(3, 4), [_rows], r(2, 4)),
        S(r(3, 4), [_rows], r(4), True),
        S(r(5, 3, 4), [None, _rows], r(5, 2, 4)),
        S(r(5, 3, 4), [_rows, None, _rows], r(2, 3)),
        S(r(3, 4, 5), [_cells], r(int(_cells.sum()), 5)),
        S(r(3, 4), [_rows], r()),
    ]
    SAMPLES[f"aten.masked_scatter{_end}.default"] = [S(r(3, 4), _cells, r(12))]
    SAMPLES[f"aten.put{_end}.default"] = [S(r(3, 4), i(12, 2), r(2))]
SAMPLES["aten._adaptive_avg_pool2d.default"] = [S(r(2, 3, 4, 4), [2, 2])]
for _name, _n in (("nearest2d", 2), ("bilinear2d", 2), ("bicubic2d", 2), ("nearest1d", 1), ("linear1d", 1)):
    _align = [] if "nearest" in _name else [False]
    SAMPLES[f"aten.upsample_{_name}.default"] = [S(r(2, 3, *[4] * _n), [6] * _n, *_align)]
    SAMPLES[f"aten.upsample_{_name}.vec"] = [S(r(2, 3, *[4] * _n), [6] * _n, *_align, None)]
for _name in ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "kl_div", "soft_margin_loss"):
    SAMPLES[f"aten.{_name}.default"] = [S(r(3, 4), p(3, 4), how) for how in (0, 1, 2)]
SAMPLES["aten.mse_loss.default"] += [S(r(3, 4), r(4)), S(r(2, 3, 4), r(2, 3, 4), 2)]
SAMPLES["aten.binary_cross_entropy.default"] = [
    S(r(3, 4).sigmoid(), r(3, 4).sigmoid(), weight, how) for weight in (None, p(4)) for how in (0, 1, 2)
]
SAMPLES["aten.binary_cross_entropy_with_logits.default"] = [
    S(r(3, 4), r(3, 4).sigmoid(), weight, weight, how) for weight in (None, p(4)) for how in (0, 1, 2)
]
SAMPLES["aten.poisson_nll_loss.default"] = [S(r(3, 4), p(3, 4), True, False, 1e-8, how) for how in (0, 1, 2)]
SAMPLES["aten.poisson_nll_loss.default"] += [S(p(3, 4), p(3, 4), False, False, 1e-8, how) for how in (0, 1, 2)]
SAMPLES["aten.kl_div.default"] += [S(r(3, 4), r(3, 4), how, log_target=True) for how in (0, 2)]
SAMPLES["aten.hinge_embedding_loss.default"] = [S(r(3, 4), r(3, 4).sign(), 1.0, how) for how in (0, 1, 2)]
for _order in (0.5, 1.0, 2.0, 3.0, float("inf"), 0.0):
    SAMPLES.setdefault("aten.pairwise_distance.default", []).append(S(r(3, 4), r(3, 4), _order, 1e-6, _order == 1.0))
    SAMPLES.setdefault("aten.pdist.default", []).append(S(r(4, 5), _order))
SAMPLES["aten.pairwise_distance.default"] += [S(r(3, 4), r(4)), S(r(3, 4), r(3, 4), 2.0, 0.0)]
SAMPLES["aten.div.out"] = [S(r(3, 4), p(3, 4), out=r(3, 4)), S(r(3, 4), p(4), out=r(3, 4))]
SAMPLES["aten.embedding_renorm_.default"] = [S(r(5, 4), i(5, 3), 1.0, order) for order in (1.0, 2.0, float("inf"))]
_indices = torch.stack([torch.arange(4).view(2, 2) * 2] * 3).expand(2, 3, 2, 2).contiguous()
SAMPLES["aten.max_unpool2d.default"] = [S(r(2, 3, 2, 2), _indices, [4, 4]), S(r(3, 2, 2), _indices[0], [4, 4])]
SAMPLES["aten.max_unpool3d.default"] = [
    S(r(2, 3, 1, 2, 2), _indices[:, :, None], [1, 4, 4], [1, 2, 2], [0, 0, 0]),
]
SAMPLES["aten.slice_scatter.default"] = [S(r(3, 4), r(3, 2), 1, 1, 3), S(r(2, 3, 4), r(1, 3, 4), 0, 1, 2)]
SAMPLES["aten.float_power.Tensor_Scalar"] = [S(p(3, 4), 2.0), S(p(3, 4), 0.5)]
SAMPLES["aten.polygamma.default"] = [S(1, p(3, 4))]
SAMPLES["aten.mvlgamma.default"] = [S(2 + p(3, 4), 2)]
SAMPLES["aten.ldexp.Tensor"] = [S(r(3, 4), p(4))]
for _name in ("special_gammainc", "special_gammaincc", "igamma", "igammac"):
    SAMPLES[f"aten.{_name}.default"] = [S(p(3, 4), p(4))]
for _name in ("feature_alpha_dropout", "feature_alpha_dropout_"):
    SAMPLES[f"aten.{_name}.default"] = [S(r(3, 4), 0.5, False), S(r(3, 4, 2), 0.5, True)]


def gates(gates: int, x: int, h: int, *, layers: int = 1, directions: int = 1, biases: bool = True) -> list[Tensor]:
    """The weights of a recurrence, as its op takes them."""
    out = []
    for layer in range(layers):
        for _ in range(directions):
            out += [r(gates * h, x if layer == 0 else directions * h), r(gates * h, h)]
            out += [r(gates * h), r(gates * h)] if biases else []
    return out


for _op, _n in (("lstm", 4), ("gru", 3), ("rnn_tanh", 1), ("rnn_relu", 1)):
    SAMPLES[f"aten.{_op}_cell.default"] = [
        S(r(3, 4), [r(3, 5), r(3, 5)] if _op == "lstm" else r(3, 5), *gates(_n, 4, 5)),
        S(r(3, 4), [r(3, 5), r(3, 5)] if _op == "lstm" else r(3, 5), *gates(_n, 4, 5, biases=False)),
    ]
    SAMPLES[f"aten.{_op}.input"] = [
        S(
            r(*((2, 3) if _first else (3, 2)), 4),  # as batch_first says
            [r(_layers * _ways, 2, 5), r(_layers * _ways, 2, 5)] if _op == "lstm" else r(_layers * _ways, 2, 5),
            gates(_n, 4, 5, layers=_layers, directions=_ways, biases=_biases),
            *(_biases, _layers, 0.0, False, _ways == 2, _first),
            unchecked=True,
        )
        for _layers, _ways, _biases, _first in (
            (1, 1, True, True),
            (1, 1, False, False),
            (2, 1, True, True),
            (1, 2, True, True),
            (2, 2, False, False),
        )
    ]

SAMPLES |= {
    # contractions
    "aten.linear.default": [S(r(3, 4), r(5, 4), r(5)), S(r(2, 3, 4), r(5, 4)), S(r(4), r(5, 4), r(5))],
    "aten.mm.default": [S(r(3, 4), r(4, 5))],
    "aten.mv.default": [S(r(3, 4), r(4))],
    "aten.dot.default": [S(r(4), r(4))],
    "aten.outer.default": [S(r(3), r(4))],
    "aten.addmm.default": [S(r(5), r(3, 4), r(4, 5)), S(r(3, 5), r(3, 4), r(4, 5), beta=2.0, alpha=0.5)]
    + [S(x, r(3, 4), r(4, 5)) for x in (r(1, 5), r(3, 1), r(1))],
    "aten.baddbmm.default": [S(r(2, 3, 5), r(2, 3, 4), r(2, 4, 5))],
    "aten.matmul.default": [
        S(r(3, 4), r(4, 5)),
        S(r(2, 3, 4), r(4, 5)),
        S(r(2, 3, 4), r(2, 4, 5)),
        S(r(4), r(4)),
        S(r(2, 3, 4), r(4)),
        S(r(4), r(4, 5)),
    ],
    "aten.bmm.default": [S(r(2, 3, 4), r(2, 4, 5))],
    "aten.einsum.default": [
        S("bi,ij->bj", [r(3, 4), r(4, 5)]),
        S("bhqd,bhkd->bhqk", [r(2, 3, 4, 2), r(2, 3, 5, 2)]),
        S("bi,bi,ij->bj", [r(3, 4), r(3, 4), r(4, 5)]),
        S("...i,ij", [r(2, 3, 4), r(4, 5)]),
    ],
    "aten.bilinear.default": [S(r(3, 2), r(3, 4), r(5, 2, 4), r(5))],
    "aten.scaled_dot_product_attention.default": [
        S(r(2, 3, 4, 6), r(2, 3, 5, 6), r(2, 3, 5, 7)),
        S(r(2, 3, 4, 6), r(2, 3, 4, 6), r(2, 3, 4, 7), None, 0.0, True, scale=0.3),
        S(r(2, 6, 4, 2), r(2, 3, 4, 2), r(2, 3, 4, 2), enable_gqa=True),
        S(r(2, 3, 4, 6), r(2, 3, 5, 6), r(2, 3, 5, 7), r(3, 4, 5)),
    ],
    "aten.vdot.default": [S(r(4), r(4))],
    "aten.ger.default": [S(r(3), r(4))],
    "aten.inner.default": [S(r(3, 4), r(5, 4)), S(r(2, 3, 4), r(4))],
    "aten.linalg_vecdot.default": [S(r(3, 4), r(3, 4)), S(r(3, 4), r(3, 1), dim=0), S(r(3, 4), r(4))],
    "aten.addmv.default": [S(r(3), r(3, 4), r(4)), S(r(1), r(3, 4), r(4))],
    "aten.addr.default": [S(r(3, 4), r(3), r(4)), S(r(4), r(3), r(4), beta=0.5)],
    "aten.addbmm.default": [S(r(3, 5), r(2, 3, 4), r(2, 4, 5)), S(r(5), r(2, 3, 4), r(2, 4, 5), alpha=0.5)],
    "aten.tensordot.default": [S(r(2, 3, 4), r(4, 3, 5), [1, 2], [1, 0]), S(r(2, 3), r(4, 5), [], [])],
    "aten.kron.default": [S(r(2, 3), r(4, 5)), S(r(3), r(2, 4))],
    "aten.linalg_multi_dot.default": [S([r(2, 3), r(3, 4), r(4, 5)]), S([r(3), r(3, 4), r(4)])],
    "aten.cdist.default": [S(r(3, 4), r(5, 4)), S(r(2, 3, 4), r(2, 5, 4)), S(r(3, 4), r(5, 4), 1.0)],
    "aten.bucketize.Tensor": [S(r(3, 4), torch.linspace(-1, 1, 5, dtype=torch.float64))],
    "aten.embedding_bag.default": [
        S(r(5, 4), i(5, 6), torch.tensor([0, 2])),
        S(r(5, 4), i(5, 6), torch.tensor([0, 2]), False, 1),
        S(r(5, 4), i(5, 6), torch.tensor([0, 2]), False, 2),
        S(r(5, 4), i(5, 6), torch.tensor([0, 2]), False, 0, False, r(6)),
    ],
    "aten.embedding_bag.padding_idx": [
        S(r(5, 4), i(5, 6), torch.tensor([0, 2]), False, 0, False, None, False, 1),
        S(r(5, 4), i(5, 6), torch.tensor([0, 2]), False, 0, False, p(6), False, 1),
    ],
    "aten.take_along_dim.default": [S(r(3, 4), i(4, 3, 2), 1), S(r(3, 4), i(4, 1, 2), 1), S(r(3, 4), i(12, 2))],
    "aten.select_scatter.default": [S(r(3, 4), r(4), 0, 1)],
    "aten.take.default": [S(r(3, 4), i(12, 5))],
    "aten.isin.Tensor_Tensor": [S(r(3, 4), r(2))],
    "aten.searchsorted.Tensor": [S(torch.linspace(-1, 1, 5, dtype=torch.float64), r(3, 4))],
    "aten.nonzero.default": [S(r(3, 4))],
    "aten.argwhere.default": [S(r(3, 4))],
    "aten.masked_select.default": [S(r(3, 4), b(3, 4))],
    "aten.bincount.default": [S(i(4, 6))],
    "aten.histc.default": [S(r(3, 4), 5)],
    "aten._unique2.default": [S(r(3, 4))],
    "aten.unique_consecutive.default": [S(r(3, 4))],
    "aten.unique_dim.default": [S(r(3, 4), 0)],
    "aten.nonzero_static.default": [S(r(3, 4), size=5)],
    "aten.repeat_interleave.Tensor": [S(torch.tensor([1, 2]))],
    "aten.repeat_interleave.self_Tensor": [S(r(2, 3), torch.tensor([1, 2]), 0)],
    "aten.cosine_embedding_loss.default": [S(r(3, 4), r(3, 4), r(3).sign())],
    "aten.margin_ranking_loss.default": [S(r(3, 4), r(3, 4), r(3, 4).sign())],
    "aten.triplet_margin_loss.default": [S(r(3, 4), r(3, 4), r(3, 4))],
    "aten.multi_margin_loss.default": [S(r(3, 4), i(4, 3))],
    "aten.multilabel_margin_loss.default": [S(r(3, 4), i(4, 3, 4))],
    "aten.ctc_loss.IntList": [S(r(6, 2, 4).log_softmax(-1), 1 + i(3, 2, 2), [6, 6], [2, 2])],
    "aten.ctc_loss.Tensor": [S(r(6, 2, 4).log_softmax(-1), 1 + i(3, 2, 2), torch.tensor([6, 6]), torch.tensor([2, 2]))],
    "aten.grid_sampler.default": [S(r(2, 3, 4, 4), r(2, 5, 5, 2).tanh(), 0, 0, False)],
    "aten.grid_sampler_2d.default": [S(r(2, 3, 4, 4), r(2, 5, 5, 2).tanh(), mode, 0, False) for mode in (0, 1, 2)],
    "aten.grid_sampler_3d.default": [S(r(2, 3, 4, 4, 4), r(2, 5, 5, 5, 3).tanh(), 0, 0, False)],
    # look-ups
    "aten.embedding.default": [S(r(5, 4), i(5, 2, 3))],
    "aten.one_hot.default": [S(i(5, 2, 3), 5)],
    "aten.index.Tensor": [
        S(r(3, 4, 5), [b(3, 4)]),
        S(r(3, 4, 5), [None, b(4, 5)]),
        S(r(3, 4, 5), [None, i(4, 2)]),
        S(r(3, 4, 5), [i(3, 2), i(4, 2)]),
        S(r(3, 4), [i(3, 2, 2)]),
    ],
    "aten.index_select.default": [S(r(3, 4), 1, i(4, 5)), S(r(4), 0, torch.tensor(2))],
    "aten.gather.default": [S(r(3, 4), 1, i(4, 3, 2))],
    "aten.cross_entropy_loss.default": [S(r(3, 4), i(4, 3)), S(r(3, 4), i(4, 3), p(4))],
    "aten.nll_loss.default": [S(r(3, 4), i(4, 3)), S(r(3, 4), i(4, 3), p(4))],
    "aten.nll_loss_nd.default": [S(r(3, 4), i(4, 3)), S(r(3, 4), i(4, 3), p(4))],
    # constructors
    "aten.zeros.default": [S([2, 3])],
    "aten.ones.default": [S([2, 3])],
    "aten.full.default": [S([2, 3], 2.0)],
    "aten.empty.memory_format": [S([2, 3])],
    "aten.rand.default": [S([2, 3])],
    "aten.randn.default": [S([2, 3])],
    "aten.arange.default": [S(4)],
    "aten.arange.start": [S(1, 4)],
    "aten.arange.start_step": [S(1, 8, 2)],
    "aten.linspace.default": [S(0.0, 1.0, 4)],
    "aten.eye.default": [S(4)],
    "aten.eye.m": [S(4, 3)],
    "aten.scalar_tensor.default": [S(1.0)],
    "aten.new_zeros.default": [S(r(3, 4), [2, 3])],
    "aten.new_ones.default": [S(r(3, 4), [2, 3])],
    "aten.new_full.default": [S(r(3, 4), [2, 3], 2.0)],
    "aten.full_like.default": [S(r(3, 4), 2.0)],
    # norms
    "aten.layer_norm.default": [
        S(r(3, 4), [4], r(4), r(4)),
        S(r(3, 4), [4]),
        S(r(2, 3, 4), [3, 4], r(3, 4)),
        S(r(3, 4), [4], r(4), r(4), 0.0),
    ],
    "aten.rms_norm.default": [S(r(3, 4), [4], r(4)), S(r(3, 4), [4]), S(r(2, 3, 4), [3, 4], r(3, 4), 1e-3)],
    "aten.batch_norm.default": [
        S(r(3, 4), r(4), r(4), r(4), p(4), False, 0.1, 1e-5, True, activations=[0]),
        S(r(3, 4, 2), r(4), r(4), r(4), p(4), True, 0.1, 1e-5, True, activations=[0]),
        S(r(3, 4), None, None, None, None, True, 0.1, 1e-5, True, activations=[0]),
        S(r(1, 4, 6), r(4), None, None, None, True, 0.0, 1e-5, True),  # weight standardisation
    ],
    "aten.instance_norm.default": [
        S(r(2, 3, 4), r(3), r(3), None, None, True, 0.1, 1e-5, True, activations=[0]),
        S(r(2, 3, 4, 4), None, None, None, None, True, 0.1, 1e-5, True),
        S(r(2, 3, 4), r(3), r(3), r(3), p(3), False, 0.1, 1e-5, True, activations=[0]),
        S(r(2, 3, 4), None, None, None, None, True, 0.1, 0.0, True),
    ],
    "aten._weight_norm.default": [S(r(4, 3, 2), p(4, 1, 1), 0), S(r(3, 4), p(1, 4), 1)],
    "aten.im2col.default": [S(r(2, 3, 5, 5), [3, 3], [1, 1], [1, 1], [2, 2])],
    "aten.col2im.default": [S(r(2, 12, 9), [6, 6], [2, 2], [1, 1], [0, 0], [2, 2])],
    "aten.group_norm.default": [
        S(r(2, 6, 3), 3, r(6), r(6)),
        S(r(2, 6, 3), 2),
        S(r(2, 6, 3), 1, r(6)),
        S(r(2, 6, 3), 3, eps=0.0),
    ],
    # point-wise with several operands
    "aten.rsub.Tensor": [S(r(3, 4), r(4))],
    "aten.rsub.Scalar": [S(r(3, 4), 1.0), S(r(3, 4), 0.0), S(r(3, 4), 1.0, 0.0)],
    "aten.div.Tensor_mode": [S(r(3, 4), p(4), rounding_mode="floor"), S(r(3, 4), 0.5, rounding_mode="trunc")],
    "aten.floor_divide.default": [S(p(3, 4), p(4)), S(r(3, 4), 0.5)],
    "aten.remainder.Scalar": [S(r(3, 4), 0.5)],
    "aten.pow.Tensor_Scalar": [S(r(3, 4), 2), S(p(3, 4), 0.5)],
    "aten.pow.Tensor_Tensor": [S(p(3, 4), r(4))],
    "aten.pow.Scalar": [S(2.0, r(3, 4))],
    "aten.maximum.default": [S(r(3, 4), r(4))],
    "aten.minimum.default": [S(r(3, 4), r(4))],
    "aten.max.other": [S(r(3, 4), r(4))],
    "aten.min.other": [S(r(3, 4), r(4))],
    "aten.where.self": [S(b(3, 4), r(3, 4), r(4)), S(b(4), r(3, 4), r(3, 1))],
    "aten.where.ScalarOther": [S(b(3, 4), r(3, 4), 0.0), S(b(3, 4), r(3, 4), 1.0), S(b(4), r(3, 4), 0.0)],
    "aten.where.ScalarSelf": [S(b(3, 4), 1.0, r(3, 4))],
    "aten.where.Scalar": [S(b(3, 4), 1.0, 0.0)],
    "aten.masked_fill.Scalar": [S(r(3, 4), b(4), -1.0), S(r(3, 4), b(3, 1), 0.0)],
    "aten.masked_fill.Tensor": [S(r(3, 4), b(4), torch.tensor(-1.0, dtype=torch.float64))],
    "aten.lerp.Tensor": [S(r(3, 4), r(4), r(4))],
    "aten.lerp.Scalar": [S(r(3, 4), r(4), 0.3)],
    "aten.addcmul.default": [S(r(3, 4), r(4), r(4))],
    "aten.addcdiv.default": [S(r(3, 4), r(4), p(4))],
    "aten.threshold.default": [S(r(3, 4), 0.1, 2.0)],
    "aten.round.decimals": [S(r(3, 4), decimals=1)],
    "aten.rrelu.default": [S(r(3, 4), 0.1, 0.3, False), S(r(3, 4), 0.1, 0.3, True)],
    "aten.fmod.Scalar": [S(r(3, 4), 0.5)],
    "aten.copysign.Scalar": [S(r(3, 4), -1.0)],
    "aten.conj.default": [S(torch.complex(r(3, 4), r(3, 4)))],
    "aten.imag.default": [S(torch.complex(r(3, 4), r(3, 4)))],
    "aten.clamp.default": [S(r(3, 4), -0.5, 0.5), S(r(3, 4), 0.2)],
    "aten.clamp.Tensor": [S(r(3, 4), r(4)), S(r(3, 4), r(4), p(4))],
    "aten.clamp_min.default": [S(r(3, 4), 0.1)],
    "aten.clamp_max.default": [S(r(3, 4), -0.1)],
    "aten.bernoulli.p": [S(r(3, 4), 0.5)],
    "aten.prelu.default": [S(r(3, 4), r(4)), S(r(3, 4, 2), r(4)), S(r(3, 4), r(1))],
    "aten.copy_.default": [S(r(3, 4), r(4)), S(r(3, 4), r(3, 4)), S(b(3, 4), r(3, 4))],
    "aten.fill_.Scalar": [S(r(3, 4), 2.0)],
    "aten.fill_.Tensor": [S(r(3, 4), torch.tensor(2.0, dtype=torch.float64))],
    "aten.zero_.default": [S(r(3, 4))],
    "aten.bernoulli_.float": [S(r(3, 4), 0.5)],
    "aten.bernoulli_.Tensor": [S(r(3, 4), p(3, 4) / 2)],
    "aten.uniform_.default": [S(r(3, 4))],
    "aten.normal_.default": [S(r(3, 4))],
    "aten.exponential_.default": [S(r(3, 4))],
    "aten.multinomial.default": [S(p(3, 4), 2)],
    "aten.randint.default": [S(5, [2, 3])],
    "aten.randint.low": [S(2, 5, [2, 3])],
    "aten.randperm.default": [S(5)],
    "aten.new_empty.default": [S(r(3, 4), [0, 3])],  # unset entries cannot be compared
    "aten.normal.float_float": [S(0.0, 1.0, [2, 3])],
    "aten.glu.default": [S(r(3, 8), -1), S(r(4, 3), 0)],
    # casts
    "aten.to.dtype": [
        S(r(3, 4), torch.float64),
        S(4 * r(3, 4), torch.int64),
        S(r(3, 4), torch.bfloat16),
        S(r(3, 4), torch.bool),
    ],
    "aten.to.device": [S(r(3, 4), torch.device("cpu"), torch.float64)],
    "aten.to.dtype_layout": [S(r(3, 4), dtype=torch.float64)],
    "aten.to.other": [S(r(3, 4), r(1))],
    "aten._to_copy.default": [S(r(3, 4), dtype=torch.float64)],
    "aten.type_as.default": [S(r(3, 4), r(1))],
    # reductions
    "aten.var.correction": [S(r(3, 4), [1], correction=0), S(r(2, 3, 4), [1, 2], correction=0), S(r(3, 4), [1])],
    "aten.var.dim": [S(r(3, 4), [1], False), S(r(3, 4), [1], True)],
    "aten.var.default": [S(r(3, 4), False)],
    "aten.std.correction": [S(r(3, 4), [1], correction=0), S(r(2, 3, 4), [1, 2]), S(r(3, 4), [1], correction=2)],
    "aten.std.default": [S(r(3, 4), False)],
    "aten.var_mean.default": [S(r(3, 4), False)],
    "aten.std_mean.default": [S(r(3, 4), False)],
    "aten.std_mean.correction": [S(r(3, 4), [1], correction=0)],
    "aten.any.dims": [S(b(3, 4), [1])],
    "aten.all.dims": [S(b(3, 4), [1])],
    "aten.kthvalue.default": [S(r(3, 4), 2, 1)],
    "aten.count_nonzero.dim_IntList": [S(r(3, 4), [1])],
    "aten.trapezoid.x": [S(r(3, 4), r(4))],
    "aten.trapz.x": [S(r(3, 4), r(4))],
    "aten.trapezoid.dx": [S(r(3, 4))],
    "aten.trapz.dx": [S(r(3, 4))],
    "aten._safe_softmax.default": [S(r(3, 4), 1)],
    "aten.var_mean.correction": [S(r(3, 4), [1], correction=0), S(r(3, 4), correction=0)],
    "aten.logsumexp.default": [S(r(3, 4), [1])],
    "aten.linalg_vector_norm.default": [
        *(S(r(3, 4), 2, [1]), S(r(3, 4), 2, [0, 1])),
        *(S(r(3, 4), order, [1]) for order in (0, 0.5, 1, float("inf"), -1)),
    ],
    "aten.norm.ScalarOpt_dim": [S(r(3, 4), 2, [1])],
    # shapes
    "aten.view.default": [S(r(3, 8), [3, 2, 4]), S(r(3, 2, 4), [3, 8]), S(r(3, 8), [-1, 4]), S(r(6, 4), [2, 12])],
    "aten._unsafe_view.default": [S(r(3, 8), [3, 2, 4])],
    "aten.reshape.default": [S(r(3, 8), [3, 2, 4]), S(r(6, 4), [2, 3, 4])],
    "aten.ravel.default": [S(r(3, 4))],
    "aten.mH.default": [S(r(2, 3, 4))],
    "aten.matrix_H.default": [S(r(3, 4))],
    "aten.adjoint.default": [S(r(2, 3, 4))],
    "aten.broadcast_to.default": [S(r(3, 1, 4), [3, 2, 4])],
    "aten.tile.default": [S(r(3, 4), [2]), S(r(3, 4), [2, 1, 3])],
    "aten.meshgrid.default": [S([r(3), r(4)])],
    "aten.meshgrid.indexing": [S([r(3), r(4)], indexing="xy"), S([r(3), r(4), r(2)], indexing="ij")],
    "aten.channel_shuffle.default": [S(r(2, 6, 3), 2)],
    "aten.native_channel_shuffle.default": [S(r(2, 6, 3), 2)],
    "aten.pixel_shuffle.default": [S(r(2, 12, 3, 4), 2)],
    "aten.pixel_unshuffle.default": [S(r(2, 3, 4, 6), 2)],
    "aten.unfold.default": [S(r(3, 8), 1, 4, 2), S(r(8, 3), 0, 4, 2)],
    "aten.diagonal.default": [S(r(2, 3, 4), 0, 1, 2), S(r(2, 3, 4), 1, 2, 0)],
    "aten.diag_embed.default": [S(r(2, 3)), S(r(2, 3), 1, 0, 2)],
    "aten.view_as_real.default": [S(torch.complex(r(3, 4), r(3, 4)))],
    "aten.view_as_complex.default": [S(r(3, 4, 2))],
    "aten.unsafe_split.Tensor": [S(r(3, 8), 4, 1)],
    "aten.unsafe_split_with_sizes.default": [S(r(3, 8), [3, 5], 1)],
    "aten.unsafe_chunk.default": [S(r(3, 8), 2, 1)],
    "aten.tensor_split.sections": [S(r(3, 8), 3, 1)],
    "aten.tensor_split.indices": [S(r(3, 8), [2, -2], 1), S(r(3, 8), [0, 4], 1)],
    "aten.concatenate.default": [S([r(3, 4), r(3, 5)], 1)],
    "aten.logcumsumexp.default": [S(r(3, 4), 1)],
    "aten.cummax.default": [S(r(3, 4), 1)],
    "aten.cummin.default": [S(r(3, 4), 1)],
    "aten.sort.stable": [S(r(3, 4), stable=True, dim=1)],
    "aten.argsort.stable": [S(r(3, 4), stable=True, dim=1)],
    "aten.msort.default": [S(r(3, 4))],
    "aten.fliplr.default": [S(r(3, 4))],
    "aten.flipud.default": [S(r(3, 4))],
    "aten.renorm.default": [S(r(3, 4), 2, 0, 0.5)],
    "aten.flatten.using_ints": [S(r(2, 3, 4), 1)],
    "aten.unflatten.int": [S(r(3, 8), 1, [2, 4])],
    "aten.view_as.default": [S(r(3, 8), r(3, 2, 4))],
    "aten.reshape_as.default": [S(r(3, 8), r(3, 2, 4))],
    "aten.transpose.int": [S(r(2, 3, 4), 1, -1)],
    "aten.swapaxes.default": [S(r(2, 3, 4), 0, 1)],
    "aten.permute.default": [S(r(2, 3, 4), [2, 0, 1])],
    "aten.t.default": [S(r(3, 4))],
    "aten.numpy_T.default": [S(r(3, 4))],
    "aten.mT.default": [S(r(2, 3, 4))],
    "aten.movedim.int": [S(r(2, 3, 4), 0, 2)],
    "aten.movedim.intlist": [S(r(2, 3, 4), [0, 1], [1, 2])],
    "aten.unsqueeze.default": [S(r(3, 4), 1)],
    "aten.squeeze.default": [S(r(3, 1, 4))],
    "aten.squeeze.dim": [S(r(3, 1, 4), 1), S(r(3, 1, 4), 0)],
    "aten.squeeze.dims": [S(r(3, 1, 4), [1])],
    "aten.expand.default": [S(r(3, 1, 4), [3, 2, 4]), S(r(4), [3, 4])],
    "aten.expand_as.default": [S(r(3, 1), r(3, 4))],
    "aten.broadcast_tensors.default": [S([r(3, 4), r(4), r(3, 1)])],
    "aten.repeat.default": [S(r(3, 4), [2, 1]), S(r(3, 4), [1, 2])],
    "aten.repeat_interleave.self_int": [S(r(3, 4), 2, 1)],
    # parts
    "aten.split.Tensor": [S(r(3, 8), 4, 1), S(r(3, 8), 3, 1)],
    "aten.split_with_sizes.default": [S(r(3, 8), [3, 5], 1)],
    "aten.split.sizes": [S(r(3, 8), [3, 5], 1)],
    "aten.chunk.default": [S(r(3, 8), 2, 1)],
    "aten.unbind.int": [S(r(3, 4), 0), S(r(4))],
    "aten.cat.default": [S([r(3, 4), r(3, 5)], 1), S([r(3, 4), r(2, 4)])],
    "aten.concat.default": [S([r(3, 4), r(3, 5)], 1)],
    "aten.stack.default": [S([r(3, 4), r(3, 4)], 1)],
    "aten.slice.Tensor": [S(r(3, 8), 1, 2, 6), S(r(3, 8), 1, -3), S(r(3, 8), 1, 0, 8, 2), S(r(3, 8), 1, 1, 8, 2)],
    "aten.narrow.default": [S(r(3, 8), 1, 2, 3), S(r(3, 8), 1, -5, 3), S(r(3, 8), 1, 2, 0)],
    "aten.select.int": [S(r(3, 4), 0, 1)],
    # order
    "aten.roll.default": [S(r(3, 4), [1], [1])],
    "aten.flip.default": [S(r(3, 4), [1])],
    "aten.cumsum.default": [S(r(3, 4), 1), S(r(), 0), S(r(3, 4), 1, dtype=torch.int64)],
    "aten.cumprod.default": [S(r(3, 4), 1)],
    "aten.sort.default": [S(r(3, 4), 1)],
    "aten.argsort.default": [S(r(3, 4), 1)],
    "aten.topk.default": [S(r(3, 4), 2)],
    "aten.diff.default": [S(r(3, 4)), S(r(3, 4), 1, 0, r(1, 4), r(2, 4))],
    "aten.pad.default": [S(r(3, 4), [1, 2]), S(r(3, 4), [1, 2], "constant", 1.0)],
    "aten.constant_pad_nd.default": [S(r(3, 4), [1, 2]), S(r(3, 4), [0, 0, 1, 0], 1.0)],
    "aten.tril.default": [S(r(3, 4)), S(r(2, 3, 4), 1)],
    "aten.triu.default": [S(r(3, 4)), S(r(2, 3, 4), 1)],
    "aten.rot90.default": [S(r(2, 3, 3), 1, [1, 2])],
    # diagonals
    "aten.affine_grid_generator.default": [S(r(2, 2, 3), [2, 3, 4, 4], False)],
    "aten.diag.default": [S(r(3)), S(r(3, 3))],
    "aten.trace.default": [S(r(3, 3))],
    "aten.tril_indices.default": [S(4, 4)],
    "aten.triu_indices.default": [S(4, 4)],
    # distances
    "aten.cosine_similarity.default": [S(r(3, 4), r(3, 4), 1), S(r(3, 1, 4), r(1, 5, 4), -1), S(r(3, 4), r(3, 4), 0)],
    "aten._cdist_forward.default": [S(r(3, 4), r(5, 4), 2.0, None)],
    "aten.fake_quantize_per_tensor_affine.default": [S(r(3, 4).float(), 0.1, 0, -128, 127)],
    "aten.quantile.default": [S(r(3, 4), torch.tensor([0.5]).double(), 1)],
}


def _in_place() -> None:
    """An op that writes in place is judged by the samples of the one that does not."""
    from fxgrow.rules import RULES

    for name in RULES:
        base, dot, overload = name.rpartition(".")
        plain = f"{base.removesuffix('_')}{dot}{overload}"
        plain = {"aten.pow.Scalar": "aten.pow.Tensor_Scalar"}.get(plain, plain)
        if base.endswith("_") and not base.endswith("__") and name not in SAMPLES and plain in SAMPLES:
            fits = [x for x in SAMPLES[plain] if isinstance(x.args[0], Tensor) and all(n > 1 for n in x.args[0].shape)]
            SAMPLES[name] = fits


_in_place()


def _aliases() -> None:
    """An op of two names is judged by the samples of the first."""
    for second, first in SECOND_NAMES.items():
        for alias, name in zip(op_names(second), op_names(first), strict=True):
            if name in SAMPLES:
                SAMPLES[alias] = SAMPLES[name]


_aliases()
