"""What the state of an optimizer depends on: how each tensor of it scales, and what a step of an entry looks at.

One table, :data:`MOMENTS`, says it by the state's name, for any optimizer or for one class; :func:`register_state` adds
to it. What fxgrow knows of steps stands in :data:`ELEMENTWISE` and :data:`TILED`.
"""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.optim import Optimizer

from fxgrow.errors import FxgrowError, did_you_mean
from fxgrow.ir.dtensors import is_sharded


@dataclass(frozen=True)
class Moment:
    """How a state tensor grows.

    Attributes:
        gradient, value: the powers of the gradient's factor, and of the weight's, that it has.
        seeded: zero would mean a step that is exaggerated, or none, and not "no gradient seen yet": newborn entries
            start with the average of the others.
        averaged: the dim of the parameter (-1: the last) that it was averaged over, and has size 1 along; None: it has
            the parameter's shape.
        weight: it is an average of the weight itself, and grows as the weight does.
        count: it is of no entry: whatever its shape, it stays as it is.
    """

    gradient: float = 0
    value: float = 0
    seeded: bool = False
    averaged: int | None = None
    weight: bool = False
    count: bool = False

    @property
    def scales_with_nothing(self) -> bool:
        """Neither with gradients nor with weights."""
        return not (self.gradient or self.value or self.weight)

    def shape(self, parameter: torch.Size) -> torch.Size:
        """The shape of the state of a parameter of that shape."""
        if self.averaged is None:
            return parameter
        return torch.Size(1 if i == self.dim(parameter) else n for i, n in enumerate(parameter))

    def dim(self, parameter: torch.Size) -> int | None:
        """The dim that was averaged over, from 0; None where there is none."""
        return None if self.averaged is None else self.averaged % len(parameter) if len(parameter) else None


#: kinds of state by name
KINDS: dict[str, Moment] = {
    "gradient": Moment(1, 0),
    "size": Moment(1, 0, seeded=True),  # a maximum of absolute gradients
    "square": Moment(2, 0, seeded=True),
    "update": Moment(0, 1),  # something that is added to the weight
    "step size": Moment(0, 1, seeded=True),
    "squared update": Moment(0, 2, seeded=True),
    "value": Moment(0, 1, weight=True),
    "count": Moment(count=True),
}

#: what a state is, by optimizer class (``torch.optim.Optimizer``: any) and name
MOMENTS: dict[tuple[type[Optimizer], str], Moment] = {
    **{
        (Optimizer, name): KINDS[kind]
        for name, kind in {
            "step": "count",
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
        }.items()
    },
    (Optimizer, "row_var"): replace(KINDS["square"], averaged=-1),  # Adafactor's
    (Optimizer, "col_var"): replace(KINDS["square"], averaged=-2),
    (torch.optim.RMSprop, "momentum_buffer"): KINDS["update"],  # of steps that were divided by the root already
    (torch.optim.NAdam, "mu_product"): KINDS["count"],
    (torch.optim.ASGD, "eta"): KINDS["count"],
    (torch.optim.ASGD, "mu"): KINDS["count"],
}

