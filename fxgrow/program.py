"""``capture``: a model as the compiler sees it, with its axes."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from fxgrow import kernels
from fxgrow.analysis.axes import Axes
from fxgrow.analysis.relate import analyse
from fxgrow.errors import CaptureError
from fxgrow.ir import trees
from fxgrow.ir.libraries import twins_of
from fxgrow.ir.plain import as_plain
from fxgrow.ir.replicas import innermost, plainly
from fxgrow.ir.traced import Traced
from fxgrow.trace.foreign import without_values
from fxgrow.trace.tracer import trace


@dataclass
class Program(Traced):
    """A captured model: see :class:`~fxgrow.ir.traced.Traced` for its graph and names."""

    @functools.cached_property
    def axes(self) -> Axes:
        """The axes of the model, analysed on first use."""
        return analyse(self)

    @classmethod
    def of(cls, traced: Traced) -> Program:
        """A traced model as a program; one that is a program already as it is."""
        if isinstance(traced, cls):
            return traced
        return cls(**{f.name: getattr(traced, f.name) for f in dataclasses.fields(traced)})


def capture(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    calls: Mapping[str, Any] | None = None,
    dynamic: Literal["all", "batch"] = "all",
) -> Program:
    """Trace ``model`` as it is called with ``args`` and ``kwargs``.

    Every dim of every tensor input is dynamic unless the model itself fixes it; dims of size 1 are taken as fixed, so
    use a batch of at least 2. The model is left as it was. One that is sharded (FSDP2, tensor parallel) is traced as
    the plain one that it is of, on the CPU: its parameters are shapes in the program, and each rank traces for itself.

    Args:
        model: any module that ``torch.export`` can trace, compiled or in ``DistributedDataParallel`` or not.
        args, kwargs: one example call.
        calls: instead, or in addition, several named ones: name to a tuple of arguments or a dict of keyword arguments,
            e.g. ``{"train": (x, y), "generate": (x,)}``. All of them constrain the axes, and a grown module chooses
            among them by the arguments it is given.
        dynamic: ``batch`` keeps every input dim but the first at the size of the example. Models that compute paddings
            and windows from the size of an image (Swin, MaxViT) trace ten times faster so. Where PyTorch's symbolic
            arithmetic gives up on a model, this is done without being asked, with a warning.

    Raises:
        CaptureError: the model cannot be exported; the message carries PyTorch's reason and the source line.
    """
    if not isinstance(model, nn.Module):
        raise CaptureError(f"capture needs an nn.Module, got {type(model).__name__}")
    inner = innermost(model)
    if any(p.device.type == "cpu" for p in inner.parameters()):
        kernels.get_ready()  # while the model is traced
    with plainly(inner), as_plain(inner) as plain, contextlib.ExitStack() as around:
        if plain is not None:
            around.enter_context(without_values())
            args, kwargs, calls = trees.map_tensors(torch.Tensor.cpu, (args, kwargs, calls))
        program = Program.of(trace(inner, args, kwargs, calls=calls, dynamic=dynamic))
        program.twins = twins_of(inner)
    if plain is not None:
        program.parameters = program.without_tensors().parameters
    return program


__all__ = ["Program", "capture"]
