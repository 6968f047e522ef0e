"""How a run is trained: its hyper-parameters, and the learning rate they give."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from fxgrow.errors import SpecError, did_you_mean

_Positive = Annotated[int, Field(ge=1)]
_Count = Annotated[int, Field(ge=0)]
_Rate = Annotated[float, Field(ge=0)]


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class Hyper:
    """How a run is trained. Counts are optimizer steps unless they say otherwise."""

    steps: _Count = 1000
    accumulation: _Positive = 1
    """Micro-batches per step, before any growth changes it."""
    learning_rate: _Rate = 1e-3
    min_learning_rate: _Rate = 1e-4
    warmup: _Count = 50
    decay: Literal["cosine", "linear"] = "cosine"
    """The curve from the full rate to the minimum."""
    decay_from: _Count | None = None
    """Where the decay begins; None: after the warm-up. Until then the rate stays full (warm-up, stable, decay)."""
    decay_steps: _Count | None = None
    """Where the decay reaches the minimum; None: at the last step."""
    clip: _Rate = 1.0
    """Largest global gradient norm; 0 turns clipping off. See the module's docstring for the caveat."""
    weight_decay: _Rate = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eval_every: _Positive = 100
    eval_batches: _Positive = 8
    log_every: _Positive = 10
    checkpoint_every: _Count = 0
    """0: only at the end."""
    keep_checkpoints: _Positive = 2
    seed: int = 0
    compile: bool = False
    device: str = "cpu"
    compile_ahead: bool = False
    """With ``compile``: compile the next growth in a background process."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """How several ranks hold the model: a copy on each (``DistributedDataParallel``), or shards (``fully_shard``)."""


def hyper_of(settings: dict[str, Any], start: Hyper | None = None, where: str = "hyper-parameter") -> Hyper:
    """Hyper-parameters from plain data, those that are not named from ``start``.

    Raises:
        SpecError: with one line for each that is unknown, or of another type or range.
    """
    known = [f.name for f in fields(Hyper)]
    for name in settings:
        if name not in known:
            raise SpecError(f"{where} {name}: no such hyper-parameter; {did_you_mean(name, known)}")
    given = {} if start is None else {name: getattr(start, name) for name in known}
    try:
        return Hyper(**{**given, **settings})
    except ValidationError as error:
        lines = [
            f"{where} {'.'.join(map(str, item['loc']))}: {' '.join(item['msg'].split())}, not {item['input']!r}"
            for item in error.errors()
        ]
        raise SpecError("\n".join(lines)) from None


def base_rate(step: int, hyper: Hyper) -> float:
    """Learning rate of step ``step`` (from 0): linear warm-up, then the full rate, then down to the minimum."""
    if step < hyper.warmup:
        return hyper.learning_rate * (step + 1) / hyper.warmup
    start = hyper.warmup if hyper.decay_from is None else max(hyper.warmup, hyper.decay_from)
    end = hyper.steps if hyper.decay_steps is None else hyper.decay_steps
    if step >= end:
        return hyper.min_learning_rate
    progress = max(0.0, (step - start) / max(1, end - start))
    left = 0.5 * (1 + math.cos(math.pi * progress)) if hyper.decay == "cosine" else 1 - progress
    return hyper.min_learning_rate + (hyper.learning_rate - hyper.min_learning_rate) * left
