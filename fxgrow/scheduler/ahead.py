"""What a schedule compiles ahead of need."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from fxgrow.ahead import Ahead
from fxgrow.schedule import Grow, LoraMerge, Schedule
from fxgrow.warn import warn

Place = tuple[int, int]


class AheadOfSchedule:
    """The background process of the growth that comes next; one at a time.

    Args:
        wanted: whether, or with which options of ``torch.compile``.
    """

    def __init__(self, wanted: bool | Mapping[str, Any]) -> None:
        self.options: dict[str, Any] = {} if isinstance(wanted, bool) else dict(wanted)
        # the processes of one machine share the cache
        self._wanted = wanted is not False and os.environ.get("LOCAL_RANK", "0") == "0"
        self._place: Place | None = None
        self.running: Ahead | None = None

    def coming(self, schedule: Schedule, following: Place) -> tuple[Place, Grow | None]:
        """The next growth, from an action on; None where there is none to begin with: it is begun, or what comes
        before it changes the model's parts.
        """
        if not self._wanted:
            return following, None
        for number in range(following[0], len(schedule.events)):
            for which, action in enumerate(schedule.events[number].actions):
                if (number, which) < following:
                    continue
                if isinstance(action, LoraMerge):
                    return (number, which), None
                if isinstance(action, Grow):
                    return (number, which), None if self._place == (number, which) else action
        return following, None

    def start(self, place: Place, begin: Callable[[], Ahead]) -> None:
        """Begin to compile the growth at a place; once."""
        self.stop()
        self._place = place
        try:
            self.running = begin()
        except Exception as error:  # whatever pickling the user's model raises
            warn(f"the next growth is not compiled ahead: {type(error).__name__}: {error}")

    def stop(self) -> None:
        """End the process, done or not: what it has compiled stays in the cache."""
        running, self.running = self.running, None
        if running is None:
            return
        if not running.wait(0):
            running.stop()
        elif running.error:
            warn(f"the growth was not compiled ahead: {running.error}")


__all__ = ["AheadOfSchedule"]
