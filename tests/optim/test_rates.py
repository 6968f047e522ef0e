"""Per-slice learning rates and carried state, against the small model's own run: whatever is kept must be right."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn, optim

import fxgrow
from fxgrow.optim.rates import all_rates, slice_rates
from fxgrow.weights.moments import ELEMENTWISE, KINDS, MOMENTS, moment_of


class Net(nn.Module):
    """Embedding, a residual branch, a head: writers, readers and a tensor that no growth here touches."""

    def __init__(self, sparse: bool = False) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 6, sparse=sparse)
        self.up, self.down, self.out = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, i: torch.Tensor) -> torch.Tensor:
        x = self.emb(i)
        return self.out(x + self.down(torch.tanh(self.up(x))))


def net(dtype: torch.dtype = torch.float64, **how: Any) -> Net:
    torch.manual_seed(0)
    return Net(**how).to(dtype)


def data(seed: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(11, (4, 5), generator=g), torch.randn(4, 5, 3, generator=g, dtype=torch.float64).to(dtype)


def loss_of(model: nn.Module, seed: int) -> torch.Tensor:
    x, y = data(seed, next(model.parameters()).dtype)
    return (model(x) - y).square().mean()


def step(model: nn.Module, optimizer: optim.Optimizer, seed: int) -> float:
    optimizer.zero_grad()
    loss = loss_of(model, seed)
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def closure_step(model: nn.Module, optimizer: optim.Optimizer, seed: int) -> float:
    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, seed)
        loss.backward()
        return loss

    return float(optimizer.step(closure).detach())  # type: ignore[union-attr]


HIDDEN = {"op": "widen", "axis": "up.weight:0", "factor": 3}
STREAM = {"op": "widen", "axis": "out.weight:1", "factor": 2}
MAKE: dict[str, Callable[[Any], optim.Optimizer]] = {
    "ASGD": lambda p: optim.ASGD(p, lr=1e-2, t0=2),
    "Adadelta": lambda p: optim.Adadelta(p, lr=1.0, weight_decay=0.01),
    "Adagrad": lambda p: optim.Adagrad(p, lr=1e-2, initial_accumulator_value=0.1),
    "AdamW": lambda p: optim.AdamW(p, lr=1e-2, weight_decay=0.1, eps=1e-4),
    "AdamW foreach": lambda p: optim.AdamW(p, lr=1e-2, foreach=True, amsgrad=True),
    "AdamW fused": lambda p: optim.AdamW(p, lr=1e-2, fused=True),
    "Adamax": lambda p: optim.Adamax(p, lr=1e-2),
    "RMSprop": lambda p: optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True, weight_decay=0.1),
    "Rprop": lambda p: optim.Rprop(p, lr=1e-3),
    "SGD": lambda p: optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.05, nesterov=True),
}


def started(make: Callable[[Any], optim.Optimizer], steps: int = 4, **how: Any) -> tuple[Net, optim.Optimizer]:
    model = net(**how)
    optimizer = make(model.parameters())
    for k in range(steps):
        step(model, optimizer, k)
    return model, optimizer


def grown(model: nn.Module, *spec: dict[str, Any]) -> fxgrow.Growth:
    return fxgrow.grow(model, list(spec), (data(0)[0],), verify=False)


def apart(
    small: nn.Module, one: optim.Optimizer, large: nn.Module, two: optim.Optimizer, how: Any = step, steps: int = 12
) -> float:
    """Largest difference of the losses over the next steps."""
    return max(abs(how(small, one, k) - how(large, two, k)) for k in range(20, 20 + steps))


# the closure ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAKE)
def test_exact_follows_with_and_without_a_closure(name: str) -> None:
    for how in (step, closure_step):
        model, optimizer = started(MAKE[name])
        growth = grown(model, HIDDEN, STREAM)
        assert apart(model, optimizer, growth.module, growth.carry(optimizer, "exact"), how) <= 1e-13


def test_exact_follows_on_sparse_gradients() -> None:
    model = net(sparse=True)

    def both(module: nn.Module, optimizers: list[optim.Optimizer], seed: int) -> float:
        for one in optimizers:
            one.zero_grad()
        loss = loss_of(module, seed)
        loss.backward()
        for one in optimizers:
            one.step()
        return float(loss.detach())

    rest = [p for n, p in model.named_parameters() if not n.startswith("emb")]
    small = [optim.SparseAdam([model.emb.weight], lr=1e-2), optim.AdamW(rest, lr=1e-2)]
    for k in range(3):
        both(model, small, k)
    growth = grown(model, HIDDEN, STREAM, {"op": "widen", "axis": "emb.weight:1", "factor": 3})
    large = [growth.carry(one, "exact") for one in small]
    for k in range(3, 12):
        assert abs(both(model, small, k) - both(growth.module, large, k)) <= 1e-13


def test_a_closure_and_none_take_the_same_steps_while_new_entries_warm_up() -> None:
    runs = []
    for how in (step, closure_step):
        model, optimizer = started(MAKE["AdamW"])
        growth = grown(model, {**HIDDEN, "noise": {"scale": 1e-2}})
        carried = growth.carry(optimizer, "asymmetric", warmup=6)
        carried.zero_grad()  # the first closure makes the first gradients
        runs.append([how(growth.module, carried, k) for k in range(8)])
    assert runs[0] == pytest.approx(runs[1], abs=1e-14)


class Twice(optim.SGD):
    """Looks at the loss again after its step."""

    def step(self, closure: Any = None) -> Any:
        closure()
        super().step()
        return closure()


def test_what_evaluates_its_closure_twice_is_refused_and_leaves_the_weights_as_they_were() -> None:
    model = net()
    growth = grown(model, HIDDEN)
    with pytest.raises(fxgrow.FxgrowError, match="history of whole gradients"):
        growth.carry(optim.LBFGS(model.parameters()), "asymmetric")
    assert not growth.carry(optim.LBFGS(model.parameters()), "reset").state
    before = copy.deepcopy(growth.module.state_dict())
    ELEMENTWISE.add(Twice)
    try:
        carried = growth.carry(Twice(model.parameters(), lr=0.0), "exact")
    finally:
        ELEMENTWISE.discard(Twice)
    with pytest.raises(fxgrow.FxgrowError, match="calls its closure several times"):
        closure_step(growth.module, carried, 0)
    for key, value in growth.module.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=1e-15)


# saving and loading ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["exact", "asymmetric"])
def test_a_plain_save_and_load_keeps_the_rates(policy: str) -> None:
    model, optimizer = started(MAKE["AdamW"])
    growth = grown(model, {**HIDDEN, "noise": {"scale": 1e-2}}, STREAM)
    carried = growth.carry(optimizer, policy, **({"warmup": 9} if policy == "asymmetric" else {"ramp": 9}))
    for k in range(3):
        step(growth.module, carried, k)
    file = io.BytesIO()
    torch.save({"model": growth.module.state_dict(), "optimizer": carried.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file)
    module = grown(model, HIDDEN, STREAM).module
    module.load_state_dict(saved["model"])
    plain = optim.AdamW(module.parameters(), lr=0.5)
    plain.load_state_dict(copy.deepcopy(saved["optimizer"]))
    rates = slice_rates(plain)
    assert rates is not None and rates.steps == 3
    copied_module, copied = copy.deepcopy((growth.module, carried))
    assert apart(growth.module, carried, module, plain) <= 1e-14
    growth.module.load_state_dict(saved["model"])
    carried.load_state_dict(saved["optimizer"])  # a step back, with the rates of then
    assert apart(growth.module, carried, copied_module, copied) <= 1e-14
    assert slice_rates(plain) is None, "after the ramp or the warm-up nothing is left"
    assert not any("fxgrow" in g for g in plain.param_groups)


def test_a_state_is_a_snapshot_and_that_of_another_growth_is_refused() -> None:
    model, optimizer = started(MAKE["AdamW"])
    growth = grown(model, HIDDEN)
    carried = growth.carry(optimizer, "asymmetric", warmup=9)
    state = carried.state_dict()
    step(growth.module, carried, 0)
    assert state["param_groups"][0]["fxgrow_steps"] == [0]
    assert carried.param_groups[0]["fxgrow_steps"] == [1]
    other = grown(model, {**HIDDEN, "factor": 2}).module
    plain = optim.AdamW(other.parameters())
    plain.load_state_dict(state)
    with pytest.raises(fxgrow.FxgrowError, match="another growth"):
        step(other, plain, 0)


def test_a_process_that_does_not_know_fxgrow_does_not_load_the_state(tmp_path: Path) -> None:
    model, optimizer = started(MAKE["AdamW"])
    growth = grown(model, HIDDEN)
    torch.save(growth.carry(optimizer, "exact").state_dict(), tmp_path / "state.pt")
    code = f"import torch; torch.load({str(tmp_path / 'state.pt')!r})"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert ran.returncode != 0 and "fxgrow.optim.rates.GroupRates" in ran.stderr


READ = """
{imports}
assert "fxgrow.optim" not in sys.modules
import torch
module, state = torch.load({file!r}, weights_only=True)
weights = [torch.nn.Parameter(w) for w in module]
optimizer = torch.optim.SGD([{{"params": weights[:1]}}, {{"params": weights[1:]}}], lr=0.0)
optimizer.load_state_dict(state)
for p in weights:
    p.grad = torch.ones_like(p)
