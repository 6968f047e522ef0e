"""Classes as people write them: sizes kept in configs and attributes, literals in ``forward``, methods beside it."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.families import Example, Maker
from benchmarks.families.plain import V, _floats, _images, _language, _pairs, _tokens
from examples.gpt import model as gpt
from examples.nanogpt import model as nanogpt


class Written(nn.Module):
    """Attention written out: a buffer for the mask, the scale by a size of the tensor, widths written as numbers."""

    def __init__(self, width: int = 24, heads: int = 3, length: int = 16) -> None:
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.embed, self.place = nn.Embedding(V, width), nn.Parameter(torch.zeros(1, length, width))
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.out, self.norm = nn.Linear(width, width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 40), nn.Linear(40, width)
        self.head = nn.Linear(width, V)
        self.register_buffer("mask", torch.ones(length, length).tril()[None, None], persistent=False)

    def forward(self, idx: Tensor) -> Tensor:
        B, T = idx.shape
        x = self.embed(idx) + self.place[:, :T]
        h = self.norm(x)
        q, k, v = (f(h).reshape(B, T, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        scores = (q @ k.transpose(-1, -2)) * self.scale
        scores = scores.masked_fill(self.mask[:, :, :T, :T] == 0, float("-inf"))
        x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, -1))
        return self.head(x + self.down(F.relu(self.up(x)).square()))  # type: ignore[no-any-return]


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class GroupedBlock(nn.Module):
    """Grouped-query attention with rotary positions and a gated MLP, sizes in attributes."""

    def __init__(self, width: int, heads: int, kv_heads: int, head_dim: int, hidden: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.wq, self.wo = (
            nn.Linear(width, heads * head_dim, bias=False),
            nn.Linear(heads * head_dim, width, bias=False),
        )
        self.wk, self.wv = (nn.Linear(width, kv_heads * head_dim, bias=False) for _ in range(2))
        self.w1, self.w3 = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.w2 = nn.Linear(hidden, width, bias=False)
        self.norm1, self.norm2 = RMSNorm(width), RMSNorm(width)

    def _turned(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a, b = x[..., : self.head_dim // 2], x[..., self.head_dim // 2 :]
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        B, T, _ = x.shape
        h = self.norm1(x)
        q = self.wq(h).view(B, T, self.heads, self.head_dim).transpose(1, 2)
        k = self.wk(h).view(B, T, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.wv(h).view(B, T, self.kv_heads, self.head_dim).transpose(1, 2)
        q, k = self._turned(q, cos, sin), self._turned(k, cos, sin)
        k, v = (y.repeat_interleave(self.heads // self.kv_heads, dim=1) for y in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.wo(y.transpose(1, 2).reshape(B, T, self.heads * self.head_dim))
        h = self.norm2(x)
        return x + self.w2(F.silu(self.w1(h)) * self.w3(h))  # type: ignore[no-any-return]


class Grouped(nn.Module):
    """A language model of Llama's shape, written by hand."""

    def __init__(self, width: int = 32, head_dim: int = 8) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.embed = nn.Embedding(V, width)
        self.layers = nn.ModuleList(GroupedBlock(width, 4, 2, head_dim, 48) for _ in range(2))
        self.norm, self.output = RMSNorm(width), nn.Linear(width, V, bias=False)

    def forward(self, idx: Tensor) -> Tensor:
        x = self.embed(idx)
        half = torch.arange(self.head_dim // 2, device=idx.device, dtype=x.dtype)
        angles = torch.arange(idx.shape[1], device=idx.device)[:, None] * 100.0 ** (-half / (self.head_dim // 2))
        for layer in self.layers:
            x = layer(x, angles.cos(), angles.sin())
        return self.output(self.norm(x))  # type: ignore[no-any-return]


class Experts(nn.Module):
    """A dense mixture: every expert runs, the router's softmax weighs them."""

    def __init__(self, width: int = 16, hidden: int = 24, experts: int = 3) -> None:
        super().__init__()
        self.embed, self.router = nn.Embedding(V, width), nn.Linear(width, experts)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)) for _ in range(experts)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, V)

    def forward(self, idx: Tensor) -> Tensor:
        x = self.embed(idx)
        weights = self.router(self.norm(x)).softmax(-1)
        mixed = torch.stack([expert(x) for expert in self.experts], -1) @ weights.unsqueeze(-1)
        return self.head(x + mixed.squeeze(-1))  # type: ignore[no-any-return]


