"""Checkpoints of a run: resume as if nothing had been, ties, what is refused."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxgrow
from fxgrow import publish, training
from fxgrow.errors import CheckpointError, DiskError, FxgrowError, SpecError
from fxgrow.scheduler import scheduler
from fxgrow.training import Hyper, Task, read_log
from tests.training.toy import GROWTHS, WIDEN, Net, assert_same_losses, assert_same_optimizer, make, run, same


@pytest.mark.parametrize("stop", [1, 4, 7])
def test_resume_equals_uninterrupted(tmp_path: Path, stop: int) -> None:
    whole = run(make(dropout=0.3), tmp_path / "whole")
    part = run(make(dropout=0.3), tmp_path / "parts", stop_at=stop)
    assert part.step == stop
    task = make(dropout=0.3)
    with torch.no_grad():  # a resumed run must not depend on the values it starts from
        for parameter in task.model.parameters():
            parameter.normal_()
    rest = run(task, tmp_path / "parts", resume=True)
    assert same(whole.model, rest.model)
    assert (whole.tokens, whole.flops) == (rest.tokens, rest.flops)
    assert whole.val_loss == pytest.approx(rest.val_loss, rel=1e-9)
    assert_same_losses(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.usefixtures("by_hand")
@pytest.mark.parametrize("stop", [3, 5, 6, 8, 10])
def test_resume_across_growths_equals_uninterrupted(tmp_path: Path, stop: int) -> None:
    schedule = [GROWTHS[0], {**GROWTHS[1], "trigger": {"tokens": 24 * 11}}]
    whole = run(make(schedule=schedule), tmp_path / "whole")
    assert [str(e.trigger) for e in whole.scheduler.schedule.events] == ["step 5", "tokens 264"]
    assert whole.scheduler.next is None
    run(make(schedule=schedule), tmp_path / "parts", stop_at=stop)
    rest = run(make(schedule=schedule), tmp_path / "parts", resume=True)
    assert isinstance(rest.model, Net)
    assert rest.model.up.out_features == 16
    assert same(whole.model, rest.model)
    assert rest.tokens == whole.tokens
    assert_same_losses(tmp_path / "whole", tmp_path / "parts")
    assert_same_optimizer(whole.optimizer, rest.optimizer)


def test_a_run_that_is_through_is_not_saved_again(tmp_path: Path) -> None:
    """Killed between its last checkpoint and its last line, or resumed for no reason."""
    run(make(), tmp_path)
    file = tmp_path / "log.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:-1]))
    for _ in range(2):
        run(make(), tmp_path, resume=True)
        events = [line["event"] for line in read_log(file) if line["event"] != "resume"]
        assert events == [json.loads(line)["event"] for line in lines]
    assert len([*(tmp_path / "checkpoints").glob("step-*")]) == 1
    longer = run(make(steps=14), tmp_path, resume=True)
    assert longer.step == 14
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00000014.0"


def two_optimizers(model: nn.Module, hyper: Hyper) -> list[torch.optim.Optimizer]:
    """Muon for matrices of more than one row, at half the rate, AdamW for the rest."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    muon = torch.optim.Muon([{"params": matrices, "lr_scale": 0.5}], lr=hyper.learning_rate)
    return [muon, torch.optim.AdamW(others, lr=hyper.learning_rate)]


@pytest.mark.parametrize("in_place", [True, False])
def test_several_optimizers_are_carried_and_resumed(tmp_path: Path, in_place: bool) -> None:
    def task() -> Task:
        growth = {"trigger": {"step": 4}, "operations": [{**WIDEN, "axis": "*/hidden", "noise": {"scale": 0.1}}]}
        made = make(schedule=[growth])
        made.optimizer, made.in_place = two_optimizers, in_place
        return made

    whole = run(task(), tmp_path / "whole")
    muon, adamw = whole.optimizers
    assert (type(muon), type(adamw)) == (torch.optim.Muon, torch.optim.AdamW)
    assert muon.param_groups[0]["lr"] == 0.5 * adamw.param_groups[0]["lr"]
    assert {id(p) for o in whole.optimizers for g in o.param_groups for p in g["params"]} == {
        id(p) for p in whole.model.parameters()
    }
    run(task(), tmp_path / "parts", stop_at=7)
    rest = run(task(), tmp_path / "parts", resume=True)
    assert same(whole.model, rest.model)
    assert_same_losses(tmp_path / "whole", tmp_path / "parts")
    for one, other in zip(whole.optimizers, rest.optimizers, strict=True):
        assert_same_optimizer(one, other)
    run(task(), tmp_path / "stopped", stop_at=7)
    single = task()
    single.optimizer = training.adamw
    with pytest.raises(CheckpointError, match="optimizer"):
        run(single, tmp_path / "stopped", resume=True)


