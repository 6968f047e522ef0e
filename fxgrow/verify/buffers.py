"""What a module holds by name, and putting it back after a forward has written there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


def values_of(module: nn.Module, names: set[str]) -> dict[str, torch.Tensor]:
    """Copies of a module's tensors."""
    return {n: getattr(owner, leaf).detach().clone() for n, owner, leaf in _owners(module, names)}


class Before:
    """Some of a module's tensors as they are now.

    Args:
        names: those that the module lacks are left out.
    """

    def __init__(self, module: nn.Module, names: set[str]) -> None:
        found = [(owner, leaf, getattr(owner, leaf)) for _, owner, leaf in _owners(module, names)]
        self._held = [(owner, leaf, t, t.detach().clone()) for owner, leaf, t in found]

    def restore(self) -> None:
        """Put them back."""
        with torch.no_grad():
            for owner, leaf, tensor, copy in self._held:
                if getattr(owner, leaf) is not tensor:
                    setattr(owner, leaf, tensor)
                tensor.copy_(copy)


@contextlib.contextmanager
def state_of(module: nn.Module, names: set[str]) -> Iterator[None]:
    """Put back what a forward writes."""
    before = Before(module, names)
    try:
        yield
    finally:
        before.restore()


def _owners(module: nn.Module, names: set[str]) -> Iterator[tuple[str, nn.Module, str]]:
    """Name, owner and attribute of those that the module has."""
    modules = dict(module.named_modules())
    for name in sorted(names):
        path, _, leaf = name.rpartition(".")
        if path in modules and isinstance(getattr(modules[path], leaf, None), torch.Tensor):
            yield name, modules[path], leaf