optimizer.step()
torch.save([p.detach() for p in weights], {file!r} + ".after")
assert not any(type(f).__module__.startswith("fxgrow.") for f in sys.meta_path)
"""


@pytest.mark.parametrize(
    "imports",
    ["import sys, torch, fxgrow", "import sys, fxgrow, importlib.util as u; u.find_spec('torch')"],
    ids=["torch first", "fxgrow first"],
)
def test_import_fxgrow_is_enough_to_load_rates_and_apply_them(imports: str, tmp_path: Path) -> None:
    model = net()
    names = ["up.weight", "down.weight"]
    optimizer = optim.SGD([{"params": [model.get_parameter(n)]} for n in names], lr=0.5)
    growth = grown(model, HIDDEN)
    carried = growth.carry(optimizer, "asymmetric", warmup=8)
    held = [growth.module.get_parameter(n) for n in names]
    file = tmp_path / "state.pt"
    torch.save(([p.detach() for p in held], carried.state_dict()), file)
    code = READ.format(imports=imports, file=str(file))
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    for p in held:
        p.grad = torch.ones_like(p)
    before = [p.detach().clone() for p in held]
    carried.step()
    for p, q, old in zip(held, torch.load(f"{file}.after"), before, strict=True):
        torch.testing.assert_close(p.detach(), q, rtol=0, atol=1e-15)
        assert len((old - q).unique().round(decimals=12).unique()) == 2  # old entries at one rate, new ones at another


# a growth after a growth ----------------------------------------------------------------------------------------------

POLICIES: dict[str, tuple[str, dict[str, Any]]] = {
    "exact": ("exact", {}),
    "ramp": ("exact", {"ramp": 7}),
    "asymmetric": ("asymmetric", {"warmup": 8, "peak": 1.5}),
}


@pytest.mark.parametrize("first", POLICIES)
@pytest.mark.parametrize("second", ["exact", "asymmetric", "copy"])
def test_a_second_growth_leaves_what_the_first_began(first: str, second: str) -> None:
    """A second growth whose new parameters do not learn changes nothing for the others, whatever its policy."""
    model, optimizer = started(MAKE["AdamW"])
    policy, options = POLICIES[first]
    one = grown(model, {**HIDDEN, "noise": {"scale": 1e-2}}, STREAM)
    carried = one.carry(optimizer, policy, **options)
    for k in range(3):
        step(one.module, carried, k)
    two = grown(one.module, {"op": "insert", "layer": "linear", "after": "emb"})
    new = [n for n, p in two.plan.tensors.items() if p.source is None]
    again = two.carry(carried, second)
    for name in new:
        two.module.get_parameter(name).requires_grad_(False)
    assert new and apart(one.module, carried, two.module, again) <= 1e-13
    if first == "exact":
        assert len(all_rates(again)) >= 1


def test_each_newborn_entry_warms_up_with_the_growth_that_made_it() -> None:
    model, optimizer = started(lambda p: optim.SGD(p, lr=0.25))
    one = grown(model, {**HIDDEN, "factor": 2})
    carried = one.carry(optimizer, "asymmetric", warmup=8, peak=1.0)
    for k in range(2):
        step(one.module, carried, k)
    two = grown(one.module, {"op": "widen", "axis": "up.weight:0", "factor": 2})
    again = two.carry(carried, "asymmetric", warmup=8, peak=1.0)
    weight = two.module.get_parameter("up.weight")
    before = weight.detach().clone()
    again.zero_grad()
    weight.grad = torch.ones_like(weight)
    again.step()
    rate = ((before - weight.detach()) / 0.25)[:, 0]
    # 8 old units, 8 of the first growth at their third step of four, 16 of the second at their first
    expected = torch.tensor([1.0] * 8 + [0.75] * 8 + [0.25] * 16, dtype=torch.float64)
    torch.testing.assert_close(rate, expected, rtol=0, atol=1e-12)


# optimizers that are no sum of entries --------------------------------------------------------------------------------


class Lion(optim.Optimizer):
    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                    p.add_((0.9 * m + 0.1 * p.grad).sign_(), alpha=-group["lr"])
                    m.lerp_(p.grad, 0.01)


def test_exact_takes_only_optimizers_that_work_entry_by_entry() -> None:
    model = net()
    growth = grown(model, HIDDEN)
    for optimizer in (
        Lion(model.parameters()),
        Twice(model.parameters(), lr=1e-3),
    ):
        with pytest.raises(fxgrow.FxgrowError, match="not known to be one"):
            growth.carry(optimizer, "exact")
        growth.carry(optimizer, "copy")

    class Decayed(optim.AdamW):
        """Another constructor, the same step."""

        def __init__(self, params: Any, lr: float = 1e-2) -> None:
            super().__init__(params, lr=lr, weight_decay=0.5)

    model, optimizer = started(Decayed)
    growth = grown(model, HIDDEN, STREAM)
    assert apart(model, optimizer, growth.module, growth.carry(optimizer, "exact")) <= 1e-13
    ELEMENTWISE.add(Lion)
    try:
        model, optimizer = started(Lion)
        growth = grown(model, HIDDEN, STREAM)
        assert apart(model, optimizer, growth.module, growth.carry(optimizer, "exact")) <= 1e-13
    finally:
        ELEMENTWISE.discard(Lion)


class Nested(optim.SGD):
    """Calls its parent's step, with that one's hooks."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.mul_(0.99)
        return super().step(closure)


