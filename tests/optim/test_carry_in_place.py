"""``carry_``: the same optimizer over the grown parameters, on the small model's trajectory."""

from __future__ import annotations

import copy
import functools
import gc
import json
import subprocess
import sys
import types
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn, optim
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn

import fxgrow
from fxgrow.optim.rates import slice_rates
from tests.optim.nets import HIDDEN, STREAM, VARIANTS, Make, either, grown, loss_of, sized, step

MORE = {"op": "widen", "axis": "up.weight:0", "factor": 2}
INSERT = {"op": "insert", "layer": "linear", "after": "emb"}
ADAMW = VARIANTS["AdamW"]


def twins(make: Make, steps: int = 3, **how: Any) -> tuple[nn.Module, Any, nn.Module, Any]:
    """A model in training, and one that will not grow."""
    model, twin = sized(**how), sized(**how)
    one, two = make(model.parameters()), make(twin.parameters())
    for k in range(steps):
        assert either(model, one, k) == either(twin, two, k)
    return model, one, twin, two


def follows(model: nn.Module, one: Any, twin: nn.Module, two: Any, start: int, steps: int, how: Any = either) -> float:
    return max(abs(how(model, one, k) - how(twin, two, k)) for k in range(start, start + steps))


# the trajectory -------------------------------------------------------------------------------------------------------


def test_the_variants_are_all_that_exact_takes() -> None:
    covered = {type(make([torch.zeros(1, requires_grad=True)])) for make in VARIANTS.values()}
    assert covered | {optim.SparseAdam} == fxgrow.optim.ELEMENTWISE


@pytest.mark.parametrize("name", VARIANTS)
def test_fifty_steps_over_two_growths_with_gradients_in_flight(name: str) -> None:
    """With closures and without, zeroed to None and to 0; half of a step's micro-batches before each growth."""
    model, one, twin, two = twins(VARIANTS[name])
    for k, spec in ((100, (HIDDEN, STREAM)), (200, (MORE,))):
        one.zero_grad()
        two.zero_grad()
        loss_of(model, k).backward()
        growth = grown(model, *spec)
        assert growth.carry_(one, "exact") is one
        model = growth.module
        for module, optimizer in ((model, one), (twin, two)):
            (loss_of(module, k + 1) + loss_of(module, k + 2)).backward()
            if module is twin:
                loss_of(twin, k).backward()
            optimizer.step()
        assert follows(model, one, twin, two, k + 3, 25) <= 1e-9


def test_fifty_steps_on_sparse_gradients() -> None:
    def make(model: Any) -> list[optim.Optimizer]:
        rest = [p for n, p in model.named_parameters() if n != "emb.weight"]
        return [optim.SparseAdam([model.emb.weight], lr=1e-2), optim.AdamW(rest, lr=1e-2)]

    model, twin = sized(sparse=True), sized(sparse=True)
    small, large = make(twin), make(model)
    for k in range(1, 3):
        assert step(model, large, k) == step(twin, small, k)
    loss_of(model, 50).backward()
    loss_of(twin, 50).backward()
    growth = grown(model, HIDDEN, STREAM)
    growth.carry_(large, "exact")
    for one in (*large, *small):
        one.step()
    assert follows(growth.module, large, twin, small, 10, 50, step) <= 1e-9


RESUME = """
import json, sys, torch
import fxgrow.optim
from tests.optim.nets import VARIANTS, Sized, either
losses = {}
for name, (model, state) in torch.load(sys.argv[1]).items():
    module = Sized(stream=12, hidden=24).double()
    module.load_state_dict(model)
    optimizer = VARIANTS[name](module.parameters())
    optimizer.load_state_dict(state)
    losses[name] = [either(module, optimizer, k) for k in range(10, 18)]
print(json.dumps(losses))
"""


def test_a_new_process_goes_on_with_a_plain_optimizer_over_the_larger_class(tmp_path: Path) -> None:
    saved: dict[str, Any] = {}
    expected: dict[str, list[float]] = {}
    for name, make in VARIANTS.items():
        model, one, twin, two = twins(make)
        growth = grown(model, HIDDEN, STREAM)
        growth.carry_(one, "exact")
        assert follows(growth.module, one, twin, two, 3, 5) <= 1e-9
        saved[name] = (growth.module.state_dict(), one.state_dict())
        expected[name] = [either(twin, two, k) for k in range(10, 18)]
    torch.save(saved, tmp_path / "run.pt")
    ran = subprocess.run(
        [sys.executable, "-c", RESUME, str(tmp_path / "run.pt")],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=Path(__file__).parents[2],
    )
    assert ran.returncode == 0, ran.stderr
    losses = json.loads(ran.stdout)
    for name, those in expected.items():
        assert losses[name] == pytest.approx(those, abs=1e-9), name


