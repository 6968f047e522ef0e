"""Layers: projections, activations, norms, convolutions, recurrences, and modules of torch.nn."""

from __future__ import annotations

from tests.fuzz.compose import Composer, Rejected, Value

_ACTIVATIONS = (
    "torch.tanh({})",
    "F.relu({})",
    "F.gelu({})",
    "F.silu({})",
    "torch.sigmoid({})",
    "{}.sin()",
    "{}.square()",
    "F.leaky_relu({}, 0.2)",
    "F.softplus({})",
    "{}.abs()",
    "F.elu({})",
    "torch.cos({})",
    "{}.exp().clamp(max=5.0)",
)


def _activated(c: Composer, v: Value) -> Value:
    return c.value(c.rng.choice(_ACTIVATIONS).format(v.name))


def _linear(c: Composer, v: Value, width: int | None = None) -> Value:
    n, d = width or c.size(), v.dims[-1]
    roll = c.rng.random()
    if roll < 0.4:
        layer = c.member(f"self.NAME = nn.Linear({d}, {n}, bias={c.rng.random() < 0.7})", "l")
        return c.value(f"{layer}({v.name})")
    if roll < 0.8:
        bias = f", {c.parameter(n)}" if c.rng.random() < 0.5 else ""
        return c.value(f"F.linear({v.name}, {c.parameter(n, int(d))}{bias})")
    return c.value(f"{v.name} @ {c.parameter(int(d), n)}")


def linear(c: Composer) -> None:
    v = _linear(c, c.choose(c.vectors()))
    if c.rng.random() < 0.6:
        _activated(c, v)


def activation(c: Composer) -> None:
    _activated(c, c.choose(c.reals()))


def mlp(c: Composer) -> None:
    v = c.choose(c.vectors())
    h = _activated(c, _linear(c, v))
    out = _linear(c, h, int(v.dims[-1]))
    if c.rng.random() < 0.7:
        c.value(f"{v.name} + {out.name}")


def gated(c: Composer) -> None:
    v, n = c.choose(c.vectors()), c.size()
    if c.rng.random() < 0.5:
        a, b = _linear(c, v, n), _linear(c, v, n)
        c.value(f"F.silu({a.name}) * {b.name}")
    else:
        h = _linear(c, v, 2 * n)
        c.value(
            c.rng.choice((f"F.glu({h.name}, -1)", f"{h.name}.chunk(2, -1)[0].sigmoid() * {h.name}.chunk(2, -1)[1]"))
        )


def norm(c: Composer) -> None:
    v = c.choose(c.vectors())
    d = int(v.dims[-1])
    eps = c.rng.choice((", eps=1e-5", ", eps=1e-3", "", ", eps=0.1"))
    kind = c.rng.choice(("layer", "rms", "module", "rmsmodule", "written", "writtenrms", "normalize"))
    if kind == "layer":
        affine = c.rng.choice(("", f", {c.parameter(d)}", f", {c.parameter(d)}, {c.parameter(d)}"))
        c.value(f"F.layer_norm({v.name}, ({d},){affine}{eps})")
    elif kind == "rms":
        affine = c.rng.choice(("", f", {c.parameter(d)}"))
        c.value(f"F.rms_norm({v.name}, ({d},){affine}{eps})")
    elif kind == "module":
        layer = c.member(f"self.NAME = nn.LayerNorm({d}{eps}, elementwise_affine={c.rng.random() < 0.6})", "l")
        c.value(f"{layer}({v.name})")
    elif kind == "rmsmodule":
        layer = c.member(f"self.NAME = nn.RMSNorm({d}{eps}, elementwise_affine={c.rng.random() < 0.6})", "l")
        c.value(f"{layer}({v.name})")
    elif kind == "written":
        h = c.value(f"{v.name} - {v.name}.mean(-1, keepdim=True)")
        how = c.rng.choice((f"{h.name}.var(-1, keepdim=True, correction=0)", f"{h.name}.pow(2).mean(-1, keepdim=True)"))
        s = c.value(f"{how} + 1e-3")
        c.value(f"{h.name} / {s.name}.sqrt()")
    elif kind == "writtenrms":
        s = c.value(f"{v.name}.pow(2).mean(-1, keepdim=True)")
        gain = c.rng.choice(("", f" * {c.parameter(d)}", f" * (1 + {c.parameter(d)})"))
        c.value(f"{v.name} * torch.rsqrt({s.name} + 1e-4){gain}")
    else:
        c.value(f"F.normalize({v.name}, dim=-1, p={c.rng.choice(('2.0', '1.0'))})")


