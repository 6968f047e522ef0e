"""Streams: residuals, concatenations and sums of branches, stacks of equal blocks, and plain chains."""

from __future__ import annotations

from tests.fuzz.compose import Composer, Rejected
from tests.fuzz.features.layers import _activated, _linear


def residual(c: Composer) -> None:
    """Two values of one shape, added, multiplied, or mixed."""
    values = c.vectors()
    v = c.choose(values)
    fits = [u for u in values if u.dims == v.dims and u.name != v.name]
    other = c.choose(fits) if fits and c.rng.random() < 0.7 else _linear(c, v, int(v.dims[-1]))
    c.value(
        c.rng.choice(
            (
                "{0} + {1}",
                "{0} - {1}",
                "{0} * {1}",
                "torch.maximum({0}, {1})",
                "0.5 * ({0} + {1})",
                "{0} + {1} * 0.1",
                "torch.addcmul({0}, {1}, {1})",
                "torch.where({0} > {1}, {0}, {1})",
                "{0} * torch.sigmoid({1})",
                "torch.hypot({0}, {1})",
                "torch.lerp({0}, {1}, 0.3)",
                "{0} / (1 + {1}.abs())",
            )
        ).format(v.name, other.name)
    )


def joined(c: Composer) -> None:
    values = c.vectors()
    v = c.choose(values)
    fits = [u for u in values if u.dims[:-1] == v.dims[:-1] and u.name != v.name]
    other = c.choose(fits) if fits and c.rng.random() < 0.7 else _activated(c, _linear(c, v))
    how = c.rng.choice(
        (
            "torch.cat([{0}, {1}], -1)",
            "torch.cat([{0}, {1}, {0}], -1)",
            "torch.cat([{0}, {0}.neg()], -1)",
            "torch.cat([{0}, torch.ones_like({1}[..., :1])], -1)",
        )
    )
    h = c.value(how.format(v.name, other.name))
    if c.rng.random() < 0.4:
        _linear(c, h)
    if c.rng.random() < 0.3 and v.dims == other.dims:
        then = c.rng.choice(("sum(-1)", "amax(0)", "mean(1)"))
        c.value(f"torch.stack([{v.name}, {other.name}], {c.rng.choice((0, -1, 1))}).{then}")


def summed(c: Composer) -> None:
    """Python's own sum over branches."""
    v = c.choose(c.vectors())
    n = int(v.dims[-1]) if c.rng.random() < 0.5 else c.size()
    branches = [_activated(c, _linear(c, v, n)).name for _ in range(c.rng.choice((2, 3)))]
    c.value(f"sum([{', '.join(branches)}])")


def broadcast(c: Composer) -> None:
    """A pooled value that comes back to every place."""
    v = c.choose(c.vectors())
    how = c.rng.choice(("mean", "amax", "sum", "amin"))
    dim = c.rng.randrange(len(v.dims))
    s = c.value(f"{v.name}.{how}({dim}, keepdim=True)")
    c.value(
        c.rng.choice(
            (
                f"{v.name} - {s.name}",
                f"{v.name} * torch.sigmoid({s.name})",
                f"{v.name} + {s.name}",
                f"{v.name} / (1 + {s.name}.abs())",
            )
        )
    )


def reduced(c: Composer) -> None:
    v = c.choose(c.vectors())
    how = c.rng.choice(
        (
            "sum(-1)",
            "mean(-1)",
            "amax(-1)",
            "std(-1)",
            "var(-1, correction=0)",
            "prod(-1)",
            "logsumexp(-1)",
            "norm(dim=-1)",
            "softmax(-1)",
            "log_softmax(-1)",
            "norm(p=1, dim=-1)",
            "softmax(0)",
            "mean((0, -1))",
            "sum()",
            "mean()",
            "std()",
            "abs().sum(-1, keepdim=True)",
            "square().mean(-1)",
            "nansum(-1)",
            "argmax(-1)",
        )
    )
    c.value(f"{v.name}.{how}")


