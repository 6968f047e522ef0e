"""Small whole models, each with two sets of inputs: one to capture with, one of other sizes to check with."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

V, T = 19, 12


@dataclass
class Example:
    """A model in float64 with trained-looking weights, the inputs it is captured with, and others."""

    model: nn.Module
    args: tuple[Any, ...]
    other: tuple[Any, ...]


Maker = Callable[[], Example]
ZOO: dict[str, Maker] = {}


def entry(name: str, *variants: dict[str, Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register ``f(**variant) -> (model, args, other)`` once per variant."""

    def register(f: Callable[..., Any]) -> Callable[..., Any]:
        for variant in variants or ({},):
            label = "-".join([name, *(f"{k}={v}" for k, v in variant.items())])

            def make(variant: dict[str, Any] = variant) -> Example:
                torch.manual_seed(0)
                model, args, other = f(**variant)
                return Example(trained(model), args, other)

            ZOO[label] = make
        return f

    return register


def trained(model: nn.Module) -> nn.Module:
    """Every parameter and running statistic off its initial value, dropout on, in float64 and eval mode."""
    model = model.double().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.1)
        for name, b in model.named_buffers():
            if name.endswith("running_mean"):
                b.add_(torch.randn(b.shape, generator=generator, dtype=b.dtype) * 0.3)
            if name.endswith("running_var"):
                b.mul_(0.5 + torch.rand(b.shape, generator=generator, dtype=b.dtype))
    return model


def tokens(*shape: int) -> Tensor:
    return torch.randint(0, V, shape)


