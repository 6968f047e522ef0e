"""What an optimizer may do over a growth, and whether it can: asked before the growth is computed."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import nn

from fxgrow.errors import FxgrowError
from fxgrow.optim.members import Newcomers
from fxgrow.optim.whole import check_whole, why_not_exact
from fxgrow.optim.wrappers import unwrapped
from fxgrow.plan import GrowthPlan
from fxgrow.weights.moments import why_unknown

Policy = Literal["exact", "asymmetric", "copy", "reset"]
POLICIES: tuple[str, ...] = ("exact", "asymmetric", "copy", "reset")


def check_optimizer(
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    policy: str,
    *,
    ramp: int | None = None,
    parameters: Iterable[nn.Parameter] | None = None,
) -> None:
    """Refuse what no growth could carry, before one is computed.

    Args:
        optimizer: as it is before the growth, or several.
        policy: one of :data:`POLICIES`.
        ramp: as :func:`fxgrow.optim.carry` takes it: at its end the state leaves the small model's units.
        parameters: of the model that is to grow; others that the optimizer holds are left alone. None: all.

    Raises:
        FxgrowError: unknown policy, state that cannot be mapped, an optimizer that the policy does not fit, or that
            holds none of the parameters.
    """
    if policy not in POLICIES:
        raise FxgrowError(f"unknown optimizer policy {policy!r}; choose one of {', '.join(POLICIES)}")
    own = None if parameters is None else list(parameters)
    if isinstance(optimizer, Sequence):
        for one in optimizer:
            check_optimizer(one, policy, ramp=ramp, parameters=own)
        return
    optimizer = unwrapped(optimizer)
    ids = None if own is None else {id(p) for p in own}
    members = [p for group in optimizer.param_groups for p in group["params"] if ids is None or id(p) in ids]
    if not members:
        raise FxgrowError(
            f"this {type(optimizer).__name__} holds no parameter that the model had when it was grown; carry the "
            "optimizer that trains that model"
        )
    if policy == "reset":
        return
    kind = type(optimizer).__name__
    if isinstance(optimizer, torch.optim.LBFGS):
        raise FxgrowError(
            f"{kind} keeps a history of whole gradients and evaluates the model inside its step, neither of which can "
            "be carried over a growth. Use policy 'reset'"
        )
    if policy == "exact" and (reason := why_not_exact(optimizer)):
        raise FxgrowError(reason)
    for p in members:
        held = optimizer.state.get(p, {})
        for key, value in held.items() if isinstance(held, Mapping) else ():
            if isinstance(value, torch.Tensor) and value.requires_grad:
                raise FxgrowError(
                    f"the state {key!r} of {kind} is part of a graph that gradients flow through "
                    "(differentiable=True), and they cannot flow through a growth. Detach it, or use policy 'reset'"
                )
        reason = why_unknown(optimizer, p, held, exact=policy == "exact" and ramp is None)
        if reason:
            raise FxgrowError(
                f"cannot carry {kind} over a growth: of a parameter of shape {tuple(p.shape)}, {reason}. "
                "Use policy 'reset'"
            )


def check_options(*, warmup: int, peak: float, ramp: int | None, newcomers: Newcomers = None) -> None:
    """Refuse numbers that are none of steps, or no factor of a learning rate, and what names no taker of newcomers.

    Raises:
        FxgrowError: with the option.
    """
    for name, steps in {"warmup": warmup, **({} if ramp is None else {"ramp": ramp})}.items():
        if not isinstance(steps, numbers.Integral) or steps < 0:
            raise FxgrowError(f"{name}={steps!r}: it is a number of steps, from 0")
    if not isinstance(peak, numbers.Real) or not 0 <= peak < math.inf:
        raise FxgrowError(f"peak={peak!r}: it is a factor of the learning rate, from 0")
    function = callable(newcomers) and not isinstance(newcomers, nn.Module)
    if not (function or isinstance(newcomers, int | torch.optim.Optimizer | None)):
        raise FxgrowError(
            f"newcomers={newcomers!r}: it is True, False, the number of a group, a function from a name to one, or the "
            "optimizer that takes parameters which the growth made of nothing"
        )


def check_plan(
    plan: GrowthPlan,
    policy: str,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] = (),
    names: Mapping[int, str] | None = None,
) -> None:
    """Refuse a policy that does not fit a growth.

    Args:
        optimizer: that are to be carried over it, as far as they are known yet.
        names: of the small model's parameters, by ``id``.

    Raises:
        FxgrowError: ``exact``, and the growth does not map gradients exactly, moves weights by a number, or is not in
            whole copies where an optimizer needs that.
    """
    if policy != "exact":
        return
    moved = [n for n, t in plan.tensors.items() if t.shift]
    if moved:
        more = f" and {len(moved) - 1} more" if len(moved) > 1 else ""
        raise FxgrowError(
            f"policy 'exact' steps weights in the small model's units, and those of norms that multiply by 1 + w "
            f"({moved[0]}{more}) were moved by a number as well, to take up a factor. Grow with constants: keep, or "
            "use policy 'asymmetric' or 'copy'"
        )
    if not plan.exact_gradients:
        axes = ", ".join(f"{a.name} ({a.old} -> {a.new})" for a in plan.axes if not a.exact_gradients)
        raise FxgrowError(
            "policy 'exact' needs a growth whose gradients follow from the small model's, but statistics (of a norm, a "
            f"softmax) run over padded or unevenly split axes: {axes}. Use policy 'asymmetric' or 'copy', or grow by "
            "whole even copies"
        )
    for one in optimizer if isinstance(optimizer, Sequence) else [optimizer]:
        inner = unwrapped(one)
        held = {names.get(id(p)) for group in inner.param_groups for p in group["params"]} if names else set()
        check_whole(inner, plan.tensors, [n for n, t in plan.tensors.items() if t.source in held])
