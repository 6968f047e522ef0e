"""Files as this version writes them, for later versions to read: ``python -m tests.formats FOLDER`` makes them.

``tests/fixtures/formats-0.1`` was made so, ``formats-0.1-events`` when schedules got events. They are not made again:
what writes something else gets a folder of its own beside them, and :mod:`tests.test_formats` reads them all.

    spec.yaml, spec.json             one spec with every operation and most keys
    schedule.yaml, schedule.json     one schedule with every trigger and policy
    plan-*.json                      plans with every kind of change, stages, and a buffer that is continued
    checkpoint/                      fxgrow.save of a growth: manifest, tensors and examples
    run/                             fxgrow.training's folder in the middle of a run, just after a growth
    expected.json                    what their readers have to find
"""

from __future__ import annotations

import io
import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

import fxgrow
from fxgrow import training
from tests import plans
from tests.zoo.zoo import trained

SPEC: dict[str, Any] = {
    "version": 1,
    "operations": [
        {
            "op": "widen",
            "axis": "transformer.h.*.mlp/hidden",
            "factor": 2,
            "split": "even",
            "noise": {"kind": "antisymmetric", "scale": 0.1, "relative": True, "distribution": "bytes", "seed": 3},
        },
        {"op": "widen", "axis": "*/hidden", "by": 6, "fill": "add", "fan_in": "random", "fan_out": "paired", "seed": 5},
        {"op": "widen", "axis": "*/residual", "to": 48, "split": "uneven", "preserve": "approximate"},
        {"op": "extend", "axis": "*/vocab", "by": 7, "init": "random", "seed": 1},
        {"op": "deepen", "stack": "transformer.h", "after": [0, 1], "order": "interleave", "init": "gate"},
        {"op": "insert", "layer": "conv", "after": "features.4", "kernel_size": 3, "activation": "none", "bias": False},
    ],
}
SCHEDULE: dict[str, Any] = {
    "version": 2,
    "events": [
        {
            "name": "hidden",
            "trigger": {"step": 4},
            "operations": [
                {"op": "widen", "axis": "./hidden", "factor": 2, "noise": {"scale": 0.1, "seed": 2}},
                {"op": "learning_rate", "rewarm": 5, "from": 0.3},
                {"op": "accumulation", "factor": 2},
            ],
            "optimizer": {"policy": "asymmetric", "warmup": 8, "peak": 1.5},
        },
        {
            "trigger": {"tokens": 5000},
            "operations": [{"op": "widen", "axis": "./hidden", "by": 2, "fill": "add"}],
            "optimizer": "copy",
        },
        {
            "trigger": {"epoch": 90},
            "operations": [{"op": "widen", "axis": "./hidden", "factor": 1.5}, {"op": "learning_rate", "scale": 0.5}],
            "optimizer": {"policy": "exact", "ramp": 10},
        },
        {
            "trigger": {"plateau": {"metric": "val_loss", "patience": 3, "min_delta": 0.01}},
            "operations": [{"op": "widen", "axis": "./hidden", "factor": 2}],
            "optimizer": "reset",
        },
    ],
}
#: cases of :mod:`tests.plans` whose plans are kept as they are written
PLANS = ("autoencoder", "insert-then-widen", "rotary-tables-extend", "encoder-decoder")


class Kept(nn.Module):
    """Ties, a batch norm, dropout, an input in a mapping, an option, and a path that sizes choose."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.up, self.norm = nn.Embedding(7, 4), nn.Linear(4, 6), nn.BatchNorm1d(6)
        self.out, self.head, self.drop = nn.Linear(6, 4), nn.Linear(4, 7, bias=False), nn.Dropout(0.1)
        self.head.weight = self.emb.weight

    def forward(self, batch: dict[str, Tensor], double: bool = False) -> dict[str, Tensor]:
        x = self.emb(batch["idx"])
        x = x[:, -3:] if x.shape[1] > 4 else x
        h = torch.relu(self.norm(self.up(x).transpose(1, 2)).transpose(1, 2))
        y = self.head(self.out(self.drop(h)))
        return {"logits": 2 * y if double else y, "mean": h.mean((0, 1))[:1] * 0 + y.mean()}


class Net(nn.Module):
    """What the kept run trains; ``(prediction, loss)``."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.drop = nn.Linear(3, 4), nn.Linear(4, 1), nn.Dropout(0.1)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        out = self.down(self.drop(torch.tanh(self.up(x))))
        return out, F.mse_loss(out, y)


def _batches(split: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x = torch.randn(8, 3, generator=generator, dtype=torch.float64)
    return x, x.prod(1, keepdim=True)


def run(out: Path, **how: Any) -> training.Run:
    """Train :class:`Net` by :data:`SCHEDULE`, or go on doing so."""
    torch.manual_seed(0)
    hyper = training.Hyper(steps=12, warmup=3, eval_every=4, log_every=1, learning_rate=0.02)
    task = training.Task(Net().double(), _batches, hyper, SCHEDULE, epoch_tokens=96)
    return training.train(task, out, console=Console(file=io.StringIO(), width=200), **how)


def write(folder: Path) -> None:
    """Everything of the module's docstring, with this version of fxgrow."""
    folder.mkdir(parents=True)
    for name, data in (("spec", SPEC), ("schedule", SCHEDULE)):
        (folder / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    for name in PLANS:
        plan = plans.plans_of(plans.CASES[name])[-1]
        (folder / f"plan-{name}.json").write_text(plan.to_json() + "\n", encoding="utf-8")
    torch.manual_seed(0)
    noisy = {"op": "widen", "axis": "0.weight:0", "factor": 2, "noise": {"scale": 0.1}}
    chain = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))
    twice = fxgrow.GrowthSpec.parse([noisy, noisy])
    plan, _ = fxgrow.plan_growth(fxgrow.capture(chain, (torch.zeros(2, 2),)), twice)
    (folder / "plan-stages.json").write_text(plan.to_json() + "\n", encoding="utf-8")
    batch = {"idx": torch.randint(7, (2, 3))}
    growth = fxgrow.grow(
        trained(Kept()),
        {"op": "widen", "axis": "emb.weight:1", "factor": 2},
        calls={"plain": (batch,), "double": (batch, True), "long": ({"idx": torch.randint(7, (2, 6))},)},
    )
    fxgrow.save(growth, folder / "checkpoint")
    run(folder / "run", stop_at=6)
    with tempfile.TemporaryDirectory() as elsewhere:
        finished = run(Path(elsewhere))
    expected = {
        "parameters": {n: list(p.shape) for n, p in growth.module.named_parameters()},
        "val_loss": finished.val_loss,
        "sum": sum(float(p.detach().abs().sum()) for p in finished.model.parameters()),
    }
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    write(Path(sys.argv[1]))
