"""Kinds of configs: those with slots are set, those that cannot be set are told of."""

from __future__ import annotations

import types
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxgrow
from tests.models import trained

D = torch.float64


@dataclass(frozen=True, slots=True)
class Frozen:
    dim: int = 8
    inner: int = 12


class Slots:
    __slots__ = ("dim", "inner")

    def __init__(self) -> None:
        self.dim, self.inner = 8, 12


Sealed = namedtuple("Sealed", "dim inner")


class Part(nn.Module):
    def __init__(self, config: Any, read: bool) -> None:
        super().__init__()
        self.config, self.read = config, read
        dim, inner = (config["dim"], config["inner"]) if isinstance(config, types.MappingProxyType) else _sizes(config)
        self.first, self.up = nn.Linear(5, dim), nn.Linear(dim, inner)
        self.down, self.last = nn.Linear(inner, dim), nn.Linear(dim, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.read:
            x = x.view(-1, self.config.dim)
        return self.last(x + self.down(self.up(x).tanh()))


def _sizes(config: Any) -> tuple[int, int]:
    return config.dim, config.inner


class Reads(Part):
    def __init__(self, config: Any) -> None:
        super().__init__(config, read=True)


class Builds(Part):
    def __init__(self, config: Any) -> None:
        super().__init__(config, read=False)


def _grown(model: nn.Module, x: Tensor) -> fxgrow.Growth:
    spec = [{"op": "widen", "axis": f"./{axis}", "factor": 2} for axis in ("residual", "hidden")]
    return fxgrow.grow(model, spec, (x,), verify=False)


@pytest.mark.parametrize("make", [Frozen, Slots])
def test_settings_in_slots_are_set(make: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    model, x = trained(Reads(make()).to(D)), torch.randn(4, 5, dtype=D)
    expected = model(x)
    _grown(model, x).apply_(model)
    assert (model.config.dim, model.config.inner) == (16, 24)
    rebuilt = Reads(model.config).to(D)
    rebuilt.load_state_dict(model.state_dict())
    for each in (model, rebuilt):
        torch.testing.assert_close(each(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("config", [Sealed(8, 12), types.MappingProxyType({"dim": 8, "inner": 12})])
def test_a_config_that_cannot_be_set_is_told_of(config: Any) -> None:
    torch.manual_seed(0)
    model, x = trained(Builds(config).to(D)), torch.randn(4, 5, dtype=D)
    expected = model(x)
    growth = _grown(model, x)
    with pytest.warns(UserWarning, match="its config cannot say so") as said:
        growth.apply_(model)
    assert said[0].filename == __file__
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)


def test_a_forward_that_reads_such_a_config_is_refused_and_all_put_back() -> None:
    torch.manual_seed(0)
    model, x = trained(Reads(Sealed(8, 12)).to(D)), torch.randn(4, 5, dtype=D)
    held = [(m, dict(vars(m))) for m in model.modules()]
    growth = _grown(model, x)
    with pytest.raises(fxgrow.GrowthRefused, match="computes with 8, the growth needs 16"):
        growth.apply_(model)
    assert all(vars(m)[k] is v for m, own in held for k, v in own.items())
