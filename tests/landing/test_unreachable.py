"""Classes that cannot compute the grown function: every one is refused, and goes on as it was, to the bit."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxgrow
from tests.models import trained

D = torch.float64
HEADS, HIDDEN, WIDTH, EPS = 4, 16, 8, 1e-3
TABLE = torch.linspace(0.5, 1.5, HIDDEN, dtype=D)
SIZES = {"heads": {"of": {"attention": HEADS}}}


def attention(x: torch.Tensor, heads: int) -> torch.Tensor:
    """(B, T, C) in heads, each attending over T by itself."""
    b, t, c = x.shape
    y = x.view(b, t, heads, c // heads).transpose(1, 2)
    return F.scaled_dot_product_attention(y, y, y).transpose(1, 2).reshape(b, t, c)


class Mixer(nn.Module):
    """A projection, heads that mix over time, and a projection back."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 32), nn.Linear(32, 3)

    def heads(self) -> int:
        return HEADS

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(attention(self.up(x), self.heads()))


class Global(Mixer):
    pass


class Written(Mixer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(attention(self.up(x), 4))


class Closure(Mixer):
    def __init__(self, heads: int = 4) -> None:
        super().__init__()
        self.mix = lambda y: attention(y, heads)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.mix(self.up(x)))


class Partial(Mixer):
    def __init__(self) -> None:
        super().__init__()
        self.mix = functools.partial(attention, heads=4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.mix(self.up(x)))


class Default(Mixer):
    def mixed(self, y: torch.Tensor, heads: int = 4) -> torch.Tensor:
        return attention(y, heads)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.mixed(self.up(x)))


class Property(Mixer):
    @property
    def number(self) -> int:
        return 4

    def heads(self) -> int:
        return self.number


class Environment(Mixer):
    def heads(self) -> int:
        return int(os.environ.get("FXGROW_TEST_HEADS", "4"))


class Deep(Mixer):
    def heads(self) -> int:
        return SIZES["heads"]["of"]["attention"]


class Sizes(NamedTuple):
    heads: int = 4


class ReadOnly(Mixer):
    def __init__(self) -> None:
        super().__init__()
        self.sizes = Sizes()

    def heads(self) -> int:
        return self.sizes.heads


class Text(Mixer):
    def __init__(self) -> None:
        super().__init__()
        self.pattern = "b t (4 d)"

    def heads(self) -> int:
        return int(self.pattern[5])