def floats(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


# norms and activations ---------------------------------------------------------------------------------------------


class WrittenRMSNorm(nn.Module):
    """Llama's: to float32, pow, mean, rsqrt, back."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))

    def forward(self, x: Tensor) -> Tensor:
        variance = x.pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(variance + 1e-5))


class SquareRMSNorm(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(n))

    def forward(self, x: Tensor) -> Tensor:
        return x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + 1e-5) * (1 + self.weight)


class WrittenLayerNorm(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))
        self.bias = nn.Parameter(torch.zeros(n))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        variance = (x - mean).pow(2).mean(-1, keepdim=True)
        return (x - mean) / torch.sqrt(variance + 1e-5) * self.weight + self.bias


class VarLayerNorm(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(n))
        self.beta = nn.Parameter(torch.zeros(n))

    def forward(self, x: Tensor) -> Tensor:
        u = x.mean(-1, keepdim=True)
        s = x.var(-1, keepdim=True, unbiased=False)
        return self.gamma * ((x - u) * torch.rsqrt(s + 1e-5)) + self.beta


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "layer": nn.LayerNorm,
    "rms": nn.RMSNorm,
    "rms-written": WrittenRMSNorm,
    "rms-square": SquareRMSNorm,
    "layer-written": WrittenLayerNorm,
    "layer-var": VarLayerNorm,
}
ACTS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "softplus": nn.Softplus,
}


# transformers ------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, c: int, h: int, fused: bool, sdpa: bool, causal: bool = True) -> None:
        super().__init__()
        self.h, self.sdpa, self.fused, self.causal = h, sdpa, fused, causal
        if fused:
            self.qkv = nn.Linear(c, 3 * c)
        else:
            self.q, self.k, self.v = nn.Linear(c, c), nn.Linear(c, c), nn.Linear(c, c)
        self.proj = nn.Linear(c, c)
        self.drop = nn.Dropout(0.1)
        self.register_buffer("mask", torch.tril(torch.ones(T, T)).view(1, 1, T, T))

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        parts = self.qkv(x).split(c, dim=2) if self.fused else (self.q(x), self.k(x), self.v(x))
        q, k, v = (p.view(b, t, self.h, c // self.h).transpose(1, 2) for p in parts)
        if self.sdpa:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, dropout_p=0.1 if self.training else 0.0)
        else:
            scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
            if self.causal:
                scores = scores.masked_fill(self.mask[:, :, :t, :t] == 0, float("-inf"))
            y = self.drop(F.softmax(scores, dim=-1)) @ v
        return self.proj(y.transpose(1, 2).contiguous().view(b, t, c))


class Block(nn.Module):
    def __init__(self, c: int, h: int, norm: str, act: str, fused: bool, sdpa: bool, pre: bool) -> None:
        super().__init__()
        self.pre = pre
        self.ln1, self.ln2 = NORMS[norm](c), NORMS[norm](c)
        self.attn = Attention(c, h, fused, sdpa)
        self.mlp = nn.Sequential(nn.Linear(c, 3 * c), ACTS[act](), nn.Linear(3 * c, c), nn.Dropout(0.1))

    def forward(self, x: Tensor) -> Tensor:
        if self.pre:
            x = x + self.attn(self.ln1(x))
            return x + self.mlp(self.ln2(x))
        x = self.ln1(x + self.attn(x))
        return self.ln2(x + self.mlp(x))


class GPT(nn.Module):
    def __init__(
        self,
        c: int = 16,
        h: int = 4,
        norm: str = "layer",
        act: str = "gelu",
        fused: bool = True,
        sdpa: bool = True,
        pre: bool = True,
        tied: bool = True,
        bias: bool = False,
        depth: int = 1,
    ) -> None:
        super().__init__()
        self.wte, self.wpe, self.drop = nn.Embedding(V, c), nn.Embedding(T, c), nn.Dropout(0.1)
        self.blocks = nn.ModuleList(Block(c, h, norm, act, fused, sdpa, pre) for _ in range(depth))
        self.ln_f = NORMS[norm](c) if pre else nn.Identity()
        self.head = nn.Linear(c, V, bias=bias)
        if tied:
            self.head.weight = self.wte.weight

    def forward(self, idx: Tensor) -> Tensor:
        x = self.drop(self.wte(idx) + self.wpe(torch.arange(idx.size(1), device=idx.device)))
        for block in self.blocks:
            x = block(x)
        return self.head(self.ln_f(x))


@entry(
    "gpt",
    {"depth": 2},
    {"tied": False, "fused": False, "sdpa": False},
    {"norm": "rms", "act": "silu", "fused": False},
    {"norm": "rms", "tied": False, "act": "relu"},
    {"norm": "rms-written", "sdpa": False},
    {"norm": "rms-square", "tied": False},
    {"norm": "layer-written"},
    {"norm": "layer-var", "tied": False},
    {"pre": False, "tied": False, "act": "relu"},
    {"pre": False, "norm": "rms", "depth": 2},
    {"bias": True},
    {"act": "sigmoid", "fused": False},
    {"act": "softplus", "pre": False, "tied": False, "norm": "layer-written"},
)
def gpt(**options: Any) -> Any:
    return GPT(**options), (tokens(2, 6),), (tokens(3, 9),)


def rotate_half(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


class Llama(nn.Module):
    """Grouped queries, half-split rotary, gated MLP, RMSNorm."""

    def __init__(self, groups: str = "expand", norm: str = "rms-written", qk_norm: str = "", tables: bool = False):
        super().__init__()
        c, self.h, self.kv, self.d = 16, 4, 2, 8
        self.groups, self.tables = groups, tables
        self.embed = nn.Embedding(V, c)
        self.norm1, self.norm2, self.norm3 = NORMS[norm](c), NORMS[norm](c), NORMS[norm](c)
        self.q = nn.Linear(c, self.h * self.d, bias=False)
        self.k = nn.Linear(c, self.kv * self.d, bias=False)
        self.v = nn.Linear(c, self.kv * self.d, bias=False)
        self.o = nn.Linear(self.h * self.d, c, bias=False)
        self.gate, self.up, self.down = (
            nn.Linear(c, 24, bias=False),
            nn.Linear(c, 24, bias=False),
            nn.Linear(24, c, bias=False),
        )
        self.q_norm = NORMS[qk_norm](self.d) if qk_norm else nn.Identity()
        self.k_norm = NORMS[qk_norm](self.d) if qk_norm else nn.Identity()
        self.head = nn.Linear(c, V, bias=False)
        inv = 1.0 / (100.0 ** (torch.arange(0, self.d, 2).double() / self.d))
        self.register_buffer("inv_freq", inv, persistent=False)
        if tables:
            freqs = torch.outer(torch.arange(T).double(), inv)
            both = torch.cat((freqs, freqs), dim=-1)
            self.register_buffer("cos_table", both.cos())
            self.register_buffer("sin_table", both.sin())

    def forward(self, idx: Tensor) -> Tensor:
        b, t = idx.shape
        x = self.embed(idx)
        n = self.norm1(x)
        q = self.q_norm(self.q(n).view(b, t, self.h, self.d)).transpose(1, 2)
        k = self.k_norm(self.k(n).view(b, t, self.kv, self.d)).transpose(1, 2)
        v = self.v(n).view(b, t, self.kv, self.d).transpose(1, 2)
        if self.tables:
            cos, sin = self.cos_table[:t], self.sin_table[:t]
        else:
            freqs = torch.outer(torch.arange(t, device=idx.device).to(self.inv_freq.dtype), self.inv_freq)
            both = torch.cat((freqs, freqs), dim=-1)
            cos, sin = both.cos(), both.sin()
        q, k = q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin
        g = self.h // self.kv
        if self.groups == "expand":
            k = k[:, :, None].expand(b, self.kv, g, t, self.d).reshape(b, self.h, t, self.d)
            v = v[:, :, None].expand(b, self.kv, g, t, self.d).reshape(b, self.h, t, self.d)
        elif self.groups == "repeat":
            k, v = k.repeat_interleave(g, dim=1), v.repeat_interleave(g, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.groups == "native")
        x = x + self.o(y.transpose(1, 2).reshape(b, t, self.h * self.d))
        n = self.norm2(x)
        x = x + self.down(F.silu(self.gate(n)) * self.up(n))
        return self.head(self.norm3(x))


@entry(
    "llama",
    {},
    {"groups": "repeat", "norm": "rms"},
    {"groups": "native"},
    {"qk_norm": "rms"},
    {"qk_norm": "layer", "norm": "layer"},
    {"tables": True},
)
def llama(**options: Any) -> Any:
    return Llama(**options), (tokens(2, 6),), (tokens(3, 9),)


class ViT(nn.Module):
    """Patches by convolution, class token, learned positions, QKV as (3, heads, width)."""

    def __init__(self, unbind: bool = True, pool: str = "token") -> None:
        super().__init__()
        c, self.h = 16, 4
        self.pool, self.unbind = pool, unbind
        self.patch = nn.Conv2d(3, c, 4, 4)
        self.cls = nn.Parameter(torch.zeros(1, 1, c))
        self.pos = nn.Parameter(torch.zeros(1, 5, c))
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(c), nn.LayerNorm(c), nn.LayerNorm(c)
        self.qkv, self.proj = nn.Linear(c, 3 * c), nn.Linear(c, c)
        self.fc1, self.fc2 = nn.Linear(c, 24), nn.Linear(24, c)
        self.scale1, self.scale2 = nn.Parameter(torch.ones(c) * 0.5), nn.Parameter(torch.ones(c) * 0.5)
        self.head = nn.Linear(c, 7)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patch(image).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls.expand(x.shape[0], -1, -1), x), dim=1) + self.pos
        b, n, c = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(b, n, 3, self.h, c // self.h).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0) if self.unbind else (qkv[0], qkv[1], qkv[2])
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c)
        x = x + self.scale1 * self.proj(y)
        x = x + self.scale2 * self.fc2(F.gelu(self.fc1(self.norm2(x))))
        x = self.norm3(x)
        return self.head(x[:, 0] if self.pool == "token" else x.mean(1))


@entry("vit", {}, {"unbind": False, "pool": "mean"})
def vit(**options: Any) -> Any:
    return ViT(**options), (floats(2, 3, 8, 8),), (floats(3, 3, 8, 8),)


class TorchAttention(nn.Module):
    def __init__(self, weights: bool = False) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(V, 16), nn.Linear(16, V)
        self.weights = weights
        self.attn = nn.MultiheadAttention(16, 4, batch_first=True)
        self.norm = nn.LayerNorm(16)

    def forward(self, idx: Tensor) -> Tensor:
        x = self.embed(idx)
        n = self.norm(x)
        return self.head(x + self.attn(n, n, n, need_weights=self.weights)[0])


@entry("multihead", {}, {"weights": True})
def multihead(**options: Any) -> Any:
    return TorchAttention(**options), (tokens(2, 6),), (tokens(3, 9),)


class EncoderLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(16, 4, 24, 0.1, batch_first=True, norm_first=True)
        self.embed, self.head = nn.Embedding(V, 16), nn.Linear(16, V)

    def forward(self, idx: Tensor) -> Tensor:
        return self.head(self.layer(self.embed(idx)))


@entry("encoder-layer")
def encoder_layer() -> Any:
    return EncoderLayer(), (tokens(2, 6),), (tokens(3, 9),)


class EinsumAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(V, 16), nn.Linear(16, V)
        self.wq = nn.Parameter(torch.randn(16, 4, 6) * 0.2)
        self.wk = nn.Parameter(torch.randn(16, 4, 6) * 0.2)
        self.wv = nn.Parameter(torch.randn(16, 4, 5) * 0.2)
        self.wo = nn.Parameter(torch.randn(4, 5, 16) * 0.2)
        self.temperature = nn.Parameter(torch.ones(4, 1, 1))
        self.norm = nn.LayerNorm(16)

    def forward(self, idx: Tensor) -> Tensor:
        x = self.embed(idx)
        n = self.norm(x)
        q, k, v = (torch.einsum("btc,chd->bhtd", n, w) for w in (self.wq, self.wk, self.wv))
        scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * self.temperature.exp() / 6**0.5
        y = torch.einsum("bhqk,bhkd->bqhd", scores.softmax(-1), v)
        return self.head(x + torch.einsum("bqhd,hdc->bqc", y, self.wo))


@entry("einsum-attention")
def einsum_attention() -> Any:
    return EinsumAttention(), (tokens(2, 6),), (tokens(3, 9),)


class BiasedAttention(nn.Module):
    """Per-head additive biases of several kinds: ALiBi slopes in a buffer, a learned table, a learned scale."""

    def __init__(self, kind: str = "alibi", sdpa: bool = True) -> None:
        super().__init__()
        c, self.h = 16, 4
        self.kind, self.sdpa = kind, sdpa
        self.embed, self.head, self.norm = nn.Embedding(V, c), nn.Linear(c, V), nn.LayerNorm(c)
        self.qkv, self.proj = nn.Linear(c, 3 * c), nn.Linear(c, c)
        self.register_buffer("slopes", torch.tensor([2.0**-i for i in range(4)]))
        self.table = nn.Embedding(2 * T, 4)
        self.logit_scale = nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, idx: Tensor) -> Tensor:
        b, t = idx.shape
        x = self.embed(idx)
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        q, k, v = (z.view(b, t, self.h, -1).transpose(1, 2) for z in (q, k, v))
        pos = torch.arange(t, device=idx.device)
        distance = pos[None, :] - pos[:, None]
        if self.kind == "computed":  # the slopes are made on the fly
            slopes = torch.pow(torch.tensor(0.5), torch.arange(self.h, device=idx.device)).to(x.dtype)
            bias = slopes.view(-1, 1, 1) * distance
        elif self.kind == "alibi":
            bias = self.slopes.view(-1, 1, 1) * distance
        elif self.kind == "table":
            bias = self.table(distance + T).permute(2, 0, 1)
        else:
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
            bias = torch.zeros(t, t, dtype=q.dtype, device=q.device)
            q = q * self.logit_scale.clamp(max=4.0).exp()
        if self.sdpa:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None] if bias.dim() == 3 else bias)
        else:
            y = F.softmax(q @ k.transpose(-1, -2) + bias, dim=-1) @ v
        return self.head(x + self.proj(y.transpose(1, 2).flatten(2)))


@entry(
    "biased",
    {},
    {"kind": "table"},
    {"kind": "table", "sdpa": False},
    {"kind": "alibi", "sdpa": False},
    {"kind": "computed"},
    {"kind": "cosine"},
    {"kind": "cosine", "sdpa": False},
)
def biased(**options: Any) -> Any:
    return BiasedAttention(**options), (tokens(2, 6),), (tokens(3, 9),)


# MLPs --------------------------------------------------------------------------------------------------------------


class MLP(nn.Module):
    def __init__(self, norm: str = "", act: str = "relu", residual: bool = False) -> None:
        super().__init__()
        sizes = [5, 12, 12, 12, 3] if residual else [5, 8, 12, 6, 3]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        kinds: dict[str, Callable[[int], nn.Module]] = {**NORMS, "batch": nn.BatchNorm1d, "": lambda n: nn.Identity()}
        self.norms = nn.ModuleList(kinds[norm](n) for n in sizes[1:-1])
        self.act, self.residual, self.drop = ACTS[act](), residual, nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norms[0](self.layers[0](x)))
        for layer, norm in zip(list(self.layers)[1:-1], list(self.norms)[1:], strict=True):
            y = self.drop(self.act(norm(layer(x))))
            x = x + y if self.residual else y
        return self.layers[-1](x)


@entry(
    "mlp",
    {},
    {"norm": "layer", "act": "gelu"},
    {"norm": "batch", "act": "tanh"},
    {"norm": "layer", "residual": True},
    {"norm": "batch", "residual": True, "act": "silu"},
    {"act": "sigmoid", "residual": True},
    {"norm": "rms", "act": "sigmoid"},
)
def mlp(**options: Any) -> Any:
    return MLP(**options), (floats(24, 5),), (floats(7, 5),)


# convolutions ------------------------------------------------------------------------------------------------------


def conv(i: int, o: int, k: int = 3, s: int = 1, g: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(i, o, k, s, k // 2, groups=g, bias=False), nn.BatchNorm2d(o), nn.ReLU())


class CNN(nn.Module):
    def __init__(self, pool: str = "max", flatten: bool = True) -> None:
        super().__init__()
        self.features = nn.Sequential(conv(3, 6), nn.Conv2d(6, 8, 3, padding=1), nn.ReLU())
        self.pool: nn.Module = {
            "max": nn.MaxPool2d(2),
            "avg": nn.AvgPool2d(2),
            "adaptive": nn.AdaptiveAvgPool2d(4),
        }[pool]
        self.fc1, self.fc2 = nn.Linear(8 * 16 if flatten else 8, 10), nn.Linear(10, 4)
        self.flatten = flatten

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.features(x))
        x = torch.flatten(x, 1) if self.flatten else x.mean((2, 3))
        return self.fc2(F.dropout(F.relu(self.fc1(x)), 0.2, self.training))


@entry("cnn", {}, {"pool": "avg"}, {"pool": "adaptive", "flatten": False})
def cnn(**options: Any) -> Any:
    return CNN(**options), (floats(12, 3, 8, 8),), (floats(3, 3, 8, 8),)


class SqueezeExcite(nn.Module):
    def __init__(self, c: int, r: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(c, r, 1), nn.Conv2d(r, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))))


class ResNet(nn.Module):
    """A stem, a residual block with a projection, depth-wise and grouped convolutions, a concatenated skip."""

    def __init__(self, kind: str = "plain") -> None:
        super().__init__()
        self.kind = kind
        self.stem = conv(3, 8)
        groups = {"depthwise": 8, "grouped": 2}.get(kind, 1)
        self.a = conv(8, 8, g=groups)
        self.b = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.se = SqueezeExcite(8, 4) if kind == "se" else nn.Identity()
        self.down = conv(16 if kind == "cat" else 8, 12, s=2)
        self.short = nn.Conv2d(16 if kind == "cat" else 8, 12, 1, 2)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.se(self.b(self.a(x)))
        x = torch.cat((x, y), 1) if self.kind == "cat" else F.relu(x + y)
        x = self.down(x) + self.short(x)
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


@entry("resnet", {}, {"kind": "depthwise"}, {"kind": "grouped"}, {"kind": "se"}, {"kind": "cat"})
def resnet(**options: Any) -> Any:
    return ResNet(**options), (floats(12, 3, 8, 8),), (floats(3, 3, 8, 8),)


class InvertedResidual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 6)
        self.expand, self.depth = conv(6, 12, 1), conv(12, 12, g=12)
        self.project = nn.Sequential(nn.Conv2d(12, 6, 1, bias=False), nn.BatchNorm2d(6))
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.project(self.depth(self.expand(x)))
        return self.fc(x.mean([2, 3]))


@entry("inverted-residual")
def inverted_residual() -> Any:
    return InvertedResidual(), (floats(2, 3, 8, 8),), (floats(3, 3, 8, 8),)


class GroupNormNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c1, self.n1 = nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(4, 8)
        self.c2, self.n2 = nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(2, 8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.n1(self.c1(x)))
        return self.fc(F.silu(self.n2(self.c2(x))).mean((2, 3)))


@entry("group-norm")
def group_norm() -> Any:
    return GroupNormNet(), (floats(2, 3, 8, 8),), (floats(3, 3, 8, 8),)


class ConvNeXt(nn.Module):
    """Depth-wise convolution, channels-last LayerNorm, layer scale."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 2, 2)
        self.dw, self.norm = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.LayerNorm(8)
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 8)
        self.gamma = nn.Parameter(torch.full((8,), 0.3))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(self.dw(x).permute(0, 2, 3, 1))
        y = self.gamma * self.fc2(F.gelu(self.fc1(y)))
        x = x + y.permute(0, 3, 1, 2)
        return self.head(x.mean([-2, -1]))


