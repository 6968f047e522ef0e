"""Optimizers whose step looks at whole tensors follow the small model where tensors grow by whole copies."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn, optim

import fxgrow
from fxgrow.optim import register_tiled
from fxgrow.optim.whole import is_muon
from fxgrow.weights.moments import TILED
from tests.optim.test_rates import HIDDEN, STREAM, apart, closure_step, grown, loss_of, net, started, step

ADAFACTOR: dict[str, dict[str, Any]] = {
    "plain": {"lr": 1e-2},
    "decay, foreach": {"lr": 0.05, "weight_decay": 0.1, "foreach": True},
    "clips, maximize": {"lr": 0.02, "d": 1.0, "eps": (1e-4, 1e-2), "maximize": True},
}


@pytest.fixture
def tiled() -> Iterator[None]:
    before = set(TILED)
    yield
    TILED.intersection_update(before)


@pytest.mark.parametrize("name", ADAFACTOR)
def test_adafactor_follows(name: str) -> None:
    model, optimizer = started(lambda p: optim.Adafactor(p, **ADAFACTOR[name]), steps=3)
    growth = grown(model, HIDDEN, STREAM)
    carried = growth.carry(optimizer, "exact")
    how = closure_step if name == "plain" else step
    assert apart(model, optimizer, growth.module, carried, how, steps=50) <= 1e-9


def test_adafactor_leaves_the_small_models_units_after_a_ramp() -> None:
    """Its factored squares are then what the copied policy makes of them."""
    model, optimizer = started(lambda p: optim.Adafactor(p, lr=1e-2), steps=3)
    growth = grown(model, HIDDEN, STREAM)
    ramped = growth.carry(optimizer, "exact", ramp=1)
    copied = growth.carry(optimizer, "copy")
    for p in growth.module.parameters():
        p.grad = torch.zeros_like(p)
    before = copy.deepcopy(growth.module.state_dict())
    ramped.step()
    growth.module.load_state_dict(before)
    copied.step()
    for p in growth.module.parameters():
        for key, value in copied.state[p].items():
            torch.testing.assert_close(ramped.state[p][key], value, rtol=1e-12, atol=0)


class Lamb(optim.Optimizer):
    """Adam's step, scaled by the ratio of norms."""

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    m = self.state[p].setdefault("exp_avg", torch.zeros_like(p)).lerp_(p.grad, 0.1)
                    v = self.state[p].setdefault("exp_avg_sq", torch.zeros_like(p)).lerp_(p.grad.square(), 0.01)
                    update = m / (v.sqrt() + 1e-6) + 0.01 * p
                    p.sub_(update * (group["lr"] * p.norm() / update.norm()))
        return loss


def test_an_own_optimizer_of_norms_follows_once_it_is_named(tiled: None) -> None:
    model, optimizer = started(Lamb)
    growth = grown(model, HIDDEN, STREAM)
    with pytest.raises(fxgrow.FxgrowError, match="register_tiled"):
        growth.carry(optimizer, "exact")
    register_tiled(Lamb)
    assert apart(model, optimizer, growth.module, growth.carry(optimizer, "exact"), steps=50) <= 1e-9


@pytest.mark.parametrize("make", [lambda p: optim.Adafactor(p), Lamb, lambda p: optim.Muon(p)])
def test_a_growth_by_parts_is_refused(make: Any, tiled: None) -> None:
    register_tiled(Lamb)
    model = net()
    optimizer = make([p for p in model.parameters() if p.dim() == 2])
    growth = grown(model, {"op": "widen", "axis": "up.weight:0", "by": 3})
    with pytest.raises(fxgrow.FxgrowError, match=r"whole copies.*dim 0 of up.weight grows from 8 to 11"):
        growth.carry(optimizer, "exact")
    growth.carry(optimizer, "copy")


