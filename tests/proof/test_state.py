"""State that a forward writes: what is assumed of a buffer when a call begins holds when it ends, call after call.

Models are compared over several calls in train and in eval mode, in float64 and without the receipt.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxgrow
from fxgrow.errors import GrowthRefused
from tests.models import trained


def r(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Model(nn.Module):
    """``up`` makes 8 hidden units of 5 inputs, ``out`` and ``w`` read them; members that are tensors are buffers."""

    def __init__(self, f: Callable[[Any, Tensor], Tensor], members: dict[str, Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.out = nn.Linear(5, 8), nn.Linear(8, 3)
        self.w = nn.Parameter(4 * torch.randn(3, 8))
        self.f = f
        for name, value in members.items():
            if isinstance(value, Tensor):
                self.register_buffer(name, value.clone())
            else:
                setattr(self, name, copy.deepcopy(value))

    def forward(self, x: Tensor) -> Tensor:
        return self.f(self, x)


def worst(old: nn.Module, new: nn.Module, calls: int = 2) -> float:
    """Largest difference of outputs over several calls, in train mode and then in eval mode."""
    old, error = copy.deepcopy(old), 0.0
    for training in (True, False):
        old.train(training)
        new.train(training)
        for call in range(calls):
            for batch in (4, 7):
                x = r(batch, 5, seed=10 * call + batch)
                a, b = old(x.clone()), new(x.clone())
                assert a.shape == b.shape
                assert bool(a.isfinite().all() and b.isfinite().all())
                error = max(error, float((a - b).detach().abs().max()))
    return error


def grown(f: Callable[[Any, Tensor], Tensor], members: dict[str, Any], **how: Any) -> tuple[nn.Module, fxgrow.Growth]:
    model = trained(Model(f, members).double())
    spec = [{"op": "widen", "axis": "up.weight:0", **how}]
    return model, fxgrow.grow(model, spec, (r(4, 5),), verify=False)


def hebbian(s: Any, x: Tensor) -> Tensor:
    h = s.up(x)
    z = F.linear(h, s.m.clone())
    s.m.copy_((0.9 * s.m + 0.1 * z.mean(0)[:, None] * h.mean(0)).detach())
    return z


def average(s: Any, x: Tensor) -> Tensor:
    h = torch.tanh(s.up(x))
    s.m.mul_(0.9)
    s.m.add_(0.1 * h.mean(0).detach())
    return s.out(h - s.m)


def assigned(s: Any, x: Tensor) -> Tensor:
    h = s.up(x)
    s.m = (0.9 * s.m + 0.1 * h.mean(0)).detach()
    return s.out(h - s.m)


def momentum_encoder(s: Any, x: Tensor) -> Tensor:
    h = s.up(x)
    s.m.mul_(0.9).add_(s.w.detach(), alpha=0.1)
    return F.linear(h, s.w) + F.linear(h, s.m)


def codebook(s: Any, x: Tensor) -> Tensor:
    h = s.up(x)
    nearest = (h[:, :, None] - s.m).pow(2).sum(1).argmin(-1)
    chosen = F.one_hot(nearest, 6).to(h.dtype)
    s.count.mul_(0.9).add_(chosen.sum(0), alpha=0.1)
    s.m.mul_(0.9)
    s.m.add_(h.t().detach() @ chosen, alpha=0.1)
    return s.out(h + (F.embedding(nearest, s.m.t()) - h).detach())


def memory_of_fixed_size(s: Any, x: Tensor) -> Tensor:
    h = s.up(x)
    s.m[1:].copy_(s.m[:-1].clone())
    s.m[0].copy_(h[0].detach())
    return s.out((h @ s.m.t()).softmax(-1) @ s.m)


def spectral(s: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        v = F.normalize(torch.mv(s.w.t(), s.u), dim=0)
        s.v.copy_(v)
        s.u.copy_(F.normalize(torch.mv(s.w, v), dim=0))
    return F.linear(s.up(x), s.w / torch.dot(s.u, torch.mv(s.w, s.v)))


def swapped(s: Any, x: Tensor) -> Tensor:
    h = s.up(x)
    before = s.m.clone()
    s.m.copy_(s.v)
    s.v.copy_(before + h.mean(0).detach())
    return s.out(h * s.m + s.v)


def only_in_training(s: Any, x: Tensor) -> Tensor:
    h = s.up(x)
    if s.training:
        s.m.mul_(0.9).add_(h.mean(0).detach(), alpha=0.1)
    return s.out(F.rms_norm(h - s.m, (h.shape[-1],)))


def reads_running_statistics(s: Any, x: Tensor) -> Tensor:
    z = F.linear(s.up(x), s.w * s.norm.running_mean)
    return s.out(torch.relu(s.norm(s.up(x)))) + z


M1, M3, M6 = {"m": r(8)}, {"m": r(3, 8)}, {"m": r(8, 6), "count": r(6).abs() + 1}
CASES: dict[str, tuple[Callable[[Any, Tensor], Tensor], dict[str, Any]]] = {
    "hebbian": (hebbian, M3),
    "average": (average, M1),
    "assigned": (assigned, M1),
    "momentum encoder": (momentum_encoder, M3),
    "codebook": (codebook, M6),
    "memory of fixed size": (memory_of_fixed_size, {"m": r(6, 8)}),
    "swapped": (swapped, {"m": r(8), "v": r(8, seed=1)}),
    "only in training": (only_in_training, M1),
    "running statistics": (reads_running_statistics, {"norm": nn.BatchNorm1d(8)}),
}


@pytest.mark.parametrize("how", [{"by": 5}, {"factor": 2}, {"by": 4, "fill": "add"}], ids=str)
@pytest.mark.parametrize("name", list(CASES))
def test_the_second_and_third_call_agree_too(name: str, how: dict[str, Any]) -> None:
    model, growth = grown(*CASES[name], **how)
    assert worst(model, growth.module) < 1e-12


def test_copies_of_spectral_vectors() -> None:
    model, growth = grown(spectral, {"u": r(3), "v": r(8)}, factor=2)
    assert worst(model, growth.module) < 1e-12


def test_what_is_written_takes_no_shares() -> None:
    _, growth = grown(momentum_encoder, M3, factor=2)
    plan = growth.plan.tensors["m"].dims[1]
    assert plan is not None
    assert plan.split is None


def needs_zeros_in_eval(s: Any, x: Tensor) -> Tensor:
    h = s.up(x)
    if s.training:
        s.m.mul_(0.9).add_(h.exp().mean(0).detach(), alpha=0.1)
        return s.out(h - s.m)
    return s.out(F.rms_norm(h + s.m, (h.shape[-1],)))


def test_what_eval_needs_and_train_does_not_leave_behind_is_refused() -> None:
    with pytest.raises(GrowthRefused, match=r"writes into m\b.*next call"):
        grown(needs_zeros_in_eval, M1, by=4, fill="add")
    model, growth = grown(needs_zeros_in_eval, M1, factor=2)
    assert worst(model, growth.module) < 1e-12


class Ways(nn.Module):
    """One call writes a buffer, another one reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.out = nn.Linear(5, 8), nn.Linear(8, 3)
        self.register_buffer("m", r(3, 8))

    def forward(self, x: Tensor, learn: bool = False) -> Tensor:
        h = self.up(x)
        if learn:
            self.m.mul_(0.9).add_(self.out(h).mean(0)[:, None].detach() * h.mean(0).detach())
            return self.out(h)
        return F.linear(h, self.m)


