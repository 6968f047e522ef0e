"""The learning rate in loops that others write: a factor around every step of the optimizer, and on nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from fxgrow.ir.eager import eager


class Steering:
    """Multiplies the learning rates of an optimizer while it steps.

    A learning-rate scheduler that reads and writes them between the steps (of ``torch.optim``, of a ``Trainer``) goes
    on with its own.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, factor: Callable[[], float]) -> None:
        self._factor = factor
        self._kept: list[Any] = []
        self._handles: list[RemovableHandle] = [
            optimizer.register_step_pre_hook(eager(self._before)),
            optimizer.register_step_post_hook(eager(self._after)),
        ]

    def remove(self) -> None:
        """Leave the optimizer to itself."""
        for handle in self._handles:
            handle.remove()

    def _before(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if self._kept:  # a step that raised
            self._put(optimizer)
        factor = self._factor()
        if factor == 1:
            return
        for group in optimizer.param_groups:
            rate = group["lr"]
            self._kept.append(rate.clone() if isinstance(rate, torch.Tensor) else rate)
            if isinstance(rate, torch.Tensor):
                rate.mul_(factor)  # captured and compiled steps read this very tensor
            else:
                group["lr"] = rate * factor

    def _after(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._put(optimizer)

    def _put(self, optimizer: torch.optim.Optimizer) -> None:
        for group, rate in zip(optimizer.param_groups, self._kept, strict=False):
            if isinstance(rate, torch.Tensor) and isinstance(group["lr"], torch.Tensor):
                group["lr"].copy_(rate)
            else:
                group["lr"] = rate
        self._kept = []


__all__ = ["Steering"]
