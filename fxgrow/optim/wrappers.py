"""Optimizers inside others, and what an optimizer keeps beside its parameter groups."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn

from fxgrow.errors import FxgrowError
from fxgrow.optim.rates import KEY

#: how deep the attributes of an optimizer are searched for parameters
DEPTH = 8
#: how many items of a container are looked at
ITEMS = 100_000


def unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer that steps: itself, or the one to which a wrapper (an accelerator's) hands everything on.

    Raises:
        FxgrowError: it is neither.
    """
    return _chain(optimizer)[-1]


def _chain(optimizer: Any) -> list[Any]:
    chain = [optimizer]
    while (inner := _delegate(chain[-1])) is not None and not any(inner is one for one in chain):
        chain.append(inner)
    if not isinstance(chain[-1], torch.optim.Optimizer):
        raise FxgrowError(
            f"{type(optimizer).__name__} is no torch.optim.Optimizer, nor a wrapper that hands its param_groups and "
            "its state on to one; pass the optimizer itself"
        )
    return chain


def _delegate(optimizer: Any) -> torch.optim.Optimizer | None:
    """The optimizer whose very groups and state a wrapper shows as its own."""
    groups, state = getattr(optimizer, "param_groups", None), getattr(optimizer, "state", None)
    if groups is None or state is None:
        return None
    for value in _attributes(optimizer).values():
        inner = value if isinstance(value, torch.optim.Optimizer) and value is not optimizer else None
        if inner is not None and inner.param_groups is groups and inner.state is state:
            return inner
    return None


def check_nothing_else(optimizer: Any, old: Collection[nn.Parameter]) -> None:
    """Refuse an optimizer that keeps parameters in a place of its own, which would go on with the small model's.

    Args:
        optimizer: or a wrapper of it.
        old: the parameters that a growth replaces.

    Raises:
        FxgrowError: with the place.
    """
    chain = _chain(optimizer)
    known = {id(one) for one in chain}
    inner = chain[-1]
    known |= {id(inner.param_groups), id(inner.state)}
    known |= {id(g["params"]) for g in inner.param_groups}
    wanted = {id(p) for p in old}
    groups = {
        f".param_groups[{number}][{key!r}]": value
        for number, group in enumerate(inner.param_groups)
        for key, value in group.items()
        if key not in ("params", KEY)
    }
    for one in chain:
        places = {f".{name}": value for name, value in _attributes(one).items()}
        for name, value in {**groups, **places}.items():
            where = next(_places(value, name, wanted, known, DEPTH), None)
            if where:
                raise FxgrowError(
                    f"{type(one).__name__} keeps parameters of the model in `{where}`, too, and would go on with the "
                    "small model's there. Empty that place first, or make the optimizer anew over the grown model, "
                    "around what growth.carry returns for one inside it"
                )


def _places(value: Any, where: str, wanted: set[int], seen: set[int], depth: int) -> Iterator[str]:
    """Where parameters stand in a nest of containers, plain objects and what functions close over."""
    if isinstance(value, torch.Tensor):
        if id(value) in wanted:
            yield where
        return
    if depth == 0 or id(value) in seen or _holds_nothing(value):
        return
    seen.add(id(value))
    for name, item in parts_of(value):
        yield from _places(item, where + name, wanted, seen, depth - 1)


def _holds_nothing(value: Any) -> bool:
    """Modules are grown in place, and what is fxgrow's is read anew at every step."""
    if isinstance(value, nn.ParameterList | nn.ParameterDict):
        return False
    ours = type(value).__module__.partition(".")[0] == __name__.partition(".")[0]
    return ours or isinstance(value, nn.Module | ModuleType | type | str | bytes | int | float | complex | None)


def parts_of(value: Any) -> Iterator[tuple[str, Any]]:
    """What a value is made of, and how one gets there."""
    if isinstance(value, Mapping | nn.ParameterDict):
        for key, item in list(value.items()):
            yield " (a key)", key
            yield f"[{key!r:.40}]", item
    elif isinstance(value, list | tuple | set | frozenset | deque | nn.ParameterList):
        yield from ((f"[{number}]", item) for number, item in enumerate(itertools.islice(value, ITEMS)))
    elif isinstance(value, partial):
        yield from ((" (a partial)", item) for item in (value.func, value.args, value.keywords))
    elif isinstance(value, MethodType):
        yield from (("", item) for item in (value.__self__, value.__func__))
    elif isinstance(value, FunctionType):
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            with suppress(ValueError):  # an empty cell
                yield f" closes over {name}", cell.cell_contents
        yield from (("", item) for item in (value.__defaults__, value.__kwdefaults__))
    for name, item in _attributes(value).items():
        yield f".{name}", item


def _attributes(value: Any) -> dict[str, Any]:
    return dict(getattr(value, "__dict__", {}))
