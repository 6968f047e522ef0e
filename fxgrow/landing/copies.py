"""Copies of a model that have weights of their own, such as a moving average of its weights."""

from __future__ import annotations

import torch
from torch import nn

from fxgrow.emit.module import regenerate
from fxgrow.errors import FxgrowError
from fxgrow.ir import trees
from fxgrow.ir.modules import named_tensors
from fxgrow.ir.running import run_eval
from fxgrow.ir.traced import Traced
from fxgrow.plan import GrowthPlan
from fxgrow.verify.outputs import relative_errors
from fxgrow.weights.materialise import materialise_all


def grown_tensors(copy: nn.Module, plan: GrowthPlan, before: Traced, grown: Traced) -> dict[str, torch.Tensor]:
    """What a plan makes of a copy's weights, parameters as such; constants of the graph are the model's own.

    Raises:
        FxgrowError: a tensor that is not the model's by name, shape and dtype; or the plan, which was proved for the
            model's weights, does not keep what the copy computes of the example.
    """
    own = named_tensors(copy)
    for name, tensor in {**before.parameters, **before.buffers}.items():
        found = own.get(name)
        if found is None or (found.shape, found.dtype) != (tensor.shape, tensor.dtype):
            there = "is missing" if found is None else f"is {_shown(found)}"
            raise FxgrowError(
                f"this {type(copy).__name__} is no copy of the model as it was captured: {name}, there "
                f"{_shown(tensor)}, {there}. Copies grow from the model's old sizes"
            )
    names = [n for n in plan.tensors if n not in grown.constants]
    tensors = {**dict(materialise_all(plan, own.__getitem__, names)), **grown.constants}
    if plan.exactness == "exact" and not any(t.is_meta for t in own.values()):
        _check(copy, regenerate(grown, tensors), before, plan)
    trained = {name: p.requires_grad for name, p in own.items()}
    usual = any(p.requires_grad for p in copy.parameters())  # of what is made from nothing
    return {
        n: nn.Parameter(t, trained.get(plan.tensors[n].source or "", usual)) if n in grown.parameters else t
        for n, t in tensors.items()
    }


def _shown(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _check(copy: nn.Module, grown: nn.Module, before: Traced, plan: GrowthPlan) -> None:
    """Compare on the example, in the copy's own dtype: proofs may lean on what the model's tensors held."""
    old, new = (run_eval(m, before.args, before.kwargs) for m in (copy, grown))
    outputs = zip(relative_errors(old, new, plan), trees.tensors_in(old), strict=True)
    for error, dtype in ((e.relative_error, t.dtype) for e, t in outputs if t.is_floating_point()):
        if not error <= torch.finfo(dtype).eps ** 0.5:
            raise FxgrowError(
                f"the plan, proved for the model's weights, moves what this {type(copy).__name__} computes by "
                f"{error:.1e} of its largest output; grow the copy by itself: fxgrow.grow(copy, spec, ...)"
            )
