"""A stored state is taken where it is that of the optimizer, and refused where its tensors have other shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fxgrow.training.optimizer_state import check_optimizer_state


def stepped(kind: Any) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """An optimizer after a step, and a fresh one of its kind, over parameters of one to three dims."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Conv1d(4, 2, 3))
    optimizer = kind(model.parameters(), lr=0.1)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer, kind(model.parameters(), lr=0.1)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adafactor, torch.optim.NAdam, torch.optim.Rprop])
def test_its_own_state_is_taken(kind: Any) -> None:
    optimizer, fresh = stepped(kind)
    check_optimizer_state(optimizer.state_dict(), fresh)


@pytest.mark.parametrize(
    ("kind", "key", "shape"),
    [
        (torch.optim.AdamW, "exp_avg", [1]),
        (torch.optim.AdamW, "exp_avg", [3, 4]),
        (torch.optim.AdamW, "step", [3]),
        (torch.optim.Adafactor, "row_var", [4, 3]),
    ],
)
def test_another_shape_is_refused(kind: Any, key: str, shape: list[int]) -> None:
    optimizer, fresh = stepped(kind)
    state = optimizer.state_dict()
    state["state"][0][key] = torch.zeros(shape)
    with pytest.raises(ValueError, match=f"{key} of parameter 0 is"):
        check_optimizer_state(state, fresh)
