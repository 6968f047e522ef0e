"""The scheduler: triggers, what it does to the optimizer and the run, and its state."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fxgrow
from fxgrow.errors import FxgrowError, GrowthRefused, SpecError
from fxgrow.scheduler import GrowthScheduler
from fxgrow.scheduler import scheduler as scheduling
from fxgrow.scheduler.progress import Partial
from tests.models import trained

WIDEN = {"op": "widen", "axis": "*/hidden", "factor": 2}


def entry(*more: dict[str, Any], **trigger: Any) -> dict[str, Any]:
    return {"trigger": trigger, "operations": [WIDEN, *more]}


def event(*operations: dict[str, Any], **trigger: Any) -> dict[str, Any]:
    return {"trigger": trigger, "operations": list(operations)}


class FakeGrowth:
    """Stands in for a compiled growth, so that triggers are tested apart from the compiler."""

    def __init__(self, module: torch.nn.Module, spec: Any, how: dict[str, Any]) -> None:
        self.module, self.spec, self.how = torch.nn.Linear(1, 1), spec, how
        self.receipt = SimpleNamespace(exactness="exact", error_float64=0.0, error_native=None)

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


def faked(schedule: Any, args: Any = (), **how: Any) -> GrowthScheduler:
    return GrowthScheduler(schedule, args, in_place=False, **how)


def test_step_trigger_fires_once_and_in_order(calls: list[SimpleNamespace]) -> None:
    optimizer = torch.optim.SGD(MODEL.parameters(), lr=0.25)
    scheduler = faked([entry(step=2), {**entry(step=4), "name": "second"}], args=("x",))
    fired = {}
    for step in range(8):
        done = scheduler.step(MODEL, optimizer, step=step)
        if done is not None:
            fired[step] = done
    assert {step: (done.event, done.name) for step, done in fired.items()} == {
        2: (0, "event 1"),
        4: (1, "second"),
    }
    assert calls[0].args == ("x",)
    assert calls[0].model is MODEL
    assert fired[2].optimizer is not None
    assert fired[2].optimizer.param_groups[0]["lr"] == 0.25
    assert fired[2].growth.carried == ("asymmetric", {"warmup": 250})
    assert scheduler.next is None


def test_entries_due_together_come_one_per_call(calls: list[SimpleNamespace]) -> None:
    scheduler = faked([entry(step=1), entry(step=1), entry(tokens=50)])
    seen = []
    while done := scheduler.step(MODEL, step=9, tokens=50):
        seen.append(done.event)
        assert done.optimizer is None
    assert seen == [0, 1, 2]


def test_tokens_and_epochs(calls: list[SimpleNamespace]) -> None:
    scheduler = faked([entry(tokens=100), entry(epoch=1.5)])
    assert scheduler.step(MODEL, step=1, tokens=99) is None
    assert scheduler.step(MODEL, step=2, tokens=100) is not None
    with pytest.raises(SpecError, match=r"events\.1 waits for epoch, but the training loop passes no epoch="):
        scheduler.step(MODEL, step=3, tokens=500)
    assert scheduler.step(MODEL, step=3, epoch=1.4) is None
    assert scheduler.step(MODEL, step=4, epoch=1.5) is not None


def test_plateau_counts_reports_without_improvement(calls: list[SimpleNamespace]) -> None:
    scheduler = faked([entry(plateau={"metric": "val_loss", "patience": 2, "min_delta": 0.1})] * 2)
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
    scheduler = faked([entry(plateau={"metric": "val_los"})])
    with pytest.raises(SpecError, match=r"'val_los', which is not reported; did you mean val_loss\?"):
        scheduler.step(MODEL, step=0, metrics={"val_loss": 1.0})


def test_a_loop_that_measures_some_metrics_more_often_reports_them_apart() -> None:
    trigger: dict[str, Any] = {"plateau": {"metric": "a", "patience": 2}, "below": {"metric": "b", "value": 1.0}}
    scheduler = GrowthScheduler([event({"op": "evaluate"}, **trigger)])
    reports = [{"a": 1.0}, {"c": 0.0}, {"b": 0.5}, {"b": 0.4}, {"a": 1.0}, {"b": 0.3}, {"a": 2.0}]
    assert [bool(scheduler.step(MODEL, step=i, metrics=Partial(r))) for i, r in enumerate(reports)] == [
        *[False] * 6,
        True,
    ]
    with pytest.raises(SpecError, match="watches the metric 'a', which is not reported"):
        GrowthScheduler([event({"op": "evaluate"}, **trigger)]).step(MODEL, step=0, metrics={"b": 0.5})


def test_conditions_of_a_trigger_hold_together(calls: list[SimpleNamespace]) -> None:
    scheduler = faked([entry(step=4, below={"metric": "loss", "value": 2.0}), entry(seconds=5, tokens=1)])
    assert scheduler.step(MODEL, step=2, metrics={"loss": 1.5}) is None, "too early"
    assert scheduler.step(MODEL, step=3, metrics={"loss": 2.5}) is None, "neither"
    assert scheduler.step(MODEL, step=5) is None, "the last report is not below"
    assert scheduler.step(MODEL, step=6, metrics={"loss": 2.0}) is None, "not below itself"
    assert scheduler.step(MODEL, step=7, metrics={"loss": 1.0}) is not None
    assert scheduler.step(MODEL, step=8, tokens=1, seconds=4.9) is None
    assert scheduler.step(MODEL, step=8, tokens=0, seconds=5.0) is None
    assert scheduler.step(MODEL, step=8, tokens=1, seconds=5.0) is not None


def test_the_clock_is_the_schedulers_own_unless_the_loop_passes_one(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    schedule = [event({"op": "evaluate"}, seconds=10)]
    scheduler = GrowthScheduler(schedule)
    now[0] += 6
    assert scheduler.step(MODEL, step=1) is None
    state, now[0] = scheduler.state_dict(), 1000.0
    resumed = GrowthScheduler(schedule)
    resumed.load_state_dict(state)
    now[0] += 3
    assert resumed.step(MODEL, step=2) is None
    now[0] += 1
    assert resumed.step(MODEL, step=3) is not None


RATE: dict[str, Any] = {"op": "learning_rate"}


def done_by(schedule: list[Any], until: int, **sizes: Any) -> GrowthScheduler:
    scheduler = GrowthScheduler(schedule, **sizes)
    for step in range(until + 1):
        while scheduler.step(MODEL, step=step):
            pass
    return scheduler


def test_learning_rates_scale_and_warm_up_again() -> None:
    schedule = [event({**RATE, "rewarm": 4, "from": 0.2}, step=10), event({**RATE, "scale": 0.5}, step=12)]
    one = done_by(schedule, 11)
    assert [one.lr_factor(s) for s in (10, 11, 12, 14, 100)] == pytest.approx([0.2, 0.4, 0.6, 1.0, 1.0])
    both = done_by(schedule, 12)
    assert [both.lr_factor(s) for s in (12, 14, 100)] == pytest.approx([0.3, 0.5, 0.5])
    assert both.learning_rate(lambda step: 1.0 / (step + 1), 99) == pytest.approx(0.005)


def test_learning_rates_are_set_and_moved_along_the_loops_schedule() -> None:
    def base(step: int) -> float:
        return 1.0 - step / 100

    schedule = [
        event({**RATE, "scale": 7}, step=5),
        event({**RATE, "set": 0.4}, step=20),
        event({**RATE, "position": 0}, step=30),
    ]
    scheduler = done_by(schedule, 29)
    assert scheduler.learning_rate(base, 20) == pytest.approx(0.4), "whatever it was scaled by"
    assert scheduler.learning_rate(base, 60) == pytest.approx(0.2), "and the loop's own shape from there"
    with pytest.raises(SpecError, match=r"events\.1 sets the learning rate .* use scheduler.learning_rate"):
        scheduler.lr_factor(3)
    moved = done_by(schedule, 30)
    assert moved.learning_rate(base, 30) == pytest.approx(0.5)
    assert moved.learning_rate(base, 80) == pytest.approx(0.25)


def test_the_learning_rate_of_others_is_steered_while_the_optimizer_steps() -> None:
    """A cosine of torch.optim, once with a tensor for its rate: the steps have the factor, the cosine does not."""
    schedule = [
        event({**RATE, "scale": 0.5}, step=2),
        event({**RATE, "rewarm": 2, "from": 0.0}, step=4),
        event({**RATE, "set": 0.3}, step=7),
    ]
    for start in (0.1, torch.tensor(0.1, dtype=torch.float64)):
        p = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        optimizer = torch.optim.SGD([p], lr=start)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
        scheduler = GrowthScheduler(schedule)
        steering, steps, own = scheduler.steer(optimizer), [], []
        for step in range(10):
            while scheduler.step(MODEL, optimizer, step=step):
                pass
            if step == 9:
                resumed = GrowthScheduler(schedule)
                resumed.load_state_dict(json.loads(json.dumps(scheduler.state_dict())))
                resumed.step(MODEL, optimizer, step=step)
                steering.remove()
                steering = resumed.steer(optimizer)
            p.grad, before = torch.ones_like(p), p.item()
            own.append(float(optimizer.param_groups[0]["lr"]))
            optimizer.step()
            steps.append(before - p.item())
            assert float(optimizer.param_groups[0]["lr"]) == own[-1]
            cosine.step()
        plain = torch.optim.lr_scheduler.CosineAnnealingLR(torch.optim.SGD([p], lr=0.1), 20)
        expected = []
        for _ in range(10):
            expected.append(plain.get_last_lr()[0])
            plain.optimizer.step()
            plain.step()
        assert own == pytest.approx(expected)
        factors = [1, 1, 0.5, 0.5, 0, 0.25, 0.5, *[0.3 / own[7]] * 3]
        assert steps == pytest.approx([f * r for f, r in zip(factors, own, strict=True)])
        steering.remove()
        before = p.item()
        optimizer.step()
        assert before - p.item() == pytest.approx(float(optimizer.param_groups[0]["lr"]))
    with pytest.raises(SpecError, match=r"events\.0 moves the learning rate's position"):
        GrowthScheduler([event({**RATE, "position": 3}, step=1)]).steer(optimizer)


def test_a_learning_rate_is_not_set_where_its_own_is_zero_or_unknown() -> None:
    """A set rate is a factor on the loop's own: of 0 there is none, and without an optimizer nobody knows it."""
    schedule = [event({**RATE, "set": 0.3}, step=0)]
    optimizer = torch.optim.SGD(MODEL.parameters(), lr=0.0)
    scheduler = GrowthScheduler(schedule)
    scheduler.step(MODEL, optimizer, step=0)
    with pytest.raises(SpecError, match=r"events\.0 sets the learning rate after step 0, where the loop's own is 0"):
        scheduler.learning_rate(lambda step: step / 10, 5)
    with pytest.raises(SpecError, match=r"events\.0: a learning rate is set by a factor on the optimizer's own"):
        scheduler.steer(optimizer)
    for given in (optimizer, None):
        steered = GrowthScheduler(schedule)
        steered.steer(optimizer)
        with pytest.raises(SpecError, match="which is 0 here, or no optimizer is passed"):
            steered.step(MODEL, given, step=0)
        assert steered.done == []


