"""Nested values: PyTorch's pytree, which its private module alone offers for Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_map_only, tree_structure, tree_unflatten


def tensors_in(value: Any) -> list[torch.Tensor]:
    """The tensors of a nested value, in order."""
    return [x for x in tree_leaves(value) if isinstance(x, torch.Tensor)]


def map_tensors(function: Callable[[torch.Tensor], Any], value: Any) -> Any:
    """A nested value with ``function`` of each tensor in its place."""
    return tree_map(lambda x: function(x) if isinstance(x, torch.Tensor) else x, value)


def clones(value: Any) -> Any:
    """A nested value with copies of its tensors, without their history; one that stands there twice becomes two."""
    return map_tensors(lambda x: x.detach().clone(), value)


__all__ = [
    "clones",
    "map_tensors",
    "tensors_in",
    "tree_flatten",
    "tree_leaves",
    "tree_map",
    "tree_map_only",
    "tree_structure",
    "tree_unflatten",
]
