"""Pickling of regenerated modules, for ``torch.save`` of a whole module and for processes that are spawned.

The module is taken apart into its graph as plain data, its names and its tensors, and made anew from them, as a
checkpoint does. To keep a model, use :func:`fxgrow.save`: it needs no pickle.
"""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from fxgrow.capture import Program
from fxgrow.errors import CheckpointError
from fxgrow.regenerate import code_of, regenerate
from fxgrow.serialize import graph_from_json, graph_to_json
from fxgrow.structure import check


def reduce(module: fx.GraphModule) -> tuple[Callable[..., fx.GraphModule], tuple[Any, ...]]:
    """What ``__reduce__`` returns.

    Raises:
        pickle.PicklingError: the module's graph was edited, or holds something that cannot be stored.
    """
    program: Program = module.meta["fxgrow"]
    if code_of(module) != module.meta["fxgrow_code"]:
        raise pickle.PicklingError(
            "the graph of this grown module was edited after the growth, and the edits would be lost; pickle its state "
            "dict, or grow the edited module once more"
        )
    own: dict[str, torch.Tensor] = {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }
    fields = {f.name: getattr(program, f.name) for f in dataclasses.fields(program)}
    try:
        fields["graph"] = graph_to_json(program.graph)
    except CheckpointError as error:
        raise pickle.PicklingError(f"this grown module cannot be pickled: {error}") from error
    fields["_axes"] = None
    modes = {name: m.training for name, m in module.named_modules()}
    return restore, (fields, {n: own[n] for n in program.tensors}, modes)


def restore(
    fields: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], modes: Mapping[str, bool]
) -> fx.GraphModule:
    """The inverse of :func:`reduce`."""
    for call in fields["calls"]:
        for text in (call.structure, *(t for t, _ in call.nested.values())):
            if text is not None:
                check(text)
    program = Program(**{**fields, "graph": graph_from_json(fields["graph"])})
    program.requires_grad = {**program.requires_grad, **{n: t.requires_grad for n, t in tensors.items()}}
    module = regenerate(program, tensors)
    for name, m in module.named_modules():
        m.training = modes.get(name, module.training)
    return module