@pytest.mark.parametrize("order", ["apply_ first", "carry_ first", "a backward pass between"])
def test_the_users_own_model_goes_on_with_the_same_optimizer(order: str) -> None:
    """``growth.apply_(model); growth.carry_(optimizer)``, twice, with gradients in flight: nothing else changes."""
    model, one, twin, two = twins(ADAMW)
    schedules = [lr_scheduler.OneCycleLR(o, max_lr=2e-2, total_steps=60) for o in (one, two)]
    for k, spec in ((100, (HIDDEN, STREAM)), (200, (MORE,))):
        for module in (model, twin):
            module.zero_grad()
            loss_of(module, k).backward()
        growth = grown(model, *spec, optimizer=one, policy="exact")
        if order == "carry_ first":
            growth.carry_(one)
            growth.apply_(model)
        else:
            growth.apply_(model)
            if order == "a backward pass between":
                loss_of(model, k + 1).backward()
                loss_of(twin, k + 1).backward()
            growth.carry_(one)
        own = list(model.parameters())
        assert [id(p) for p in one.param_groups[0]["params"]] == [id(p) for p in own]
        for module, optimizer in ((model, one), (twin, two)):
            loss_of(module, k + 2).backward()
            optimizer.step()
        for j in range(k + 3, k + 28):
            assert abs(either(model, one, j) - either(twin, two, j)) <= 1e-9
            for schedule in schedules:
                schedule.step()
    assert model.up.out_features == 48 and one.param_groups[0]["lr"] == two.param_groups[0]["lr"]


@pytest.mark.parametrize("first", [("exact", {}), ("exact", {"ramp": 7}), ("asymmetric", {"warmup": 8, "peak": 1.5})])
@pytest.mark.parametrize("second", ["exact", "asymmetric", "copy"])
def test_a_second_growth_leaves_what_the_first_began(first: tuple[str, dict[str, Any]], second: str) -> None:
    """A second growth whose new parameters do not learn changes nothing for the others, whatever its policy."""
    model = sized()
    optimizer = ADAMW(model.parameters())
    one = grown(model, {**HIDDEN, "noise": {"scale": 1e-2}}, STREAM)
    one.carry_(optimizer, first[0], **first[1])
    for k in range(3):
        either(one.module, optimizer, k)
    module, other = copy.deepcopy((one.module, optimizer))
    two = grown(one.module, INSERT)
    two.carry_(optimizer, second)
    for name in (n for n, p in two.plan.tensors.items() if p.source is None):
        two.module.get_parameter(name).requires_grad_(False)
    assert follows(module, other, two.module, optimizer, 4, 12) <= 1e-12


@pytest.mark.parametrize("how", ["carry_", "carry"])
def test_members_stand_where_an_optimizer_made_anew_has_them(how: str) -> None:
    """State is loaded by position, and the parameters of two blocks, or of a layer's two norms, have equal shapes."""

    def make(model: nn.Module, other: nn.Module) -> optim.Optimizer:
        named = dict(model.named_parameters())
        decay, rest = ([p for p in named.values() if (p.dim() > 1) is d] for d in (True, False))
        extra = list(other.parameters())
        return optim.AdamW([{"params": [*decay, *extra[:1]]}, {"params": [*extra[1:], *rest], "weight_decay": 0.0}])

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.down(torch.tanh(self.up(x)))

    model, other = nn.Sequential(nn.Linear(4, 4), nn.Sequential(Block(), Block()), nn.Linear(4, 2)), nn.Linear(3, 3)
    optimizer, x = make(model, other), torch.randn(3, 4)
    model(x).square().mean().backward()
    optimizer.step()
    spec = [{"op": "deepen", "stack": "1", "factor": 2}, {"op": "insert", "layer": "linear", "after": "0"}]
    growth = fxgrow.grow(model, spec, (x,), verify=False)
    carried = getattr(growth, how)(optimizer, "copy")
    for ours, theirs in zip(carried.param_groups, make(growth.module, other).param_groups, strict=True):
        assert [id(p) for p in ours["params"]] == [id(p) for p in theirs["params"]]
    assert len(carried.param_groups[0]["params"]) == 12 and len(carried.state) == 12


def test_members_out_of_order_keep_their_places() -> None:
    model = sized()
    optimizer = ADAMW(list(model.parameters())[::-1])
    growth = grown(model, HIDDEN, STREAM)
    growth.carry_(optimizer)
    expected = list(growth.module.parameters())[::-1]
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in expected]


def test_nothing_keeps_the_small_models_parameters() -> None:
    model, one, *_ = twins(ADAMW)
    for spec in (HIDDEN, MORE):
        growth = grown(model, spec)
        growth.carry_(one, "exact")
        left = [weakref.ref(p) for p in model.parameters()]
        model = growth.module
        gc.collect()
        assert not any(ref() is not None for ref in left)


# who holds the optimizer ----------------------------------------------------------------------------------------------

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "Cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "OneCycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=2e-2, total_steps=30),
    "Lambda": lambda o: lr_scheduler.LambdaLR(o, lambda k: 0.9**k),
    "Plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=1),
    "Sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=5), lr_scheduler.CosineAnnealingLR(o, 12)], milestones=[5]
    ),
    "Restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4, 2),
    "SWA": lambda o: SWALR(o, swa_lr=1e-3, anneal_epochs=6),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("kind", ["AdamW fused", "SGD"])
