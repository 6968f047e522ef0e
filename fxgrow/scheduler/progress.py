"""How far a run is, and whether an event is due: counts, and metrics as all ranks report them together."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fxgrow.errors import RankError, SpecError, did_you_mean
from fxgrow.ranks import ALONE, Group, shared
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

    def due(self, trigger: Trigger, progress: Progress, place: str, group: Group = ALONE) -> bool:
        """Whether all that a trigger waits for holds.

        Args:
            group: ranks that train one model together. What was measured, and the clock, are those of all ranks in any
                case.

        Raises:
            SpecError: a count or a metric that it needs is not passed, or not by all ranks.
            RankError: a count is reached on some ranks only.
        """
        if group is ALONE and (trigger.metrics or trigger.seconds is not None):
            group = None
        reports = shared(f"{place} at step {progress.step}", lambda: self._report(trigger, progress, place), group)
        self._take(trigger, progress, place, [values for values, _ in reports])
        reached = {kind: [counts[kind] >= value for _, counts in reports] for kind, value in trigger.counts.items()}
        if "seconds" in reached:
            reached["seconds"] = reached["seconds"][:1]  # clocks differ
        for kind, ranks in reached.items():
            if len(set(ranks)) > 1:
                raise RankError(
                    f"{place}: so many {kind} are completed on ranks {_where(ranks)}, and not on the others, at step "
                    f"{progress.step}: pass the same {kind}= on all ranks, such as the sum over them"
                )
        if not all(ranks[0] for ranks in reached.values()):
            return False
        if trigger.plateau is not None and self.bad < trigger.plateau.patience:
            return False
        below = trigger.below
        return below is None or self.latest.get(below.metric, math.inf) < below.value

    def _report(
        self, trigger: Trigger, progress: Progress, place: str
    ) -> tuple[dict[str, float | None], dict[str, float]]:
        """What this rank has measured of what a trigger watches, and completed of what it waits for."""
        again = progress.step == self.reported
        values = {m: None if again else _measured(progress.metrics, m, place) for m in trigger.metrics}
        counts = {}
        for kind in trigger.counts:
            counts[kind] = getattr(progress, kind)
            if counts[kind] is None:
                raise SpecError(f"{place} waits for {kind}, but the training loop passes no {kind}= to step()")
        return values, counts

    def _take(
        self, trigger: Trigger, progress: Progress, place: str, ranks: Sequence[Mapping[str, float | None]]
    ) -> None:
        """Note a report, once, as its mean over all ranks."""
        again = progress.step == self.reported
        values = {}
        for metric in trigger.metrics:
            value = _mean([each[metric] for each in ranks], metric)
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


def _mean(values: Sequence[float | None], metric: str) -> float | None:
    """Ranks that train one model together must grow it together: all decide by the mean of what they measured.

    Raises:
        SpecError: on all of them, where some report the metric and others do not.
    """
    found = [v for v in values if v is not None]
    if found and len(found) < len(values):
        raise SpecError(
            f"ranks {_where([v is None for v in values])} do not report the metric {metric!r} at this step, and the "
            "others do: some would grow and others not. Report it on every rank, at the same steps"
        )
    return math.fsum(found) / len(found) if found else None


def _where(ranks: Sequence[bool]) -> list[int]:
    return [rank for rank, here in enumerate(ranks) if here][:4]


__all__ = ["Partial", "Progress", "Watch", "amount", "named", "whole"]
