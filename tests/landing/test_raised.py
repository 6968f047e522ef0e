"""Sizes that a forward holds its inputs against, else it raises: no graph has the number, and the class has to."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import fxgrow
from tests.models import trained

D = torch.float64


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.width, self.inner = 6, 8
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[-1] == self.width, "another width"
        h = self.up(x).tanh()
        self.check(h)
        return x + self.down(h)

    def check(self, h: Tensor) -> None:
        if h.dim() != 2 or h.shape[-1] != self.inner:
            raise ValueError(f"{self.inner} are wanted")


class Strict(nn.Module):
    """Three conditions, of which each hides the next; the model's attributes hold other numbers as well."""

    def __init__(self, known: int | None = None) -> None:
        super().__init__()
        self.d_model, self.known, self.other = 6, known, 6
        self.first, self.part, self.last = nn.Linear(5, 6), Part(), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if x.size(-1) != self.d_model:
            raise RuntimeError("the last size has to be d_model")
        if self.known is not None and x.size(-1) != _KNOWN:
            raise RuntimeError("it is known to be another")
        return self.last(self.part(x))


_KNOWN = 6


@pytest.mark.parametrize("axes", [["./residual"], ["part/hidden"], ["./residual", "part/hidden"]])
def test_conditions_are_held(axes: list[str]) -> None:
    torch.manual_seed(0)
    model, x = trained(Strict().to(D)), torch.randn(4, 5, dtype=D)
    before = copy.deepcopy(model)
    growth = fxgrow.grow(model, [{"op": "widen", "axis": a, "factor": 2} for a in axes], (x,))
    growth.apply_(model)
    grown = "./residual" in axes, "part/hidden" in axes
    assert (model.d_model, model.part.width) == ((12, 12) if grown[0] else (6, 6))
    assert (model.part.inner, model.other) == (16 if grown[1] else 8, 6)
    torch.testing.assert_close(model(x), before(x), rtol=0, atol=1e-12)


def test_a_condition_on_a_number_of_no_attribute_is_refused() -> None:
    torch.manual_seed(0)
    model, x = trained(Strict(known=1).to(D)), torch.randn(4, 5, dtype=D)
    growth = fxgrow.grow(model, {"op": "widen", "axis": "./residual", "factor": 2}, (x,))
    held = [(m, dict(vars(m))) for m in model.modules()]
    with pytest.raises(fxgrow.GrowthRefused, match="Strict itself raises"):
        growth.apply_(model)
    assert all(vars(m)[k] is v for m, own in held for k, v in own.items())
    model(x).sum().backward()
