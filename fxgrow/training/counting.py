"""What is counted of a module."""

from __future__ import annotations

from torch import nn


def count_parameters(model: nn.Module) -> int:
    """Elements of all parameters, tied ones once."""
    return sum(p.numel() for p in model.parameters())
