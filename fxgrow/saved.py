"""What ``torch.load`` may make out of a saved optimizer state once fxgrow is imported, before or after torch.

``torch.load`` makes only what it is told is safe. Per-slice learning rates are plain data in a class of their own: so
a process without fxgrow refuses them, where it would drop them silently, and one that has imported fxgrow reads them.
To import torch takes seconds and ``import fxgrow`` next to nothing, so torch is told once it is there.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

_HOME, _NAME = "fxgrow.optim.rates", "GroupRates"


def group_rates(data: dict[str, Any]) -> Any:
    """Rates of a parameter group; the module that applies them comes with them."""
    return getattr(import_module(_HOME), _NAME)(data)


def tell_torch() -> bool:
    """Have ``torch.load`` read rates; False: torch is not imported."""
    found = getattr(sys.modules.get("torch"), "serialization", None)
    if found is None:
        return False
    found.add_safe_globals([(group_rates, f"{_HOME}.{_NAME}")])
    return True


class _Awaited:
    """Stands among Python's finders until torch is imported; others may look for torch before, without importing it."""

    looking = False

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "torch" or self.looking:
            return None
        self.looking = True
        try:
            spec = find_spec(name)
        finally:
            self.looking = False
        loader = None if spec is None else spec.loader
        if loader is None:
            return None
        run = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            del loader.exec_module
            run(module)
            tell_torch()
            if self in sys.meta_path:
                sys.meta_path.remove(self)

        loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def when_torch_is_there() -> None:
    """Tell torch now, or as soon as it is imported."""
    if not tell_torch():
        sys.meta_path.insert(0, _Awaited())


__all__ = ["group_rates", "tell_torch", "when_torch_is_there"]
