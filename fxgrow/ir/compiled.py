"""Modules that ``torch.compile`` has compiled in place: one compiled code for all that are alike."""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fxgrow.ir.modules import OWN_ATTRIBUTES, named_tensors

#: compilations that PyTorch allows a code object before it runs it uncompiled; the default of its configuration
_LIMIT = 8
_numbers = itertools.count()


@dataclass(frozen=True)
class Options:
    """How modules are compiled: what ``torch.compile`` is given, and whether activations are made again."""

    given: Mapping[str, Any] = field(default_factory=dict)
    again: bool = False


class Shared:
    """A compiled call of a module, which every module of one structure runs.

    ``Module.compile`` compiles the code of the class's ``forward``, one for all modules of the class and as long as the
    process lives: after some growths PyTorch's limit of compilations is reached, and it runs uncompiled from there on;
    and a size that a growth has changed is taken for one that changes from call to call. This has a code object of its
    own, which goes with the modules that run it.
    """

    def __init__(self, key: Any, options: Options, name: str, count: int) -> None:
        self.key, self.options = key, options
        given = dict(options.given)
        if "recompile_limit" in _PARAMETERS and count > _LIMIT // 2:  # it may compile once for each of them
            given.setdefault("recompile_limit", _LIMIT + 2 * count)
        self.run: Callable[..., Any] = torch.compile(_call_of(name), **given)


class _Call:
    """What a compiled module runs in the place of its own ``__call__``."""

    def __init__(self, shared: Shared, module: nn.Module) -> None:
        self.shared, self._run = shared, functools.partial(shared.run, module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.shared.options.again and torch.is_grad_enabled():
            return checkpoint(self._run, *args, use_reentrant=False, **kwargs)
        return self._run(*args, **kwargs)


def share(modules: Sequence[nn.Module], numbers: Sequence[int | None], options: Options) -> list[Shared]:
    """Compile modules in place; those of one structure share one compiled code.

    One that a module runs already is kept where it fits, so that what is added to a stack compiles nothing.

    Args:
        numbers: each module's place in its stack, None where it has none: a number that a module keeps of its own
            place does not make it another structure.

    Returns:
        One for each structure.
    """
    keys = structures(modules, numbers)
    known = [s for m in modules if (s := shared_of(m)) is not None and s.options == options]
    out: dict[Any, Shared] = {}
    for module, key in zip(modules, keys, strict=True):
        if key not in out:
            made = next((s for s in known if s.key == key), None)
            out[key] = made or Shared(key, options, type(module).__name__, keys.count(key))
    for module, key in zip(modules, keys, strict=True):
        module._compiled_call_impl = _Call(out[key], module)
    return list(out.values())


def shared_of(module: nn.Module) -> Shared | None:
    """What a module runs, where :func:`share` has compiled it."""
    found = vars(module).get(_IMPL)
    return found.shared if isinstance(found, _Call) else None


def compiled_of(module: nn.Module) -> Any:
    """What a module runs in the place of its own ``__call__``, None where it is not compiled in place."""
    return vars(module).get(_IMPL)


@contextlib.contextmanager
def as_written(module: nn.Module) -> Iterator[None]:
    """Meanwhile no part runs what it was compiled to.

    Where a trace or a counter intercepts ops, Dynamo gives up a frame for good: compiled parts that run in it run
    uncompiled ever after.
    """
    held = [(part, vars(part)[_IMPL]) for part in module.modules() if vars(part).get(_IMPL) is not None]
    for part, _ in held:
        part._compiled_call_impl = None
    try:
        yield
    finally:
        for part, call in held:
            part._compiled_call_impl = call


def structures(modules: Sequence[nn.Module], numbers: Sequence[int | None]) -> list[Any]:
    """What compiled code of each module depends on, by path: classes, plain attributes, shapes and kinds of tensors.

    Args:
        numbers: see :func:`share`.
    """
    tables = [{(p, n): v for p, part in m.named_modules() for n, v in _plain(part)} for m in modules]
    places: dict[type, set[tuple[str, str]]] = {}
    for module, number, table in zip(modules, numbers, tables, strict=True):
        own = {k for k, v in table.items() if type(v) is int and v == number}
        places[type(module)] = places.get(type(module), own) & own
    several = Counter(type(m) for m in modules)
    out = []
    for module, table in zip(modules, tables, strict=True):
        left_out = places[type(module)] if several[type(module)] > 1 else set()
        out.append(
            (
                tuple((path, type(part)) for path, part in module.named_modules()),
                tuple((k, v) for k, v in sorted(table.items()) if k not in left_out),
                tuple(
                    (n, tuple(t.shape), t.dtype, t.device, t.requires_grad) for n, t in named_tensors(module).items()
                ),
            )
        )
    return out


def _plain(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, value in vars(module).items():
        if name not in OWN_ATTRIBUTES and name != _IMPL and _is_plain(value):
            yield name, value


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return isinstance(value, bool | int | float | str | torch.dtype | None)


def _call_of(name: str) -> Callable[..., Any]:
    """A function that calls its first argument, with a code object and a name of its own.

    PyTorch remembers by file, line and name which sizes have changed.
    """

    def call(module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        return module._call_impl(*args, **kwargs)

    own = f"{name}_{next(_numbers)}"
    call.__code__ = call.__code__.replace(co_name=own)
    call.__name__ = call.__qualname__ = own
    return call


_IMPL = "_compiled_call_impl"
_PARAMETERS = frozenset(inspect.signature(torch.compile).parameters)
