"""Models whose layers a library has put into others since their class made them: low-rank adapters of its own kind.

A small one of the same shape as PEFT's, with numbers in tables by the adapter's name.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxgrow
from tests.models import relative_error, trained

D = torch.float64


class Block(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.width)
        self.up, self.down = nn.Linear(config.width, config.hidden), nn.Linear(config.hidden, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).tanh())


class Words(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.emb = nn.Embedding(config.words, config.width)
        self.h = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.head = nn.Linear(config.width, config.words)

    def forward(self, i: Tensor) -> Tensor:
        x = self.emb(i)
        for block in self.h[: self.config.layers]:
            x = block(x)
        return self.head(x)


class Around(nn.Module):
    """A layer with low-rank products beside it, by name."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, name: str = "default") -> None:
        super().__init__()
        self.base = base
        self.low = nn.ModuleDict({name: nn.Linear(base.in_features, rank, bias=False)})
        self.high = nn.ModuleDict({name: nn.Linear(rank, base.out_features, bias=False)})
        self.scaling = {name: alpha / rank}
        self.active = [name]

    def forward(self, x: Tensor) -> Tensor:
        out = self.base(x)
        for name in self.active:
            scaling = self.scaling[name]
            out = out + self.high[name](self.low[name](x)) * scaling
        return out


class Holder(nn.Module):
    """The model within the library's own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, i: Tensor) -> Tensor:
        return self.model(i)


def config(**sizes: int) -> SimpleNamespace:
    return SimpleNamespace(**{"width": 6, "hidden": 10, "words": 11, "layers": 2, **sizes})


def wrapped(model: Words, rank: int = 3, alpha: float = 6.0) -> Holder:
    for block in model.h:
        block.up, block.down = Around(block.up, rank, alpha), Around(block.down, rank, alpha)  # type: ignore[assignment, arg-type]
    return Holder(model).to(D)


def small() -> tuple[Holder, Tensor]:
    torch.manual_seed(0)
    model = wrapped(Words(config()))
    trained(model)
    for name, p in model.named_parameters():
        p.requires_grad_("low" in name or "high" in name)
    return model, torch.randint(0, 11, (3, 5))


def grown(model: nn.Module, x: Tensor, *spec: dict[str, Any]) -> fxgrow.Growth:
    growth = fxgrow.grow(model, list(spec), (x,))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the config says what was grown
        growth.apply_(model)
    return growth


@pytest.mark.parametrize(
    ("spec", "sizes"),
    [
        ({"op": "widen", "axis": "*/hidden", "factor": 2, "noise": {"scale": 1e-3}}, {"hidden": 20}),
        ({"op": "widen", "axis": "*/residual", "by": 2}, {"width": 8}),
        ({"op": "deepen", "stack": "model.h", "factor": 2}, {"layers": 4}),
        ({"op": "deepen", "stack": "model.h", "after": [0]}, {"layers": 3}),
        ({"op": "extend", "axis": "*/vocab", "by": 3}, {"words": 14}),
    ],
    ids=["hidden", "residual", "deeper", "after", "words"],
)
def test_adapters_and_config_grow_with_their_base(spec: dict[str, Any], sizes: dict[str, int]) -> None:
    model, x = small()
    before, classes = copy.deepcopy(model), type(model.model)
    trains = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trains, lr=0.01)
    model(x).square().mean().backward()
    growth = grown(model, x, spec)
    growth.carry_(optimizer)
    assert (model(x)[..., :11] - before(x)).abs().max() <= 1e-10 * before(x).abs().max()
    assert type(model.model) is classes and vars(model.model.config) == vars(config(**sizes))
    larger = wrapped(Words(config(**sizes)))
    larger.load_state_dict(model.state_dict())
    assert relative_error(model, larger, (x,)) == 0
    held = {id(p) for g in optimizer.param_groups for p in g["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}
    optimizer.step()


def test_blocks_have_tables_of_their_own() -> None:
    model, x = small()
    grown(model, x, {"op": "deepen", "stack": "model.h", "factor": 2})
    tables = [m.scaling for m in model.modules() if isinstance(m, Around)]
    assert len(tables) == 8 and all(a is not b for a, b in itertools.combinations(tables, 2))


@pytest.mark.parametrize("alpha", [6.0, 3.0, 2.0])
def test_a_scale_in_a_table_follows_the_rank(alpha: float) -> None:
    """The class multiplies by alpha / rank; by 1 before the growth, or after it, is in one of the two graphs only."""
    torch.manual_seed(0)
    model, x = wrapped(Words(config()), alpha=alpha), torch.randint(0, 11, (3, 5))
    trained(model)
    before = copy.deepcopy(model)
    grown(model, x, {"op": "widen", "axis": "model.h.*.up/rank", "factor": 2, "fill": "add"})
    assert relative_error(before, model, (x,)) <= 1e-10
    ups, downs = ([getattr(b, n).scaling["default"] for b in model.model.h] for n in ("up", "down"))
    assert ups == [alpha / 6] * 2 and downs == [alpha / 3] * 2


def test_growths_in_a_row() -> None:
    model, x = small()
    before = copy.deepcopy(model.train())
    for spec in (
        {"op": "deepen", "stack": "model.h", "by": 1},
        {"op": "widen", "axis": "*/rank", "by": 2, "fill": "add"},
        {"op": "widen", "axis": "*/residual", "factor": 2},
    ):
        grown(model, x, spec)
        assert relative_error(before.eval(), model, (x,)) <= 1e-10
    assert vars(model.model.config) == vars(config(width=12, layers=3))


def test_adapters_are_not_doubled() -> None:
    model, x = small()
    for modules in ("*", "*.up", "model.h.0.up.base"):
        with pytest.raises(fxgrow.SpecError, match=r"h.0.up\S* has an adapter already \(model.h.0.up.low"):
            fxgrow.grow(model, {"op": "lora", "modules": modules, "rank": 2}, (x,))
    with pytest.raises(fxgrow.SpecError, match="no linear layer or embedding matches"):
        fxgrow.grow(model, {"op": "lora", "modules": "*.low.*", "rank": 2}, (x,))
    growth = fxgrow.grow(model, {"op": "lora", "modules": "model.head", "rank": 2}, (x,))
    assert relative_error(model, growth.module, (x,)) == 0


def test_into_a_larger_one_of_its_own() -> None:
    model, x = small()
    larger = wrapped(Words(config(hidden=20, width=12, layers=3)), rank=6)
    fxgrow.expand(model, larger, (x,))
    assert relative_error(model, larger, (x,)) <= 1e-10
