"""Growths compiled before they are made: found in the cache, and nothing that is stale."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import fxgrow
from fxgrow import ahead
from fxgrow.ir.rehearsal import settings, without_weights
from fxgrow.scheduler.ahead import AheadOfSchedule

pytestmark = pytest.mark.compile
X = (torch.linspace(-1, 1, 24).reshape(6, 4),)
SPEC = {"op": "widen", "axis": "layers.*/hidden", "factor": 2}


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 3), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.layers = nn.Linear(4, 4), nn.ModuleList([Layer(), Layer()])

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return x


class Local(Model):
    """Cannot be pickled."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = lambda x: x


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    torch.set_num_threads(1)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def step(model: nn.Module) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    out = model(*X)
    out.square().sum().backward()
    return out.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


def found() -> tuple[int, int]:
    """Hits and misses of the cache of whole graphs."""
    return counters["aot_autograd"]["autograd_cache_hit"], counters["aot_autograd"]["autograd_cache_miss"]


@pytest.mark.slow
@pytest.mark.parametrize("in_place", [True, False])
def test_what_was_compiled_ahead_is_found_and_nothing_stale(in_place: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process's own work, in this one."""
    torch.manual_seed(0)
    model, answers = Model(), list[Any]()
    monkeypatch.setattr(ahead.os, "nice", lambda by: 0)
    payload = without_weights(model, (SPEC, X, {}, {}, in_place, {}, {}, settings()))
    assert all(p.is_meta for p in pickle.loads(payload)[0].parameters())
    answer = type("Answer", (), {"send": staticmethod(answers.append)})()
    ahead._work(answer, payload)
    assert answers == [(1, "")]
    counters.clear()
    growth = fxgrow.grow(model, SPEC, X, verify=False)
    grown = growth.apply_(model) if in_place else growth.module
    expected = step(grown)
    growth.compile(grown)
    torch.testing.assert_close(step(grown), expected)
    grown.eval()
    with torch.no_grad():
        torch.testing.assert_close(grown(*X), expected[0])
    assert found() == (2, 0)
    grown.train()
    other = fxgrow.grow(grown, {**SPEC, "factor": 1.5}, X, verify=False)  # not the growth that was foreseen
    expected = step(other.module)
    torch.testing.assert_close(step(other.compile()), expected)
    assert found() == (2, 1)


def test_a_schedule_compiles_in_a_process_of_its_own() -> None:
    """One process; without Inductor, so that it is soon done."""
    model = Model()
    schedule = [{"trigger": {"step": 2}, "operations": [SPEC]}, {"trigger": {"step": 3}, "operations": [SPEC]}]
    scheduler = fxgrow.GrowthScheduler(schedule, args=X, compile_ahead={"backend": "eager"})
    assert scheduler.step(model, step=0) is None
    process = scheduler._ahead.running
    assert process is not None
    assert scheduler.step(model, step=1) is None and scheduler._ahead.running is process, "begun once"
    assert process.wait(300)
    assert (process.compiled, process.error) == (1, "")
    done = scheduler.step(model, step=2)
    assert done is not None and scheduler._ahead.running is None
    assert model.layers[0].up.out_features == 6


def test_what_cannot_be_compiled_ahead_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = fxgrow.GrowthScheduler([{"trigger": {"step": 2}, "operations": [SPEC]}], args=X, compile_ahead=True)
    with pytest.warns(UserWarning, match="not compiled ahead"):
        scheduler.step(Local(), step=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler.step(Local(), step=1)
    answers: list[Any] = []
    answer = type("Answer", (), {"send": staticmethod(answers.append)})()
    monkeypatch.setattr(ahead.os, "nice", lambda by: 0)
    wrong = {**SPEC, "axis": "nothing"}
    ahead._work(answer, without_weights(Model(), (wrong, X, {}, {}, True, {}, {}, settings())))
    ((compiled, error),) = answers
    assert compiled == 0 and "nothing" in error
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert AheadOfSchedule(True).coming(scheduler.schedule, (0, 0)) == ((0, 0), None), "one process a machine"