class EncoderOnly(nn.Module):
    """``nn.TransformerEncoder`` over tokens, classified by their mean."""

    def __init__(self, width: int = 32, norm_first: bool = True) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 4, 48, batch_first=True, norm_first=norm_first, activation="gelu")
        self.embed = nn.Embedding(V, width)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.scale, self.head = math.sqrt(width), nn.Linear(width, 5)

    def forward(self, idx: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(idx) * self.scale).mean(1))  # type: ignore[no-any-return]


class Tagger(nn.Module):
    """A recurrent classifier with a layer norm and a head of its own width."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.embed, self.rnn = nn.Embedding(V, 12), getattr(nn, kind)(12, 20, 2, batch_first=True, dropout=0.1)
        self.norm, self.up, self.head = nn.LayerNorm(20), nn.Linear(20, 28), nn.Linear(28, 6)

    def forward(self, idx: Tensor) -> Tensor:
        return self.head(torch.tanh(self.up(self.norm(self.rnn(self.embed(idx))[0]))))  # type: ignore[no-any-return]


class Autoencoder(nn.Module):
    """Fully connected, with batch norms and a narrow code."""

    def __init__(self, inputs: int = 20, hidden: int = 32, code: int = 6) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(inputs, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, code)
        )
        self.decoder = nn.Sequential(
            nn.Linear(code, hidden), nn.LayerNorm(hidden), nn.SiLU(), nn.Linear(hidden, inputs)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))  # type: ignore[no-any-return]


class Mixer(nn.Module):
    """MLP-Mixer (Tolstikhin 2021)."""

    def __init__(self, width: int = 16, patches: int = 16, blocks: int = 2) -> None:
        super().__init__()
        self.width = width
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.blocks = nn.ModuleList(MixerBlock(width, patches) for _ in range(blocks))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).reshape(x.shape[0], self.width, -1).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))  # type: ignore[no-any-return]


class MixerBlock(nn.Module):
    def __init__(self, width: int, patches: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.tokens = nn.Sequential(nn.Linear(patches, 24), nn.GELU(), nn.Linear(24, patches))
        self.channels = nn.Sequential(nn.Linear(width, 40), nn.GELU(), nn.Linear(40, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))  # type: ignore[no-any-return]


class ViT(nn.Module):
    """A vision transformer with a class token, its attention by ``nn.MultiheadAttention``."""

    def __init__(self, width: int = 32, patch: int = 4, size: int = 16) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, patch, patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.place = nn.Parameter(torch.zeros(1, (size // patch) ** 2 + 1, width))
        self.blocks = nn.ModuleList(ViTBlock(width) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.place
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, 0]))  # type: ignore[no-any-return]


class ViTBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 48), nn.GELU(), nn.Linear(48, width))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class Residual(nn.Module):
    """ResNet's basic block."""

    def __init__(self, i: int, o: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o)
        self.conv2, self.bn2 = nn.Conv2d(o, o, 3, 1, 1, bias=False), nn.BatchNorm2d(o)
        self.down = nn.Sequential()
        if stride != 1 or i != o:
            self.down = nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False), nn.BatchNorm2d(o))

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(h)) + self.down(x))


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.layer1 = nn.Sequential(Residual(8, 8), Residual(8, 8))
        self.layer2 = nn.Sequential(Residual(8, 16, 2), Residual(16, 16))
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(self.layer2(self.layer1(self.stem(x))), 1), 1))  # type: ignore[no-any-return]