def test_schedulers_go_on(name: str, kind: str) -> None:
    model, one, twin, two = twins(VARIANTS[kind], steps=0)
    schedulers = [SCHEDULERS[name](one), SCHEDULERS[name](two)]
    rates: list[list[Any]] = [[], []]

    def run(first: int, last: int) -> None:
        for k in range(first, last):
            assert abs(step(model, one, k) - step(twin, two, k)) <= 1e-9
            for scheduler, optimizer, seen in zip(schedulers, (one, two), rates, strict=True):
                scheduler.step(*([1.0] if name == "Plateau" else []))
                group = optimizer.param_groups[0]
                seen.append((group["lr"], group.get("momentum"), group.get("betas")))

    run(0, 5)
    growth = grown(model, HIDDEN, STREAM)
    growth.carry_(one, "exact")
    model = growth.module
    run(5, 20)
    assert rates[0] == rates[1] and len({r[0] for r in rates[0]}) > 3
    assert schedulers[0].optimizer is one


@pytest.mark.parametrize("kind", ["AdamW fused", "SGD"])
def test_a_gradient_scaler_goes_on_with_its_skipped_steps(kind: str) -> None:
    """Also where the growth falls between ``unscale_`` and ``step``."""
    model, one, twin, two = twins(VARIANTS[kind])
    scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=4) for _ in range(2)]
    scales: list[list[float]] = [[], []]

    def begin(module: nn.Module, optimizer: Any, scaler: Any, k: int) -> float:
        optimizer.zero_grad()
        loss = loss_of(module, k)
        scaler.scale(loss).backward()
        if k in (12, 17):
            next(module.parameters()).grad.view(-1)[0] = torch.inf  # type: ignore[union-attr]
        scaler.unscale_(optimizer)
        return float(loss.detach())

    for k in range(10, 40):
        losses = []
        runs = [(model, one, scalers[0]), (twin, two, scalers[1])]
        for module, optimizer, scaler in runs:
            losses.append(begin(module, optimizer, scaler, k))
        if k == 15:
            growth = grown(model, HIDDEN, STREAM)
            growth.carry_(one, "exact")
            model = growth.module
        for (_, optimizer, scaler), seen in zip(runs, scales, strict=True):
            scaler.step(optimizer)
            scaler.update()
            seen.append(scaler.get_scale())
        assert abs(losses[0] - losses[1]) <= 1e-9
    assert scales[0] == scales[1] and len(set(scales[0])) > 2


@pytest.mark.parametrize("name", ["OneCycle", "Plateau"])
def test_all_that_a_loop_holds_goes_on_in_place(name: str) -> None:
    """Scheduler, scaler, average and gradients in flight, over two growths of the model itself and a skipped step."""
    model, one, twin, two = twins(VARIANTS["AdamW fused"], steps=0)
    example = torch.arange(20).remainder(11).view(4, 5)
    runs = []
    for module, optimizer in ((model, one), (twin, two)):
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=3)
        average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        runs.append((module, optimizer, SCHEDULERS[name](optimizer), scaler, average))
    for k in range(16):
        losses = []
        for module, optimizer, _, scaler, _ in runs:
            optimizer.zero_grad()
            scaler.scale(loss_of(module, 100 + k)).backward()
            if module is model and k in (4, 9):
                growth = grown(model, *((HIDDEN, STREAM) if k == 4 else (MORE,)))
                growth.apply_(model)
                growth.carry_(one, "exact")
                growth.apply_to_copy_(runs[0][-1])
            loss = loss_of(module, k)
            scaler.scale(loss).backward()
            if k == 10:
                next(module.parameters()).grad.view(-1)[0] = torch.inf  # type: ignore[union-attr]
            losses.append(float(loss.detach()))
        for module, optimizer, scheduler, scaler, average in runs:
            scaler.step(optimizer)
            scaler.update()
            scheduler.step(*([1.0] if name == "Plateau" else []))
            average.update_parameters(module)
        assert abs(losses[0] - losses[1]) <= 1e-9
    (*_, mine), (*_, its) = runs
    torch.testing.assert_close(mine(example), its(example), rtol=0, atol=1e-9)
    assert one.param_groups[0]["lr"] == two.param_groups[0]["lr"] and runs[0][3].get_scale() == runs[1][3].get_scale()
    assert int(mine.n_averaged) == 16 and model.up.out_features == 48


