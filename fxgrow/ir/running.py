"""Run a module and leave it and its inputs as they were."""

from __future__ import annotations

import contextlib
import copy
import importlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.torch_version import TorchVersion

from fxgrow.ir import trees
from fxgrow.ir.compiled import as_written
from fxgrow.ir.memo import caches_kept
from fxgrow.ir.modules import OWN_ATTRIBUTES, named_tensors


@contextlib.contextmanager
def in_mode(module: nn.Module, training: bool) -> Iterator[None]:
    """Train or eval mode for the time being; parts in eval mode of a module in train mode stay so in train mode."""
    modes = {name: m.training for name, m in module.named_modules()}
    try:
        if not (training and module.training):
            module.train(training)
        yield
    finally:
        for name, m in module.named_modules():
            m.training = modes[name]


def plain_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Tensors that modules hold as plain attributes, neither parameters nor buffers, and that could be written into."""
    return {
        f"{path}.{leaf}" if path else leaf: t
        for path, part in module.named_modules()
        for leaf, t in vars(part).items()
        if type(t) is torch.Tensor and not t.is_inference() and all(t.stride())
    }


@contextlib.contextmanager
def plain_tensors_kept(module: nn.Module) -> Iterator[None]:
    """Afterwards these hold what they held: a trace runs in-place ops on them."""
    held = [(t, t.detach().clone()) for t in plain_tensors(module).values()]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, copy in held:
                tensor.copy_(copy)


#: where ``torch.export`` refuses a forward that makes an attribute or adds to a list or dict; since torch 2.11 it warns
_OLD = TorchVersion(torch.__version__) < TorchVersion("2.11")
_STRICT: Any = importlib.import_module("torch.export._trace") if _OLD else None
_DETECT = _STRICT and _STRICT._detect_attribute_assignment
_LOCK, _tracing = threading.Lock(), 0


@contextlib.contextmanager
def attributes_free() -> Iterator[None]:
    """``torch.export`` lets a forward assign attributes, as since torch 2.11; :func:`attributes_kept` undoes it."""
    global _tracing
    if _STRICT is None:
        yield
        return
    with _LOCK:
        _tracing += 1
        _STRICT._detect_attribute_assignment = contextlib.nullcontext
    try:
        yield
    finally:
        with _LOCK:
            _tracing -= 1
            if not _tracing:
                _STRICT._detect_attribute_assignment = _DETECT


@contextlib.contextmanager
def attributes_kept(module: nn.Module) -> Iterator[None]:
    """Afterwards modules have the plain attributes that they had, the same objects with the same entries.

    Meanwhile they run as they are written, see :func:`~fxgrow.ir.compiled.as_written`. Caches of their code that have
    got entries are emptied. A trace makes lists and dicts anew, so that one that several modules share comes apart, and
    leaves behind what a forward assigns: a table that it makes at its first call would be a fake tensor.
    """
    held = [(part, {n: v for n, v in vars(part).items() if n not in OWN_ATTRIBUTES}) for part in module.modules()]
    filled: dict[int, tuple[Any, Any]] = {}
    todo = [v for _, attributes in held for v in attributes.values()]
    while todo:
        value = todo.pop()
        if not isinstance(value, list | tuple | dict | set) or id(value) in filled:
            continue
        filled[id(value)] = value, copy.copy(value) if isinstance(value, list | dict | set) else None
        todo.extend(value.values() if isinstance(value, dict) else value)
    try:
        with caches_kept(module), as_written(module):
            yield
    finally:
        for part, attributes in held:
            table = vars(part)
            for name in [n for n in table if n not in OWN_ATTRIBUTES and n not in attributes]:
                del table[name]
            table.update(attributes)
        for value, entries in filled.values():
            if isinstance(value, list) and not _alike(value, entries):
                value[:] = entries
            elif isinstance(value, dict | set) and not _alike(value, entries):
                value.clear()
                value.update(entries)


def _alike(value: Any, entries: Any) -> bool:
    """Whether a list, dict or set still has the very entries that it had, in their order."""
    parts = [(*x.keys(), *x.values()) if isinstance(x, dict) else tuple(x) for x in (value, entries)]
    return list(map(id, parts[0])) == list(map(id, parts[1]))


@contextlib.contextmanager
def autocast_kept() -> Iterator[None]:
    """Afterwards autocast is as it was: entering it inside of a trace that refuses it leaves it on in the process."""
    states = {d: (torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in _AUTOCAST}
    cached, depth = torch.is_autocast_cache_enabled(), _autocast_depth()
    try:
        yield
    finally:
        for device, (enabled, dtype) in states.items():
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)
        torch.set_autocast_cache_enabled(cached)
        for _ in range(_autocast_depth() - depth):
            torch.autocast_decrement_nesting()


_AUTOCAST = ("cpu", "cuda", "xpu", "mps")


def _autocast_depth() -> int:
    torch.autocast_increment_nesting()
    return int(torch.autocast_decrement_nesting())


@contextlib.contextmanager
def _buffers_kept(module: nn.Module) -> Iterator[None]:
    held = [
        (part, leaf, t, t.detach().clone())
        for part in module.modules()
        for leaf, t in part.named_buffers(recurse=False, remove_duplicate=False)
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for part, leaf, tensor, copy in held:
                if getattr(part, leaf) is not tensor:
                    setattr(part, leaf, tensor)
                if not tensor.is_meta and not torch.equal(tensor, copy):
                    tensor.copy_(copy)


def run_eval(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What a module returns in eval mode for copies of the inputs, without gradients. It stays as it is."""
    copies = trees.clones((tuple(args), dict(kwargs)))
    kept = _buffers_kept(module), plain_tensors_kept(module), attributes_kept(module)
    with in_mode(module, False), kept[0], kept[1], kept[2], torch.no_grad():
        return module(*copies[0], **copies[1])


def run_with(
    module: nn.Module, tensors: dict[str, torch.Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """What a module returns with other tensors in the place of its own.

    ``functional_call`` does not put back what belongs to a module that stands under several names: it takes the tensor
    that it set under the first of them for the module's own.

    Args:
        tensors: by any name that the module has for them; a tie is set wherever it stands. What the forward assigns
            anew is found here afterwards.
    """
    other = {id(own): tensors[name] for name, own in named_tensors(module).items() if name in tensors}
    places: dict[str, torch.Tensor] = {}
    for path, part in module.named_modules():  # each once, whatever its names
        prefix = f"{path}." if path else ""
        held = (
            *part.named_parameters(recurse=False, remove_duplicate=False),
            *part.named_buffers(recurse=False, remove_duplicate=False),
        )
        places.update({prefix + leaf: other[id(own)] for leaf, own in held if id(own) in other})
    with attributes_kept(module):
        out = torch.func.functional_call(module, places, args, dict(kwargs), tie_weights=False)
    tensors.update({name: t for name, t in places.items() if name in tensors})
    return out
