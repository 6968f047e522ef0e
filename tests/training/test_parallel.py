"""A run on several ranks: as on one, whatever their number, and through kills."""

from __future__ import annotations

import dataclasses
import io
import os
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from fxgrow.errors import FxgrowError
from fxgrow.ir.dtensors import is_sharded, whole_of
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
    """Runs with copies and with shards; the same, resumed; and what a run on two ranks cannot be."""
    found: dict[str, Any] = {}
    for how in ("ddp", "fsdp"):
        run = go(out / how, task=task(parallel=how, keep_checkpoints=9))
        found[f"alike {how}"] = len(set(gathered(tuple(float(whole_of(p).sum()) for p in run.model.parameters())))) == 1
    assert all(map(is_sharded, run.model.parameters()))
    for name, first, then in (("ddp again", "ddp", "ddp"), ("fsdp again", "fsdp", "fsdp"), ("crossed", "ddp", "fsdp")):
        if rank == 0:
            shutil.copytree(out / first, out / name)
            (out / name / "checkpoints" / "latest").write_text("step-00000006.0")
        dist.barrier()
        go(out / name, task=task(parallel=then), resume=True)
    norms = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1))
    run = go(out / "norms", task=task(norms, None, steps=3, accumulation=3, parallel="fsdp"))
    found["norms"] = len(set(gathered([b.tolist() for b in run.model.buffers()].__repr__()))) == 1
    found["few"] = said(lambda: go(out / "few", task=task(accumulation=1)))
    found["device"] = said(lambda: go(out / "device", task=task(device="cpu:0")))
    found["again"] = said(lambda: go(out / "ddp"))
    found["copies"] = said(lambda: go(out / "none", task=fsdp(in_place=False)))
    found["left out"] = said(
        lambda: go(out / "none", task=fsdp(shard=lambda net, mesh: fully_shard(net[0], mesh=mesh)))
    )
    tied = task(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), None, parallel="fsdp")
    tied.model[2].weight = tied.model[0].weight  # type: ignore[index]
    apart = dataclasses.replace(tied, shard=lambda net, mesh: [fully_shard(m, mesh=mesh) for m in (net[0], net)])
    found["tied"] = said(lambda: go(out / "none", task=apart))
    held = [{"trigger": {"step": 1}, "operations": [HIDDEN, {"op": "freeze", "what": "old"}]}]
    found["held"] = said(lambda: go(out / "none", task=task(None, held, parallel="fsdp")))
    if rank == 0:
        checkpoints.create = no_space
    for how in ("ddp", "fsdp"):
        found[f"full {how}"] = said(lambda how=how: go(out / f"full {how}", task=task(parallel=how)))  # type: ignore[misc]
    return found


def fsdp(**changes: Any) -> Task:
    return dataclasses.replace(task(None, None, parallel="fsdp"), **changes)


def no_space(*_: Any) -> bool:
    raise OSError("no space left")


def killed(rank: int, out: Path, how: str, where: str, who: int) -> str:
    """A run that goes on from its newest checkpoint until a rank of it is killed, and what the others raise."""

    def die(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if rank == who and where == "growth":
        scheduling.grow = die  # type: ignore[assignment]
    elif rank == who and rank:  # while the others gather what the first one writes
        checkpoints.wholes = die  # type: ignore[assignment]
    elif rank == who:
        create = checkpoints.create
        left = iter(range(2))  # checkpoints before it
        checkpoints.create = lambda *how: create(*how) if next(left, None) is not None else half(*how)  # type: ignore[assignment]

        def half(target: Path, names: list[str], write: Callable[[Any], None]) -> bool:
            return create(target, names, lambda place: (place("model.safetensors").write_bytes(b"half"), die())[0])

    return said(lambda: go(out, task=task(parallel=how), resume=True))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("runs")
    go(out / "one")
    return out, run_ranks(2, whole, out)


def test_two_ranks_train_as_one_does(runs: tuple[Path, list[dict[str, Any]]]) -> None:
    out, found = runs
    for name in ("ddp", "fsdp", "crossed"):
        assert not different(out / "one", out / name, 1e-9)
    for how in ("ddp", "fsdp"):
        assert not different(out / how, out / f"{how} again", 0.0)
    for each in found:
        assert each["alike ddp"] and each["alike fsdp"] and each["norms"]
        assert each["few"] == (
            "SpecError: a step of 1 micro-batch cannot be shared by 2 ranks: start fewer, or give more accumulation, "
            "of smaller micro-batches"
        )
        assert "device 'cpu:0' would be that of all 2 ranks: say 'cpu'" in each["device"]
        assert "holds a run already" in each["again"]
        assert "parallel=fsdp grows in place" in each["copies"]
        assert "the task's shard= leaves 3.weight to each rank" in each["left out"]
        assert "0.weight and 2.weight are one parameter, and sharded apart" in each["tied"]
        assert "events.0 (step 1): freeze: old: the model is sharded" in each["held"]
        for how in ("ddp", "fsdp"):
            assert each[f"full {how}"].startswith(
                "RankError: the checkpoint: rank 0 of 2 failed: the checkpoint after 1"
            )
    for how in ("ddp", "fsdp"):
        lines = [x["event"] for x in read_log(out / how / "log.jsonl")]
        assert lines.count("start") == 1 and lines.count("growth") == 2 and lines.count("end") == 1, "the first alone"


def test_a_run_goes_on_on_other_ranks_after_kills(runs: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    """With shards and with copies in turn, and on one in the end."""
    kills = [(2, "fsdp", "growth", 1, 3), (3, "ddp", "checkpoint", 0, 5), (3, "fsdp", "checkpoint", 2, 5)]
    for ranks, how, where, who, step in [*kills, (2, "fsdp", "checkpoint", 0, 7)]:
        said = run_ranks(ranks, killed, tmp_path, how, where, who)
        assert said.pop(who) is None
        assert all(f"another of the {ranks} ranks has ended" in each for each in said), said
        assert (tmp_path / "checkpoints" / "latest").read_text(encoding="utf-8") == f"step-0000000{step}.0"
    go(tmp_path, resume=True)
    assert not different(runs[0] / "one", tmp_path, 1e-9)


def different(expected: Path, got: Path, close: float) -> list[str]:
    """What differs between two runs: tensors of the last checkpoints, and lines of the logs."""
    one, other = picture(expected), picture(got)
    for line in [*one["log"], *other["log"]] if close else ():
        line.pop("hyper", None)  # which says how the model is held
        line.pop("receipt", None)  # which is measured in another way where no rank has the whole model
    return [f"{key}: {words}" for key in one if (words := difference(one[key], other[key], close))]


def test_the_command_line_says_an_error_once(tmp_path: Path) -> None:
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "fxgrow", "train"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    given = ["parallel=fsdp", "steps=2", "warmup=0", "learning_rate=1e300"]
    settings = [x for each in given for x in ("--hyper", each)]
    command = [*start, "tests.training.test_parallel:task", *settings, "--threads", "1", "--out", "run"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert done.stdout.count("step 0/2") == 1, done.stdout
    assert done.stderr.count("error after 1 steps the training loss is") == 1, done.stderr
