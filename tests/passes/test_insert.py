"""``insert`` after values that an identity matrix does not keep."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxgrow
from fxgrow.errors import GrowthRefused


class Mask(nn.Module):
    def __init__(self, fill: float, style: str) -> None:
        super().__init__()
        self.fill, self.style = fill, style

    def forward(self, x: Tensor) -> Tensor:
        if self.style == "masked_fill":
            return x.masked_fill(x < -0.5, self.fill)
        if self.style == "where":
            return torch.where(x < -0.5, self.fill, x)
        return x + torch.zeros_like(x).masked_fill(x < -0.5, self.fill)


def model(style: str, fill: float = -torch.inf) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), Mask(fill, style), nn.Softmax(-1), nn.Linear(6, 3)).double().eval()


def insert(fill: float, style: str, after: str = "1") -> fxgrow.Growth:
    x = torch.randn(5, 6, dtype=torch.float64)
    return fxgrow.grow(model(style, fill), {"op": "insert", "layer": "linear", "after": after}, (x,), verify=False)


@pytest.mark.parametrize("style", ["masked_fill", "where", "added"])
def test_infinities_are_not_multiplied_by_zeros(style: str) -> None:
    with pytest.raises(GrowthRefused, match="puts infinities into its output"):
        insert(-torch.inf, style)
    assert insert(-1e9, style).module is not None


@pytest.mark.parametrize("after", ["0", "2"])
def test_before_and_behind_a_mask_it_is_exact(after: str) -> None:
    growth, x = insert(-torch.inf, "masked_fill", after), torch.randn(7, 6, dtype=torch.float64)
    torch.testing.assert_close(growth.module(x), model("masked_fill")(x), rtol=0, atol=1e-12)