@pytest.mark.parametrize(("old", "factor", "new"), [(100, 0.57, 57), (100, 0.29, 29), (10, 0.35, 3), (3, 0.1, 1)])
def test_sizes_are_multiplied_by_factors_as_they_are_written(old: int, factor: float, new: int) -> None:
    scheduler = GrowthScheduler([event({"op": "accumulation", "factor": factor}, step=0)], accumulation=old)
    scheduler.step(MODEL, step=0)
    assert scheduler.accumulation == new


@pytest.mark.parametrize("wrong", [{"accumulation": 0}, {"batch_size": -1}, {"sequence_length": 1.5}])
def test_a_size_at_the_start_is_a_number_above_zero(wrong: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match=f"{next(iter(wrong))}=.* is no number of 1 or more"):
        GrowthScheduler([], **wrong)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"step": 2.5}, "step=2.5 is no whole number"),
        ({"step": -1}, "step=-1 is no whole number"),
        ({"step": 3, "tokens": 9, "metrics": {"loss": "low"}}, "'low' is no number"),
        ({"step": 3, "metrics": {"loss": 1.0}}, "waits for tokens"),
        ({"step": 3, "tokens": math.nan, "metrics": {"loss": 9.0}}, "tokens=nan is no number of 0 or more"),
        ({"step": 3, "tokens": "9"}, "tokens='9' is no number of 0 or more"),
        ({"step": 3, "tokens": 9, "epoch": -1}, "epoch=-1 is no number"),
        ({"step": 3, "tokens": 9, "seconds": [1]}, r"seconds=\[1\] is no number"),
        ({"step": 3, "tokens": 9, "metrics": [1]}, r"metrics=\[1\] is no mapping from names to numbers"),
        ({"step": 3, "tokens": 9, "metrics": {"loss": "1"}}, "'1' is no number"),
        ({"step": 3, "tokens": 9, "metrics": {"loss": None, 1: 2}}, "'loss', which is not reported; known: 1"),
        ({"step": 3, "optimizer": "adam"}, "str is no torch.optim.Optimizer"),
        ({"step": 3, "optimizer": [None]}, "NoneType is no torch.optim.Optimizer"),
    ],
)
def test_what_cannot_be_read_of_a_loop_leaves_the_scheduler_as_it_was(given: dict[str, Any], expected: str) -> None:
    trigger: dict[str, Any] = {"tokens": 5, "plateau": {"metric": "loss", "patience": 1}}
    scheduler = GrowthScheduler([event({"op": "evaluate"}, **trigger)])
    scheduler.step(MODEL, step=1, tokens=1, metrics={"loss": 2.0})
    before = scheduler.state_dict()
    with pytest.raises(FxgrowError, match=expected):
        scheduler.step(MODEL, **given)
    assert scheduler.state_dict() == before
    assert scheduler.step(MODEL, step=torch.tensor(3), tokens=9, metrics={"loss": torch.tensor(2.0)})  # type: ignore[arg-type, dict-item]
    json.dumps(scheduler.state_dict())


