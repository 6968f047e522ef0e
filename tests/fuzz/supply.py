"""Tensors of a wanted shape, made from what a model has: found, projected, pooled, or parameters of their own."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tests.fuzz.compose import Composer, Dim, Rejected, Value


def base(c: Composer, free: list[str]) -> Value:
    """A real value with these free dims, in their order, and one known dim after them."""
    fits = [v for v in c.vectors() if list(v.dims[:-1]) == free]
    if fits and c.rng.random() < 0.9:
        return c.choose(fits)
    wider = [v for v in c.vectors() if set(v.free) >= set(free) and len(v.free) == len(v.dims) - 1 and v.free != free]
    if not wider:
        if fits:
            return c.choose(fits)
        raise Rejected(f"nothing has the dims {free}")
    v = c.choose(wider)
    for place in reversed(range(len(v.dims) - 1)):
        if v.dims[place] not in free:
            how = c.rng.choice((f"{v.name}.mean({place})", f"{v.name}.amax({place})", f"{v.name}.select({place}, 0)"))
            v = c.value(how)
    if v.free != free:
        v = c.value(f"{v.name}.transpose(0, 1)")
    return v


def real(c: Composer, dims: list[Dim], like: Tensor | None = None, grown: bool = True) -> str:
    """The name of a real tensor of these dims; ``like`` is a sample whose range it keeps to.

    ``grown``: rather one that has axes that can grow than a constant.
    """
    if "?" in dims:
        raise Rejected("a dim that no input has")
    fits = [v for v in c.pool if v.real and list(v.dims) == dims and v.dtype is c.model.dtype]
    roll = c.rng.random()
    if fits and roll < 0.5:
        name = c.choose(fits).name
    elif not any(isinstance(d, str) for d in dims):
        name = _fixed(c, [int(d) for d in dims], grown)
    else:
        name = _projected(c, dims).name
    return within(c, name, like)


def _fixed(c: Composer, shape: list[int], grown: bool) -> str:
    """A tensor that does not follow the sizes of the inputs."""
    roll = c.rng.random()
    if not grown and roll < 0.5:
        return c.buffer(f"rnd({', '.join(map(str, shape))})")
    if roll < 0.45 or not shape:
        return c.parameter(*shape)
    if roll < 0.55 and len(shape) > 1:
        inner = c.size()
        left, right = c.parameter(*shape[:-1], inner), c.parameter(inner, shape[-1])
        return c.value(f"{left} @ {right}").name
    return _projected(c, list(shape)).name


def _projected(c: Composer, dims: list[Dim]) -> Value:
    """A projection of something to the wanted dims."""
    free = [d for d in dims if isinstance(d, str)]
    known = [int(d) for d in dims if isinstance(d, int)]
    if len(set(free)) != len(free):
        raise Rejected("a free dim twice")
    inputs = [d for i in c.model.inputs for d in i.dims if isinstance(d, str)]
    order = sorted(free, key=lambda d: inputs.index(d) if d in inputs else 99)
    v = base(c, order)
    n = math.prod(known)
    width = v.dims[-1]
    assert isinstance(width, int)
    if len(known) == 2 and c.rng.random() < 0.4:
        left = "abc"[: len(order)]
        w = c.parameter(*known, width)
        v = c.value(f'torch.einsum("{left}d,ijd->{left}ij", {v.name}, {w})')
    elif not known and c.rng.random() < 0.5:
        v = c.value(f"{v.name} @ {c.parameter(width)}")
    else:
        bias = f", {c.parameter(n)}" if c.rng.random() < 0.5 else ""
        v = c.value(f"F.linear({v.name}, {c.parameter(n, width)}{bias})")
        if not known:
            v = c.value(f"{v.name}.squeeze(-1)")
        elif len(known) > 1:
            how = c.rng.random()
            if how < 0.5 or not order:
                v = c.value(f"{v.name}.unflatten(-1, {tuple(known)})")
            else:
                v = c.value(f"{v.name}.view({c.shape([*order, *known])})")
    have: list[Dim] = [*order, *known]
    if have != dims:
        left_over = list(range(len(have)))
        perm = []
        for d in dims:
            k = next(k for k in left_over if have[k] == d and isinstance(have[k], str) == isinstance(d, str))
            left_over.remove(k)
            perm.append(k)
        v = c.value(f"{v.name}.permute({', '.join(map(str, perm))})")
    return v


def within(c: Composer, name: str, like: Tensor | None) -> str:
    """The same in the range that a sample keeps to: positive, a probability, between -1 and 1."""
    if like is None or not like.numel() or not like.is_floating_point():
        return name
    low, high = float(like.min()), float(like.max())
    if like.numel() > 2 and low >= 1:
        return c.value(c.rng.choice((f"F.softplus({name}) + 1.1", f"{name}.abs() + 1.5"))).name
    if like.numel() > 2 and low > 0 and high < 1:
        return c.value(f"torch.sigmoid({name})").name
    if like.numel() > 2 and low > 0:
        return c.value(c.rng.choice((f"F.softplus({name}) + 0.1", f"{name}.abs() + 0.3", f"{name}.exp()"))).name
    if like.numel() > 3 and low > -1 and high < 1:
        return c.value(f"torch.tanh({name})").name
    return name


def integers(c: Composer, dims: list[Dim], like: Tensor | None = None, high: int = 0) -> str:
    """The name of an integer tensor below ``high``, or within a sample's range."""
    low = 0
    if like is not None and like.numel():
        low, high = int(like.min()), int(like.max()) + 1
        if not any(isinstance(d, str) for d in dims) and list(like.shape) == dims and c.rng.random() < 0.5:
            return c.buffer(f"torch.tensor({like.tolist()}, dtype={like.dtype})")
    high = max(high, 1)
    shift = f" + {low}" if low else ""
    fixed = [int(d) for d in dims if isinstance(d, int)]
    free = [d for d in dims if isinstance(d, str)]
    if not free:
        shape = "".join(f", {n}" for n in fixed)
        return c.buffer(f"ints({max(high - low, 1)}{shape}){shift}")
    sources = [i for i in c.model.inputs if i.high and not i.optional]
    if sources and c.rng.random() < 0.6 and len(set(free)) == len(free):
        i = c.rng.choice(sources)
        if set(free) <= set(i.dims):
            v = c.value(f"{i.name}{''.join('[:, 0]' for d in i.dims if d not in free)}")
            if list(v.dims) == free:
                view = ", ".join(":" if isinstance(d, str) else "None" for d in dims)
                offsets = ""
                if fixed:
                    ones = ", ".join(str(d) if isinstance(d, int) else "1" for d in dims)
                    offsets = f" + torch.arange({math.prod(fixed)}).view({ones})"
                return c.value(f"({v.name}[{view}]{offsets}) % {max(high - low, 1)}{shift}").name
    name = real(c, dims)
    return c.value(f"({name}.sigmoid() * {max(high - low, 1)}).long().clamp(0, {max(high - low, 1) - 1}){shift}").name


