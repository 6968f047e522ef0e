"""Treespecs: the lists, dicts, registered dataclasses and named tuples around the tensors a model takes and returns.

A graph takes and returns tensors one by one, the leaves of a tree. PyTorch calls what stands around them its treespec;
it is kept as text here, so that it can be stored and is never unpickled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch.utils._pytree as pytree

# torch.utils._pytree is what torch.export describes outputs with; it has no public counterpart that serialises
from fxgrow.errors import CaptureError, CheckpointError

_KNOWN: dict[str, Any] = {}


def describe(value: Any, spec: Any) -> str:
    """The treespec ``spec`` of ``value`` as text for :func:`rebuild`.

    Raises:
        CaptureError: a class in it is not registered with pytree under a name of its own.
    """
    _register_named_tuples(value)
    _name_dataclasses()
    try:
        text = str(pytree.treespec_dumps(spec))
        _KNOWN[text] = pytree.treespec_loads(text)
    except (NotImplementedError, ValueError, TypeError) as error:
        raise CaptureError(
            f"the model takes or returns a {type(value).__name__}, whose structure cannot be stored ({error}); use "
            "tuples, lists or dicts of tensors, or a dataclass that torch.export.register_dataclass knows"
        ) from error
    return text


def check(text: str) -> None:
    """Whether this process knows the classes of a treespec.

    Raises:
        CheckpointError: it does not; the message says which is missing.
    """
    _name_dataclasses()
    try:
        _KNOWN[text] = pytree.treespec_loads(text)
    except (NotImplementedError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"the model takes or returns a structure that this process cannot build ({error}); import the package that "
            "defines it before loading"
        ) from error


def rebuild(leaves: Sequence[Any], text: str) -> Any:
    """The value whose treespec :func:`describe` wrote, around other leaves."""
    return pytree.tree_unflatten(list(leaves), _KNOWN[text])


def take_apart(value: Any, text: str) -> list[Any] | None:
    """The leaves of a value that is built like the one :func:`describe` described; None where it is not."""
    leaves, spec = pytree.tree_flatten(value)
    return leaves if spec == _KNOWN[text] else None


def _name_dataclasses() -> None:
    """Give registered dataclasses a name to be stored under; ``torch.export.register_dataclass`` gives none."""
    for kind, node in list(pytree.SUPPORTED_SERIALIZED_TYPES.items()):
        if dataclasses.is_dataclass(kind) and node.serialized_type_name == pytree.NO_SERIALIZED_TYPE_NAME_FOUND:
            name = f"{kind.__module__}.{kind.__qualname__}"
            pytree.SUPPORTED_SERIALIZED_TYPES[kind] = node._replace(serialized_type_name=name)
            pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE[name] = kind


def _register_named_tuples(value: Any) -> None:
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        kind = type(value)
        if kind not in pytree.SUPPORTED_SERIALIZED_TYPES:
            # the only way to give a named tuple a name to be stored under
            pytree._register_namedtuple(kind, serialized_type_name=f"{kind.__module__}.{kind.__qualname__}")
    if isinstance(value, list | tuple | dict):
        for item in value.values() if isinstance(value, dict) else value:
            _register_named_tuples(item)


__all__ = ["check", "describe", "rebuild", "take_apart"]
