"""What a run begins with: the model on its device, its optimizer, and the scheduler of the task's schedule."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fxgrow.errors import SpecError
from fxgrow.schedule import BatchSize, Schedule, SequenceLength
from fxgrow.scheduler import GrowthScheduler, Timeline
from fxgrow.training.hyper import base_rate
from fxgrow.training.run import Run
from fxgrow.training.task import Task


def begin(task: Task, out: Path, before: Callable[[Any], None] | None = None) -> Run:
    """The run before its first step. Its model is the task's.

    Args:
        before: see :class:`~fxgrow.GrowthScheduler`.

    Raises:
        SpecError: the schedule is wrong, or changes a size that the task does not draw by.
    """
    hyper, calls = task.hyper, task.calls
    torch.manual_seed(hyper.seed)  # for dropout; batches have generators of their own
    task.model.to(hyper.device).train()
    scheduler = GrowthScheduler(
        schedule_of(task),
        args=lambda: task.example(run.batch("train", 0)),
        calls=None if calls is None else lambda: calls(run.batch("train", 0)),
        in_place=task.in_place,
        accumulation=hyper.accumulation,
        batch_size=task.batch_size,
        sequence_length=task.sequence_length,
        before=before,
        verify=task.verify,
    )
    run = Run(task, out, task.model, task.optimizer(task.model, hyper), scheduler)
    return run


def planned(run: Run) -> Timeline:
    """What the schedule will make of a run from here on, see :meth:`fxgrow.GrowthScheduler.check`."""
    return run.scheduler.check(run.model, run.optimizer, lambda step: base_rate(step, run.task.hyper))


def schedule_of(task: Task) -> Schedule:
    """A task's schedule, which changes no size of the batch that the task does not draw by.

    Raises:
        SpecError: it does.
    """
    schedule = Schedule.parse(task.schedule)
    for place, action in schedule.placed_actions():
        if isinstance(action, BatchSize | SequenceLength) and getattr(task, action.op) is None:
            raise SpecError(
                f"{place} changes the {action.op.replace('_', ' ')}, and the task does not draw by it: give the Task a "
                f"{action.op}=, and its `batches` an argument of that name"
            )
    return schedule