def test_a_step_that_calls_its_parents_is_scaled_once() -> None:
    optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)  # so that both classes' steps run hooks
    ELEMENTWISE.add(Nested)
    try:
        model, optimizer = started(lambda p: Nested(p, lr=1e-2, momentum=0.9))
        growth = grown(model, HIDDEN, STREAM)
        assert apart(model, optimizer, growth.module, growth.carry(optimizer, "exact")) <= 1e-13
    finally:
        ELEMENTWISE.discard(Nested)


def test_a_step_that_failed_is_put_back() -> None:
    model, optimizer = started(MAKE["AdamW"])
    growth = grown(model, HIDDEN, STREAM)
    carried = growth.carry(optimizer, "exact")
    step(model, optimizer, 5)
    step(growth.module, carried, 5)
    group = carried.param_groups[0]
    betas = group.pop("betas")
    with pytest.raises(KeyError):
        step(growth.module, carried, 6)
    group["betas"] = betas
    carried.zero_grad()
    carried.step()
    assert apart(model, optimizer, growth.module, carried) <= 1e-13


def test_the_users_step_hooks_see_the_models_own_weights() -> None:
    model, optimizer = started(MAKE["AdamW"])
    growth = grown(model, HIDDEN, STREAM)
    carried = growth.carry(optimizer, "exact")
    seen: list[torch.Tensor] = []
    weight = growth.module.get_parameter("down.weight")
    carried.register_step_pre_hook(lambda *_: seen.append(weight.detach().clone()))
    carried.register_step_post_hook(lambda *_: seen.append(weight.detach().clone()))
    before = weight.detach().clone()
    step(growth.module, carried, 0)
    assert torch.equal(seen[0], before) and torch.equal(seen[1], weight)


