"""The training loop: arithmetic of a step, growth in the middle, log and progress."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxgrow import training
from fxgrow.errors import FxgrowError, SpecError
from fxgrow.training import Hyper, base_rate, read_log, train
from tests.training.toy import GROWTHS, WIDEN, Net, batches, make, quiet, run, same


def test_the_optimizer_gets_the_cosine(tmp_path: Path) -> None:
    task = make()
    run(task, tmp_path)
    logged = [line["lr"] for line in read_log(tmp_path / "log.jsonl") if line["event"] == "step"]
    assert logged == [base_rate(step, task.hyper) for step in range(12)]


def test_warm_up_stable_and_decay() -> None:
    hyper = Hyper(
        steps=10, learning_rate=1.0, min_learning_rate=0.0, warmup=2, decay="linear", decay_from=6, decay_steps=10
    )
    assert [base_rate(step, hyper) for step in range(11)] == [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0]
    smooth = Hyper(steps=10, learning_rate=1.0, min_learning_rate=0.0, warmup=2, decay_from=6)
    assert [base_rate(step, smooth) for step in (5, 6, 8, 10)] == pytest.approx([1, 1, 0.5, 0])


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_accumulation_equals_one_big_batch(tmp_path: Path, clip: float) -> None:
    small, big = make(accumulation=3, clip=clip), make(clip=clip)
    drawn = 0

    def three(split: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        nonlocal drawn
        seeds = [training.seeded(0, split, drawn + i) for i in range(3)]
        drawn += 3 if split == "train" else 0
        parts = [batches(split, g) for g in seeds]
        return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])

    big.batches = three
    small.model.double(), big.model.double()
    for task in (small, big):
        task.loss = lambda model, batch: model(*(t.double() for t in batch))[1]
    one, other = run(small, tmp_path / "a"), run(big, tmp_path / "b")
    assert one.tokens == other.tokens == 12 * 3 * 8 * 3
    assert one.batches == 36
    for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert not same(one.model, make().model.double())  # it did train


def test_clipping_limits_the_norm_of_what_the_optimizer_sees(tmp_path: Path) -> None:
    seen = []

    class Spy(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            grads = [p.grad for g in self.param_groups for p in g["params"]]
            seen.append(float(torch.cat([g.flatten() for g in grads]).norm()))
            return super().step(closure)

    task = make(clip=1e-3)
    task.optimizer = lambda model, hyper: Spy(model.parameters(), lr=1.0)
    run(task, tmp_path)
    assert seen == pytest.approx([1e-3] * 12, rel=1e-2)
    logged = [line["grad_norm"] for line in read_log(tmp_path / "log.jsonl") if line["event"] == "step"]
    assert min(logged) > 2e-3  # the log has the norm before clipping


def test_evaluation_is_on_fixed_batches_in_eval_mode_and_leaves_the_mode(tmp_path: Path) -> None:
    task = make(dropout=0.5)
    data = [task.batches("val", training.seeded(0, "val", 0))]
    first, second = (training.evaluate(task, task.model, data) for _ in range(2))
    assert first == pytest.approx(second, rel=1e-12)  # dropout is off
    assert task.model.training


@pytest.mark.compile
@pytest.mark.slow
def test_compiled_training_grows_and_counts_like_eager(tmp_path: Path) -> None:
    growth = {"trigger": {"step": 2}, "operations": [{**WIDEN, "axis": "*/hidden"}]}
    eager, compiled = (
        run(make(schedule=[growth], steps=4, eval_every=2, compile=c), tmp_path / str(c)) for c in (False, True)
    )
    assert compiled.flops == eager.flops
    assert compiled.model.state_dict().keys() == eager.model.state_dict().keys()
    for name, tensor in eager.model.state_dict().items():
        torch.testing.assert_close(compiled.model.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("by_hand")
def test_a_growth_is_logged_and_the_loop_goes_on_with_it(tmp_path: Path) -> None:
    seen = []
    task = make(schedule=GROWTHS)
    original = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
    final = run(task, tmp_path, on_growth=lambda run, done: seen.append((run.step, done.name)))
    lines = read_log(tmp_path / "log.jsonl")
    growths = [line for line in lines if line["event"] == "growth"]
    assert seen[0] == (5, "event 1")
    assert growths[0]["parameters_before"] == 3 * 4 + 4 + 4 + 1
    assert growths[0]["parameters"] == 3 * 8 + 8 + 8 + 1
    assert growths[0]["moved"] < 1e-6
    assert growths[0]["moved"] == abs(growths[0]["val_loss_after"] - growths[0]["val_loss_before"])
    assert growths[0]["receipt"]["error_float64"] == 0.0, "what the growth reports is logged"
    assert growths[0]["accumulation"] == 2
    actions = [(line["op"], line["step"], line["what"]) for line in lines if line["event"] == "action"]
    assert actions == [
        ("learning_rate", 5, {"op": "learning_rate", "rewarm": 4, "from": 0.1}),
        ("accumulation", 5, {"op": "accumulation", "factor": 2.0}),
    ]
    assert growths[0]["what"]["operations"] == [WIDEN]
    steps = {line["step"]: line for line in lines if line["event"] == "step"}
    assert steps[5]["tokens"] == 5 * 24
    assert steps[6]["tokens"] == 7 * 24
    assert steps[6]["lr"] == pytest.approx(0.1 * base_rate(5, task.hyper))
    # the flops of a step follow the module that made it: 2 × 8 × 3 × hidden forward for the first layer, and so on
    per_unit = {step: steps[step]["flops"] - steps[step - 1]["flops"] for step in (4, 6)}
    assert per_unit[6] > 3 * per_unit[4]
    assert final.model is not task.model
    evals = [line for line in lines if line["event"] == "eval"]
    after = next(line for line in evals if line["step"] > 5)
    assert after["copies"] == 4
    assert 0 < after["apart_min"] <= after["apart_max"]
    assert not same(task.model, Net().double())  # trained up to the growth, then left alone
    assert {name: tensor.shape for name, tensor in original.items()} == {
        name: tensor.shape for name, tensor in task.model.state_dict().items()
    }


@pytest.mark.usefixtures("by_hand")
def test_every_logged_metric_can_be_watched(tmp_path: Path) -> None:
    for metric in ("train_loss", "val_loss"):
        growth = {"trigger": {"plateau": {"metric": metric, "patience": 1, "min_delta": 9}}, "operations": [WIDEN]}
        final = run(make(schedule=[growth]), tmp_path / metric)
        lines = read_log(tmp_path / metric / "log.jsonl")
        # the report at step 4 is the first and so the best, that at step 8 is no improvement by 9
        assert [line["step"] for line in lines if line["event"] == "growth"] == [8]
        assert final.step == 12


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({"batches": lambda split, generator: None}, r"batches\('val', …\) is of type NoneType, not tuple"),
        ({"loss": lambda model, batch: 1.0}, r"loss\(model, batch\) is of type float, not Tensor"),
        ({"loss": lambda model, batch: model(*batch)[0]}, r"has the shape \[8, 1\]: it is to be one number"),
        ({"optimizer": lambda model, hyper: None}, "is of type NoneType, not Optimizer"),
        (
            {"optimizer": lambda model, hyper: torch.optim.SGD(Net().parameters())},
            "SGD, holds no parameter of the model",
        ),
        ({"tokens": lambda batch: 1.5}, "tokens.batch.=1.5 is no whole number of 0 or more"),
        ({"epoch_tokens": 0}, "epoch_tokens are 0"),
        ({"model": None}, "model is of type NoneType, not Module"),
        ({"hyper": {}}, "hyper is of type dict, not Hyper"),
        ({"hyper": Hyper(device="abacus")}, "cannot be on the device 'abacus'"),
    ],
)
def test_what_a_task_gives_is_of_the_kind_that_it_says(tmp_path: Path, wrong: dict[str, Any], expected: str) -> None:
    with pytest.raises(SpecError, match=expected):
        run(replace(make(), **wrong), tmp_path)


def test_a_loss_that_is_not_finite_stops_before_the_update(tmp_path: Path) -> None:
    task = make()
    seen = []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        value = model(*batch)[1]
        if model.training:
            seen.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
            if len(seen) == 4:
                value = value * math.nan
        return value

    task.loss = loss
    with pytest.raises(FxgrowError, match="after 3 steps the training loss is nan"):
        run(task, tmp_path)
    assert all(torch.equal(task.model.state_dict()[name], seen[-1][name]) for name in seen[-1])


def test_progress_is_one_line_per_evaluation_where_there_is_no_terminal(tmp_path: Path) -> None:
    console = quiet()
    train(make(), tmp_path, console=console)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue().splitlines()
    assert [line.split()[1] for line in text if line.startswith("step")] == ["0/12", "4/12", "8/12", "12/12"]
