"""Blocks that are copied and numbered anew, while their sizes grow too."""

from __future__ import annotations

import torch
from torch import nn

import fxgrow


class Block(nn.Module):
    """``groups`` is a width that PyTorch's layer reads by itself: no line of the class names it."""

    def __init__(self, n: int, wide: int) -> None:
        super().__init__()
        self.expand, self.project = nn.Conv1d(n, wide, 1), nn.Conv1d(wide, n, 1)
        self.depthwise = nn.Conv1d(wide, wide, 3, padding=1, groups=wide)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.project(torch.tanh(self.depthwise(self.expand(x))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv1d(2, 4, 1), nn.Linear(4, 3)
        self.blocks = nn.ModuleList(Block(4, 6) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(-1))


def test_numbers_are_set_in_blocks_that_moved_and_in_their_copies() -> None:
    torch.manual_seed(0)
    model, x = Net().double(), torch.randn(2, 2, 7, dtype=torch.float64)
    before = model(x)
    spec = [
        {"op": "widen", "axis": "blocks.*/channels", "factor": 1.5, "fill": "add"},
        {"op": "deepen", "stack": "blocks", "by": 2},
    ]
    fxgrow.grow(model, spec, (x,), verify=False).apply_(model)
    assert [m.get_submodule("depthwise").groups for m in model.blocks] == [9] * 5
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)
