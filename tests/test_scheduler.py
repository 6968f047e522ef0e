"""The scheduler: triggers, what it does to the optimizer and the learning rate, and its state."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fxgrow import scheduler as scheduling
from fxgrow.errors import GrowthRefused, SpecError
from fxgrow.scheduler import GrowthScheduler

WIDEN = {"op": "widen", "axis": "*/hidden", "factor": 2}


def entry(**trigger: Any) -> dict[str, Any]:
    return {"trigger": trigger, "operations": [WIDEN]}


class FakeGrowth:
    """Stands in for a compiled growth, so that triggers are tested apart from the compiler."""

    def __init__(self, module: torch.nn.Module, spec: Any, how: dict[str, Any]) -> None:
        self.module, self.spec, self.how = torch.nn.Linear(1, 1), spec, how

    def carry(self, optimizer: torch.optim.Optimizer, policy: str, **options: Any) -> torch.optim.Optimizer:
        self.carried = (policy, options)
        return torch.optim.SGD(self.module.parameters(), lr=optimizer.param_groups[0]["lr"])


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[SimpleNamespace]:
    made: list[SimpleNamespace] = []

    def grow(model: torch.nn.Module, spec: Any, args: Any, kwargs: Any = None, **how: Any) -> FakeGrowth:
        made.append(SimpleNamespace(model=model, spec=spec, args=args, kwargs=kwargs, how=how))
        return FakeGrowth(model, spec, how)

    monkeypatch.setattr(scheduling, "grow", grow)
    return made


MODEL = torch.nn.Linear(1, 1)


def test_step_trigger_fires_once_and_in_order(calls: list[SimpleNamespace]) -> None:
    optimizer = torch.optim.SGD(MODEL.parameters(), lr=0.25)
    scheduler = GrowthScheduler([entry(step=2), {**entry(step=4), "name": "second"}], args=("x",))
    fired = {}
    for step in range(8):
        event = scheduler.step(MODEL, optimizer, step=step)
        if event is not None:
            fired[step] = event
    assert {step: (event.index, event.name) for step, event in fired.items()} == {
        2: (0, "growth 1"),
        4: (1, "second"),
    }
    assert calls[0].args == ("x",)
    assert calls[0].model is MODEL
    assert fired[2].optimizer is not None
    assert fired[2].optimizer.param_groups[0]["lr"] == 0.25
    assert fired[2].growth.carried == ("asymmetric", {"warmup": 250})
    assert scheduler.next is None


def test_entries_due_together_come_one_per_call(calls: list[SimpleNamespace]) -> None:
    scheduler = GrowthScheduler([entry(step=1), entry(step=1), entry(tokens=50)])
    seen = []
    while event := scheduler.step(MODEL, step=9, tokens=50):
        seen.append(event.index)
        assert event.optimizer is None
    assert seen == [0, 1, 2]


def test_tokens_and_epochs(calls: list[SimpleNamespace]) -> None:
    scheduler = GrowthScheduler([entry(tokens=100), entry(epoch=1.5)])
    assert scheduler.step(MODEL, step=1, tokens=99) is None
    assert scheduler.step(MODEL, step=2, tokens=100) is not None
    with pytest.raises(SpecError, match=r"growths\.1 waits for epoch, but the training loop passes no epoch="):
        scheduler.step(MODEL, step=3, tokens=500)
    assert scheduler.step(MODEL, step=3, epoch=1.4) is None
    assert scheduler.step(MODEL, step=4, epoch=1.5) is not None


def test_plateau_counts_reports_without_improvement(calls: list[SimpleNamespace]) -> None:
    scheduler = GrowthScheduler([entry(plateau={"metric": "val_loss", "patience": 2, "min_delta": 0.1})] * 2)
    # 3.0 sets the best; 2.95 is too small a fall (1); no report at step 3; 2.8 improves (0); 2.75, 2.9 are 1 and 2
    reports = {1: 3.0, 2: 2.95, 4: 2.8, 5: 2.75, 6: 2.9, 7: 5.0, 8: 5.0, 9: float("nan")}
    fired = []
    for step in range(1, 10):
        metrics = {"val_loss": reports[step]} if step in reports else None
        while scheduler.step(MODEL, step=step, metrics=metrics):
            fired.append(step)
        if step == 5:  # passing the same report again must not count twice
            assert scheduler.step(MODEL, step=step, metrics=metrics) is None
    assert fired == [6, 9]


def test_plateau_of_an_unknown_metric(calls: list[SimpleNamespace]) -> None:
    scheduler = GrowthScheduler([entry(plateau={"metric": "val_los"})])
    with pytest.raises(SpecError, match=r"'val_los', which is not reported; did you mean val_loss\?"):
        scheduler.step(MODEL, step=0, metrics={"val_loss": 1.0})


def test_learning_rate_and_accumulation_factors(calls: list[SimpleNamespace]) -> None:
    scheduler = GrowthScheduler(
        [
            {
                **entry(step=10),
                "learning_rate": {"policy": "rewarm", "steps": 4, "from": 0.2},
                "accumulation": 1.5,
            },
            {**entry(step=12), "learning_rate": {"policy": "scale", "factor": 0.5}, "accumulation": 0.1},
        ]
    )
    assert scheduler.lr_factor(5) == 1.0
    first = scheduler.step(MODEL, step=10)
    assert first is not None
    assert first.lr_factor == pytest.approx(0.2)
    assert first.accumulation == 1.5
    assert [scheduler.lr_factor(step) for step in (10, 11, 12, 14, 100)] == pytest.approx([0.2, 0.4, 0.6, 1.0, 1.0])
    assert scheduler.accumulation(3) == 4
    second = scheduler.step(MODEL, step=12)
    assert second is not None
    assert second.lr_factor == pytest.approx(0.3)
    assert scheduler.lr_factor(100) == 0.5
    assert scheduler.accumulation(3) == 1


def test_a_failed_growth_raises_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise GrowthRefused("no")

    monkeypatch.setattr(scheduling, "grow", refuse)
    scheduler = GrowthScheduler([entry(plateau={"patience": 1})])
    scheduler.step(MODEL, step=1, metrics={"val_loss": 1.0})
    before = scheduler.state_dict()
    with pytest.raises(GrowthRefused):
        scheduler.step(MODEL, step=2, metrics={"val_loss": 1.0})
    assert scheduler.state_dict() == before
    assert scheduler.fired == []


def test_state_survives_json_and_resumes(calls: list[SimpleNamespace]) -> None:
    schedule = [
        {**entry(step=1), "learning_rate": {"policy": "rewarm", "steps": 10, "from": 0.5}, "optimizer": "copy"},
        entry(plateau={"patience": 2}),
    ]
    scheduler = GrowthScheduler(schedule)
    scheduler.step(MODEL, step=1)
    scheduler.step(MODEL, step=2, metrics={"val_loss": 1.0})
    scheduler.step(MODEL, step=3, metrics={"val_loss": 1.0})
    state = json.loads(json.dumps(scheduler.state_dict()))
    other = GrowthScheduler(schedule)
    other.load_state_dict(state)
    assert other.state_dict() == scheduler.state_dict()
    assert other.lr_factor(6) == scheduler.lr_factor(6) == pytest.approx(0.75)
    assert other.step(MODEL, step=4, metrics={"val_loss": 1.0}) is not None
    calls.clear()
    optimizer = torch.optim.SGD(MODEL.parameters(), lr=0.5)
    module, carried = other.replay(MODEL, optimizer)
    assert len(calls) == 2
    assert calls[0].model is MODEL
    assert calls[1].model is not MODEL
    asked = {"optimizer": optimizer, "policy": "copy", "ramp": None}
    assert calls[0].how == {"verify": False, "consume": False, **asked}
    assert carried is not optimizer
    assert module is not MODEL


def test_state_of_another_schedule_is_refused(calls: list[SimpleNamespace]) -> None:
    scheduler = GrowthScheduler([entry(step=1)])
    scheduler.step(MODEL, step=1)
    state = scheduler.state_dict()
    other = GrowthScheduler([{**entry(step=1), "operations": [{**WIDEN, "factor": 3}]}])
    with pytest.raises(SpecError, match=r"growths\.0 of the schedule is not the one that this run has already made"):
        other.load_state_dict(state)
    assert other.fired == []
    with pytest.raises(SpecError, match="version 9"):
        other.load_state_dict({**state, "version": 9})
    longer = GrowthScheduler([entry(step=1), entry(step=5)])  # adding a growth still to come is fine
    longer.load_state_dict(state)
    assert longer.next is not None


def test_example_inputs_may_be_made_anew_and_compiled_models_are_unwrapped(calls: list[SimpleNamespace]) -> None:
    scheduler = GrowthScheduler([entry(step=0)], args=lambda: ((1,), {"k": 2}))
    compiled: Any = torch.compile(MODEL)
    scheduler.step(compiled, step=0)  # never called, so nothing is compiled
    assert calls[0].args == (1,)
    assert calls[0].kwargs == {"k": 2}
    assert calls[0].model is MODEL


class Chain(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x)))


def test_a_schedule_is_checked_before_anything_is_grown() -> None:
    model = Chain()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    args = (torch.randn(2, 3),)
    size = sum(p.numel() for p in model.parameters())
    good = GrowthScheduler([entry(step=1), entry(step=2)], args)
    assert good.check(model) == [size, size + 4 * (3 + 1 + 2), size + 12 * (3 + 1 + 2)]
    assert good.fired == []
    bad = GrowthScheduler(
        [entry(step=1), {**entry(step=2), "operations": [WIDEN, {**WIDEN, "axis": "*/hiden"}], "name": "second"}], args
    )
    with pytest.raises(SpecError, match=r"growths\.1 \(second\): operations\.1 \(widen\): no axis matches"):
        bad.check(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_a_compiled_growth_and_a_refused_one_in_a_loop_of_ones_own() -> None:
    torch.manual_seed(0)
    model, x = Chain(), torch.randn(5, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = GrowthScheduler(
        [
            {**entry(step=2), "optimizer": {"policy": "copy"}},
            {**entry(step=3), "operations": [{**WIDEN, "axis": "no"}]},
        ],
        args=(x[:2],),
    )
    current: torch.nn.Module = model
    for step in range(3):
        while event := scheduler.step(current, optimizer, step=step):
            torch.testing.assert_close(event.module(x), current(x))
            assert isinstance(event.optimizer, torch.optim.AdamW)
            assert event.optimizer.state[event.module.get_parameter("up.weight")]["step"] == 2
            current, optimizer = event.module, event.optimizer
        current(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert current.get_parameter("up.weight").shape == (8, 3)
    before = [p.detach().clone() for p in current.parameters()]
    state = json.dumps(scheduler.state_dict())
    with pytest.raises(SpecError, match="no"):
        scheduler.step(current, optimizer, step=3)
    assert json.dumps(scheduler.state_dict()) == state
    assert all(torch.equal(a, b) for a, b in zip(before, current.parameters(), strict=True))
    assert optimizer.param_groups[0]["params"] == list(current.parameters())


def test_a_model_that_is_called_in_several_ways_grows_with_all_of_them() -> None:
    class Scored(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)

        def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
            out = self.down(torch.tanh(self.up(x)))
            return out if y is None else (out - y).square().mean()

    torch.manual_seed(0)
    model, x, y = Scored(), torch.randn(5, 3), torch.randn(5, 2)
    scheduler = GrowthScheduler([{**entry(step=0), "operations": [WIDEN]}], (x, y), calls=lambda: {"predict": (x,)})
    assert len(scheduler.check(model)) == 2
    event = scheduler.step(model, step=0)
    assert event is not None
    torch.testing.assert_close(event.module(x), model(x))
    torch.testing.assert_close(event.module(x, y), model(x, y))


def test_ranks_that_report_different_losses_do_not_grow_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    others: list[float | None] = []

    def gather(values: list[float | None], own: float | None) -> None:
        values[:] = [own, *others]

    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    monkeypatch.setattr("torch.distributed.all_gather_object", gather)
    scheduler = GrowthScheduler(
        [{"trigger": {"plateau": {"patience": 2}}, "operations": [WIDEN]}], (torch.randn(2, 3),)
    )
    model = Chain()
    others[:] = [1.0]
    assert scheduler.step(model, step=1, metrics={"val_loss": 1.0}) is None
    for value, other in ((1.0, 1.5), (None, 1.0), (1.0, None)):
        others[:] = [other]
        with pytest.raises(SpecError, match="ranks report different values of the metric 'val_loss'"):
            scheduler.step(model, step=2, metrics=None if value is None else {"val_loss": value})
    others[:] = [None]
    assert scheduler.step(model, step=2) is None, "no rank has measured"
