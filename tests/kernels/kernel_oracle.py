"""A slow materialise, element by element in Python, that shares no code with the kernels; and builders of maps."""

from __future__ import annotations

import itertools
import random
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from fxgrow.kernels import FILL_CONSTANT, FILL_MEAN, FILL_RANDOM, FILL_ZERO, DimMap, Noise

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def shares(index: Tensor, uneven: bool = False) -> Tensor:
    """Shares that sum to 1 in every group of old units, even or in the ratio 1 : 2 : 3 …; 1 elsewhere."""
    order = torch.argsort(index, stable=True)
    _, unit, count = index.unique(return_inverse=True, return_counts=True)
    rank = torch.empty_like(index)
    starts = count.cumsum(0) - count
    rank[order] = torch.arange(len(index)) - starts[unit[order]]
    weight = (rank + 1 if uneven else torch.ones_like(rank)).double()
    total = torch.zeros(len(count), dtype=torch.float64).index_add_(0, unit, weight)
    return weight / total[unit]


def tiled(size: int, new: int, split: bool = False, uneven: bool = False, scale: Tensor | None = None) -> DimMap:
    index = torch.arange(new) % size
    return DimMap(index, split=shares(index, uneven) if split else None, scale=scale)


def interleaved(size: int, times: int, split: bool = False) -> DimMap:
    index = torch.arange(size).repeat_interleave(times)
    return DimMap(index, split=shares(index) if split else None)


def padded(size: int, new: int, fill: int) -> DimMap:
    index = torch.cat([torch.arange(size), -1 - torch.arange(new - size)])
    return DimMap(index, fill=torch.full((new,), fill, dtype=torch.uint8))


def expected(
    source: Tensor, dims: list[DimMap | None], scale: float = 1.0, constant: float = 0.0
) -> tuple[Tensor, Tensor]:
    """float64 values without noise, splits taken as plain products, and a mask of the randomly filled entries."""
    maps = [m if m is not None else DimMap(torch.arange(n)) for m, n in zip(dims, source.shape, strict=True)]
    shape = [len(m.index) for m in maps]
    out = torch.zeros(shape, dtype=torch.float64)
    random = torch.zeros(shape, dtype=torch.bool)
    wide = source.double()
    for at in itertools.product(*map(range, shape)):
        codes, pick, factor = [], [], scale
        for m, i in zip(maps, at, strict=True):
            unit = int(m.index[i])
            factor *= 1.0 if m.scale is None else float(m.scale[i])
            if unit < 0:
                codes.append(FILL_ZERO if m.fill is None else int(m.fill[i]))
                pick.append(slice(None) if codes[-1] == FILL_MEAN else 0)
            else:
                pick.append(unit)
        share = 1.0
        for m, i in zip(maps, at, strict=True):
            share *= 1.0 if m.split is None else float(m.split[i])
        if FILL_ZERO in codes:
            continue
        if FILL_CONSTANT in codes:
            out[at] = constant * share
        elif FILL_RANDOM in codes:
            random[at] = True
        else:
            out[at] = wide[tuple(pick)].mean() * factor * share
    return out, random


def exact_sums(grown: Tensor, index: Tensor, dim: int, units: int) -> list[Fraction]:
    """Sums of the copies of each unit along `dim`, in exact rational arithmetic, flattened."""
    rows = grown.movedim(dim, 0).reshape(len(index), -1)
    total = [[Fraction(0)] * rows.shape[1] for _ in range(units)]
    for entry, unit in enumerate(index.tolist()):
        for column, value in enumerate(rows[entry].tolist()):
            total[unit][column] += Fraction(value)
    return [value for row in total for value in row]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal to the bit, signs of zero included; NaNs count as equal."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    nan = a.isnan() & b.isnan()
    ints = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.dtype.itemsize]
    return bool(((a.contiguous().view(ints) == b.contiguous().view(ints)) | nan).all())


def random_case(seed: int) -> tuple[Tensor, list[DimMap | None], dict[str, Any]]:
    """A source, maps and arguments for `materialise`, drawn from everything the interface allows."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    rank = rng.choice([0, 1, 2, 2, 2, 3, 4])
    sizes = [1, 2, 3, 4, 5, 7, 8, 16, 33] if rank > 2 else [1, 3, 8, 17, 64, 300]
    shape = [rng.choice(sizes) for _ in range(rank)]
    if rank == 4:
        shape = [min(n, 8) for n in shape]
    dtype, target = rng.choice(DTYPES), rng.choice([*DTYPES, None])
    x = torch.randn(shape, generator=generator).to(dtype)
    if rank and rng.random() < 0.3:
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    split = rng.randrange(-1, rank) if rank else -1
    dims = [_random_map(rng, generator, n, d == split) for d, n in enumerate(shape)]
    noise = None
    if rng.random() < 0.67:
        noise = Noise(
            rng.choice(["antisymmetric", "independent"]),
            0.1,
            newborn_scale=rng.choice([0, 0.2]),
            distribution=rng.choice(["bytes", "normal", "rademacher"]),
            seed=seed,
        )
    arguments: dict[str, Any] = {
        "noise": noise,
        "key": seed,
        "scale": rng.choice([1.0, 1.0, 0.7]),
        "constant": 1.5,
        "random_std": 0.3,
        "dtype": target,
    }
    full = [len(m.index) if m is not None else n for m, n in zip(dims, shape, strict=True)]
    if rng.random() < 0.5:
        arguments["offset"] = [rng.randrange(n) for n in full]
        arguments["local_shape"] = [rng.randrange(n - o + 1) for n, o in zip(full, arguments["offset"], strict=True)]
    return x, dims, arguments


def _random_map(rng: random.Random, generator: torch.Generator, size: int, may_split: bool) -> DimMap | None:
    kind = rng.choice(["none", "tiled", "interleaved", "random", "padded", "shuffled", "scaled", "own scales"])
    if kind == "none":
        return None
    new = rng.randrange(size, 3 * size + 2)
    if kind == "tiled":
        index = torch.arange(new) % size
    elif kind == "interleaved":
        index = torch.arange(size).repeat_interleave(rng.choice([2, 3]))
    elif kind == "random":
        index = torch.randint(size, (new,), generator=generator)
    else:
        index = torch.cat([torch.arange(size), torch.randint(size, (rng.randrange(size + 1),), generator=generator)])
    fill = scale = split = None
    if kind in ("padded", "shuffled"):
        births = rng.randrange(1, 5)
        ids = torch.randint(-births, 0, (rng.randrange(1, 7),), generator=generator)
        codes = torch.randint(0, 4, (births,), generator=generator)
        fill = torch.cat([torch.zeros(len(index), dtype=torch.int64), codes[-ids - 1]]).byte()
        index = torch.cat([index, ids])
        if kind == "shuffled":
            order = torch.randperm(len(index), generator=generator)
            index, fill = index[order], fill[order]
    if may_split and rng.random() < 0.8 and kind != "own scales":
        split = shares(index, rng.random() < 0.5)
    if kind == "scaled":
        scale = torch.linspace(0.5, 2, size).double()[index]
    if kind == "own scales":
        scale = torch.linspace(0.5, 2, len(index)).double()
    return DimMap(index, split=split, scale=scale, fill=fill)