def test_what_a_scheduler_is_given_is_of_its_kind() -> None:
    scheduler: Any = GrowthScheduler([entry(step=1)], lambda: (torch.ones(2, 3),))
    for call, expected in [
        (lambda: scheduler.step(3, step=1), "the model is a int, and no torch.nn.Module"),
        (lambda: scheduler.check([]), "the model is a list"),
        (lambda: scheduler.check(MODEL, torch.optim.SGD), "type is no torch.optim.Optimizer"),
        (lambda: scheduler.check(MODEL), r"args\(\) returned tuple of 1, not the two \(args, kwargs\)"),
        (lambda: scheduler.step(MODEL, step=1), r"args\(\) returned tuple of 1, not the two \(args, kwargs\)"),
        (lambda: scheduler.learning_rate(0.1, 1), "base=0.1 is no function of a step"),
        (lambda: scheduler.lr_factor("1"), "step='1' is no whole number"),
        (lambda: scheduler.steer("adam"), "str is no torch.optim.Optimizer"),
        (lambda: GrowthScheduler([entry(step=1)], verify="no").step(MODEL, step=1), "verify='no' is none of 'auto'"),
    ]:
        with pytest.raises(FxgrowError, match=expected):
            call()
        assert scheduler.done == []


def test_metrics_that_are_no_numbers_any_more_are_kept_through_json() -> None:
    trigger: dict[str, Any] = {"plateau": {"metric": "a", "patience": 3}, "below": {"metric": "b", "value": 0.0}}
    schedule = [event({"op": "evaluate"}, **trigger)]
    reports = [(1.0, math.nan), (math.nan, math.inf), (math.nan, -math.inf), (-math.inf, math.nan), (math.nan, 1.0)]
    reports += [(-math.inf, 1.0), (0.0, -1.0)]
    whole, fired = GrowthScheduler(schedule), [list[int](), list[int]()]
    parted = GrowthScheduler(schedule)
    for step, (a, b) in enumerate(reports):
        for which, scheduler in enumerate((whole, parted)):
            if scheduler.step(MODEL, step=step, metrics={"a": a, "b": b}):
                fired[which].append(step)
        state = json.loads(json.dumps(parted.state_dict(), allow_nan=False))
        parted = GrowthScheduler(schedule)
        parted.load_state_dict(state)
    assert fired == [[6], [6]]


