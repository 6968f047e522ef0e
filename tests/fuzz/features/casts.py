"""Casts: coarser dtypes and back, integers and masks, of values and of weights."""

from __future__ import annotations

from tests.fuzz.compose import Composer
from tests.fuzz.features.layers import _activated, _linear

_COARSE = ("torch.bfloat16", "torch.float16", "torch.float32")
_WHOLE = ("torch.int64", "torch.int32", "torch.int8", "torch.bool", "torch.uint8")


def round_trip(c: Composer) -> None:
    v = c.choose(c.reals())
    how = c.rng.choice(("{0}.to({1}).to({0}.dtype)", "{0}.to({1}).type_as({0})", "{0} * {0}.to({1})"))
    c.value(how.format(v.name, c.rng.choice(_COARSE)))


def computed_coarse(c: Composer) -> None:
    """A norm or an activation in a coarser dtype, as models written for mixed precision hold."""
    v = c.choose(c.vectors())
    d = v.dims[-1]
    how = c.rng.choice(
        (
            f"F.rms_norm({{}}, ({d},))",
            f"F.rms_norm({{}}, ({d},))",
            f"F.rms_norm({{}}, ({d},), eps=1e-6)",
            f"F.layer_norm({{}}, ({d},))",
            "F.normalize({}, dim=-1)",
            "torch.softmax({}, -1)",
            "F.gelu({})",
        )
    )
    if c.rng.random() < 0.5:
        v = c.value(f"{v.name} * 0.05")
    c.value(f"{how.format(f'{v.name}.to({c.rng.choice(_COARSE)})')}.to({v.name}.dtype)")


def whole(c: Composer) -> None:
    """Integers made of values, and what is computed with them."""
    v = c.choose(c.reals())
    dtype = c.rng.choice(_WHOLE)
    scaled = f"({v.name}.abs() * 3)" if "uint" in dtype or "bool" in dtype else f"({v.name} * 3).clamp(-50, 50)"
    h = c.value(f"{scaled}.to({dtype})")
    if c.rng.random() < 0.5:
        c.value(f"{h.name}.to({v.name}.dtype)")


def counts(c: Composer) -> None:
    """How often something holds: sums of masks and of integers."""
    v = c.choose(c.reals())
    test = f"({v.name} {c.rng.choice(('>', '<', '>='))} {c.rng.choice(('0', '0.2'))})"
    dim = c.rng.choice((-1, 0, len(v.dims) - 1))
    how = c.rng.choice(
        (
            ".sum({})",
            ".long().sum({})",
            ".sum({}, keepdim=True)",
            ".int().cumsum({})",
            ".any({})",
            ".long().amax({})",
            ".count_nonzero({})",
            ".all({})",
            ".to(torch.int8).sum({})",
        )
    )
    c.value(test + how.format(dim))


def weights(c: Composer) -> None:
    """A reader whose weight is cast: rounded, made a mask, or stored in a coarser dtype."""
    h = _activated(c, _linear(c, c.choose(c.vectors())))
    n, d = c.size(), int(h.dims[-1])
    how = c.rng.choice(
        (".round().bool()", ".to(torch.int64)", ".bfloat16()", ".half()", " > 0", ".float()", ".round().to(torch.int8)")
    )
    if c.rng.random() < 0.7:
        w = c.parameter(n, d, init="rnd({}) * 3" if "int" in how or "bool" in how else "rnd({})")
    else:
        w = c.buffer(f"rnd({n}, {d}) * 3")
    c.value(f"F.linear({h.name}, ({w}{how}).to({h.name}.dtype))")


def stored(c: Composer) -> None:
    """A tensor stored as integers, in a coarse dtype or as a mask, that scales an axis."""
    v = c.choose(c.vectors())
    d = v.dims[-1]
    init = c.rng.choice(
        (
            f"ints(5, {d}).to(torch.int8)",
            f"ints(3, {d})",
            f"rnd({d}) > 0",
            f"rnd({d}).bfloat16()",
            f"rnd({d}).half()",
            f"rnd({d}).float()",
        )
    )
    b = c.buffer(init)
    c.value(f"{v.name} * {c.rng.choice((f'{b}.to({v.name}.dtype)', b))}")


def quantised(c: Composer) -> None:
    """Straight-through rounding."""
    v = c.choose(c.vectors())
    s = c.rng.choice(("4", f"({v.name}.abs().amax(-1, keepdim=True) / 7 + 1e-3)"))
    q = c.value(f"({v.name} / {s}).round() * {s}")
    c.value(f"{v.name} + ({q.name} - {v.name}).detach()")


def mixed_numbers(c: Composer) -> None:
    """Complex numbers made of halves, turned and taken apart."""
    v = c.choose([v for v in c.vectors() if int(v.dims[-1]) % 2 == 0])
    z = c.value(f"torch.view_as_complex({v.name}.unflatten(-1, (-1, 2)).contiguous())")
    z = c.value(f"{z.name} * torch.exp({c.rng.choice(('1j', '0.5j'))} * {c.parameter(int(v.dims[-1]) // 2)})")
    c.value(c.rng.choice((f"torch.view_as_real({z.name}).flatten(-2)", f"{z.name}.abs()", f"{z.name}.real")))
