"""How a run is trained: its hyper-parameters, and the learning rate they give."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fxgrow.errors import SpecError


@dataclass(frozen=True)
class Hyper:
    """How a run is trained. Counts are optimizer steps unless they say otherwise."""

    steps: int = 1000
    accumulation: int = 1
    """Micro-batches per step, before any growth changes it."""
    learning_rate: float = 1e-3
    min_learning_rate: float = 1e-4
    warmup: int = 50
    decay_steps: int | None = None
    """Where the cosine reaches the minimum; None: at the last step."""
    clip: float = 1.0
    """Largest global gradient norm; 0 turns clipping off. See the module's docstring for the caveat."""
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eval_every: int = 100
    eval_batches: int = 8
    log_every: int = 10
    checkpoint_every: int = 0
    """0: only at the end."""
    keep_checkpoints: int = 2
    seed: int = 0
    compile: bool = False
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("accumulation", "eval_every", "eval_batches", "log_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise SpecError(f"hyper-parameter {name}: {getattr(self, name)} must be at least 1")


def cosine(step: int, hyper: Hyper) -> float:
    """Learning rate of step ``step`` (from 0): linear warm-up, then a cosine down to the minimum, then the minimum."""
    if step < hyper.warmup:
        return hyper.learning_rate * (step + 1) / hyper.warmup
    end = hyper.steps if hyper.decay_steps is None else hyper.decay_steps
    if step >= end:
        return hyper.min_learning_rate
    progress = (step - hyper.warmup) / max(1, end - hyper.warmup)
    span = hyper.learning_rate - hyper.min_learning_rate
    return hyper.min_learning_rate + span * 0.5 * (1 + math.cos(math.pi * progress))
