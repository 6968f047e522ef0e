"""What a class computes where an instance is made and keeps beside saved weights and plain attributes.

Numbers in closures, partial functions and other objects, buffers that are not saved, tensors in attributes: an instance
made anew computes them anew, from its own sizes, and no state dict sets them right.
"""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from fxgrow.ir.modules import OWN_ATTRIBUTES
from fxgrow.ir.running import plain_tensors

Beside = dict[str, Any]

_DEPTH = 3
_ENTRIES = 64


def numbers_beside(model: nn.Module, config: Any) -> Beside:
    """Numbers by place: in functions, partial functions, lists, dicts, other objects, but configs like this one."""
    out: Beside = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, value in list(vars(module).items()):
            if name not in OWN_ATTRIBUTES and not isinstance(value, int | float):
                place = f"{path}.{name}" if path else name
                out.update(_numbers_in(place, value, config, _DEPTH))
    return out


def _numbers_in(place: str, value: Any, config: Any, depth: int) -> Iterator[tuple[str, int | float]]:
    if type(value) in (int, float):
        yield place, value
        return
    if not depth or isinstance(value, nn.Module | torch.Tensor | type | types.ModuleType) or _is_like(value, config):
        return
    parts: dict[Any, Any] = {}
    if isinstance(value, types.FunctionType):
        cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
        parts = {n: _content(c) for n, c in cells} | dict(enumerate(value.__defaults__ or ()))
    elif isinstance(value, functools.partial):
        parts = {"func": value.func, **dict(enumerate(value.args)), **value.keywords}
    elif isinstance(value, list | tuple):
        parts = dict(enumerate(value[:_ENTRIES]))
    elif isinstance(value, dict):
        parts = dict(list(value.items())[:_ENTRIES])
    elif hasattr(value, "__dict__"):
        parts = dict(vars(value))
    for name, part in parts.items():
        if isinstance(name, str | int):
            yield from _numbers_in(f"{place}.{name}", part, config, depth - 1)


def _is_like(value: Any, config: Any) -> bool:
    return type(value) is type(config) and (not isinstance(config, dict) or value.keys() == config.keys())


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return None


def tensors_beside(model: nn.Module) -> dict[str, torch.Tensor]:
    """Tensors that a state dict lacks, by place: buffers that are not saved, and plain attributes."""
    saved = set(model.state_dict(keep_vars=True))
    named = dict(model.named_buffers(remove_duplicate=False))
    found = {n: t for n, t in named.items() if n not in saved} | plain_tensors(model)
    return {n: t for n, t in found.items() if not t.is_meta and not isinstance(t, nn.Parameter)}


def apart(model: nn.Module, made: nn.Module, config: Any) -> dict[str, str]:
    """What a new instance has otherwise than the model, beside weights and plain attributes, in words by place."""
    out: dict[str, str] = {}
    ours, theirs = numbers_beside(model, config), numbers_beside(made, config)
    for place in ours.keys() & theirs.keys():
        if not math.isclose(ours[place], theirs[place], rel_tol=1e-12, abs_tol=0.0):
            out[place] = f"{place} is {theirs[place]}, not {ours[place]}"
    known = tensors_beside(made)
    for place, tensor in tensors_beside(model).items():
        other = known.get(place)
        if other is not None and not alike(tensor, other):
            out[place] = f"the tensor {place}, which is not saved, holds other values"
    return out


def alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape:
        return False
    a, b = a.detach().cpu(), b.detach().cpu()
    if not a.is_floating_point() or not b.is_floating_point():
        return torch.equal(a, b.to(a.dtype))
    tolerance = 8 * max(torch.finfo(t.dtype).eps for t in (a, b))
    return torch.allclose(a.double(), b.double(), rtol=tolerance, atol=0, equal_nan=True)


class Unwritten(TorchFunctionMode):
    """Parameters are made, not written: nobody reads what they hold."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Leave out in-place ops on parameters."""
        name = getattr(func, "__name__", "")
        first = args[0] if args else next(iter((kwargs or {}).values()), None)
        if isinstance(first, nn.Parameter) and name.endswith("_") and not name.endswith(("__", "requires_grad_")):
            return first
        return func(*args, **(kwargs or {}))


__all__ = ["Unwritten", "alike", "apart", "tensors_beside"]
