"""Attention: fused and written, grouped heads, masks, rotary numbers, norms of queries and keys."""

from __future__ import annotations

from tests.fuzz.compose import Composer, Value
from tests.fuzz.features.layers import _linear


def _heads(c: Composer, v: Value, h: int, d: int, proj: str) -> Value:
    """(B, h, T, d)."""
    t = f"{v.name}.shape[1]"
    how = c.rng.choice(
        (
            f"{proj}.view({v.name}.shape[0], {t}, {h}, {d})",
            f"{proj}.unflatten(-1, ({h}, {d}))",
            f"{proj}.reshape({v.name}.shape[0], -1, {h}, {d})",
        )
    )
    return c.value(f"{how}.transpose(1, 2)")


def attention(c: Composer) -> None:
    v = c.choose([v for v in c.vectors(2) if len(v.dims) == 3 and v.free == ["B", "T"]])
    width, h, d = int(v.dims[-1]), c.rng.choice((2, 3, 4)), c.rng.choice((2, 3, 4))
    kv = c.rng.choice([k for k in range(1, h + 1) if h % k == 0])
    e = c.rng.choice((d, d, 3))
    if kv == h and e == d and c.rng.random() < 0.4:
        fused = c.value(f"F.linear({v.name}, {c.parameter(3 * h * d, width)})")
        if c.rng.random() < 0.5:
            names = [c.fresh() for _ in range(3)]
            c.step(
                f"{', '.join(names)} = {fused.name}.{c.rng.choice((f'split({h * d}, -1)', 'chunk(3, dim=-1)'))}", *names
            )
            q, k, w = (_heads(c, v, h, d, n) for n in names)
        else:
            x = c.value(f"{fused.name}.unflatten(-1, (3, {h}, {d})).permute(2, 0, 3, 1, 4)")
            names = [c.fresh() for _ in range(3)]
            q, k, w = c.step(f"{', '.join(names)} = {x.name}.unbind(0)", *names)
    else:
        q = _heads(c, v, h, d, _linear(c, v, h * d).name)
        k = _heads(c, v, kv, d, _linear(c, v, kv * d).name)
        w = _heads(c, v, kv, e, _linear(c, v, kv * e).name)
    if c.rng.random() < 0.25:
        q, k = (c.value(f"F.rms_norm({x.name}, ({d},), {c.parameter(d)}, 1e-5)") for x in (q, k))
    if d % 2 == 0 and c.rng.random() < 0.3:
        q, k = _rotary(c, q, d), _rotary(c, k, d)
    scale = c.rng.choice(("", f", scale={c.rng.choice(('0.3', f'1 / math.sqrt({d})', f'{q.name}.shape[-1] ** -0.5'))}"))
    causal = c.rng.random() < 0.5
    if c.rng.random() < 0.5:
        grouped = ", enable_gqa=True" if kv != h else ""
        y = c.value(f"F.scaled_dot_product_attention({q.name}, {k.name}, {w.name}, is_causal={causal}{scale}{grouped})")
    else:
        if kv != h:
            k, w = (c.value(f"{x.name}.repeat_interleave({h // kv}, dim=1)") for x in (k, w))
        by = c.rng.choice((f" / math.sqrt({d})", " * 0.4", f" / math.sqrt({q.name}.size(-1))", f" * {d} ** -0.5"))
        scores = c.value(f"{q.name} @ {k.name}.transpose(-2, -1){by}")
        if causal:
            t = c.letter("T")
            mask = c.rng.choice(
                (
                    f"torch.ones({t}, {t}, dtype=torch.bool).triu(1)",
                    f"torch.arange({t})[None, :] > torch.arange({t})[:, None]",
                )
            )
            scores = c.value(f'{scores.name}.masked_fill({mask}, float("-inf"))')
        y = c.value(f"torch.softmax({scores.name}, -1) @ {w.name}")
    t = f"{v.name}.shape[0], {v.name}.shape[1]"
    y = c.value(
        c.rng.choice((f"{y.name}.transpose(1, 2).flatten(2)", f"{y.name}.transpose(1, 2).reshape({t}, {h * e})"))
    )
    out = _linear(c, y, width)
    if c.rng.random() < 0.7:
        c.value(f"{v.name} + {out.name}")


def _rotary(c: Composer, q: Value, d: int) -> Value:
    t = c.letter("T")
    angles = c.value(f"torch.arange({t})[:, None] * (10.0 ** -torch.arange({d // 2}))[None, :]")
    if c.rng.random() < 0.5:
        a, b = f"{q.name}[..., :{d // 2}]", f"{q.name}[..., {d // 2}:]"
        cos, sin = f"{angles.name}.cos()", f"{angles.name}.sin()"
        how = f"torch.cat([{a} * {cos} - {b} * {sin}, {b} * {cos} + {a} * {sin}], -1)"
    else:
        turned = c.value(f"torch.stack([-{q.name}[..., 1::2], {q.name}[..., ::2]], -1).flatten(-2)")
        wide = c.value(f"{angles.name}.repeat_interleave(2, -1)")
        how = f"{q.name} * {wide.name}.cos() + {turned.name} * {wide.name}.sin()"
    return c.value(f"({how}).to({q.name}.dtype)")


def module(c: Composer) -> None:
    v = c.choose([v for v in c.vectors(2) if len(v.dims) == 3 and int(v.dims[-1]) % 2 == 0])
    layer = c.member(f"self.NAME = nn.MultiheadAttention({v.dims[-1]}, 2, batch_first=True)", "l")
    c.value(f"{layer}({v.name}, {v.name}, {v.name}, need_weights=False)[0]")


def linear_attention(c: Composer) -> None:
    v, d = c.choose(c.vectors(2)), c.size()
    q, k, w = (_linear(c, v, n).name for n in (d, d, c.size()))
    k = c.value(f"{c.rng.choice(('F.relu', 'torch.sigmoid', 'torch.exp'))}({k})").name
    c.value(f"{q} @ ({k}.transpose(-2, -1) @ {w})")
