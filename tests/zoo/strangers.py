"""Designs from outside the listed families: graphs, sets, generators, spectral layers, routers, weights with a norm.

Each is a function of ``(module, *inputs)``; its parameters, modules and buffers (names with ``buf``) are keywords.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .adversarial import Fn
from .zoo import Example, Maker, floats, trained

STRANGERS: dict[str, Maker] = {}
L, R = nn.Linear, torch.randn
Inputs = Callable[[int], tuple[Tensor, ...]]


class Two(Fn):
    def forward(self, x: Tensor, w: Tensor) -> Any:  # type: ignore[override]
        return self.f(self, x, w)


def add(name: str, f: Callable[..., Any], inputs: Inputs, **members: Callable[[], Any]) -> None:
    """``inputs(n)`` makes the inputs of a batch of n, ``members`` make parameters, buffers and modules."""

    def make() -> Example:
        torch.manual_seed(0)
        examples = inputs(6), inputs(4)
        made = {k: v() for k, v in members.items()}
        model = (Fn if len(examples[0]) == 1 else Two)(f, **made)
        return Example(trained(model), *examples)

    STRANGERS[name] = make


def flat(n: int) -> tuple[Tensor, ...]:
    return (floats(n, 5),)


def image(n: int) -> tuple[Tensor, ...]:
    return (floats(n, 3, 8, 8),)


def steps(n: int) -> tuple[Tensor, ...]:
    return (floats(n, 7, 5),)


def edges(n: int) -> tuple[Tensor, ...]:
    return floats(n, 5), torch.randint(0, n, (2, n + 5))


# messages between nodes --------------------------------------------------------------------------------------------


def _index_add(s: Any, x: Tensor, e: Tensor) -> Tensor:
    h = s.a(x)
    for layer in (s.b, s.c):
        h = F.relu(torch.zeros_like(h).index_add(0, e[1], h[e[0]]) + layer(h))
    return s.o(h)


def _scatter_add(s: Any, x: Tensor, e: Tensor) -> Tensor:
    h = s.a(x)
    where = e[1][:, None].expand(-1, h.shape[1])
    return s.o(F.relu(torch.zeros_like(h).scatter_add_(0, where, h.index_select(0, e[0])) + h))


def _scatter_mean(s: Any, x: Tensor, e: Tensor) -> Tensor:
    h = s.a(x)
    where = e[1][:, None].expand(-1, h.shape[1])
    return s.o(F.relu(torch.zeros_like(h).scatter_reduce(0, where, h[e[0]], "mean") + h))


def _index_put(s: Any, x: Tensor, e: Tensor) -> Tensor:
    h = s.a(x)
    return s.o(F.relu(torch.zeros_like(h).index_put((e[1],), h[e[0]], accumulate=True) + h))


for _name, _f in {
    "graph-index-add": _index_add,
    "graph-scatter-add": _scatter_add,
    "graph-scatter-mean": _scatter_mean,
    "graph-index-put": _index_put,
}.items():
    more = {"b": lambda: L(8, 8), "c": lambda: L(8, 8)} if _f is _index_add else {}
    add(_name, _f, edges, a=lambda: L(5, 8), o=lambda: L(8, 3), **more)


def _router(s: Any, x: Tensor) -> Tensor:
    h = s.a(x)
    gate = s.g(h).softmax(-1)
    value, index = gate.topk(2, -1)
    gate = torch.zeros_like(gate).scatter(-1, index, value)
    y = torch.bmm(F.gelu(torch.einsum("bi,eih->ebh", h, s.u)), s.d)
    return s.o(h + torch.einsum("ebh,be->bh", y, gate))


add(
    "router",
    _router,
    flat,
    a=lambda: L(5, 8),
    g=lambda: L(8, 4),
    u=lambda: R(4, 8, 6),
    d=lambda: R(4, 6, 8),
    o=lambda: L(8, 3),
)
for _mode in ("sum", "mean", "max"):
    add(
        f"embedding-bag-{_mode}",
        lambda s, x: s.o(F.gelu(s.h(s.e(x)))),
        lambda n: (torch.randint(0, 10, (n, 6)),),
        e=lambda mode=_mode: nn.EmbeddingBag(10, 8, mode=mode),
        h=lambda: L(8, 6),
        o=lambda: L(6, 3),
    )


# weights with a norm of their own ----------------------------------------------------------------------------------

_weight_norm = nn.utils.parametrizations.weight_norm
add(
    "weight-norm",
    lambda s, x: s.o(F.relu(s.b(F.relu(s.a(x)[..., :-2]))).mean(-1)),
    lambda n: (floats(n, 3, 9),),
    a=lambda: _weight_norm(nn.Conv1d(3, 8, 2, padding=2, dilation=2)),
    b=lambda: _weight_norm(nn.Conv1d(8, 6, 2)),
    o=lambda: L(6, 3),
)
add(
    "weight-norm-kernel",
    lambda s, x: s.o(F.gelu(s.b(s.a(x))).mean(-1)),
    lambda n: (floats(n, 3, 9),),
    a=lambda: nn.Conv1d(3, 8, 1),
    b=lambda: _weight_norm(nn.Conv1d(8, 8, 3, groups=2), dim=2),
    o=lambda: L(8, 3),
)


def _modulated(s: Any, x: Tensor, w: Tensor) -> Tensor:
    """A weight per sample, as groups of one convolution; the input ``w`` beside the parameter ``W``."""
    h = s.i(x)
    n = h.shape[0]
    weight = s.W[None] * (s.style(w) + 1)[:, None, :, None, None]
    weight = weight * torch.rsqrt(weight.pow(2).sum((2, 3, 4), keepdim=True) + 1e-8)
    h = F.conv2d(h.reshape(1, -1, 8, 8), weight.reshape(-1, 8, 3, 3), padding=1, groups=n)
    return s.o(F.leaky_relu(h.reshape(n, 12, 8, 8), 0.2))


add(
    "modulated-convolution",
    _modulated,
    lambda n: (floats(n, 3, 8, 8), floats(n, 6)),
    i=lambda: nn.Conv2d(3, 8, 1),
    W=lambda: R(12, 8, 3, 3),
    style=lambda: L(6, 8),
    o=lambda: nn.Conv2d(12, 3, 1),
)


def _fake_quantised(s: Any, x: Tensor) -> Tensor:
    def round_(t: Tensor) -> Tensor:
        scale = t.detach().abs().max() / 127
        return t + (torch.clamp(torch.round(t / scale), -128, 127) * scale - t).detach()

    return F.linear(round_(F.relu(F.linear(x, round_(s.a.weight), s.a.bias))), round_(s.b.weight), s.b.bias)


add("fake-quantised", _fake_quantised, flat, a=lambda: L(5, 8), b=lambda: L(8, 3))


# distances and statistics ------------------------------------------------------------------------------------------

add(
    "cosine",
    lambda s, x: F.cosine_similarity(s.a(x), s.b(torch.tanh(s.c(x))), dim=-1),
    flat,
    a=lambda: L(5, 8),
    b=lambda: L(6, 8),
    c=lambda: L(5, 6),
)
add("prototypes", lambda s, x: torch.cdist(s.a(x), s.p), flat, a=lambda: L(5, 8), p=lambda: R(4, 8))
add(
    "unbiased-deviation",
    lambda s, x: (lambda h: s.o(s.g * (h - h.mean(-1, keepdim=True)) / (h.std(-1, keepdim=True) + 1e-5)))(s.a(x)),
    flat,
    a=lambda: L(5, 8),
    g=lambda: R(8),
    o=lambda: L(8, 3),
)
add(
    "unbiased-variance",
    lambda s, x: (lambda h: s.o(h * h.var(-1, keepdim=True)) + h.view(-1, 2, 4).var((1, 2))[:, None])(s.a(x)),
    flat,
    a=lambda: L(5, 8),
    o=lambda: L(8, 3),
)
add(
    "pooled-statistics",
    lambda s, x: (lambda h: s.o(torch.cat([h.mean(1), h.std(1), h.max(1).values, h.logsumexp(1)], -1)))(s.a(x)),
    steps,
    a=lambda: L(5, 8),
    o=lambda: L(32, 3),
)


def _adaptive_instance_norm(s: Any, x: Tensor, w: Tensor) -> Tensor:
    gain, bias = s.m(w).view(-1, 2, 8, 1, 1).unbind(1)
    return s.o(s.n2(F.relu(s.n(s.c(x)) * (gain + 1) + bias)))


add(
    "instance-norm",
    _adaptive_instance_norm,
    lambda n: (floats(n, 3, 8, 8), floats(n, 6)),
    c=lambda: nn.Conv2d(3, 8, 3),
    n=lambda: nn.InstanceNorm2d(8),
    n2=lambda: nn.InstanceNorm2d(8, affine=True),
    m=lambda: L(6, 16),
    o=lambda: nn.Conv2d(8, 3, 1),
)


# sets, attention ---------------------------------------------------------------------------------------------------


def _heads_in_the_batch(s: Any, x: Tensor) -> Tensor:
    """Heads laid end to end along the batch, and taken apart again."""
    n = x.size(0)
    q, k, v = (torch.cat(layer(x).split(4, 2), 0) for layer in (s.q, s.k, s.v))
    a = torch.softmax(q.bmm(k.transpose(1, 2)) / 2, 2)
    return s.o(torch.cat((q + a.bmm(v)).split(n, 0), 2))


add("heads-in-the-batch", _heads_in_the_batch, steps, **{k: lambda: L(5, 8) for k in "qkv"}, o=lambda: L(8, 3))


def _complex_rotary(s: Any, x: Tensor) -> Tensor:
    """Rotary embeddings as complex numbers on a part of the head width, assembled in memory that was not set."""
    n, t, _ = x.shape
    angle = torch.arange(t)[:, None] * torch.tensor([1.0, 0.1])
    turn = torch.polar(torch.ones_like(angle), angle).to(torch.complex128)

    def turned(h: Tensor) -> Tensor:
        plain, rotated = h.split([4, 4], -1)
        rotated = torch.view_as_complex(rotated.reshape(*rotated.shape[:-1], 2, 2)) * turn[None, :, None]
        out = h.new_empty(h.shape)
        out[..., :4] = plain
        out[..., 4:] = torch.view_as_real(rotated).flatten(-2)
        return out.transpose(1, 2)

    q, k = (turned(layer(x).view(n, t, 2, 8)) for layer in (s.q, s.k))
    v = s.v(x).view(n, t, 2, 4).transpose(1, 2)
    return s.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


add(
    "complex-rotary",
    _complex_rotary,
    steps,
    q=lambda: L(5, 16),
    k=lambda: L(5, 16),
    v=lambda: L(5, 8),
    o=lambda: L(8, 3),
)


def _written_then_split(s: Any, x: Tensor) -> Tensor:
    h = s.a(x)
    h.add_(s.bias)
    gate, up = h.chunk(2, -1)
    return s.o(F.silu(gate) * up)


add("written-then-split", _written_then_split, flat, a=lambda: L(5, 12), bias=lambda: R(12), o=lambda: L(6, 3))


# images, spectra, scans --------------------------------------------------------------------------------------------


def _patches(s: Any, x: Tensor) -> Tensor:
    h = F.unfold(s.i(x), 2, stride=2).transpose(1, 2)
    return s.o(F.fold(s.b(F.gelu(s.a(h))).transpose(1, 2), (8, 8), 2, stride=2))


add(
    "patches",
    _patches,
    image,
    i=lambda: nn.Conv2d(3, 4, 1),
    a=lambda: L(16, 12),
    b=lambda: L(12, 16),
    o=lambda: nn.Conv2d(4, 2, 1),
)
add(
    "pixel-shuffle",
    lambda s, x: s.o(F.pixel_unshuffle(F.relu(F.pixel_shuffle(s.a(x), 2)), 2)),
    image,
    a=lambda: nn.Conv2d(3, 16, 3, padding=1),
    o=lambda: nn.Conv2d(16, 2, 1),
)
add(
    "channel-shuffle",
    lambda s, x: s.o(s.c(F.channel_shuffle(F.relu(s.b(s.a(x))), 2))),
    image,
    a=lambda: nn.Conv2d(3, 8, 1),
    b=lambda: nn.Conv2d(8, 8, 3, groups=2),
    c=lambda: nn.Conv2d(8, 6, 1, groups=2),
    o=lambda: nn.Conv2d(6, 2, 1),
)


def _sampled(s: Any, x: Tensor) -> Tensor:
    h = s.a(x)
    return s.o(F.grid_sample(h, torch.tanh(s.b(h)).permute(0, 2, 3, 1), align_corners=True))


add(
    "sampled", _sampled, image, a=lambda: nn.Conv2d(3, 6, 1), b=lambda: nn.Conv2d(6, 2, 1), o=lambda: nn.Conv2d(6, 2, 1)
)


def _fourier(s: Any, x: Tensor) -> Tensor:
    h = s.p(x)
    modes = torch.einsum("bix,iox->box", torch.fft.rfft(h)[..., :4], torch.complex(s.wr, s.wi))
    return s.q(F.gelu(torch.fft.irfft(F.pad(modes, (0, 5)), n=16) + s.w(h)))


add(
    "fourier",
    _fourier,
    lambda n: (floats(n, 2, 16),),
    p=lambda: nn.Conv1d(2, 8, 1),
    wr=lambda: R(8, 8, 4),
    wi=lambda: R(8, 8, 4),
    w=lambda: nn.Conv1d(8, 8, 1),
    q=lambda: nn.Conv1d(8, 2, 1),
)


def _log_scan(s: Any, x: Tensor) -> Tensor:
    k = s.z(x)
    keep = (-F.softplus(k)).cumsum(1)
    return s.o((keep + torch.logcumsumexp(F.logsigmoid(s.h(x)) - F.softplus(-k) - keep, 1)).exp())


add("log-scan", _log_scan, steps, z=lambda: L(5, 8), h=lambda: L(5, 8), o=lambda: L(8, 3))


def _capsules(s: Any, x: Tensor) -> Tensor:
    """Where a dim is dynamic by accident of the capture, what stands beside it grows all the same."""
    u = s.c(x)
    u = u.view(x.shape[0], 4, 2, 9).permute(0, 1, 3, 2).reshape(x.shape[0], 36, 2)
    votes = torch.einsum("bni,nkoi->bnko", u, s.W)
    share = torch.zeros_like(votes[..., 0]).softmax(2)
    return torch.tanh((share[..., None] * votes).sum(1)).square().sum(-1)


add("capsules", _capsules, image, c=lambda: nn.Conv2d(3, 8, 3, stride=2), W=lambda: R(36, 3, 5, 2) * math.sqrt(0.1))
add(
    "thirds",
    lambda s, x: (lambda p: s.o(p[0] * torch.sigmoid(p[1]) + p[2]))(torch.tensor_split(s.a(x), 3, -1)),
    flat,
    a=lambda: L(5, 12),
    o=lambda: L(4, 3),
)


def _positions_per_head(s: Any, x: Tensor) -> Tensor:
    """An index is broadcast over (batch x heads), a size that is computed from the batch while the model runs."""
    n, t, _ = x.shape
    q, v = (layer(x).view(n, t, 2, 4).transpose(1, 2).reshape(-1, t, 4) for layer in (s.q, s.v))
    table = s.k(s.e[None]).view(1, 3, 2, 4).transpose(1, 2).reshape(-1, 3, 4).repeat(n, 1, 1)
    where = torch.arange(t)
    where = (where[:, None] - where).clamp(-1, 1) + 1
    a = torch.gather(q @ table.transpose(1, 2), -1, where.expand(q.size(0), t, t))
    y = torch.tanh(a).bmm(v).view(n, 2, t, 4).transpose(1, 2)
    return s.o(y.reshape(n, t, -1))


add(
    "positions-per-head",
    _positions_per_head,
    steps,
    **{k: lambda: L(5, 8) for k in "qkv"},
    e=lambda: R(3, 5),
    o=lambda: L(8, 3),
)
