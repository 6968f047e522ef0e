"""Code that ``torch.compile`` calls as it is, where it would trace it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def eager(run: Callable[P, R]) -> Callable[P, R]:
    """The same function, which a compiled caller neither traces nor compiles, nor what it calls.

    The compiler is imported when it runs first, as that takes seconds, and whoever makes an optimizer has it by then.
    """
    held: list[Callable[P, R]] = []

    @functools.wraps(run)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if not held:
            held.append(torch.compiler.disable(run))
        return held[0](*args, **kwargs)

    return call


__all__ = ["eager"]