def snapshot(optimizer: optim.Optimizer) -> Any:
    """Everything an optimizer is, by identity and by value."""
    held = [p for g in optimizer.param_groups for p in g["params"]]
    return (
        id(optimizer.param_groups),
        [(id(g), id(g["params"]), {k: v for k, v in g.items() if k != "params"}) for g in optimizer.param_groups],
        [[id(p) for p in g["params"]] for g in optimizer.param_groups],
        id(optimizer.state),
        {id(p): {k: (id(v), copy.deepcopy(v)) for k, v in s.items()} for p, s in optimizer.state.items()},
        [(id(p.grad), copy.deepcopy(p.grad)) for p in held],
        dict(optimizer._optimizer_step_pre_hooks),
        {k: id(v) for k, v in vars(optimizer).items()},
    )


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(same(v, b[k]) for k, v in a.items())
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def test_what_is_no_parameter_stays_the_very_same() -> None:
    model = sized()
    lr = torch.tensor(1e-2)
    matrices = [(f"module.{n}", p) for n, p in model.named_parameters() if p.dim() > 1]
    vectors = [(n, p) for n, p in model.named_parameters() if p.dim() < 2]
    optimizer = optim.AdamW([{"params": matrices, "lr": lr}, {"params": vectors, "weight_decay": 0.0, "note": [1]}])
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    optimizer.register_state_dict_post_hook(lambda *_: calls.append("state"))
    optimizer.mine = {"a": 1}  # type: ignore[attr-defined]
    step(model, optimizer, 0)
    groups, dicts, lists = (
        optimizer.param_groups,
        [*optimizer.param_groups],
        [g["params"] for g in optimizer.param_groups],
    )
    plain = [{k: v for k, v in g.items() if k not in ("params", "param_names")} for g in groups]
    attributes = dict(vars(optimizer))
    state, defaults = optimizer.state, dict(optimizer.defaults)
    growth = grown(model, HIDDEN, STREAM, INSERT)
    growth.carry_(optimizer, "exact")
    assert optimizer.param_groups is groups and all(a is b for a, b in zip(groups, dicts, strict=True))
    assert all(g["params"] is held for g, held in zip(groups, lists, strict=True))
    assert groups[0]["lr"] is lr and optimizer.state is state and optimizer.defaults == defaults
    for group, before in zip(groups, plain, strict=True):
        assert all(group[k] is v for k, v in before.items())
    assert vars(optimizer).keys() == attributes.keys()
    assert all(vars(optimizer)[k] is v for k, v in attributes.items())
    own = dict(growth.module.named_parameters())
    for group, prefix in zip(groups, ("module.", ""), strict=True):
        for p, label in zip(group["params"], group["param_names"], strict=True):
            assert own[label.removeprefix(prefix)] is p
    assert {id(p) for g in groups for p in g["params"]} == {id(p) for p in own.values()}
    assert {id(p) for p in state} <= {id(p) for p in own.values()}
    calls.clear()
    step(growth.module, optimizer, 1)
    optimizer.state_dict()
    assert calls == ["pre", "post", "state"]


# errors leave everything as it was ------------------------------------------------------------------------------------


def test_a_second_call_is_refused() -> None:
    model, one, *_ = twins(ADAMW)
    growth = grown(model, HIDDEN)
    growth.carry_(one)
    before = snapshot(one)
    for call in (growth.carry_, growth.carry):
        with pytest.raises(fxgrow.FxgrowError, match="of the grown model already"):
            call(one)
    assert same(before, snapshot(one))


@pytest.mark.parametrize("how", ["carry_", "carry"])
def test_a_step_between_growth_and_carrying_is_refused(how: str) -> None:
    """The grown weights are those before it, the moments those after it."""
    model, one, *_ = twins(ADAMW)
    growth = grown(model, HIDDEN)
    step(model, one, 3)
    before = snapshot(one)
    with pytest.raises(fxgrow.FxgrowError, match=r"emb\.weight has changed since the model was grown"):
        getattr(growth, how)(one, "exact")
    assert same(before, snapshot(one))


def test_an_optimizer_of_another_model_is_refused() -> None:
    model, one, _, two = twins(ADAMW)
    growth = grown(model, HIDDEN)
    with pytest.raises(fxgrow.FxgrowError, match="no parameter that the model had when it was grown"):
        growth.carry_(two)
    with pytest.raises(fxgrow.FxgrowError, match="no parameter that the model had when it was grown"):
        grown(model, HIDDEN, optimizer=two)
    later = grown(growth.module, MORE)
    with pytest.raises(fxgrow.FxgrowError, match="no parameter that the model had when it was grown"):
        later.carry_(one)  # the growth between was left out


def test_weights_that_a_failed_step_left_in_other_units_do_not_grow() -> None:
    model, one, twin, two = twins(lambda p: optim.ASGD(p, lr=1e-2))
    growth = grown(model, HIDDEN)
    growth.carry_(one, "exact")
    later = grown(growth.module, STREAM)
    alpha = one.param_groups[0].pop("alpha")
    with pytest.raises(KeyError):
        step(growth.module, one, 3)
    one.param_groups[0]["alpha"] = alpha
    with pytest.raises(fxgrow.FxgrowError, match="did not finish"):
        grown(growth.module, STREAM)
    with pytest.raises(fxgrow.FxgrowError, match="has changed since"):
        later.carry_(one)
    one.zero_grad()
    one.step()
    later = grown(growth.module, STREAM)
    later.carry_(one, "exact")
    assert follows(later.module, one, twin, two, 4, 6) <= 1e-12


