"""What an axis is called: streams, hidden axes and low ranks are told apart by what lies between the layers."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxgrow
from tests.models import trained

Function = Callable[[Tensor], Tensor]


class Layer(nn.Module):
    """Attention and an MLP, with a low-rank map beside the queries."""

    def __init__(self, activation: Function) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8)
        self.query, self.key, self.value, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.a, self.b, self.drop = nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False), nn.Dropout(0.1)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        h = self.norm(x)
        query = self.query(h) + 2.0 * self.b(self.a(self.drop(h)))
        q, k, v = (y.view(batch, length, 2, 4).transpose(1, 2) for y in (query, self.key(h), self.value(h)))
        weights = (q @ k.transpose(-1, -2) / 2).softmax(-1)
        x = x + self.out((weights @ v).transpose(1, 2).reshape(batch, length, width))
        return x + self.down(self.activation(self.up(self.norm(x))))


class Model(nn.Module):
    def __init__(self, activation: Function = F.gelu) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(5, 8), nn.Linear(8, 3)
        self.layers = nn.ModuleList(Layer(activation) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)  # type: ignore[no-any-return]


def names(model: nn.Module, *args: Tensor) -> list[str]:
    return [a.name for a in fxgrow.capture(model, args).axes]


WRITTEN_OUT: dict[str, Function] = {
    "tanh gelu": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3)))),
    "quick gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "mish": lambda x: x * torch.tanh(torch.log1p(torch.exp(x))),
    "a Taylor sum": lambda x: 1 + x + x * x / 2 + x**3 / 6,
    "snake": lambda x: x + torch.sin(x) ** 2,
    "a sum with its dropout": lambda x: F.relu(x + F.dropout(x, 0.1)),
    "a sum with its mean": lambda x: F.relu(x + (x - x.mean(-1, keepdim=True))),
    "response normalisation": lambda x: F.gelu(x) + F.gelu(x) * x.norm(dim=1, keepdim=True),
}


@pytest.mark.parametrize("name", list(WRITTEN_OUT))
def test_an_activation_written_out_is_no_stream(name: str) -> None:
    model = trained(Model(WRITTEN_OUT[name]).double())
    found = names(model, torch.randn(3, 4, 5).double())
    assert [n for n in found if n.endswith("/residual")] == ["./residual"]
    assert {"layers.0/hidden", "layers.1/hidden"} <= set(found)


def test_a_stream_doubles_alone() -> None:
    model = trained(Model(WRITTEN_OUT["tanh gelu"]).double())
    growth = fxgrow.grow(model, {"op": "widen", "axis": "*/residual", "factor": 2}, (torch.randn(3, 4, 5).double(),))
    assert growth.module.layers[0].up.weight.shape == (12, 16)  # type: ignore[index,union-attr]


def test_a_layer_between_makes_a_stream() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.mix, self.down = nn.Linear(5, 12), nn.Linear(12, 12), nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.up(x)
            return self.down(h + self.mix(h))  # type: ignore[no-any-return]

    assert "./residual" in names(Inner().double(), torch.randn(3, 5).double())


def test_a_recurrence_between_makes_a_stream() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.lstm, self.down = nn.Linear(5, 6), nn.LSTM(6, 6, batch_first=True), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.up(x)
            return self.down(h + self.lstm(h)[0])  # type: ignore[no-any-return]

    assert "./residual" in names(Recurrent().double(), torch.randn(3, 4, 5).double())


class Between(nn.Module):
    """Two linear layers, and what lies between them."""

    def __init__(self, between: Callable[[Between, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(5, 4), nn.Linear(4, 3), nn.LayerNorm(4)
        self.scale, self.between = nn.Parameter(torch.ones(4)), between

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self, self.first(x)))  # type: ignore[no-any-return]


def written_norm(s: Between, x: Tensor) -> Tensor:
    return s.scale * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


LINEAR: dict[str, Callable[[Between, Tensor], Tensor]] = {
    "nothing": lambda s, x: x,
    "a number and dropout": lambda s, x: 0.5 * F.dropout(x, 0.1, s.training),
    "a layer norm": lambda s, x: s.norm(x),
    "a norm written out": written_norm,
    "a view": lambda s, x: x.view(3, 2, 2).transpose(1, 2).transpose(1, 2).reshape(3, 4),
    "a mean over rows": lambda s, x: x - x.mean(0, keepdim=True),
}
CURVED: dict[str, Callable[[Between, Tensor], Tensor]] = {
    "an activation": lambda s, x: F.relu(x),
    "an activation behind a norm": lambda s, x: torch.tanh(s.norm(x)),
    "a gate": lambda s, x: x * torch.sigmoid(x),
    "a square": lambda s, x: x * x,
    "a softmax": lambda s, x: x.softmax(-1),
    "a quotient": lambda s, x: 1 / (2 + x),
}


@pytest.mark.parametrize("name", [*LINEAR, *CURVED])
def test_a_rank_lies_between_linear_maps(name: str) -> None:
    model = trained(Between({**LINEAR, **CURVED}[name]).double())
    found = {n.rpartition("/")[2] for n in names(model, torch.randn(3, 5).double())}
    assert ("rank" in found, "hidden" in found) == (name in LINEAR, name in CURVED)


def test_adapters_and_merged_weights_have_a_rank() -> None:
    model = trained(Model().double())
    x = torch.randn(3, 4, 5).double()
    found = names(model, x)
    assert {"layers.0/rank", "layers.1/rank"} <= set(found)
    assert {n for n in found if n.startswith("layers.0/")} == {
        f"layers.0/{role}" for role in ("hidden", "heads", "head_dim", "value_dim", "rank")
    }
    growth = fxgrow.grow(model, {"op": "widen", "axis": "*/hidden", "factor": 2}, (x,))
    assert growth.module.layers[0].a.weight.shape == (2, 8)  # type: ignore[index,union-attr]
    growth = fxgrow.grow(model, {"op": "widen", "axis": "*/rank", "factor": 2}, (x,))
    assert growth.module.layers[0].a.weight.shape == (4, 8)  # type: ignore[index,union-attr]
    assert growth.receipt.error_float64 is not None and growth.receipt.error_float64 < 1e-12

    class Merged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base, self.out = nn.Linear(5, 6), nn.Linear(6, 3)
            self.a, self.b = nn.Parameter(torch.randn(2, 5)), nn.Parameter(torch.randn(6, 2))

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.tanh(F.linear(x, self.base.weight + self.b @ self.a)))  # type: ignore[no-any-return]

    assert {n.rpartition("/")[2] for n in names(Merged().double(), torch.randn(3, 5).double())} >= {"rank", "hidden"}


def test_a_factorised_embedding_has_a_rank() -> None:
    class Factorised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.norm, self.project = nn.Embedding(11, 4), nn.LayerNorm(4), nn.Linear(4, 8)
            self.up, self.down, self.head = nn.Linear(8, 6), nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, i: Tensor) -> Tensor:
            x = self.project(self.norm(self.table(i)))
            return self.head(x + self.down(F.silu(self.up(x))))  # type: ignore[no-any-return]

    found = names(Factorised().double(), torch.arange(11).view(1, 11).repeat(2, 1))
    assert found == ["table/vocab", "./rank", "./residual", "./hidden", "head/vocab"]
