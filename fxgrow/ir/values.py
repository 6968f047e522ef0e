"""Nested values as JSON and back: arguments of ops, example inputs, optimizers' states. Nothing is ever unpickled.

A list stands for itself. What JSON lacks becomes a mapping with one key that says what it is: ``{"tuple": [1, 2]}``,
``{"dict": [["a", 1]]}``, ``{"dtype": "float32"}``. What is kept elsewhere becomes a reference by name: ``{"node":
"add_1"}`` to a node of a graph, ``{"tensor": "input.0"}`` to a tensor of a safetensors file.

With a ``mark`` these keys begin with it (``{"$tuple": [1, 2]}``), and a mapping of names stands for itself: that is
easier to read where most of the data are mappings.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from fxgrow.errors import CheckpointError

#: kind and name of what is kept elsewhere, None for anything else; it is given the value and its place
Refer = Callable[[Any, str], tuple[str, str] | None]

_TORCH_KINDS: dict[str, type] = {
    "dtype": torch.dtype,
    "device": torch.device,
    "layout": torch.layout,
    "memory_format": torch.memory_format,
}


def encode_value(value: Any, where: str = "value", refer: Refer | None = None, mark: str = "") -> Any:
    """A value as JSON data.

    Args:
        where: its place, for errors; the place of ``value["a"][0]`` is ``where.a.0``.
        refer: says what is kept elsewhere, and under which name.
        mark: what the keys that say a kind begin with. With one, mappings may have numbers for keys and be of any
            class: they come back as plain dicts.

    Raises:
        CheckpointError: a value of a kind that cannot be stored.
    """
    if refer is not None and (reference := refer(value, where)) is not None:
        kind, name = reference
        return {mark + kind: name}

    def encode(part: Any, key: object) -> Any:
        return encode_value(part, f"{where}.{key}", refer, mark)

    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {f"{mark}float": str(value)}
    if isinstance(value, list):
        return [encode(v, i) for i, v in enumerate(value)]
    if isinstance(value, tuple) and not hasattr(value, "_fields"):  # a named tuple would come back as another class
        return {f"{mark}tuple": [encode(v, i) for i, v in enumerate(value)]}
    if isinstance(value, Mapping) and all(isinstance(k, str) for k in value):
        pairs = [[k, encode(v, k)] for k, v in value.items()]
        itself = mark and not any(k.startswith(mark) for k in value)
        return dict(pairs) if itself else {f"{mark}dict": pairs}
    if isinstance(value, Mapping) and mark and all(isinstance(k, str | int | float) for k in value):
        return {f"{mark}dict": [[k, encode(v, k)] for k, v in value.items()]}
    if isinstance(value, slice):
        return {f"{mark}slice": [encode(getattr(value, n), n) for n in ("start", "stop", "step")]}
    if isinstance(value, complex):
        return {f"{mark}complex": [encode(value.real, "real"), encode(value.imag, "imag")]}
    for kind, cls in _TORCH_KINDS.items():
        if isinstance(value, cls):
            return {mark + kind: str(value).removeprefix("torch.")}
    raise CheckpointError(f"{where} is of the class {type(value).__name__}, which a checkpoint cannot store")


def decode_value(value: Any, references: Mapping[str, Mapping[str, Any]], where: str = "value", mark: str = "") -> Any:
    """The inverse of :func:`encode_value`.

    Args:
        references: what references of each kind stand for, by name.

    Raises:
        CheckpointError: something that ``encode_value`` does not write.
    """

    def decode(part: Any) -> Any:
        return decode_value(part, references, where, mark)

    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return [decode(v) for v in value]
    if isinstance(value, dict) and len(value) == 1 and (key := next(iter(value))).startswith(mark):
        return _decode_kind(key.removeprefix(mark), value[key], references, where, mark, decode)
    if isinstance(value, dict) and mark:
        return {k: decode(v) for k, v in value.items()}
    raise CheckpointError(f"{where}: cannot read the value {str(value)[:80]}")


def _decode_kind(
    kind: str,
    content: Any,
    references: Mapping[str, Mapping[str, Any]],
    where: str,
    mark: str,
    decode: Callable[[Any], Any],
) -> Any:
    """What a mapping with one key, which says the kind, stands for."""
    if kind in references:
        if not isinstance(content, str) or content not in references[kind]:
            raise CheckpointError(f"{where} refers to the {kind} {str(content)[:80]!r}, which is not there")
        return references[kind][content]
    if kind == "float" and content in ("inf", "-inf", "nan"):
        return float(content)
    if kind == "tuple" and isinstance(content, list):
        return tuple(decode(v) for v in content)
    if kind == "dict" and isinstance(content, list) and all(_is_item(pair, mark) for pair in content):
        return {k: decode(v) for k, v in content}
    if kind == "slice" and isinstance(content, list) and len(content) == 3:
        return slice(*(decode(v) for v in content))
    if kind == "complex" and isinstance(content, list) and len(content) == 2:
        with contextlib.suppress(TypeError, OverflowError):  # no numbers, or too large ones: not read
            return complex(*(decode(v) for v in content))
    if kind == "device" and isinstance(content, str):
        try:
            return torch.device(content)
        except RuntimeError as error:
            raise CheckpointError(f"{where}: no device {content!r}") from error
    if kind in _TORCH_KINDS and isinstance(content, str):
        found = getattr(torch, content, None)
        if isinstance(found, _TORCH_KINDS[kind]):
            return found
        raise CheckpointError(f"{where}: this PyTorch ({torch.__version__}) has no {kind} {content!r}")
    raise CheckpointError(f"{where}: cannot read the value {str({mark + kind: content})[:80]}")


def _is_item(pair: Any, mark: str) -> bool:
    """Whether it is a key and a value; keys that are numbers come with a mark only."""
    return isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str | int | float if mark else str)
