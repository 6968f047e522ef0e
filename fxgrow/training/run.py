"""The state of a run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from fxgrow.scheduler import GrowthScheduler
from fxgrow.training.batches import seeded, to_device
from fxgrow.training.copies import Copies
from fxgrow.training.hyper import base_rate
from fxgrow.training.task import Batch, Task, checked


@dataclass
class Run:
    """The state of a run, and what :func:`train` returns."""

    task: Task
    out: Path
    model: nn.Module
    optimizer: torch.optim.Optimizer | list[torch.optim.Optimizer]
    """As the task made it: one, or several."""
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
    evaluated: int = -1
    """The step of the last evaluation."""
    ended: bool = False
    """Nothing is left to be done, and the last checkpoint holds it."""
    copies: Copies = field(default_factory=Copies.none)
    """Of the last growth."""
    original: dict[str, list[int]] = field(init=False)
    """Shapes of the model as it is at the start; in place, it is the one that grows."""
    log_lines: int | None = 0
    """Lines of the log when the last checkpoint was made, its own included; None where it does not say (0.1)."""
    sown: bool = True
    """What a micro-batch draws besides its data has a seed of its own. A run that began without goes on without."""

    def __post_init__(self) -> None:
        self.original = shapes(self.model)

    def batch(self, split: str, number: int) -> Batch:
        """A micro-batch on the run's device; those of the validation keep the size that they have at the start."""
        task, now = self.task, self.scheduler if split == "train" else self.task
        sizes = {n: getattr(now, n) for n in ("batch_size", "sequence_length") if getattr(task, n) is not None}
        drawn = task.batches(split, seeded(task.hyper.seed, split, number), **sizes)
        if not isinstance(drawn, list):
            checked(drawn, tuple, f"batches({split!r}, …)")
        return to_device(drawn, torch.device(task.hyper.device))

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        return self.optimizer if isinstance(self.optimizer, list) else [self.optimizer]

    @property
    def accumulation(self) -> int:
        return self.scheduler.accumulation

    @property
    def learning_rate(self) -> float:
        """For the step about to be made, with what the schedule has changed."""
        return self.scheduler.learning_rate(lambda step: base_rate(step, self.task.hyper), self.step)


def shapes(model: nn.Module) -> dict[str, list[int]]:
    """Of everything in a model's state dict, by name."""
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
