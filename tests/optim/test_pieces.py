"""Steps in pieces: each entry moves at its rate, none that has no step, and no hook is left."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn, optim

import fxgrow
from fxgrow.optim import pieces, slice_rates
from fxgrow.optim.rates import all_rates, write_rates
from fxgrow.optim.slices import Slice, SliceRates
from tests.optim.nets import VARIANTS, sized
from tests.optim.nets import grown as grown_anew
from tests.optim.test_rates import HIDDEN, STREAM, apart, grown, loss_of, started, step

LINEAR: dict[str, Callable[[Any], optim.Optimizer]] = {
    "Adadelta": lambda p: optim.Adadelta(p, lr=1.0, weight_decay=0.01),
    "Adagrad": lambda p: optim.Adagrad(p, lr=1e-2, lr_decay=0.1),
    "Adam": lambda p: optim.Adam(p, lr=1e-2, weight_decay=0.1, amsgrad=True, foreach=False),
    "AdamW fused": lambda p: optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True, maximize=True),
    "AdamW foreach": lambda p: optim.AdamW(p, lr=1e-2, weight_decay=0.1, foreach=True),
    "Adamax": lambda p: optim.Adamax(p, lr=torch.tensor(1e-2, dtype=torch.float64)),
    "NAdam": lambda p: optim.NAdam(p, lr=1e-2, weight_decay=0.1, decoupled_weight_decay=True),
    "RAdam": lambda p: optim.RAdam(p, lr=1e-2),
    "RMSprop": lambda p: optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True, weight_decay=0.1),
    "SGD": lambda p: optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.05, nesterov=True),
    "SGD fused": lambda p: optim.SGD(p, lr=1e-2, fused=True),
}


@pytest.mark.parametrize("name", LINEAR)
def test_newborn_entries_move_by_their_rate_and_old_ones_as_without(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a plain step of the same optimizer: its movement, times the rate where newborn."""
    monkeypatch.setattr(pieces, "CHUNK", 40)
    monkeypatch.setattr(pieces, "VECTOR", 1)  # in so small a model, whole tensors would be one piece
    model, optimizer = started(LINEAR[name])
    growth = grown(model, HIDDEN, STREAM)
    carried = growth.carry(optimizer, "asymmetric", warmup=10, peak=1.5)
    for k in range(3):
        step(growth.module, carried, k)
    plain_module, plain = copy.deepcopy((growth.module, carried))
    for group in plain.param_groups:
        del group["fxgrow"], group["fxgrow_steps"]
    rates = slice_rates(carried)
    assert rates is not None and rates.newborn_rate not in (0.0, 1.0)
    rate, before = rates.newborn_rate, copy.deepcopy(dict(growth.module.named_parameters()))
    step(growth.module, carried, 5)
    step(plain_module, plain, 5)
    seen = 0
    for n, p in growth.module.named_parameters():
        newborn = torch.zeros_like(p, dtype=torch.bool)
        for i, d in enumerate(growth.plan.tensors[n].dims):
            if d is not None:
                shape = [1] * p.dim()
                shape[i] = -1
                newborn |= torch.from_numpy(d.newborn).view(shape)
        other = plain_module.get_parameter(n)
        # not to the bit, as pieces end within vectors; the next test is about those that do not
        torch.testing.assert_close(p[~newborn], other[~newborn], rtol=1e-14, atol=1e-15)
        torch.testing.assert_close((p - before[n])[newborn], rate * (other - before[n])[newborn], rtol=1e-9, atol=1e-15)
        for key, value in carried.state[p].items():
            torch.testing.assert_close(value, plain.state[other][key], rtol=1e-13, atol=1e-15)
        seen += int(newborn.sum())
    assert seen


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["AdamW fused", "SGD"])
def test_old_entries_step_as_without_rates_to_the_bit(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever old rows end, with new rows before them, and in chunks; the gradients are the same numbers."""
    monkeypatch.setattr(pieces, "CHUNK", 1000)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for rows, columns, first, last, side in [
            (17, 7, 5, 17, 7),
            (300, 3, 41, 290, 3),
            (257, 30, 100, 257, 9),
            (50, 30, 0, 0, 9),
            (640, 1, 300, 640, 1),
        ]:
            torch.manual_seed(rows)
            p = nn.Parameter(torch.randn(rows, columns, dtype=dtype))
            p.grad = torch.randn_like(p)
            one = LINEAR[name]([p])
            one.step()
            q, plain = copy.deepcopy((p, one))
            new_rows, new_columns = np.arange(rows), np.arange(columns) >= side
            slices = Slice(newborn=[(new_rows >= first) & (new_rows < last), new_columns])
            rates = SliceRates(warmup=10**6, peak=1.3)
            rates.slices["p"] = slices
            write_rates(one, [rates], {id(p): "p"})
            old = torch.from_numpy(~slices.newborn[0][:, None] & ~new_columns)
            start = p.detach().clone()
            for _ in range(3):
                p.grad = torch.randn_like(p)
                q.grad = p.grad.clone()
                one.step()
                plain.step()
            assert torch.equal(p[old], q[old]), (rows, columns)
            moved = (p - start)[~old].abs().sum() / (q - start)[~old].abs().sum()
            assert moved < 0.01, "newborn entries move by their rate"
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", LINEAR)
def test_exact_in_chunks_follows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "CHUNK", 40)
    monkeypatch.setattr(pieces, "VECTOR", 1)
    model, optimizer = started(LINEAR[name])
    growth = grown(model, HIDDEN, {**STREAM, "factor": 3})
    carried = growth.carry(optimizer, "exact")
    assert apart(model, optimizer, growth.module, carried, steps=8) <= 1e-13


@pytest.mark.parametrize("policy", ["exact", "asymmetric"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("fused", [True, False])
def test_what_takes_no_step_keeps_its_bits(policy: str, dtype: torch.dtype, fused: bool) -> None:
    """Parameters without a gradient, and entries whose gradient and state are zero."""
    model, optimizer = started(lambda p: optim.AdamW(p, lr=0.01, weight_decay=0.0, eps=1e-3, fused=fused), dtype=dtype)
    for state in optimizer.state.values():
        state["exp_avg"].zero_()
    growth = grown(model, HIDDEN, {**STREAM, "factor": 3})
    carried = growth.carry(optimizer, policy, **({"warmup": 5} if policy == "asymmetric" else {}))
    before = copy.deepcopy(growth.module.state_dict())
    for _ in range(3):
        for n, p in growth.module.named_parameters():
            p.grad = None if n.startswith("out") else torch.zeros_like(p)
        carried.step()
    assert all(torch.equal(v, before[k]) for k, v in growth.module.state_dict().items())


def test_after_the_warm_up_no_hook_is_left_and_groups_are_as_they_were() -> None:
    model, optimizer = started(LINEAR["AdamW fused"])
    growth = grown(model, HIDDEN)
    carried = growth.carry(optimizer, "asymmetric", warmup=2)
    groups = carried.param_groups
    for k in range(3):
        step(growth.module, carried, k)
        assert carried.param_groups is groups
    assert not carried._optimizer_step_pre_hooks and not carried._optimizer_step_post_hooks
    assert not all_rates(carried) and set(groups[0]) == set(optimizer.param_groups[0])


def test_a_step_that_raises_leaves_everything_as_it_was() -> None:
    model, optimizer = started(LINEAR["AdamW fused"])
    growth = grown(model, HIDDEN, {**STREAM, "factor": 3})
    carried = growth.carry(optimizer, "exact")
    before, groups = copy.deepcopy(growth.module.state_dict()), carried.param_groups
    betas = groups[0].pop("betas")
    with pytest.raises(KeyError):
        step(growth.module, carried, 0)
    groups[0]["betas"] = betas
    assert carried.param_groups is groups
    assert all(torch.equal(v, before[k]) for k, v in growth.module.state_dict().items())


def test_parameters_that_are_no_plain_matrices() -> None:
    """0-dim and transposed ones, and an empty group."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)
            self.gain = nn.Parameter(torch.tensor(1.5))
            self.up.weight = nn.Parameter(self.up.weight.detach().t().contiguous().t())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(torch.tanh(self.up(x))) * self.gain

    torch.manual_seed(0)
    model = Odd().double()
    optimizer = optim.AdamW([{"params": list(model.parameters())}, {"params": []}], lr=1e-2)
    x = torch.randn(5, 4).double()

    def one(module: nn.Module, opt: optim.Optimizer) -> float:
        opt.zero_grad()
        loss = module(x).square().mean()
        loss.backward()
        opt.step()
        return float(loss.detach())

    one(model, optimizer)
    growth = fxgrow.grow(model, {"op": "widen", "axis": "up.weight:0", "factor": 3}, (x,), verify=False)
    carried = growth.carry(optimizer, "exact")
    for _ in range(8):
        assert abs(one(model, optimizer) - one(growth.module, carried)) <= 1e-13


@pytest.mark.parametrize(
    "how", [{}, {"amsgrad": True}, {"maximize": True}, {"lr": torch.tensor(1e-2, dtype=torch.float64)}]
)
def test_the_kernel_called_part_by_part_is_the_optimizers_own(how: dict[str, Any]) -> None:
    """Fused against a loop over tensors, while columns warm up, with a gradient scaler whose third step is skipped."""
    runs = []
    for way in ({"fused": True}, {"foreach": False}):
        model, optimizer = started(lambda p, way=way: optim.AdamW(p, **{"lr": 1e-2, "weight_decay": 0.1, **how, **way}))
        growth = grown(model, HIDDEN, STREAM)
        growth.carry_(optimizer, "asymmetric", warmup=7, peak=1.5)
        runs.append((growth.module, optimizer, torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2)))
    (fused, by_kernel, _), (loop, plain, _) = runs
    for k in range(9):
        for module, optimizer, scaler in runs:
            optimizer.zero_grad()
            scaler.scale(loss_of(module, k)).backward()
            if k == 2:
                next(module.parameters()).grad.view(-1)[0] = torch.inf  # type: ignore[union-attr]
            scaler.step(optimizer)
            scaler.update()
        for p, q in zip(fused.parameters(), loop.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)
            torch.testing.assert_close(by_kernel.state[p], plain.state[q], rtol=1e-12, atol=1e-13)
        assert [r.steps for r in all_rates(by_kernel)] == [r.steps for r in all_rates(plain)]
    assert by_kernel.state[next(fused.parameters())]["step"] == 12 and not all_rates(by_kernel)


