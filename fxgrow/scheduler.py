"""The scheduler: carries a schedule out inside anybody's training loop.

In a loop of your own::

    scheduler = GrowthScheduler("schedule.yaml", args=(idx[:2], targets[:2]))
    for step in range(steps):
        while event := scheduler.step(model, optimizer, step=step, metrics={"val_loss": val_loss}):
            model, optimizer = event.module, event.optimizer
        lr = base_lr(step) * scheduler.lr_factor(step)
        ...
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from pydantic import Field, ValidationError

from fxgrow.errors import FxgrowError, SpecError, did_you_mean, reworded
from fxgrow.growth import Growth, grow, plan_growth
from fxgrow.ir.modules import uncompiled
from fxgrow.limits import OPERATIONS
from fxgrow.program import capture
from fxgrow.schedule import Plateau, Schedule, ScheduledGrowth, Strict, Trigger, explain
from fxgrow.spec import Count, GrowthSpec


@dataclass(frozen=True)
class GrowthEvent:
    """A growth that has just happened; ``module`` and ``optimizer`` replace the ones that were passed to ``step``."""

    index: int
    """Which growth of the schedule, from 0."""
    name: str
    module: torch.nn.Module
    optimizer: torch.optim.Optimizer | None
    growth: Growth
    """With its plan and receipt."""
    step: int
    lr_factor: float
    """The scheduler's factor on the learning rate from here, all growths so far included."""
    accumulation: float
    """Multiply the micro-batches per step by this."""


class _Fired(Strict):
    growth: dict[str, Any]
    step: Count = Field(ge=0)


class _State(Strict):
    """What :meth:`GrowthScheduler.state_dict` returns."""

    version: Literal[1]
    fired: list[_Fired] = Field(max_length=OPERATIONS)
    best: float | None
    bad: Count = Field(ge=0)
    reported: Count | None


