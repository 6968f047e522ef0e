"""How a buffer goes on: its pattern, recognised from its values and checked against every one of them.

A mask or a table of positions is a function of its coordinates. What cannot be recognised cannot be continued: there is
no training that would correct a wrong guess.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import torch

from fxgrow.kernels import continue_line
from fxgrow.kernels.tables import waves
from fxgrow.plan import Continuation


def recognise(values: torch.Tensor, dims: Sequence[int]) -> Continuation | None:
    """The pattern along ``dims`` of a tensor of any dtype, or None.

    Every old entry follows it: lines and bands to the bit, waves to two units in the last place of the table's dtype
    (sines differ that much between libraries). The dims have at least 2 entries. Tensors on the meta device have the
    pattern ``unknown``.
    """
    dims = sorted(dims)
    if values.is_meta:
        return Continuation(kind="unknown", dims=dims)
    if values.is_complex():
        return None
    values = values.detach().cpu()
    return _line(values, dims) or _band(values, dims) or _waves(values, dims)


def _line(values: torch.Tensor, dims: Sequence[int]) -> Continuation | None:
    if len(dims) != 1 or not bool(torch.isfinite(values).all()):
        return None
    if values.dtype == torch.bool:  # no differences: a constant is the only line
        first = values.narrow(dims[0], 0, 1).expand_as(values)
        return Continuation(kind="line", dims=list(dims)) if torch.equal(values, first) else None
    # from the first two entries alone, so that all the others are a check
    made = continue_line(values.narrow(dims[0], 0, 2), {dims[0]: values.shape[dims[0]]})
    constant = torch.equal(values, values.narrow(dims[0], 0, 1).expand_as(values))
    # two entries are on a line whatever they are
    enough = values.shape[dims[0]] > 2 or constant
    return Continuation(kind="line", dims=list(dims)) if enough and torch.equal(values, made) else None


def _band(values: torch.Tensor, dims: Sequence[int]) -> Continuation | None:
    """A function of column - row with at most two values, settled at both ends: triangles and bands of any width."""
    partners = [(dims[0], dims[1])] if len(dims) == 2 else []
    if len(dims) == 1:
        partners = [(min(dims[0], i), max(dims[0], i)) for i in range(values.dim()) if i != dims[0]]
    for rows, columns in partners:
        n, m = values.shape[rows], values.shape[columns]
        if n < 3 or m < 3:
            continue  # two entries show no pattern
        matrices = values.movedim((rows, columns), (-2, -1)).reshape(-1, n, m)
        if not torch.equal(matrices[:, 1:, 1:], matrices[:, :-1, :-1]):
            continue
        by_distance = torch.cat([matrices[:, :, 0].flip(1), matrices[:, 0, 1:]], 1)
        steps = (by_distance[:, 1:] != by_distance[:, :-1]).sum(1)
        if all(int(s) <= 2 and len(row.unique()) <= 2 for s, row in zip(steps, by_distance, strict=True)):
            return Continuation(kind="band", dims=list(dims), rows=rows, columns=columns)
    return None


def _waves(values: torch.Tensor, dims: Sequence[int]) -> Continuation | None:
    """Rotary and sinusoidal tables: the frequencies fall geometrically from 1, ``base ** (-k / number)``."""
    if len(dims) != 1 or not values.is_floating_point() or values.shape[dims[0]] < 3:
        return None
    (dim,) = dims
    tolerance = 2 * torch.finfo(_own_dtype(values)).eps
    different = 1.0 if tolerance < 1e-6 else 0.02  # half precision would hide another base
    for columns in reversed(range(values.dim())):
        width = values.shape[columns]
        if columns == dim or width < 2:
            continue
        table = values.movedim((dim, columns), (0, 1)).reshape(values.shape[dim], width, -1)
        if not torch.equal(table, table[:, :, :1].expand_as(table)):
            continue
        first = table[0, :, 0].double()
        sines = [bool(x == 0) for x in first]
        if not all(bool(x == 0) or bool(x == 1) for x in first):
            continue
        for order in _layouts(width):
            for base in _bases(table[:, :, 0].double(), order, sines):
                for frequencies, dtype in _frequencies(base, max(order) + 1):
                    listed = [frequencies[k] for k in order]
                    made = waves(values, dim, values.shape[dim], columns, listed, sines, dtype)
                    error = (made.to(values.dtype).double() - values.double()).abs()
                    if float(error.max()) <= tolerance and float((error > 0).double().mean()) <= different:
                        return Continuation(
                            kind="waves",
                            dims=[dim],
                            columns=columns,
                            frequencies=listed,
                            sines=sines,
                            dtype="float64" if dtype is torch.float64 else "float32",
                        )
    return None


def _own_dtype(values: torch.Tensor) -> torch.dtype:
    """float32 for a float64 table that was computed in float32."""
    if values.dtype is torch.float64 and torch.equal(values, values.float().double()):
        return torch.float32
    return values.dtype


def _layouts(width: int) -> Iterator[list[int]]:
    """The number of the frequency of each column: in two halves, interleaved, or each by itself."""
    if width % 2 == 0:
        half = width // 2
        yield [*range(half), *range(half)]
        yield [k for k in range(half) for _ in range(2)]
    yield list(range(width))


def _bases(table: torch.Tensor, order: list[int], sines: list[bool]) -> Iterator[float]:
    """Likely bases, the one that the second frequency tells first."""
    number = max(order) + 1
    if number > 1:
        column = order.index(1)
        value = float(table[1, column])
        angle = math.asin(max(-1.0, min(1.0, value))) if sines[column] else math.acos(max(-1.0, min(1.0, value)))
        if 0 < angle < 1:
            base = angle**-number
            yield from dict.fromkeys((float(round(base)), float(f"{base:.1e}"), float(f"{base:.0e}")))
    yield 10000.0


def _frequencies(base: float, number: int) -> Iterator[tuple[list[float], torch.dtype]]:
    """The usual ways of computing them, which differ by rounding."""
    for dtype, computed in itertools.product((torch.float32, torch.float64), (torch.float32, torch.float64)):
        exponent = torch.arange(0, 2 * number, 2, dtype=dtype)
        ways = (
            1.0 / (base ** (exponent / (2 * number))),
            torch.exp(exponent * (-math.log(base) / (2 * number))),
            base ** (-exponent / (2 * number)),
        )
        for way in ways:
            yield way.double().tolist(), computed
