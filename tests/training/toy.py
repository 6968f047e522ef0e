"""A small net that trains in no time, and what its runs are compared by."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from fxgrow import training
from fxgrow.training import Hyper, Run, Task, read_log, train


class Net(nn.Module):
    """Two layers and dropout; returns (prediction, loss) like the example GPT."""

    def __init__(self, hidden: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(3, hidden), nn.Linear(hidden, 1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        out = self.down(self.dropout(torch.tanh(self.up(x))))
        return out, F.mse_loss(out, y)


def batches(split: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x = torch.randn(8, 3, generator=generator, dtype=torch.float64)
    return x, x.prod(1, keepdim=True)


def make(hidden: int = 4, dropout: float = 0.0, schedule: Any = None, **hyper: Any) -> Task:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"steps": 12, "warmup": 3, "eval_every": 4, "log_every": 1, "learning_rate": 0.02}
    return Task(
        Net(hidden, dropout).double(), batches, Hyper(**settings | hyper), schedule, epoch_tokens=96, in_place=False
    )


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def run(task: Task, out: Path, **how: Any) -> Run:
    return train(task, out, console=quiet(), **how)


WIDEN = {"op": "widen", "axis": "./hidden", "factor": 2}


def close(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """The same but for how matrix products order their sums, which may differ from call to call."""
    return left.keys() == right.keys() and all(
        torch.allclose(left[name], right[name], rtol=1e-9, atol=1e-12) for name in left
    )


def same(a: nn.Module, b: nn.Module) -> bool:
    return close(a.state_dict(), b.state_dict())


def assert_same_losses(left: Path, right: Path) -> None:
    ours, theirs = losses(left), losses(right)
    assert [row[:2] for row in ours] == [row[:2] for row in theirs]
    for a, b in zip(ours, theirs, strict=True):
        for x, y in zip(a[2:], b[2:], strict=True):
            assert x == y if x is None else x == pytest.approx(y, rel=1e-9)


def losses(out: Path) -> list[tuple[Any, ...]]:
    return [
        (line["event"], line["step"], line.get("loss"), line.get("val_loss"), line.get("train_loss"))
        for line in read_log(out / "log.jsonl")
        if line["event"] in ("step", "eval", "growth")
    ]


GROWTHS: list[dict[str, Any]] = [
    {
        "trigger": {"step": 5},
        "operations": [
            {"op": "learning_rate", "rewarm": 4, "from": 0.1},
            {"op": "accumulation", "factor": 2},
            WIDEN,
        ],
    },
    {"trigger": {"plateau": {"patience": 1}}, "operations": [WIDEN], "optimizer": "copy"},
]


def assert_same_optimizer(left: torch.optim.Optimizer, right: torch.optim.Optimizer) -> None:
    ours: dict[str, Tensor] = {}
    theirs: dict[str, Tensor] = {}
    packed = [training.pack(o.state_dict(), "o", t) for o, t in ((left, ours), (right, theirs))]
    assert json.dumps(packed[0]) == json.dumps(packed[1])
    assert ours and close(ours, theirs)
