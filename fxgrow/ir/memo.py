"""What a forward keeps outside of its model: tables that ``functools.lru_cache`` holds by the sizes they are made for.

A forward that is traced makes such a table of fake tensors, which the model would be given when it runs.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from torch import nn

_KIND = type(functools.lru_cache(lambda: None))
#: packages whose caches no forward fills with tensors of its own
_OTHERS = sys.stdlib_module_names | {"fxgrow", "mpmath", "networkx", "numpy", "sympy", "torch", "triton"}


@contextlib.contextmanager
def caches_kept(model: nn.Module) -> Iterator[None]:
    """Afterwards caches that have got entries are empty: they are filled anew when the model runs."""
    before = [(cache, cache.cache_info().misses) for cache in _caches(model)]
    try:
        yield
    finally:
        for cache, misses in before:
            if cache.cache_info().misses != misses:
                cache.cache_clear()


def _caches(model: nn.Module) -> list[Any]:
    """Those that the packages of the model's classes and modules imported there define, and that methods close over."""
    kinds = {k for m in model.modules() for k in type(m).__mro__ if _top(k.__module__) not in _OTHERS}
    tops = {_top(k.__module__) for k in kinds}
    modules = {id(m): m for n, m in list(sys.modules.items()) if m is not None and _top(n) in tops}
    for module in list(modules.values()):
        found = [
            v for v in list(vars(module).values()) if isinstance(v, ModuleType) and _top(v.__name__) not in _OTHERS
        ]
        modules.update({id(v): v for v in found})
    caches: dict[int, Any] = {}
    for module in modules.values():
        for value in list(vars(module).values()):
            _note(value, caches)
            if isinstance(value, type) and value.__module__ == module.__name__:
                for member in list(vars(value).values()):
                    _note(member, caches)
    for kind in kinds:
        for member in vars(kind).values():
            _note(member, caches)
            for cell in getattr(member, "__closure__", None) or ():
                with contextlib.suppress(ValueError):  # not filled yet
                    _note(cell.cell_contents, caches)
    return list(caches.values())


def _top(module: str) -> str:
    return module.partition(".")[0]


def _note(value: Any, found: dict[int, Any]) -> None:
    value = getattr(value, "__func__", value) if isinstance(value, staticmethod | classmethod) else value
    if type(value) is _KIND:
        found[id(value)] = value


__all__ = ["caches_kept"]
