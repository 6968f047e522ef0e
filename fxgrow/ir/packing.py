"""An optimizer's state as JSON, its tensors apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fxgrow.ir.values import decode_value, encode_value

_MARK = "$"


def pack(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Nested data as JSON; tensors go to ``tensors`` under their path, as they are, and a reference takes their place.

    Raises:
        CheckpointError: a value of a kind that cannot be stored.
    """

    def refer(part: Any, where: str) -> tuple[str, str] | None:
        if not isinstance(part, Tensor):
            return None
        tensors[where] = part.detach()
        return "tensor", where

    return encode_value(value, path, refer, _MARK)


def unpack(value: Any, tensors: Mapping[str, Tensor], where: str = "value") -> Any:
    """The inverse of :func:`pack`.

    Raises:
        CheckpointError: it is not what ``pack`` makes.
    """
    return decode_value(value, {"tensor": tensors}, where, _MARK)
