"""Models written here: what no library's list has."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.families import Example, Maker

V = 50


def _tokens(*shape: int) -> Tensor:
    return torch.randint(0, V, shape)


def _floats(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


class ConvPair(nn.Module):
    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(i, o, 3, padding=1),
            nn.BatchNorm2d(o),
            nn.ReLU(),
            nn.Conv2d(o, o, 3, padding=1),
            nn.BatchNorm2d(o),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)  # type: ignore[no-any-return]


class UNet(nn.Module):
    """Ronneberger 2015: skips are concatenated, the way up is a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.bottom = ConvPair(3, 8), ConvPair(8, 16), ConvPair(16, 32)
        self.up2, self.up1 = nn.ConvTranspose2d(32, 16, 2, stride=2), nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.join2, self.join1 = ConvPair(32, 16), ConvPair(16, 8)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down1(x)
        b = self.down2(F.max_pool2d(a, 2))
        c = self.bottom(F.max_pool2d(b, 2))
        c = self.join2(torch.cat([self.up2(c), b], 1))
        return self.head(self.join1(torch.cat([self.up1(c), a], 1)))  # type: ignore[no-any-return]


class TimeBlock(nn.Module):
    """Residual block of a diffusion UNet: group norms, and a shift and scale from the time embedding."""

    def __init__(self, i: int, o: int, time: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(4, i), nn.Conv2d(i, o, 3, padding=1)
        self.time = nn.Linear(time, 2 * o)
        self.norm2, self.conv2 = nn.GroupNorm(4, o), nn.Conv2d(o, o, 3, padding=1)
        self.skip = nn.Conv2d(i, o, 1) if i != o else nn.Identity()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.time(F.silu(t))[:, :, None, None].chunk(2, dim=1)
        h = self.norm2(h) * (1 + scale) + shift
        return self.conv2(F.silu(h)) + self.skip(x)  # type: ignore[no-any-return]


class SpatialAttention(nn.Module):
    def __init__(self, n: int, heads: int) -> None:
        super().__init__()
        self.norm, self.heads = nn.GroupNorm(4, n), heads
        self.qkv, self.out = nn.Conv1d(n, 3 * n, 1), nn.Conv1d(n, n, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        y = self.norm(x).reshape(b, c, h * w)
        q, k, v = self.qkv(y).reshape(b, 3, self.heads, c // self.heads, h * w).unbind(1)
        y = F.scaled_dot_product_attention(q.transpose(-1, -2), k.transpose(-1, -2), v.transpose(-1, -2))
        return x + self.out(y.transpose(-1, -2).reshape(b, c, h * w)).reshape(b, c, h, w)  # type: ignore[no-any-return]


class DiffusionUNet(nn.Module):
    def __init__(self, width: int = 16, time: int = 24) -> None:
        super().__init__()
        self.width = width
        self.time = nn.Sequential(nn.Linear(width, time), nn.SiLU(), nn.Linear(time, time))
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.down = TimeBlock(width, width, time)
        self.shrink = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.middle = TimeBlock(width, 2 * width, time)
        self.attention = SpatialAttention(2 * width, 4)
        self.grow = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.up = TimeBlock(3 * width, width, time)
        self.norm, self.last = nn.GroupNorm(4, width), nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        half = self.width // 2
        frequencies = torch.exp(-math.log(10000.0) * torch.arange(half, dtype=x.dtype, device=x.device) / half)
        angles = t[:, None].to(x.dtype) * frequencies[None]
        e = self.time(torch.cat([angles.sin(), angles.cos()], -1))
        a = self.down(self.first(x), e)
        b = self.attention(self.middle(self.shrink(a), e))
        b = self.grow(F.interpolate(b, scale_factor=2.0, mode="nearest"))
        c = self.up(torch.cat([b, a], 1), e)
        return self.last(F.silu(self.norm(c)))  # type: ignore[no-any-return]


class Recurrent(nn.Module):
    """A recurrent language model."""

    def __init__(self, kind: str, layers: int = 2, bidirectional: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, 16)
        self.rnn = getattr(nn, kind)(16, 24, layers, batch_first=True, bidirectional=bidirectional)
        self.head = nn.Linear(24 * (2 if bidirectional else 1), V)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.embed(x))[0])  # type: ignore[no-any-return]


class Seq2Seq(nn.Module):
    """``nn.Transformer`` with embeddings and a head."""

    def __init__(self, norm_first: bool = True) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(V, 32), nn.Linear(32, V)
        self.body = nn.Transformer(32, 4, 2, 2, 48, batch_first=True, norm_first=norm_first, dropout=0.1)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        n = target.shape[1]
        mask = torch.ones(n, n, dtype=torch.bool, device=target.device).triu(1)
        return self.head(self.body(self.embed(source), self.embed(target), tgt_mask=mask, tgt_is_causal=True))  # type: ignore[no-any-return]


class EquilibriumLike(nn.Module):
    """One block applied again and again, its input injected each time (Bai 2019, unrolled)."""

    def __init__(self) -> None:
        super().__init__()
        self.inject, self.f = nn.Linear(10, 24), nn.Linear(24, 32)
        self.g, self.norm, self.head = nn.Linear(32, 24), nn.LayerNorm(24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        u = self.inject(x)
        z = torch.zeros_like(u)
        for _ in range(4):
            z = self.norm(torch.relu(self.g(torch.tanh(self.f(z)))) + u)
        return self.head(z)  # type: ignore[no-any-return]


class Siamese(nn.Module):
    """One encoder for two inputs, their difference and product judged."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(10, 32), nn.GELU(), nn.Linear(32, 16), nn.LayerNorm(16))
        self.head = nn.Linear(32, 3)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        a, b = self.encoder(a), self.encoder(b)
        return self.head(torch.cat([(a - b).abs(), a * b], -1))  # type: ignore[no-any-return]


def _images(model: nn.Module) -> Example:
    return Example(model, {}, {}, (_floats(2, 3, 16, 16),), (_floats(3, 3, 24, 24),))


def _language(model: nn.Module, other: tuple[int, int] = (3, 7)) -> Example:
    return Example(model, {}, {}, (_tokens(2, 7),), (_tokens(*other),))


def _pairs(model: nn.Module, *inputs: Any) -> Example:
    return Example(model, {}, {}, inputs[0], inputs[1])


FAMILIES: dict[str, dict[str, Maker]] = {
    "": {
        "unet": lambda: _images(UNet()),
        "diffusion-unet": lambda: _pairs(
            DiffusionUNet(),
            (_floats(2, 3, 16, 16), torch.randint(0, 100, (2,))),
            (_floats(3, 3, 16, 16), torch.randint(0, 100, (3,))),
        ),
        "lstm-lm": lambda: _language(Recurrent("LSTM")),
        "gru-lm": lambda: _language(Recurrent("GRU")),
        "rnn-lm": lambda: _language(Recurrent("RNN")),
        "bilstm": lambda: _language(Recurrent("LSTM", 1, bidirectional=True)),
        "nn.Transformer": lambda: _pairs(Seq2Seq(), (_tokens(2, 7), _tokens(2, 5)), (_tokens(3, 6), _tokens(3, 4))),
        "nn.Transformer-post": lambda: _pairs(
            Seq2Seq(False), (_tokens(2, 7), _tokens(2, 5)), (_tokens(3, 6), _tokens(3, 4))
        ),
        "deq": lambda: _pairs(EquilibriumLike(), (_floats(4, 10),), (_floats(3, 10),)),
        "siamese": lambda: _pairs(Siamese(), (_floats(4, 10), _floats(4, 10)), (_floats(3, 10), _floats(3, 10))),
    }
}