@entry("convnext")
def convnext() -> Any:
    return ConvNeXt(), (floats(2, 3, 8, 8),), (floats(3, 3, 8, 8),)


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.d1, self.d2 = conv(3, 4), conv(4, 6)
        self.up = nn.ConvTranspose2d(6, 4, 2, 2)
        self.u1 = conv(8, 5)
        self.time = nn.Linear(4, 6)
        self.out = nn.Conv2d(5, 2, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        a = self.d1(x)
        b = self.d2(F.max_pool2d(a, 2)) + self.time(t)[:, :, None, None]
        return self.out(self.u1(torch.cat([self.up(b), a], dim=1)))


@entry("unet")
def unet() -> Any:
    return UNet(), (floats(2, 3, 8, 8), floats(2, 4)), (floats(3, 3, 8, 8), floats(3, 4))


# one module, several uses ------------------------------------------------------------------------------------------


class Siamese(nn.Module):
    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(5, 8), nn.LayerNorm(8) if norm else nn.Identity(), nn.ReLU(), nn.Linear(8, 6)
        )
        self.head = nn.Linear(12, 1)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        a, b = self.encoder(a), self.encoder(b)
        return self.head(torch.cat((a, b), dim=-1)) + (a * b).sum(-1, keepdim=True)


@entry("siamese", {}, {"norm": False})
def siamese(**options: Any) -> Any:
    return Siamese(**options), (floats(3, 5), floats(3, 5)), (floats(4, 5), floats(4, 5))


