"""Tables that follow a pattern (numbers, triangles, cosines), continued: buffers whose new entries no training decides.

The old entries are copied to the bit; the new ones are computed from the pattern. Such tables are small and made once
per growth, so that this is plain torch on every device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


@torch.no_grad()
def continue_line(source: Tensor, sizes: Mapping[int, int]) -> Tensor:
    """``x[i] = x[0] + i (x[1] - x[0])`` along one dim: position numbers, ALiBi slopes times distances, constants.

    Args:
        source: at least 2 entries along the dim.
        sizes: the dim and its new size.
    """
    ((dim, size),) = sizes.items()
    wide = source.double() if source.is_floating_point() else source.long()
    first, second = wide.narrow(dim, 0, 1), wide.narrow(dim, 1, 1)
    number = torch.arange(size, dtype=wide.dtype, device=source.device)
    number = number.view([-1 if i == dim else 1 for i in range(source.dim())])
    return _with_old(source, (first + number * (second - first)).to(source.dtype))


@torch.no_grad()
def continue_band(source: Tensor, sizes: Mapping[int, int], rows: int, columns: int) -> Tensor:
    """A matrix that depends on column − row alone, constant far from the diagonal: causal and sliding-window masks.

    Args:
        source: any rank; ``rows < columns`` are two of its dims.
        sizes: new sizes by dim, of ``rows``, ``columns`` or both.
    """
    n, m = source.shape[rows], source.shape[columns]
    # the values by column - row, from the first column upwards and the first row to the right
    left = source.narrow(columns, 0, 1).transpose(rows, columns).flip(columns)
    right = source.narrow(rows, 0, 1).narrow(columns, 1, m - 1)
    values = torch.cat([left, right], columns)
    n_new, m_new = sizes.get(rows, n), sizes.get(columns, m)
    row = torch.arange(n_new, device=source.device).view(-1, 1)
    column = torch.arange(m_new, device=source.device).view(1, -1)
    distance = (column - row).clamp(-(n - 1), m - 1) + (n - 1)
    taken = values.movedim((rows, columns), (-2, -1))[..., 0, :][..., distance]
    return _with_old(source, taken.movedim((-2, -1), (rows, columns)))


@torch.no_grad()
def continue_waves(
    source: Tensor,
    sizes: Mapping[int, int],
    columns: int,
    frequencies: Sequence[float],
    sines: Sequence[bool],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``cos(i ω)`` or ``sin(i ω)`` by column: rotary tables, sinusoidal positions (Vaswani 2017, section 3.5).

    Args:
        sizes: the dim of positions and its new size.
        columns: the dim of the columns.
        frequencies, sines: ω of each column, and whether it holds the sine.
        dtype: in which the table was computed.
    """
    ((dim, size),) = sizes.items()
    return _with_old(source, waves(source, dim, size, columns, frequencies, sines, dtype).to(source.dtype))


def waves(
    like: Tensor,
    dim: int,
    size: int,
    columns: int,
    frequencies: Sequence[float],
    sines: Sequence[bool],
    dtype: torch.dtype,
) -> Tensor:
    """The whole table of :func:`continue_waves`, in ``dtype``."""
    position = torch.arange(size, dtype=dtype, device=like.device)
    angle = torch.outer(position, torch.tensor(frequencies, dtype=dtype, device=like.device))
    sine = torch.tensor(sines, device=like.device)
    table = torch.where(sine, angle.sin(), angle.cos())
    shape = [1] * like.dim()
    shape[dim], shape[columns] = size, len(frequencies)
    full = list(like.shape)
    full[dim] = size
    return (table if dim < columns else table.t()).reshape(shape).expand(full)


def _with_old(source: Tensor, out: Tensor) -> Tensor:
    """The continuation, with the old entries as they were."""
    out = out.clone(memory_format=torch.contiguous_format)
    out[tuple(slice(0, n) for n in source.shape)] = source
    return out
