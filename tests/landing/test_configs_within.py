"""Modules that are built from a config and stand within another model: a wrapper, a pair, a training module."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxgrow
from tests.models import trained


@dataclass
class Config:
    width: int = 8
    inner: int = 12
    layers: int = 2


class Block(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.norm = config, nn.LayerNorm(config.width)
        self.up, self.down = nn.Linear(config.width, config.inner), nn.Linear(config.inner, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).tanh())


class Net(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.first, self.last = nn.Linear(5, config.width), nn.Linear(config.width, 3)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.layers)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x)

    def places(self) -> list[None]:
        """What other methods make of the config: a place for every block's cache."""
        return [None] * self.config.layers


class Wrapped(nn.Module):
    def __init__(self, net: nn.Module, scale: float) -> None:
        super().__init__()
        self.net, self.scale = net, scale

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * self.scale


class Training(nn.Module):
    """Holds the config of the net that it trains."""

    def __init__(self, config: Config, rate: float) -> None:
        super().__init__()
        self.config, self.rate, self.net = config, rate, Net(config)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).tanh()


class Pair(nn.Module):
    def __init__(self, one: nn.Module, other: nn.Module) -> None:
        super().__init__()
        self.one, self.other = one, other

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) - 2 * self.other(x)


GROWTHS: list[tuple[dict[str, Any], Config]] = [
    ({"op": "deepen", "stack": "{}.blocks", "after": [1]}, Config(layers=3)),
    ({"op": "widen", "axis": "{}.blocks.*/hidden", "factor": 2}, Config(inner=24)),
    ({"op": "widen", "axis": "{}.blocks.0.up.weight:1", "factor": 2}, Config(width=16)),
]


def grown(model: nn.Module, spec: dict[str, Any], within: str) -> tuple[Tensor, Tensor]:
    """The model's result before and after a growth of the module at a path in it."""
    torch.manual_seed(0)
    trained(model.double())
    x = torch.randn(4, 5, dtype=torch.float64)
    before = model(x)
    spec = {k: v.format(within) if isinstance(v, str) else v for k, v in spec.items()}
    fxgrow.grow(model, spec, (x,), verify=False).apply_(model)
    return before, model(x)


