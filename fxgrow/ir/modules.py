"""Modules as PyTorch keeps them: their children, and what ``torch.compile`` wraps."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn


def child_of(module: nn.Module, name: str) -> nn.Module | None:
    """The child that a module has under a name, None where it has none."""
    return module._modules.get(name)


def order_children(module: nn.Module, place: Callable[[str], int]) -> None:
    """Sort a module's children by the place of their names; the same module may stand under several."""
    children = sorted(module._modules.items(), key=lambda c: place(c[0]))
    module._modules.clear()
    module._modules.update(children)


def is_compiled(module: nn.Module) -> bool:
    """Whether a module is what ``torch.compile`` returned."""
    return hasattr(module, "_orig_mod")


def uncompiled(module: nn.Module) -> nn.Module:
    """The module that ``torch.compile`` was given; any other as it is."""
    return getattr(module, "_orig_mod", module)
