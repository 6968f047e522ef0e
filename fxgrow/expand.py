"""``expand``: grow a small model into the user's own larger instance of the same class, without a spec."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fxgrow.errors import GrowthRefused, Refusal, SpecError, did_you_mean
from fxgrow.growth import Growth, Verify, grow
from fxgrow.ir.running import run_eval
from fxgrow.ir.stacks import stack_name, stacks_of
from fxgrow.program import Program, capture
from fxgrow.verify.outputs import relative_errors

#: the larger class must compute what the grown module does, up to rounding in its own dtype
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}


def spec_between(small: Program, big: Program, **how: Any) -> list[dict[str, Any]]:
    """The operations that turn the sizes of one program into those of the other.

    Args:
        how: further keys for every ``widen`` (fill, split, noise ...).

    Raises:
        SpecError: the larger model has no axis or stack of that name, or is smaller somewhere.
    """
    operations: list[dict[str, Any]] = []
    stacks, larger = stacks_of(small), stacks_of(big)
    for stack, numbers in stacks.items():
        more = len(larger.get(stack, [])) - len(numbers)
        if more < 0:
            raise SpecError(
                f"{stack_name(stack)} has {len(numbers)} blocks, the larger model {len(larger.get(stack, []))}"
            )
        if more:
            operations.append({"op": "deepen", "stack": stack, "by": more})
    sizes = {a.name: a.size for a in big.axes}
    for axis in small.axes:
        if axis.name not in sizes:
            raise SpecError(f"the larger model has no axis {axis.name}; {did_you_mean(axis.name, sizes)}")
        if sizes[axis.name] < axis.size:
            raise SpecError(f"{axis.name} has {axis.size} units, the larger model {sizes[axis.name]}")
        if sizes[axis.name] > axis.size:
            if not axis.growable:
                raise GrowthRefused(Refusal(axis.name, f"it is frozen by {axis.reason}", new=sizes[axis.name]))
            operations.append({"op": "widen", "axis": axis.name, "to": sizes[axis.name], **how})
    # widen first: blocks that are added afterwards are copies of grown ones
    return sorted(operations, key=lambda o: o["op"] == "deepen")


def expand(
    small: nn.Module,
    big: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    verify: Verify = "auto",
    **how: Any,
) -> Growth:
    """Grow ``small`` and load the result into ``big``, the user's own larger instance of the same class.

    Sizes are read off ``big``; its weights are replaced. ``growth.carry`` gives an optimizer over the grown module;
    names are the same in ``big``.

    Args:
        small, big: modules of one class, ``big`` at least as large along every axis and stack.
        args, kwargs: example inputs of both.
        how: further keys for every ``widen`` operation (``fill``, ``split``, ``noise`` ...).

    Returns:
        The growth. ``big`` holds its weights.

    Raises:
        SpecError, GrowthRefused: the sizes cannot be reached exactly, or ``big`` computes with other constants than the
            growth needs (a softmax scale, a norm's eps); ``big`` has its old weights then.
    """
    operations = spec_between(capture(small, args, kwargs), capture(big, args, kwargs), **how)
    if not operations:
        raise SpecError("the two models have the same sizes: there is nothing to grow")
    growth = grow(small, operations, args, kwargs, verify=verify)
    state = growth.module.state_dict()
    theirs = big.state_dict()
    if set(state) != set(theirs) or any(state[n].shape != theirs[n].shape for n in state):
        odd = sorted(set(state) ^ set(theirs)) or [n for n in state if state[n].shape != theirs[n].shape]
        raise GrowthRefused(f"the larger model's tensors do not fit the growth: {odd[0]}")
    trial = copy.deepcopy(big)
    trial.load_state_dict(state, strict=True)
    old, new = (run_eval(module, args, kwargs or {}) for module in (growth.module, trial))
    error = max((e.relative_error for e in relative_errors(old, new)), default=0.0)
    dtype = next((p.dtype for p in big.parameters()), torch.float32)
    if not error <= TOLERANCE.get(dtype, 1e-2):
        constants = [
            f"{getattr(c, 'node', '')}: {', '.join(f'{k}={v}' for k, v in getattr(c, 'arguments', {}).items())}"
            for s in growth.plan.steps
            for c in s.changes
            if getattr(c, "why", "") == "constant"
        ]
        raise GrowthRefused(
            f"the larger {type(big).__name__} computes with other constants than the growth needs: its outputs differ "
            f"by {error:.1e}. Constants the growth changed: {'; '.join(constants[:4]) or 'none'}. Use growth.module of "
            "fxgrow.grow instead, or give the larger model the same constants"
        )
    big.load_state_dict(state, strict=True)
    return growth
