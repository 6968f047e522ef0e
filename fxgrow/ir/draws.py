"""Random numbers that PyTorch's own generators draw, from a seed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


def seed(number: int) -> None:
    """Seed the generators of the CPU and of whatever accelerator there is, as ``torch.manual_seed`` does.

    That notes a stack trace for every kind of device that is not there, and keeps it: milliseconds and memory a call.
    """
    if torch.accelerator.is_available():
        torch.manual_seed(number)
    else:
        torch.default_generator.manual_seed(number)


@contextlib.contextmanager
def same_draws(number: int = 0) -> Iterator[None]:
    """Draw the same random numbers every time; afterwards the generators are as they were."""
    with torch.random.fork_rng():
        seed(number)
        yield


__all__ = ["same_draws", "seed"]
