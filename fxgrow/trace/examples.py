"""The model and its examples, before anything is traced."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fxgrow.errors import CaptureError
from fxgrow.ir import trees
from fxgrow.ir.adapters import is_own
from fxgrow.ir.modules import is_compiled
from fxgrow.ir.running import run_with
from fxgrow.ir.traced import Call
from fxgrow.trace.crashes import NoCrashes
from fxgrow.trace.lines import place_of
from fxgrow.warn import warn


def as_calls(args: Sequence[Any], kwargs: Mapping[str, Any] | None, calls: Mapping[str, Any] | None) -> list[Call]:
    """The ways of calling a model, each with inputs of its own: one tensor given twice is two inputs.

    Raises:
        CaptureError: they are not given as they should be.
    """
    for what, given in (("kwargs", kwargs), ("calls", calls)):
        if given is not None and not isinstance(given, Mapping):
            raise CaptureError(f"{what} must be a dict, by name, and is a {type(given).__name__}")
    out = []
    if args or kwargs or not calls:
        out.append(Call("forward", trees.clones(tuple(args)), trees.clones(dict(kwargs or {}))))
    for name, inputs in (calls or {}).items():
        if isinstance(inputs, Mapping):
            out.append(Call(name, (), trees.clones(dict(inputs))))
        elif isinstance(inputs, list | tuple):
            out.append(Call(name, trees.clones(tuple(inputs)), {}))
        else:
            raise CaptureError(f"calls[{name!r}] must be a tuple of arguments or a dict of keyword arguments")
    return out


def check_plain(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if is_compiled(module):
            raise CaptureError(
                f"module {name or '(root)'} is compiled; compile the whole model instead, or put the module inside "
                "(._orig_mod) there and compile the grown one"
            )
        hooks = [h for n in ("_forward_hooks", "_forward_pre_hooks") for h in getattr(module, n).values()]
        if not all(map(is_own, hooks)) and not torch.nn.utils.parametrize.is_parametrized(module):
            warn(f"module {name or '(root)'} has forward hooks; what they compute is traced in")


def check_signature(model: nn.Module, call: Call) -> None:
    """Raises:
    CaptureError: the example has other arguments than ``forward`` takes.
    """
    signature = inspect.signature(model.forward)
    try:
        signature.bind(*call.args, **call.kwargs)
    except TypeError as error:
        raise CaptureError(
            f"the example of call {call.name!r} does not fit {type(model).__name__}.forward{signature}: {error}"
        ) from None


def strange_dtypes(model: nn.Module, call: Call) -> bool:
    """Whether a float input has a dtype that no tensor of the model has: a trace does not notice that ops refuse it."""
    own = {t.dtype for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()}
    given = {t.dtype for t in trees.tensors_in((call.args, call.kwargs))}
    return bool(own) and any(d.is_floating_point and d not in own for d in given)


def check_example(model: nn.Module, call: Call) -> None:
    """Run the model on an example as it is, on copies of its buffers.

    Raises:
        CaptureError: the model itself raises, so that there is nothing to trace.
    """
    buffers = {n: b.detach().clone() for n, b in model.named_buffers()}
    try:
        # with gradients, as it is trained: forwards that differentiate need them
        with warnings.catch_warnings(), torch.enable_grad(), torch.random.fork_rng(), NoCrashes():
            warnings.simplefilter("ignore")
            run_with(model, buffers, trees.clones(call.args), trees.clones(call.kwargs))
    except Exception as error:
        shapes = ", ".join(_shown(x) for x in trees.tree_leaves((call.args, call.kwargs)))
        reason = str(error).strip().partition("\n")[0]
        raise CaptureError(
            f"{type(model).__name__} itself raises with the example of call {call.name!r} ({shapes}): "
            f"{type(error).__name__}: {reason}{place_of(error, '')}"
        ) from error


def _shown(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)} on {value.device}"
    return repr(value)[:40]