class Square(nn.Module):
    """Matrices only, for Muon: tall, wide and square."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 6)
        self.up, self.down = nn.Linear(6, 8, bias=False), nn.Linear(8, 6, bias=False)
        self.mix, self.out = nn.Linear(6, 6, bias=False), nn.Linear(6, 3, bias=False)

    def forward(self, i: torch.Tensor) -> torch.Tensor:
        x = self.emb(i)
        x = x + self.down(torch.tanh(self.up(x)))
        return self.out(x + self.mix(x))


MUON: dict[str, dict[str, Any]] = {
    "original": {"weight_decay": 0.1},
    "match_rms_adamw": {"adjust_lr_fn": "match_rms_adamw", "nesterov": False},
    "tensor": {"lr": torch.tensor(0.02, dtype=torch.float64)},
}


def muon(name: str) -> tuple[nn.Module, optim.Muon]:
    torch.manual_seed(0)
    model = Square().double()
    optimizer = optim.Muon(model.parameters(), **{"lr": 0.02, **MUON[name]})
    for k in range(3):
        step(model, optimizer, k)
    return model, optimizer


SPECS = {
    "rows, columns": [HIDDEN],
    "both": [{**HIDDEN, "factor": 2}, STREAM],
    "twice": [HIDDEN, STREAM, {"op": "widen", "axis": "up.weight:0", "factor": 2}],
}


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", MUON)
def test_muon_follows_but_for_bfloat16(name: str, spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its iteration in float64, the mathematics shows to the last digits."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    model, optimizer = muon(name)
    growth = grown(model, *SPECS[spec])
    with pytest.warns(UserWarning, match="bfloat16"):
        carried = growth.carry(optimizer, "exact")
    assert apart(model, optimizer, growth.module, carried, steps=50) <= 1e-9


def test_muon_follows_over_two_growths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    model, optimizer = muon("original")
    one = grown(model, HIDDEN)
    with warnings.catch_warnings(action="ignore"):
        first = one.carry(optimizer, "exact")
        assert apart(model, optimizer, one.module, first, steps=3) <= 1e-9
        two = grown(one.module, {**HIDDEN, "factor": 2}, STREAM)
        second = two.carry(first, "exact")
    assert apart(model, optimizer, two.module, second, steps=20) <= 1e-9


def test_muon_follows_to_the_accuracy_of_its_own_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is off by no more than the original itself is, whose iteration in bfloat16 is held against one in float64."""
    model, optimizer = muon("original")
    growth = grown(model, HIDDEN, STREAM)
    with pytest.warns(UserWarning, match="bfloat16"):
        carried = growth.carry(optimizer, "exact")
    exact, rounding = copy.deepcopy((model, optimizer))
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    large = {n: p.detach().clone() for n, p in growth.module.named_parameters()}

    def stepped(module: nn.Module, one: Any, before: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        one.zero_grad()
        loss_of(module, 3).backward()
        one.step()
        return {n: p.detach() - before[n] for n, p in module.named_parameters()}

    def follow(name: str, moved: torch.Tensor) -> torch.Tensor:
        plan = growth.plan.tensors[name]
        expected = moved * plan.scale
        for i, d in enumerate(plan.dims):
            if d is not None:
                expected = expected.index_select(i, torch.from_numpy(d.index))
                if d.split is not None:
                    shape = [1] * moved.dim()
                    shape[i] = -1
                    expected = expected * torch.from_numpy(d.split).view(shape)
        return expected

    small, grew = stepped(model, optimizer, start), stepped(growth.module, carried, large)
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    right = stepped(exact, rounding, start)
    off = {n: float((grew[n] - follow(n, m)).norm() / follow(n, m).norm()) for n, m in small.items()}
    own = {n: float((m - right[n]).norm() / right[n].norm()) for n, m in small.items()}
    # small singular values are off most, so that the sum over the weights is what says something
    assert 0 < math.hypot(*off.values()) <= 2 * math.hypot(*own.values()), (off, own)


REFUSED = {"LBFGS": "history of whole gradients"}
OPTIMIZERS = sorted(
    n
    for n in dir(optim)
    if isinstance(c := getattr(optim, n), type) and issubclass(c, optim.Optimizer) and c is not optim.Optimizer
)


@pytest.mark.parametrize("policy", ["exact", "asymmetric", "copy", "reset"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_of_torch_is_carried_or_refused_with_the_reason(
    name: str, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new one in torch shows here. Carried under ``exact``, it follows; under the others, it trains on."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    torch.manual_seed(0)
    model: nn.Module = Square().double()
    sparse = name == "SparseAdam"
    if sparse:
        model.emb.sparse = True  # type: ignore[union-attr, assignment]
        for n, p in model.named_parameters():
            p.requires_grad_(n == "emb.weight")
    optimizer = getattr(optim, name)([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    how = closure_step if name == "LBFGS" else step
    for k in range(2):
        how(model, optimizer, k)
    growth = grown(model, {"op": "widen", "axis": "emb.weight:1", "factor": 2})
    if name in REFUSED and policy != "reset":
        with pytest.raises(fxgrow.FxgrowError, match=REFUSED[name]):
            growth.carry(optimizer, policy)
        return
    with warnings.catch_warnings(action="ignore"):
        carried = growth.carry(optimizer, policy)
    assert is_muon(carried) == (name == "Muon")
    if policy == "exact":
        assert apart(model, optimizer, growth.module, carried, steps=5) <= 1e-12
    else:
        first = how(growth.module, carried, 0)
        for _ in range(6):
            last = how(growth.module, carried, 0)
        assert last < first
