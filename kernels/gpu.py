"""The Triton backend (being written)."""

from __future__ import annotations

from torch import Tensor

from fxgrow.kernels.job import Job


class Unsupported(Exception):
    """A call this backend leaves to the torch backend."""


def available() -> str | None:
    return "not built yet"


def devices() -> str:
    return "CUDA and ROCm GPUs"


def run(job: Job, out: Tensor) -> None:
    raise Unsupported
