"""What the state of an optimizer depends on: how each tensor of it scales, and which optimizers work entry by entry."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Literal

import torch

Moment = Literal["gradient", "size", "square", "update", "step size", "squared update", "value"]

#: the powers of the gradient's factor and of the value's that a state has
POWERS: dict[Moment, tuple[int, int]] = {
    "gradient": (1, 0),
    "size": (1, 0),  # a maximum of absolute gradients
    "square": (2, 0),
    "update": (0, 1),  # something that is added to the weight
    "step size": (0, 1),
    "squared update": (0, 2),
    "value": (0, 1),  # an average of the weight itself
}
#: where zero means a step that is exaggerated, or none, and not "no gradient seen yet"
POSITIVE: frozenset[Moment] = frozenset({"size", "square", "step size", "squared update"})

#: state tensors by name, in torch.optim and by custom elsewhere (Lion, LAMB)
MOMENTS: dict[str, Moment] = {
    "exp_avg": "gradient",
    "momentum_buffer": "gradient",
    "grad_avg": "gradient",
    "prev": "gradient",
    "exp_inf": "size",
    "exp_avg_sq": "square",
    "max_exp_avg_sq": "square",
    "square_avg": "square",
    "sum": "square",
    "variance": "square",
    "step_size": "step size",
    "acc_delta": "squared update",
    "ax": "value",
}

#: Adafactor's squares, averaged over the last dim or the one before it
FACTORED: dict[str, int] = {"row_var": -1, "col_var": -2}

#: optimizers whose step of an entry depends on that entry's own value, gradient and state alone, and that evaluate a
#: closure before anything else; add your own
ELEMENTWISE: set[type[torch.optim.Optimizer]] = {
    torch.optim.ASGD,
    torch.optim.Adadelta,
    torch.optim.Adagrad,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.Adamax,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Rprop,
    torch.optim.SGD,
    torch.optim.SparseAdam,
}


def moment_of(key: str, state: Mapping[str, Any]) -> Moment | None:
    """What the state ``key`` of a parameter is; None where that is not known.

    Args:
        state: the parameter's whole state.
    """
    if key == "momentum_buffer" and "square_avg" in state:
        return "update"  # RMSprop averages steps that were divided by the root already
    return MOMENTS.get(key)


def is_elementwise(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the class is one of :data:`ELEMENTWISE`, or takes its step unchanged from one."""
    step = inspect.unwrap(type(optimizer).step)
    return any(type(optimizer) is known or step is inspect.unwrap(known.step) for known in ELEMENTWISE)


def why_unknown(p: torch.Tensor, state: Mapping[str, Any], *, exact: bool) -> str:
    """Why a parameter's state cannot be carried over a growth; "" where it can.

    Args:
        exact: the state stays in the small model's units, so that its shape alone matters.
    """
    for key, value in state.items():
        if not isinstance(value, torch.Tensor):
            if value is not None and not isinstance(value, bool | int | float | str):
                return f"its state {key!r} is a {type(value).__name__}"
        elif key == "step" or (value.numel() <= 1 and value.shape != p.shape):
            continue
        elif type(value) is not torch.Tensor or not value.is_floating_point():
            return f"its state {key!r} is a {type(value).__name__} of {value.dtype}"
        elif key in FACTORED and not exact:
            if value.shape != factored_shape(key, p.shape):
                return f"its state {key!r} has shape {tuple(value.shape)}, the parameter {tuple(p.shape)}"
        elif value.shape != p.shape:
            return f"its state {key!r} has shape {tuple(value.shape)}, the parameter {tuple(p.shape)}"
        elif not exact and moment_of(key, state) is None:
            known = ", ".join([*MOMENTS, *FACTORED])
            return f"it is not known how its state {key!r} depends on gradients (known: {known})"
    return ""


def factored_shape(key: str, shape: torch.Size) -> torch.Size:
    """The shape of a factored state: that of the parameter, with one dim averaged away."""
    reduced = len(shape) + FACTORED[key]
    return torch.Size(1 if i == reduced else n for i, n in enumerate(shape))
