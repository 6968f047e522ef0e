"""Public names that load on first use, so that ``import fxgrow`` costs next to nothing.

What a package offers stands in its stub, ``__init__.pyi``, as ordinary imports (``from fxgrow.program import capture as
capture``). Type checkers and editors read a stub in place of ``__init__.py``, so they see the real objects; at run time
the same lines are read once as a table of names (PEP 562). One list, no ``TYPE_CHECKING``, nothing that could drift
apart. It is what Scientific Python recommends (SPEC 1).
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any


def read_stub(file: Path) -> dict[str, str]:
    """Each name that a stub offers, and the module it comes from; a submodule comes from the package itself."""
    return {
        alias.asname or alias.name: str(line.module)
        for line in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(line, ast.ImportFrom)
        for alias in line.names
    }


def attach(package: str, file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Make the names of a package's stub load on first use.

    Args:
        package: its ``__name__``.
        file: its ``__file__``; the stub stands beside it.

    Returns:
        The package's ``__getattr__``, ``__dir__`` and ``__all__``.
    """
    home = read_stub(Path(file).with_suffix(".pyi"))
    module = sys.modules[package]

    class Face(ModuleType):
        """The package. Python puts every imported submodule into it; ``fxgrow.capture`` has to stay the function."""

        def __setattr__(self, name: str, value: Any) -> None:
            shadowed = isinstance(value, ModuleType) and home.get(name, package) != package
            if not shadowed:
                super().__setattr__(name, value)

    module.__class__ = Face

    def get(name: str) -> Any:
        if name in home and home[name] != package:
            value = getattr(import_module(home[name]), name)
        elif name.startswith("_"):
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        else:
            try:
                value = import_module(f"{package}.{name}")
            except ModuleNotFoundError as error:
                if error.name != f"{package}.{name}":  # it is there, and lacks something itself
                    raise
                raise AttributeError(f"module {package!r} has no attribute {name!r}") from None
        setattr(module, name, value)
        return value

    def names() -> list[str]:
        return sorted({*vars(module), *home})

    return get, names, sorted(home)