def channel_norm(c: Composer) -> None:
    """Batch, group and instance norms over channels that stand at place 1."""
    v = c.choose(c.vectors())
    d = int(v.dims[-1])
    h = c.value(f"{v.name}.movedim(-1, 1)") if len(v.dims) > 2 else v
    rank = len(h.dims)
    groups = c.rng.choice([g for g in range(1, d + 1) if d % g == 0])
    kinds = [f"nn.GroupNorm({groups}, {d})"]
    if rank in (2, 3, 4):
        kinds += [f"nn.BatchNorm{max(rank - 2, 1)}d({d}, affine={c.rng.random() < 0.7})"]
    if rank in (3, 4):
        kinds += [f"nn.InstanceNorm{rank - 2}d({d}, affine={c.rng.random() < 0.5})"]
    layer = c.member(f"self.NAME = {c.rng.choice(kinds)}", "l")
    h = c.value(f"{layer}({h.name})")
    if rank > 2:
        c.value(f"{h.name}.movedim(1, -1)")


def _channels_first(c: Composer) -> Value:
    v = c.choose(c.vectors(2))
    return c.value(f"{v.name}.movedim(-1, 1)")


def convolution(c: Composer) -> None:
    h = _channels_first(c)
    d, n, dims = int(h.dims[1]), c.size(), len(h.dims) - 2
    if dims > 2:
        raise Rejected("too many dims")
    k = c.rng.choice((1, 2, 3))
    pad = c.rng.choice((0, 1, k // 2))
    common = [g for g in range(1, d + 1) if d % g == 0]
    groups = c.rng.choice((1, 1, d, c.rng.choice(common)))
    n = groups * c.rng.choice((1, 2, 3)) if groups > 1 else n
    roll = c.rng.random()
    if roll < 0.4:
        layer = c.member(f"self.NAME = nn.Conv{dims}d({d}, {n}, {k}, padding={pad}, groups={groups})", "l")
        h = c.value(f"{layer}({h.name})")
    elif roll < 0.8:
        w = c.parameter(n, d // groups, *[k] * dims)
        h = c.value(f"F.conv{dims}d({h.name}, {w}, padding={pad}, groups={groups}, stride={c.rng.choice((1, 1, 2))})")
    else:
        layer = c.member(f"self.NAME = nn.ConvTranspose{dims}d({d}, {n}, {k}, groups={groups})", "l")
        h = c.value(f"{layer}({h.name})")
    if c.rng.random() < 0.5:
        h = _activated(c, h)
    if c.rng.random() < 0.3:
        h = c.value(f"{h.name}.flatten(2).mean(-1)")
    else:
        c.value(f"{h.name}.movedim(1, -1)")


def modulated(c: Composer) -> None:
    """A convolution whose kernel each sample scales, with the batch among the groups."""
    v = c.choose([v for v in c.vectors(2) if len(v.dims) == 3 and v.dims[0] == "B"])
    d, n = int(v.dims[-1]), c.size()
    style = c.value(f"1 + F.linear({v.name}.mean(1), {c.parameter(d, d)})")
    w = c.value(f"{style.name}[:, None, :, None] * {c.parameter(n, d, 2)}")
    b, t = c.letter("B"), f"{v.name}.shape[1]"
    depthwise = c.rng.random() < 0.4
    if depthwise:
        w = c.value(f"({style.name}[:, :, None] * {c.parameter(d, 2)}).reshape({b} * {d}, 1, 2)")
        h = c.value(f"F.conv1d({v.name}.transpose(1, 2).reshape(1, {b} * {d}, {t}), {w.name}, groups={b} * {d})")
        c.value(f"{h.name}.view({b}, {d}, -1).transpose(1, 2)")
        return
    x = c.value(f"{v.name}.transpose(1, 2).reshape(1, {b} * {d}, {t})")
    h = c.value(f"F.conv1d({x.name}, {w.name}.reshape({b} * {n}, {d}, 2), groups={b})")
    c.value(f"{h.name}.view({b}, {n}, -1).transpose(1, 2)")


def recurrent(c: Composer) -> None:
    v, n = c.choose(c.vectors(2)), c.size()
    if len(v.dims) != 3:
        raise Rejected("a recurrence takes three dims")
    kind = c.rng.choice(("LSTM", "GRU", "RNN"))
    options = f"batch_first=True, bidirectional={c.rng.random() < 0.3}, num_layers={c.rng.choice((1, 1, 2))}"
    layer = c.member(f"self.NAME = nn.{kind}({v.dims[-1]}, {n}, {options})", "l")
    out, state = c.fresh(), c.fresh()
    c.step(f"{out}, {state} = {layer}({v.name})", out)
    if c.rng.random() < 0.3:
        c.value(f"{layer}({v.name})[1]" + ("[1]" if kind == "LSTM" else "") + ".sum(0)")


def cell(c: Composer) -> None:
    """A recurrence written out, its state handed from step to step."""
    v, n = c.choose([v for v in c.vectors() if len(v.dims) == 2]), c.size()
    layer = c.member(f"self.NAME = nn.{c.rng.choice(('GRUCell', 'RNNCell'))}({v.dims[-1]}, {n})", "l")
    h = c.value(f"{layer}({v.name})")
    for _ in range(c.rng.choice((1, 2))):
        h = c.value(f"{layer}({v.name}, {h.name})")


def pooled(c: Composer) -> None:
    h = _channels_first(c)
    dims = len(h.dims) - 2
    if dims > 2:
        raise Rejected("too many dims")
    how = c.rng.choice((f"max_pool{dims}d({{}}, 2)", f"avg_pool{dims}d({{}}, 2)", f"adaptive_avg_pool{dims}d({{}}, 1)"))
    h = c.value("F." + how.format(h.name))
    c.value(f"{h.name}.movedim(1, -1)")


def low_rank(c: Composer) -> None:
    """LoRA and its kin: a weight that is a product, a sum, or scaled by its own norm."""
    v, n, r = c.choose(c.vectors()), c.size(), c.rng.choice((2, 3))
    d = int(v.dims[-1])
    w = c.value(f"{c.parameter(n, r)} @ {c.parameter(r, d)}")
    if c.rng.random() < 0.5:
        w = c.value(f"{c.parameter(n, d)} + {c.constant()} * {w.name}")
    c.value(f"F.linear({v.name}, {w.name})")


def weight_maps(c: Composer) -> None:
    """A weight read through a function of itself."""
    v, n = c.choose(c.vectors()), c.size()
    d = int(v.dims[-1])
    w = c.parameter(n, d)
    how = c.rng.choice(
        (
            "{}.exp()",
            "{}.abs()",
            "torch.softmax({}, -1)",
            "torch.softmax({}, 0)",
            "{0} / {0}.norm(dim=-1, keepdim=True)",
            "F.normalize({}, dim=0)",
            "{0} - {0}.mean(1, keepdim=True)",
            "torch.tanh({})",
            "{}.round()",
            "{0} * ({0}.abs() > 0.3)",
            "{}.square()",
            "{0} + {0}.detach() * 0.5",
            "{}.clamp(-0.5, 0.5)",
            "{}.cumsum(-1)",
            "{}.tril()",
            "{}.flip(-1)",
            "{}.roll(1, -1)",
            "{}.sign()",
            "F.dropout({}, 0.0)",
        )
    )
    w2 = c.value(how.format(w))
    c.value(f"F.linear({v.name}, {w2.name})")
    if c.rng.random() < 0.4:
        h = c.value(f"F.linear({v.name}, {w})")
        _activated(c, h)


def einsum(c: Composer) -> None:
    v = c.choose(c.vectors())
    d, n, m = int(v.dims[-1]), c.size(), c.size()
    left = "abcd"[: len(v.dims) - 1]
    h = c.value(f'torch.einsum("{left}i,oki->{left}ok", {v.name}, {c.parameter(n, m, d)})')
    out = c.rng.choice(("o", "k", "ok"))
    w = {"o": c.parameter(m), "k": c.parameter(n), "ok": c.parameter(n, m)}[out]
    given = {"o": "k", "k": "o", "ok": "ok"}[out]
    c.value(f'torch.einsum("{left}ok,{given}->{left}{out}", {h.name}, {w})')


def experts(c: Composer) -> None:
    """A mixture: all experts, weighed by a softmax, perhaps of the best few."""
    v, e, n = c.choose(c.vectors()), c.rng.choice((3, 4)), c.size()
    d = int(v.dims[-1])
    left = "abcd"[: len(v.dims) - 1]
    router = c.value(f"F.linear({v.name}, {c.parameter(e, d)})")
    gate = c.value(f"torch.softmax({router.name}, -1)")
    if c.rng.random() < 0.4:
        best = c.value(f"{gate.name}.topk(2, -1).values[..., -1:]")
        gate = c.value(f"{gate.name} * ({gate.name} >= {best.name})")
    h = c.value(f'torch.einsum("{left}d,ehd->{left}eh", {v.name}, {c.parameter(e, n, d)})')
    h = _activated(c, h)
    out = c.value(f'torch.einsum("{left}eh,edh->{left}ed", {h.name}, {c.parameter(e, d, n)})')
    c.value(f"({out.name} * {gate.name}.unsqueeze(-1)).sum(-2)")
