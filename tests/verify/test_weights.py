"""The weights that models are compared with: near those they have, and not more of them at once than needed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxgrow
import fxgrow.growth
from fxgrow.verify.weights import shake


@pytest.mark.parametrize("size", [1, 8, 70_000])
def test_other_weights(size: int) -> None:
    """Copies, near the weight: zeros and signs stay where some are not zero, else they open."""
    weight = torch.arange(size, dtype=torch.float64) + (size == 1)
    moved = shake("a.weight", weight, opens=True, moves=True)
    assert torch.equal(moved, shake("a.weight", weight.float(), opens=True, moves=True))
    assert not torch.equal(moved, shake("b.weight", weight, opens=True, moves=True))
    assert torch.equal(moved == 0, weight == 0) and not torch.equal(moved, weight)
    assert bool(((moved - weight).abs() <= 0.2 * weight).all())
    kept = shake("a.weight", weight, opens=True, moves=False)
    assert torch.equal(kept, weight) and kept.data_ptr() != weight.data_ptr()
    opened = shake("a.weight", torch.zeros(size), opens=True, moves=True)
    assert bool((opened != 0).all()) and float(opened.abs().max()) <= 0.2
    assert not bool(shake("a.weight", torch.zeros(size), opens=False, moves=True).any())


def test_streaming_holds_one_weight_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more float64 weights are alive at once than a block's largest, old and new."""
    import fxgrow.verify.weights as module

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(12))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = torch.tanh(layer(x))
            return x[:, :2]

    alive: dict[int, int] = {}
    most = 0

    def tracked(t: torch.Tensor) -> torch.Tensor:
        nonlocal most
        import weakref

        key = id(t)
        alive[key] = t.numel()
        weakref.finalize(t, alive.pop, key, None)
        most = max(most, sum(alive.values()))
        return t

    original = module.shake
    monkeypatch.setattr(module, "shake", lambda *args, **how: tracked(original(*args, **how)))
    monkeypatch.setattr(fxgrow.growth, "AUTO_FLOAT64_PARAMETERS", 10)
    fxgrow.grow(Deep(), {"op": "widen", "axis": "layers.3.weight:0", "factor": 2}, (torch.randn(3, 64),))
    assert 0 < most <= 2 * (64 * 64 + 64)
