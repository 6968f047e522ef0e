"""Short names of common operations, each with one ``value``: ``{op: widen_mlp, value: 2}``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_FACTOR, _LESS = "a factor above 1", "a factor below 1"

#: by name: what it stands for, and what its value is
ALIASES: dict[str, tuple[Callable[[Any], dict[str, Any]], str]] = {
    "widen_mlp": (lambda v: {"op": "widen", "axis": "*/hidden", "factor": v}, _FACTOR),
    "stack_layers": (lambda v: {"op": "deepen", "stack": "*", "factor": v}, _FACTOR),
    "change_grad_accum": (lambda v: {"op": "accumulation", "factor": v}, "a factor above 0"),
    "decrease_attn_lora_scaling": (
        lambda v: {"op": "lora_scale", "factor": v, "modules": "*attn*|*attention*"},
        _LESS,
    ),
    "decrease_vocab_lora_scaling": (
        lambda v: {"op": "lora_scale", "factor": v, "modules": "vocabulary"},
        _LESS,
    ),
    "change_lr": (lambda v: {"op": "learning_rate", "scale": v}, "a factor above 0"),
}


def expanded(operation: Any) -> Any:
    """What an operation by a short name stands for; any other as it is.

    Raises:
        ValueError: it has not one number as its ``value``.
    """
    if isinstance(operation, dict) and operation == {"op": "merge_lora_weights"}:
        return {"op": "lora_merge"}
    if not isinstance(operation, dict) or operation.get("op") not in ALIASES:
        return operation
    make, what = ALIASES[operation["op"]]
    value = operation.get("value")
    if set(operation) != {"op", "value"} or isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{operation['op']} takes one `value`, {what}")
    if (what == _FACTOR and value <= 1) or (what == _LESS and value >= 1):
        raise ValueError(f"{operation['op']}: value {value:g} is not {what}")
    return make(value)


__all__ = ["ALIASES", "expanded"]
