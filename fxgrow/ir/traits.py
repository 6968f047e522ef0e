"""Traits of ops that have nothing to do with axes: one table, for whoever traces, runs or compares graphs.

What an op does to axes stands in its row of :mod:`fxgrow.rules`; ``fxgrow rules`` prints both.
"""

from __future__ import annotations

import enum
import functools
from typing import Any

from fxgrow.ir.ops import op_name, schema_of


class Trait(enum.Enum):
    """What may be said of an op; the value says it in words."""

    SAME = "the result is its operand, entry by entry, whatever the values"
    SAME_IN_SHAPE = "the result is its operand where it has its shape"
    RESHAPES = "the entries of its operand under other sizes"
    EXACT = "the result holds the very numbers it was given: nothing is rounded"
    HIDDEN_VIEW = "the result may be a view of an operand, though the schema does not say so"
    HIDDEN_STATISTICS = "writes into running_mean and running_var, though the schema does not say so"
    WRITES_NOTHING = "declared as a write, but no value changes"
    DRAWS = "every entry of the result is drawn at random"
    KEEPS = "what is drawn is whether to keep an entry"
    CHECKS = "raises or does nothing"
    CONDITION = "picks entries by a condition or mask"
    CHOICE = "picks one of two operands, entry by entry"
    GATE = "lets some entries through and makes the others zero, or holds them at a bound"
    PRODUCT = "multiplies its operands"


#: Ops by trait, without overloads; ``relu(_)`` is the op and the one in place.
_TABLE: dict[Trait, str] = {
    Trait.SAME: "detach(_) alias lift_fresh lift_fresh_copy",
    Trait.SAME_IN_SHAPE: "slice expand view reshape _unsafe_view",
    Trait.RESHAPES: "view reshape _unsafe_view",
    Trait.EXACT: """
        _to_copy abs(_) adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d alias amax
        amin arange as_strided broadcast_to cat ceil(_) channel_shuffle clamp(_) clamp_max(_)
        clamp_min(_) clip clone concat concatenate constant_pad_nd contiguous
        copy(_) detach(_) diag diag_embed diagonal dropout(_) embedding empty
        empty_like expand expand_as eye fill(_) flatten flip floor(_) full full_like
        gather hardtanh(_) im2col index index_copy index_fill index_put(_)
        index_select lift_fresh_copy masked_fill(_) masked_scatter masked_select max
        max_pool1d max_pool2d max_pool3d maximum min minimum movedim nan_to_num neg(_)
        new_empty new_full new_ones new_zeros one_hot ones ones_like pad permute pixel_shuffle
        pixel_unshuffle reflection_pad1d reflection_pad2d reflection_pad3d relu(_) relu6 repeat
        repeat_interleave replication_pad1d replication_pad2d replication_pad3d reshape roll rot90
        round(_) scalar_tensor scatter select_scatter sgn sign slice_scatter sort split
        squeeze stack t take take_along_dim threshold(_) tile to topk transpose tril
        triu trunc(_) type_as unbind unfold unsqueeze view where zero_ zeros zeros_like
    """,
    Trait.HIDDEN_VIEW: """
        dropout alpha_dropout feature_dropout feature_alpha_dropout type_as conj_physical einsum cartesian_prod
        atleast_1d atleast_2d atleast_3d broadcast_tensors meshgrid flatten_dense_tensors
        _unsafe_view unsafe_chunk unsafe_split unsafe_split_with_sizes
    """,
    Trait.HIDDEN_STATISTICS: "batch_norm instance_norm native_batch_norm cudnn_batch_norm miopen_batch_norm",
    Trait.WRITES_NOTHING: "detach_",
    Trait.DRAWS: """
        rand randn rand_like randn_like normal(_) uniform(_) bernoulli(_) random_ exponential_ log_normal_ cauchy_
    """,
    Trait.KEEPS: "bernoulli(_)",
    Trait.CHECKS: """
        _assert_scalar _assert_tensor_metadata _assert_async sym_constrain_range sym_constrain_range_for_size
    """,
    Trait.CONDITION: "where masked_fill(_) masked_scatter masked_select",
    Trait.CHOICE: "maximum minimum",
    Trait.GATE: "relu(_) relu6(_) clamp(_) clamp_min(_) hardtanh(_)",
    Trait.PRODUCT: "mul(_) matmul mm bmm linear addcmul baddbmm addmm conv1d conv2d conv3d",
}


def _packets(text: str) -> frozenset[str]:
    names = [(word.removesuffix("(_)"), word.endswith("(_)")) for word in text.split()]
    return frozenset(f"aten.{n}{s}" for n, both in names for s in (("", "_") if both else ("",)))


TRAITS: dict[Trait, frozenset[str]] = {trait: _packets(text) for trait, text in _TABLE.items()}


@functools.cache
def traits_of(target: Any) -> frozenset[Trait]:
    """What is said of an op: an overload, its name, or a Python function, of which nothing is."""
    name = target if isinstance(target, str) else op_name(target)
    packet = name.rpartition(".")[0]
    return frozenset(trait for trait, names in TRAITS.items() if packet in names)


#: arguments that switch or weigh randomness and running statistics: no shape, and no factor of a growth, hangs on them
_OF_MODE = frozenset({"train", "training", "is_train", "use_input_stats", "dropout", "dropout_p", "momentum"})
_OF_DROPOUT = frozenset({"dropout", "dropout_p"})


def follows_mode(schema: Any, argument: str) -> bool:
    """Whether an argument of an op is one that a model sets by its mode, such as ``training``."""
    return argument in _OF_MODE or is_dropout_probability(schema, argument)


def is_mode_literal(target: Any, path: tuple[Any, ...]) -> bool:
    """Whether a literal, by its path in a call, is one that a model sets by its mode.

    Any value may be put in for such a one; what else differs between the modes needs a graph for each.
    """
    schema = schema_of(target)
    if schema is None or len(path) != 2:
        return False
    return follows_mode(schema, path[1] if path[0] == "kwargs" else schema.arguments[path[1]].name)


def is_dropout_probability(schema: Any, argument: str) -> bool:
    """Whether an argument of an op is the probability with which it drops entries."""
    return argument in _OF_DROPOUT or (argument == "p" and "dropout" in schema.name)


__all__ = ["TRAITS", "Trait", "follows_mode", "is_dropout_probability", "is_mode_literal", "traits_of"]
