"""What the callbacks have in common."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch

from fxgrow.errors import SpecError
from fxgrow.ir import trees
from fxgrow.schedule import Accumulation, BatchSize, Schedule, SequenceLength
from fxgrow.scheduler import ActionResult

logger = logging.getLogger("fxgrow")

_SIZES = (Accumulation, BatchSize, SequenceLength)


def check_sizes(schedule: Schedule, whose: str) -> None:
    """Refuse changes of the batch, which a trainer's own loop draws as it was told at its start.

    Raises:
        SpecError: with the event.
    """
    for number, event in enumerate(schedule.events):
        for action in event.actions:
            if isinstance(action, _SIZES):
                raise SpecError(
                    f"events.{number} changes the {action.op.replace('_', ' ')}, which {whose} fixes when training "
                    "begins: leave it out, or write the loop yourself with fxgrow.GrowthScheduler"
                )


def example_of(batch: Any, device: torch.device | str) -> Any:
    """The first two samples of a batch: enough to capture a graph in which the batch's size stays open."""
    return trees.map_tensors(lambda t: t[:2].to(device) if t.dim() else t.to(device), batch)


def numbers(metrics: Mapping[str, Any] | None) -> dict[str, float]:
    """The metrics that are numbers."""
    found = {}
    for name, value in (metrics or {}).items():
        if isinstance(value, torch.Tensor) and value.numel() == 1:
            value = value.item()
        if isinstance(value, int | float) and not isinstance(value, bool):
            found[name] = float(value)
    return found


def tell(done: ActionResult) -> None:
    """Log an action, as one line."""
    changes = ", ".join(f"{k} {done.before.get(k, '')} -> {v}".replace("  ", " ") for k, v in done.after.items())
    if done.error:
        logger.warning("step %d, %s: %s left out: %s", done.step, done.name, done.op, done.error)
    else:
        logger.info("step %d, %s: %s %s (%.1f s)", done.step, done.name, done.op, changes, done.seconds)


__all__ = ["check_sizes", "example_of", "numbers", "tell"]
