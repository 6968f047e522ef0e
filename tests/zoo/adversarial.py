"""Models made to trip the compiler: one weight in two roles, weights that are transformed, sums over part of a dim,
values written in place, sizes that coincide by chance, buffers that vary along an axis, and every op used oddly.

Each is a function of ``(module, input)``; its parameters, modules and buffers (names with ``buf``) are keywords.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .zoo import Example, Maker, V, floats, tokens, trained

ADVERSARIAL: dict[str, Maker] = {}


class Fn(nn.Module):
    def __init__(self, f: Callable[[Any, Tensor], Any], **members: Any) -> None:
        super().__init__()
        self.f = f
        for name, value in members.items():
            if isinstance(value, nn.Module):
                setattr(self, name, value)
            elif name.startswith("buf"):
                self.register_buffer(name, value)
            else:
                setattr(self, name, nn.Parameter(value))

    def forward(self, x: Tensor) -> Any:
        return self.f(self, x)


def add(name: str, f: Callable[[Any, Tensor], Any], inputs: Any = None, other: Any = None, **members: Any) -> None:
    def make() -> Example:
        torch.manual_seed(0)
        fresh = {k: torch.empty_like(v).copy_(v) if isinstance(v, Tensor) else v for k, v in members.items()}
        return Example(trained(Fn(f, **fresh)), inputs or (floats(16, 5),), other or (floats(7, 5),))

    ADVERSARIAL[name] = make


torch.manual_seed(0)
R, L = torch.randn, nn.Linear
# reader elsewhere, carrier by scalar op
add(
    "reader+exp",
    lambda s, x: F.linear(torch.tanh(F.linear(x, s.w1)), s.w2) + (s.w2.exp()).sum(1),
    w1=R(8, 5),
    w2=R(3, 8),
)
add(
    "reader+scale",
    lambda s, x: F.linear(torch.tanh(F.linear(x, s.w1)), s.w2) + F.linear(torch.tanh(F.linear(x, s.w1)), s.w2 * s.a),
    w1=R(8, 5),
    w2=R(3, 8),
    a=R(1),
)
add(
    "reader+stack",
    lambda s, x: F.linear(torch.tanh(F.linear(x, s.w1)), s.w2) + (torch.stack([s.w2, s.w2]).exp()).mean((0, 2)),
    w1=R(8, 5),
    w2=R(3, 8),
)
add(
    "reader+catmerge",
    lambda s, x: F.linear(torch.tanh(F.linear(x, s.w1)), torch.cat([s.w2, s.w3], 0)),
    w1=R(8, 5),
    w2=R(3, 8),
    w3=R(2, 8),
)
add(
    "reader+relu-bias",
    lambda s, x: (
        F.linear(torch.tanh(F.linear(x, s.w1)), torch.cat([s.w2, s.w3], 0), s.b)
        + F.linear(torch.relu(F.linear(x, s.w1)), s.w2).sum(-1, keepdim=True)
    ),
    w1=R(8, 5),
    w2=R(3, 8),
    w3=R(2, 8),
    b=R(5),
)
add("exp-weight", lambda s, x: F.linear(torch.tanh(F.linear(x, s.w1)), s.w2.exp(), s.b), w1=R(8, 5), w2=R(3, 8), b=R(3))
add("abs-weight", lambda s, x: F.linear(torch.tanh(F.linear(x, s.w1)), s.w2.abs(), s.b), w1=R(8, 5), w2=R(3, 8), b=R(3))
add("WWt", lambda s, x: F.linear(x, s.w @ s.w.t()), w=R(5, 8))
add("W-fact", lambda s, x: F.linear(x, s.a @ s.b, s.c), a=R(3, 8), b=R(8, 5), c=R(3))
add(
    "lora",
    lambda s, x: F.linear(torch.tanh(F.linear(x, s.w1)), s.w2 + s.a @ s.b),
    w1=R(8, 5),
    w2=R(3, 8),
    a=R(3, 2),
    b=R(2, 8),
)
add(
    "size-coin",
    lambda s, x: s.l3(torch.relu(s.l2(torch.relu(s.l1(x)))) + x),
    (floats(16, 8),),
    (floats(5, 8),),
    l1=L(8, 8),
    l2=L(8, 8),
    l3=L(8, 8),
)
add("x*x", lambda s, x: s.l2((lambda h: h * h)(s.l1(x))), l1=L(5, 8), l2=L(8, 3))
add("xx-sum", lambda s, x: (s.l1(x) ** 2).sum(-1), l1=L(5, 8))
add("xx-sum-bias", lambda s, x: (s.l1(x) ** 2).sum(-1, keepdim=True) + s.l2(s.l1(x)), l1=L(5, 8), l2=L(8, 3))
add("sum-mean", lambda s, x: s.l1(x).sum(-1) + s.l1(x).mean(-1) * 3, l1=L(5, 8))
add("softmax-gate", lambda s, x: s.l2(torch.softmax(s.l1(x), -1) * torch.tanh(s.l1(x))), l1=L(5, 8), l2=L(8, 3))
add("div-act", lambda s, x: s.l2(s.l1(x) / (1 + s.l3(x) ** 2)), l1=L(5, 8), l2=L(8, 3), l3=L(5, 8))
add(
    "div-sum",
    lambda s, x: s.l2((lambda h: h / h.sum(-1, keepdim=True))(torch.sigmoid(s.l1(x)))),
    l1=L(5, 8),
    l2=L(8, 3),
)
add(
    "div-max",
    lambda s, x: s.l2((lambda h: h / h.amax(-1, keepdim=True))(torch.sigmoid(s.l1(x)))),
    l1=L(5, 8),
    l2=L(8, 3),
)
add("div-norm", lambda s, x: s.l2(F.normalize(s.l1(x), dim=-1)), l1=L(5, 8), l2=L(8, 3))
add("norm1", lambda s, x: s.l2(F.normalize(s.l1(x), p=1.0, dim=-1)), l1=L(5, 8), l2=L(8, 3))
add("cat-self", lambda s, x: s.l2((lambda h: torch.cat([h, h], -1))(torch.tanh(s.l1(x)))), l1=L(5, 8), l2=L(16, 3))
add(
    "cat-self-sum",
    lambda s, x: s.l2((lambda h: torch.cat([h, h * 2], -1) + torch.cat([h * 3, h], -1))(torch.tanh(s.l1(x)))),
    l1=L(5, 8),
    l2=L(16, 3),
)
add(
    "cat-norm",
    lambda s, x: s.l2(F.layer_norm((lambda h, g: torch.cat([h, g], -1))(s.l1(x), s.l3(x)), (12,))),
    l1=L(5, 8),
    l3=L(5, 4),
    l2=L(12, 3),
)
add(
    "part-sum",
    lambda s, x: (lambda h: torch.cat([h, s.l3(x)], -1).sum(-1))(torch.tanh(s.l1(x))),
    l1=L(5, 8),
    l3=L(5, 4),
)
add("inplace-view", lambda s, x: (lambda h: (h.view(-1, 2, 4).mul_(2.0), s.l2(h))[1])(s.l1(x)), l1=L(5, 8), l2=L(8, 3))


def ip2(s, x):
    h = s.l1(x)
    v = h.view(-1, 8)
    h.add_(1.0)
    return s.l2(v)


add("inplace-alias", ip2, l1=L(5, 8), l2=L(8, 3))


def ip3(s, x):
    h = s.l1(x)
    m = h.mean(-1, keepdim=True)
    h.add_(1.0)
    return s.l2(((h - m) ** 2).mean(-1, keepdim=True) + h)


add("inplace-mean", ip3, l1=L(5, 8), l2=L(8, 3))


def ip4(s, x):
    h = s.l1(x)
    h[:, :4] *= 2
    return s.l2(h)


add("inplace-slice", ip4, l1=L(5, 8), l2=L(8, 3))


def ip5(s, x):
    h = s.l1(x)
    h[:, 0] = 1.0
    return s.l2(h)


add("inplace-setitem", ip5, l1=L(5, 8), l2=L(8, 3))


def ip6(s, x):
    h = s.l1(x)
    g = h.clone()
    g.relu_()
    return s.l2(h + g)


add("inplace-clone", ip6, l1=L(5, 8), l2=L(8, 3))


def ip7(s: Any, x: Tensor) -> Tensor:
    """Keys without a bias, as Swin v2 writes it: their third of a copy of the fused bias is zeroed."""
    bias = s.bias.clone()
    third = bias.numel() // 3
    bias[third : 2 * third].zero_()
    q, k, v = F.linear(s.l1(x), s.weight, bias).view(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
    return s.l2(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


add(
    "inplace-zeroed-bias",
    ip7,
    (floats(2, 6, 5),),
    (floats(3, 4, 5),),
    l1=L(5, 6),
    l2=L(8, 3),
    weight=torch.randn(24, 6),
    bias=torch.randn(24),
)
add("buf-scale", lambda s, x: s.l2(s.l1(x) * s.buf), l1=L(5, 8), l2=L(8, 3), buf=R(8))
add("buf-matrix", lambda s, x: s.l2(s.l1(x) @ s.buf), l1=L(5, 8), l2=L(8, 3), buf=R(8, 8))
add("buf-mask-bool", lambda s, x: s.l2(s.l1(x).masked_fill(s.buf, 0.0)), l1=L(5, 8), l2=L(8, 3), buf=R(8) > 0)
add("buf-index", lambda s, x: s.l2(s.l1(x)[:, s.buf]), l1=L(5, 8), l2=L(8, 3), buf=torch.randperm(8))
add("const-tensor", lambda s, x: s.l2(s.l1(x) * torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8])), l1=L(5, 8), l2=L(8, 3))
add("arange-scale", lambda s, x: s.l2(s.l1(x) * torch.arange(8)), l1=L(5, 8), l2=L(8, 3))
add("unsq-bcast", lambda s, x: s.l2((s.l1(x)[:, :, None] * s.l1(x)[:, None, :]).flatten(1)), l1=L(5, 6), l2=L(36, 3))
add(
    "outer-mixed",
    lambda s, x: s.l2((torch.tanh(s.l1(x))[:, :, None] + s.l3(x)[:, None, :]).flatten(1)),
    l1=L(5, 6),
    l3=L(5, 4),
    l2=L(24, 3),
)
add("diag", lambda s, x: torch.einsum("bii->b", s.l1(x).view(-1, 3, 3)), l1=L(5, 9))
add("einsum-implicit", lambda s, x: torch.einsum("bi,ij", s.l1(x), s.w), l1=L(5, 8), w=R(8, 3))
add("einsum3", lambda s, x: torch.einsum("bi,ij,jk->bk", s.l1(x), s.w, s.v), l1=L(5, 8), w=R(8, 6), v=R(6, 3))
add(
    "einsum-hadamard",
    lambda s, x: torch.einsum("bi,bi,ik->bk", s.l1(x), s.l3(x), s.w),
    l1=L(5, 8),
    l3=L(5, 8),
    w=R(8, 3),
)
add("bilinear", lambda s, x: torch.einsum("bi,oij,bj->bo", s.l1(x), s.w, s.l1(x)), l1=L(5, 8), w=R(3, 8, 8))
add("nn-bilinear", lambda s, x: s.bl(s.l1(x), s.l3(x)), l1=L(5, 8), l3=L(5, 6), bl=nn.Bilinear(8, 6, 3))
add("glu-last", lambda s, x: s.l2(F.glu(s.l1(x))), l1=L(5, 8), l2=L(4, 3))
add(
    "weightnorm",
    lambda s, x: s.l2(torch.relu(s.l1(x))),
    l1=torch.nn.utils.parametrizations.weight_norm(L(5, 8)),
    l2=torch.nn.utils.parametrizations.weight_norm(L(8, 3)),
)
add(
    "weightnorm-old",
    lambda s, x: s.l2(torch.relu(s.l1(x))),
    l1=torch.nn.utils.weight_norm(L(5, 8)),
    l2=torch.nn.utils.weight_norm(L(8, 3)),
)


def wstd(s, x):
    w = s.w
    w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.var((1, 2, 3), keepdim=True, unbiased=False) + 1e-5).sqrt()
    return s.l2(F.relu(F.conv2d(F.relu(s.c(x)), w, s.b)).mean((2, 3)))


add(
    "wstd",
    wstd,
    (floats(6, 3, 8, 8),),
    (floats(3, 3, 8, 8),),
    c=nn.Conv2d(3, 4, 3),
    w=R(6, 4, 3, 3),
    b=R(6),
    l2=L(6, 3),
)
add("embed-sum", lambda s, i: s.l(s.e(i).sum(1)), (tokens(4, 6),), (tokens(3, 5),), e=nn.Embedding(V, 8), l=L(8, 3))
add(
    "embed-tied-bias-scale",
    lambda s, i: F.linear(torch.tanh(s.l(s.e(i) * 8**0.5)), s.e.weight, s.b),
    (tokens(4, 6),),
    (tokens(3, 5),),
    e=nn.Embedding(V, 8),
    l=L(8, 8),
    b=R(V),
)
add(
    "embed-tied-cap",
    lambda s, i: torch.tanh(F.linear(torch.tanh(s.l(s.e(i))), s.e.weight) / 3) * 3,
    (tokens(4, 6),),
    (tokens(3, 5),),
    e=nn.Embedding(V, 8),
    l=L(8, 8),
)
add(
    "two-heads-tied",
    lambda s, i: (F.linear(s.n(s.e(i)), s.e.weight, s.b), s.l(s.n(s.e(i)))),
    (tokens(4, 6),),
    (tokens(3, 5),),
    e=nn.Embedding(V, 8),
    n=nn.LayerNorm(8),
    l=L(8, 2),
    b=R(V),
)


def shnorm(s, i):
    h = s.n(s.e(i))
    return F.linear(h, s.e.weight, s.b) + s.l(h).mean(-1, keepdim=True)


add(
    "norm-two-readers",
    shnorm,
    (tokens(4, 6),),
    (tokens(3, 5),),
    e=nn.Embedding(V, 8),
    n=nn.LayerNorm(8),
    l=L(8, 2),
    b=R(V),
)
add("prelu", lambda s, x: s.l2(F.prelu(s.l1(x), s.a)), l1=L(5, 8), l2=L(8, 3), a=R(8))
add("prelu1", lambda s, x: s.l2(F.prelu(s.l1(x), s.a)), l1=L(5, 8), l2=L(8, 3), a=R(1))
add("glu", lambda s, x: s.l2(F.glu(s.l1(x), -1)), l1=L(5, 8), l2=L(4, 3))
add("chunk-swiglu", lambda s, x: s.l2((lambda a, b: F.silu(a) * b)(*s.l1(x).chunk(2, -1))), l1=L(5, 8), l2=L(4, 3))
add(
    "chunk-uneven",
    lambda s, x: s.l2((lambda a, b, c: torch.cat([c, a, b], -1))(*s.l1(x).split([2, 3, 4], -1))),
    l1=L(5, 9),
    l2=L(9, 3),
)
add(
    "slice-part",
    lambda s, x: (lambda h: s.l2(h[:, :3]) + s.l3(h))(torch.tanh(s.l1(x))),
    l1=L(5, 8),
    l2=L(3, 3),
    l3=L(8, 3),
)
add(
    "slice-neg",
    lambda s, x: (lambda h: s.l2(h[:, -3:]) + s.l3(h))(torch.tanh(s.l1(x))),
    l1=L(5, 8),
    l2=L(3, 3),
    l3=L(8, 3),
)
add(
    "slice-step",
    lambda s, x: (lambda h: s.l2(h[:, ::2]) + s.l3(h[:, 1::2]))(torch.tanh(s.l1(x))),
    l1=L(5, 8),
    l2=L(4, 3),
    l3=L(4, 3),
)
add("select-one", lambda s, x: (lambda h: s.l3(h) * h[:, 2:3])(torch.tanh(s.l1(x))), l1=L(5, 8), l3=L(8, 3))
add("roll", lambda s, x: s.l2(s.l1(x).roll(1, -1)), l1=L(5, 8), l2=L(8, 3))
add("cumsum", lambda s, x: s.l2(s.l1(x).cumsum(-1)), l1=L(5, 8), l2=L(8, 3))
add("topk", lambda s, x: s.l1(x).topk(3, -1)[0], l1=L(5, 8))
add("pad", lambda s, x: s.l2(F.pad(s.l1(x), (1, 1))), l1=L(5, 8), l2=L(10, 3))
add("std", lambda s, x: s.l2(s.l1(x) / s.l1(x).std(-1, keepdim=True)), l1=L(5, 8), l2=L(8, 3))
add(
    "var2",
    lambda s, x: (lambda h: s.l2(h / (h.var((1, 2), keepdim=True, unbiased=False) + 1).sqrt()))(s.l1(x)),
    (floats(4, 6, 5),),
    (floats(4, 6, 5),),
    l1=L(5, 8),
    l2=L(8, 3),
)
add(
    "mean2",
    lambda s, x: (lambda h: s.l2(h - h.mean((1, 2), keepdim=True)))(s.l1(x)),
    (floats(4, 6, 5),),
    (floats(4, 6, 5),),
    l1=L(5, 8),
    l2=L(8, 3),
)
add(
    "mean2sq",
    lambda s, x: (
        lambda h: s.l2(
            (lambda d: d / (d.pow(2).mean((1, 2), keepdim=True) + 1).sqrt())(h - h.mean((1, 2), keepdim=True))
        )
    )(s.l1(x)),
    (floats(4, 6, 5),),
    (floats(4, 6, 5),),
    l1=L(5, 8),
    l2=L(8, 3),
)
add(
    "ln2d",
    lambda s, x: s.l2(s.n(s.l1(x)).mean(1)),
    (floats(4, 6, 5),),
    (floats(4, 6, 5),),
    l1=L(5, 8),
    l2=L(8, 3),
    n=nn.LayerNorm((6, 8)),
)
add(
    "instnorm",
    lambda s, x: s.l2(s.n(s.c(x)).mean((2, 3))),
    (floats(6, 3, 8, 8),),
    (floats(3, 3, 8, 8),),
    c=nn.Conv2d(3, 4, 3),
    n=nn.InstanceNorm2d(4, affine=True),
    l2=L(4, 3),
)
add(
    "lrn",
    lambda s, x: s.l2(F.local_response_norm(s.c(x), 3).mean((2, 3))),
    (floats(6, 3, 8, 8),),
    (floats(3, 3, 8, 8),),
    c=nn.Conv2d(3, 4, 3),
    l2=L(4, 3),
)
add(
    "shuffle",
    lambda s, x: s.c2(F.pixel_shuffle(s.c(x), 2)).mean((2, 3)),
    (floats(6, 3, 8, 8),),
    (floats(3, 3, 8, 8),),
    c=nn.Conv2d(3, 8, 3),
    c2=nn.Conv2d(2, 3, 3),
)
add(
    "chshuffle",
    lambda s, x: s.c2(
        (
            lambda h: (
                h.view(h.size(0), 2, 4, h.size(2), h.size(3))
                .transpose(1, 2)
                .reshape(h.size(0), 8, h.size(2), h.size(3))
            )
        )(s.c(x))
    ).mean((2, 3)),
    (floats(6, 3, 8, 8),),
    (floats(3, 3, 8, 8),),
    c=nn.Conv2d(3, 8, 3),
    c2=nn.Conv2d(8, 3, 3),
)
add(
    "moe",
    lambda s, x: torch.einsum(
        "be,beo->bo",
        torch.softmax(s.r(x), -1),
        torch.einsum("beh,eho->beo", torch.relu(torch.einsum("bi,eih->beh", x, s.w1)), s.w2),
    ),
    r=L(5, 4),
    w1=R(4, 5, 6),
    w2=R(4, 6, 3),
)
add(
    "sigmoid-moe",
    lambda s, x: (
        torch.sigmoid(s.r(x))[:, :, None]
        * torch.einsum("beh,eho->beo", torch.relu(torch.einsum("bi,eih->beh", x, s.w1)), s.w2)
    ).sum(1),
    r=L(5, 4),
    w1=R(4, 5, 6),
    w2=R(4, 6, 3),
)
add("clamp-t", lambda s, x: s.l2(torch.clamp(s.l1(x), min=s.a)), l1=L(5, 8), l2=L(8, 3), a=R(8))
add("clamp1", lambda s, x: s.l2(s.l1(x).clamp(min=0.5)), l1=L(5, 8), l2=L(8, 3))
add("addcmul", lambda s, x: s.l2(torch.addcmul(s.l1(x), s.l1(x), s.l3(x))), l1=L(5, 8), l2=L(8, 3), l3=L(5, 8))
add("where", lambda s, x: s.l2(torch.where(s.l1(x) > 0, s.l3(x), s.a)), l1=L(5, 8), l2=L(8, 3), l3=L(5, 8), a=R(8))
add(
    "zeros_like",
    lambda s, x: s.l2(torch.where(s.l1(x) > 0, s.l1(x), torch.zeros_like(s.l1(x)))),
    l1=L(5, 8),
    l2=L(8, 3),
)
add("rand_like", lambda s, x: s.l2(s.l1(x) + 0 * torch.rand_like(s.l1(x))), l1=L(5, 8), l2=L(8, 3))
add("expand-param", lambda s, x: s.l2(s.l1(x) * s.a.expand(8)), l1=L(5, 8), l2=L(8, 3), a=R(1))
add("expand-reader", lambda s, x: F.linear(s.l1(x), s.a.expand(3, 8)), l1=L(5, 8), a=R(3, 1))
add("ones-reader", lambda s, x: s.l1(x) @ torch.ones(8, 3, dtype=x.dtype), l1=L(5, 8))
add("repeat", lambda s, x: s.l2(s.l1(x).repeat(1, 2)), l1=L(5, 8), l2=L(16, 3))
add(
    "tile-heads",
    lambda s, x: s.l2((s.l1(x)[:, None, :] * s.a[None, :, None]).flatten(1)),
    l1=L(5, 8),
    l2=L(32, 3),
    a=R(4),
)
add(
    "ln-shared",
    lambda s, x: s.l2(s.n(s.l1(x))) + s.l3(s.n(torch.tanh(s.l1(x)))),
    l1=L(5, 8),
    l2=L(8, 3),
    l3=L(8, 3),
    n=nn.LayerNorm(8),
)
add("ln-noaffine", lambda s, x: s.l2(s.n(s.l1(x))), l1=L(5, 8), l2=L(8, 3), n=nn.LayerNorm(8, elementwise_affine=False))
add("rms-noaffine", lambda s, x: s.l2(s.n(s.l1(x))), l1=L(5, 8), l2=L(8, 3), n=nn.RMSNorm(8, elementwise_affine=False))
add(
    "rms-mean",
    lambda s, x: s.l2(s.n(s.l1(x))) + s.l1(x).mean(-1, keepdim=True),
    l1=L(5, 8),
    l2=L(8, 3),
    n=nn.RMSNorm(8),
)
add(
    "mean-rms",
    lambda s, x: s.l1(x).mean(-1, keepdim=True) + s.l2(s.n(s.l1(x))),
    l1=L(5, 8),
    l2=L(8, 3),
    n=nn.RMSNorm(8),
)
add(
    "sub-ln-glu", lambda s, x: s.l2(s.n(F.silu(s.l1(x)) * s.l3(x))), l1=L(5, 8), l2=L(8, 3), l3=L(5, 8), n=nn.RMSNorm(8)
)
add(
    "sub-ln-glu2",
    lambda s, x: s.l2(s.n(torch.sigmoid(s.l1(x)) * s.l3(x))),
    l1=L(5, 8),
    l2=L(8, 3),
    l3=L(5, 8),
    n=nn.RMSNorm(8),
)
add(
    "sub-ln-glu3",
    lambda s, x: s.l2(s.n(s.l3(x) * torch.sigmoid(s.l1(x)))),
    l1=L(5, 8),
    l2=L(8, 3),
    l3=L(5, 8),
    n=nn.LayerNorm(8),
)
add(
    "linattn",
    lambda s, x: (lambda q, k, v: s.o(q @ (k.transpose(1, 2) @ v)))(F.elu(s.q(x)) + 1, F.elu(s.k(x)) + 1, s.v(x)),
    (floats(4, 6, 5),),
    (floats(4, 7, 5),),
    q=L(5, 8),
    k=L(5, 8),
    v=L(5, 6),
    o=L(6, 3),
)
add(
    "linattn-n",
    lambda s, x: (lambda q, k, v: s.o(q @ (k.transpose(1, 2) @ v) / (q @ k.sum(1, keepdim=True).transpose(1, 2))))(
        F.elu(s.q(x)) + 1, F.elu(s.k(x)) + 1, s.v(x)
    ),
    (floats(4, 6, 5),),
    (floats(4, 7, 5),),
    q=L(5, 8),
    k=L(5, 8),
    v=L(5, 6),
    o=L(6, 3),
)
add(
    "gram",
    lambda s, x: (lambda h: s.o((h.transpose(1, 2) @ h).flatten(1)))(s.q(x)),
    (floats(4, 6, 5),),
    (floats(4, 7, 5),),
    q=L(5, 4),
    o=L(16, 3),
)
add(
    "matmul-bias-act",
    lambda s, x: torch.baddbmm(s.b, s.q(x), s.k(x).transpose(1, 2)).mean(-1),
    (floats(4, 6, 5),),
    (floats(4, 6, 5),),
    q=L(5, 8),
    k=L(5, 8),
    b=R(1, 6, 6),
)
add("addmm-act", lambda s, x: torch.addmm(s.b, s.q(x), s.w.exp()), q=L(5, 8), w=R(8, 3), b=R(3))
add("sym-size", lambda s, x: s.l2(s.l1(x) / s.l1(x).size(-1)), l1=L(5, 8), l2=L(8, 3))
add("view-1", lambda s, x: s.l2(s.l1(x).view(x.size(0), -1, 2).flatten(1)), l1=L(5, 8), l2=L(8, 3))
add("view-mix", lambda s, x: s.l2(s.l1(x).reshape(-1, 4)).reshape(x.size(0), -1), l1=L(5, 8), l2=L(4, 3))
add("batch-in-view", lambda s, x: s.l2(s.l1(x).t().reshape(8, -1).t()), l1=L(5, 8), l2=L(8, 3))
add(
    "interleave-qkv",
    lambda s, x: (
        lambda z: s.o(F.scaled_dot_product_attention(z[..., :4], z[..., 4:8], z[..., 8:]).transpose(1, 2).flatten(2))
    )(s.l1(x).view(x.size(0), x.size(1), 2, 12).transpose(1, 2)),
    (floats(4, 6, 5),),
    (floats(3, 7, 5),),
    l1=L(5, 24),
    o=L(8, 3),
)
add(
    "rope-inter",
    lambda s, x: (lambda z: s.o(torch.stack([-z[..., 1::2], z[..., ::2]], -1).flatten(-2) + z))(s.l1(x)),
    l1=L(5, 8),
    o=L(8, 3),
)
add("maxout", lambda s, x: s.o(s.l1(x).view(-1, 4, 2).amax(-1)), l1=L(5, 8), o=L(4, 3))
add("maxout2", lambda s, x: s.o(s.l1(x).view(-1, 4, 2).max(-1)[0]), l1=L(5, 8), o=L(4, 3))
add(
    "lstm",
    lambda s, x: s.o(s.r(x)[0]),
    (floats(4, 6, 5),),
    (floats(3, 6, 5),),
    r=nn.LSTM(5, 6, batch_first=True),
    o=L(6, 3),
)
add("gru-cell", lambda s, x: s.o(s.r(x)), r=nn.GRUCell(5, 6), o=L(6, 3))
add("cdist", lambda s, x: torch.cdist(s.l1(x), s.p), l1=L(5, 8), p=R(3, 8))
add("cosine-sim", lambda s, x: F.cosine_similarity(s.l1(x)[:, None], s.p[None], -1), l1=L(5, 8), p=R(3, 8))
add("vq", lambda s, x: s.l2(F.embedding((s.l1(x) @ s.p.t()).argmax(-1), s.p)), l1=L(5, 8), p=R(3, 8), l2=L(8, 3))
add("loss-mse", lambda s, x: F.mse_loss(s.l2(torch.tanh(s.l1(x))), s.l3(x)), l1=L(5, 8), l2=L(8, 6), l3=L(5, 6))
add("scalar-out", lambda s, x: torch.tanh(s.l1(x)).pow(2).mean(), l1=L(5, 8))
add("pow-param", lambda s, x: s.l2(torch.sigmoid(s.l1(x)) ** s.a.exp()), l1=L(5, 8), l2=L(8, 3), a=R(8))
add("const-then-mul", lambda s, x: s.l2(s.l1(x) * x.sum(-1, keepdim=True).expand(-1, 8)), l1=L(5, 8), l2=L(8, 3))
add("expand-const-reader", lambda s, x: s.l2(torch.tanh(x.sum(-1, keepdim=True)).expand(-1, 8)), l2=L(8, 3))
add(
    "expand-const-ln",
    lambda s, x: s.l2(s.n(x.sum(-1, keepdim=True).expand(-1, 8) + s.l1(x))),
    l1=L(5, 8),
    l2=L(8, 3),
    n=nn.LayerNorm(8),
)
add("flip", lambda s, x: s.l2(s.l1(x).flip(-1)), l1=L(5, 8), l2=L(8, 3))
add(
    "tied-transpose-both",
    lambda s, x: F.linear(torch.tanh(F.linear(x, s.w)), s.w),
    (floats(9, 8),),
    (floats(4, 8),),
    w=R(8, 8),
)
add(
    "hidden-square",
    lambda s, x: s.o(torch.tanh(F.linear(torch.tanh(F.linear(s.i(x), s.w)), s.w))),
    i=L(5, 8),
    w=R(8, 8),
    o=L(8, 3),
)
add(
    "rnn-like",
    lambda s, x: s.o(torch.tanh(F.linear(torch.tanh(F.linear(s.i(x), s.w, s.b)), s.w, s.b))),
    i=L(5, 8),
    w=R(8, 8),
    b=R(8),
    o=L(8, 3),
)
add("symm-weight", lambda s, x: s.o(torch.tanh(F.linear(s.i(x), s.w + s.w.t()))), i=L(5, 8), w=R(8, 8), o=L(8, 3))
add(
    "cayley",
    lambda s, x: s.o(F.linear(s.i(x), torch.linalg.matrix_exp(s.w - s.w.t()))),
    i=L(5, 8),
    w=R(8, 8),
    o=L(8, 3),
)
add("diag-embed", lambda s, x: s.o(s.i(x) @ torch.diag(s.w)), i=L(5, 8), w=R(8), o=L(8, 3))
add("triu-w", lambda s, x: s.o(F.linear(s.i(x), s.w.triu())), i=L(5, 8), w=R(8, 8), o=L(8, 3))
add(
    "batchnorm-train-only",
    lambda s, x: s.l2(F.batch_norm(s.l1(x), None, None, s.a, s.b, True)),
    l1=L(5, 8),
    l2=L(8, 3),
    a=R(8),
    b=R(8),
)
add(
    "bn-mean-of-channels",
    lambda s, x: s.l2(s.n(s.l1(x)).mean(-1, keepdim=True)),
    l1=L(5, 8),
    l2=L(1, 3),
    n=nn.BatchNorm1d(8),
)
add(
    "bn-over-features",
    lambda s, x: s.l2(s.n(s.l1(x))),
    (floats(8, 6, 5),),
    (floats(4, 6, 5),),
    l1=L(5, 8),
    l2=L(8, 3),
    n=nn.BatchNorm1d(6),
)
add(
    "gn1",
    lambda s, x: s.l2(F.group_norm(s.c(x), 1).mean((2, 3))),
    (floats(6, 3, 8, 8),),
    (floats(3, 3, 8, 8),),
    c=nn.Conv2d(3, 4, 3),
    l2=L(4, 3),
)
add(
    "gn-c",
    lambda s, x: s.l2(F.group_norm(s.c(x), 4, s.w, s.b).mean((2, 3))),
    (floats(6, 3, 8, 8),),
    (floats(3, 3, 8, 8),),
    c=nn.Conv2d(3, 4, 3),
    l2=L(4, 3),
    w=R(4),
    b=R(4),
)
add(
    "dwmult",
    lambda s, x: s.l2(F.relu(s.d(F.relu(s.c(x)))).mean((2, 3))),
    (floats(6, 3, 8, 8),),
    (floats(3, 3, 8, 8),),
    c=nn.Conv2d(3, 4, 3),
    d=nn.Conv2d(4, 8, 3, groups=4),
    l2=L(8, 3),
)
add(
    "groups-then-flat",
    lambda s, x: s.l2(F.relu(s.d(F.relu(s.c(x)))).flatten(1)),
    (floats(6, 3, 4, 4),),
    (floats(3, 3, 4, 4),),
    c=nn.Conv2d(3, 6, 1),
    d=nn.Conv2d(6, 4, 3, groups=2),
    l2=L(16, 3),
)
add(
    "ctrans-groups",
    lambda s, x: s.d(F.relu(s.c(x))).mean((1, 2, 3)),
    (floats(6, 3, 4, 4),),
    (floats(3, 3, 4, 4),),
    c=nn.Conv2d(3, 6, 1),
    d=nn.ConvTranspose2d(6, 4, 2, groups=2),
)
add(
    "unfold",
    lambda s, x: s.l2(F.unfold(s.c(x), 2).transpose(1, 2)).mean(1),
    (floats(6, 3, 4, 4),),
    (floats(3, 3, 4, 4),),
    c=nn.Conv2d(3, 4, 1),
    l2=L(16, 3),
)
add(
    "conv1d-time",
    lambda s, x: s.l2(F.relu(s.c(x.transpose(1, 2))).transpose(1, 2)),
    (floats(6, 9, 5),),
    (floats(3, 9, 5),),
    c=nn.Conv1d(5, 6, 3, padding=1),
    l2=L(6, 3),
)
add(
    "conv-shared-lin",
    lambda s, x: F.conv2d(F.relu(s.c(x)), s.w[:, :, None, None]).mean((2, 3)) + F.linear(s.c(x).mean((2, 3)), s.w),
    (floats(6, 3, 4, 4),),
    (floats(3, 3, 4, 4),),
    c=nn.Conv2d(3, 6, 1),
    w=R(4, 6),
)
add("layerscale-exp", lambda s, x: s.l2(s.l1(x) * torch.exp(s.a) + s.l1(x)), l1=L(5, 8), l2=L(8, 3), a=R(8))
add("gate-vec", lambda s, x: (s.l1(x) * s.a).sum(-1), l1=L(5, 8), a=R(8))
add(
    "gate-vec2",
    lambda s, x: (s.l1(x) * s.a * s.b).sum(-1) + (s.l3(x) * s.b).sum(-1),
    l1=L(5, 8),
    l3=L(5, 8),
    a=R(8),
    b=R(8),
)
add("mv", lambda s, x: torch.mv(torch.tanh(s.l1(x)), s.a), l1=L(5, 8), a=R(8))
add("dot", lambda s, x: s.l2(x) * torch.dot(s.a, s.b), l2=L(5, 3), a=R(8), b=R(8))
add("logsumexp", lambda s, x: s.l1(x).logsumexp(-1), l1=L(5, 8))
add("sort", lambda s, x: s.l2(s.l1(x).sort(-1)[0]), l1=L(5, 8), l2=L(8, 3))
add("detach", lambda s, x: s.l2(s.l1(x) - s.l1(x).detach().mean(-1, keepdim=True)), l1=L(5, 8), l2=L(8, 3))
add("complex", lambda s, x: torch.fft.rfft(s.l1(x)).abs(), l1=L(5, 8))