class GrowthScheduler:
    """Carries out a schedule inside a training loop.

    Args:
        schedule: anything :meth:`Schedule.parse` takes.
        args, kwargs: example inputs for :func:`fxgrow.grow`, or a callable that returns ``(args, kwargs)`` anew
            at each growth. Use a batch of at least 2, on the model's device.
        calls: further ways of calling the model, by name, as :func:`fxgrow.grow` takes them, or a callable that returns
            them; a model that is sampled from, say, is also called without targets.
        verify, consume: passed to :func:`fxgrow.grow`.
    """

    def __init__(
        self,
        schedule: Schedule | Mapping[str, Any] | list[Any] | str | Path | None,
        args: tuple[Any, ...] | Callable[[], tuple[tuple[Any, ...], dict[str, Any]]] = (),
        kwargs: dict[str, Any] | None = None,
        *,
        calls: Mapping[str, Any] | Callable[[], Mapping[str, Any]] | None = None,
        verify: Any = "auto",
        consume: bool = False,
    ) -> None:
        self.schedule = Schedule.parse(schedule)
        self._args, self._kwargs, self._calls = args, kwargs, calls
        self._verify, self._consume = verify, consume
        self._fired: list[tuple[ScheduledGrowth, int]] = []
        self._best = math.inf
        self._bad = 0
        self._reported: int | None = None

    @property
    def fired(self) -> list[ScheduledGrowth]:
        """The growths that have happened, in order."""
        return [growth for growth, _ in self._fired]

    @property
    def next(self) -> ScheduledGrowth | None:
        """The growth that is waited for; None when all have happened."""
        return self.schedule.growths[len(self._fired)] if len(self._fired) < len(self.schedule.growths) else None

    def step(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        step: int,
        tokens: int | None = None,
        epoch: float | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> GrowthEvent | None:
        """Grow if the next growth is due: call it before each training step with the counts completed so far.

        Pass ``metrics`` at the steps where they were measured, and only then. One call makes at most one growth; call
        again until it returns None where several may fall due together (metrics count once per step). A model wrapped
        by ``torch.compile`` is unwrapped; the grown module comes back uncompiled.

        Returns:
            The event, or None when nothing happened.

        Raises:
            SpecError: the trigger needs a count or a metric that was not passed.
            FxgrowError: the growth was refused or failed; ``model``, ``optimizer`` and this scheduler are unchanged.
        """
        growth = self.next
        counters = (self._best, self._bad, self._reported)
        if growth is None or not self._due(growth.trigger, step, tokens, epoch, metrics):
            return None
        index = len(self._fired)
        try:
            grown, new_optimizer = self._apply(growth, model, optimizer, verify=self._verify, consume=self._consume)
        except BaseException:
            self._best, self._bad, self._reported = counters
            raise
        self._fired.append((growth, step))
        self._best, self._bad, self._reported = math.inf, 0, step
        return GrowthEvent(
            index=index,
            name=growth.name or f"growth {index + 1}",
            module=grown.module,
            optimizer=new_optimizer,
            growth=grown,
            step=step,
            lr_factor=self.lr_factor(step),
            accumulation=growth.accumulation,
        )

    def check(self, model: torch.nn.Module) -> list[int]:
        """Plan every growth that is still to come, without making any: a mistake shows before hours of training do.

        Returns:
            The numbers of parameters: now, and after each growth.

        Raises:
            CaptureError, SpecError, GrowthRefused: of the first growth that would fail, with its place.
        """
        program = capture(uncompiled(model), *self._inputs(), **self._ways())
        sizes = [sum(p.numel() for p in program.parameters.values())]
        operations: list[Any] = []
        for number, growth in enumerate(self.schedule.growths[len(self._fired) :], len(self._fired)):
            first = len(operations)
            operations += growth.spec.operations
            try:  # all growths so far as one: a plan has no tensors that the next could start from
                plan, _ = plan_growth(program, GrowthSpec(operations=operations))
            except FxgrowError as error:
                found = re.fullmatch(r"operations\.(\d+) (\(.*)", str(error), re.DOTALL)
                where = f"operations.{int(found[1]) - first} {found[2]}" if found else str(error)
                raise reworded(error, f"growths.{number} ({growth.name or growth.trigger}): {where}") from error
            sizes.append(plan.parameters_after)
        return sizes

    def lr_factor(self, step: int) -> float:
        """Factor on the base learning rate at ``step``: the product over the growths that have happened."""
        return math.prod(growth.lr_factor(step - at) for growth, at in self._fired)

    def accumulation(self, initial: int) -> int:
        """Micro-batches per step after the growths so far, from ``initial``; never below 1."""
        value = initial
        for growth, _ in self._fired:
            value = max(1, int(value * growth.accumulation))
        return value

    def replay(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None = None
    ) -> tuple[torch.nn.Module, torch.optim.Optimizer | None]:
        """Rebuild what the growths so far make of the original model, so that a checkpoint's tensors can be loaded.

        Args:
            model: the model as it was before the first growth; its values do not matter.
            optimizer: a fresh optimizer over it, or None.

        Returns:
            The grown module and the optimizer over it, with values and state to be overwritten by the checkpoint.
        """
        for growth, _ in self._fired:
            grown, optimizer = self._apply(growth, model, optimizer, verify=False, consume=False)
            model = grown.module
        return model, optimizer

    def state_dict(self) -> dict[str, Any]:
        """Which growths have fired, with their specs, and the plateau's counters; plain JSON-able data."""
        return {
            "version": 1,
            "fired": [{"growth": growth.to_dict(), "step": step} for growth, step in self._fired],
            "best": None if math.isinf(self._best) else self._best,
            "bad": self._bad,
            "reported": self._reported,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`. What is still to come follows this scheduler's own schedule.

        Raises:
            SpecError: the growths that have already happened are not those of this schedule; nothing is changed.
        """
        version = state.get("version") if isinstance(state, Mapping) else None
        if version != 1:
            raise SpecError(f"scheduler state: version {repr(version)[:40]} is not known here; expected 1")
        try:
            read = _State.model_validate(dict(state))
        except ValidationError as error:
            raise SpecError(explain("scheduler state", error)) from None
        past = Schedule.parse([item.growth for item in read.fired]).growths
        for number, growth in enumerate(past):
            ours = self.schedule.growths[number].to_dict() if number < len(self.schedule.growths) else None
            if ours != growth.to_dict():
                raise SpecError(
                    f"growths.{number} of the schedule is not the one that this run has already made: "
                    f"it was {json.dumps(growth.to_dict())}; growths that have happened must stay as they were"
                )
        self._fired = [(growth, item.step) for growth, item in zip(past, read.fired, strict=True)]
        self._best = math.inf if read.best is None else read.best
        self._bad, self._reported = read.bad, read.reported

    def _apply(
        self, growth: ScheduledGrowth, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None, **how: Any
    ) -> tuple[Growth, torch.optim.Optimizer | None]:
        """Grow, and carry the optimizer over; neither the model nor the optimizer passed in is changed."""
        model = uncompiled(model)
        args, kwargs = self._inputs()
        policy = growth.optimizer
        carried: dict[str, Any] = {"optimizer": optimizer, "policy": policy.policy, "ramp": policy.ramp}
        grown = grow(model, growth.spec, args, kwargs, **self._ways(), **carried, **how)
        if optimizer is None:
            return grown, None
        options = {"warmup": policy.warmup, "peak": policy.peak, "ramp": policy.ramp}
        given = {name: value for name, value in options.items() if value is not None}
        return grown, grown.carry(optimizer, policy.policy, **given)

    def _ways(self) -> dict[str, Any]:
        if self._calls is None:
            return {}
        return {"calls": self._calls() if callable(self._calls) else self._calls}

    def _inputs(self) -> tuple[tuple[Any, ...], dict[str, Any] | None]:
        return self._args() if callable(self._args) else (self._args, self._kwargs)

    def _due(
        self,
        trigger: Trigger,
        step: int,
        tokens: int | None,
        epoch: float | None,
        metrics: Mapping[str, float] | None,
    ) -> bool:
        kind, number = trigger.kind, len(self._fired)
        if trigger.plateau is not None:
            return self._plateaued(trigger.plateau, step, metrics)
        value = {"step": step, "tokens": tokens, "epoch": epoch}[str(kind)]
        if value is None:
            raise SpecError(f"growths.{number} waits for {kind}, but the training loop passes no {kind}= to step()")
        return value >= getattr(trigger, str(kind))

    def _plateaued(self, plateau: Plateau, step: int, metrics: Mapping[str, float] | None) -> bool:
        _agree(None if not metrics or step == self._reported else metrics.get(plateau.metric), plateau.metric)
        if not metrics or step == self._reported:
            return False
        if plateau.metric not in metrics:
            raise SpecError(
                f"growths.{len(self._fired)} watches the metric {plateau.metric!r}, which is not reported; "
                f"{did_you_mean(plateau.metric, metrics)}"
            )
        self._reported = step
        value = float(metrics[plateau.metric])
        if value < self._best - plateau.min_delta:
            self._best, self._bad = value, 0
        else:  # NaN compares false and counts as no improvement
            self._bad += 1
        return self._bad >= plateau.patience


def _agree(value: float | None, metric: str) -> None:
    """Ranks that train one model together must grow it together.

    Raises:
        SpecError: on all of them, where they report different values.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    values: list[float | None] = [None] * dist.get_world_size()
    dist.all_gather_object(values, None if value is None else float(value))
    if len({repr(v) for v in values}) > 1:
        raise SpecError(
            f"the ranks report different values of the metric {metric!r} ({', '.join(map(str, values[:4]))}): some "
            "would grow and others not. Average it over the ranks first, and report it on each of them"
        )