# several optimizers ---------------------------------------------------------------------------------------------------


def test_two_optimizers_share_the_grown_parameters() -> None:
    model = net()
    halves = [list(model.up.parameters()) + list(model.emb.parameters())]
    halves.append([p for p in model.parameters() if not any(p is q for q in halves[0])])
    small = [optim.AdamW(halves[0], lr=1e-2), optim.SGD(halves[1], lr=1e-2, momentum=0.9)]

    def both(module: nn.Module, optimizers: list[optim.Optimizer], seed: int) -> float:
        for one in optimizers:
            one.zero_grad()
        loss = loss_of(module, seed)
        loss.backward()
        for one in optimizers:
            one.step()
        return float(loss.detach())

    for k in range(4):
        both(model, small, k)
    growth = grown(model, HIDDEN, STREAM)
    large = [growth.carry(one, "exact") for one in small]
    for k in range(4, 16):
        assert abs(both(model, small, k) - both(growth.module, large, k)) <= 1e-13


def test_new_parameters_go_where_their_siblings_are() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    growth = fxgrow.grow(model, {"op": "insert", "layer": "linear", "after": "1"}, (torch.randn(4, 6).double(),))
    new = {n for n, p in growth.plan.tensors.items() if p.source is None}
    assert len(new) == 2
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    muon, adamw = growth.carry(optim.Muon(matrices), "copy"), growth.carry(optim.AdamW(vectors), "asymmetric")
    held = [p for o in (muon, adamw) for g in o.param_groups for p in g["params"]]
    assert len(held) == len({id(p) for p in held}) == len(list(growth.module.parameters()))
    assert all(p.dim() == 2 for g in muon.param_groups for p in g["params"])
    # divided by layers, nobody can say whose the new layer is
    first, last = optim.SGD(model[0].parameters(), lr=0.1), optim.SGD(model[2].parameters(), lr=0.1)
    with pytest.raises(fxgrow.FxgrowError, match="newcomers=that optimizer"):
        growth.carry(first)
    counts = [
        sum(len(g["params"]) for g in growth.carry(o, newcomers=n).param_groups)
        for o, n in ((first, True), (last, False))
    ]
    assert counts == [4, 2]


