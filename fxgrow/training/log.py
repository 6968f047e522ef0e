"""The log of a run: ``log.jsonl``."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any, TextIO

from fxgrow.errors import DiskError
from fxgrow.publish import clean, replacing
from fxgrow.scheduler import ActionResult
from fxgrow.training.counting import count_parameters
from fxgrow.training.run import Run
from fxgrow.training.trackers import track, trackers


class Log:
    """JSON lines, flushed one by one.

    A new log replaces an old one. ``append`` goes on after its last line; ``resumed`` goes on after the lines that a
    checkpoint knows of: what came after them is done, and written, again.

    Attributes:
        lines: how many there are.
    """

    def __init__(self, path: Path, *, append: bool = False, resumed: Run | None = None) -> None:
        kept: list[str] = []
        if (append or resumed is not None) and path.is_file():
            # a crash or a full disk may have cut the last line short
            text = path.read_text(encoding="utf-8", errors="replace")
            kept = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
        if resumed is not None:
            kept = kept[: lines_until(kept, resumed.step) if resumed.log_lines is None else resumed.log_lines]
        try:
            clean(path.parent, path.name)
            with replacing(path) as new:  # a crash in between leaves the old one
                new.write_text("".join(kept), encoding="utf-8")
            self._file: TextIO = path.open("a", encoding="utf-8")
        except OSError as error:
            raise DiskError(f"{path} cannot be written: {error}") from error
        self.lines = len(kept)
        self._trackers = trackers(path.parent)

    def write(self, event: str, **fields: Any) -> None:
        """Write a line, and tell the trackers that are there."""
        try:
            self._file.write(json.dumps({"event": event, **fields}) + "\n")
            self._file.flush()
        except OSError as error:
            raise DiskError(f"{self._file.name} cannot be written: {error}") from error
        self.lines += 1
        track(self._trackers, event, fields)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what could not be written was said
            self._file.close()
        for tracker in self._trackers:
            tracker.close()


class Silent(Log):
    """The log of a rank that leaves it to the first one."""

    def __init__(self) -> None:
        self.lines = 0

    def write(self, event: str, **fields: Any) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def lines_until(lines: list[str], step: int) -> int:
    """How many lines a log had at the checkpoint of a step, that checkpoint's own included."""
    for number in range(len(lines), 0, -1):
        with contextlib.suppress(json.JSONDecodeError):  # the line a crash cut short
            line = json.loads(lines[number - 1])
            if line["event"] == "checkpoint" and line["step"] == step:
                return number
    return 0


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a ``log.jsonl``."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def standing(run: Run) -> dict[str, Any]:
    """Where a run is, for the log."""
    return {
        "step": run.step,
        "tokens": run.tokens,
        "flops": run.flops,
        "parameters": count_parameters(run.model),
        "seconds": round(run.seconds, 3),
    }


def action_line(run: Run, done: ActionResult) -> dict[str, Any]:
    """What the log says of an action of the schedule."""
    return {**done.to_dict(), **standing(run), "accumulation": run.accumulation}


def growth_line(run: Run, done: ActionResult, loss_before: float) -> dict[str, Any]:
    """What the log says of a growth; it ``took`` capture, planning, new tensors, verification and the optimizer."""
    return {
        **action_line(run, done),
        "parameters_before": done.before["parameters"],
        "val_loss_before": loss_before,
        "val_loss_after": run.val_loss,
        "moved": abs(run.val_loss - loss_before),
    }