@pytest.mark.parametrize("failing", ["map_state", "map_gradient", "slice_of", "rates_of_groups"])
def test_a_failure_half_way_leaves_every_optimizer_as_it_was(failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = sized()
    parts = [[*model.emb.parameters(), *model.up.parameters()], [*model.down.parameters(), *model.out.parameters()]]
    optimizers = [ADAMW(part) for part in parts]
    step(model, optimizers, 1)
    growth = grown(model, HIDDEN, STREAM)
    before = [snapshot(o) for o in optimizers]
    times = {"rates_of_groups": 2}.get(failing, 6)
    original = getattr(fxgrow.optim.carried, failing)
    calls = []

    def fails(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == times:
            raise MemoryError("full")
        return original(*args, **kwargs)

    monkeypatch.setattr(fxgrow.optim.carried, failing, fails)
    with pytest.raises(MemoryError):
        growth.carry_(optimizers, "exact")
    assert same(before, [snapshot(o) for o in optimizers])
    assert all(p.grad is None for p in growth.module.parameters())
    monkeypatch.undo()
    growth.carry_(optimizers, "exact")


def test_whether_policy_and_optimizer_fit_is_asked_before_the_growth() -> None:
    model = sized()
    own, adamw = OneCount(model.parameters(), lr=1e-2), ADAMW(model.parameters())
    with pytest.raises(fxgrow.FxgrowError, match="not known to be one"):
        fxgrow.grow(model, [HIDDEN], ("no example",), optimizer=[adamw, own], policy="exact")
    with pytest.raises(fxgrow.FxgrowError, match="unknown optimizer policy"):
        fxgrow.grow(model, [HIDDEN], ("no example",), optimizer=adamw, policy="exactly")
    adamw.state[model.emb.weight]["odd"] = torch.zeros_like(model.emb.weight)
    with pytest.raises(fxgrow.FxgrowError, match="'odd' depends"):
        fxgrow.grow(model, [HIDDEN], ("no example",), optimizer=adamw, policy="exact", ramp=5)


def test_whether_policy_and_plan_fit_is_asked_before_weights_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 3)).double()
    optimizer = ADAMW(model.parameters())
    spec, x = {"op": "widen", "axis": "0.weight:0", "by": 3}, torch.randn(4, 5).double()
    with monkeypatch.context() as patched:
        patched.setattr(fxgrow.growth, "build", None)
        with pytest.raises(fxgrow.FxgrowError, match="policy 'exact' needs a growth"):
            fxgrow.grow(model, spec, (x,), optimizer=optimizer, policy="exact")
        plain = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
        muon = [optim.AdamW([plain[2].weight]), optim.Muon([plain[0].weight])]
        with pytest.raises(fxgrow.FxgrowError, match=r"Muon, whose step .* dim 0 of 0.weight grows from 6 to 9"):
            fxgrow.grow(plain, spec, (x,), optimizer=muon, policy="exact")
    growth = fxgrow.grow(model, spec, (x,), optimizer=optimizer, policy="reset")
    growth.carry_(optimizer)
    assert growth.policy == "reset" and "fxgrow" not in optimizer.param_groups[0]


# several optimizers, parameters of others -----------------------------------------------------------------------------


def test_each_optimizer_keeps_what_it_held_and_one_takes_what_is_new() -> None:
    for newcomers in (0, 1, "list"):
        model = sized()
        first = optim.AdamW([{"params": model.emb.parameters()}, {"params": model.up.parameters()}], lr=1e-2)
        last = optim.SGD([*model.down.parameters(), *model.out.parameters()], lr=1e-2, momentum=0.9)
        growth = grown(model, HIDDEN, INSERT)
        new = [growth.module.get_parameter(n) for n, p in growth.plan.tensors.items() if p.source is None]
        before = snapshot(first)
        with pytest.raises(fxgrow.FxgrowError, match="newcomers=that optimizer"):
            growth.carry_(first)
        with pytest.raises(fxgrow.FxgrowError, match="newcomers is the one of them"):
            growth.carry_([first, last], newcomers=True)
        with pytest.raises(fxgrow.FxgrowError, match="groups 0 to 1"):
            growth.carry_(first, newcomers=2)
        assert same(before, snapshot(first))
        if newcomers == "list":
            assert growth.carry_((first, last), newcomers=last) == (first, last)
        else:
            growth.carry_(first, newcomers=newcomers)
            growth.carry_(last, newcomers=first)
        joined = last.param_groups[0] if newcomers == "list" else first.param_groups[int(newcomers)]
        held = [p for o in (first, last) for g in o.param_groups for p in g["params"]]
        assert len(held) == len({id(p) for p in held}) == len(list(growth.module.parameters()))
        assert len(new) == 2 and all(any(p is q for q in joined["params"]) for p in new)
        assert step(growth.module, [first, last], 1) > step(growth.module, [first, last], 1)