@pytest.mark.parametrize(("spec", "config"), GROWTHS, ids=["depth", "hidden", "width"])
@pytest.mark.parametrize("kind", [Wrapped, Training])
def test_the_config_of_a_module_within_says_what_it_is(kind: type, spec: dict[str, Any], config: Config) -> None:
    model = Wrapped(Net(Config()), 3.0) if kind is Wrapped else Training(Config(), 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before, after = grown(model, spec, "net")
    torch.testing.assert_close(after, before, rtol=0, atol=1e-12)
    assert model.net.config == config and len(model.net.places()) == len(model.net.blocks)
    rebuilt = Net(model.net.config).double()
    rebuilt.load_state_dict(model.net.state_dict())
    x = torch.randn(3, 5, dtype=torch.float64)
    torch.testing.assert_close(rebuilt(x), model.net(x), rtol=0, atol=0)


@pytest.mark.parametrize(("spec", "config"), GROWTHS, ids=["depth", "hidden", "width"])
def test_of_two_modules_the_config_of_the_grown_one_changes(spec: dict[str, Any], config: Config) -> None:
    model = Pair(Net(Config()), Net(Config()))
    before, after = grown(model, spec, "one")
    torch.testing.assert_close(after, before, rtol=0, atol=1e-12)
    assert (model.one.config, model.other.config) == (config, Config())


@pytest.mark.parametrize(("spec", "config"), GROWTHS, ids=["depth", "hidden", "width"])
def test_a_config_that_two_modules_share_is_told_of(spec: dict[str, Any], config: Config) -> None:
    model = Pair(Net(shared := Config()), Net(shared))
    with pytest.warns(UserWarning, match="Net is grown, and its config cannot say so"):
        before, after = grown(model, spec, "one")
    torch.testing.assert_close(after, before, rtol=0, atol=1e-12)
    assert shared == Config()


@pytest.mark.parametrize(("spec", "config"), GROWTHS, ids=["depth", "hidden", "width"])
def test_a_config_that_two_modules_share_is_set_if_both_grow(spec: dict[str, Any], config: Config) -> None:
    model = Pair(Net(shared := Config()), Net(shared))
    torch.manual_seed(0)
    trained(model.double())
    x = torch.randn(4, 5, dtype=torch.float64)
    before = model(x)
    both = [{k: v.format(n) if isinstance(v, str) else v for k, v in spec.items()} for n in ("one", "other")]
    growth = fxgrow.grow(model, both, (x,), verify=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        growth.apply_(model)
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-12)
    assert shared == config and model.one.config is model.other.config is shared


def test_blocks_that_hold_copies_of_a_config() -> None:
    """A block that is built from a config of its own stands at another place when the stack has grown."""
    model = Wrapped(nn.Sequential(nn.Linear(5, 8), *(Block(copy.copy(Config())) for _ in range(3))), 2.0)
    before, after = grown(model, {"op": "deepen", "stack": "{}", "after": [2]}, "net")
    torch.testing.assert_close(after, before, rtol=0, atol=1e-12)
    assert [b.config for b in model.net[1:]] == [Config()] * 4


class Grouped(nn.Module):
    """Queries, keys and values in one projection, as many keys as the config says."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.first, self.last = nn.Linear(5, 6), nn.Linear(6, 3)
        self.qkv = nn.Linear(6, (config.heads + 2 * config.keys) * config.size)
        self.out = nn.Linear(config.heads * config.size, 6)

    def forward(self, x: Tensor) -> Tensor:
        x, heads, keys, size = self.first(x), self.config.heads, self.config.keys, self.config.size
        q, k, v = self.qkv(x).split([heads * size, keys * size, keys * size], -1)
        q, k, v = (y.unflatten(-1, (-1, size)).transpose(1, 2) for y in (q, k, v))
        k, v = (y.repeat_interleave(heads // keys, 1) for y in (k, v))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.last(x + self.out(y.transpose(1, 2).flatten(2)))


@dataclass
class Heads:
    heads: int = 4
    keys: int = 2
    size: int = 4


def test_settings_of_one_projection_that_grow_together() -> None:
    """Each alone would have to make up for what all make up for together."""
    torch.manual_seed(0)
    model, x = trained(Grouped(Heads()).double()), torch.randn(2, 7, 5, dtype=torch.float64)
    before = model(x)
    fxgrow.grow(model, {"op": "widen", "axis": "./kv_heads", "factor": 2}, (x,), verify=False).apply_(model)
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-12)
    assert model.config == Heads(heads=8, keys=4)


@dataclass
class Whole:
    """Has no numbers of its own, but in the bundles in it."""

    net: Config
    name: str = "whole"


class Built(Net):
    def __init__(self, settings: Whole) -> None:
        super().__init__(settings.net)
        self.settings = settings
        del self.config

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).view(-1, self.settings.net.width)
        for block in self.blocks:
            x = block(x)
        return self.last(x)


@pytest.mark.parametrize(("spec", "config"), GROWTHS, ids=["depth", "hidden", "width"])
def test_configs_of_configs(spec: dict[str, Any], config: Config) -> None:
    model = Wrapped(Built(Whole(Config())), 3.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before, after = grown(model, spec, "net")
    torch.testing.assert_close(after, before, rtol=0, atol=1e-12)
    assert model.net.settings.net == config
    assert all(b.config is model.net.settings.net for b in model.net.blocks)


class Table(nn.Module):
    """Reads sizes of a dict and of a list."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes, self.table = [8, 2, 4], {"width": 8, "heads": 2}
        self.first, self.q, self.last = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(self.first(x)).view(*x.shape[:-1], self.table["heads"], self.sizes[2]).transpose(1, 2)
        y = nn.functional.scaled_dot_product_attention(q, q, q).transpose(1, 2)
        return self.last(y.reshape(*x.shape[:-1], self.table["width"]))


def test_entries_that_a_line_reads() -> None:
    torch.manual_seed(0)
    model, x = trained(Table().double()), torch.randn(2, 3, 5, dtype=torch.float64)
    before = model(x)
    fxgrow.grow(model, {"op": "widen", "axis": "./head_dim", "factor": 2}, (x,), verify=False).apply_(model)
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-12)
    assert (model.sizes[1:], model.table) == ([2, 8], {"width": 16, "heads": 2})
