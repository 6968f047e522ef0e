"""Kinds of configs: those with slots are set, those that cannot be set are told of."""

from __future__ import annotations

import functools
import types
import warnings
from collections import namedtuple
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass, field
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


class Closed(MutableMapping[str, int]):
    """Settings that can be read only, as a mapping says when it is written."""

    def __init__(self, entries: dict[str, int]) -> None:
        self._entries = entries

    def __getitem__(self, name: str) -> int:
        return self._entries[name]

    def __setitem__(self, name: str, value: int) -> None:
        raise PermissionError(name)

    def __delitem__(self, name: str) -> None:
        raise PermissionError(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


class Holds(nn.Module):
    """Has a size of its own in an attribute that its config has too."""

    def __init__(self, config: Any, read: bool = False) -> None:
        super().__init__()
        self.config, self.read, self.dim = config, read, config["dim"]
        self.first, self.up = nn.Linear(5, config["dim"]), nn.Linear(config["dim"], config["inner"])
        self.down, self.last = nn.Linear(config["inner"], config["dim"]), nn.Linear(config["dim"], 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).view(-1, self.config["dim"] if self.read else self.dim)
        return self.last(x + self.down(self.up(x).tanh()))


@pytest.mark.parametrize("read", [False, True])
def test_a_mapping_that_refuses_to_be_set(read: bool) -> None:
    torch.manual_seed(0)
    model, x = trained(Holds(Closed({"dim": 8, "inner": 12}), read).to(D)), torch.randn(4, 5, dtype=D)
    expected = model(x)
    growth = _grown(model, x)
    if read:
        with pytest.raises(fxgrow.GrowthRefused, match="as it was"):
            growth.apply_(model)
        assert model.dim == 8
    else:
        with pytest.warns(UserWarning, match="its config cannot say so"):
            growth.apply_(model)
        assert model.dim == 16
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)


@dataclass
class Derived:
    """Computes one setting where it is made, and one where it is first read; its class wants them to agree."""

    dim: int = 8
    inner: int = 12
    both: int = field(init=False)

    def __post_init__(self) -> None:
        self.both = self.dim + self.inner

    @functools.cached_property
    def double(self) -> int:
        return 2 * self.both


class Agrees(Part):
    def __init__(self, config: Any) -> None:
        super().__init__(config, read=True)
        assert config.double == 2 * config.both == 2 * (config.dim + config.inner)


def test_settings_that_a_config_computes_follow() -> None:
    torch.manual_seed(0)
    model, x = trained(Agrees(Derived()).to(D)), torch.randn(4, 5, dtype=D)
    expected = model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _grown(model, x).apply_(model)
    assert vars(model.config) == {"dim": 16, "inner": 24, "both": 40, "double": 80}
    rebuilt = Agrees(model.config).to(D)
    rebuilt.load_state_dict(model.state_dict())
    for each in (model, rebuilt):
        torch.testing.assert_close(each(x), expected, rtol=0, atol=1e-12)


class Remembers(nn.Module):
    """Computes a size once, and keeps it; no captured call reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.size = 2, 4
        self.up, self.down = nn.Linear(5, 8), nn.Linear(8, 3)

    @functools.cached_property
    def places(self) -> int:
        return self.heads * self.size

    def forward(self, x: Tensor) -> Tensor:
        q = self.up(x).view(*x.shape[:-1], self.heads, self.size).transpose(1, 2)
        y = nn.functional.scaled_dot_product_attention(q, q, q)
        return self.down(y.transpose(1, 2).flatten(2))


def test_what_a_module_has_computed_once_is_computed_anew() -> None:
    torch.manual_seed(0)
    model, x = trained(Remembers().to(D)), torch.randn(2, 3, 5, dtype=D)
    expected = model(x)
    assert model.places == 8
    fxgrow.grow(model, {"op": "widen", "axis": "./heads", "factor": 2}, (x,), verify=False).apply_(model)
    assert (model.heads, model.places) == (4, 16)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)