# what state depends on ------------------------------------------------------------------------------------------------

ORACLE: dict[str, Callable[[Any], optim.Optimizer]] = {
    "Adadelta": lambda p: optim.Adadelta(p, lr=0.0, rho=0.0),
    "Adafactor": lambda p: optim.Adafactor(p, lr=0.0),
    "Adagrad": lambda p: optim.Adagrad(p, lr=0.0),
    "Adam": lambda p: optim.Adam(p, lr=0.0, betas=(0.0, 0.0), amsgrad=True),
    "Adamax": lambda p: optim.Adamax(p, lr=0.0, betas=(0.0, 0.0), eps=0.0),
    "RMSprop": lambda p: optim.RMSprop(p, lr=0.0, alpha=0.5, centered=True),
    "Rprop": lambda p: optim.Rprop(p, lr=1e-20, step_sizes=(1e-20, 1.0)),
    "SGD": lambda p: optim.SGD(p, lr=0.0, momentum=0.5),
}


@pytest.mark.parametrize("name", ORACLE)
def test_state_of_gradients_is_what_the_grown_model_would_have_seen(name: str) -> None:
    model, optimizer = started(ORACLE[name], steps=1)
    growth = grown(model, HIDDEN, STREAM)
    large = ORACLE[name](growth.module.parameters())
    carried = growth.carry(optimizer, "copy")
    step(growth.module, large, 0)
    compared = set()
    for p in growth.module.parameters():
        for key, true in large.state[p].items():
            moment = moment_of(large, key, large.state[p])
            assert moment is not None
            if moment.gradient:
                compared.add(key)
                torch.testing.assert_close(carried.state[p][key], true, rtol=1e-9, atol=1e-12)
    assert compared


