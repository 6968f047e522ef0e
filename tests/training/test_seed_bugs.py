"""What went wrong in the hand-written growing trainer that this began with, each as a test of ours."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from examples.gpt.model import GPT, GPTConfig
from fxgrow.scheduler import GrowthScheduler

SMALL = GPTConfig(block_size=8, vocab_size=16, n_layer=2, n_head=2, n_embd=16)


def scheduled(*operations: dict[str, Any], **how: Any) -> GrowthScheduler:
    x = torch.randint(0, 16, (2, 8), generator=torch.Generator().manual_seed(0))
    return GrowthScheduler([{"trigger": {"step": 0}, "operations": list(operations)}], (x, x), **how)


@pytest.mark.parametrize(("value", "after"), [(2, 10), (0.5, 2), (0.01, 1), (1.9, 9)])
def test_change_grad_accum_multiplies_the_steps(value: float, after: int) -> None:
    """It cast the old number to an integer, and never multiplied it."""
    scheduler = scheduled({"op": "change_grad_accum", "value": value}, accumulation=5)
    done = scheduler.step(torch.nn.Linear(1, 1), step=0)
    assert done is not None and (done.before["accumulation"], done.after["accumulation"]) == (5, after)
    assert scheduler.accumulation == after


@pytest.mark.parametrize("operation", [{"op": "widen_mlp", "value": 2}, {"op": "stack_layers", "value": 2}])
def test_the_optimizers_state_goes_along(operation: dict[str, Any]) -> None:
    """It was looked up by identity of the parameters, which a growth makes anew: momentum and variance were lost."""
    torch.manual_seed(0)
    model = GPT(SMALL).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    x = torch.randint(0, 16, (4, 8), generator=torch.Generator().manual_seed(1))
    for _ in range(3):
        optimizer.zero_grad()
        model(x, x)[1].backward()
        optimizer.step()
    before = {n: copy.deepcopy(optimizer.state[p]) for n, p in model.named_parameters()}
    loss = model(x, x)[1]
    scheduler = scheduled(operation)
    done = scheduler.step(model, optimizer, step=0)
    assert done is not None and done.optimizer is optimizer
    torch.testing.assert_close(model(x, x)[1], loss, rtol=0, atol=1e-12)
    kept = 0
    for name, p in model.named_parameters():
        new, old = optimizer.state[p], before.get(name)
        if old is not None and old["exp_avg"].shape == p.shape and ".h.1." not in name:
            assert torch.equal(new["exp_avg"], old["exp_avg"]) and torch.equal(new["exp_avg_sq"], old["exp_avg_sq"])
            kept += 1
        elif old is not None and ".h.0." in name:  # widened: first the old entries, in the units of their gradients now
            part = tuple(slice(n) for n in old["exp_avg"].shape)
            assert any(torch.equal(new["exp_avg"][part], old["exp_avg"] * unit) for unit in (1, 0.5)), name
            kept += 1
    assert kept >= 10
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in model.parameters()}


@pytest.mark.parametrize("op", ["widen_mlp", "stack_layers"])
def test_factors_that_grow_nothing_are_refused_where_they_stand(op: str) -> None:
    """A factor of 1 or less was found out in the middle of the run."""
    with pytest.raises(ValueError, match=rf"events\.0\.operations\.0: {op}: value 1 is not a factor above 1"):
        scheduled({"op": op, "value": 1})