class VGG(nn.Module):
    """A chain of convolutions, flattened into a classifier whose first width is channels × positions."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        )
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.classifier = nn.Sequential(nn.Linear(16 * 4, 24), nn.ReLU(), nn.Dropout(0.1), nn.Linear(24, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.pool(self.features(x)).flatten(1))  # type: ignore[no-any-return]


class Inverted(nn.Module):
    """MobileNet's inverted residual: ``groups`` is a width."""

    def __init__(self, n: int, wide: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(n, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6()),
            *(nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.ReLU6()),
            *(nn.Conv2d(wide, n, 1, bias=False), nn.BatchNorm2d(n)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)  # type: ignore[no-any-return]


class ConvNeXtBlock(nn.Module):
    """A depthwise convolution, a layer norm over channels last, and a learned scale."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(n, n, 3, padding=1, groups=n), nn.LayerNorm(n, eps=1e-6)
        self.up, self.down, self.gamma = nn.Linear(n, 3 * n), nn.Linear(3 * n, n), nn.Parameter(torch.full((n,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + (self.gamma * self.down(F.gelu(self.up(h)))).permute(0, 3, 1, 2)


def _chain(*blocks: nn.Module, n: int) -> nn.Module:
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(n, 5)]
    return nn.Sequential(nn.Conv2d(3, n, 4, 4), nn.BatchNorm2d(n), nn.Sequential(*blocks), *head)


def _gpt(**options: Any) -> Example:
    config = gpt.GPTConfig(block_size=24, vocab_size=V, n_layer=2, n_head=4, n_embd=32, **options)
    model = gpt.GPT(config)
    return Example(model, {}, {}, (_tokens(2, 7), _tokens(2, 7)), (_tokens(3, 9), _tokens(3, 9)))


def _nanogpt(targets: bool = True, **options: Any) -> Example:
    """One width in the config ties the stream, the MLP and heads × head width."""
    model = nanogpt.GPT(nanogpt.GPTConfig(block_size=24, vocab_size=V, n_layer=2, n_head=4, n_embd=32, **options))
    inputs, other = ((_tokens(2, 7),) * (1 + targets), (_tokens(3, 9),) * (1 + targets))
    return Example(model, {}, {}, inputs, other)


FAMILIES: dict[str, dict[str, Maker]] = {
    "": {
        "examples.gpt": _gpt,
        "examples.gpt-written": lambda: _gpt(flash=False, bias=False),
        "examples.nanogpt": _nanogpt,
        "examples.nanogpt-dropout": lambda: _nanogpt(dropout=0.1, bias=False),
        "examples.nanogpt-logits": lambda: _nanogpt(targets=False),
        "written-attention": lambda: _language(Written()),
        "grouped-queries": lambda: _language(Grouped()),
        "experts": lambda: _language(Experts()),
        "nn.TransformerEncoder": lambda: _language(EncoderOnly()),
        "nn.TransformerEncoder-post": lambda: _language(EncoderOnly(norm_first=False)),
        "lstm-tagger": lambda: _language(Tagger("LSTM")),
        "gru-tagger": lambda: _language(Tagger("GRU")),
        "autoencoder": lambda: _pairs(Autoencoder(), (_floats(6, 20),), (_floats(5, 20),)),
        "mlp-mixer": lambda: Example(Mixer(), {}, {}, (_floats(2, 3, 16, 16),), (_floats(3, 3, 16, 16),)),
        "vit": lambda: Example(ViT(), {}, {}, (_floats(2, 3, 16, 16),), (_floats(3, 3, 16, 16),)),
        "resnet": lambda: _images(ResNet()),
        "vgg": lambda: _images(VGG()),
        "mobilenet": lambda: _images(_chain(Inverted(8, 24), Inverted(8, 24), n=8)),
        "convnext": lambda: _images(_chain(ConvNeXtBlock(8), ConvNeXtBlock(8), n=8)),
        "mlp": lambda: _pairs(
            nn.Sequential(
                nn.Linear(10, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 3)
            ),
            (_floats(4, 10),),
            (_floats(3, 10),),
        ),
    }
}