def test_steps_under_way_move_the_function_as_they_would_have() -> None:
    """RMSprop's momentum holds steps: with gradients at rest, both models coast alike."""
    model, optimizer = started(lambda p: optim.RMSprop(p, lr=1e-3, momentum=0.9))
    growth = grown(model, HIDDEN, STREAM)
    carried = growth.carry(optimizer, "copy")
    for module, one in ((model, optimizer), (growth.module, carried)):
        for p in module.parameters():
            p.grad = torch.zeros_like(p)
        one.step()
    x = data(9)[0]
    torch.testing.assert_close(growth.module(x), model(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: optim.Adadelta(p, lr=1.0, eps=1e-40),  # eps is a step size of its own
        lambda p: optim.Rprop(p, lr=1e-3, step_sizes=(1e-30, 50.0)),
    ],
)
def test_step_sizes_scale_like_the_weights(make: Any) -> None:
    model = net()
    optimizer = make(model.parameters())
    for p in model.parameters():  # as if it had trained for long
        optimizer.state[p].update(
            {"square_avg": p.detach().square() + 1, "acc_delta": 1e-4 * p.detach().square() + 1e-6}
        )
        if isinstance(optimizer, optim.Adadelta):
            optimizer.state[p]["step"] = torch.tensor(9.0)
        else:
            optimizer.state[p].clear()
    step(model, optimizer, 0)
    growth = grown(model, HIDDEN, STREAM)
    assert apart(model, optimizer, growth.module, growth.carry(optimizer, "copy"), steps=6) <= 1e-9


@pytest.mark.parametrize("policy", ["exact", "copy"])
def test_averaged_weights_are_weights(policy: str) -> None:
    """ASGD's ``ax``, put in the place of the weights, gives the function of the small model's average."""
    model, optimizer = started(MAKE["ASGD"], steps=6)
    growth = grown(model, HIDDEN, STREAM)
    carried = growth.carry(optimizer, policy)
    if policy == "exact":
        assert apart(model, optimizer, growth.module, carried, steps=5) <= 1e-13
    for module, one in ((model, optimizer), (growth.module, carried)):
        with torch.no_grad():
            for p in module.parameters():
                p.copy_(one.state[p]["ax"])
    x = data(9)[0]
    torch.testing.assert_close(growth.module(x), model(x), rtol=0, atol=1e-12)


def test_state_that_is_not_known_is_refused_before_the_growth() -> None:
    class Odd(optim.SGD):
        pass

    model, _ = started(MAKE["SGD"])
    optimizer = Odd(model.parameters(), lr=1e-3)
    for p in model.parameters():
        optimizer.state[p]["something"] = torch.zeros_like(p)
    scheduler = fxgrow.GrowthScheduler([{"trigger": {"step": 0}, "operations": [HIDDEN]}], args=("no example",))
    with pytest.raises(fxgrow.FxgrowError, match="'something' depends"):
        scheduler.step(model, optimizer, step=0)
    optimizer.state.clear()
    optimizer.state[model.up.weight]["history"] = [torch.zeros(3)]
    with pytest.raises(fxgrow.FxgrowError, match="'history' is a list"):
        scheduler.step(model, optimizer, step=0)


