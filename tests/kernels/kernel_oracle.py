"""A slow materialise, element by element in Python, that shares no code with the kernels; and builders of maps."""

from __future__ import annotations

import itertools
from fractions import Fraction

import torch
from fxgrow.kernels import FILL_CONSTANT, FILL_MEAN, FILL_RANDOM, FILL_ZERO, DimMap
from torch import Tensor

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
