"""Classes that are built from arguments that they keep, from a config's entries, or from lists of sizes."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxgrow
from tests.models import trained

D = torch.float64


class Block(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).tanh())


class Kept(nn.Module):
    """Keeps its arguments; only another method reads them."""

    def __init__(self, width: int = 8, inner: int = 12, depth: int = 2, *, rate: float = 0.0) -> None:
        super().__init__()
        self.width, self.inner, self.depth = width, inner, depth
        self.cells = 2 * width
        self.first, self.last = nn.Linear(5, width), nn.Linear(width, 3)
        self.blocks = nn.ModuleList(Block(width, inner) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x)

    def state(self, batch: int) -> Tensor:
        return torch.zeros(self.depth, batch, self.cells, self.inner, dtype=D)


class Named(Kept):
    """Takes the entries of a config by name, and keeps them in a dict."""

    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        self.config = dict(config)


class Lists(nn.Module):
    """Keeps the sizes of its stages in a list."""

    def __init__(self, channels: tuple[int, ...] = (4, 6, 8)) -> None:
        super().__init__()
        self.channels = channels
        sizes = zip((3, *channels), channels, strict=False)
        self.stages = nn.ModuleList(nn.Conv1d(a, b, 3, padding=1) for a, b in sizes)
        self.last = nn.Linear(channels[-1], 2)

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x).tanh()
        return self.last(x.mean(-1))


def grown(model: nn.Module, spec: Any, x: Tensor) -> nn.Module:
    """The model as it was; without a warning it computes the same afterwards."""
    torch.manual_seed(0)
    before = copy.deepcopy(trained(model.to(D)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fxgrow.grow(model, spec, (x,), verify=False).apply_(model)
    torch.testing.assert_close(model(x[:1]), before(x[:1]), rtol=0, atol=1e-12)
    return before


def widen(axis: str) -> dict[str, Any]:
    return {"op": "widen", "axis": axis, "factor": 2}


GROWTHS = [
    ([widen("./residual")], {"width": 16, "inner": 12, "depth": 2}),
    ([widen("*/hidden"), {"op": "deepen", "stack": "blocks", "by": 1}], {"width": 8, "inner": 24, "depth": 3}),
]


@pytest.mark.parametrize(("spec", "sizes"), GROWTHS, ids=["width", "rest"])
@pytest.mark.parametrize("named", [False, True])
def test_arguments_say_what_the_model_is(spec: list[Any], sizes: dict[str, int], named: bool) -> None:
    model: Any = Named(width=8, inner=12, depth=2) if named else Kept()
    x = torch.randn(4, 5, dtype=D)
    grown(model, spec, x)
    assert {n: getattr(model, n) for n in sizes} == sizes and model.cells == 2 * model.width
    assert model.state(2).shape == (sizes["depth"], 2, 2 * sizes["width"], sizes["inner"])
    assert not named or model.config == sizes
    rebuilt = type(model)(**sizes).to(D)
    rebuilt.load_state_dict(model.state_dict())
    torch.testing.assert_close(rebuilt(x), model(x), rtol=0, atol=0)


def test_lists_of_sizes_follow() -> None:
    model = Lists()
    x = torch.randn(4, 3, 7, dtype=D)
    axes = [a.name for a in fxgrow.capture(model.to(D), (x,)).axes if a.growable and a.size in (4, 8)]
    grown(model, [widen(a) for a in axes], x)
    assert model.channels == (8, 6, 16)
    Lists(model.channels).load_state_dict(model.state_dict())


def test_arguments_that_cannot_say_it_are_told_of() -> None:
    torch.manual_seed(0)
    model, x = trained(Kept().to(D)), torch.randn(4, 5, dtype=D)
    before = model(x)
    growth = fxgrow.grow(model, widen("blocks.0/hidden"), (x,), verify=False)
    with pytest.warns(UserWarning, match="Kept is grown, and the arguments that it keeps cannot say so"):
        growth.apply_(model)
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-12)
    assert (model.width, model.inner, model.depth) == (8, 12, 2)


class Inner(nn.Module):
    """Holds modules that others made, and the settings that they were made of."""

    def __init__(self, parts: nn.Module, settings: dict[str, int]) -> None:
        super().__init__()
        self.parts, self.settings_of = parts, settings
        self.extra = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.parts(x)

    def other(self, x: Tensor) -> Tensor:
        return self.extra(self.parts.first(x))  # type: ignore[operator]


def test_what_stays_as_it_was_is_told_of() -> None:
    """Settings that nothing is built from alone, and weights that no captured call reads."""
    torch.manual_seed(0)
    model, x = trained(Inner(Kept(), {"width": 8, "classes": 3}).to(D)), torch.randn(4, 5, dtype=D)
    before = model(x)
    growth = fxgrow.grow(model, widen("*/residual"), (x,), verify=False)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        growth.apply_(model)
    said = " ".join(str(each.message) for each in told)
    assert "Inner.settings_of says width 8" in said and "classes" not in said
    assert "no captured call reads extra.weight" in said
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-12)
    assert model.parts.width == 16


class Attend(nn.Module):
    def __init__(self, width: int, heads: int, size: int) -> None:
        super().__init__()
        self.heads, self.size = heads, size
        self.norm, self.qkv = nn.LayerNorm(width), nn.Linear(width, 3 * heads * size)
        self.out = nn.Linear(heads * size, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (-1, self.size)).transpose(1, 2) for y in self.qkv(self.norm(x)).chunk(3, -1))
        return x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Shaped(nn.Module):
    """Has as many blocks as a list of sizes has entries, and as its first entry says, by chance."""

    def __init__(self, shape: tuple[int, int] = (2, 4), width: int = 6, depth: int = 2) -> None:
        super().__init__()
        self.shape, self.width, self.depth = shape, width, depth
        heads, size = shape
        self.first, self.last = nn.Linear(5, width), nn.Linear(width, 3)
        self.blocks = nn.ModuleList(Attend(width, heads, size) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x)


@pytest.mark.parametrize(
    ("spec", "shape", "depth"),
    [
        ([widen("*/heads"), widen("*/head_dim"), widen("*/value_dim")], (4, 8), 2),
        ({"op": "deepen", "stack": "blocks", "by": 1}, (2, 4), 3),
    ],
    ids=["shape", "depth"],
)
def test_a_list_that_is_as_long_as_a_stack_by_chance(spec: Any, shape: tuple[int, int], depth: int) -> None:
    model, x = Shaped(), torch.randn(2, 4, 5, dtype=D)
    grown(model, spec, x)
    assert (model.shape, model.width, model.depth) == (shape, 6, depth)


class Pairs(nn.Module):
    """Sizes in pairs, of which two are one size."""

    def __init__(self, sizes: list[tuple[int, int]]) -> None:
        super().__init__()
        self.sizes = sizes
        self.parts = nn.ModuleList(nn.Linear(a, b) for a, b in sizes)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x).tanh()
        return x


def test_lists_of_lists_of_sizes() -> None:
    model, x = Pairs([(5, 8), (8, 6), (6, 3)]), torch.randn(4, 5, dtype=D)
    grown(model, widen("./hidden"), x)
    assert model.sizes == [(5, 16), (16, 6), (6, 3)]


class Private(nn.Module):
    """Reads its size of a property."""

    def __init__(self) -> None:
        super().__init__()
        self._width = 8
        self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 3)

    @property
    def width(self) -> int:
        return self._width

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).view(*x.shape[:-1], self.width).tanh())


def test_private_attributes_that_a_property_reads() -> None:
    model, x = Private(), torch.randn(2, 4, 5, dtype=D)
    grown(model, widen("./hidden"), x)
    assert model.width == 16
