"""Ops that whole model families hinge on, each in the smallest model that has it: grown exactly, or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxgrow
from fxgrow.errors import GrowthRefused

X = Callable[..., Tensor]


def floats(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


class Recurrent(nn.Module):
    def __init__(self, kind: str, **options: Any) -> None:
        super().__init__()
        self.first = nn.Linear(3, 6)
        self.rnn = getattr(nn, kind)(6, 4, batch_first=True, **options)
        self.head = nn.Linear(8 if options.get("bidirectional") else 4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.first(x))[0])  # type: ignore[no-any-return]


class Cell(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first, self.cell, self.head = nn.Linear(3, 6), getattr(nn, kind)(6, 4), nn.Linear(4, 2)
        self.start = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        h: Any = self.start.expand(x.shape[0], 4)
        state: Any = (h, h) if isinstance(self.cell, nn.LSTMCell) else h
        for t in range(3):
            state = self.cell(self.first(x[:, t]), state)
        return self.head(state[0] if isinstance(state, tuple) else state)  # type: ignore[no-any-return]


class Multiquery(nn.Module):
    """Falcon's: the key and the value head are picked from a fused projection by a list of numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(6, 6 * 8), nn.Linear(32, 6)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        fused = self.qkv(x).view(b, t, 6, 8)
        q, k, v = fused[..., :-2, :], fused[..., [-2], :], fused[..., [-1], :]
        weights = torch.softmax(q.transpose(1, 2) @ k.permute(0, 2, 3, 1), -1)
        return self.out((weights @ v.transpose(1, 2)).transpose(1, 2).reshape(b, t, 32))  # type: ignore[no-any-return]


