"""The log of a run: ``log.jsonl``."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from typing import Any, TextIO

from fxgrow.scheduler import GrowthEvent
from fxgrow.training.counting import count_parameters
from fxgrow.training.run import Run


class Log:
    """JSON lines, flushed one by one.

    A new log replaces an old one. ``append`` goes on after its last line; with ``resumed`` the lines after that run's
    checkpoint, which it will write again, are cut off first.
    """

    def __init__(self, path: Path, *, append: bool = False, resumed: Run | None = None) -> None:
        kept: list[str] = []
        if resumed is not None and path.is_file():
            for text in path.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(json.JSONDecodeError):  # the line a crash cut short
                    line = json.loads(text)
                    redone = line["event"] in ("eval", "growth") and line["step"] >= resumed.step
                    if not redone and line.get("step", math.inf) <= resumed.step and line["event"] not in _LAST:
                        kept.append(text + "\n")
        self._file: TextIO = path.open("a" if append else "w", encoding="utf-8")
        self._file.writelines(kept)

    def write(self, event: str, **fields: Any) -> None:
        self._file.write(json.dumps({"event": event, **fields}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


_LAST = ("end", "sample", "strict_load")  # what only a finished run has


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


def growth_line(run: Run, event: GrowthEvent, before: int, loss_before: float, seconds: float) -> dict[str, Any]:
    """What the log says of a growth; ``seconds`` is capture, planning, new tensors, verification and the optimizer."""
    growth, receipt = run.scheduler.fired[event.index], event.growth.receipt
    return {
        **standing(run),
        "index": event.index,
        "name": event.name,
        "trigger": str(growth.trigger),
        "growth": growth.to_dict(),
        "parameters_before": before,
        "val_loss_before": loss_before,
        "val_loss_after": run.val_loss,
        "moved": abs(run.val_loss - loss_before),
        "error_float64": getattr(receipt, "error_float64", None),
        "error_native": getattr(receipt, "error_native", None),
        "grow_seconds": round(seconds, 3),
        "accumulation": run.accumulation,
    }
