"""TensorBoard and Weights & Biases, by stand-ins: neither is needed here."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fxgrow.training import trackers
from tests.training.toy import GROWTHS, make, run


class Writer:
    """Of TensorBoard."""

    made: list[Writer]

    def __init__(self, folder: str) -> None:
        self.folder, self.scalars, self.texts, self.closed = folder, [], [], False
        Writer.made.append(self)

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.scalars.append((tag, value, step))

    def add_text(self, tag: str, text: str, step: int) -> None:
        self.texts.append((tag, json.loads(text), step))

    def flush(self) -> None: ...

    def close(self) -> None:
        self.closed = True


@pytest.mark.usefixtures("by_hand")
def test_lines_of_the_log_go_to_the_trackers_that_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Writer.made = []
    logged: list[dict[str, Any]] = []
    active = SimpleNamespace(log=logged.append, summary={})
    real = trackers.importlib.util.find_spec
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda n: n == "tensorboard" or real(n))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(run=active))  # type: ignore[arg-type]
    run(make(schedule=GROWTHS[:1]), tmp_path)
    (writer,) = Writer.made
    assert writer.folder == str(tmp_path / "tensorboard") and writer.closed
    steps = [(value, step) for tag, value, step in writer.scalars if tag == "step/loss"]
    lines = [json.loads(text) for text in (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert steps == [(x["loss"], x["step"]) for x in lines if x["event"] == "step"]
    assert [(tag, said["op"], step) for tag, said, step in writer.texts] == [
        ("action", "learning_rate", 5),
        ("action", "accumulation", 5),
        ("growth", "grow", 5),
    ]
    losses = {x["step"]: x["step/loss"] for x in logged if "step/loss" in x}
    assert losses == {step: value for value, step in steps}
    assert json.loads(active.summary["growth at step 5"])["name"] == "event 1"


def test_none_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(run=None))  # type: ignore[arg-type]
    assert trackers.trackers(tmp_path) == []
