"""What the callbacks have in common."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxgrow.errors import FxgrowError, SpecError, did_you_mean
from fxgrow.ir import trees
from fxgrow.schedule import (
    Accumulation,
    BatchSize,
    Dropout,
    Freeze,
    Grow,
    LoraDecay,
    LoraMerge,
    LoraScale,
    Schedule,
    SequenceLength,
    Unfreeze,
)
from fxgrow.scheduler import ActionResult, GrowthScheduler
from fxgrow.spec import Lora

logger = logging.getLogger("fxgrow")

_SIZES = (Accumulation, BatchSize, SequenceLength)
#: what a schedule does to a model that its sizes do not say
_BEYOND = (Dropout, Freeze, Unfreeze, LoraScale, LoraDecay, LoraMerge)


def check_sizes(schedule: Schedule, whose: str) -> None:
    """Refuse changes of the batch, which a trainer's own loop draws as it was told at its start.

    Raises:
        SpecError: with the event.
    """
    for place, action in schedule.placed_actions():
        if isinstance(action, _SIZES):
            raise SpecError(
                f"{place} changes the {action.op.replace('_', ' ')}, which {whose} fixes when training begins: leave "
                "it out, or write the loop yourself with fxgrow.GrowthScheduler"
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


def finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics that JSON has numbers for."""
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def replayed(scheduler: GrowthScheduler, model: nn.Module) -> list[nn.Parameter]:
    """Bring a model to where a scheduler is, all of it learning that its optimizer had at the start.

    Returns:
        What the schedule lets stand still: to be frozen when the trainer has made its optimizer, which may leave out
        what does not learn.
    """
    before = {n for n, p in model.named_parameters() if not p.requires_grad}
    scheduler.replay(model)
    still = [p for n, p in model.named_parameters() if not p.requires_grad and n not in before]
    for p in still:
        p.requires_grad_(True)
    return still


def hold(still: list[nn.Parameter]) -> None:
    """Let parameters stand still."""
    for p in still:
        p.requires_grad_(False)
        p.grad = None


def check_made(scheduler: GrowthScheduler) -> None:
    """Refuse to go on with a model that was made in its large sizes where more than sizes was changed.

    Raises:
        FxgrowError: with the event.
    """
    for each in scheduler.done:
        lora = isinstance(each.action, Grow) and any(isinstance(o, Lora) for o in each.action.spec.operations)
        if not each.error and (lora or isinstance(each.action, _BEYOND)):
            op = "lora" if lora else each.action.op
            raise FxgrowError(
                f"events.{each.event} has done {op}, which no model has that was made in the sizes of the checkpoint: "
                "make it in its small sizes, and call resume() of the callback with it"
            )


def warn_unseen(scheduler: GrowthScheduler, names: Iterable[str]) -> None:
    """Warn of the event that is waited for at the end of a run, where it watches what was never reported."""
    event, known = scheduler.next, sorted(names)
    for metric in [] if event is None else event.trigger.metrics:
        if metric not in known:
            near = did_you_mean(metric, known)
            logger.warning("the event at %s was not done: %r was never reported; %s", event.trigger, metric, near)  # type: ignore[union-attr]


def record(done: ActionResult, results: list[ActionResult], file: Path | None) -> None:
    """Keep what was done, and say so: to the log, and as a JSON line to a file."""
    results.append(done)
    _tell(done)
    if file is not None:
        with file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(done.to_dict()) + "\n")


def _tell(done: ActionResult) -> None:
    changes = ", ".join(f"{k} {done.before.get(k, '')} -> {v}".replace("  ", " ") for k, v in done.after.items())
    if done.error:
        logger.warning("step %d, %s: %s left out: %s", done.step, done.name, done.op, done.error)
    else:
        logger.info("step %d, %s: %s %s (%.1f s)", done.step, done.name, done.op, changes, done.seconds)


__all__ = ["check_made", "check_sizes", "example_of", "finite", "hold", "numbers", "record", "replayed", "warn_unseen"]
