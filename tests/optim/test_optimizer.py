"""Carrying an optimizer: exact trajectories, Shen's gradient oracle, groups, per-slice rates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fxgrow
from fxgrow.optim.rates import SliceRates, slice_rates
from fxgrow.weights.materialise import materialise_moment
from tests.models import small_gpt, tokens


def widen(axis: str, **how: Any) -> dict[str, Any]:
    return {"op": "widen", "axis": axis, **how}


EVERYTHING = [widen(f"*/{a}", factor=2) for a in ("hidden", "heads", "head_dim", "value_dim", "residual")]
EVEN = {
    "hidden": [widen("*/hidden", factor=2)],
    "heads": [widen("*/heads", factor=3)],
    "stream": [widen("*/residual", factor=2)],
    "hidden +5": [widen("*/hidden", by=5)],
    "hidden uneven": [widen("*/hidden", factor=2, split="uneven")],
    "everything": EVERYTHING,
}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=0.1, eps=1e-5),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.05, nesterov=True),
}


def step(model: Any, optimizer: torch.optim.Optimizer, seed: int) -> float:
    optimizer.zero_grad()
    _, loss = model(*tokens(seed))
    loss.backward()
    optimizer.step()
    return float(loss.detach())


@pytest.mark.parametrize("spec", EVEN)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_exact_policy_follows_the_small_model(kind: str, spec: str) -> None:
    model = small_gpt()
    optimizer = OPTIMIZERS[kind](model.parameters())
    for k in range(4):
        step(model, optimizer, k)
    growth = fxgrow.grow(model, EVEN[spec], tokens(), verify="native")
    carried = growth.carry(optimizer, "exact")
    steps = 50 if spec == "everything" else 12
    small = [step(model, optimizer, k) for k in range(4, 4 + steps)]
    large = [step(growth.module, carried, k) for k in range(4, 4 + steps)]
    assert max(abs(a - b) for a, b in zip(small, large, strict=True)) <= 1e-12


def test_exact_policy_over_two_growths() -> None:
    model = small_gpt()
    optimizer = OPTIMIZERS["AdamW"](model.parameters())
    step(model, optimizer, 0)
    first = fxgrow.grow(model, [widen("*/hidden", factor=2)], tokens(), verify=False)
    one = first.carry(optimizer, "exact")
    losses = [(step(model, optimizer, k), step(first.module, one, k)) for k in range(1, 4)]
    second = fxgrow.grow(
        first.module, [widen("*/hidden", factor=3), widen("*/residual", factor=2)], tokens(), verify=False
    )
    two = second.carry(one, "exact")
    losses += [(step(model, optimizer, k), step(second.module, two, k)) for k in range(4, 12)]
    assert max(abs(a - b) for a, b in losses) <= 1e-12


@pytest.mark.parametrize("spec", EVEN)
def test_gradient_oracle(spec: str) -> None:
    """With betas 0 and lr 0, Adam's moments are the gradient and its square (Shen et al. 2022)."""
    model = small_gpt()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0, betas=(0.0, 0.0))
    step(model, optimizer, 1)
    growth = fxgrow.grow(model, EVEN[spec], tokens(), verify="native")
    large = torch.optim.Adam(growth.module.parameters(), lr=0.0, betas=(0.0, 0.0))
    step(growth.module, large, 1)
    mapped = growth.carry(optimizer, "copy")
    compared = 0
    for p in growth.module.parameters():
        for key in ("exp_avg", "exp_avg_sq"):
            true, carried = large.state[p][key], mapped.state[p][key]
            assert float((true - carried).abs().max()) <= 1e-12 * max(1e-6, float(true.abs().max()))
            compared += 1
    assert compared == 2 * len(list(growth.module.parameters()))


def test_leaving_out_the_factors_is_measurably_wrong() -> None:
    """The oracle can fail: unscaled moments differ by O(1)."""
    model = small_gpt()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0, betas=(0.0, 0.0))
    step(model, optimizer, 1)
    growth = fxgrow.grow(model, EVERYTHING, tokens(), verify=False)
    large = torch.optim.Adam(growth.module.parameters(), lr=0.0, betas=(0.0, 0.0))
    step(growth.module, large, 1)
    name = "transformer.h.0.mlp.c_fc.weight"
    p = growth.module.get_parameter(name)
    old = optimizer.state[model.get_parameter(name)]["exp_avg"]
    plain = materialise_moment(growth.plan.tensors[name], old, "gradient", scale_gradients=False)
    true = large.state[p]["exp_avg"]
    assert float((true - plain).abs().max()) > 0.4 * float(true.abs().max())


