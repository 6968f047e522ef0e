"""Clipping by the norm of the small model's gradient, so that policy ``exact`` follows a run that clips."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import nn, optim

import fxgrow
from fxgrow.optim import clip_grad_norm_
from tests.optim.test_rates import HIDDEN, MAKE, STREAM, grown, loss_of, net, started, step

UNEVEN = {"op": "widen", "axis": "up.weight:0", "by": 5}


def clipped(model: nn.Module, one: optim.Optimizer, seed: int, most: float, **how: Any) -> tuple[float, float]:
    """A step with clipping; loss and norm."""
    one.zero_grad()
    loss = loss_of(model, seed)
    loss.backward()
    norm = clip_grad_norm_(one, most, **how)
    one.step()
    return float(loss.detach()), float(norm)


@pytest.mark.parametrize("norm_type", [2.0, 1.0, float("inf")])
@pytest.mark.parametrize("spec", [[HIDDEN, STREAM], [UNEVEN], [{**HIDDEN, "split": "uneven"}]])
def test_exact_follows_a_run_that_clips(spec: list[Any], norm_type: float) -> None:
    most = {2.0: 0.3, 1.0: 2.0, float("inf"): 0.1}[norm_type]
    model, optimizer = started(MAKE["SGD"])
    growth = grown(model, *spec)
    carried = growth.carry(optimizer, "exact")
    clips = 0
    for k in range(50):
        (a, small), (b, large) = (
            clipped(m, o, k, most, norm_type=norm_type) for m, o in ((model, optimizer), (growth.module, carried))
        )
        assert abs(a - b) <= 1e-9 and large == pytest.approx(small, rel=1e-9)
        clips += small > most
    assert clips > 30


def test_and_over_two_growths_and_a_save() -> None:
    model, optimizer = started(MAKE["AdamW"])
    one = grown(model, HIDDEN)
    first = one.carry(optimizer, "exact")
    for k in range(5):
        (a, _), (b, _) = clipped(model, optimizer, k, 0.3), clipped(one.module, first, k, 0.3)
        assert abs(a - b) <= 1e-12
    two = grown(one.module, UNEVEN, STREAM)
    second = two.carry(first, "exact")
    file = io.BytesIO()
    torch.save(second.state_dict(), file)
    file.seek(0)
    loaded = optim.AdamW(two.module.parameters())
    loaded.load_state_dict(torch.load(file))
    for k in range(20):  # the first clip comes before the first step: the rates stand in the groups alone
        (a, small), (b, large) = clipped(model, optimizer, k, 0.3), clipped(two.module, loaded, k, 0.3)
        assert abs(a - b) <= 1e-12 and large == pytest.approx(small, rel=1e-9)


def test_without_factors_it_is_that_of_torch() -> None:
    """Before a growth, after a ramp and under the other policies; the same bits."""
    model, optimizer = started(MAKE["AdamW"])
    growth = grown(model, HIDDEN)
    ramped = growth.carry(optimizer, "exact", ramp=2)
    for k in range(2):
        step(growth.module, ramped, k)
    assert "fxgrow" not in ramped.param_groups[0]
    for module, one in ((model, optimizer), (growth.module, ramped), (growth.module, growth.carry(optimizer, "copy"))):
        grads = []
        for how in (lambda m, o: clip_grad_norm_(o, 0.1), lambda m, o: nn.utils.clip_grad_norm_(m.parameters(), 0.1)):
            module.zero_grad()
            loss_of(module, 3).backward()
            norm = how(module, one)
            grads.append([norm, *(p.grad for p in module.parameters())])
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_several_optimizers_and_parameters_of_none_are_clipped_together() -> None:
    model = net()
    model.out.bias.requires_grad_(True)
    halves = [list(model.up.parameters()), [*model.emb.parameters(), *model.down.parameters(), model.out.weight]]
    small = [optim.SGD(half, lr=0.1, momentum=0.9) for half in halves]
    loss_of(model, 0).backward()
    expected = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    growth = grown(model, HIDDEN, STREAM)
    large = [growth.carry(one, "exact") for one in small]
    for p in growth.module.parameters():
        p.grad = None
    loss_of(growth.module, 0).backward()
    norm = clip_grad_norm_(large, 0.1, parameters=growth.module.get_parameter("out.bias"))
    assert float(norm) == pytest.approx(float(expected), rel=1e-12)
    with pytest.raises(fxgrow.FxgrowError, match="takes the optimizers"):
        clip_grad_norm_(growth.module.parameters(), 0.1)  # type: ignore[arg-type]


def test_sparse_gradients_and_none() -> None:
    model = net(sparse=True)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    growth = grown(model, STREAM, HIDDEN)
    carried = growth.carry(optimizer, "exact")
    loss_of(model, 0).backward()
    model.emb.weight.grad = model.emb.weight.grad.to_dense()  # type: ignore[union-attr]
    loss_of(growth.module, 0).backward()
    for module in (model, growth.module):
        module.get_parameter("out.bias").grad = None
    norms = [float(clip_grad_norm_(one, 1e-3)) for one in (optimizer, carried)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-12)
    for one in (optimizer, carried):
        one.step()
    assert float(loss_of(model, 1).detach()) == pytest.approx(float(loss_of(growth.module, 1).detach()), rel=1e-9)
    empty = optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1)
    assert float(clip_grad_norm_(empty, 1.0)) == 0.0


def test_what_is_not_finite_is_an_error_where_asked() -> None:
    model, optimizer = started(MAKE["SGD"])
    growth = grown(model, HIDDEN)
    carried = growth.carry(optimizer, "exact")
    loss_of(growth.module, 0).backward()
    growth.module.get_parameter("up.weight").grad[0, 0] = float("nan")  # type: ignore[index]
    with pytest.raises(RuntimeError, match="non-finite"):
        clip_grad_norm_(carried, 1.0, error_if_nonfinite=True)
