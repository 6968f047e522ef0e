"""Casts of a grown module: which dtypes change, which tensors keep theirs, and what cannot be known."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import nn

from fxgrow.errors import GrowthRefused
from fxgrow.ir import trees
from fxgrow.ir.modules import named_tensors
from fxgrow.ir.nodes import info_of
from fxgrow.ir.traced import Traced

Function = Callable[[torch.Tensor], torch.Tensor]


def cast_by(module: nn.Module, fn: Function) -> dict[torch.dtype, torch.dtype]:
    """The dtypes of a module's tensors that a function casts, each with what it makes of it."""
    out: dict[torch.dtype, torch.dtype] = {}
    for tensor in named_tensors(module).values():
        if tensor.dtype in out or type(tensor.data) is not torch.Tensor:
            continue
        try:
            out[tensor.dtype] = fn(torch.empty(0, dtype=tensor.dtype, device=tensor.device)).dtype
        except (RuntimeError, TypeError, ValueError):  # not for tensors of this shape: it will say so itself
            continue
    return {old: new for old, new in out.items() if old is not new}


def keeping(fn: Function, module: nn.Module, dtypes: Mapping[str, torch.dtype | None]) -> Function:
    """A function that gives tensors their own dtypes, by name; None: that which it has."""
    wanted: dict[int, torch.dtype] = {}
    for name, tensor in named_tensors(module).items():
        if name in dtypes:
            for one in (tensor, tensor.grad):
                if one is not None:
                    wanted[id(one)] = dtypes[name] or tensor.dtype

    def applied(tensor: torch.Tensor) -> torch.Tensor:
        out = fn(tensor)
        dtype = wanted.get(id(tensor), out.dtype)
        return out if out.dtype is dtype else tensor.to(out.device, dtype)

    return applied


def check_cast(program: Traced, cast: Mapping[torch.dtype, torch.dtype]) -> None:
    """Whether a graph is the model's in other dtypes as well.

    Raises:
        GrowthRefused: its forward asks for dtypes, and nothing is left to say what it would do.
    """
    if not program.asks_dtype:
        return
    places = (f", as {name} of {op} at {line or 'an unknown line'}" for op, name, line in _given(program))
    raise refusal(
        program.class_name,
        cast,
        f"its forward asks for dtypes, whose answers are part of the graph{next(places, '')}; and the model that it "
        "was grown from, which could be asked again, is gone or has changed",
    )


def refusal(name: str, cast: Mapping[torch.dtype, torch.dtype], why: str) -> GrowthRefused:
    """Why a module keeps its dtype, and what to do."""
    old, new = next(iter(cast.items()))
    return GrowthRefused(
        f"the grown {name} cannot be cast from {old} to {new}: {why}. Cast the model first and grow it then, or use "
        "growth.apply_(model), which keeps your own class"
    )


def _given(program: Traced) -> Iterator[tuple[str, torch.dtype, str]]:
    """Dtypes of floating point that stand in the graph."""
    for node in program.graph.nodes:
        for leaf in trees.tree_leaves((node.args, node.kwargs)):
            if isinstance(leaf, torch.dtype) and leaf.is_floating_point:
                yield str(node.target), leaf, info_of(node).source