@pytest.mark.parametrize("policy", ["asymmetric", "exact", "copy", "reset"])
def test_resume_across_a_compiled_growth_equals_uninterrupted(tmp_path: Path, policy: str) -> None:
    growth = {
        "trigger": {"step": 4},
        "operations": [{**WIDEN, "axis": "*/hidden", "noise": {"scale": 0.1}}],
        "optimizer": {"policy": policy, "warmup": 6, "ramp": 5},
    }
    whole = run(make(schedule=[growth]), tmp_path / "whole")
    line = next(line for line in read_log(tmp_path / "whole" / "log.jsonl") if line["event"] == "growth")
    assert line["moved"] < 1e-6
    assert line["receipt"]["error_float64"] < 1e-12
    for stop in (4, 7, 11):  # just before the growth, while the newborn entries warm up, and after that
        out = tmp_path / str(stop)
        run(make(schedule=[growth]), out, stop_at=stop)
        rest = run(make(schedule=[growth]), out, resume=True)
        assert same(whole.model, rest.model)
        assert_same_losses(tmp_path / "whole", out)
        assert_same_optimizer(whole.optimizer, rest.optimizer)


def test_a_refused_growth_ends_the_run_and_leaves_a_usable_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise fxgrow.errors.GrowthRefused("not exact")

    monkeypatch.setattr(scheduler, "grow", refuse)
    with pytest.raises(fxgrow.errors.GrowthRefused):
        run(make(schedule=GROWTHS[:1], checkpoint_every=2), tmp_path)
    last = read_log(tmp_path / "log.jsonl")[-1]
    assert (last["event"], last["step"], last["error"]) == ("refused", 5, "not exact")
    assert run(make(), tmp_path, stop_at=6, overwrite=True).step == 6


def test_checkpoints_keep_ties_and_only_the_newest(tmp_path: Path) -> None:
    class Tied(Net):
        def __init__(self) -> None:
            super().__init__()
            self.also = nn.Linear(3, 4)
            self.also.weight = self.up.weight

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            out = self.down(torch.tanh(self.up(x)) + self.also(x))
            return out, F.mse_loss(out, y)

    def tied() -> Task:
        task = make(checkpoint_every=2, keep_checkpoints=2)
        torch.manual_seed(1)
        task.model = Tied().double()
        return task

    whole = run(tied(), tmp_path / "whole")
    run(tied(), tmp_path / "parts", stop_at=7)
    folder = tmp_path / "parts" / "checkpoints"
    assert sorted(path.name for path in folder.glob("step-*")) == ["step-00000006.0", "step-00000007.0"]
    state = json.loads((folder / "step-00000007.0" / "state.json").read_text())
    assert state["aliases"] == {"also.weight": "up.weight"}
    rest = run(tied(), tmp_path / "parts", resume=True)
    assert isinstance(rest.model, Tied)
    assert rest.model.also.weight is rest.model.up.weight
    assert same(whole.model, rest.model)


def test_a_half_written_checkpoint_is_ignored_and_cleared(tmp_path: Path) -> None:
    run(make(), tmp_path, stop_at=3)
    broken = tmp_path / "checkpoints" / ".step-00000005.0.abcd1234.tmp"
    broken.mkdir()
    (broken / "model.safetensors").write_bytes(b"half")
    assert run(make(), tmp_path, resume=True).step == 12
    assert not broken.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="limits of files are POSIX's")
