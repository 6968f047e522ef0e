"""Fourier transforms: linear, mixing the entries of the dims they run over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fxgrow.rules.base import Rule, register_table
from fxgrow.rules.forms import Along


def table() -> dict[str, Rule]:
    """Transforms of one dim, of two, of any number, and what puts their middle first."""
    return {
        """
        aten.fft_fft aten.fft_ifft aten.fft_rfft aten.fft_irfft aten.fft_hfft aten.fft_ihfft
        aten.fft_fft2 aten.fft_ifft2 aten.fft_rfft2 aten.fft_irfft2 aten.fft_hfft2 aten.fft_ihfft2
        aten.fft_fftn aten.fft_ifftn aten.fft_rfftn aten.fft_irfftn aten.fft_hfftn aten.fft_ihfftn
        aten.fft_fftshift aten.fft_ifftshift
        """: Along(_transformed, "mixed", "a Fourier transform runs over it", result="new", moves=True),
    }


def _transformed(args: Mapping[str, Any], rank: int) -> list[int]:
    """dim, or the last dims that s gives sizes of, or all"""
    dims = args.get("dim")
    if dims is None:
        sizes = args.get("s")
        return list(range(rank - len(sizes), rank)) if sizes else list(range(rank))
    return list(dims) if isinstance(dims, list | tuple) else [int(dims)]


register_table(__name__, table())
