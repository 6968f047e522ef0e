"""Warnings, at the line of the user that led to them."""

from __future__ import annotations

import inspect
import sys
import warnings
from types import FrameType

# What a call may pass through on its way from the user's line; code made at run time has no name.
_BETWEEN = {"", "fxgrow", "torch", *sys.stdlib_module_names}


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Give a warning at the innermost line that is not in fxgrow, in PyTorch or in the standard library.

    ``warnings.warn`` counts frames, and their number goes by how the code between is cut into functions.
    """
    frame = outermost = inspect.currentframe()
    assert frame is not None and outermost is not None
    while _module(frame).partition(".")[0] in _BETWEEN and frame.f_back is not None:
        frame = frame.f_back
    if _module(frame).partition(".")[0] in _BETWEEN:
        frame = outermost
    registry = frame.f_globals.setdefault("__warningregistry__", {})
    warnings.warn_explicit(message, category, frame.f_code.co_filename, frame.f_lineno, _module(frame), registry)


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))


__all__ = ["warn"]
