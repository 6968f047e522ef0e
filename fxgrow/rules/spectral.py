"""Fourier transforms: linear, mixing the entries of the dims they run over."""

from __future__ import annotations

from typing import Any

from fxgrow.rules.base import register_rule
from fxgrow.rules.order import Blocked


def _transformed(args: Any, rank: int) -> list[int]:
    """The dims a transform runs over: those named, or the last ones that ``s`` gives sizes of, or all."""
    dims = args.get("dim")
    if dims is None:
        sizes = args.get("s")
        return list(range(rank - len(sizes), rank)) if sizes else list(range(rank))
    return list(dims) if isinstance(dims, list | tuple) else [int(dims)]


register_rule(
    [
        f"aten.fft_{kind}{rank}.default"
        for kind in ("fft", "ifft", "rfft", "irfft", "hfft", "ihfft")
        for rank in ("", "2", "n")
    ]
    + ["aten.fft_fftshift.default", "aten.fft_ifftshift.default"],
    Blocked(_transformed, "a Fourier transform runs over it"),
)
