"""Packages extend fxgrow through entry points, without being imported by anybody.

    [project.entry-points."fxgrow.operations"]
    prune = "mypackage.growth:Prune"              # a class deriving from fxgrow.spec.Operation

    [project.entry-points."fxgrow.passes"]
    prune = "mypackage.growth:register"           # called once; calls fxgrow.passes.register_pass

    [project.entry-points."fxgrow.rules"]
    mypackage = "mypackage.rules"                 # imported once; calls fxgrow.register_rule

An entry of the last two groups is a function, which is called, or a module, whose import is enough. A plug-in that
cannot be loaded is reported as a warning that names it, and does not stop anything else.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

from fxgrow.warn import warn

GROUPS = ("fxgrow.operations", "fxgrow.passes", "fxgrow.rules")
#: our own modules that know the classes of another library, by its name
COMPANIONS = {"peft": "fxgrow.integrations.peft"}
_loaded: set[str] = set()


@dataclass(frozen=True)
class Plugin:
    """An installed plug-in: its entry-point group, name, and ``package.module:object``."""

    group: str
    name: str
    value: str
    package: str


def plugins() -> list[Plugin]:
    """Every installed plug-in, loaded or not."""
    return [
        Plugin(group, e.name, e.value, e.dist.name if e.dist is not None else "?")
        for group in GROUPS
        for e in entry_points(group=group)
    ]


def load_plugins(group: str, use: Callable[[Any], Any] | None = None) -> None:
    """Load the installed plug-ins of a group; once per process.

    Args:
        group: one of :data:`GROUPS`.
        use: what to do with each one's object; None calls what can be called.
    """
    if group in _loaded:
        return
    _loaded.add(group)
    for entry in entry_points(group=group):
        try:
            found = entry.load()
            if use is not None:
                use(found)
            elif callable(found):
                found()
        except (Exception, SystemExit) as error:  # whatever somebody's import does
            warn(f"plug-in {entry.name} = {entry.value} of {group} cannot be loaded: {error!r}")


def load_companions() -> None:
    """Import what knows the classes of a library, where the library is imported; else there can be none of them."""
    for library, module in COMPANIONS.items():
        if library in sys.modules and module not in _loaded:
            _loaded.add(module)
            importlib.import_module(module)