@pytest.mark.parametrize("how", ["carry_", "carry"])
def test_parameters_of_others_are_left_alone_with_state_and_rates(how: str) -> None:
    """One optimizer over two models of one class, each grown in its turn: names that collide, and both are exact."""
    models, twin = [sized(), sized()], [sized(), sized()]
    for pair in (models, twin):
        with torch.no_grad():
            for p in pair[1].parameters():
                p.mul_(0.9)
    one, two = (ADAMW([p for m in pair for p in m.parameters()]) for pair in (models, twin))
    growths: list[nn.Module] = list(models)

    def both(pair: Any, optimizer: Any, k: int) -> float:
        return step(Sum(pair), optimizer, k)

    for number, spec in ((0, (HIDDEN, STREAM)), (1, (HIDDEN,)), (0, (MORE,))):
        for k in range(1, 6):
            assert abs(both(growths, one, k) - both(twin, two, k)) <= 1e-12
        others = [p for m in growths if m is not growths[number] for p in m.parameters()]
        kept = [one.state[p] for p in others]
        growth = grown(growths[number], *spec)
        one = getattr(growth, how)(one, "exact")
        if how == "carry_":
            assert all(one.state[p] is s for p, s in zip(others, kept, strict=True))
        growths[number] = growth.module
    for k in range(10, 30):
        assert abs(both(growths, one, k) - both(twin, two, k)) <= 1e-12
    again = ADAMW([p for m in growths for p in m.parameters()])
    again.load_state_dict(copy.deepcopy(one.state_dict()))
    assert abs(both(growths, again, 30) - both(twin, two, 30)) <= 1e-12
    assert abs(both(growths, again, 31) - both(twin, two, 31)) <= 1e-12


class Sum(nn.Module):
    def __init__(self, parts: Any) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, i: torch.Tensor) -> torch.Tensor:
        return self.parts[0](i) + self.parts[1](i)


def test_unknown_state_of_others_does_not_matter() -> None:
    model, other = sized(), nn.Linear(2, 2).double()
    optimizer = ADAMW([*model.parameters(), *other.parameters()])
    step(model, optimizer, 0)
    optimizer.state[other.weight]["history"] = [object()]
    optimizer.state["global"] = {"count": 3}  # type: ignore[index]
    growth = grown(model, HIDDEN, optimizer=optimizer)
    growth.carry_(optimizer)
    assert optimizer.state["global"] == {"count": 3} and "history" in optimizer.state[other.weight]  # type: ignore[index]
    optimizer.state[growth.module.get_parameter("up.weight")]["history"] = [object()]
    with pytest.raises(fxgrow.FxgrowError, match="'history' is a list"):
        grown(growth.module, MORE).carry_(optimizer)


def test_a_parameter_that_two_optimizers_hold_is_in_both_and_its_gradient_counts_once() -> None:
    model, twin = sized(), sized()
    optimizers, small = ([VARIANTS["SGD"](m.parameters()), ADAMW(m.emb.parameters())] for m in (model, twin))
    for k in range(1, 3):
        step(model, optimizers, k)
        step(twin, small, k)
    loss_of(model, 5).backward()
    loss_of(twin, 5).backward()
    growth = grown(model, HIDDEN, STREAM)
    for one in optimizers:
        growth.carry_(one, "exact")
    for one in (*optimizers, *small):
        one.step()
    assert follows(growth.module, optimizers, twin, small, 6, 6, step) <= 1e-12


def test_half_a_model_frozen_parameters_empty_groups_and_a_group_for_each() -> None:
    def make(model: Any) -> optim.Optimizer:
        model.down.bias.requires_grad_(False)
        each = [{"params": [p], "lr": 1e-2 * (k + 1)} for k, p in enumerate([*model.up.parameters(), model.down.bias])]
        return optim.AdamW([{"params": []}, *each, {"params": []}], lr=1e-3)

    model, twin = sized(), sized()
    one, two = make(model), make(twin)
    assert follows(model, one, twin, two, 0, 3, step) == 0.0
    growth = grown(model, HIDDEN, STREAM)
    growth.carry_(one, "exact")
    own = dict(growth.module.named_parameters())
    assert [len(g["params"]) for g in one.param_groups] == [0, 1, 1, 1, 0]
    assert one.param_groups[3]["params"][0] is own["down.bias"] and not own["down.bias"].requires_grad
    assert follows(growth.module, one, twin, two, 3, 12, step) <= 1e-12


def test_a_newcomer_beside_parameters_that_nobody_trains_is_trained_by_nobody() -> None:
    model = sized()
    optimizer = ADAMW(model.out.parameters())
    growth = grown(model, INSERT)
    growth.carry_(optimizer, newcomers=False)
    assert len(optimizer.param_groups[0]["params"]) == 2


# strange optimizers ---------------------------------------------------------------------------------------------------