class Rotary(nn.Module):
    """Rotary over all of the head width: what is left to pass by is empty."""

    def __init__(self, rotated: int) -> None:
        super().__init__()
        self.rotated = rotated
        self.q, self.k, self.v = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(6, 2)
        self.register_buffer("frequency", torch.rand(rotated // 2, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        angle = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * self.frequency  # type: ignore[operator]
        cos, sin = torch.cat([angle, angle], -1).cos(), torch.cat([angle, angle], -1).sin()

        def turn(y: Tensor) -> Tensor:
            a, rest = y[..., : self.rotated], y[..., self.rotated :]
            half = a.shape[-1] // 2
            turned = a * cos + torch.cat([-a[..., half:], a[..., :half]], -1) * sin
            return torch.cat([turned, rest], -1)

        scores = turn(self.q(x)) @ turn(self.k(x)).transpose(1, 2) * 0.3
        return torch.softmax(scores, -1) @ self.v(x)  # type: ignore[no-any-return]


class BiasedScores(nn.Module):
    """Bloom's: the scores are a ``baddbmm`` onto a bias that broadcasts."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        bias = torch.arange(x.shape[1], dtype=x.dtype)[None, None].repeat(x.shape[0], 1, 1)
        scores = bias.baddbmm(self.q(x), self.k(x).transpose(1, 2), beta=0.5, alpha=0.3)
        return torch.softmax(scores, -1) @ self.v(x)  # type: ignore[no-any-return]


class Gathered(nn.Module):
    """GPT-J's: a table is gathered along its rows by an index repeated over its columns."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner = nn.Parameter(torch.randn(7, 4)), nn.Linear(6, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor, i: Tensor) -> Tensor:
        rows = self.table.expand(x.shape[0], 7, 4).gather(1, i[:, :, None].repeat(1, 1, self.table.shape[1]))
        return self.head(torch.tanh(self.inner(x)) * rows)  # type: ignore[no-any-return]


class JoinedGroups(nn.Module):
    """A diffusion UNet's: groups of a group norm that reach across a concatenation (24 channels in 2 groups)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 1), nn.Conv2d(3, 8, 1)
        self.norm, self.head = nn.GroupNorm(2, 24), nn.Conv2d(24, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(torch.cat([self.a(x), self.b(x)], 1)))  # type: ignore[no-any-return]


class Windows(nn.Module):
    """Chunks of a padded sequence, whose sizes no division can be proved of; the width passes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(6, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.pad(self.first(x), (0, 0, 0, (3 - x.shape[1] % 3) % 3))
        y = y.reshape(y.shape[0], -1, 3, y.shape[-1]).cumsum(2)
        return self.head(torch.tanh(y)).flatten(1, 2)[:, : x.shape[1]]  # type: ignore[no-any-return]


class Picked(nn.Module):
    """A router: which experts are picked depends on all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(6, 4), nn.Parameter(torch.randn(4, 6, 5))
        self.down = nn.Parameter(torch.randn(4, 5, 6))

    def forward(self, x: Tensor) -> Tensor:
        weight, which = self.gate(x).softmax(-1).topk(2, -1)
        inner = torch.einsum("nd,nkdh->nkh", x, self.up[which]).relu()
        return torch.einsum("nkh,nkhd,nk->nd", inner, self.down[which], weight)


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...], tuple[str, ...]]] = {
    "lstm": (lambda: Recurrent("LSTM", num_layers=2), (floats(2, 5, 3),), ("./hidden", "./hidden-2")),
    "lstm-both": (lambda: Recurrent("LSTM", bidirectional=True), (floats(2, 5, 3),), ("./hidden", "./hidden-2")),
    "gru": (lambda: Recurrent("GRU", num_layers=2, bias=False), (floats(2, 5, 3),), ("./hidden", "./hidden-2")),
    "rnn": (lambda: Recurrent("RNN", bidirectional=True, num_layers=2), (floats(2, 5, 3),), ("./hidden", "./hidden-2")),
    "lstm-dropout": (lambda: Recurrent("LSTM", num_layers=2, dropout=0.5), (floats(2, 5, 3),), ("./hidden*",)),
    "lstm-cell": (lambda: Cell("LSTMCell"), (floats(2, 3, 3),), ("./hidden*",)),
    "gru-cell": (lambda: Cell("GRUCell"), (floats(2, 3, 3),), ("./hidden*",)),
    "rnn-cell": (lambda: Cell("RNNCell"), (floats(2, 3, 3),), ("./hidden*",)),
    "multi-query": (Multiquery, (floats(2, 5, 6),), ("./heads",)),
    "rotary": (lambda: Rotary(8), (floats(2, 5, 6),), ()),
    "rotary-part": (lambda: Rotary(4), (floats(2, 5, 6),), ()),
    "baddbmm": (BiasedScores, (floats(2, 5, 6),), ("./head_dim",)),
    "gather": (Gathered, (floats(2, 5, 6), torch.randint(0, 7, (2, 5))), ("./hidden-2",)),
    "group-norm-cat": (JoinedGroups, (floats(2, 3, 4, 4),), ("./channels*",)),
    "windows": (Windows, (floats(2, 5, 6),), ("./hidden",)),
    "router": (Picked, (floats(7, 6),), ("./hidden",)),
}


@pytest.mark.parametrize("name", CASES)
def test_axes_grow_exactly_or_refuse(name: str) -> None:
    torch.manual_seed(0)
    make, args, wanted = CASES[name]
    model = make().double()
    program = fxgrow.capture(model, args)
    assert not program.axes.unknown_ops
    doubled = set()
    for info in program.axes:
        if not info.growable:
            continue
        for size in (2 * info.size, info.size + 2):
            for fill in ("copy", "add"):
                operation = {"op": "widen", "axis": info.name, "to": size, "fill": fill}
                try:
                    growth = fxgrow.grow(program, [operation], verify="float64")
                except GrowthRefused:
                    continue
                assert growth.receipt.error_float64 is not None and growth.receipt.error_float64 <= 1e-10
                doubled |= {info.name} if size == 2 * info.size else set()
    for pattern in wanted:
        assert any(i.name in doubled for i in program.axes.find(pattern)), (pattern, doubled, list(program.axes))


def test_part_of_a_head_width_grows_by_new_units_only() -> None:
    """Copies of the rotated part alone would weigh it more than the rest in the scores."""
    program = fxgrow.capture(Rotary(4).double(), (floats(2, 5, 6),))
    widths = [i for i in program.axes if i.growable and i.role == "head_dim"]
    assert len(widths) == 2
    for info in widths:
        with pytest.raises(GrowthRefused, match="only part of the entries"):
            fxgrow.grow(program, [{"op": "widen", "axis": info.name, "factor": 2}])
        growth = fxgrow.grow(program, [{"op": "widen", "axis": info.name, "factor": 2, "fill": "add"}])
        assert growth.receipt.error_float64 is not None and growth.receipt.error_float64 <= 1e-10


def test_a_model_in_train_mode_with_dropout() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 2)).double().train()
    growth = fxgrow.grow(model, [{"op": "widen", "axis": "0.weight:0", "factor": 2}], (floats(5, 4),))
    assert growth.receipt.gradient_error is not None and growth.receipt.gradient_error <= 1e-12


def test_experts_are_named_and_frozen() -> None:
    program = fxgrow.capture(Picked().double(), (floats(7, 6),))
    experts = [i for i in program.axes if i.role == "experts"]
    assert experts and not any(i.growable for i in experts)
    assert {str(m) for i in experts for m in i.members} >= {"gate.weight:0", "up:0", "down:0"}


def test_forward_with_free_keywords_is_captured() -> None:
    """``forward(x, **kwargs)``, keywords in any order, constants among them."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor, **options: Any) -> Tensor:
            y = self.b(torch.relu(self.a(x)))
            return y * options["scale"] if options.get("scaled") else y  # type: ignore[no-any-return]

    model = Net().double()
    kwargs = {"scaled": True, "scale": floats(3, 1)}
    growth = fxgrow.grow(model, [{"op": "widen", "axis": "./hidden", "factor": 2}], (floats(3, 4),), kwargs)
    x, other = floats(5, 4), {"scaled": True, "scale": floats(5, 1)}
    assert torch.allclose(growth.module(x, **other), model(x, **other), atol=1e-12)
    assert "forward" not in model.__dict__