#: optimizers whose step of an entry depends on that entry's own value, gradient and state alone, and that evaluate a
#: closure before anything else
ELEMENTWISE: set[type[Optimizer]] = {
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

#: optimizers whose step looks at the whole tensor, but only through averages over it, over its rows and columns, or
#: ratios of norms: a tensor of whole copies, as many of each entry, takes the steps of the one that was copied
TILED: set[type[Optimizer]] = {torch.optim.Adafactor}


def register_state(
    name: str,
    kind: str | tuple[float, float] | Moment,
    optimizer: type[Optimizer] = Optimizer,
    *,
    averaged: int | None = None,
    seeded: bool | None = None,
) -> None:
    """Say what a tensor in an optimizer's state is, so that it can be carried over a growth.

    Args:
        name: its key in ``optimizer.state[p]``.
        kind: one of :data:`KINDS`: ``"gradient"`` (averages of gradients), ``"size"`` (of absolute ones), ``"square"``,
            ``"update"`` (steps, in units of the weight), ``"step size"``, ``"squared update"``, ``"value"`` (averages
            of the weight), ``"count"`` (of no entry: stays as it is); or the powers of the gradient's and of the
            weight's factor that it scales with: ``(0, 0)``, a number that neither scales.
        optimizer: the class that calls it so, and those derived from it; any by default.
        averaged: the dim of the parameter that it was averaged over (-1: the last), along which it has size 1.
        seeded: new entries start with the average of the others, as squares have to; None: as the kind does.

    Raises:
        FxgrowError: no such kind, no optimizer class, or a dim that is none; nothing is registered then.
    """
    call = f"register_state({name!r})"
    _check_class(optimizer, call)
    found = kind if isinstance(kind, Moment) else _kind_of(kind, call)
    if averaged is not None:
        if isinstance(averaged, bool) or not isinstance(averaged, numbers.Integral):
            raise FxgrowError(
                f"{call}: averaged={averaged!r} is no dim of a parameter: it is a whole number, -1 the last"
            )
        found = replace(found, averaged=int(averaged))
    if seeded is not None and not isinstance(seeded, bool):
        raise FxgrowError(f"{call}: seeded={seeded!r} is neither True nor False, nor None for what the kind does")
    MOMENTS[optimizer, name] = found if seeded is None else replace(found, seeded=seeded)


def _kind_of(kind: Any, call: str) -> Moment:
    """A kind by its name, or by its two powers."""
    if isinstance(kind, str):
        if kind not in KINDS:
            raise FxgrowError(f"{call}: unknown kind {kind!r}; {did_you_mean(kind, KINDS)}")
        return KINDS[kind]
    powers = list(kind) if isinstance(kind, tuple | list) else []
    if len(powers) != 2 or not all(isinstance(x, numbers.Real) and math.isfinite(x) for x in powers):
        raise FxgrowError(
            f"{call}: kind={kind!r} is neither one of {', '.join(KINDS)}, nor two numbers: the powers of the "
            "gradient's factor and of the weight's"
        )
    return Moment(float(powers[0]), float(powers[1]))


def _check_class(optimizer: Any, call: str) -> None:
    if not (isinstance(optimizer, type) and issubclass(optimizer, Optimizer)):
        raise FxgrowError(f"{call}: {optimizer!r} is not a class of optimizers")


def register_elementwise(optimizer: type[Optimizer]) -> None:
    """Say that an optimizer's step of an entry depends on that entry's own value, gradient and state alone.

    Policy ``exact`` takes it then. It must evaluate its closure before anything else.

    Raises:
        FxgrowError: it is no class of optimizers.
    """
    _check_class(optimizer, "register_elementwise")
    ELEMENTWISE.add(optimizer)


def register_tiled(optimizer: type[Optimizer]) -> None:
    """Say that an optimizer's step looks at whole tensors through averages and ratios of norms alone (LAMB, Adafactor).

    Policy ``exact`` takes it then, where every tensor grows by whole copies, as many of each entry. A norm that is
    compared with a constant is no average: it is larger in a larger tensor.

    Raises:
        FxgrowError: it is no class of optimizers.
    """
    _check_class(optimizer, "register_tiled")
    TILED.add(optimizer)


def moment_of(optimizer: Optimizer | type[Optimizer], key: str, state: Mapping[str, Any]) -> Moment | None:
    """What the state ``key`` of a parameter is; None where that is not known.

    Args:
        optimizer: that keeps it, or its class.
        state: the parameter's whole state.
    """
    kind = optimizer if isinstance(optimizer, type) else type(optimizer)
    for cls in kind.__mro__:
        if (cls, key) in MOMENTS:
            if cls is Optimizer and key == "momentum_buffer" and "square_avg" in state:
                return KINDS["update"]  # somebody's own RMSprop
            return MOMENTS[cls, key]
    return None


def is_elementwise(optimizer: Optimizer) -> bool:
    """Whether the class is one of :data:`ELEMENTWISE`, or takes its step unchanged from one."""
    return steps_like(optimizer, ELEMENTWISE)


def is_tiled(optimizer: Optimizer) -> bool:
    """Whether the class is one of :data:`TILED`, or takes its step unchanged from one."""
    return steps_like(optimizer, TILED)


def steps_like(optimizer: Optimizer, classes: set[type[Optimizer]]) -> bool:
    """Whether the class is one of these, or derived from one without a step of its own."""
    step = inspect.unwrap(type(optimizer).step)
    return any(type(optimizer) is known or step is inspect.unwrap(known.step) for known in classes)


def why_unknown(optimizer: Optimizer, p: torch.Tensor, state: Mapping[str, Any], *, exact: bool) -> str:
    """Why a parameter's state cannot be carried over a growth; "" where it can.

    Args:
        exact: the state stays in the small model's units, so that its shape alone matters.
    """
    if not isinstance(state, Mapping):
        return f"its state is a {type(state).__name__}, not a dict by name"
    for key, value in state.items():
        moment = moment_of(optimizer, key, state)
        if not isinstance(value, torch.Tensor):
            if value is not None and not isinstance(value, bool | int | float | str):
                return f"its state {key!r} is a {type(value).__name__}"
            if isinstance(value, float) and not exact and (reason := _why_no_number(key, value, moment)):
                return reason
        elif moment is not None and moment.count:
            if _is_of_entries(optimizer, key, value, p):
                return (
                    f"its state {key!r} has shape {tuple(value.shape)}, the parameter {tuple(p.shape)}: a count of "
                    "entries or rows grows with them. Say so with fxgrow.optim.register_state, kind (0, 0), for the "
                    "optimizer's class (averaged=-1: one for each row)"
                )
        elif value.numel() <= 1 and value.shape != p.shape:
            if value.numel() and not exact and (reason := _why_no_number(key, value.item(), moment)):
                return reason
        elif not (type(value) is torch.Tensor or is_sharded(value)) or not (
            value.is_floating_point() or value.is_complex() or (moment is not None and moment.scales_with_nothing)
        ):
            return f"its state {key!r} is a {type(value).__name__} of {value.dtype}"
        elif value.shape != (p.shape if moment is None else moment.shape(p.shape)):
            return f"its state {key!r} has shape {tuple(value.shape)}, the parameter {tuple(p.shape)}"
        elif not exact and moment is None:
            known = ", ".join(sorted({name for _, name in MOMENTS}))
            return (
                f"it is not known how its state {key!r} depends on gradients (known: {known}). If you know it, say so "
                "with fxgrow.optim.register_state"
            )
    return ""


def _why_no_number(key: str, value: Any, moment: Moment | None) -> str:
    """Why one number of a whole parameter cannot be carried; "" where it can: it is a count, or was not set yet."""
    if moment is None and (isinstance(value, complex) or not math.isfinite(value) or value == round(value)):
        return ""
    if moment is not None and (moment.count or moment.scales_with_nothing or not value):
        return ""
    return (
        f"its state {key!r} is one number, and it is not known how that depends on the parameter's gradients (a norm "
        "of them grows with the parameter). If it does not, say so with fxgrow.optim.register_state, kind 'count'"
    )


def _is_of_entries(optimizer: Optimizer, key: str, value: torch.Tensor, p: torch.Tensor) -> bool:
    """Whether what is a count by its name has numbers for entries, rows or columns, unless its own class said it."""
    own = any((c, key) in MOMENTS for c in type(optimizer).__mro__ if c is not Optimizer)
    if own or value.numel() <= 1:
        return False
    beside = value.shape if value.dim() == p.dim() else (*value.shape, *[1] * (p.dim() - value.dim()))
    return len(beside) == p.dim() and all(a in (1, b) for a, b in zip(beside, p.shape, strict=True))
