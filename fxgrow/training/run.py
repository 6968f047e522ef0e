"""The state of a run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from fxgrow.scheduler import GrowthScheduler
from fxgrow.training.hyper import cosine
from fxgrow.training.task import Task


@dataclass
class Run:
    """The state of a run, and what :func:`train` returns."""

    task: Task
    out: Path
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: GrowthScheduler
    step: int = 0
    """Completed optimizer steps."""
    batches: int = 0
    """Micro-batches drawn."""
    tokens: int = 0
    flops: int = 0
    """Floating-point operations of training so far, forward and backward; evaluation is not counted."""
    flops_per_batch: int = 0
    """Of one micro-batch of the current module; 0 when not measured yet."""
    seconds: float = 0.0
    loss_sum: float = 0.0
    losses: int = 0
    """Training losses since the last evaluation: their sum and number."""
    val_loss: float = math.nan

    @property
    def accumulation(self) -> int:
        return self.scheduler.accumulation(self.task.hyper.accumulation)

    @property
    def learning_rate(self) -> float:
        """For the step about to be made, growths included."""
        return cosine(self.step, self.task.hyper) * self.scheduler.lr_factor(self.step)