def test_groups_and_hyper_parameters_are_kept() -> None:
    model = small_gpt()
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0, "lr": 5e-4}],
        lr=1e-3,
        betas=(0.8, 0.9),
    )
    step(model, optimizer, 0)
    growth = fxgrow.grow(
        model,
        [*EVERYTHING, {"op": "deepen", "stack": "transformer.h", "factor": 2, "init": "gate"}],
        tokens(),
        verify=False,
    )
    carried = growth.carry(optimizer, "asymmetric", warmup=10)
    assert type(carried) is torch.optim.AdamW
    assert [g["weight_decay"] for g in carried.param_groups] == [0.1, 0.0]
    assert [g["lr"] for g in carried.param_groups] == [1e-3, 5e-4]
    assert all(g["betas"] == (0.8, 0.9) for g in carried.param_groups)
    held = [p for g in carried.param_groups for p in g["params"]]
    assert {id(p) for p in held} == {id(p) for p in growth.module.parameters()}
    assert len(held) == len({id(p) for p in held})
    assert all(p.dim() > 1 for p in carried.param_groups[0]["params"])
    new_block = dict(growth.module.named_parameters())["transformer.h.1.mlp.c_fc.weight"]
    assert new_block not in carried.state
    before = step(growth.module, carried, 1)
    assert step(growth.module, carried, 1) < before


def test_asymmetric_keeps_old_moments_and_warms_newborn_entries() -> None:
    model = small_gpt()
    optimizer = OPTIMIZERS["AdamW"](model.parameters())
    for k in range(3):
        step(model, optimizer, k)
    growth = fxgrow.grow(model, [widen("*/hidden", factor=2, noise={"scale": 1e-3})], tokens(), verify=False)
    carried = growth.carry(optimizer, "asymmetric", warmup=20, peak=1.3)
    name = "transformer.h.0.mlp.c_proj.weight"
    p = growth.module.get_parameter(name)
    old = optimizer.state[model.get_parameter(name)]["exp_avg"]
    assert torch.equal(carried.state[p]["exp_avg"][:, :128], old)
    assert float(carried.state[p]["exp_avg"][:, 128:].abs().max()) == 0.0
    assert float(carried.state[p]["exp_avg_sq"][:, 128:].min()) >= 0.0
    assert torch.equal(carried.state[p]["exp_avg_sq"][:, 128:], carried.state[p]["exp_avg_sq"][:, :128])
    rates = slice_rates(carried)
    assert rates is not None
    seen = []
    for k in range(22):
        seen.append(rates.newborn_rate)
        before = p.detach().clone()
        step(growth.module, carried, k)
        if k == 0:
            moved = (p.detach() - before).abs()
            assert float(moved[:, 128:].mean()) < 0.3 * float(moved[:, :128].mean())
    assert seen[0] == pytest.approx(0.13)
    assert max(seen) == pytest.approx(1.3)
    assert seen[20] == seen[21] == 1.0


def test_exact_factors_can_ramp_to_one() -> None:
    model = small_gpt()
    optimizer = OPTIMIZERS["AdamW"](model.parameters())
    step(model, optimizer, 0)
    growth = fxgrow.grow(model, [widen("*/hidden", factor=2, noise={"scale": 1e-3})], tokens(), verify=False)
    carried = growth.carry(optimizer, "exact", ramp=5)
    p = growth.module.get_parameter("transformer.h.0.mlp.c_fc.weight")
    small_moment = carried.state[p]["exp_avg"].clone()
    for k in range(5):
        step(growth.module, carried, k)
    assert slice_rates(carried) is None, "nothing is left to apply"
    assert small_moment.shape == p.shape
    assert step(growth.module, carried, 9) > 0


def test_slice_rates_round_trip() -> None:
    import json

    model = small_gpt()
    optimizer = OPTIMIZERS["AdamW"](model.parameters())
    step(model, optimizer, 0)
    growth = fxgrow.grow(model, EVERYTHING, tokens(), verify=False)
    carried = growth.carry(optimizer, "exact")
    rates = slice_rates(carried)
    assert rates is not None
    state = rates.state_dict()
    again = SliceRates.from_state_dict(json.loads(json.dumps(state)))
    assert again.state_dict() == state
    assert json.loads(json.dumps(state)) == json.loads(json.dumps(again.state_dict()))


def test_reset_and_bad_input() -> None:
    model = small_gpt()
    optimizer = OPTIMIZERS["AdamW"](model.parameters())
    step(model, optimizer, 0)
    growth = fxgrow.grow(model, [widen("*/residual", to=40)], tokens(), verify=False)
    assert not growth.carry(optimizer, "reset").state
    with pytest.raises(fxgrow.FxgrowError, match=r"residual \(32 -> 40\)"):
        growth.carry(optimizer, "exact")
    with pytest.raises(fxgrow.FxgrowError, match="unknown optimizer policy"):
        growth.carry(optimizer, "exactly")
    with pytest.raises(fxgrow.FxgrowError, match="no parameter that the model had when it was grown"):
        growth.carry(torch.optim.AdamW(small_gpt().parameters()))
