"""What stands beside an optimizer's parameter groups and per-parameter state, and would go on as it is, or not at all.

State that a class keeps in a place of its own (a list of buffers, a dict by number or ``id``, one flat buffer) has the
small model's sizes and order after a growth: the next step fails, or takes another parameter's. A step of somebody's
own that does not run the hooks of PyTorch takes no notice of per-slice rates.
"""

from __future__ import annotations

import inspect
import itertools
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from types import CodeType
from typing import Any

import torch
from torch import nn

from fxgrow.errors import FxgrowError
from fxgrow.optim.rates import KEY, STEPS
from fxgrow.optim.wrappers import DEPTH, ITEMS, parts_of

#: attributes of every optimizer that hold tensors
_COMMON = {"state", "param_groups", "defaults", "step"}


def check_no_state_beside(optimizer: torch.optim.Optimizer, old: Collection[nn.Parameter]) -> None:
    """Refuse an optimizer that keeps tensors of its parameters' sizes elsewhere than in ``state[parameter]``.

    Args:
        old: the parameters that a growth replaces.

    Raises:
        FxgrowError: with the place.
    """
    shapes = {p.shape for p in old if p.numel() > 1}
    sizes = [sum(p.numel() for p in group["params"]) for group in optimizer.param_groups]
    flat = {torch.Size([n]) for n in (*sizes, sum(sizes)) if n > 1}
    ids = {id(p) for p in old}
    for where, value in _own(optimizer):
        if isinstance(value, torch.Tensor):
            # a vector by itself may be a setting
            found = where if value.shape in flat or (value.shape in shapes and value.dim() > 1) else None
        else:
            found = next(_tensors(value, where, shapes | flat, ids, DEPTH), None)
        if found:
            raise FxgrowError(
                f"{type(optimizer).__name__} keeps state of its parameters in `{found}`, which fxgrow cannot carry "
                "over a growth: it carries what stands in `.state[parameter]`, a dict by name. Keep it there, or make "
                "the optimizer anew over the grown model"
            )


def _own(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Any]]:
    """What a class keeps of its own: attributes, entries of groups, and of ``state`` under what is no parameter."""
    slots = {n for c in type(optimizer).__mro__ for n in _names(vars(c).get("__slots__", ()))}
    attributes = {**{n: getattr(optimizer, n, None) for n in slots}, **vars(optimizer)}
    carried = {id(group["params"]) for group in optimizer.param_groups}  # LBFGS holds the list
    for name, value in attributes.items():
        if name not in _COMMON and id(value) not in carried:
            yield f".{name}", value
    for number, group in enumerate(optimizer.param_groups):
        for key, value in group.items():
            if key not in ("params", KEY, STEPS):
                yield f".param_groups[{number}][{key!r}]", value
    for other, value in optimizer.state.items():
        if not isinstance(other, torch.Tensor):
            yield f".state[{other!r:.40}]", value


def _names(slots: Any) -> list[str]:
    return [slots] if isinstance(slots, str) else [n for n in slots if n not in ("__dict__", "__weakref__")]


def _tensors(value: Any, where: str, shapes: set[torch.Size], ids: set[int], depth: int) -> Iterator[str]:
    """Where tensors of some shapes, parameters or the ``id`` of some stand in a nest of plain containers."""
    if isinstance(value, torch.Tensor):
        if value.shape in shapes or id(value) in ids:
            yield where
    elif depth and isinstance(value, Mapping):
        for key, item in list(value.items()):
            if isinstance(key, int) and key in ids:
                yield f"{where}[id(parameter)]"
            yield from _tensors(item, f"{where}[{key!r:.40}]", shapes, ids, depth - 1)
    elif depth and isinstance(value, list | tuple | set | frozenset | deque | nn.ParameterList):
        for number, item in enumerate(itertools.islice(value, ITEMS)):
            yield from _tensors(item, f"{where}[{number}]", shapes, ids, depth - 1)


def check_hooked(optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer whose step does not run step hooks, by which per-slice rates are applied.

    Raises:
        FxgrowError: its ``step`` was replaced by something that does not lead to its class's.
    """
    own = vars(optimizer).get("step")
    if own is None:
        if getattr(type(optimizer).step, "hooked", False):
            return
        own = type(optimizer).step
    elif _leads_to_hooks(own, {id(optimizer)}, DEPTH):
        return
    raise FxgrowError(
        f"the step of this {type(optimizer).__name__} is {getattr(own, '__qualname__', type(own).__name__)}, which "
        "does not call its class's own, and so runs no step hooks of torch.optim.Optimizer. Per-slice learning rates "
        "are applied by these: override step in a class, or use policy 'copy' or 'reset', which leave no such rates"
    )


def _leads_to_hooks(value: Any, seen: set[int], depth: int) -> bool:
    """Whether a function comes to call a step with hooks, as far as that can be seen."""
    if getattr(value, "hooked", False) is True:
        return True
    if depth == 0 or id(value) in seen or isinstance(value, torch.Tensor | nn.Module | type | str | int | float | None):
        return False
    seen.add(id(value))
    code = getattr(value, "__code__", None)
    if isinstance(code, CodeType) and "step" in code.co_names and not inspect.ismethod(value):
        return True
    return any(_leads_to_hooks(item, seen, depth - 1) for _, item in parts_of(value))


__all__ = ["check_hooked", "check_no_state_beside"]