# gradients, schedulers, scalers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["exact", "copy"])
def test_gradients_that_wait_for_their_step_come_along(policy: str) -> None:
    model, optimizer = started(lambda p: optim.SGD(p, lr=1e-2))
    optimizer.zero_grad()
    loss_of(model, 1).backward()
    growth = grown(model, HIDDEN, STREAM)
    carried = growth.carry(optimizer, policy)
    fresh = grown(model, HIDDEN, STREAM).module
    (loss_of(fresh, 1) + loss_of(fresh, 2)).backward()
    for module in (model, growth.module):
        loss_of(module, 2).backward()
    for p, q in zip(growth.module.parameters(), fresh.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-13)
    optimizer.step()
    carried.step()
    if policy == "exact":
        assert apart(model, optimizer, growth.module, carried) <= 1e-13


def test_a_learning_rate_scheduler_of_the_old_optimizer_is_named() -> None:
    model, optimizer = started(MAKE["SGD"])
    scheduler = optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    growth = grown(model, HIDDEN)
    with pytest.warns(UserWarning, match=r"scheduler\.optimizer = new_optimizer"):
        carried = growth.carry(optimizer, "exact")
    scheduler.optimizer = carried
    for k in range(4):
        step(growth.module, carried, k)
        with warnings.catch_warnings(action="ignore"):  # the step it counted was the old optimizer's
            scheduler.step()
    assert carried.param_groups[0]["lr"] == pytest.approx(0.25e-2)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-2)


def test_parameter_names_in_groups_are_the_grown_ones() -> None:
    model = net()
    optimizer = optim.AdamW(model.named_parameters())
    growth = grown(model, {"op": "insert", "layer": "linear", "after": "emb"})
    (group,) = growth.carry(optimizer).param_groups
    own = dict(growth.module.named_parameters())
    assert sorted(group["param_names"]) == sorted(own)
    assert all(own[n] is p for n, p in zip(group["param_names"], group["params"], strict=True))


def test_a_step_that_a_scaler_skips_is_not_counted() -> None:
    model, optimizer = started(MAKE["AdamW fused"], dtype=torch.float32)
    growth = grown(model, HIDDEN, STREAM)
    carried = growth.carry(optimizer, "asymmetric", warmup=9)
    before = copy.deepcopy(growth.module.state_dict())
    carried.grad_scale, carried.found_inf = torch.ones(()), torch.ones(())  # type: ignore[attr-defined]
    step(growth.module, carried, 0)
    rates = slice_rates(carried)
    assert rates is not None and rates.steps == 0
    assert all(torch.equal(v, before[k]) for k, v in growth.module.state_dict().items())
    carried.found_inf = torch.zeros(())  # type: ignore[attr-defined]
    step(growth.module, carried, 0)
    assert rates.steps == 1


# rounding -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_entries_that_take_no_step_keep_their_bits(dtype: torch.dtype) -> None:
    """A third of a weight times three is another number; tokens that did not occur must not move."""
    model = net(dtype)
    optimizer = optim.SGD(model.parameters(), lr=0.5)
    growth = fxgrow.grow(model, [HIDDEN, {**STREAM, "factor": 3}], (data(0)[0],), verify=False)
    carried = growth.carry(optimizer, "exact")
    module = growth.module
    before = copy.deepcopy(dict(module.named_parameters()))
    for _ in range(3):
        carried.zero_grad()
        module(torch.tensor([[1, 2], [3, 4]])).square().mean().backward()
        for p in module.parameters():
            assert p.grad is not None
            if p is not module.get_parameter("emb.weight"):
                p.grad.zero_()
                p.grad.view(-1)[0] = 1.0
        carried.step()
    for name, p in module.named_parameters():
        if name == "emb.weight":
            assert torch.equal(p[5:], before[name][5:]) and not torch.equal(p[1:5], before[name][1:5])
        else:
            assert torch.equal(p.view(-1)[1:], before[name].view(-1)[1:])
            assert not torch.equal(p.view(-1)[0], before[name].view(-1)[0])


