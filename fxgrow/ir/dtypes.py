"""What dtypes can do: which are computed with, and which are only copied."""

from __future__ import annotations

import torch


def is_fine(dtype: torch.dtype) -> bool:
    """Whether a dtype holds real or complex numbers finely enough to be computed with: none of 8 bits or less.

    All others are copied, bit by bit: whole numbers, truth values, and floats of 8 bits, whose shares and means would
    be rounded too far.
    """
    return (dtype.is_floating_point and dtype.itemsize > 1) or dtype.is_complex


def same_kind(own: torch.dtype, wanted: torch.dtype) -> torch.dtype:
    """``wanted``, a dtype of real numbers, for a tensor of another dtype: complex numbers stay complex, and all that is
    copied stays as it is."""
    if own.is_complex:
        return wanted.to_complex()
    return wanted if own.is_floating_point else own
