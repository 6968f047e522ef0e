"""Carry an optimizer over a growth: state by provenance, per-slice learning rates.

With s the factor a weight was scaled by and g that of its gradient (every copied axis has s * g = its share a), an
optimizer that works on ``p / s`` with gradient ``grad / g`` takes exactly the steps it took on the small model. That is
how policy ``exact`` runs any optimizer that works entry by entry, weight decay and eps included, instead of rescaling
each one's hyper-parameters (for AdamW: lr*s, wd/s, eps*g, m*g, v*g^2).
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from fxgrow.errors import FxgrowError
from fxgrow.ir.optimizers import is_scheduled
from fxgrow.optim.rates import Slice, SliceRates, all_rates, slice_rates, write_rates
from fxgrow.plan import GrowthPlan, TensorPlan
from fxgrow.weights.materialise import copy_gradient, materialise_moment, materialise_tensor
from fxgrow.weights.moments import Moment, is_elementwise, moment_of, why_unknown

__all__ = ["POLICIES", "Policy", "Slice", "SliceRates", "carry", "check_optimizer", "slice_rates"]

Policy = Literal["exact", "asymmetric", "copy", "reset"]
POLICIES: tuple[str, ...] = ("exact", "asymmetric", "copy", "reset")


def check_optimizer(optimizer: torch.optim.Optimizer, policy: str, *, ramp: int | None = None) -> None:
    """Refuse what no growth could carry, before one is computed.

    Args:
        optimizer: as it is before the growth.
        policy: one of :data:`POLICIES`.
        ramp: as :func:`carry` takes it: at its end the state leaves the small model's units.

    Raises:
        FxgrowError: unknown policy, state that cannot be mapped, or an optimizer that the policy does not fit.
    """
    if policy not in POLICIES:
        raise FxgrowError(f"unknown optimizer policy {policy!r}; choose one of {', '.join(POLICIES)}")
    if policy == "reset":
        return
    kind = type(optimizer).__name__
    if isinstance(optimizer, torch.optim.LBFGS):
        raise FxgrowError(
            f"{kind} keeps a history of whole gradients and evaluates the model inside its step, neither of which can "
            "be carried over a growth. Use policy 'reset'"
        )
    if policy == "exact" and not is_elementwise(optimizer):
        raise FxgrowError(
            f"policy 'exact' needs an optimizer whose step of an entry depends on that entry alone, and {kind} is not "
            "known to be one (Muon orthogonalises whole matrices, Adafactor and LAMB take norms of tensors). Use "
            "policy 'asymmetric' or 'copy'; if it does work entry by entry, say so: "
            f"fxgrow.optim.register_elementwise({kind})"
        )
    for group in optimizer.param_groups:
        for p in group["params"]:
            reason = why_unknown(optimizer, p, optimizer.state.get(p, {}), exact=policy == "exact" and ramp is None)
            if reason:
                raise FxgrowError(
                    f"cannot carry {kind} over a growth: of a parameter of shape {tuple(p.shape)}, {reason}. "
                    "Use policy 'reset'"
                )


def carry(
    plan: GrowthPlan,
    names: Mapping[int, str],
    new: Mapping[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    policy: str = "asymmetric",
    *,
    warmup: int = 250,
    peak: float = 1.3,
    ramp: int | None = None,
    newcomers: bool | None = None,
) -> torch.optim.Optimizer:
    """A new optimizer of the same class over the grown parameters.

    Parameter groups keep their order and hyper-parameters; a new parameter joins the group of the one it was made of,
    and one that was made of nothing (of an inserted layer, a gate) that of its nearest siblings. Gradients that wait
    for a step, and per-slice rates that earlier growths left, come along.

    Args:
        plan: of the growth of the model that ``optimizer`` trains.
        names: ``id`` of each of the small model's parameters to its name.
        new: the grown model's parameters by name.
        optimizer: left as it is. It may hold a part of the model's parameters, where others hold the rest.
        policy: ``exact``: the small model's trajectory goes on unchanged (refused where the growth does not map
            gradients exactly); ``asymmetric``: old entries keep their moments, new ones start with none, and their
            learning rate warms up; ``copy``: every copy inherits its unit's moments, scaled like its
            gradient; ``reset``: no state, and no rates of earlier growths.
        warmup: ``asymmetric``: steps over which the learning rate of new entries warms up, and returns.
        peak: ``asymmetric``: its highest value, as a multiple of the current learning rate.
        ramp: ``exact``: steps over which the per-slice factors go to 1; None: they stay.
        newcomers: whether parameters that were made of nothing join this optimizer; None: where their siblings are.

    Raises:
        FxgrowError: see :func:`check_optimizer`; a parameter the model does not have; or, with several optimizers, a
            newcomer whose siblings are divided among them.
    """
    check_optimizer(optimizer, policy, ramp=ramp)
    plans = plan.tensors
    if policy == "exact" and not plan.exact_gradients:
        axes = ", ".join(f"{a.name} ({a.old} -> {a.new})" for a in plan.axes if not a.exact_gradients)
        raise FxgrowError(
            "policy 'exact' needs a growth whose gradients follow from the small model's, but statistics (of a norm, a "
            f"softmax) run over padded or unevenly split axes: {axes}. Use policy 'asymmetric' or 'copy', or grow by "
            "whole even copies"
        )
    members, old_of = _members(optimizer, names, new, plans, newcomers)
    made = _construct(optimizer, members, new)
    _warn_of_what_stays(optimizer)
    held = [name for group in members for name in group]
    own = SliceRates(warmup=warmup if policy == "asymmetric" else 0, peak=peak, ramp=ramp)
    for name in held:
        tensor, old = plans[name], old_of.get(name)
        fresh = _is_fresh(tensor)
        if old is not None and not fresh:
            if old.grad is not None and new[name].requires_grad:
                dense = copy_gradient(tensor, old.grad.to_dense())
                new[name].grad = dense.to_sparse(old.grad.sparse_dim()) if old.grad.is_sparse else dense
            state = optimizer.state.get(old, {})
            if policy != "reset" and state:
                made.state[new[name]] = _map_state(tensor, optimizer, old, policy)
        s = _slice(tensor, policy, fresh)
        if s is not None:
            own.slices[name] = s
    earlier = [] if policy == "reset" else [r.grown(plans, held) for r in all_rates(optimizer, names)]
    rates = [r for r in (*earlier, own) if not r.finished]
    write_rates(made, rates, {id(new[name]): name for name in held})
    return made


def _is_fresh(plan: TensorPlan) -> bool:
    """A parameter of an inserted block or layer: it starts without state."""
    return plan.init is not None or plan.zero or plan.fresh


def _members(
    optimizer: torch.optim.Optimizer,
    names: Mapping[int, str],
    new: Mapping[str, nn.Parameter],
    plans: Mapping[str, TensorPlan],
    newcomers: bool | None,
) -> tuple[list[list[str]], dict[str, nn.Parameter]]:
    """The grown parameters of each group, by name, and the old parameter that each is made of."""
    by_source: dict[str, list[str]] = {}
    for name in new:
        source = plans[name].source
        if source is not None:
            by_source.setdefault(source, []).append(name)
    members: list[list[str]] = []
    old_of: dict[str, nn.Parameter] = {}
    group_of: dict[str, int] = {}
    for number, group in enumerate(optimizer.param_groups):
        members.append([])
        for p in group["params"]:
            source = names.get(id(p))
            if source is None:
                raise FxgrowError(
                    f"the optimizer holds a parameter of shape {tuple(p.shape)} that the model did not have when it "
                    "was grown; carry the optimizer that trains that model"
                )
            for name in by_source.get(source, []):
                members[number].append(name)
                old_of[name], group_of[name] = p, number
    if newcomers is False:
        return members, old_of
    trained = [n for n in new if plans[n].source is not None and (new[n].requires_grad or n in group_of)]
    alone = newcomers or all(n in group_of for n in trained)
    for name in new:
        if plans[name].source is None:
            siblings = next(_siblings(name, new, trained), [])
            mine = [n for n in siblings if n in group_of]
            if mine and len(mine) < len(siblings) and not alone:
                other = next(n for n in siblings if n not in group_of)
                raise FxgrowError(
                    f"the growth makes a new parameter {name}, and of the parameters beside it this optimizer holds "
                    f"some ({mine[0]}) and another one the rest ({other}). Say which takes the new parameters: "
                    "carry(optimizer, newcomers=True), and newcomers=False for the other"
                )
            if mine:
                members[group_of[mine[0]]].append(name)
            elif alone:
                members[-1].append(name)
    return members, old_of


def _siblings(name: str, new: Mapping[str, nn.Parameter], candidates: list[str]) -> Iterator[list[str]]:
    """The parameters in the nearest module around, with as many dims; then those that are as well (no) matrices."""
    dims, parts = new[name].dim(), name.split(".")
    prefixes = [".".join([*parts[:k], ""]) for k in range(len(parts) - 1, 0, -1)] + [""]
    for alike in (lambda d: d == dims, lambda d: (d < 2) == (dims < 2)):
        for prefix in prefixes:
            found = [n for n in candidates if n.startswith(prefix) and alike(new[n].dim())]
            if found:
                yield found


def _construct(
    optimizer: torch.optim.Optimizer, members: list[list[str]], new: Mapping[str, nn.Parameter]
) -> torch.optim.Optimizer:
    groups: list[dict[str, Any]] = []
    for old, names in zip(optimizer.param_groups, members, strict=True):
        kept = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in old.items()}  # a learning rate
        groups.append({**kept, "params": [new[n] for n in names]})
    cls = type(optimizer)
    accepted = inspect.signature(cls.__init__).parameters
    options: dict[str, Any] = {k: v for k, v in optimizer.defaults.items() if k in accepted and k != "params"}
    made: torch.optim.Optimizer = cls([{k: v for k, v in g.items() if k != "param_names"} for g in groups], **options)
    for target, g, names in zip(made.param_groups, groups, members, strict=True):
        target.update({k: v for k, v in g.items() if k != "params"})
        if "param_names" in g:
            target["param_names"] = list(names)
    return made


def _warn_of_what_stays(optimizer: torch.optim.Optimizer) -> None:
    """What holds on to the old optimizer goes on without a word, and without effect."""
    if is_scheduled(optimizer):
        warnings.warn(
            "a learning-rate scheduler drives the optimizer that was carried over a growth, and goes on with the old "
            "one, without effect on the new: set `scheduler.optimizer = new_optimizer`",
            stacklevel=4,
        )


def _map_state(plan: TensorPlan, optimizer: torch.optim.Optimizer, old: torch.Tensor, policy: str) -> dict[str, Any]:
    """The state of a grown parameter; :func:`check_optimizer` has seen that it can be mapped."""
    out: dict[str, Any] = {}
    state = optimizer.state[old]
    scaled = policy != "exact"
    for key, value in state.items():
        if not isinstance(value, torch.Tensor):
            out[key] = value
            continue
        # not known with policy "exact" alone, where nothing is scaled
        moment = moment_of(optimizer, key, state) or Moment()
        if moment.count or value.shape != moment.shape(old.shape):
            out[key] = value.clone()
        elif moment.averaged is not None:
            out[key] = _averaged(plan, moment, value, scaled)
        elif moment.weight:
            out[key] = materialise_tensor(plan, value)
        else:
            keep = policy != "asymmetric" or moment.seeded
            out[key] = materialise_moment(plan, value, moment, scale_gradients=scaled, keep_copies=keep)
            if scaled and moment.seeded:
                _seed(plan, value, out[key])
    return out


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
    average = old.to(torch.promote_types(old.dtype, torch.float32)).mean().item()
    for i, d in enumerate(plan.dims):
        if d is not None and bool((d.index < 0).any()):
            rows = torch.from_numpy(np.flatnonzero(d.index < 0)).to(mapped.device)
            mapped.index_fill_(i, rows, average)


def _slice(plan: TensorPlan, policy: str, fresh: bool) -> Slice | None:
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
        )
        return out if out.scaled else None
    return None
