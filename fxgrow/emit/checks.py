"""What a regenerated graph checks of its inputs, first of all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from fxgrow.errors import InputError
from fxgrow.ir.guards import check_guards, compile_condition, inputs_of
from fxgrow.ir.nodes import info_of
from fxgrow.ir.traced import Call


def check_dtype(value: torch.Tensor, dtype: torch.dtype, name: str) -> None:
    """The dtype of an input decides what a model that asks for it computes; the graph was made for one of them.

    Raises:
        InputError: an input has another dtype than the module was cast to.
    """
    if value.dtype is not dtype:
        raise InputError(
            f"input {name} is {value.dtype}; the module was cast with its inputs to {dtype}, and its forward asks for "
            f"dtypes: pass {name}.to({dtype})"
        )


def check_size(value: torch.Tensor, sizes: Sequence[int | None], name: str) -> None:
    """Sizes that the trace made part of the graph are checked when it runs.

    Raises:
        InputError: an input has another rank, or another size in a dim that is fixed.
    """
    if len(value.shape) == len(sizes) and all(s is None or s == n for s, n in zip(sizes, value.shape, strict=True)):
        return
    wanted = ", ".join("any" if s is None else str(s) for s in sizes)
    raise InputError(
        f"input {name} has shape {tuple(value.shape)}; this graph takes ({wanted}): the model fixed these sizes when "
        "it was captured. Capture it with an example of the other sizes (dims of size 1 are always taken as fixed)"
    )


def check_inputs(graph: fx.Graph, call: Call) -> None:
    """Check, first of all, the input dims that are numbers in the graph, and its guards."""
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    inputs = {info_of(n).input or str(n.target): n for n in placeholders}
    if call.guards:
        names = list(dict.fromkeys(n for g in call.guards for n in inputs_of(g.condition)))
        guards = [(g.condition, g.source, g.edge) for g in call.guards]
        for guard in call.guards:
            compile_condition(guard.condition)
        with graph.inserting_after(placeholders[-1]):
            graph.call_function(check_guards, ([inputs[n] for n in names], names, *guards))
    for name, dtype in call.dtypes.items():
        with graph.inserting_after(placeholders[-1]):
            graph.call_function(check_dtype, (inputs[name], dtype, name))
    for name, sizes in reversed(call.sizes.items()):
        with graph.inserting_after(placeholders[-1]):
            graph.call_function(check_size, (inputs[name], list(sizes), name))