class Repeated(nn.Module):
    """One block called three times, and a weight used both ways round."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.fc1, self.fc2 = nn.Linear(5, 8), nn.Linear(8, 12), nn.Linear(12, 8)
        self.norm, self.out = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        for _ in range(3):
            x = x + self.fc2(F.gelu(self.fc1(self.norm(x))))
        return self.out(x)


@entry("repeated")
def repeated() -> Any:
    return Repeated(), (floats(3, 5),), (floats(4, 5),)


class AutoEncoder(nn.Module):
    """Decoder weights are the encoder's, transposed: every weight writes and reads."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Parameter(torch.randn(8, 5)), nn.Parameter(torch.randn(6, 8))
        self.b1, self.b2 = nn.Parameter(torch.zeros(8)), nn.Parameter(torch.zeros(6))
        self.c1 = nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        z = F.linear(torch.tanh(F.linear(x, self.w1, self.b1)), self.w2, self.b2)
        return F.linear(torch.tanh(F.linear(z, self.w2.t(), self.c1)), self.w1.t())


@entry("autoencoder")
def autoencoder() -> Any:
    return AutoEncoder(), (floats(3, 5),), (floats(4, 5),)


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.n1, self.n2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.t1, self.t2 = nn.Linear(4, 6), nn.Linear(6, 4)
        self.c1, self.c2 = nn.Linear(8, 12), nn.Linear(12, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.t2(F.gelu(self.t1(self.n1(x).transpose(1, 2)))).transpose(1, 2)
        x = x + self.c2(F.gelu(self.c1(self.n2(x))))
        return self.head(x.mean(1))


@entry("mixer")
def mixer() -> Any:
    return Mixer(), (floats(2, 4, 5),), (floats(3, 4, 5),)


class CrossAttention(nn.Module):
    """Learned queries read a sequence; query and memory have streams of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.queries = nn.Embedding(V, 12), nn.Parameter(torch.randn(3, 8))
        self.q, self.kv, self.o = nn.Linear(8, 8), nn.Linear(12, 16), nn.Linear(8, 8)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, idx: Tensor) -> Tensor:
        memory = self.embed(idx)
        b, t = idx.shape
        q = self.queries.unsqueeze(0).expand(b, -1, -1)
        k, v = self.kv(memory).chunk(2, -1)
        qh = self.q(q).view(b, 3, 2, 4).transpose(1, 2)
        kh, vh = (z.view(b, t, 2, 4).transpose(1, 2) for z in (k, v))
        y = F.scaled_dot_product_attention(qh, kh, vh).transpose(1, 2).reshape(b, 3, 8)
        return self.head(self.norm(q + self.o(y)).mean(1))


@entry("cross-attention")
def cross_attention() -> Any:
    return CrossAttention(), (tokens(2, 6),), (tokens(3, 9),)