def test_low_precision_steps_are_a_third_and_not_nearly() -> None:
    """In bfloat16 a third is off by 0.002, so that weights would shrink or grow at every step."""
    model = net(torch.bfloat16)
    growth = grown(model, HIDDEN)
    carried = growth.carry(optim.SGD(model.parameters(), lr=1e-6), "exact")
    weight = growth.module.get_parameter("down.weight")
    before = weight.detach().float()
    for k in range(100):
        step(growth.module, carried, k)
    assert float((weight.detach().float() - before).abs().max()) <= 1e-3


class Sharp(optim.Optimizer):
    """Sharpness-aware: moves the weights, evaluates its closure there, moves them back, and has another one step."""

    def __init__(self, params: Any, shares: bool, rho: float = 0.5) -> None:
        super().__init__(params, {"lr": 1e-2, "rho": rho})
        self.inner = optim.SGD(self.param_groups, lr=1e-2) if shares else None

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        members = [p for g in self.param_groups for p in g["params"]]
        with torch.enable_grad():
            closure()
        before = [p.clone() for p in members]
        for p in members:
            p.add_(p.grad, alpha=self.param_groups[0]["rho"])
        with torch.enable_grad():
            loss = closure()
        for p, old in zip(members, before, strict=True):
            p.copy_(old)
        if self.inner is not None:
            self.inner.step()
            return loss
        for p in members:
            p.add_(p.grad, alpha=-self.param_groups[0]["lr"])
        return loss


@pytest.mark.parametrize("shares", [False, True])
def test_a_step_that_moves_weights_before_its_closure_does_so_while_entries_warm_up(shares: bool) -> None:
    """And an optimizer inside it, which has its groups and so the rates, does not apply them a second time."""
    model = net()
    growth = grown(model, HIDDEN)
    optimizer = Sharp(model.parameters(), shares)
    growth.carry_(optimizer, warmup=4, peak=0.5)
    module = growth.module
    twin = copy.deepcopy(module)
    plain = Sharp(twin.parameters(), False)
    new = {n: growth.new_parameters.entries(n) for n in growth.new_parameters}
    for k, rate in enumerate((0.25, 0.5, 0.75, 1.0, 1.0)):
        before = {n: p.detach().clone() for n, p in twin.named_parameters()}
        closure_step(module, optimizer, k)
        closure_step(twin, plain, k)
        with torch.no_grad():
            for n, p in twin.named_parameters():
                if n in new:
                    p.copy_(torch.where(new[n], torch.lerp(before[n], p, rate), p))
        for n, p in module.named_parameters():
            torch.testing.assert_close(p, twin.get_parameter(n), rtol=0, atol=1e-14)


class Master(optim.Optimizer):
    """Steps weights in its state, and copies them into the parameters."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 1e-2})
        for p in self.param_groups[0]["params"]:
            self.state[p]["master"] = p.detach().clone()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            p.copy_(self.state[p]["master"].sub_(p.grad, alpha=self.param_groups[0]["lr"]))


@pytest.mark.parametrize("most", [64, 0])
def test_weights_in_state_warm_up_with_their_parameter(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many steps of SGD do; after the warm-up the parameters would jump to weights that went at the full rate."""
    monkeypatch.setattr("fxgrow.optim.rates.MOST", most)
    monkeypatch.setitem(MOMENTS, (Master, "master"), KINDS["value"])
    ends = []
    for make in (Master, lambda p: optim.SGD(p, lr=1e-2)):
        model = net()
        growth = grown(model, HIDDEN)
        optimizer = make(model.parameters())
        growth.carry_(optimizer, warmup=4, peak=0.5)
        ends.append([step(growth.module, optimizer, k) for k in range(7)])
    assert ends[0] == pytest.approx(ends[1], abs=1e-13)