@pytest.mark.parametrize(("fused", "loop"), [("AdamW fused", "AdamW"), ("SGD fused", "SGD")])
def test_a_growth_over_an_unfinished_warm_up(fused: str, loop: str) -> None:
    """Where two warm-ups are in force a parameter steps as a whole: fused as by a loop, and to the end of both."""
    runs = []
    for name in (fused, loop):
        model: nn.Module = sized()
        optimizer = VARIANTS[name](model.parameters())
        losses = []
        for k in range(14):
            if k in (2, 5):
                growth = grown_anew(model, *((HIDDEN, STREAM) if k == 2 else ({**HIDDEN, "factor": 2},)))
                growth.carry_(optimizer, "asymmetric", warmup=6)
                model = growth.module
            losses.append(step(model, optimizer, k))
        runs.append(losses)
        assert not all_rates(optimizer)
    assert runs[0] == pytest.approx(runs[1], abs=1e-12)


def test_newborn_entries_that_repeat_are_one_view() -> None:
    """Entries of every head, say; each newborn entry is in one view, whatever the masks are."""
    random = np.random.default_rng(0)
    for rows, columns, most in [
        (np.arange(24) % 6 >= 4, None, 1),
        (None, np.arange(30) % 2 == 1, 1),
        (np.arange(12) % 4 < 1, np.arange(15) % 5 >= 3, 2),
        (np.arange(7) % 3 == 0, np.arange(8) >= 3, 7),
        *((random.random(9) < 0.4, random.random(8) < 0.5, 72) for _ in range(20)),
    ]:
        shape = (9 if rows is None else len(rows), 9 if columns is None else len(columns), 2)
        seen = torch.zeros(shape)
        blocks = list(pieces.newborn_blocks(seen, [rows, columns, None], 0))
        for block in blocks:
            block.add_(1)
        old = np.ones(shape[:2], dtype=bool)
        for mask, view in ((rows, (-1, 1)), (columns, (1, -1))):
            if mask is not None:
                old &= ~mask.reshape(view)
        assert torch.equal(seen, torch.from_numpy(~old)[..., None].expand(shape).float())
        assert len(blocks) <= most
