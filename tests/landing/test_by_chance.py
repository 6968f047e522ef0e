"""Attributes that hold an old size by chance, or for methods that no example runs; tensors held in other places."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxgrow
from tests.models import trained

D = torch.float64


class Window(nn.Module):
    """Attention with as many heads as a window has places."""

    def __init__(self) -> None:
        super().__init__()
        self.window = self.heads = 4
        self.width = 6
        self.up, self.down = nn.Linear(5, 24), nn.Linear(24, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, _ = x.shape
        y = self.up(x)
        y = y.view(b, t, self.window if t > 99 else self.heads, self.width).transpose(1, 2)
        return self.down(F.scaled_dot_product_attention(y, y, y).transpose(1, 2).reshape(b, t, -1))

    def last(self, x: torch.Tensor) -> torch.Tensor:
        return self(x[:, -self.window :])


def test_a_number_that_no_call_reads_stays_and_is_told_of() -> None:
    torch.manual_seed(0)
    model = trained(Window().to(D))
    before, x = copy.deepcopy(model), torch.randn(3, 7, 5, dtype=D)
    growth = fxgrow.grow(model, {"op": "widen", "axis": "*/heads", "factor": 2}, (x,))
    with pytest.warns(UserWarning, match=r"Window\.window is 4, .* set it to 8"):
        growth.apply_(model)
    assert (model.heads, model.window) == (8, 4)
    for old, new in ((before(x), model(x)), (before.last(x), model.last(x))):
        torch.testing.assert_close(new, old, rtol=0, atol=1e-12)


class Listed(nn.Module):
    """Weights that stand in lists as well."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 8), nn.Linear(8, 3)
        self.weights = [(self.up.weight, 1.0)]
        self.named = {"down": self.down.weight}
        self.__dict__["alone"] = self.up.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x).tanh())

    def again(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(F.linear(x, self.weights[0][0], self.alone).tanh(), self.named["down"], self.down.bias)


def test_tensors_in_lists_and_plain_attributes_are_exchanged_too() -> None:
    torch.manual_seed(0)
    model = trained(Listed().to(D))
    before, x = copy.deepcopy(model), torch.randn(3, 5, dtype=D)
    fxgrow.grow(model, {"op": "widen", "axis": "up.weight:0", "factor": 2}, (x,)).apply_(model)
    assert model.weights[0][0] is model.up.weight and model.alone is model.up.bias
    assert model.named["down"] is model.down.weight
    for old, new in ((before(x), model(x)), (before(x), model.again(x))):
        torch.testing.assert_close(new, old, rtol=0, atol=1e-12)


class Dilated(nn.Module):
    """A block whose settings are the numbers of two blocks, by chance; ``place`` is its number."""

    def __init__(self, place: int) -> None:
        super().__init__()
        self.place, self.shift, self.gain = place, place, place + 1
        self.conv = nn.Conv1d(4, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x).tanh()
        return x + self.gain * (y.roll(1, -1) if self.shift == 1 else y)


class Convolved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv1d(3, 4, 1), nn.Conv1d(4, 2, 1)
        self.blocks = nn.ModuleList(Dilated(i) for i in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x)


def test_settings_that_are_numbers_of_blocks_by_chance_stay() -> None:
    torch.manual_seed(0)
    model = trained(Convolved().to(D))
    before, x = copy.deepcopy(model), torch.randn(2, 3, 7, dtype=D)
    growth = fxgrow.grow(model, {"op": "deepen", "stack": "blocks", "factor": 2}, (x,), verify=False)
    with pytest.warns(UserWarning, match=r"Dilated\.(shift|gain) is .* stays so"):
        growth.apply_(model)
    blocks = list(model.blocks)
    assert [b.place for b in blocks] == [0, 1, 2, 3]
    assert [b.shift for b in blocks] == [0, 0, 1, 1] and [b.gain for b in blocks] == [1, 1, 2, 2]
    torch.testing.assert_close(model(x), before(x), rtol=0, atol=1e-12)


class Masked(nn.Module):
    """Holds a tensor of its width that is neither parameter nor buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 8), nn.Linear(8, 3)
        self.mask = torch.linspace(0.5, 1.5, 8, dtype=D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x).tanh() * self.mask)


def test_tensors_that_are_plain_attributes_grow() -> None:
    model = trained(Masked().to(D))
    before, x = copy.deepcopy(model), torch.randn(3, 5, dtype=D)
    fxgrow.grow(model, {"op": "widen", "axis": "up.weight:0", "factor": 2}, (x,), verify=False).apply_(model)
    assert model.mask.shape == (16,)
    torch.testing.assert_close(model(x), before(x), rtol=0, atol=1e-12)
