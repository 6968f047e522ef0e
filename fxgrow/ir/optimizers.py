"""Optimizers as PyTorch keeps them."""

from __future__ import annotations

import torch


def is_scheduled(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a learning-rate scheduler drives an optimizer: it wraps the optimizer's ``step``."""
    return hasattr(optimizer.step, "_wrapped_by_lr_sched")


def forget_sizes(optimizer: torch.optim.Optimizer) -> None:
    """Have an optimizer count its parameters' entries anew: LBFGS counts them once."""
    if isinstance(optimizer, torch.optim.LBFGS):
        optimizer._numel_cache = None
