"""What a class computes where an instance is made: a checkpoint does not hold it, and a grown config may change it."""

from __future__ import annotations

import warnings
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import fxgrow
from tests.models import trained

D = torch.float64


class Config:
    def __init__(self, form: str) -> None:
        self.dim, self.form = 8, form


class Scale:
    def __init__(self, by: float) -> None:
        self.by = by

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.by


class Scaled(nn.Module):
    """Multiplies by a number that it keeps in some form."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        by = 0.5 if config.form == "fixed" else config.dim**-0.5
        self.first, self.last = nn.Linear(5, config.dim), nn.Linear(config.dim, 3)
        self.table = {"by": by if config.form == "table" else 1.0}
        self.plain = torch.tensor(by if config.form in ("plain", "fixed") else 1.0)
        self.register_buffer("unsaved", torch.tensor(by if config.form == "unsaved" else 1.0), persistent=False)
        self.function = (lambda x: x * by) if config.form == "closure" else nn.functional.relu
        self.partial = partial(torch.mul, other=by if config.form == "partial" else 1.0)
        self.called = Scale(by if config.form == "object" else 1.0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x) * self.table["by"] * self.plain * self.unsaved
        return self.last(self.called(self.partial(self.function(x))).tanh())


@pytest.mark.parametrize("form", ["table", "plain", "unsaved", "closure", "partial", "object", "fixed"])
def test_what_a_config_makes_otherwise_is_told_of(form: str) -> None:
    torch.manual_seed(0)
    model, x = trained(Scaled(Config(form)).to(D)), torch.randn(4, 5, dtype=D)
    expected = model(x)
    growth = fxgrow.grow(model, {"op": "widen", "axis": "./hidden", "factor": 2}, (x,), verify=False)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        growth.apply_(model)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)
    assert model.config.dim == 16
    fresh = Scaled(model.config).to(D)
    fresh.load_state_dict(model.state_dict())
    assert torch.allclose(fresh(x), expected, rtol=1e-6) == (form == "fixed")
    assert [("cannot say so" in str(w.message)) for w in told] == [True] * (form != "fixed")
