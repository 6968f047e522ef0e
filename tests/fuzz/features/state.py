"""Buffers that forward writes: averages, counters, caches, code books, fast weights; and writes into activations."""

from __future__ import annotations

from tests.fuzz.compose import Composer, Value
from tests.fuzz.features.layers import _activated, _linear


def _mean(c: Composer, v: Value) -> str:
    """Over all dims but the last."""
    return f"{v.name}.detach().mean(({', '.join(map(str, range(len(v.dims) - 1)))},))"


def average(c: Composer) -> None:
    """A moving average of an axis, read before or after it is written."""
    v = c.choose(c.vectors())
    d = int(v.dims[-1])
    b = c.buffer(c.rng.choice((f"rnd({d})", f"torch.zeros({d})", f"torch.ones({d})")))
    m = c.value(_mean(c, v))
    read = c.rng.choice(
        (
            f"{v.name} - {b}",
            f"{v.name} * {b}",
            f"{v.name} + {b}.clone()",
            f"{v.name} * torch.tanh({b})",
            f"F.linear({b}.clone(), {c.parameter(2, d)})",
        )
    )
    before = c.rng.random() < 0.5
    if before:
        c.value(read)
    write = c.rng.choice(
        (
            f"{b}.mul_(0.9).add_(0.1 * {m.name})",
            f"{b}.mul_(0.9)\n{b}.add_({m.name}, alpha=0.1)",
            f"{b}.copy_(0.9 * {b} + 0.1 * {m.name})",
            f"{b}.lerp_({m.name}, 0.1)",
            f"{b}.add_({m.name})",
            f"{b}.copy_({m.name})",
            f"{b}[:] = 0.5 * {b} + {m.name}",
            f"{b}.copy_(torch.maximum({b}, {m.name}))",
            f"{b} += {m.name}",
            f"{b}.mul_({b}.abs() / ({b}.abs().mean() + 1)).add_({m.name})",
            f"{b}.sub_({b}.mean()).add_({m.name})",
        )
    )
    write = c.rng.choice((write, write, "if self.training:\n    " + write.replace("\n", "\n    ")))
    c.step(write, keep=True)
    if not before or c.rng.random() < 0.3:
        c.value(read)


def counter(c: Composer) -> None:
    v = c.choose(c.vectors())
    b = c.buffer(c.rng.choice(("torch.zeros(())", "torch.zeros((), dtype=torch.int64)", "torch.ones(1)")))
    c.step(c.rng.choice((f"{b}.add_(1)", f"{b} += 1", f"{b}.copy_({b} + 1)")), keep=True)
    c.value(
        c.rng.choice(
            (
                f"{v.name} * {b}",
                f"{v.name} / (1 + {b})",
                f"torch.where({b} > 1, {v.name}, 2 * {v.name})",
                f"{v.name} * (1 - 0.5 ** {b})",
            )
        )
    )


def fast_weight(c: Composer) -> None:
    """A buffer that is read as a weight, and written from what it was read with."""
    h = _activated(c, _linear(c, c.choose(c.vectors())))
    d, n = int(h.dims[-1]), c.rng.choice((2, 3))
    m = c.buffer(c.rng.choice((f"rnd({n}, {d})", f"torch.zeros({n}, {d})")))
    z = c.value(f"F.linear({h.name}, {m}.clone())")
    zm, hm = c.value(_mean(c, z)), c.value(_mean(c, h))
    update = c.rng.choice(
        (f"{zm.name}[:, None] * {hm.name}", f"torch.outer({zm.name}, {hm.name})", f"{hm.name}.expand({n}, {d})")
    )
    c.step(
        c.rng.choice(
            (
                f"{m}.copy_((0.9 * {m} + 0.1 * {update}).detach())",
                f"{m}.mul_(0.9).add_(0.1 * {update})",
                f"{m}.add_({update}, alpha=0.2)",
                f"{m}.copy_({m} / ({m}.norm(dim=-1, keepdim=True) + 0.1) + {update})",
                f"{m}.copy_({m} - {m}.mean(-1, keepdim=True) + 0.1 * {update})",
                f"{m}.copy_(torch.roll({m}, 1, 0) + 0.1 * {update})",
            )
        ),
        keep=True,
    )


def cache(c: Composer) -> None:
    """Rows that are written one after the other, or shifted out."""
    v = c.choose(c.vectors())
    d = int(v.dims[-1])
    b = c.buffer(f"{c.rng.choice(('torch.zeros', 'rnd'))}({4}, {d})")
    m = c.value(_mean(c, v))
    roll = c.rng.random()
    if roll < 0.3:
        c.step(f"{b}[{c.rng.choice((0, 1, -1))}] = {m.name}", keep=True)
    elif roll < 0.6:
        c.step(f"{b}.copy_(torch.cat([{b}[1:], {m.name}[None]]))", keep=True)
    elif roll < 0.8:
        c.step(f"{b}.index_copy_(0, torch.tensor([1]), {m.name}[None])", keep=True)
    else:
        c.step(f"{b}[1:3].mul_(0.5).add_({m.name})", keep=True)
    c.value(
        c.rng.choice(
            (f"{v.name} + {b}.mean(0)", f"{v.name} @ {b}.t()", f"F.linear({v.name}, {b})", f"{v.name} * {b}.sum(0)")
        )
    )