@pytest.mark.parametrize("how", [{"by": 5}, {"factor": 2}, {"by": 4, "fill": "add"}], ids=str)
def test_state_passes_from_one_call_to_another(how: dict[str, Any]) -> None:
    model = trained(Ways().double())
    calls = {"read": (r(4, 5),), "learn": (r(4, 5), True)}
    growth = fxgrow.grow(model, [{"op": "widen", "axis": "up.weight:0", **how}], calls=calls, verify=False)
    for number in range(3):
        x = r(6, 5, seed=number)
        for learn in (False, True, False):
            assert float((model(x, learn) - growth.module(x, learn)).detach().abs().max()) < 1e-12


def blocks_of_memory(s: Any, x: Tensor) -> Tensor:
    """Entries of memory that begins as zeros are written one by one."""
    h = s.up(x)
    both = torch.zeros(x.shape[0], 3, h.shape[-1], dtype=x.dtype)
    both[:, 0] = h
    both[:, 1] = torch.tanh(h)
    return s.out(F.rms_norm(both.sum(1), (h.shape[-1],)))


def seen_through_a_view(s: Any, x: Tensor) -> Tensor:
    """A view made before the write is used after it."""
    h = s.up(x)
    rows = h.view(-1, 2, h.shape[-1])
    h.add_(torch.sigmoid(h))
    return s.out(F.rms_norm(rows, (h.shape[-1],))).flatten(0, 1)


def test_writes_into_parts_of_memory() -> None:
    for how in ({"by": 5}, {"by": 4, "fill": "add"}, {"factor": 2}):
        model, growth = grown(blocks_of_memory, {}, **how)
        assert worst(model, growth.module) < 1e-12


def test_a_view_made_before_a_write_holds_what_was_written() -> None:
    class Even(Model):
        def forward(self, x: Tensor) -> Tensor:
            return self.f(self, torch.cat([x, x]))

    model = trained(Even(seen_through_a_view, {}).double())

    def grow(**how: Any) -> fxgrow.Growth:
        return fxgrow.grow(model, [{"op": "widen", "axis": "up.weight:0", **how}], (r(4, 5),), verify=False)

    assert worst(model, grow(factor=2).module) < 1e-12
    with pytest.raises(GrowthRefused, match="rms_norm"):
        grow(by=4, fill="add")  # sigmoid(0) is not zero, and the view holds it
