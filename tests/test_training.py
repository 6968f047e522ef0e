"""The training loop: arithmetic of a step, resume as if nothing had been, growth in the middle, checkpoints, log."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

import fxgrow
from fxgrow import scheduler, training
from fxgrow.errors import CheckpointError, FxgrowError, SpecError
from fxgrow.training import Copies, Hyper, Run, Task, cosine, read_log, train

torch.set_num_threads(1)


class Net(nn.Module):
    """Two layers and dropout; returns (prediction, loss) like the example GPT."""

    def __init__(self, hidden: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(3, hidden), nn.Linear(hidden, 1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        out = self.down(self.dropout(torch.tanh(self.up(x))))
        return out, F.mse_loss(out, y)


def batches(split: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x = torch.randn(8, 3, generator=generator, dtype=torch.float64)
    return x, x.prod(1, keepdim=True)


def make(hidden: int = 4, dropout: float = 0.0, schedule: Any = None, **hyper: Any) -> Task:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"steps": 12, "warmup": 3, "eval_every": 4, "log_every": 1, "learning_rate": 0.02}
    return Task(Net(hidden, dropout).double(), batches, Hyper(**settings | hyper), schedule, epoch_tokens=96)


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def run(task: Task, out: Path, **how: Any) -> Run:
    return train(task, out, console=quiet(), **how)


WIDEN = {"op": "widen", "axis": "./hidden", "factor": 2}


@pytest.fixture
def by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Growth of :class:`Net` written by hand, so that the loop is tested apart from the compiler."""

    def grow(model: Net, spec: Any, args: Any, kwargs: Any = None, **how: Any) -> SimpleNamespace:
        new = Net(2 * model.up.out_features, model.dropout.p).double()
        with torch.no_grad():
            for name, old in model.up.named_parameters():
                new.up.get_parameter(name).copy_(torch.cat([old, old]))
            noise = 0.01 * torch.ones_like(model.down.weight)
            new.down.weight.copy_(torch.cat([model.down.weight / 2 + noise, model.down.weight / 2 - noise], 1))
            new.down.bias.copy_(model.down.bias)

        def carry(optimizer: torch.optim.Optimizer, policy: str, warmup: int) -> torch.optim.Optimizer:
            groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
            matrices = [[p for p in new.parameters() if p.dim() == 2], [p for p in new.parameters() if p.dim() < 2]]
            return torch.optim.AdamW([{**g, "params": p} for g, p in zip(groups, matrices, strict=True)])

        return SimpleNamespace(module=new, carry=carry, receipt=SimpleNamespace(error_float64=0.0))

    monkeypatch.setattr(scheduler, "grow", grow)


