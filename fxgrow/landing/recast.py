"""The model that was grown, seen in another dtype: its graph there, without its weights and without touching it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fxgrow.emit.casts import refusal
from fxgrow.errors import CaptureError
from fxgrow.ir import trees
from fxgrow.ir.modules import map_tensors, named_tensors, set_tensor
from fxgrow.ir.provenance import Cast, provenance_of
from fxgrow.ir.traced import Traced, by_name
from fxgrow.landing.retrace import retrace
from fxgrow.program import Program


def recast(model: nn.Module, before: Traced, casts: Sequence[Cast]) -> Program:
    """A trace of a copy of the model that was cast, its inputs too; the model is left alone, its weights are not read.

    Raises:
        GrowthRefused: the model cannot be copied, or not be traced in that dtype.
    """
    name = type(model).__name__
    try:
        other = _cast_copy(model, casts)
        program = retrace(other, _cast_examples(before, casts))
    except (CaptureError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        raise refusal(name, casts[-1], f"a copy of {name} that is cast so cannot be traced ({error})") from error
    if program.asks_dtype:
        changed = set(casts[-1].values())
        for call in program.calls:
            leaves = call.flatten(by_name(program.signature, call.args, call.kwargs)) or {}
            given = {n: leaves[n] for n in call.inputs if isinstance(leaves.get(n), torch.Tensor)}
            call.dtypes = {n: t.dtype for n, t in given.items() if t.dtype in changed}
    return program


def _to(tensor: torch.Tensor, casts: Sequence[Cast]) -> torch.Tensor:
    for cast in casts:
        tensor = tensor.to(cast.get(tensor.dtype, tensor.dtype))
    return tensor


def _cast_examples(before: Traced, casts: Sequence[Cast]) -> Traced:
    def of(value: Any) -> Any:
        return trees.map_tensors(lambda t: _to(t, casts), value)

    calls = [dataclasses.replace(c, args=of(c.args), kwargs=of(c.kwargs)) for c in before.calls]
    return dataclasses.replace(before, args=of(before.args), kwargs=of(before.kwargs), calls=calls)


def _cast_copy(model: nn.Module, casts: Sequence[Cast]) -> nn.Module:
    """A copy in other dtypes whose parameters and buffers have memory that nobody wrote into."""
    found = provenance_of(model)
    kept = set() if found is None else set(found.program.constants)  # values of the graph
    memo: dict[int, Any] = {}
    places: dict[str, torch.device] = {}
    for name, tensor in named_tensors(model).items():
        if name in kept:
            continue
        places[name] = tensor.device
        if id(tensor) not in memo:
            empty = torch.empty_like(tensor, device="meta", requires_grad=False)
            is_parameter = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_parameter else empty
    out = copy.deepcopy(model, memo)
    for cast in casts:
        map_tensors(out, lambda t, cast=cast: t.to(cast.get(t.dtype, t.dtype)))  # type: ignore[misc]
    made: dict[int, torch.Tensor] = {}
    for path, part in out.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        for leaf, tensor in (
            *part.named_parameters(recurse=False, remove_duplicate=False),
            *part.named_buffers(recurse=False, remove_duplicate=False),
        ):
            if prefix + leaf not in places or not tensor.is_meta:
                continue
            if id(tensor) not in made:
                real: torch.Tensor = torch.empty_like(tensor, device=places[prefix + leaf], requires_grad=False)
                is_parameter = isinstance(tensor, nn.Parameter)
                made[id(tensor)] = nn.Parameter(real, tensor.requires_grad) if is_parameter else real
            set_tensor(part, leaf, made[id(tensor)])
    return out
