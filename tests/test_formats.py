"""What earlier versions wrote is read: see :mod:`tests.formats`. Each folder of the fixtures is of one version."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fxgrow
from fxgrow.schedule import Schedule
from fxgrow.weights.materialise import materialise_all
from tests import formats
from tests.models import ROUNDING

FOLDERS = sorted((Path(__file__).parent / "fixtures").glob("formats-*"))
PLANS = [file for folder in FOLDERS for file in sorted(folder.glob("plan-*.json"))]


@pytest.fixture(params=FOLDERS, ids=lambda p: p.name)
def folder(request: pytest.FixtureRequest) -> Path:
    return Path(request.param)


def missing(old: Any, new: Any, where: str = "") -> Iterator[str]:
    """What was there and is not, or is something else now; more may be there."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key, value in old.items():
            yield from missing(value, new[key], f"{where}.{key}") if key in new else [f"{where}.{key}"]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for number, pair in enumerate(zip(old, new, strict=True)):
            yield from missing(*pair, f"{where}.{number}")
    elif old != new:
        yield f"{where}: {old} became {new}"


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_a_spec(folder: Path, suffix: str) -> None:
    spec = fxgrow.GrowthSpec.parse(folder / f"spec.{suffix}")
    assert not [*missing(formats.SPEC, spec.model_dump(mode="json"))]
    assert fxgrow.GrowthSpec.parse(spec.to_yaml()) == spec


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_a_schedule(folder: Path, suffix: str) -> None:
    schedule = Schedule.parse(folder / f"schedule.{suffix}")
    assert schedule == Schedule.parse(formats.SCHEDULE) == Schedule.parse(schedule.to_yaml())
    triggers = ["step 4", "tokens 5000", "epoch 90", "plateau of val_loss"]
    assert [str(event.trigger) for event in schedule.events] == triggers
    assert [event.optimizer.policy for event in schedule.events] == ["asymmetric", "copy", "exact", "reset"]
    assert [[a.op for a in event.actions] for event in schedule.events] == [
        *(["grow", "learning_rate", "accumulation"], ["grow"], ["grow", "learning_rate"], ["grow"]),
    ]


@pytest.mark.parametrize("file", PLANS, ids=lambda p: p.stem)
def test_a_plan_is_read_and_carried_out(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    plan = fxgrow.GrowthPlan.from_json(text)
    assert not [*missing(json.loads(text), json.loads(plan.to_json()))]
    shapes: dict[str, list[int]] = {}
    for tensor in plan.tensors.values():
        if tensor.source is not None:  # the old sizes, as far as a plan knows them: the largest entry that is copied
            old = [n if d is None else 1 + int(d.index.max()) for n, d in zip(tensor.shape, tensor.dims, strict=True)]
            shapes[tensor.source] = [max(pair) for pair in zip(old, shapes.get(tensor.source, old), strict=True)]
    source = {name: torch.full(shape, 0.5, dtype=torch.float64) for name, shape in shapes.items()}
    made = dict(materialise_all(plan, source.__getitem__))
    assert {name: list(t.shape) for name, t in made.items()} == {n: t.shape for n, t in plan.tensors.items()}


def test_the_plans_have_everything_that_a_plan_can_have() -> None:
    plans = [json.loads(file.read_text(encoding="utf-8")) for file in PLANS]
    kinds = {change["kind"] for plan in plans for step in plan["steps"] for change in step["changes"]}
    assert kinds == {"edit", "rescale", "clone", "renumber", "insert"}
    tensors = [t for plan in plans for tensor in plan["tensors"].values() for t in (tensor, *tensor["stages"])]
    fields = {"stages", "noise", "continuation", "appended", "zero", "fresh", "init"}
    assert fields <= {key for tensor in tensors for key, value in tensor.items() if value}


def test_a_checkpoint(folder: Path, tmp_path: Path) -> None:
    expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    path = Path(shutil.copytree(folder / "checkpoint", tmp_path / "copy"))
    loaded = fxgrow.load(path)
    assert {n: list(p.shape) for n, p in loaded.module.named_parameters()} == expected["parameters"]
    assert loaded.module.get_parameter("head.weight") is loaded.module.get_parameter("emb.weight")
    assert [call.name for call in loaded.manifest.calls] == ["plain", "double", "long"]
    assert loaded.replay_error() <= ROUNDING[torch.float32]
    assert loaded.plan is not None and loaded.receipt is not None and loaded.plan.exactness == "exact"
    again = fxgrow.load(fxgrow.save(loaded, path))
    assert all(torch.equal(t, loaded.module.state_dict()[n]) for n, t in again.module.state_dict().items())
    growth = fxgrow.grow(again.module, {"op": "widen", "axis": "emb.weight:1", "factor": 2}, *_example(again))
    assert growth.module.get_parameter("emb.weight").shape == (7, 16)


def _example(loaded: Any) -> tuple[Any, Any]:
    return loaded.args, loaded.kwargs


def done_in(run: Any) -> list[Any]:
    return [each.action for each in run.scheduler.done]


def test_a_run_goes_on_to_where_it_went(folder: Path, tmp_path: Path) -> None:
    expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    out = Path(shutil.copytree(folder / "run", tmp_path / "run"))
    run = formats.run(out, resume=True)
    assert run.step == 12 and [each.op for each in done_in(run)] == ["grow", "learning_rate", "accumulation"]
    assert run.val_loss == pytest.approx(expected["val_loss"], rel=1e-9)
    total = sum(float(p.detach().abs().sum()) for p in run.model.parameters())
    assert total == pytest.approx(expected["sum"], rel=1e-9)
