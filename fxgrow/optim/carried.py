"""What a growth makes of an optimizer: worked out whole, before anything is changed."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fxgrow.errors import FxgrowError
from fxgrow.optim.members import Member, Newcomers, members_of
from fxgrow.optim.policies import check_optimizer, check_options, check_plan
from fxgrow.optim.rates import SliceRates, all_rates, check_settled, rates_of_groups
from fxgrow.optim.state import is_fresh, map_gradient, map_state, slice_of
from fxgrow.optim.whole import check_whole, warn_of_muon
from fxgrow.plan import GrowthPlan
from fxgrow.weights.moments import steps_like


@dataclass
class Carried:
    """An optimizer's content over the grown parameters.

    Attributes:
        members: of each parameter group.
        state: of each grown parameter that has any.
        gradients: that wait for their step.
        rates: what each group is to hold of per-slice rates.
    """

    members: list[list[Member]]
    state: dict[torch.Tensor, dict[str, Any]] = field(default_factory=dict)
    gradients: dict[nn.Parameter, torch.Tensor] = field(default_factory=dict)
    rates: list[dict[str, Any]] = field(default_factory=list)

    @property
    def replaced(self) -> list[nn.Parameter]:
        """The small model's parameters that the optimizer holds."""
        return list({m.old: None for members in self.members for m in members if m.old is not None})

    @property
    def outside(self) -> list[nn.Parameter]:
        """Parameters that are not the model's."""
        return [m.parameter for members in self.members for m in members if m.name is None]

    def params(self, group: int) -> list[nn.Parameter]:
        return [m.parameter for m in self.members[group]]


def carried(
    plan: GrowthPlan,
    names: Mapping[int, str],
    new: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    policy: str,
    *,
    warmup: int = 250,
    peak: float = 1.3,
    ramp: int | None = None,
    newcomers: Newcomers = None,
    handed: Collection[str] = (),
    state_of: Callable[..., dict[str, Any]] | None = None,
) -> Carried:
    """Work out an optimizer's content after a growth.

    Args:
        handed: parameters whose waiting gradient the grown model has already.
        state_of: makes a parameter's state, or what stands for it; None: :func:`map_state`.

    The rest as :func:`fxgrow.optim.carry` takes it.

    Raises:
        FxgrowError: see there; nothing has been changed.
    """
    check_options(warmup=warmup, peak=peak, ramp=ramp, newcomers=newcomers)
    state_of = map_state if state_of is None else state_of
    warmup, peak, ramp = int(warmup), float(peak), None if ramp is None else int(ramp)  # numpy's could not be loaded
    plans = plan.tensors
    out = Carried(members_of(optimizer, names, new, plans, newcomers))
    old = out.replaced
    check_optimizer(optimizer, policy, ramp=ramp, parameters=old)
    check_plan(plan, policy)
    check_settled(old)
    if policy == "exact":
        check_whole(optimizer, plans, [m.name for members in out.members for m in members if m.name is not None])
        warn_of_muon(optimizer)
    shared = _shared(optimizer, old) if policy != "reset" else {}
    own = SliceRates(warmup=warmup if policy == "asymmetric" else 0, peak=peak, ramp=ramp)
    for m in (m for members in out.members for m in members):
        if m.name is None:
            continue
        tensor = plans[m.name]
        if m.old is not None and not is_fresh(tensor):
            waiting = None if m.name in handed else map_gradient(tensor, m.old, m.parameter)
            if waiting is not None:
                there = m.parameter.grad
                out.gradients[m.parameter] = waiting if there is None else there + waiting
            if policy != "reset" and optimizer.state.get(m.old):
                out.state[m.parameter] = state_of(tensor, optimizer, m.old, m.parameter, policy, shared)
        s = slice_of(tensor, policy)
        if s is not None:
            own.slices[m.name] = s
    rates = [*_earlier(plan, names, optimizer, out, policy), own]
    held = {id(m.parameter): m.name for members in out.members for m in members if m.name is not None}
    _fill_buffers(optimizer, out)
    groups = [out.params(k) for k in range(len(out.members))]
    out.rates = rates_of_groups(groups, [r for r in rates if not r.finished], {**_labels(out), **held})
    return out


def _fill_buffers(optimizer: torch.optim.Optimizer, out: Carried) -> None:
    """Give parameters without momentum one of zero beside such as have some: a fused step takes all of a group or none.

    It is the momentum that a step without any begins with.
    """
    if not steps_like(optimizer, {torch.optim.SGD}):
        return
    for group, members in zip(optimizer.param_groups, out.members, strict=True):
        if not (group["fused"] and group["momentum"]):
            continue
        outside = [optimizer.state.get(m.parameter, {}) for m in members if m.name is None]
        own = [m.parameter for m in members if m.name is not None]
        states = [*outside, *(out.state.get(p, {}) for p in own)]
        if any(s.get("momentum_buffer") is not None for s in states):
            for p in own:
                if out.state.get(p, {}).get("momentum_buffer") is None:
                    out.state.setdefault(p, {})["momentum_buffer"] = torch.zeros_like(p, requires_grad=False)


def _labels(out: Carried) -> dict[int, str]:
    """What per-slice rates call parameters outside the model, whose own names may be those of the model's."""
    return {id(p): f"(of another model, {k})" for k, p in enumerate(out.outside)}


def _earlier(
    plan: GrowthPlan, names: Mapping[int, str], optimizer: torch.optim.Optimizer, out: Carried, policy: str
) -> list[SliceRates]:
    """The rates of earlier growths, for what became of their parameters."""
    labels = _labels(out)
    held = [m.name for members in out.members for m in members if m.name is not None]
    rates = []
    for before in all_rates(optimizer, {**names, **labels}):
        after = before.grown(plan.tensors, [] if policy == "reset" else held)
        after.slices.update({n: before.slices[n] for n in labels.values() if n in before.slices})
        rates.append(after)
    return rates


def _shared(optimizer: torch.optim.Optimizer, old: list[nn.Parameter]) -> dict[int, torch.Tensor]:
    """Tensors that are state of several parameters at once (one count of steps, say), and a copy of each."""
    tensors = [v for p in old for v in optimizer.state.get(p, {}).values() if isinstance(v, torch.Tensor)]
    times = Counter(id(v) for v in tensors)
    twice = next((v for v in tensors if times[id(v)] > 1 and v.numel() > 1), None)
    if twice is not None:
        raise FxgrowError(
            f"{type(optimizer).__name__} keeps one tensor of shape {tuple(twice.shape)} as the state of several "
            "parameters, which grow each in its own way. Give each one of its own, or use policy 'reset'"
        )
    return {id(v): copy.deepcopy(v) for v in tensors if times[id(v)] > 1}
