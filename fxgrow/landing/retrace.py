"""A trace of a class by the calls that another program was traced by."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from fxgrow.ir.traced import Traced
from fxgrow.program import Program, capture


def retrace(model: nn.Module, program: Traced) -> Program:
    """Trace a model with another program's examples, the same sizes left open.

    Raises:
        CaptureError: it cannot be traced so.
    """
    calls: dict[str, Any] = {}
    args, kwargs = program.args, program.kwargs
    first = program.calls[0].name if program.calls else ""
    named = {c.name: c for c in program.calls}
    if len(named) > 1 or first != "forward":
        calls = {n: c.kwargs if c.kwargs and not c.args else c.args for n, c in named.items()}
        args, kwargs = (), {}
    return capture(model, args, kwargs, calls=calls or None, dynamic=_dynamic(program))


def _dynamic(program: Traced) -> Literal["all", "batch"]:
    """How a program was captured: whether every size of an input but the first is fixed in it."""
    later = [s for c in program.calls for sizes in c.sizes.values() for s in sizes[1:]]
    return "batch" if later and None not in later else "all"


__all__ = ["retrace"]
