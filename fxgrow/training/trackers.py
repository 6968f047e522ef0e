"""Where else a run is written to: TensorBoard if it is installed, and a Weights & Biases run if one is active."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol


class Tracker(Protocol):
    """Takes the lines of a log."""

    def write(self, event: str, step: int, numbers: Mapping[str, float], text: str) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in the folder ``tensorboard`` of a run."""

    def __init__(self, out: Path) -> None:
        board = importlib.import_module("torch.utils.tensorboard")  # needs tensorboard, which fxgrow does not
        self._writer = board.SummaryWriter(str(out / "tensorboard"))

    def write(self, event: str, step: int, numbers: Mapping[str, float], text: str) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(f"{event}/{name}", value, step)
        if text:
            self._writer.add_text(event, text, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """The active run of ``wandb``: this process, or the task, has called ``wandb.init``."""

    def __init__(self, run: Any) -> None:
        self._run = run

    def write(self, event: str, step: int, numbers: Mapping[str, float], text: str) -> None:
        self._run.log({"step": step, **{f"{event}/{n}": v for n, v in numbers.items()}})
        if text:
            self._run.summary[f"{event} at step {step}"] = text

    def close(self) -> None:
        """The run belongs to whoever began it."""


def trackers(out: Path) -> list[Tracker]:
    """Those that are there."""
    found: list[Tracker] = []
    if importlib.util.find_spec("tensorboard") is not None:
        found.append(TensorBoard(out))
    active = getattr(sys.modules.get("wandb"), "run", None)
    if active is not None:
        found.append(WeightsAndBiases(active))
    return found


def track(to: list[Tracker], event: str, line: Mapping[str, Any]) -> None:
    """Hand a line of the log on: its numbers, and what a schedule did as text."""
    step = line.get("step")
    if not to or step is None:
        return
    numbers = {k: float(v) for k, v in line.items() if k != "step" and type(v) in (int, float)}
    text = ""
    if event in ("growth", "action", "skipped"):
        kept = {k: line[k] for k in ("name", "op", "trigger", "what", "before", "after", "error") if k in line}
        text = json.dumps(kept)
    for tracker in to:
        tracker.write(event, int(step), numbers, text)
