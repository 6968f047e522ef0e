"""Optimizers as PyTorch keeps them."""

from __future__ import annotations

import torch


def is_scheduled(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a learning-rate scheduler drives an optimizer: it wraps the optimizer's ``step``."""
    return hasattr(optimizer.step, "_wrapped_by_lr_sched")
