"""Weights in several roles: tied, transposed, read twice, sliced; and scales that stand before or inside a norm."""

from __future__ import annotations

from tests.fuzz import supply
from tests.fuzz.compose import Composer
from tests.fuzz.features.layers import _activated, _linear


def twice(c: Composer) -> None:
    """One weight applied again, perhaps under a second name."""
    v = c.choose(c.vectors())
    d, n = int(v.dims[-1]), c.size()
    w = c.parameter(n, d)
    again = c.member(f"self.NAME = {w}") if c.rng.random() < 0.4 else w
    h = _activated(c, c.value(f"F.linear({v.name}, {w})"))
    back = c.rng.choice(
        (
            f"F.linear({h.name}, {again}.t())",
            f"{h.name} @ {again}",
            f"F.linear(F.relu({h.name}), {again}.t()) + {v.name}",
        )
    )
    c.value(back)


def tied_layers(c: Composer) -> None:
    v = c.choose(c.vectors())
    d, n = int(v.dims[-1]), c.size()
    a = c.member(f"self.NAME = nn.Linear({d}, {n})", "l")
    b = c.member(f"self.NAME = nn.Linear({n}, {d})", "l")
    again = c.rng.choice((a, b))
    h = c.value(f"{b}(torch.tanh({a}({v.name})))")
    h = c.value(f"{a}({h.name})" if again is a else f"{b}(F.relu({a}({h.name})))")
    if c.rng.random() < 0.4:
        t = c.member(f"self.NAME = nn.Linear({d}, {n}, bias=False); self.NAME.weight = {a}.weight", "l")
        c.value(f"{t}({v.name}) + {a}({v.name})")


def head(c: Composer) -> None:
    """An embedding and the head that it is tied to, with something between."""
    n, vocab = c.size(), c.rng.choice((7, 11))
    ids = [i for i in c.model.inputs if i.high]
    if ids:
        index, vocab = ids[0].name, ids[0].high
    else:
        index = supply.integers(c, c.rng.choice((["B"], ["B", 3])), high=vocab)
    if c.rng.random() < 0.5:
        w = c.member(f"self.NAME = nn.Embedding({vocab}, {n})", "l")
        v, w = c.value(f"{w}({index})"), f"{w}.weight"
    else:
        w = c.parameter(vocab, n)
        v = c.value(f"F.embedding({index}, {w})")
    scale = c.rng.choice(("", "", f"{v.name} * math.sqrt({n})", f"{v.name} * 2.0", f"{v.name} / {v.name}.shape[-1]"))
    if scale:
        v = c.value(scale)
    if c.rng.random() < 0.5:
        v = c.value(f"{v.name} + {_linear(c, _activated(c, _linear(c, v)), n).name}")
    last = c.rng.choice(
        (
            "F.layer_norm({0}, ({1},))",
            "F.rms_norm({0}, ({1},))",
            "F.normalize({0}, dim=-1)",
            "F.layer_norm({0}, ({1},), {2}, {2})",
            "F.rms_norm({0}, ({1},), {2}, 1e-4)",
            "{0}",
        )
    )
    gain = c.parameter(n) if "{2}" in last else ""
    v = c.value(last.format(v.name, n, gain))
    if c.rng.random() < 0.7:
        v = c.value(
            c.rng.choice(
                (
                    f"F.pad({v.name}, (0, 0, 1, 0), value=1.0)",
                    f"{v.name}.cumprod(1)",
                    f"{v.name}.cumsum(1)",
                    f"torch.cat([{v.name}, torch.ones_like({v.name}[:, :1])], 1)",
                    f"{v.name}.roll(1, 1)",
                    f"{v.name}.clamp(-1, 1)",
                    f"{v.name}.flip(1)",
                    f"{v.name}.prod(1, keepdim=True)",
                    f"{v.name}.abs()",
                    f"{v.name}.amax(1)",
                    f"{v.name}.masked_fill({v.name}.sum(-1, keepdim=True) > 0, 0.5)",
                    f"torch.where({v.name} > 0, {v.name}, 1.0)",
                    f"{v.name}.index_fill(1, torch.tensor([0]), 1.0)",
                    f"F.pad({v.name}, (0, 0, 0, 1))",
                    f"{v.name}.var(1)",
                )
            )
        )
    c.value(c.rng.choice((f"F.linear({v.name}, {w})", f"{v.name} @ {w}.t()")))


