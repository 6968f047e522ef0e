"""Nested data as JSON, tensors apart: what a checkpoint without pickle can hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fxgrow.errors import CheckpointError


def pack(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Nested data as JSON; tensors go to ``tensors`` under their path, and a reference takes their place."""
    if isinstance(value, Tensor):
        tensors[path] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"$tensor": path}
    if isinstance(value, Mapping):
        items = [[pack(k, "", {}), pack(v, f"{path}.{k}", tensors)] for k, v in value.items()]
        return {"$dict": items} if any(not isinstance(k, str) for k in value) else dict(items)
    if isinstance(value, list | tuple):
        items = [pack(item, f"{path}.{number}", tensors) for number, item in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise CheckpointError(f"{path} is a {type(value).__name__}, which a checkpoint without pickle cannot hold")


def unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of :func:`pack`.

    Raises:
        KeyError, TypeError, ValueError: it is not what ``pack`` makes.
    """
    if isinstance(value, list):
        return [unpack(item, tensors) for item in value]
    if isinstance(value, dict):
        if "$tensor" in value:
            return tensors[value["$tensor"]]
        if "$tuple" in value:
            return tuple(unpack(item, tensors) for item in value["$tuple"])
        pairs = value["$dict"] if "$dict" in value else value.items()
        return {key: unpack(item, tensors) for key, item in pairs}
    return value