def codebook(c: Composer) -> None:
    """Vector quantisation whose codes follow a moving average."""
    v = c.choose(c.vectors())
    d, k = int(v.dims[-1]), c.rng.choice((3, 4))
    book, n = c.buffer(f"rnd({k}, {d})"), c.buffer(f"torch.ones({k})")
    flat = c.value(f"{v.name}.flatten(0, -2)") if len(v.dims) > 2 else v
    far = c.value(f"(({flat.name}[:, None] - {book}) ** 2).sum(-1)")
    hot = c.value(f"F.one_hot({far.name}.argmin(-1), {k}).to({v.name}.dtype)")
    q = c.value(f"({hot.name} @ {book}).view_as({v.name})")
    c.value(f"{v.name} + ({q.name} - {v.name}).detach()")
    seen = f"({hot.name}.t() @ {flat.name}.detach()) / {n}[:, None]"
    c.step(f"{n}.mul_(0.9).add_(0.1 * {hot.name}.sum(0))\n{book}.mul_(0.9).add_(0.1 * {seen})", keep=True)


def written(c: Composer) -> None:
    """In-place writes into activations and views of them."""
    v = c.choose(c.vectors())
    d = int(v.dims[-1])
    name = c.fresh()
    half = max(1, d // 2)
    how = c.rng.choice(
        (
            f"{name}[..., :{half}] = 0",
            f"{name}[..., 0] += 1",
            f"{name}[..., :{half}] *= 2",
            f"{name}.add_(1)",
            f"{name}.mul_({c.parameter(d)})",
            f"{name}.relu_()",
            f"{name}[..., 1] = {name}[..., 0]",
            f"{name}.add_({v.name})",
            f"{name}.clamp_(-0.5, 0.5)",
            f"{name}.view(-1, {d})[:, 0].mul_(3)",
            f"{name}.transpose(0, -1)[0].add_(1)",
            f"{name}[0] = {name}[1]",
            f"{name}.masked_fill_({name} > 0, 0.25)",
            f"{name}[{name} < 0] = 0.1",
            f"{name}.copy_({name}.flip(-1))",
            f"{name}.sub_({name}.mean(-1, keepdim=True))",
            f"{name}.div_({name}.norm(dim=-1, keepdim=True) + 1)",
            f"{name}.fill_(0.5)",
            f"{name}.zero_()",
            f"{name}.t_()" if len(v.dims) == 2 else f"{name}.neg_()",
            f"{name}.cumsum_(-1)",
            f"{name}.narrow(-1, 0, {half}).sub_({name}.narrow(-1, {d - half}, {half}))",
            f"{name}.index_add_(-1, torch.tensor([0]), {name}[..., :1])",
        )
    )
    start = c.rng.choice(
        (
            f"{v.name}.clone()",
            f"{v.name} * 1.0",
            f"torch.tanh({v.name})",
            f"{v.name} + 0",
            f"torch.zeros_like({v.name})",
        )
    )
    c.step(f"{name} = {start}\n{how}", name)


def aliased(c: Composer) -> None:
    """A view that is written through while its base is read, and the other way round."""
    v = c.choose(c.vectors())
    a, b = c.fresh(), c.fresh()
    view = c.rng.choice(
        (f"{a}[..., 1:]", f"{a}.transpose(0, -1)", f"{a}.unsqueeze(-1)", f"{a}[:1]", f"{a}.view(-1)", f"{a}.detach()")
    )
    write = c.rng.choice((f"{b}.mul_(2)", f"{b}.add_(0.5)", f"{b}.zero_()", f"{b}.neg_()"))
    if c.rng.random() < 0.4:
        write = write.replace(b, a)
    c.step(f"{a} = {v.name} + 0.0\n{b} = {view}\n{write}", a, b)


def doubled(c: Composer) -> None:
    """Two buffers that write each other, so that what is assumed of one must hold of the other."""
    v = c.choose(c.vectors())
    d = int(v.dims[-1])
    a, b = c.buffer(f"rnd({d})"), c.buffer(f"torch.zeros({d})")
    m = c.value(_mean(c, v))
    by = c.rng.choice(("0.5", f"{b}.tanh()", m.name))
    c.step(f"{a}.copy_(0.5 * {a} + 0.2 * {b} + 0.1 * {m.name})\n{b}.copy_({a} * {by})", keep=True)
    c.value(c.rng.choice((f"{v.name} + {a}", f"{v.name} * {b}", f"{v.name} * {a} + {b}")))
