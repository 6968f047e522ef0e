"""Torch's operations on lists of tensors, which have no public names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def copy_each(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each source into its target."""
    torch._foreach_copy_(list(targets), list(sources))


def lerp_each(targets: Sequence[Tensor], ends: Sequence[Tensor], weight: float) -> None:
    """Move each target towards its end, by that share of the way; one that is there already keeps its bits."""
    torch._foreach_lerp_(list(targets), list(ends), weight)


def adam_each(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    averages: Sequence[Tensor],
    squares: Sequence[Tensor],
    maxima: Sequence[Tensor],
    counts: Sequence[Tensor],
    *,
    decoupled: bool,
    **numbers: Any,
) -> None:
    """One call of Adam's fused kernel, or of AdamW's where weight decay is decoupled; counts stay as they are."""
    kernel = torch._fused_adamw_ if decoupled else torch._fused_adam_
    kernel(list(params), list(grads), list(averages), list(squares), list(maxima), list(counts), **numbers)
