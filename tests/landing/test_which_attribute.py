"""Which attribute a number comes from, where several hold it: by names, by the line that raises, by what is near."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxgrow
from tests.models import relative_error, trained

D = torch.float64


def landed(model: nn.Module, spec: Any, args: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> nn.Module:
    """The model grown in place, which computes what it did."""
    torch.manual_seed(0)
    trained(model.to(D))
    before = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fxgrow.grow(model, spec, args, verify=False).apply_(model)
    assert relative_error(before, model, other) <= 1e-12
    return model


def test_an_attribute_of_the_arguments_name_comes_first() -> None:
    """The groups of a convolution, as many as its stride and its padding are."""
    depthwise = nn.Conv2d(2, 2, 5, stride=2, padding=2, groups=2)
    model = nn.Sequential(nn.Conv2d(3, 2, 1), depthwise, nn.ReLU(), nn.Conv2d(2, 3, 1))
    x, other = torch.randn(2, 3, 8, 8, dtype=D), torch.randn(3, 3, 9, 7, dtype=D)
    landed(model, {"op": "widen", "axis": "0.weight:0", "factor": 2}, (x,), (other,))
    assert (depthwise.groups, depthwise.stride, depthwise.padding) == (4, (2, 2), (2, 2))


class Patches(nn.Module):
    """As vision transformers are: sizes read in a method of the model's, and another attribute of the same number."""

    def __init__(self, width: int = 8, heads: int = 2, patch: int = 8) -> None:
        super().__init__()
        self.patch, self.size, self.width = patch, 16, width
        self.cut = nn.Conv2d(3, width, patch, patch)
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.head = nn.Linear(width, 3)

    def cut_up(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        if h != self.size or w != self.size:
            raise ValueError(f"images of {self.size} × {self.size} only")
        rows, columns = h // self.patch, w // self.patch
        x = self.cut(x)
        x = x.reshape(n, self.width, rows * columns)
        return x.permute(0, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.cut_up(x)
        y = self.norm(x)
        y, _ = self.attention(y, y, y, need_weights=False)
        return self.head((x + y).mean(1))


@pytest.mark.parametrize("roles", [("residual", "heads"), ("residual", "head_dim")])
def test_the_line_that_raises_names_the_attribute(roles: tuple[str, ...]) -> None:
    spec = [{"op": "widen", "axis": f"*/{role}", "factor": 2} for role in roles]
    x, other = torch.randn(2, 3, 16, 16, dtype=D), torch.randn(3, 3, 16, 16, dtype=D)
    model: Any = landed(Patches(), spec, (x,), (other,))
    assert (model.width, model.patch, model.size) == (16, 8, 16)
    assert model.attention.num_heads == (4 if "heads" in roles else 2) and model.attention.embed_dim == 16


class Inner(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.parts = heads
        self.mix, self.back = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.mix(x).unflatten(-1, (self.parts, -1)).softmax(-1)
        return self.back(y.flatten(-2))


class Far(nn.Module):
    """The model itself reads another number that is the same, and that stays."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = 2
        self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 3)
        self.blocks = nn.ModuleList([nn.ModuleList([Inner(8, 2)]) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(self.steps):
            for block in self.blocks:
                x = x + block[0](x)
        return self.last(x)


def test_what_is_near_comes_before_what_is_far() -> None:
    x, other = torch.randn(4, 5, dtype=D), torch.randn(3, 5, dtype=D)
    program = fxgrow.capture(Far().to(D), (x,))
    axis = next(a.name for a in program.axes if a.size == 2 and a.growable)
    model: Any = landed(Far(), {"op": "widen", "axis": axis.replace("0.0", "*"), "factor": 2}, (x,), (other,))
    assert model.steps == 2
