"""Sample calls for every registered rule, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from fxgrow.rules.judge import Sample

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
    "relu6 sigmoid exp exp2 cos cosh softplus hardsigmoid log_sigmoid sgn round floor ceil trunc hardtanh"
)
POSITIVE = "log log2 log10 log1p rsqrt sqrt reciprocal"
for _name in UNARY.split():
    SAMPLES[f"aten.{_name}.default"] = [S(r(3, 4))]
for _name in POSITIVE.split():
    SAMPLES[f"aten.{_name}.default"] = [S(p(3, 4))]
for _name in ("acos", "asin"):
    SAMPLES[f"aten.{_name}.default"] = [S(r(3, 4).tanh())]
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
    SAMPLES[f"aten.{_name}.default"] = [S(r(3, 4), 0.5, False)]
for _name in ("mean", "sum"):
    SAMPLES[f"aten.{_name}.default"] = [S(r(3, 4))]
for _name in ("mean.dim", "sum.dim_IntList", "amax.default", "amin.default"):
    SAMPLES[f"aten.{_name}"] = [S(r(3, 4), [1]), S(r(3, 4), [1], True), S(r(2, 3, 4), [1, 2], True)]
for _name in ("max.dim", "min.dim", "any.dim", "all.dim", "prod.dim_int", "argmax.default", "argmin.default"):
    SAMPLES[f"aten.{_name}"] = [S(r(3, 4), 1), S(r(3, 4), 0, True)]
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
SAMPLES["aten._adaptive_avg_pool2d.default"] = [S(r(2, 3, 4, 4), [2, 2])]
for _name, _n in (("nearest2d", 2), ("bilinear2d", 2), ("bicubic2d", 2), ("nearest1d", 1), ("linear1d", 1)):
    _align = [] if "nearest" in _name else [False]
    SAMPLES[f"aten.upsample_{_name}.default"] = [S(r(2, 3, *[4] * _n), [6] * _n, *_align)]
    SAMPLES[f"aten.upsample_{_name}.vec"] = [S(r(2, 3, *[4] * _n), [6] * _n, *_align, None)]
for _name in ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "kl_div"):
    SAMPLES[f"aten.{_name}.default"] = [S(r(3, 4), r(3, 4))]
SAMPLES["aten.binary_cross_entropy.default"] = [S(r(3, 4).sigmoid(), r(3, 4).sigmoid())]
SAMPLES["aten.binary_cross_entropy_with_logits.default"] = [S(r(3, 4), r(3, 4).sigmoid())]

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
    # recurrences
    "aten.lstm_cell.default": [S(r(3, 4), [r(3, 5), r(3, 5)], r(20, 4), r(20, 5), r(20), r(20))],
    "aten.gru_cell.default": [S(r(3, 4), r(3, 5), r(15, 4), r(15, 5), r(15), r(15))],
    "aten.rnn_tanh_cell.default": [S(r(3, 4), r(3, 5), r(5, 4), r(5, 5), r(5), r(5))],
    "aten.rnn_relu_cell.default": [S(r(3, 4), r(3, 5), r(5, 4), r(5, 5), r(5), r(5))],
    "aten.lstm.input": [
        S(r(2, 3, 4), [r(1, 2, 5), r(1, 2, 5)], [r(20, 4), r(20, 5), r(20), r(20)], True, 1, 0.0, False, False, True)
    ],
    "aten.gru.input": [S(r(2, 3, 4), r(1, 2, 5), [r(15, 4), r(15, 5), r(15), r(15)], True, 1, 0.0, False, False, True)],
    "aten.rnn_tanh.input": [S(r(2, 3, 4), r(1, 2, 5), [r(5, 4), r(5, 5)], False, 1, 0.0, False, False, True)],
    "aten.rnn_relu.input": [S(r(2, 3, 4), r(1, 2, 5), [r(5, 4), r(5, 5)], False, 1, 0.0, False, False, True)],
    # look-ups
    "aten.embedding.default": [S(r(5, 4), i(5, 2, 3))],
    "aten.one_hot.default": [S(i(5, 2, 3), 5)],
    "aten.index.Tensor": [S(r(3, 4, 5), [None, i(4, 2)]), S(r(3, 4, 5), [i(3, 2), i(4, 2)]), S(r(3, 4), [i(3, 2, 2)])],
    "aten.index_select.default": [S(r(3, 4), 1, i(4, 5)), S(r(4), 0, torch.tensor(2))],
    "aten.gather.default": [S(r(3, 4), 1, i(4, 3, 2))],
    "aten.cross_entropy_loss.default": [S(r(3, 4), i(4, 3))],
    "aten.nll_loss.default": [S(r(3, 4), i(4, 3))],
    "aten.nll_loss_nd.default": [S(r(3, 4), i(4, 3))],
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
    ],
    "aten.group_norm.default": [
        S(r(2, 6, 3), 3, r(6), r(6)),
        S(r(2, 6, 3), 2),
        S(r(2, 6, 3), 1, r(6)),
        S(r(2, 6, 3), 3, eps=0.0),
    ],
    # point-wise with several operands
    "aten.rsub.Tensor": [S(r(3, 4), r(4))],
    "aten.rsub.Scalar": [S(r(3, 4), 1.0)],
    "aten.div.Tensor_mode": [S(r(3, 4), p(4), rounding_mode="floor")],
    "aten.floor_divide.default": [S(p(3, 4), p(4))],
    "aten.remainder.Scalar": [S(r(3, 4), 0.5)],
    "aten.pow.Tensor_Scalar": [S(r(3, 4), 2), S(p(3, 4), 0.5)],
    "aten.pow.Tensor_Tensor": [S(p(3, 4), r(4))],
    "aten.pow.Scalar": [S(2.0, r(3, 4))],
    "aten.maximum.default": [S(r(3, 4), r(4))],
    "aten.minimum.default": [S(r(3, 4), r(4))],
    "aten.max.other": [S(r(3, 4), r(4))],
    "aten.min.other": [S(r(3, 4), r(4))],
    "aten.where.self": [S(b(3, 4), r(3, 4), r(4)), S(b(4), r(3, 4), r(3, 1))],
    "aten.where.ScalarOther": [S(b(3, 4), r(3, 4), 0.0)],
    "aten.where.ScalarSelf": [S(b(3, 4), 1.0, r(3, 4))],
    "aten.where.Scalar": [S(b(3, 4), 1.0, 0.0)],
    "aten.masked_fill.Scalar": [S(r(3, 4), b(4), -1.0)],
    "aten.masked_fill.Tensor": [S(r(3, 4), b(4), torch.tensor(-1.0, dtype=torch.float64))],
    "aten.lerp.Tensor": [S(r(3, 4), r(4), r(4))],
    "aten.lerp.Scalar": [S(r(3, 4), r(4), 0.3)],
    "aten.addcmul.default": [S(r(3, 4), r(4), r(4))],
    "aten.clamp.default": [S(r(3, 4), -0.5, 0.5), S(r(3, 4), 0.2)],
    "aten.clamp.Tensor": [S(r(3, 4), r(4))],
    "aten.clamp_min.default": [S(r(3, 4), 0.1)],
    "aten.clamp_max.default": [S(r(3, 4), -0.1)],
    "aten.bernoulli.p": [S(r(3, 4), 0.5)],
    "aten.prelu.default": [S(r(3, 4), r(4)), S(r(3, 4, 2), r(4)), S(r(3, 4), r(1))],
    "aten.copy_.default": [S(r(3, 4), r(4)), S(r(3, 4), r(3, 4))],
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
    "aten.to.dtype": [S(r(3, 4), torch.float64), S(4 * r(3, 4), torch.int64), S(r(3, 4), torch.bfloat16)],
    "aten.to.device": [S(r(3, 4), torch.device("cpu"), torch.float64)],
    "aten.to.dtype_layout": [S(r(3, 4), dtype=torch.float64)],
    "aten.to.other": [S(r(3, 4), r(1))],
    "aten._to_copy.default": [S(r(3, 4), dtype=torch.float64)],
    "aten.type_as.default": [S(r(3, 4), r(1))],
    # reductions
    "aten.var.correction": [S(r(3, 4), [1], correction=0), S(r(2, 3, 4), [1, 2], correction=0), S(r(3, 4), [1])],
    "aten.var.dim": [S(r(3, 4), [1], False), S(r(3, 4), [1], True)],
    "aten.var.default": [S(r(3, 4), False)],
    "aten.std.correction": [S(r(3, 4), [1], correction=0)],
    "aten.var_mean.correction": [S(r(3, 4), [1], correction=0), S(r(3, 4), correction=0)],
    "aten.logsumexp.default": [S(r(3, 4), [1])],
    "aten.linalg_vector_norm.default": [S(r(3, 4), 2, [1]), S(r(3, 4), 2, [0, 1]), S(r(3, 4), 1, [1])],
    "aten.norm.ScalarOpt_dim": [S(r(3, 4), 2, [1])],
    # shapes
    "aten.view.default": [S(r(3, 8), [3, 2, 4]), S(r(3, 2, 4), [3, 8]), S(r(3, 8), [-1, 4]), S(r(6, 4), [2, 12])],
    "aten._unsafe_view.default": [S(r(3, 8), [3, 2, 4])],
    "aten.reshape.default": [S(r(3, 8), [3, 2, 4]), S(r(6, 4), [2, 3, 4])],
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
    "aten.cumsum.default": [S(r(3, 4), 1), S(r(), 0)],
    "aten.cumprod.default": [S(r(3, 4), 1)],
    "aten.sort.default": [S(r(3, 4), 1)],
    "aten.argsort.default": [S(r(3, 4), 1)],
    "aten.topk.default": [S(r(3, 4), 2)],
    "aten.diff.default": [S(r(3, 4))],
    "aten.pad.default": [S(r(3, 4), [1, 2]), S(r(3, 4), [1, 2], "constant", 1.0)],
    "aten.constant_pad_nd.default": [S(r(3, 4), [1, 2])],
    "aten.tril.default": [S(r(3, 4))],
    "aten.triu.default": [S(r(3, 4))],
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
