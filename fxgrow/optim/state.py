"""The state of one grown parameter, its gradient, and its slices: worked out, nothing changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from fxgrow import kernels
from fxgrow.ir.dtensors import is_sharded, local_of
from fxgrow.optim.slices import Slice
from fxgrow.plan import TensorPlan
from fxgrow.weights.materialise import copy_gradient, materialise_moment, materialise_tensor
from fxgrow.weights.moments import Moment, moment_of
from fxgrow.weights.shards import local_entries, sums_of


def is_fresh(plan: TensorPlan) -> bool:
    """A parameter of an inserted block or layer: it starts without state."""
    return plan.init is not None or plan.zero or plan.fresh


def map_gradient(plan: TensorPlan, old: nn.Parameter, new: nn.Parameter) -> torch.Tensor | None:
    """A gradient that waits for its step, as the grown model's would be; None where there is none."""
    if old.grad is None or not new.requires_grad:
        return None
    dense = copy_gradient(plan, old.grad.to_dense() if old.grad.is_sparse else old.grad)
    if old.grad.is_sparse:
        return _like_sparse(plan, old.grad, dense).to(new.device, new.dtype)
    return _laid_out(dense.to(new.device, new.dtype), new)


def _like_sparse(plan: TensorPlan, old: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
    """A sparse gradient of the rows that the old one has, those of zeros among them: they take a step all the same."""
    old = old.coalesce()
    marks = torch.sparse_coo_tensor(old.indices(), torch.ones_like(old.values()), old.shape, check_invariants=False)
    held = copy_gradient(plan, marks.to_dense()) != 0
    for _ in range(old.dense_dim()):
        held = held.any(-1)
    rows = held.nonzero().t()
    return torch.sparse_coo_tensor(rows, dense[tuple(rows)], dense.shape, check_invariants=False).coalesce()


def map_state(
    plan: TensorPlan,
    optimizer: torch.optim.Optimizer,
    old: nn.Parameter,
    new: nn.Parameter,
    policy: str,
    shared: Mapping[int, torch.Tensor],
) -> dict[str, Any]:
    """The state of a grown parameter; ``check_optimizer`` has seen that it can be mapped.

    Args:
        shared: state that several parameters have in common, by ``id``: it stays one tensor.
    """
    out: dict[str, Any] = {}
    state = optimizer.state[old]
    scaled = policy != "exact"
    for key, value in state.items():
        if not isinstance(value, torch.Tensor):
            out[key] = value
            continue
        if id(value) in shared:
            out[key] = shared[id(value)]
            continue
        # not known with policy "exact" alone, where nothing is scaled
        moment = moment_of(optimizer, key, state) or Moment()
        if moment.count or value.shape != moment.shape(old.shape):
            out[key] = _moved(value.clone(), new) if value.device == old.device else value.clone()
        elif moment.averaged is not None:
            out[key] = _placed(_averaged(plan, moment, value, scaled), old, new)
        elif moment.weight:
            out[key] = _placed(materialise_tensor(plan, value), old, new)
        else:
            keep = policy != "asymmetric" or moment.seeded
            numbers = value if value.is_floating_point() or value.is_complex() else value.double()  # a count by entry
            mapped = materialise_moment(plan, numbers, moment, scale_gradients=scaled, keep_copies=keep)
            if scaled and moment.seeded:
                _seed(plan, numbers, mapped)
            out[key] = (
                _placed(mapped, old, new) if numbers is value else _laid_out(_moved(mapped, new).to(value.dtype), new)
            )
    return out


def _placed(mapped: torch.Tensor, old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Where and as what the grown parameter is, and laid out like it: fused steps walk both in order of memory."""
    placed = _moved(mapped, new)
    return _laid_out(placed.to(new.dtype) if mapped.dtype == old.dtype else placed, new)


def _moved(value: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    return value if new.is_meta else value.to(new.device)


def _laid_out(value: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    if value.shape != new.shape or value.stride() == new.stride():
        return value
    return torch.empty_like(new, dtype=value.dtype, device=value.device, requires_grad=False).copy_(value)


def _averaged(plan: TensorPlan, moment: Moment, value: torch.Tensor, scaled: bool) -> torch.Tensor:
    """State that was averaged over one dim: mapped along the others, times the average of that dim's factors."""
    d = plan.dims[reduced] if (reduced := moment.dim(torch.Size(plan.shape))) is not None else None
    others = plan.model_copy(
        update={
            "dims": [None if i == reduced else one for i, one in enumerate(plan.dims)],
            "shape": [1 if i == reduced else n for i, n in enumerate(plan.shape)],
        }
    )
    out = materialise_moment(others, value, moment, scale_gradients=scaled)
    if moment.seeded:
        _seed(others, value, out)
    if d is None or not scaled:
        return out
    factors = np.ones(d.size)
    if d.gradient is not None:
        factors = factors * d.gradient**moment.gradient
    if d.split is not None:
        factors = factors * d.split**moment.value
    return out.mul_(float(np.mean(factors)))


def _seed(plan: TensorPlan, old: torch.Tensor, mapped: torch.Tensor) -> None:
    """Newborn units under the tensor's old step count would take steps several times too long with v = 0."""
    average = (sums_of(old) if is_sharded(old) else kernels.Sums.of(old)).mean
    local = local_of(mapped)
    for i, d in enumerate(plan.dims):
        if d is not None and bool((d.index < 0).any()):
            rows = np.flatnonzero(d.index < 0)
            if is_sharded(mapped):
                rows = local_entries(rows, mapped, i)
            local.index_fill_(i, torch.from_numpy(rows).to(local.device), average)


def slice_of(plan: TensorPlan, policy: str) -> Slice | None:
    """The per-slice rates that a growth leaves a parameter, if any."""
    fresh = is_fresh(plan)
    if policy == "asymmetric":
        if fresh:
            return Slice(whole=True)
        newborn = [None if d is None or not d.newborn.any() else d.newborn for d in plan.dims]
        return Slice(newborn=newborn) if any(n is not None for n in newborn) else None
    if policy == "exact" and not fresh:
        out = Slice(
            value=[None if d is None else d.split for d in plan.dims],
            gradient=[None if d is None else d.gradient for d in plan.dims],
            value_scale=plan.scale,
            gradient_scale=plan.gradient_scale,
            copies=[None if d is None else _counts(d.index) for d in plan.dims],
        )
        return out if out.scaled else None
    return None


def _counts(index: np.ndarray) -> np.ndarray | None:
    """How many entries each one's source has; 1 for newborn ones. None where none has more."""
    out = np.ones(len(index))
    old = index >= 0
    if old.any():
        out[old] = np.bincount(index[old])[index[old]]
    return out if bool((out > 1).any()) else None
