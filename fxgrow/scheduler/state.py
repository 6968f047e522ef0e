"""The state of a scheduler, as plain data: what has been done, and the metrics' counters."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, ValidationError

from fxgrow.errors import SpecError
from fxgrow.limits import OPERATIONS
from fxgrow.schedule import Event, Schedule, Strict, explain
from fxgrow.scheduler.progress import Watch
from fxgrow.scheduler.standing import Done
from fxgrow.spec import Count


class _Past(Strict):
    """An event of which something has been done: the step of each of its actions, and why some were left out."""

    event: dict[str, Any]
    steps: list[Count] = Field(min_length=1, max_length=OPERATIONS)
    errors: dict[str, str] = Field(default_factory=dict)
    rates: dict[str, float] = Field(default_factory=dict)


class _Counters(Strict):
    """Of a plateau, see :class:`~fxgrow.scheduler.progress.Watch`."""

    best: float | None
    bad: Count = Field(ge=0)
    reported: Count | None


class _State(_Counters):
    version: Literal[2]
    done: list[_Past] = Field(max_length=OPERATIONS)
    latest: dict[str, float]
    seconds: float = Field(ge=0)
    step: Count = Field(ge=0)


class _Fired(Strict):
    growth: dict[str, Any]
    step: Count = Field(ge=0)


class _State1(_Counters):
    """As fxgrow 0.1 wrote it."""

    version: Literal[1]
    fired: list[_Fired] = Field(max_length=OPERATIONS)


def written(events: Sequence[Event], done: Sequence[Done], watch: Watch, seconds: float, step: int) -> dict[str, Any]:
    """Plain JSON-able data that :func:`read` reads back."""
    past: dict[int, dict[str, Any]] = {}
    for each in done:
        entry = past.setdefault(
            each.event, {"event": events[each.event].to_dict(), "steps": [], "errors": {}, "rates": {}}
        )
        entry["steps"].append(each.step)
        if each.error:
            entry["errors"][str(each.number)] = each.error
        if each.rate is not None:
            entry["rates"][str(each.number)] = each.rate
    return {
        "version": 2,
        "done": list(past.values()),
        "best": _finite(watch.best),
        "bad": watch.bad,
        "reported": watch.reported,
        "latest": {k: v for k, value in watch.latest.items() if (v := _finite(value)) is not None},
        "seconds": seconds,
        "step": step,
    }


def _finite(value: float) -> float | None:
    """A metric as JSON has it; None where it is below nothing, as if it had not been reported."""
    if value == -math.inf:
        return -sys.float_info.max
    return value if math.isfinite(value) else None


def _read_back(value: float) -> float:
    return -math.inf if value == -sys.float_info.max else value


def read(state: Mapping[str, Any], events: Sequence[Event]) -> tuple[list[Done], Watch, float, int]:
    """What has been done of a schedule's events, the counters, the seconds that have passed, and the last step.

    Raises:
        SpecError: it is no state, or what has been done is not in the schedule.
    """
    version = state.get("version") if isinstance(state, Mapping) else None
    if isinstance(version, bool) or version not in (1, 2):
        raise SpecError(f"scheduler state: version {repr(version)[:40]} is not known here; expected 2")
    try:
        found = _from_1(_State1.model_validate(dict(state))) if version == 1 else _State.model_validate(dict(state))
    except ValidationError as error:
        raise SpecError(explain("scheduler state", error)) from None
    past = Schedule.parse([item.event for item in found.done]).events
    done: list[Done] = []
    for number, (event, item) in enumerate(zip(past, found.done, strict=True)):
        ours = events[number].to_dict() if number < len(events) else None
        if ours != event.to_dict():
            raise SpecError(
                f"events.{number} of the schedule is not the one that this run has already made: "
                f"it was {json.dumps(event.to_dict())}; events that have happened must stay as they were"
            )
        actions, some = event.actions, len(item.steps)
        if some > len(actions) or (some < len(actions) and number + 1 < len(past)):
            raise SpecError(f"scheduler state: {some} of the {len(actions)} actions of events.{number} were done")
        for which, step in enumerate(item.steps):
            key = str(which)
            done.append(Done(number, which, actions[which], step, item.errors.get(key, ""), item.rates.get(key)))
    best = math.inf if found.best is None else _read_back(found.best)
    latest = {name: _read_back(value) for name, value in found.latest.items()}
    return done, Watch(best, found.bad, found.reported, latest), found.seconds, found.step


def _from_1(state: _State1) -> _State:
    past = Schedule.parse({"version": 1, "growths": [item.growth for item in state.fired]}).events
    done = [
        {"event": event.to_dict(), "steps": [item.step] * len(event.actions)}
        for event, item in zip(past, state.fired, strict=True)
    ]
    counters: dict[str, Any] = {"best": state.best, "bad": state.bad, "reported": state.reported}
    last = max((item.step for item in state.fired), default=0)
    more = {"latest": {}, "seconds": 0.0, "step": last}
    return _State.model_validate({"version": 2, "done": done, **more, **counters})


__all__ = ["read", "written"]