def test_batches_grow_and_the_learning_rate_follows() -> None:
    schedule = [
        event({"op": "accumulation", "factor": 1.5}, step=1),
        event({"op": "accumulation", "factor": 0.1}, step=2),
        event({"op": "accumulation", "set": 16, "learning_rate": "sqrt"}, step=3),
        event({"op": "batch_size", "factor": 2, "learning_rate": "linear"}, step=4),
        event({"op": "sequence_length", "set": 64}, step=5),
    ]
    found = []
    scheduler = GrowthScheduler(schedule, accumulation=3, batch_size=10)
    for step in range(6):
        done = scheduler.step(MODEL, step=step)
        found.append((scheduler.accumulation, scheduler.batch_size, scheduler.sequence_length, scheduler.lr_factor(9)))
        assert done is None or (done.before | done.after).keys() >= {done.op}
    assert found == [
        (3, 10, None, 1),
        (4, 10, None, 1),  # rounded down
        (1, 10, None, 1),  # never below 1
        (16, 10, None, 4),
        (16, 20, None, 8),
        (16, 20, 64, 8),
    ]
    with pytest.raises(SpecError, match=r"events\.3 multiplies the batch size, and the scheduler does not know it"):
        GrowthScheduler(schedule)


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)
        self.drop, self.attention_dropout = torch.nn.Dropout(0.1), 0.1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.drop(torch.tanh(self.up(x))))