def close(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """The same but for how matrix products order their sums, which may differ from call to call."""
    return left.keys() == right.keys() and all(
        torch.allclose(left[name], right[name], rtol=1e-9, atol=1e-12) for name in left
    )


def same(a: nn.Module, b: nn.Module) -> bool:
    return close(a.state_dict(), b.state_dict())


def test_cosine_values() -> None:
    hyper = Hyper(steps=110, warmup=10, learning_rate=1.0, min_learning_rate=0.1)
    assert cosine(0, hyper) == pytest.approx(0.1)
    assert cosine(9, hyper) == pytest.approx(1.0)
    assert cosine(10, hyper) == pytest.approx(1.0)
    assert cosine(60, hyper) == pytest.approx(0.55)  # halfway
    assert cosine(35, hyper) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert cosine(110, hyper) == cosine(10**6, hyper) == pytest.approx(0.1)
    assert cosine(60, replace(hyper, decay_steps=60)) == pytest.approx(0.1)
    assert cosine(0, replace(hyper, warmup=0)) == pytest.approx(1.0)


def test_the_optimizer_gets_the_cosine(tmp_path: Path) -> None:
    task = make()
    run(task, tmp_path)
    logged = [line["lr"] for line in read_log(tmp_path / "log.jsonl") if line["event"] == "step"]
    assert logged == [cosine(step, task.hyper) for step in range(12)]


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


def assert_same_losses(left: Path, right: Path) -> None:
    ours, theirs = losses(left), losses(right)
    assert [row[:2] for row in ours] == [row[:2] for row in theirs]
    for a, b in zip(ours, theirs, strict=True):
        for x, y in zip(a[2:], b[2:], strict=True):
            assert x == y if x is None else x == pytest.approx(y, rel=1e-9)


def losses(out: Path) -> list[tuple[Any, ...]]:
    return [
        (line["event"], line["step"], line.get("loss"), line.get("val_loss"), line.get("train_loss"))
        for line in read_log(out / "log.jsonl")
        if line["event"] in ("step", "eval", "growth")
    ]


GROWTHS: list[dict[str, Any]] = [
    {
        "trigger": {"step": 5},
        "operations": [WIDEN],
        "learning_rate": {"policy": "rewarm", "steps": 4, "from": 0.1},
        "accumulation": 2,
    },
    {"trigger": {"plateau": {"patience": 1}}, "operations": [WIDEN], "optimizer": "copy"},
]


@pytest.mark.usefixtures("by_hand")
@pytest.mark.parametrize("stop", [3, 5, 6, 8, 10])
def test_resume_across_growths_equals_uninterrupted(tmp_path: Path, stop: int) -> None:
    schedule = [GROWTHS[0], {**GROWTHS[1], "trigger": {"tokens": 24 * 11}}]
    whole = run(make(schedule=schedule), tmp_path / "whole")
    assert [growth.trigger.kind for growth in whole.scheduler.fired] == ["step", "tokens"]
    run(make(schedule=schedule), tmp_path / "parts", stop_at=stop)
    rest = run(make(schedule=schedule), tmp_path / "parts", resume=True)
    assert isinstance(rest.model, Net)
    assert rest.model.up.out_features == 16
    assert same(whole.model, rest.model)
    assert rest.tokens == whole.tokens
    assert_same_losses(tmp_path / "whole", tmp_path / "parts")
    assert_same_optimizer(whole.optimizer, rest.optimizer)


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
    assert line["error_float64"] < 1e-12
    for stop in (4, 7, 11):  # just before the growth, while the newborn entries warm up, and after that
        out = tmp_path / str(stop)
        run(make(schedule=[growth]), out, stop_at=stop)
        rest = run(make(schedule=[growth]), out, resume=True)
        assert same(whole.model, rest.model)
        assert_same_losses(tmp_path / "whole", out)
        assert_same_optimizer(whole.optimizer, rest.optimizer)


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


def assert_same_optimizer(left: torch.optim.Optimizer, right: torch.optim.Optimizer) -> None:
    ours: dict[str, Tensor] = {}
    theirs: dict[str, Tensor] = {}
    packed = [training.pack(o.state_dict(), "o", t) for o, t in ((left, ours), (right, theirs))]
    assert json.dumps(packed[0]) == json.dumps(packed[1])
    assert ours and close(ours, theirs)


@pytest.mark.usefixtures("by_hand")
def test_a_growth_is_logged_and_the_loop_goes_on_with_it(tmp_path: Path) -> None:
    seen = []
    task = make(schedule=GROWTHS)
    original = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
    final = run(task, tmp_path, on_growth=lambda run, event: seen.append((run.step, event.name)))
    lines = read_log(tmp_path / "log.jsonl")
    growths = [line for line in lines if line["event"] == "growth"]
    assert seen[0] == (5, "growth 1")
    assert growths[0]["parameters_before"] == 3 * 4 + 4 + 4 + 1
    assert growths[0]["parameters"] == 3 * 8 + 8 + 8 + 1
    assert growths[0]["moved"] < 1e-6
    assert growths[0]["moved"] == abs(growths[0]["val_loss_after"] - growths[0]["val_loss_before"])
    assert growths[0]["error_float64"] == 0.0, "what the growth reports is logged"
    assert growths[0]["accumulation"] == 2
    assert growths[0]["growth"]["operations"] == [WIDEN]
    steps = {line["step"]: line for line in lines if line["event"] == "step"}
    assert steps[5]["tokens"] == 5 * 24
    assert steps[6]["tokens"] == 7 * 24
    assert steps[6]["lr"] == pytest.approx(0.1 * cosine(5, task.hyper))
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


def test_flops_are_counted_exactly(tmp_path: Path) -> None:
    final = run(make(), tmp_path)
    # (8 × 3) · (3 × 4) and (8 × 4) · (4 × 1), two operations per multiply-add; backward needs no gradient of the input
    forward = 2 * 8 * 3 * 4 + 2 * 8 * 4
    backward = 2 * 8 * 3 * 4 + 2 * (2 * 8 * 4)
    assert final.flops_per_batch == forward + backward
    assert final.flops == 12 * (forward + backward)


def test_fused_attention_is_counted_on_the_cpu() -> None:
    q = torch.randn(2, 3, 5, 7, requires_grad=True)
    with training.flop_counter() as counter:
        F.scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward()
    one = 2 * 2 * 3 * 5 * 5 * 7  # one matrix product of scores or values
    assert counter.get_total_flops() == 2 * one + 5 * one  # 2 forward; backward 4 and the scores again


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
    assert run(make(), tmp_path, stop_at=6).step == 6


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
    broken = tmp_path / "checkpoints" / ".new-step-00000005.0"
    broken.mkdir()
    (broken / "model.safetensors").write_bytes(b"half")
    assert run(make(), tmp_path, resume=True).step == 12
    assert not broken.exists()


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
    with pytest.raises(SpecError, match=r"growths\.0"):
        run(make(schedule=[{**GROWTHS[0], "optimizer": "reset"}]), tmp_path, resume=True)


def test_a_new_run_in_the_same_folder_does_not_resume_the_old_one(tmp_path: Path) -> None:
    run(make(), tmp_path, stop_at=6)

    def fail(model: nn.Module, batch: Any) -> Tensor:
        raise RuntimeError("power cut")

    task = make()
    task.loss = fail
    with pytest.raises(RuntimeError, match="power cut"):
        run(task, tmp_path)
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
    with pytest.raises(CheckpointError, match=r"o\.f is a .*, which a checkpoint without pickle"):
        training.pack({"f": print}, "o", {})


def test_copies_are_found_by_value_and_their_parting_measured() -> None:
    net = Net(4)
    assert not Copies.of(net).pairs
    with torch.no_grad():
        net.up.weight[3] = net.up.weight[1]
        net.down.weight[0, 2] = net.down.weight[0, 0]
        found = Copies.of(net)
        assert found.measure(net) == {"copies": 2, "apart_max": 0.0, "apart_min": 0.0}
        net.up.weight[3, 0] += 0.5
        measured = found.measure(net)
        assert measured["apart_max"] == pytest.approx(0.5)
        assert measured["apart_min"] == 0.0
        net.down.weight.zero_()
        zeros = Copies.of(net)
        assert zeros.measure(net) == {"born_zero_max": 0.0}
        net.down.weight[0, 1] = -2
        assert zeros.measure(net) == {"born_zero_max": 2.0}


def test_losses_come_from_tuples_mappings_and_tensors() -> None:
    x = torch.tensor(2.0)

    class Returns(nn.Module):
        def __init__(self, value: Any) -> None:
            super().__init__()
            self.value = value

        def forward(self) -> Any:
            return self.value

    for value in (x, (None, x), {"loss": x, "logits": None}):
        assert training.model_loss(Returns(value), ()) is x


def test_tasks_are_loaded_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    module: Any = SimpleNamespace(good=make, bad=lambda: 3)
    monkeypatch.setitem(sys.modules, "some_tasks", module)
    assert isinstance(training.load_task("some_tasks:good").model, Net)
    for name, message in {
        "some_tasks": "package.module:callable",
        "some_tasks:none": "none",
        "some_tasks:bad": "returned a int",
        "no_such_module_anywhere:x": "No module named",
    }.items():
        with pytest.raises(SpecError, match=message):
            training.load_task(name)


def test_hyper_parameters_are_checked() -> None:
    with pytest.raises(SpecError, match="accumulation: 0 must be at least 1"):
        Hyper(accumulation=0)


def test_progress_is_one_line_per_evaluation_where_there_is_no_terminal(tmp_path: Path) -> None:
    console = quiet()
    train(make(), tmp_path, console=console)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue().splitlines()
    assert [line.split()[1] for line in text if line.startswith("step")] == ["0/12", "4/12", "8/12", "12/12"]
