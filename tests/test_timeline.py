"""The dry run of a schedule: what it says of the run, and what it refuses before the first step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxgrow.errors import FxgrowError
from fxgrow.scheduler import GrowthScheduler

WIDEN = {"op": "widen", "axis": "./hidden", "factor": 2}
OLD = {"op": "freeze", "what": "old"}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.drop, self.down = nn.Linear(3, 4), nn.Dropout(0.1), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.drop(torch.tanh(self.up(x)))).square().mean()


def event(*operations: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"trigger": {"step": 3}, "operations": list(operations), **more}


def test_a_row_says_what_the_run_is_like_from_there_on() -> None:
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    schedule = [
        event(WIDEN, {"op": "learning_rate", "scale": 0.5}, {"op": "accumulation", "factor": 3}, name="wider"),
        event({**WIDEN, "axis": "./hiden"}, {"op": "dropout", "p": 0.5}, on_error="skip"),
        event({"op": "weight_decay", "set": 0.3}, WIDEN, trigger={"plateau": {}}),
    ]
    scheduler = GrowthScheduler(schedule, (torch.randn(5, 3),), accumulation=2, batch_size=5)
    timeline = scheduler.check(model, optimizer, lambda step: 1.0 - step / 10)
    rows = [(r.when, r.name, r.op, r.parameters, r.sizes.accumulation) for r in timeline.rows]
    assert rows == [
        ("start", "", "start", 26, 2),
        ("step 3", "wider", "grow", 50, 2),
        ("step 3", "wider", "learning_rate", 50, 2),
        ("step 3", "wider", "accumulation", 50, 6),
        ("step 3", "event 2", "grow", 50, 6),
        ("step 3", "event 2", "dropout", 50, 6),
        ("plateau of val_loss", "event 3", "weight_decay", 50, 6),
        ("plateau of val_loss", "event 3", "grow", 98, 6),
    ]
    assert [bool(r.left_out) for r in timeline.rows] == [False] * 4 + [True] + [False] * 3
    assert timeline.parameters == [26, 50, 98]
    assert [r.learning_rate for r in timeline.rows[:4]] == pytest.approx([1.0, 0.7, 0.35, 0.35])
    assert timeline.rows[-1].learning_rate is None
    # 2 × batch × in × out forward; backward the same for the weights, and for the inputs of all but the first layer
    assert [r.flops for r in (timeline.rows[0], timeline.rows[1])] == [
        10 * (2 * 3 * 4 + 3 * 4 * 2),
        10 * (2 * 3 * 8 + 3 * 8 * 2),
    ]
    assert timeline.rows[0].memory == 4 * 26 * 4, "weights, gradients, and AdamW's two moments in float32"
    lines = str(timeline).splitlines()
    assert "left out: operations.0 (widen): no axis matches './hiden'" in lines[5] and "left out" not in lines[4]
    assert lines[2].split()[-4:] == ["0.7", "2", "×", "5"]
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert optimizer.param_groups[0]["weight_decay"] == 0.1 and not optimizer.state and model.drop.p == 0.1


def test_an_optimizer_that_has_stepped_says_what_it_keeps() -> None:
    model, x = Net(), torch.randn(5, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for steps in range(2):
        timeline = GrowthScheduler([event(WIDEN)], (x,)).check(model, optimizer)
        assert [r.memory for r in timeline.rows] == [4 * 26 * 3, 4 * 50 * 3], steps
        model(x).backward()
        optimizer.step()
    assert GrowthScheduler([event(WIDEN)], (x,)).check(model).rows[0].memory == 4 * 26 * 2


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([event(WIDEN, {**WIDEN, "axis": "no"})], r"events\.0 \(step 3\): operations\.1 \(widen\): no axis matches"),
        ([event(WIDEN, name="first"), event(WIDEN, OLD), event(WIDEN)], r"events\.2 .*unfreeze `old` before the next"),
        ([event(OLD)], r"events\.0 .*nothing has grown yet"),
        ([event({"op": "freeze", "what": "upp.*"})], r"no parameter matches 'upp\.\*'"),
        ([event({"op": "dropout", "p": 0.1, "modules": "up"})], "no dropout in the modules that match 'up'"),
        ([event({"op": "weight_decay", "scale": 2})], "no group of the optimizer has a weight decay"),
        ([event({"op": "unfreeze"})], r"no frozen parameter matches '\*'"),
        ([event({"op": "unfreeze", "what": "old"})], "no `freeze: old` of this schedule holds anything"),
        ([event({"op": "freeze", "what": "up.*"}, {"op": "freeze", "what": "up.*"})], "no learning parameter matches"),
        ([event(WIDEN, OLD, OLD)], "old parameters stand still already"),
    ],
)
def test_what_cannot_be_done_is_refused_before_the_first_step(events: list[Any], expected: str) -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = GrowthScheduler(events, (torch.randn(5, 3),))
    with pytest.raises(FxgrowError, match=expected):
        scheduler.check(model, optimizer)
    assert scheduler.done == []


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.up, self.down, self.head = (
            nn.Embedding(7, 3),
            nn.Linear(3, 4),
            nn.Linear(4, 2),
            nn.Linear(2, 7),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.down(torch.tanh(self.up(self.table(tokens)))))  # type: ignore[no-any-return]


def lora(modules: str = "*", **more: Any) -> dict[str, Any]:
    return {"op": "lora", "modules": modules, "rank": 2, **more}


def merge(modules: str = "*") -> dict[str, Any]:
    return {"op": "lora_merge", "modules": modules}


@pytest.mark.parametrize("done", [0, 1], ids=["", "after the first growth"])
@pytest.mark.parametrize(
    ("operations", "expected"),
    [
        ((lora(), merge("up"), WIDEN, merge("down"), WIDEN, merge()), ""),
        ((lora(), merge("up"), lora("up", alpha=3), merge()), ""),
        ((lora(), merge("up"), {"op": "freeze", "what": "new"}), ""),
        ((lora("up"), WIDEN, merge(), {"op": "freeze", "what": "new"}), ""),
        ((lora(), merge("vocabulary"), {"op": "lora_scale", "factor": 0.5}), ""),
        ((lora(), merge("up"), {"op": "lora_scale", "factor": 0.5, "modules": "up"}), "no adapted module matches 'up'"),
        ((lora(), merge("vocabulary"), merge("vocabulary")), "no adapted module matches 'vocabulary'; known: up, down"),
        ((lora(), merge("up"), {**WIDEN, "axis": "up/rank"}), "no axis matches 'up/rank'"),
        ((lora(), merge("up"), {"op": "freeze", "what": "up.lora_?"}), r"parameter matches 'up.lora_\?'"),
        ((lora(), merge(), {"op": "freeze", "what": "old"}), "the growth made nothing new, or it is merged"),
    ],
)
def test_what_is_merged_is_gone_for_what_comes_after(operations: Any, expected: str, done: int) -> None:
    model, tokens = Tokens().double(), torch.randint(7, (5, 3))
    scheduler = GrowthScheduler([event(*operations)], (tokens,), verify=False)
    for _ in range(done):
        scheduler.step(model, step=3)
    if expected:
        with pytest.raises(FxgrowError, match=expected):
            scheduler.check(model)
        with pytest.raises(FxgrowError, match=expected):
            [scheduler.step(model, step=3) for _ in operations]
        return
    rows = [(r.op, r.parameters) for r in scheduler.check(model).rows[1:]]
    for op, parameters in rows:
        assert scheduler.step(model, step=3).op == op  # type: ignore[union-attr]
        assert sum(p.numel() for p in model.parameters()) == parameters, op
    assert scheduler.next is None


def test_a_policy_is_asked_of_its_growth_alone() -> None:
    """Padding under a norm has no exact gradients, and neither what came before it nor what comes after has it."""

    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.read, self.norm, self.up, self.down = (
                nn.Linear(3, 6),
                nn.LayerNorm(6),
                nn.Linear(6, 4),
                nn.Linear(4, 1),
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.down(torch.tanh(self.up(self.norm(self.read(x)))))  # type: ignore[no-any-return]

    model, x = Normed(), torch.randn(5, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    hidden = event({"op": "widen", "axis": "*/hidden", "factor": 2}, optimizer="exact")
    padded = event({"op": "widen", "axis": "norm.weight:0", "to": 9})
    scheduler = GrowthScheduler([hidden, {**padded, "optimizer": "copy"}, hidden], (x,), verify=False)
    names = [r.op for r in scheduler.check(model, optimizer).rows]
    assert names == ["start", "grow", "grow", "grow"]
    while scheduler.step(model, optimizer, step=3):
        pass
    assert scheduler.next is None
    wrong, model = GrowthScheduler([hidden, {**padded, "optimizer": "exact"}], (x,)), Normed()
    with pytest.raises(FxgrowError, match=r"events\.1 .*policy 'exact' needs a growth whose gradients follow"):
        wrong.check(model, torch.optim.AdamW(model.parameters()))


def test_a_weight_decay_that_an_event_takes_away_is_gone_for_the_next() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    events = [event({"op": "weight_decay", "set": 0}), event({"op": "weight_decay", "scale": 2})]
    with pytest.raises(FxgrowError, match=r"events\.1 .*no group of the optimizer has a weight decay"):
        GrowthScheduler(events, (torch.randn(5, 3),)).check(model, optimizer)
    assert optimizer.param_groups[0]["weight_decay"] == 0.1


def test_an_optimizer_of_another_model_is_refused_before_the_first_step() -> None:
    model, x = Net(), torch.randn(5, 3)
    other = torch.optim.SGD(Net().parameters(), lr=0.1)
    with pytest.raises(FxgrowError, match="holds no parameter that the model had"):
        GrowthScheduler([event(WIDEN)], (x,)).check(model, other)
    with pytest.raises(FxgrowError, match="LBFGS"):
        GrowthScheduler([event(WIDEN)], (x,)).check(model, torch.optim.LBFGS(model.parameters()))


def test_from_the_middle_of_an_event_on_only_what_is_to_come_is_looked_at() -> None:
    model, x = Net(), torch.randn(5, 3)
    scheduler = GrowthScheduler([event(WIDEN, {"op": "accumulation", "set": 4}, OLD), event(WIDEN)], (x,))
    for _ in range(2):
        assert scheduler.step(model, step=3) is not None
    with pytest.raises(FxgrowError, match=r"events\.1 .*unfreeze `old`"):
        scheduler.check(model)
    scheduler = GrowthScheduler([event(WIDEN, {"op": "accumulation", "set": 4}), event(WIDEN)], (x,))
    model = Net()
    assert scheduler.step(model, step=3) is not None
    assert [(r.op, r.parameters, r.sizes.accumulation) for r in scheduler.check(model).rows] == [
        ("start", 50, 1),
        ("accumulation", 50, 4),
        ("grow", 98, 4),
    ]