def test_weight_decay_dropout_and_what_learns() -> None:
    model = Net()
    optimizer = torch.optim.AdamW(
        [{"params": [model.up.weight], "weight_decay": 0.1}, {"params": [model.up.bias], "weight_decay": 0.0}]
    )
    model.up.bias.grad = torch.ones(4)
    schedule = [
        event({"op": "weight_decay", "scale": 0.5}, step=1),
        event({"op": "weight_decay", "set": 0.3}, step=2),
        event({"op": "dropout", "p": 0.25}, step=3),
        event({"op": "freeze", "what": "up.*"}, step=4),
        event({"op": "unfreeze", "what": "*.weight"}, step=5),
    ]
    scheduler, results = GrowthScheduler(schedule), []
    for step in range(6):
        while done := scheduler.step(model, optimizer, step=step):
            assert done.module is model and done.optimizer is optimizer
            results.append((done.op, done.before, done.after))
        if step == 4:
            assert [n for n, p in model.named_parameters() if p.requires_grad] == ["down.weight", "down.bias"]
            assert model.up.bias.grad is None
    assert results == [
        ("weight_decay", {"weight_decay": [0.1]}, {"weight_decay": [0.05]}),
        ("weight_decay", {"weight_decay": [0.05]}, {"weight_decay": [0.3]}),
        ("dropout", {"dropout": [0.1]}, {"dropout": [0.25], "places": 2}),
        ("freeze", {}, {"frozen": 2, "numbers": 16}),
        ("unfreeze", {}, {"unfrozen": 1, "numbers": 12}),
    ]
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.3, 0.0]
    assert (model.drop.p, model.attention_dropout) == (0.25, 0.25)
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["up.bias"]


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        ({"op": "dropout", "p": 0.2, "modules": "uo"}, "no dropout in the modules that match 'uo'"),
        ({"op": "freeze", "what": "up.wieght"}, r"no learning parameter matches 'up.wieght'; did you mean up.weight"),
        ({"op": "freeze", "what": "old"}, "nothing has grown yet"),
        ({"op": "unfreeze", "what": "*"}, r"no frozen parameter matches '\*'"),
        ({"op": "unfreeze", "what": "old"}, "no `freeze: old` of this schedule holds anything"),
        ({"op": "weight_decay", "set": 0.2}, "no group of the optimizer has a weight decay"),
    ],
)
def test_an_action_that_cannot_be_done_changes_nothing(operation: dict[str, Any], expected: str) -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = GrowthScheduler([event(operation, {"op": "accumulation", "set": 4}, step=0)])
    before = scheduler.state_dict()
    with pytest.raises(SpecError, match=expected):
        scheduler.step(model, optimizer, step=0)
    assert scheduler.state_dict() == before
    skipping = GrowthScheduler([{**event(operation, {"op": "accumulation", "set": 4}, step=0), "on_error": "skip"}])
    first, second = (skipping.step(model, optimizer, step=0) for _ in range(2))
    assert first is not None and first.op == operation["op"] and first.error and first.to_dict()["error"] == first.error
    assert second is not None and second.op == "accumulation" and not second.error
    assert skipping.accumulation == 4 and skipping.next is None
    resumed = GrowthScheduler(skipping.schedule)
    resumed.load_state_dict(json.loads(json.dumps(skipping.state_dict())))
    assert resumed.state_dict() == skipping.state_dict()
    resumed.replay(model, optimizer)  # what was left out is left out again


def test_a_failed_growth_raises_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise GrowthRefused("no")

    monkeypatch.setattr(scheduling, "grow", refuse)
    scheduler = faked([entry(plateau={"patience": 1})])
    scheduler.step(MODEL, step=1, metrics={"val_loss": 1.0})
    before = scheduler.state_dict()
    with pytest.raises(GrowthRefused):
        scheduler.step(MODEL, step=2, metrics={"val_loss": 1.0})
    assert scheduler.state_dict() == before
    assert scheduler.done == []


def test_state_survives_json_and_resumes(calls: list[SimpleNamespace]) -> None:
    schedule = [
        {**entry({**RATE, "rewarm": 10, "from": 0.5}, step=1), "optimizer": "copy"},
        entry(plateau={"patience": 2}),
    ]
    scheduler = faked(schedule)
    scheduler.step(MODEL, step=1)
    between = json.loads(json.dumps(scheduler.state_dict()))
    scheduler.step(MODEL, step=1)
    scheduler.step(MODEL, step=2, metrics={"val_loss": 1.0})
    scheduler.step(MODEL, step=3, metrics={"val_loss": 1.0})
    state = json.loads(json.dumps(scheduler.state_dict()))
    other = faked(schedule)
    other.load_state_dict(state)
    assert other.state_dict() == scheduler.state_dict()
    assert other.lr_factor(6) == scheduler.lr_factor(6) == pytest.approx(0.75)
    assert other.step(MODEL, step=4, metrics={"val_loss": 1.0}) is not None
    half = faked(schedule)
    half.load_state_dict(between)
    done = half.step(MODEL, step=1)
    assert done is not None and (done.event, done.op) == (0, "learning_rate"), "an event goes on where it stopped"
    calls.clear()
    optimizer = torch.optim.SGD(MODEL.parameters(), lr=0.5)
    module, carried = other.replay(MODEL, optimizer)
    assert len(calls) == 2
    assert calls[0].model is MODEL
    assert calls[1].model is not MODEL
    asked = {"optimizer": [optimizer], "policy": "copy", "ramp": None}
    assert calls[0].how == {"verify": False, "consume": False, **asked}
    assert carried is not optimizer
    assert module is not MODEL


