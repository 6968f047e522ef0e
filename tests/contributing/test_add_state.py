"""CONTRIBUTING.md, "An optimizer's state": name the state of an optimizer of your own, and it follows exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxgrow
from fxgrow.errors import FxgrowError
from fxgrow.optim import register_elementwise, register_state

WIDER = {"op": "widen", "axis": "./hidden", "factor": 2}


class Damped(torch.optim.Optimizer):
    """Momentum, divided by the root of the largest square so far: an entry's step is its own."""

    def __init__(self, params: Any, lr: float = 0.05) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                speed = state.setdefault("speed", torch.zeros_like(p)).mul_(0.9).add_(p.grad, alpha=0.1)
                peak = state.setdefault("peak", torch.zeros_like(p))
                peak.copy_(torch.maximum(peak, p.grad.square()))
                p.sub_(group["lr"] * speed / (peak.sqrt() + 1e-30))
        return loss


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> Tensor:
    for step in steps:
        x = torch.randn(6, 3, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    out: Tensor = model(torch.ones(1, 3, dtype=torch.float64)).detach()
    return out


def trained() -> tuple[nn.Module, Damped]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    optimizer = Damped(model.parameters())
    train(model, optimizer, range(5))
    return model, optimizer


def grown(model: nn.Module) -> fxgrow.Growth:
    return fxgrow.grow(model, WIDER, (torch.zeros(2, 3, dtype=torch.float64),), verify=False)


def test_a_state_that_is_not_known_is_refused_by_name() -> None:
    model, optimizer = trained()
    with pytest.raises(FxgrowError, match="'speed'"):
        grown(model).carry(optimizer)
    with pytest.raises(FxgrowError, match="Damped"):
        grown(model).carry(optimizer, "exact")


def test_a_line_for_each_state_and_it_follows() -> None:
    register_state("speed", "gradient", Damped)
    register_state("peak", "square", Damped)
    register_elementwise(Damped)
    model, optimizer = trained()
    growth = grown(model)
    carried = growth.carry(optimizer, "exact")
    copied = growth.carry(optimizer, "copy")
    weight = growth.module.get_parameter("0.weight")
    state, small = copied.state[weight], optimizer.state[model[0].weight]
    torch.testing.assert_close(state["speed"], small["speed"].repeat(2, 1) / 2, rtol=1e-12, atol=0)
    torch.testing.assert_close(state["peak"], small["peak"].repeat(2, 1) / 4, rtol=1e-12, atol=0)
    steps = range(5, 25)
    torch.testing.assert_close(
        train(growth.module, carried, steps), train(model, optimizer, steps), rtol=1e-9, atol=1e-12
    )


def test_exact_needs_no_kinds() -> None:
    register_elementwise(Damped)
    model, optimizer = trained()
    growth = grown(model)
    carried, steps = growth.carry(optimizer, "exact"), range(5, 25)
    torch.testing.assert_close(
        train(growth.module, carried, steps), train(model, optimizer, steps), rtol=1e-9, atol=1e-12
    )


def test_a_ramp_needs_the_kinds() -> None:
    """At its end the state leaves the small model's units."""
    register_elementwise(Damped)
    model, optimizer = trained()
    with pytest.raises(FxgrowError, match="not known how its state 'speed' depends"):
        grown(model).carry(optimizer, "exact", ramp=10)


def test_a_kind_of_ones_own() -> None:
    register_state("speed", (3, 0), Damped)
    register_state("peak", "square", Damped)
    model, optimizer = trained()
    growth = grown(model)
    state = growth.carry(optimizer, "copy").state[growth.module.get_parameter("0.weight")]
    small = optimizer.state[model[0].weight]["speed"]
    torch.testing.assert_close(state["speed"], small.repeat(2, 1) / 8, rtol=1e-12, atol=0)


def test_a_kind_that_is_wrong_does_not_follow() -> None:
    register_state("speed", "gradient", Damped)
    register_state("peak", "gradient", Damped)
    model, optimizer = trained()
    growth = grown(model)
    state = growth.carry(optimizer, "copy").state[growth.module.get_parameter("0.weight")]
    assert not torch.allclose(state["peak"], optimizer.state[model[0].weight]["peak"].repeat(2, 1) / 4)
