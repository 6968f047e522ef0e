"""Blocks that are copied and numbered anew, while their sizes grow too."""

from __future__ import annotations

import copy
import pickle

import pytest
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


class Post(nn.Module):
    """A norm after the sum: no weight of a copy makes it the identity."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number, self.mix, self.norm = number, nn.Linear(4, 4), nn.LayerNorm(4)

    def forward(self, x: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        return self.norm(x + self.mix(x).tanh() + shift)


class Pairs(Post):
    """Hands on what else it knows."""

    def forward(self, x: torch.Tensor, shift: torch.Tensor) -> tuple[torch.Tensor, int]:  # type: ignore[override]
        return super().forward(x, shift), self.number


class Stack(nn.Module):
    def __init__(self, kind: type[Post], named: bool) -> None:
        super().__init__()
        self.named, self.first, self.shift = named, nn.Linear(3, 4), nn.Parameter(torch.randn(4))
        self.blocks = nn.ModuleList(kind(n) for n in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            out = block(x=x, shift=self.shift) if self.named else block(x, self.shift)
            x = out[0] if isinstance(out, tuple) else out
        return x


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("kind", [Post, Pairs])
def test_a_block_behind_a_gate(kind: type[Post], named: bool) -> None:
    """Where nothing but a gate makes a copy the identity, the class gets one, as a parameter of the copy."""
    torch.manual_seed(0)
    model, x = Stack(kind, named).double(), torch.randn(5, 3, dtype=torch.float64)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    optimizer, before = torch.optim.AdamW(model.parameters(), lr=0.1), model(x)
    growth = fxgrow.grow(model, {"op": "deepen", "stack": "blocks", "by": 1}, (x,))
    growth.apply_(model)
    growth.carry_(optimizer)
    assert torch.equal(model(x), before)
    gates = {n: p for n, p in model.named_parameters() if n.endswith(".alpha")}
    assert len(gates) == 1 and not next(iter(gates.values()))
    model(x).square().sum().backward()
    optimizer.step()
    assert all(gates.values()) and not torch.equal(model(x), before), "the gate opens"
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))
    again = model(x)
    fxgrow.grow(model, {"op": "deepen", "stack": "blocks", "by": 1}, (x,)).apply_(model)
    torch.testing.assert_close(model(x), again, rtol=0, atol=1e-12)
    assert len(model.blocks) == 4
