"""A state of the small model is not loaded over the grown one: torch looks at the number of parameters alone.

A fused step then reads memory behind the end of the moments, and where there are no moments, factors are lost in
silence.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch

from fxgrow.errors import FxgrowError
from fxgrow.optim.rates import KEY, all_rates
from fxgrow.weights.moments import moment_of

_WATCHED: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()


def watch_loading(optimizer: torch.optim.Optimizer) -> None:
    """Refuse states of other sizes from now on."""
    if optimizer not in _WATCHED:
        with suppress(AttributeError):  # a class of somebody's own that never called torch's __init__
            optimizer.register_load_state_dict_pre_hook(check_loaded)
            _WATCHED.add(optimizer)


def check_loaded(optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any]) -> None:
    """Refuse a state of other sizes than the optimizer's parameters have, or without the factors that they need.

    Raises:
        FxgrowError: before anything is loaded.
    """
    groups, state = state_dict.get("param_groups", []), state_dict.get("state", {})
    mine = [g["params"] for g in optimizer.param_groups]
    if [len(g["params"]) for g in groups] != [len(params) for params in mine]:
        return  # torch says so itself
    advice = (
        "It was saved before the growth: load it into an optimizer over the small model, and carry that one over the "
        "growth"
    )
    for params, group in zip(mine, groups, strict=True):
        for p, number in zip(params, group["params"], strict=True):
            held, mine_now = state.get(number, {}), optimizer.state.get(p, {})
            if not (isinstance(held, Mapping) and isinstance(mine_now, Mapping)):
                continue  # of a class that keeps something else than a dict
            for key, value in held.items():
                moment = moment_of(optimizer, key, held)
                if not isinstance(value, torch.Tensor) or value.dim() == 0 or moment is None or moment.count:
                    continue
                now = mine_now.get(key)
                known = {moment.shape(p.shape), now.shape if isinstance(now, torch.Tensor) else None}
                if value.shape not in known:
                    raise FxgrowError(
                        f"this state of {type(optimizer).__name__} is not of the grown model: its {key!r} has shape "
                        f"{tuple(value.shape)}, the parameter {tuple(p.shape)}. {advice}"
                    )
    lasting = any(r.ramp is None and s.scaled for r in all_rates(optimizer) for s in r.slices.values())
    if lasting and not any(KEY in g for g in groups):
        raise FxgrowError(
            f"this state of {type(optimizer).__name__} has no per-slice learning rates, and policy 'exact' steps the "
            f"grown parameters by them. {advice}"
        )