def two_readers(c: Composer) -> None:
    """One value read by weights that are otherwise apart, and by something that is not linear."""
    h = _activated(c, _linear(c, c.choose(c.vectors())))
    a, b = _linear(c, h), _linear(c, h)
    if a.dims == b.dims:
        c.value(f"{a.name} * {b.name}")
    if c.rng.random() < 0.5:
        c.value(f"{h.name}.{c.rng.choice(('mean', 'amax', 'sum', 'std', 'var', 'prod'))}(-1)")


def scales(c: Composer) -> None:
    """Gains of an axis, a scalar parameter, and numbers of Python."""
    v = c.choose(c.vectors())
    d = int(v.dims[-1])
    how = c.rng.choice(
        (
            f"{v.name} * {c.parameter(d)}",
            f"{v.name} * {c.parameter(d)} + {c.parameter(d)}",
            f"{v.name} * {c.parameter()}",
            f"{c.constant()} * {v.name}",
            f"{v.name} + {c.constant()}",
            f"{v.name} / {c.rng.choice(('2', '1.7'))}",
            f"{c.constant()} - {v.name}",
            f"{v.name} * {c.buffer(f'rnd({d})')}",
            f"{v.name} * (1 + {c.parameter(d)})",
            f"{v.name} * {c.parameter(d)}.softmax(-1)",
            f"{v.name} * {c.parameter(1)}.exp()",
            f"torch.lerp({v.name}, torch.tanh({v.name}), {c.parameter(d)}.sigmoid())",
            f"{v.name} * torch.linspace(0.5, 1.5, {d}, dtype={v.name}.dtype)",
            f"{v.name} + torch.arange({d})",
            f"F.prelu({v.name}.movedim(-1, 1), {c.parameter(d)}).movedim(1, -1)",
            f"{v.name} @ torch.eye({d}, dtype={v.name}.dtype)",
        )
    )
    c.value(how)


def distances(c: Composer) -> None:
    """To a table of codes, and the nearest of them."""
    v, k = c.choose(c.vectors()), c.size()
    d = int(v.dims[-1])
    book = c.rng.choice((c.parameter(k, d), c.buffer(f"rnd({k}, {d})")))
    roll = c.rng.random()
    if roll < 0.4:
        h = c.value(f"torch.cdist({v.name}.flatten(0, -2), {book})")
    elif roll < 0.7:
        h = c.value(f"(({v.name}.unsqueeze(-2) - {book}) ** 2).sum(-1)")
    else:
        h = c.value(f"{v.name} @ {book}.t() - 0.5 * {book}.square().sum(1)")
    roll = c.rng.random()
    if roll < 0.3:
        c.value(f"{h.name}.argmin(-1)")
    elif roll < 0.6:
        c.value(f"F.embedding({h.name}.argmin(-1), {book})")
    elif roll < 0.8:
        c.value(f"torch.softmax(-{h.name}, -1)")


def loss(c: Composer) -> None:
    v = c.choose(c.vectors())
    target = supply.real(c, list(v.dims))
    how = c.rng.choice(
        (
            f"F.mse_loss({v.name}, {target})",
            f"F.cross_entropy({v.name}.flatten(0, -2), torch.softmax({target}, -1).flatten(0, -2))",
            f"F.cosine_similarity({v.name}, {target}, -1)",
            f"F.smooth_l1_loss({v.name}, {target}, reduction='none')",
            f"F.kl_div({v.name}.log_softmax(-1), {target}.softmax(-1), reduction='batchmean')",
            f"F.pairwise_distance({v.name}, {target})",
            f"F.cross_entropy({v.name}.flatten(0, -2), {target}.argmax(-1).flatten())",
        )
    )
    c.value(how)
