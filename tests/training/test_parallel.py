"""A run on several ranks: as on one, whatever their number, and through kills."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from fxgrow.errors import FxgrowError
from fxgrow.ranks import gathered
from fxgrow.scheduler import scheduler as scheduling
from fxgrow.training import Hyper, Run, Task, checkpoints, read_log, train
from tests.processes import run_ranks
from tests.run_kills import difference, picture

ROOT = Path(__file__).parents[2]
HIDDEN = {"op": "widen", "axis": "*/hidden", "factor": 2, "noise": {"scale": 0.1}}
SCHEDULE = [
    {"trigger": {"step": 3}, "operations": [HIDDEN], "optimizer": {"policy": "asymmetric", "warmup": 3}},
    {
        "trigger": {"step": 5},
        "operations": [HIDDEN, {"op": "accumulation", "set": 5}, {"op": "freeze", "what": "0.bias"}],
        "optimizer": {"policy": "exact", "ramp": 3},
    },
    {"trigger": {"step": 7, "plateau": {"patience": 1, "min_delta": 9}}, "operations": [{"op": "unfreeze"}]},
]


def batches(split: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    return x, x.prod(1, keepdim=True)


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def task(net: nn.Module | None = None, schedule: Any = SCHEDULE, **hyper: Any) -> Task:
    torch.manual_seed(0)
    net = net or nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.2), nn.Linear(4, 1))
    given = {"steps": 9, "accumulation": 4, "warmup": 2, "eval_every": 2, "eval_batches": 3, "log_every": 1}
    settings = Hyper(**{**given, "learning_rate": 0.02, "checkpoint_every": 1, **hyper})
    return Task(net.double(), batches, settings, schedule, loss=loss, example=lambda batch: ((batch[0],), {}))


def go(out: Path, **how: Any) -> Run:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return train(how.pop("task", None) or task(), out, console=Console(file=io.StringIO(), width=200), **how)


def said(function: Callable[[], Any]) -> str:
    try:
        function()
    except FxgrowError as error:
        return f"{type(error).__name__}: {error}".partition("\n")[0]
    return ""


def whole(rank: int, out: Path) -> dict[str, Any]:
    """A run; the same, stopped and resumed; and what a run on two ranks cannot be."""
    run = go(out / "two")
    go(out / "resumed", stop_at=4)
    go(out / "resumed", resume=True)
    found = {"alike": len(set(gathered(tuple(float(p.sum()) for p in run.model.parameters())))) == 1}
    norms = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1))
    run = go(out / "norms", task=task(norms, None, steps=3, accumulation=3))
    found["norms"] = len(set(gathered(tuple(float(p.sum()) for p in run.model.parameters())))) == 1
    found["few"] = said(lambda: go(out / "few", task=task(accumulation=1)))
    found["device"] = said(lambda: go(out / "device", task=task(device="cpu:0")))
    found["again"] = said(lambda: go(out / "two"))
    if rank == 0:
        checkpoints.create = no_space
    found["full"] = said(lambda: go(out / "full"))
    return found


def no_space(*_: Any) -> bool:
    raise OSError("no space left")


def killed(rank: int, out: Path, where: str, who: int) -> str:
    """A run that goes on from its newest checkpoint until a rank of it is killed, and what the others raise."""

    def die(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if rank == who and where == "growth":
        scheduling.grow = die  # type: ignore[assignment]
    elif rank == who:
        left = iter(range(3))  # checkpoints before it
        create = checkpoints.create
        checkpoints.create = lambda *how: create(*how) if next(left, None) is not None else half(*how)  # type: ignore[assignment]

        def half(target: Path, names: list[str], write: Callable[[Any], None]) -> bool:
            return create(target, names, lambda place: (place("model.safetensors").write_bytes(b"half"), die())[0])

    return said(lambda: go(out, resume=True))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("runs")
    go(out / "one")
    return out, run_ranks(2, whole, out)


def test_two_ranks_train_as_one_does(runs: tuple[Path, list[dict[str, Any]]]) -> None:
    out, found = runs
    assert not different(out / "one", out / "two", 1e-9)
    assert not different(out / "two", out / "resumed", 0.0)
    for each in found:
        assert each["alike"] and each["norms"]
        assert each["few"] == (
            "SpecError: a step of 1 micro-batch cannot be shared by 2 ranks: start fewer, or give more accumulation, "
            "of smaller micro-batches"
        )
        assert "device 'cpu:0' would be that of all 2 ranks: say 'cpu'" in each["device"]
        assert "holds a run already" in each["again"]
        assert each["full"].startswith("RankError: the checkpoint: rank 0 of 2 failed:"), each["full"]
    lines = [x["event"] for x in read_log(out / "two" / "log.jsonl")]
    assert lines.count("start") == 1 and lines.count("growth") == 2 and lines.count("end") == 1, "the first rank alone"


def test_a_run_goes_on_on_other_ranks_after_kills(runs: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    first = run_ranks(2, killed, tmp_path, "growth", 1)
    assert first[1] is None and first[0].startswith("RankError: another of the 2 ranks has ended"), first
    assert (tmp_path / "checkpoints" / "latest").read_text(encoding="utf-8") == "step-00000003.0"
    second = run_ranks(3, killed, tmp_path, "checkpoint", 0)
    assert second[0] is None and all("another of the 3 ranks has ended" in each for each in second[1:]), second
    assert (tmp_path / "checkpoints" / "latest").read_text(encoding="utf-8") == "step-00000006.0"
    go(tmp_path, resume=True)
    assert not different(runs[0] / "one", tmp_path, 1e-9)


def different(expected: Path, got: Path, close: float) -> list[str]:
    """What differs between two runs: tensors of the last checkpoints, and lines of the logs."""
    one, other = picture(expected), picture(got)
    return [f"{key}: {words}" for key in one if (words := difference(one[key], other[key], close))]


def test_the_command_line_says_an_error_once(tmp_path: Path) -> None:
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "fxgrow", "train"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    made = "tests.training.test_parallel:task"
    settings = ["--hyper", "steps=1", "--hyper", "eval_every=1", "--threads", "1"]

    def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [*start, made, *settings, *arguments]
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)

    done = launch("--out", "run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("1 steps, validation loss") == 1 and done.stdout.count("step 0/1") == 1, done.stdout
    refused = launch("--out", "run")
    assert refused.returncode != 0 and refused.stderr.count("error run holds a run already") == 1, refused.stderr
