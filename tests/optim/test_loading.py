"""A state of before the growth is refused over the grown parameters, before anything is loaded."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn, optim

import fxgrow
from tests.optim.nets import HIDDEN, VARIANTS, grown, loss_of, sized, step


@pytest.mark.parametrize("policy", ["exact", "asymmetric", "reset"])
@pytest.mark.parametrize("name", ["Adam fused", "Adagrad", "ASGD foreach", "SGD"])
def test_the_small_models_state_is_refused(name: str, policy: str) -> None:
    model = sized()
    optimizer = VARIANTS[name](model.parameters())
    for k in range(2):
        step(model, optimizer, k)
    old = copy.deepcopy(optimizer.state_dict())
    growth = grown(model, HIDDEN)
    growth.carry_(optimizer, policy)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(fxgrow.FxgrowError, match=r"not of the grown model: its '\w+' has shape \(8, 6\)"):
        optimizer.load_state_dict(old)
    assert str(optimizer.state_dict()) == str(before)
    step(growth.module, optimizer, 2)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(growth.module, optimizer, 3)


def test_a_state_without_moments_lacks_the_factors() -> None:
    model = sized()
    optimizer = optim.SGD(model.parameters(), lr=1e-2)
    old = copy.deepcopy(optimizer.state_dict())
    made = grown(model, HIDDEN).carry(optimizer, "exact")
    with pytest.raises(fxgrow.FxgrowError, match="no per-slice learning rates"):
        made.load_state_dict(old)
    made.load_state_dict(copy.deepcopy(made.state_dict()))


class Own(optim.SGD):
    """Settings of its own beside those of the groups."""

    def __init__(self, params: Any, lr: float = 1e-3, bound: float = 0.0, **more: Any) -> None:
        super().__init__(params, lr=lr, **more)
        self.bound = bound


class Named(Own):
    def __init__(self, params: Any, lr: float, *, flag: str) -> None:
        super().__init__(params, lr)
        self.flag = flag


def test_a_new_optimizer_has_the_settings_of_the_old_one() -> None:
    model = sized()
    growth = grown(model, HIDDEN)
    made = growth.carry(Own(model.parameters(), 1e-2, bound=0.5))
    assert isinstance(made, Own) and made.bound == 0.5 and made.param_groups[0]["lr"] == 1e-2


def test_one_that_cannot_be_made_anew_is_kept_in_place() -> None:
    model = sized()
    optimizer = Named(model.parameters(), 1e-2, flag="x")
    growth = grown(model, HIDDEN)
    with pytest.raises(fxgrow.FxgrowError, match=r"cannot be made anew .*flag.*carry_"):
        growth.carry(optimizer)
    growth.carry_(optimizer)
    step(growth.module, optimizer, 0)


@pytest.mark.parametrize(
    "options",
    [{"warmup": -1}, {"warmup": 2.5}, {"warmup": None}, {"peak": float("nan")}, {"peak": -1.0}, {"ramp": -2}],
)
def test_numbers_that_are_none_of_steps_or_rates(options: dict[str, Any]) -> None:
    model = sized()
    optimizer = optim.SGD(model.parameters(), lr=1e-2)
    growth, before = grown(model, HIDDEN), list(model.parameters())
    with pytest.raises(fxgrow.FxgrowError, match=next(iter(options))):
        growth.carry_(optimizer, "asymmetric" if "ramp" not in options else "exact", **options)
    assert all(a is b for a, b in zip(optimizer.param_groups[0]["params"], before, strict=True))
    with pytest.raises(fxgrow.FxgrowError, match="unknown optimizer policy ''"):
        growth.carry_(optimizer, "")


def test_what_stands_still_is_let_go_before_it_grows() -> None:
    model = sized()
    growth = grown(model, {"op": "widen", "axis": "up.weight:0", "by": 2})
    growth.apply_(model)
    frozen = growth.freeze_old()
    with pytest.raises(fxgrow.FxgrowError, match=r"freeze_old of an earlier growth holds \S+, .*unfreeze\(\)"):
        grown(model, HIDDEN)
    frozen.unfreeze()
    again = grown(model, HIDDEN)
    again.apply_(model)
    loss_of(model, 0).backward()
    assert all(isinstance(p, nn.Parameter) and p.grad is not None for p in model.parameters())
    assert torch.equal(model.up.weight, again.module.up.weight)