def test_a_full_disk_is_said_and_the_run_goes_on_from_where_it_was(tmp_path: Path) -> None:
    import resource

    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    run(make(hidden=64, steps=4), tmp_path / "run", stop_at=2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, unlimited[1]))
    try:
        with pytest.raises(DiskError, match="the checkpoint after 4 steps cannot be written in"):
            run(make(hidden=64, steps=4), tmp_path / "run", resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["latest", "step-00000002.0"]
    log = tmp_path / "run" / "log.jsonl"
    for kept in (-1, -90):  # cut short in mid-line, among what the checkpoint knows of, too
        log.write_text(log.read_text(encoding="utf-8")[:kept], encoding="utf-8")
        rest = run(make(hidden=64, steps=4), tmp_path / "run", resume=True)
        assert same(rest.model, run(make(hidden=64, steps=4), tmp_path / str(kept)).model)
        assert read_log(log)[-1]["event"] == "end"


def test_a_log_that_cannot_be_rewritten_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(make(), tmp_path, stop_at=3)
    log = (tmp_path / "log.jsonl").read_bytes()

    def full(file: Path) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patched:
        patched.setattr(publish, "sync", full)
        with pytest.raises(DiskError, match="no space left"):
            run(make(), tmp_path, resume=True)
    assert (tmp_path / "log.jsonl").read_bytes() == log
    assert run(make(), tmp_path, resume=True).step == 12


def test_a_folder_that_is_none_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "log" / "log.jsonl").mkdir(parents=True)
    (tmp_path / "latest" / "checkpoints" / "latest").mkdir(parents=True)
    for name in ("file", "file/in it", "log", "latest", "x" * 300):
        with pytest.raises(DiskError):
            run(make(steps=1), tmp_path / name)


def test_checkpoints_of_another_model_are_refused(tmp_path: Path) -> None:
    run(make(), tmp_path, stop_at=3)
    with pytest.raises(CheckpointError, match=r"up\.weight is \[4, 3\] in the checkpoint, \[5, 3\] in the model"):
        run(make(hidden=5), tmp_path, resume=True)
    tensors, _ = training.untied(Net().state_dict())
    del tensors["up.bias"]
    with pytest.raises(CheckpointError, match=r"up\.bias is missing"):
        training.load_model(Net(), tensors, {}, "it")
    with pytest.raises(CheckpointError, match=r"torch\.float64"):
        training.load_model(Net().double(), Net().state_dict(), {}, "it")
    with pytest.raises(CheckpointError, match=r"extra is not in the model"):
        training.load_model(Net(), {**Net().state_dict(), "extra": torch.zeros(1)}, {}, "it")
    path = tmp_path / "checkpoints" / (tmp_path / "checkpoints" / "latest").read_text()
    (path / "model.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(CheckpointError, match="cannot be read"):
        run(make(), tmp_path, resume=True)


@pytest.mark.usefixtures("by_hand")
def test_resuming_under_another_past_is_refused(tmp_path: Path) -> None:
    run(make(schedule=GROWTHS[:1]), tmp_path, stop_at=7)
    with pytest.raises(SpecError, match=r"events\.0"):
        run(make(schedule=[{**GROWTHS[0], "optimizer": "reset"}]), tmp_path, resume=True)


def test_a_new_run_in_the_same_folder_does_not_resume_the_old_one(tmp_path: Path) -> None:
    run(make(), tmp_path, stop_at=6)
    log = (tmp_path / "log.jsonl").read_bytes()
    with pytest.raises(FxgrowError, match="holds a run already: resume it, overwrite it, or choose another folder"):
        run(make(), tmp_path)
    assert (tmp_path / "log.jsonl").read_bytes() == log

    def fail(model: nn.Module, batch: Any) -> Tensor:
        raise RuntimeError("power cut")

    task = make()
    task.loss = fail
    with pytest.raises(RuntimeError, match="power cut"):
        run(task, tmp_path, overwrite=True)
    run(make(), tmp_path, resume=True, stop_at=2)
    assert next(line["event"] for line in read_log(tmp_path / "log.jsonl")) == "start"


def test_resume_without_a_checkpoint_starts(tmp_path: Path) -> None:
    assert run(make(), tmp_path, resume=True).step == 12


def test_pack_round_trips_and_refuses_what_needs_pickle() -> None:
    value = {
        "state": {0: {"step": torch.tensor(3.0), "m": torch.arange(6).view(2, 3)}, 1: {}},
        "groups": [{"betas": (0.9, 0.95), "lr": 1e-3, "flag": None, "inf": math.inf, "name": "a"}],
    }
    tensors: dict[str, Tensor] = {}
    back = training.unpack(json.loads(json.dumps(training.pack(value, "o", tensors))), tensors)
    assert back["groups"] == value["groups"]
    assert isinstance(back["groups"][0]["betas"], tuple)
    assert list(back["state"]) == [0, 1]
    assert torch.equal(back["state"][0]["m"], torch.arange(6).view(2, 3))
    assert back["state"][0]["m"].dtype == torch.int64
    with pytest.raises(CheckpointError, match=r"o\.f is of the class .*, which a checkpoint cannot store"):
        training.pack({"f": print}, "o", {})