def test_state_of_another_schedule_is_refused(calls: list[SimpleNamespace]) -> None:
    scheduler = faked([entry(step=1)])
    scheduler.step(MODEL, step=1)
    state = scheduler.state_dict()
    other = faked([{**entry(step=1), "operations": [{**WIDEN, "factor": 3}]}])
    with pytest.raises(SpecError, match=r"events\.0 of the schedule is not the one that this run has already made"):
        other.load_state_dict(state)
    assert other.done == []
    with pytest.raises(SpecError, match="version 9"):
        other.load_state_dict({**state, "version": 9})
    longer = faked([entry(step=1), entry(step=5)])  # adding a growth still to come is fine
    longer.load_state_dict(state)
    assert longer.next is not None


def test_example_inputs_may_be_made_anew_and_compiled_models_are_passed_on(calls: list[SimpleNamespace]) -> None:
    scheduler = faked([entry(step=0)], args=lambda: ((1,), {"k": 2}))
    compiled: Any = torch.compile(MODEL)
    scheduler.step(compiled, step=0)  # never called, so nothing is compiled
    assert calls[0].args == (1,)
    assert calls[0].kwargs == {"k": 2}
    assert calls[0].model is compiled


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
    assert good.check(model).parameters == [size, size + 4 * (3 + 1 + 2), size + 12 * (3 + 1 + 2)]
    assert good.done == []
    bad = GrowthScheduler(
        [entry(step=1), {**entry(step=2), "operations": [WIDEN, {**WIDEN, "axis": "*/hiden"}], "name": "second"}], args
    )
    with pytest.raises(SpecError, match=r"events\.1 \(second\): operations\.1 \(widen\): no axis matches"):
        bad.check(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("in_place", [True, False])
def test_a_growth_and_a_refused_one_in_a_loop_of_ones_own(in_place: bool) -> None:
    torch.manual_seed(0)
    model, x = Chain(), torch.randn(5, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = GrowthScheduler(
        [
            {**entry(step=2), "optimizer": {"policy": "copy"}},
            event({**WIDEN, "axis": "no"}, step=3),
        ],
        args=(x[:2],),
        in_place=in_place,
    )
    current: torch.nn.Module = model
    used = optimizer
    for step in range(3):
        before = current(x)
        while done := scheduler.step(current, used, step=step):
            torch.testing.assert_close(done.module(x), before)
            assert isinstance(done.optimizer, torch.optim.AdamW)
            assert done.optimizer.state[done.module.get_parameter("up.weight")]["step"] == 2
            assert (done.before, done.after) == ({"parameters": 26}, {"parameters": 50})
            assert (done.module is model, done.optimizer is optimizer) == (in_place, in_place)
            current, used = done.module, done.optimizer
        current(x).square().mean().backward()
        used.step()
        used.zero_grad()
    assert current.get_parameter("up.weight").shape == (8, 3)
    values = [p.detach().clone() for p in current.parameters()]
    state = json.dumps(scheduler.state_dict())
    with pytest.raises(SpecError, match="no"):
        scheduler.step(current, used, step=3)
    assert json.dumps(scheduler.state_dict()) == state
    assert all(torch.equal(a, b) for a, b in zip(values, current.parameters(), strict=True))
    assert used.param_groups[0]["params"] == list(current.parameters())


def test_a_growth_that_the_optimizer_cannot_follow_leaves_the_model_as_it_was() -> None:
    """The model has grown already when the optimizer is carried over."""

    class Odd(torch.optim.SGD):
        """Keeps a parameter beside its groups, which nothing could exchange."""

        def __init__(self, params: Any) -> None:
            super().__init__(params, lr=0.1, momentum=0.9)
            self.kept = [p for g in self.param_groups for p in g["params"]]

    torch.manual_seed(0)
    model, x = Chain(), torch.randn(5, 3)
    optimizer = Odd(model.parameters())
    model(x).sum().backward()
    optimizer.step()
    held, expected = [dict(vars(m)) for m in model.modules()], model(x)
    parameters = list(model.parameters())
    scheduler = GrowthScheduler([entry(step=0)], (x,))
    with pytest.raises(fxgrow.FxgrowError, match="kept"):
        scheduler.step(model, optimizer, step=0)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert [dict(vars(m)) for m in model.modules()] == held
    assert torch.equal(model(x), expected) and scheduler.done == []
    optimizer.step()
    assert not torch.equal(model(x), expected)


def test_old_parameters_stand_still_between_two_events() -> None:
    torch.manual_seed(0)
    model, x = Chain(), torch.randn(5, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = GrowthScheduler(
        [
            event({**WIDEN, "fill": "add"}, {"op": "freeze", "what": "old"}, step=0),
            event({"op": "unfreeze", "what": "old"}, {"op": "checkpoint"}, step=2),
        ],
        (x,),
    )
    old, done = [], []
    for step in range(4):
        while each := scheduler.step(model, optimizer, step=step):
            done.append(each.op)
        old.append(model.up.weight[:4].detach().clone())
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert done == ["grow", "freeze", "unfreeze", "checkpoint"]
    assert torch.equal(old[0], old[2]) and not torch.equal(old[2], old[3])
    assert model.up.weight.shape == (8, 3)


def test_new_parameters_stand_still_between_two_events() -> None:
    torch.manual_seed(0)
    model, x = Chain(), torch.randn(5, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    new = {"op": "freeze", "what": "new"}
    schedule = [
        event({**WIDEN, "fill": "add"}, new, step=1),
        event({"op": "unfreeze", "what": "new"}, {"op": "freeze", "what": "old"}, step=3),
    ]
    scheduler = GrowthScheduler(schedule, (x,))
    assert [r.op for r in scheduler.check(model, optimizer).rows[1:]] == ["grow", "freeze", "unfreeze", "freeze"]
    rows = []
    for step in range(5):
        while done := scheduler.step(model, optimizer, step=step):
            assert done.op != "freeze" or done.step != 1 or done.after == {"numbers": 4 * (3 + 1 + 2)}
        rows.append(model.up.weight.detach().clone())
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        if step == 2:  # where the new stand still
            again, other = Chain(), GrowthScheduler(schedule, (x,))
            other.load_state_dict(json.loads(json.dumps(scheduler.state_dict())))
            other.replay(again, torch.optim.AdamW(again.parameters()))
            assert other.step(again, step=3).op == "unfreeze"  # type: ignore[union-attr]
    with pytest.raises(FxgrowError, match=r"new parameters stand still \(freeze: new\): unfreeze `new`"):
        GrowthScheduler([*schedule[:1], event(WIDEN, step=3)], (x,)).check(Chain())
    assert torch.equal(rows[1][4:], rows[2][4:]) and not torch.equal(rows[1][:4], rows[2][:4])
    assert torch.equal(rows[3][:4], rows[4][:4]) and not torch.equal(rows[3][4:], rows[4][4:])


@pytest.mark.parametrize("what", ["*", "old"])
def test_unfreeze_lets_entries_go_that_stood_still(what: str) -> None:
    """By name, too: what `freeze: old` holds of a widened weight is let go with the rest, or it is refused."""
    model, x = Net(), torch.randn(5, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    old, widen = {"op": "freeze", "what": "old"}, {**WIDEN, "axis": "./hidden"}
    schedule = [event(widen, old, step=1), event({"op": "unfreeze", "what": what}, step=2), event(widen, step=3)]
    scheduler = GrowthScheduler(schedule, (x,))
    assert len(scheduler.check(model, optimizer).rows) == 5
    for step in range(4):
        while scheduler.step(model, optimizer, step=step):
            pass
        before = model.up.weight.detach().clone()
        optimizer.zero_grad()
        model.up.weight.grad = torch.ones_like(model.up.weight)
        if step != 1:
            optimizer.step()
            assert (model.up.weight != before).all(), step
    assert scheduler.next is None
    for wrong, expected in [({"op": "unfreeze", "what": "up.*"}, "lets go all that it holds"), (old, "still already")]:
        partly = GrowthScheduler([event(widen, old, wrong, step=1)], (x,))
        model = Net()
        assert [partly.step(model, step=1).op for _ in range(2)] == ["grow", "freeze"]  # type: ignore[union-attr]
        with pytest.raises(SpecError, match=expected):
            partly.step(model, step=1)
        with pytest.raises(FxgrowError):
            GrowthScheduler([event(old, step=1)], (x,)).check(model)


def test_several_optimizers_go_along() -> None:
    torch.manual_seed(0)
    model, x = Chain(), torch.randn(5, 3)
    optimizers = [torch.optim.SGD(model.up.parameters(), lr=0.1), torch.optim.AdamW(model.down.parameters())]
    scheduler = GrowthScheduler([entry(step=0)], (x,))
    done = scheduler.step(model, optimizers, step=0)
    assert done is not None and done.optimizer is optimizers
    assert [o.param_groups[0]["params"] for o in optimizers] == [
        list(model.up.parameters()),
        list(model.down.parameters()),
    ]


def test_a_running_average_goes_along() -> None:
    model, x = trained(Chain().double()), torch.randn(5, 3, dtype=torch.float64)
    average = torch.optim.swa_utils.AveragedModel(model)
    trained(model, seed=1)
    average.update_parameters(model)
    average.update_parameters(trained(model, seed=2))
    before = average(x)
    lora = {"op": "lora", "modules": "*", "rank": 2}
    schedule = [event({**WIDEN, "factor": 3}, lora, step=0), event({"op": "lora_merge", "modules": "up"}, step=1)]
    scheduler = GrowthScheduler([*schedule, event({"op": "lora_decay", "steps": 2}, step=2)], (x,), verify=False)
    for step in range(2):
        done = scheduler.step(model, step=step)
        assert done is not None
        done.apply_to_copy_(average)
        assert torch.allclose(average(x), before, rtol=0, atol=1e-12)
        average.update_parameters(trained(model, seed=3 + step))
        before = average(x)
        assert list(average.module.state_dict()) == list(model.state_dict())
    done = scheduler.step(model, step=2)
    with pytest.raises(FxgrowError, match="adapters of a copy do not fade"):
        done.apply_to_copy_(average)  # type: ignore[union-attr]


def test_a_scheduler_that_is_loaded_again_forgets_what_it_held_in_another_model() -> None:
    schedule = [event(WIDEN, {"op": "freeze", "what": "old"}, step=0), event({"op": "unfreeze", "what": "old"}, step=1)]
    scheduler = GrowthScheduler(schedule, (torch.randn(5, 3),), verify=False)
    first, second = Chain(), Chain()
    while scheduler.step(first, step=0):
        pass
    state = json.loads(json.dumps(scheduler.state_dict()))
    for _ in range(2):
        scheduler.load_state_dict(state)
        scheduler.replay(second)
        assert not second.up.bias.grad and not second.down.bias.requires_grad
        assert scheduler.step(second, step=1).op == "unfreeze"  # type: ignore[union-attr]
        assert second.down.bias.requires_grad and not first.down.bias.requires_grad
        second = Chain()


def test_a_traced_module_is_grown_in_place() -> None:
    model, x = Chain(), torch.randn(5, 3)
    traced = torch.fx.symbolic_trace(model)
    assert GrowthScheduler([entry(step=0)], (x,)).step(traced, step=0) is not None
    assert traced.up.weight.shape == (8, 3) and torch.allclose(traced(x), model(x), atol=1e-6)


def test_new_parameters_go_to_the_group_that_is_said() -> None:
    model, x = Chain(), torch.randn(5, 3)
    groups = [{"params": [p for p in model.parameters() if (p.dim() < 2) == small]} for small in (False, True)]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    schedule = [event({"op": "lora", "modules": "*", "rank": 2}, step=0)]
    scheduler = GrowthScheduler(schedule, (x,), newcomers=lambda name: 1 if name.endswith("lora_B") else None)
    assert scheduler.step(model, optimizer, step=0) is not None
    names = {id(p): n for n, p in model.named_parameters()}
    held = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    assert held == [
        ["up.weight", "up.lora_A", "down.weight", "down.lora_A"],
        ["up.bias", "up.lora_B", "down.bias", "down.lora_B"],
    ]
    scheduler = GrowthScheduler(schedule, (x,), newcomers=lambda _: 2)
    model = Chain()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(FxgrowError, match="newcomers=2: the optimizer has groups 0 to 0"):
        scheduler.step(model, optimizer, step=0)
    assert len(list(model.parameters())) == len(optimizer.param_groups[0]["params"]) == 4


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
    assert len(scheduler.check(model).parameters) == 2
    predicted, loss = model(x), model(x, y)
    assert scheduler.step(model, step=0) is not None
    torch.testing.assert_close(model(x), predicted)
    torch.testing.assert_close(model(x, y), loss)


def test_ranks_decide_by_the_mean_of_what_they_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    others: list[float | None] = []

    def gather(values: list[Any], own: Any, **_: Any) -> None:
        counts = own.value[1]
        values[:] = [own, *(own._replace(value=({"val_loss": other}, counts)) for other in others)]

    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda *_: 2)
    monkeypatch.setattr("torch.distributed.all_gather_object", gather)
    below = {"metric": "val_loss", "value": 2.0}
    scheduler = GrowthScheduler([event({"op": "evaluate"}, below=below)] * 2)
    for own, other, happens in ((1.0, 3.1, False), (3.1, 1.0, False), (1.0, 2.9, True), (2.9, 1.0, True)):
        others[:] = [other]
        done = scheduler.step(MODEL, step=len(others) + int(own * 10 + other * 100), metrics={"val_loss": own})
        assert (done is not None) is happens
    fresh = GrowthScheduler([event({"op": "evaluate"}, below=below)])
    for value, other in ((None, 1.0), (1.0, None)):
        others[:] = [other]
        with pytest.raises(SpecError, match=r"ranks \[[01]\] do not report the metric 'val_loss'"):
            fresh.step(MODEL, step=2, metrics=None if value is None else {"val_loss": value})
    others[:] = [None]
    assert fresh.step(MODEL, step=2) is None, "no rank has measured"
