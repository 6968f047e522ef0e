"""Whether a stored state is that of an optimizer: torch takes any, and fails at the next step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxgrow.ir.dtensors import is_sharded
from fxgrow.optim.rates import KEY, STEPS
from fxgrow.training.tensors import laid_as


def check_optimizer_state(saved: Any, optimizer: torch.optim.Optimizer) -> None:
    """Whether an optimizer's state is of its kind: torch takes any, and fails at the next step.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(saved, dict) or set(saved) != {"state", "param_groups"} or not isinstance(saved["state"], dict):
        raise ValueError("it is not the state of an optimizer")
    own = optimizer.state_dict()["param_groups"]
    groups = saved["param_groups"]
    if not isinstance(groups, list) or len(groups) != len(own):
        raise ValueError(f"this optimizer has {len(own)} parameter groups, and it has not")
    for number, (theirs, mine) in enumerate(zip(groups, own, strict=True)):
        # per-slice rates come and go: a warm-up that the replay begins may have ended before the checkpoint
        own_keys = set(mine) - {KEY, STEPS}
        if not isinstance(theirs, dict) or set(theirs) - {KEY, STEPS} != own_keys or theirs["params"] != mine["params"]:
            raise ValueError(f"parameter group {number} does not have the keys or the parameters of this optimizer's")
        odd = [k for k in mine if k in own_keys and not _alike(theirs[k], mine[k])]
        if odd:
            raise ValueError(f"{odd[0]} of parameter group {number} is {str(theirs[odd[0]])[:40]!r}")
    parameters: dict[int, Tensor] = {}
    usual: dict[int, dict[str, Any]] = {}
    for mine, group in zip(own, optimizer.param_groups, strict=True):
        parameters |= dict(zip(mine["params"], group["params"], strict=True))
        by_dims = {d: _usual_state(optimizer, group, d) for d in {p.dim() for p in group["params"]}}
        usual |= {n: by_dims[parameters[n].dim()] for n in mine["params"]}
    for number, entries in saved["state"].items():
        if number not in parameters or not isinstance(entries, dict):
            raise ValueError(f"state of parameter {str(number)[:40]!r}, which this optimizer does not have")
        shape, known = parameters[number].shape, usual[number]
        lost = known.keys() - entries.keys()
        if lost and entries:
            raise ValueError(f"state of parameter {number} lacks {min(lost)}")
        for key, value in entries.items():
            if not isinstance(key, str):
                raise ValueError(f"state of parameter {number} has the key {key!r}")
            expected = known.get(key, value)
            if isinstance(expected, Tensor) != isinstance(value, Tensor) and value is not None:
                raise ValueError(f"{key} of parameter {number} is {str(value)[:40]!r}")
            if isinstance(value, Tensor) and not _fits(value, shape, known.get(key)):
                raise ValueError(f"{key} of parameter {number} is {list(value.shape)}, the parameter {list(shape)}")


def placed(saved: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Any]]:
    """A stored state's tensors in memory of their own, as an optimizer over shards keeps them: like its parameters.

    Raises:
        ValueError: one is not like its sharded parameter, so that nothing says how it would be sharded.
    """
    held = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [n for group in optimizer.state_dict()["param_groups"] for n in group["params"]]
    parameters = dict(zip(numbers, held, strict=True))

    def own(number: int, key: str, value: Any) -> Any:
        p = parameters[number]
        if not isinstance(value, Tensor):
            return value
        if not is_sharded(p) or not value.dim():
            return value.clone()
        if value.shape != p.shape:
            raise ValueError(f"{key} is {list(value.shape)}, and the sharded parameter {number} {list(p.shape)}")
        return laid_as(value, p)

    state: Mapping[int, Mapping[str, Any]] = saved["state"]
    return {n: {key: own(n, key, value) for key, value in entries.items()} for n, entries in state.items()}


def _fits(value: Tensor, shape: torch.Size, usual: Tensor | None) -> bool:
    """Whether a state tensor can be that of a parameter of a shape; ``usual``: the same of the parameter tried."""
    if usual is None:
        return value.dim() != len(shape) or value.numel() <= 1 or value.shape == shape
    if usual.dim() != len(shape):
        return value.numel() == 1 or usual.dim() > 0
    return list(value.shape) == [n if side == _SIDE else side for side, n in zip(usual.shape, shape, strict=True)]


_SIDE = 2  # of the parameter that is stepped to see what an optimizer keeps


def _usual_state(optimizer: torch.optim.Optimizer, group: Mapping[str, Any], dims: int) -> dict[str, Any]:
    """What the optimizer keeps after a step for a parameter of so many dims, by name. Empty where not known."""
    scratch = nn.Parameter(torch.zeros([_SIDE] * dims))
    scratch.grad = torch.zeros([_SIDE] * dims)
    options = {k: v for k, v in group.items() if k not in ("params", "param_names", KEY, STEPS)}
    try:
        make: Any = type(optimizer)
        fresh = make([{**options, "params": [scratch]}])
        fresh.step()
    except Exception:  # somebody's own optimizer, which asks for more
        return {}
    return {k: v for k, v in fresh.state[scratch].items() if v is not None}


def _alike(theirs: Any, mine: Any) -> bool:
    """Whether two hyper-parameters are of one kind; numbers may be of any."""
    if isinstance(mine, bool) or mine is None or theirs is None:
        return theirs is None or mine is None or isinstance(theirs, bool)
    if isinstance(mine, int | float):
        return isinstance(theirs, int | float | Tensor) and not isinstance(theirs, bool)
    if isinstance(mine, tuple | list):
        return isinstance(theirs, tuple | list) and len(theirs) == len(mine) and all(map(_alike, theirs, mine))
    if isinstance(mine, dict):
        return (
            isinstance(theirs, dict) and theirs.keys() == mine.keys() and all(_alike(theirs[k], mine[k]) for k in mine)
        )
    return isinstance(theirs, type(mine))
