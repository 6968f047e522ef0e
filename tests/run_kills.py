"""Kill a run that grows, at random moments, until it is through: ``python -m tests.run_kills --kills 200``.

Each process goes on where the one before was killed (SIGKILL). In the end weights, optimizer and losses must be to the
bit those of a run that nobody killed, and its log must have the same lines. The run saves a checkpoint after every step
and grows twice; its schedule changes the learning rate, the batch, dropout and what learns as well.
"""

from __future__ import annotations

import argparse
import io
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn

from fxgrow.training import Hyper, Run, Task, read_log, train

STEPS = 24
HIDDEN = {"op": "widen", "axis": "*/hidden", "factor": 2, "noise": {"scale": 0.1}}
SCHEDULE: list[dict[str, Any]] = [
    {
        "trigger": {"step": 6},
        "operations": [{"op": "accumulation", "factor": 2}, HIDDEN, {"op": "checkpoint"}, {"op": "dropout", "p": 0.3}],
        "optimizer": {"policy": "asymmetric", "warmup": 5},
    },
    {
        "trigger": {"step": 13},
        "operations": [
            {"op": "learning_rate", "rewarm": 6, "from": 0.1},
            HIDDEN,
            {"op": "checkpoint"},
            {"op": "evaluate"},
            {"op": "freeze", "what": "0.bias"},
        ],
        "optimizer": {"policy": "exact", "ramp": 4},
    },
    {"trigger": {"plateau": {"patience": 1}}, "operations": [{"op": "unfreeze"}, {"op": "weight_decay", "set": 0.0}]},
]


@dataclass
class Outcome:
    """What was found: how often it was killed, and what differs from a run that nobody killed."""

    kills: int = 0
    wrong: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.kills} kills: {len(self.wrong)} differences"


def batches(split: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x = torch.randn(8, 3, generator=generator, dtype=torch.float64)
    return x, x.prod(1, keepdim=True)


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def go_on(out: Path) -> Run:
    """Train from the newest checkpoint on, or from the start."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.1), nn.Linear(4, 1)).double()
    hyper = Hyper(
        steps=STEPS, warmup=3, eval_every=4, log_every=1, learning_rate=0.02, checkpoint_every=1, keep_checkpoints=3
    )
    task = Task(net, batches, hyper, SCHEDULE, loss=loss, example=lambda batch: ((batch[0],), {}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return train(task, out, resume=True, console=Console(file=io.StringIO(), width=200))


def picture(out: Path) -> dict[str, Any]:
    """What has to be the same in two runs: the tensors of the last checkpoint, and the log without its clocks."""
    newest = out / "checkpoints" / (out / "checkpoints" / "latest").read_text(encoding="utf-8")
    files = {n: load_file(newest / n) for n in ("model.safetensors", "optimizer.safetensors")}
    clocks = ("seconds", "took", "path")
    lines = [{k: v for k, v in x.items() if k not in clocks} for x in read_log(out / "log.jsonl")]
    return {**files, "log": [x for x in lines if x["event"] != "resume"]}


def difference(expected: Any, got: Any, close: float) -> str:
    """The first line in which two logs differ, or the first tensor; "" where nothing does."""
    if isinstance(expected, list):
        for a, b in zip(expected, got, strict=False):
            if not same(a, b, close):
                return f"{a} became {b}"
        return "" if len(expected) == len(got) else f"{len(expected)} lines became {len(got)}"
    if expected.keys() != got.keys():
        return f"other tensors: {min(expected.keys() ^ got.keys())}"
    return next((name for name, tensor in expected.items() if not same(tensor, got[name], close)), "")


def same(a: Any, b: Any, close: float) -> bool:
    """Whether two values are alike, floats up to a relative difference."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(v, b[k], close) for k, v in a.items())
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and bool(torch.isclose(a, b, rtol=close, atol=close).all())
    return math.isclose(a, b, rel_tol=close, abs_tol=close) if type(a) is type(b) is float else bool(a == b)


def run(kills: int, seed: int, *, close: float = 0.0, verbose: bool = False) -> Outcome:
    """Kill a run so many times, and more where it is through before that: then another one begins.

    Args:
        close: floats may differ by this: a matrix product can order its sums otherwise, by where its operands lie.
    """
    torch.set_num_threads(1)
    rng, found = random.Random(seed), Outcome()
    folder = Path(tempfile.mkdtemp(prefix="fxgrow-run-kills-"))
    try:
        start = time.perf_counter()
        go_on(folder / "whole")
        usual = time.perf_counter() - start
        expected = picture(folder / "whole")
        number = 0
        while found.kills < kills or (folder / f"run-{number}").exists():
            out = folder / f"run-{number}"
            process = os.fork()
            if process == 0:
                try:
                    go_on(out)
                    os._exit(0)
                except BaseException as error:
                    print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
                finally:
                    os._exit(1)  # never back into the caller's stack
            deadline, status = time.perf_counter() + rng.uniform(0, 0.7 * usual), None
            while time.perf_counter() < deadline or found.kills >= kills:
                ended, status = os.waitpid(process, os.WNOHANG)
                if ended:
                    break
                status = None
                time.sleep(0.002)
            if status is None:
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)
                found.kills += 1
                continue
            if status:
                found.wrong.append(f"run {number} ended by itself after {found.kills} kills, with status {status}")
                break
            got = picture(out)
            found.wrong += [
                f"run {number}: {key}: {said}"
                for key in expected
                if (said := difference(expected[key], got[key], close))
            ]
            shutil.rmtree(out)
            number += 1
            if verbose:
                print(found, flush=True)
    finally:
        shutil.rmtree(folder)
    return found


def main() -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.run_kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    found = run(options.kills, options.seed, verbose=True)
    print(found, *found.wrong, sep="\n")
    return int(bool(found.wrong))


if __name__ == "__main__":
    sys.exit(main())