class Asserted(Mixer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.up(x)
        assert y.shape[-1] == 32
        return self.down(y.tanh())


class Normed(nn.Module):
    """A stream with a norm whose constants are written into the code."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.weight, self.down = nn.Linear(5, 8), nn.Parameter(torch.ones(8)), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.layer_norm(self.up(x), (WIDTH,), self.weight, None, 1e-5))


class Eps(Normed):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.rms_norm(self.up(x).tanh(), self.weight.shape, self.weight, EPS))


class Split(nn.Module):
    """Gate and value in one projection, parted at a number in the code."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 2 * HIDDEN), nn.Linear(HIDDEN, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, value = self.up(x).split(HIDDEN, dim=-1)
        return self.down(F.silu(gate) * value)


class Sliced(Split):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.up(x)
        return self.down(F.silu(y[..., :16]) * y[..., 16:])


class Averaged(nn.Module):
    """A mean by a number in the code, inside functions that no factor passes through."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, HIDDEN), nn.Linear(1, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down((self.up(x).tanh().sum(-1, keepdim=True) / 16).cos())


class Table(nn.Module):
    """A table outside the model, along the hidden axis."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, HIDDEN), nn.Linear(HIDDEN, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x).tanh() * TABLE)


class Cached(Table):
    def __init__(self) -> None:
        super().__init__()
        self.table()

    @staticmethod
    @functools.cache
    def table() -> torch.Tensor:
        return torch.linspace(0.5, 1.5, HIDDEN, dtype=D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x).tanh() * self.table())


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(self.norm(x)).tanh())


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 8), nn.Linear(8, 3)
        self.blocks = nn.ModuleList([Block() for _ in range(2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.up(x)
        for block in self.blocks[:2]:
            x = block(x)
        return self.down(x)


class Counted(Stack):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.up(x)
        for block in self.blocks:
            x = block(x)
        return self.down((x / len(self.blocks)).tanh())


class Numbered(Stack):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.up(x)
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number == 1:
                x = x.tanh()
        return self.down(x)


class Collected(Stack):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.up(x)
        kept = []
        for block in self.blocks:
            x = block(x)
            kept.append(x)
        return self.down(torch.stack(kept).sum(0).tanh())


HEADED = {"op": "widen", "axis": "up.weight:0", "factor": 2}
WIDER = {"op": "widen", "axis": "down.weight:1", "factor": 2}
DEEPER = {"op": "deepen", "stack": "blocks", "by": 1}
BY_HALF = {"op": "widen", "axis": "down.weight:1", "factor": 1.5}
CASES: list[tuple[Callable[[], nn.Module], dict[str, Any]]] = [
    *[
        (kind, {"op": "widen", "axis": "*/heads", "factor": 2})
        for kind in (Global, Written, Closure, Partial, Default, Property, Environment, Deep, ReadOnly, Text)
    ],
    (Asserted, HEADED),
    (Normed, WIDER),
    (Eps, BY_HALF),
    *[(kind, WIDER) for kind in (Split, Sliced, Table, Cached)],
    (Averaged, HEADED),
    *[(kind, DEEPER) for kind in (Stack, Counted, Numbered, Collected)],
]


@pytest.mark.parametrize(("kind", "spec"), CASES, ids=lambda v: getattr(v, "__name__", ""))
def test_a_number_out_of_reach_is_refused_and_all_put_back(kind: Callable[[], nn.Module], spec: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = trained(kind().to(D))
    x = torch.randn(3, 4, 5, dtype=D)
    growth = fxgrow.grow(model, spec, (x,))
    before, tensors, attributes = copy.deepcopy(model), dict(model.named_parameters()), _attributes(model)
    with pytest.raises(fxgrow.GrowthRefused, match=f"{kind.__name__}.* as it was"):
        growth.apply_(model)
    assert _attributes(model) == attributes
    assert all(p is tensors[n] for n, p in model.named_parameters())
    assert torch.equal(model(x), before(x))
    for twin in (model, before):
        twin(x).square().sum().backward()
    assert all(
        torch.equal(p.grad, q.grad)
        for p, q in zip(model.parameters(), before.parameters(), strict=True)
        if p.grad is not None
    )


def _attributes(model: nn.Module) -> dict[str, Any]:
    return {
        f"{path}.{name}": value
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, int | float | str | tuple)
    }


class Tied(nn.Module):
    """Attention in which one number is the width of the stream and that of all heads."""

    def __init__(self, width: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, width), nn.Linear(width, 3)
        self.project, self.back = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.width, self.heads = width, heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.up(x)
        b, t, c = x.shape
        q, k, v = (
            y.view(b, t, self.heads, c // self.heads).transpose(1, 2) for y in self.project(x).split(self.width, dim=-1)
        )
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, c)
        return self.down((x + self.back(y)).tanh())


def test_what_the_class_ties_is_named_and_lands_together() -> None:
    torch.manual_seed(0)
    model = trained(Tied().to(D))
    x, heads = torch.randn(3, 4, 5, dtype=D), {"op": "widen", "axis": "*/heads", "factor": 2}
    with pytest.raises(fxgrow.GrowthRefused, match=r"may land with .*`widen \./residual to: 16`"):
        fxgrow.grow(model, heads, (x,)).apply_(model)
    before = model(x)
    fxgrow.grow(model, [heads, {"op": "widen", "axis": "./residual", "to": 16}], (x,)).apply_(model)
    assert (model.width, model.heads) == (16, 4)
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-12)
