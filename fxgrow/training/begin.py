"""What a run begins with: the model on its device, its optimizer, and the scheduler of the task's schedule."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fxgrow.errors import SpecError
from fxgrow.schedule import BatchSize, Schedule, SequenceLength
from fxgrow.scheduler import GrowthScheduler, Timeline
from fxgrow.training.hyper import Hyper, base_rate
from fxgrow.training.parallel import Parallel
from fxgrow.training.run import Run
from fxgrow.training.task import Task, checked


def begin(task: Task, out: Path, before: Callable[[Any], None] | None = None, parallel: Parallel | None = None) -> Run:
    """The run before its first step. Its model is the task's.

    Args:
        before: see :class:`~fxgrow.GrowthScheduler`.
        parallel: this rank among several.

    Raises:
        SpecError: the schedule is wrong, or changes a size that the task does not draw by; or something of the task is
            of another kind than it says.
    """
    hyper, calls = checked(task.hyper, Hyper, "hyper"), task.calls
    checked(task.model, torch.nn.Module, "model")
    if task.epoch_tokens is not None and checked(task.epoch_tokens, int, "epoch_tokens") < 1:
        raise SpecError(f"the task's epoch_tokens are {task.epoch_tokens}, and an epoch has some")
    torch.manual_seed(hyper.seed)  # for dropout; batches have generators of their own
    try:
        task.model.to(hyper.device).train()
    except (RuntimeError, AssertionError) as error:
        raise SpecError(f"the model cannot be on the device {hyper.device!r}: {error}") from error
    (parallel or Parallel()).take(task.model, hyper.device)
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
        compile_ahead=hyper.compile and hyper.compile_ahead,
    )
    run = Run(task, out, task.model, _optimizer(task), scheduler)
    return run


def _optimizer(task: Task) -> Any:
    """A task's optimizer, or several in a list.

    Raises:
        SpecError: it is none, or trains nothing of the model.
    """
    made: Any = task.optimizer(task.model, task.hyper)
    own = {id(p) for p in task.model.parameters()}
    for each in made if isinstance(made, list) else [made]:
        held = checked(each, torch.optim.Optimizer, "optimizer(model, hyper)").param_groups
        if own and not any(id(p) in own for group in held for p in group["params"]):
            raise SpecError(f"the task's optimizer, {type(each).__name__}, holds no parameter of the model")
    return made


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