class Delegating(optim.Optimizer):
    """As accelerators wrap one: everything is handed on."""

    def __init__(self, optimizer: optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.calls = 0

    @property
    def state(self) -> Any:
        return self.optimizer.state

    @property
    def param_groups(self) -> Any:
        return self.optimizer.param_groups

    @property
    def defaults(self) -> Any:
        return self.optimizer.defaults

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def step(self, closure: Any = None) -> Any:
        self.calls += 1
        return self.optimizer.step(closure)


class Plain:
    """A wrapper that is no optimizer itself."""

    def __init__(self, optimizer: Any) -> None:
        self.inner, self.param_groups, self.state = optimizer, optimizer.param_groups, optimizer.state
        self.zero_grad, self.step = optimizer.zero_grad, optimizer.step


@pytest.mark.parametrize("wrap", [Delegating, Plain, lambda o: Plain(Delegating(o))])
def test_wrappers_that_hand_everything_on(wrap: Callable[[Any], Any]) -> None:
    model, one, twin, two = twins(ADAMW)
    wrapper = wrap(one)
    growth = grown(model, HIDDEN, STREAM, optimizer=wrapper, policy="exact")
    assert growth.carry_(wrapper) is wrapper
    assert wrapper.param_groups is one.param_groups
    assert follows(growth.module, wrapper, twin, two, 5, 6, step) <= 1e-12
    with pytest.raises(fxgrow.FxgrowError, match="carry that one, and wrap the result"):
        grown(growth.module, MORE).carry(wrapper)


class Listing(optim.SGD):
    """Keeps its parameters in a place of its own, too."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=1e-2)
        self.extra = {"nested": [(list(self.param_groups[0]["params"]),)]}


class Holder:
    def __init__(self, params: Any) -> None:
        self.mine = dict.fromkeys(params, 1)


def test_parameters_kept_beside_the_groups_are_refused() -> None:
    model = sized()
    growth = grown(model, HIDDEN)
    listing = Listing(model.parameters())
    attribute = ADAMW(model.parameters())
    attribute.ema = Holder(model.parameters())  # type: ignore[attr-defined]
    around = Delegating(ADAMW(model.parameters()))
    around.clipped = [model.up.weight]  # type: ignore[attr-defined]
    grouped = ADAMW([{"params": model.parameters(), "decayed": [model.up.weight]}])
    places = {r"\.extra": listing, r"\.ema\.mine": attribute, r"\.clipped\[0\]": around, r"'decayed'\]\[0\]": grouped}
    for where, optimizer in places.items():
        before = snapshot(optimizer if optimizer is not around else around.optimizer)
        with pytest.raises(fxgrow.FxgrowError, match=where):
            growth.carry_(optimizer, "copy")
        assert same(before, snapshot(optimizer if optimizer is not around else around.optimizer))
    fine = ADAMW(model.parameters())
    fine.model, fine.args = model, Holder([nn.Parameter(torch.zeros(1))])  # type: ignore[attr-defined]
    fine.growth, fine.itself = growth, [fine]  # type: ignore[attr-defined]
    fine.register_step_pre_hook(lambda *_: print(model))
    growth.carry_(fine, "exact")
    step(growth.module, fine, 0)
    fine.growth = grown(growth.module, MORE)  # type: ignore[attr-defined]
    fine.growth.carry_(fine)  # type: ignore[attr-defined]


@pytest.mark.parametrize("how", ["closure", "partial", "method", "default"])
def test_hooks_that_hold_parameters_are_refused(how: str) -> None:
    """A hook that clips the small model's gradients would clip nothing, without a word."""
    model, one, *_ = twins(ADAMW)
    growth = grown(model, HIDDEN)
    clipped = list(model.parameters())

    def closure(*_: Any) -> None:
        nn.utils.clip_grad_norm_(clipped, 1.0)

    def given(params: Any, *_: Any) -> None:
        nn.utils.clip_grad_norm_(params, 1.0)

    def default(*_: Any, params: Any = clipped) -> None:
        nn.utils.clip_grad_norm_(params, 1.0)

    hooks = {
        "closure": closure,
        "partial": functools.partial(given, clipped),
        "method": types.MethodType(given, clipped),
        "default": default,
    }
    one.register_step_pre_hook(hooks[how])
    with pytest.raises(fxgrow.FxgrowError, match=r"\._optimizer_step_pre_hooks\["):
        growth.carry_(one)


def test_what_is_no_optimizer_is_refused() -> None:
    model, one, *_ = twins(ADAMW)
    growth = grown(model, HIDDEN)
    for wrong in (lr_scheduler.StepLR(one, 1), None, model):
        with pytest.raises(fxgrow.FxgrowError, match=r"is no torch\.optim\.Optimizer"):
            growth.carry_(wrong)  # type: ignore[type-var]


class OneCount(optim.SGD):
    """One count of steps, which all parameters share."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            count = self.state[group["params"][0]].setdefault("count", torch.zeros(()))
            count += 1
            for p in group["params"]:
                self.state[p]["count"] = count
                if p.grad is not None:
                    p.add_(p.grad, alpha=-group["lr"] / float(count))


def test_state_that_parameters_share_is_shared_after_the_growth() -> None:
    model = sized()
    optimizer = OneCount(model.parameters(), lr=1e-2)
    for k in range(3):
        step(model, optimizer, k)
    growth = grown(model, HIDDEN)
    growth.carry_(optimizer, "copy")
    step(growth.module, optimizer, 4)
    counts = [optimizer.state[p]["count"] for p in growth.module.parameters()]
    assert all(c is counts[0] for c in counts) and float(counts[0]) == 4.0


class Lookahead(optim.Optimizer):
    """Shares the groups of the optimizer inside, and has state of its own."""

    def __init__(self, inner: optim.Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.inner, self.param_groups = inner, inner.param_groups

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)


def test_an_optimizer_with_another_inside_that_has_state_is_refused() -> None:
    model, one, *_ = twins(ADAMW)
    growth = grown(model, HIDDEN)
    with pytest.raises(fxgrow.FxgrowError, match=r"in `\.inner\.state"):
        growth.carry_(Lookahead(one))


def test_state_that_gradients_flow_through_is_refused() -> None:
    model, one, *_ = twins(ADAMW)
    state = one.state[model.get_parameter("up.weight")]
    state["exp_avg"] = state["exp_avg"].requires_grad_()
    with pytest.raises(fxgrow.FxgrowError, match="differentiable=True"):
        grown(model, HIDDEN, optimizer=one)


def test_lbfgs_starts_anew() -> None:
    model = sized()
    optimizer = optim.LBFGS(model.parameters(), max_iter=3)
    for k in (1, 3):
        either(model, optimizer, k)
    growth = grown(model, HIDDEN, STREAM)
    with pytest.raises(fxgrow.FxgrowError, match="history of whole gradients"):
        growth.carry_(optimizer)
    growth.carry_(optimizer, "reset")
    fresh = copy.deepcopy(growth.module)
    other = optim.LBFGS(fresh.parameters(), max_iter=3)
    assert [either(growth.module, optimizer, k) for k in (1, 3, 5)] == [either(fresh, other, k) for k in (1, 3, 5)]


# where parameters are -------------------------------------------------------------------------------------------------


def test_fused_steps_walk_weights_and_state_in_one_order() -> None:
    """They go through memory, so that state must be laid out like the weights."""

    class Conv(nn.Sequential):
        def __init__(self) -> None:
            torch.manual_seed(0)
            super().__init__(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 3, 3))

    def run(model: nn.Module, optimizer: Any, k: int) -> float:
        x = torch.randn(2, 3, 7, 7, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    model, twin = (Conv().double().to(memory_format=torch.channels_last) for _ in range(2))
    one, two = (optim.AdamW(m.parameters(), lr=1e-2, fused=True) for m in (model, twin))
    assert follows(model, one, twin, two, 0, 3, run) == 0.0
    growth = fxgrow.grow(model, {"op": "widen", "axis": "0.weight:0", "factor": 2}, (torch.randn(2, 3, 7, 7).double(),))
    growth.module.to(memory_format=torch.channels_last)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    growth.carry_(one, "exact")
    weight = growth.module.get_parameter("0.weight")
    assert weight.grad is not None and not weight.is_contiguous()
    assert weight.stride() == weight.grad.stride() == one.state[weight]["exp_avg"].stride()
    assert follows(growth.module, one, twin, two, 3, 12, run) <= 1e-12


def test_state_follows_a_module_that_was_moved_to_another_dtype() -> None:
    model, one, *_ = twins(ADAMW)
    growth = grown(model, HIDDEN)
    growth.module.float()
    model.up.weight.grad = torch.ones_like(model.up.weight)
    growth.carry_(one)
    for p in growth.module.parameters():
        assert {v.dtype for v in one.state[p].values()} == {torch.float32}
    step(growth.module, one, 5)


@pytest.mark.parametrize("policy", ["asymmetric", "copy"])
def test_gradients_that_the_grown_model_has_already_are_added_to(policy: str) -> None:
    """A backward pass between ``apply_`` and ``carry_``; zeroed gradients do not come back."""
    model = sized()
    optimizer = VARIANTS["SGD"](model.parameters())
    loss_of(model, 1).backward()
    growth, fresh = grown(model, HIDDEN, STREAM), grown(model, HIDDEN, STREAM).module
    loss_of(growth.module, 2).backward()
    growth.carry_(optimizer, policy)
    (loss_of(fresh, 1) + loss_of(fresh, 2)).backward()
    for p, q in zip(growth.module.parameters(), fresh.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-13)
    optimizer.zero_grad()
    assert all(p.grad is None for p in growth.module.parameters())


def test_after_the_warm_up_nothing_is_left() -> None:
    model, one, *_ = twins(ADAMW)
    growth = grown(model, HIDDEN)
    growth.carry_(one, "asymmetric", warmup=3)
    for k in range(3):
        assert slice_rates(one) is not None
        step(growth.module, one, k)
    assert slice_rates(one) is None and not one._optimizer_step_pre_hooks


@pytest.mark.compile
def test_a_compiled_step_runs_no_stale_code() -> None:
    model, one, twin, two = twins(VARIANTS["SGD"])
    compiled = torch.compile(one.step, backend="eager")

    def run(module: nn.Module, optimizer: Any, k: int) -> float:
        optimizer.zero_grad()
        loss = loss_of(module, k)
        loss.backward()
        (compiled if optimizer is one else optimizer.step)()
        return float(loss.detach())

    assert follows(model, one, twin, two, 3, 3, run) <= 1e-12
    growth = grown(model, HIDDEN, STREAM)
    growth.carry_(one, "exact")
    assert follows(growth.module, one, twin, two, 6, 6, run) <= 1e-9
