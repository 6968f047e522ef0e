"""How far a run is, and whether an event is due: counts, and metrics as all ranks report them together."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

from fxgrow.errors import SpecError, did_you_mean
from fxgrow.schedule import Plateau, Trigger


class Partial(dict[str, float]):
    """A report of some metrics, by a loop that measures others at other steps."""


@dataclass(frozen=True)
class Progress:
    """What a training loop has completed."""

    step: int
    tokens: float | None = None
    epoch: float | None = None
    seconds: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass
class Watch:
    """What is remembered of the metrics that a trigger watches, since the last event.

    Attributes:
        best, bad: the lowest value, and how many reports have not been lower since.
        reported: the step of the last report; a report counts once.
        latest: the last values.
    """

    best: float = math.inf
    bad: int = 0
    reported: int | None = None
    latest: dict[str, float] = field(default_factory=dict)

    def due(self, trigger: Trigger, progress: Progress, place: str) -> bool:
        """Whether all that a trigger waits for holds.

        Raises:
            SpecError: a count or a metric that it needs is not passed, or not by all ranks.
        """
        self._take(trigger, progress, place)
        for kind, value in trigger.counts.items():
            reached = getattr(progress, kind)
            if kind == "seconds":
                reached = first_rank(reached)
            if reached is None:
                raise SpecError(f"{place} waits for {kind}, but the training loop passes no {kind}= to step()")
            if reached < value:
                return False
        if trigger.plateau is not None and self.bad < trigger.plateau.patience:
            return False
        below = trigger.below
        return below is None or self.latest.get(below.metric, math.inf) < below.value

    def _take(self, trigger: Trigger, progress: Progress, place: str) -> None:
        """Note a report, once, as its mean over all ranks."""
        again = progress.step == self.reported
        values = {}
        for metric in trigger.metrics:
            value = mean_over_ranks(None if again else _measured(progress.metrics, metric, place), metric)
            if again or not progress.metrics:
                continue
            if value is None and isinstance(progress.metrics, Partial):
                continue
            if value is None:
                raise SpecError(
                    f"{place} watches the metric {metric!r}, which is not reported; "
                    f"{did_you_mean(metric, [str(n) for n, v in progress.metrics.items() if v is not None])}"
                )
            values[metric] = value
        if values:
            self.reported = progress.step
            self.latest |= values
            if trigger.plateau is not None and trigger.plateau.metric in values:
                self._count(trigger.plateau, values[trigger.plateau.metric])

    def _count(self, plateau: Plateau, value: float) -> None:
        if value < self.best - plateau.min_delta:
            self.best, self.bad = value, 0
        else:  # NaN compares false and counts as no improvement
            self.bad += 1


def whole(value: Any, what: str) -> int:
    """A count as a plain number, whatever holds it.

    Raises:
        SpecError: it is none of 0 or more.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = -1
    if number < 0:
        raise SpecError(f"{what}={value!r} is no whole number of 0 or more")
    return number


def amount(value: Any, what: str) -> float | None:
    """What has been completed of something, as a plain number, whatever holds it; None where it is not passed.

    Raises:
        SpecError: it is no number of 0 or more, such as NaN, which any trigger would have reached.
    """
    number = None if value is None else _number(value)
    if value is not None and (number is None or not 0 <= number < math.inf):
        raise SpecError(f"{what}={value!r:.80} is no number of 0 or more")
    return number


def named(metrics: Any) -> Mapping[str, float]:
    """Metrics by name; none where they are not passed.

    Raises:
        SpecError: they are no mapping.
    """
    if metrics is not None and not isinstance(metrics, Mapping):
        raise SpecError(f"metrics={metrics!r:.80} is no mapping from names to numbers")
    return {} if metrics is None else metrics


def _measured(metrics: Mapping[str, float], name: str, place: str) -> float | None:
    """A metric as a number; None where it is not reported."""
    value = metrics.get(name)
    number = None if value is None else _number(value)
    if value is not None and number is None:
        raise SpecError(f"{place} watches the metric {name!r}, and {value!r:.80} is no number")
    return number


def _number(value: Any) -> float | None:
    """A value as a number, whatever holds it; None where it is none."""
    try:
        return None if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return None


def _gathered(value: Any) -> list[Any] | None:
    """A value of every rank; None where there is one rank only."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return None
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def mean_over_ranks(value: float | None, metric: str) -> float | None:
    """Ranks that train one model together must grow it together: all decide by the mean of what they measured.

    Raises:
        SpecError: on all of them, where some report the metric and others do not.
    """
    values = _gathered(None if value is None else float(value))
    if values is None:
        return None if value is None else float(value)
    missing = [rank for rank, v in enumerate(values) if v is None]
    if missing and len(missing) < len(values):
        raise SpecError(
            f"ranks {missing[:4]} do not report the metric {metric!r} at this step, and the others do: some would "
            "grow and others not. Report it on every rank, at the same steps"
        )
    return None if missing else math.fsum(values) / len(values)


def first_rank(value: float | None) -> float | None:
    """The first rank's value: clocks differ."""
    values = _gathered(value)
    return value if values is None else values[0]


__all__ = ["Partial", "Progress", "Watch", "amount", "first_rank", "mean_over_ranks", "named", "whole"]