def chain(c: Composer) -> None:
    """A plain chain, as insert takes it."""
    v = c.choose(c.vectors())
    d, n, m = int(v.dims[-1]), c.size(), c.size()
    act = c.rng.choice(("nn.ReLU()", "nn.ReLU()", "nn.Tanh()", "nn.Identity()", "nn.GELU()"))
    parts = [f"nn.Linear({d}, {n})", act, f"nn.Linear({n}, {m})"]
    if c.rng.random() < 0.4:
        parts.insert(1, f"nn.LayerNorm({n})")
    if c.rng.random() < 0.4:
        parts += [act, f"nn.Linear({m}, {d})"]
    layer = c.member(f"self.NAME = nn.Sequential({', '.join(parts)})", "l")
    c.value(f"{layer}({v.name})")


_BLOCKS = {
    "prenorm": (
        "self.n = nn.LayerNorm(d); self.a = nn.Linear(d, h); self.b = nn.Linear(h, d)",
        "x + self.b(torch.tanh(self.a(self.n(x))))",
    ),
    "rms": (
        "self.n = nn.RMSNorm(d); self.a = nn.Linear(d, h, bias=False); self.b = nn.Linear(h, d, bias=False)",
        "x + self.b(F.silu(self.a(self.n(x))))",
    ),
    "postnorm": (
        "self.n = nn.LayerNorm(d); self.a = nn.Linear(d, h); self.b = nn.Linear(h, d)",
        "self.n(x + self.b(F.relu(self.a(x))))",
    ),
    "plain": ("self.a = nn.Linear(d, h); self.b = nn.Linear(h, d)", "torch.tanh(self.b(F.relu(self.a(x))))"),
    "gated": (
        "self.a = nn.Linear(d, 2 * h); self.b = nn.Linear(h, d); self.g = nn.Parameter(rnd(d))",
        "x + self.g * self.b(F.glu(self.a(x), -1))",
    ),
    "relu after": ("self.a = nn.Linear(d, h); self.b = nn.Linear(h, d)", "F.relu(x + self.b(torch.tanh(self.a(x))))"),
    "counted": (
        'self.a = nn.Linear(d, h); self.b = nn.Linear(h, d); self.register_buffer("m", rnd(d))',
        "self.m.mul_(0.9).add_(x.detach().flatten(0, -2).mean(0)) * 0 + x + self.b(torch.tanh(self.a(x - self.m)))",
    ),
    "halves": (
        "self.a = nn.Linear(d // 2, d // 2)",
        "torch.cat([x[..., d // 2 :], x[..., : d // 2] + self.a(x[..., d // 2 :])], -1)",
    ),
}


def stack(c: Composer) -> None:
    """Equal blocks in a ModuleList, as deepen takes them."""
    if c.model.classes:
        raise Rejected("one stack is enough")
    v = c.choose(c.vectors())
    d = int(v.dims[-1])
    init, forward = c.rng.choice(sorted(_BLOCKS.values()))
    if "d //" in init and d % 2:
        raise Rejected("halves need an even size")
    forward = forward.replace("d // 2", str(d // 2))
    c.model.classes = (
        "class Block(nn.Module):\n    def __init__(self, d, h):\n        super().__init__()\n        "
        + init.replace("; ", "\n        ")
        + f"\n\n    def forward(self, x):\n        return {forward}\n\n"
    )
    try:
        c._start()
        n = c.rng.choice((2, 3))
        layer = c.member(f"self.NAME = nn.ModuleList(Block({d}, {c.size()}) for _ in range({n}))", "l")
        name = c.fresh()
        c.step(f"{name} = {v.name}\nfor block in {layer}:\n    {name} = block({name})", name, keep="self.m" in forward)
    except Rejected:
        if not any("Block" in m.line for m in c.model.members):
            c.model.classes = ""
        raise
