"""Random draws that are on in eval mode are part of the function; those of train mode are not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxgrow
from fxgrow.errors import GrowthRefused

Draw = Callable[[Tensor, bool], Tensor]


class Drawing(nn.Module):
    def __init__(self, draw: Draw) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.out = nn.Linear(5, 8), nn.Linear(8, 3)
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.draw(torch.tanh(self.up(x)), self.training))


def attention(p: float) -> Draw:
    def drawn(h: Tensor, training: bool) -> Tensor:
        heads = h.unflatten(-1, (2, 4)).transpose(1, 2)
        y = F.scaled_dot_product_attention(heads, heads, heads, dropout_p=p if p < 0.5 or training else 0.0)
        return y.transpose(1, 2).flatten(2)

    return drawn


def widened(draw: Draw, axis: str = "up.weight:0") -> nn.Module:
    x = torch.randn(2, 6, 5)
    return fxgrow.grow(Drawing(draw), {"op": "widen", "axis": axis, "factor": 2}, (x,), verify=False).module


@pytest.mark.parametrize(
    "draw",
    [
        lambda h, _: F.dropout(h, 0.5, True),
        lambda h, _: F.dropout(h.clone(), 0.5, True, inplace=True),
        lambda h, _: F.alpha_dropout(h, 0.5, True),
        lambda h, _: F.rrelu(h, 0.1, 0.3, True),
        lambda h, _: F.dropout1d(h.transpose(1, 2), 0.5, True).transpose(1, 2),
    ],
)
def test_what_is_drawn_in_eval_mode_too_does_not_grow(draw: Draw) -> None:
    with pytest.raises(GrowthRefused, match=r"test_draws.py:\d+.*draws at random in eval mode too"):
        widened(draw)


def test_attention_that_drops_in_eval_mode_grows_in_width_only() -> None:
    with pytest.raises(GrowthRefused, match="drops weights at random in eval mode too"):
        widened(attention(0.3), "./heads")
    small, grown = Drawing(attention(0.3)).eval(), widened(attention(0.3), "./head_dim").eval()
    x = torch.randn(2, 6, 5)
    torch.manual_seed(1)
    wanted = small(x)
    torch.manual_seed(1)
    assert torch.allclose(wanted, grown(x), atol=1e-5)


@pytest.mark.parametrize(
    ("draw", "axis"),
    [
        (lambda h, training: F.dropout(h, 0.5, training), "up.weight:0"),
        (lambda h, training: F.dropout(h, 0.5, True) if training else h * 1.0, "up.weight:0"),  # a graph for each mode
        (lambda h, _: F.dropout(h, 0.0, True), "up.weight:0"),
        (lambda h, _: F.dropout1d(h, 0.5, True).detach() * 0 + h, "up.weight:0"),  # draws for positions, not for units
        (attention(0.6), "./heads"),
    ],
)
def test_draws_of_train_mode_or_beside_the_axis_grow(draw: Draw, axis: str) -> None:
    small, grown = Drawing(draw).eval(), widened(draw, axis).eval()
    x = torch.randn(3, 4, 5)
    assert torch.allclose(small(x), grown(x), atol=1e-5)
