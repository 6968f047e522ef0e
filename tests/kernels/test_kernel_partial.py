"""A rectangle of the old tensor in place of the whole: the same bits, and refused where it is not enough."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fxgrow.kernels import FILL_MEAN, DimMap, materialise
from tests.kernels.kernel_oracle import random_case, same_bits


def needed(x: Tensor, dims: list[DimMap | None], offset: list[int], size: list[int]) -> tuple[list[int], list[int]]:
    """The smallest rectangle of the source that a rectangle of the result is made of; means need all along a dim."""
    first, shape = [], []
    for m, n, a, k in zip(dims, x.shape, offset, size, strict=True):
        index = np.arange(n) if m is None else m.index.numpy()
        units = index[a : a + k]
        units = units[units >= 0]
        if m is not None and m.fill is not None and bool((m.fill == FILL_MEAN).any()):
            units = np.arange(n)
        lo, hi = (int(units.min()), int(units.max()) + 1) if len(units) else (0, 0)
        first.append(lo)
        shape.append(hi - lo)
    return first, shape


@pytest.mark.parametrize("backend", ["torch", None])
def test_a_rectangle_of_the_source_makes_the_same_bits(backend: str | None) -> None:
    partial = 0
    for seed in range(400):
        x, dims, arguments = random_case(seed)
        full = [len(m.index) if m is not None else n for m, n in zip(dims, x.shape, strict=True)]
        offset, size = arguments.get("offset", [0] * x.dim()), arguments.get("local_shape", full)
        first, shape = needed(x, dims, offset, size)
        whole = materialise(x, dims, backend=backend, **arguments)
        part = x[tuple(slice(a, a + n) for a, n in zip(first, shape, strict=True))]
        part = part.clone() if seed % 2 else part  # by itself, and as a view of the whole
        shifted = {"source_offset": first, "source_shape": list(x.shape)}
        assert same_bits(materialise(part, dims, backend=backend, **arguments, **shifted), whole), seed
        partial += part.shape != x.shape
    assert partial > 100


def test_a_rectangle_that_does_not_hold_what_is_needed_is_refused() -> None:
    x, rows = torch.randn(4, 3), DimMap(index=torch.tensor([0, 1, 2, 3, 0]))
    with pytest.raises(ValueError, match="dim 0 needs entries 0 to 3 of the source, which holds 2 from 0"):
        materialise(x[:2], [rows, None], source_offset=[0, 0], source_shape=[4, 3])
    with pytest.raises(ValueError, match="leaves the tensor of shape"):
        materialise(x, [rows, None], source_offset=[1, 0], source_shape=[4, 3])
    mean = DimMap(index=torch.tensor([0, -1]), fill=torch.tensor([0, FILL_MEAN], dtype=torch.uint8))
    with pytest.raises(ValueError, match="fill mean along dims"):
        materialise(x[:1], [mean, None], source_offset=[0, 0], source_shape=[4, 3])
