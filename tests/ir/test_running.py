"""A run in eval mode leaves the module and its inputs as they were."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fxgrow.ir.running import in_mode, run_eval


class Writes(nn.Module):
    """Writes into its input."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.frozen = nn.Dropout(0.5), nn.BatchNorm1d(3)
        self.frozen.eval()

    def forward(self, x: Tensor, *, more: dict[str, Tensor]) -> Tensor:
        return self.drop(self.frozen(x.add_(1))) + more["y"]


def test_run_eval() -> None:
    model, x, y = Writes(), torch.zeros(2, 3, requires_grad=True), torch.ones(2, 3)
    out = run_eval(model, [x], {"more": {"y": y}})
    assert not out.requires_grad and not x.any() and torch.allclose(out, torch.full((2, 3), 2.0), atol=1e-4)
    assert model.training and model.drop.training and not model.frozen.training


def test_in_mode_leaves_what_is_frozen() -> None:
    model = Writes()
    with in_mode(model, True):
        assert not model.frozen.training
    model.eval()
    with in_mode(model, True):
        assert model.frozen.training
    assert not any(m.training for m in model.modules())