def booleans(c: Composer, dims: list[Dim], like: Tensor | None = None) -> str:
    """The name of a mask."""
    if not any(isinstance(d, str) for d in dims) and c.rng.random() < 0.5:
        if like is not None and list(like.shape) == dims:
            return c.buffer(f"torch.tensor({like.tolist()})")
        return c.buffer(f"rnd({', '.join(map(str, dims))}) > 0")
    fits = [v for v in c.pool if v.dtype is torch.bool and list(v.dims) == dims]
    if fits and c.rng.random() < 0.5:
        return c.choose(fits).name
    name = real(c, dims)
    return c.value(f"{name} {c.rng.choice(('>', '<=', '>='))} {c.rng.choice(('0', '0.1'))}").name


def tensor(c: Composer, dims: list[Dim], like: Tensor, grown: bool = True) -> str:
    """A stand-in for a sample's tensor, of its kind and range."""
    if like.dtype is torch.bool:
        return booleans(c, dims, like)
    if like.is_complex():
        return c.value(f"torch.complex({real(c, dims)}, {real(c, dims)})").name
    if not like.is_floating_point():
        return integers(c, dims, like)
    name = real(c, dims, like, grown)
    if like.dtype is not torch.float64 and like.dtype is not c.model.dtype:
        return c.value(f"{name}.to({like.dtype})").name
    return name
