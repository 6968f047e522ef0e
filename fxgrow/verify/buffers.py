"""What a module holds by name, and putting it back after a forward has written there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


def values_of(module: nn.Module, names: set[str]) -> dict[str, torch.Tensor]:
    """Copies of a module's tensors."""
    return {n: getattr(owner, leaf).detach().clone() for n, owner, leaf in _owners(module, names)}


@contextlib.contextmanager
def state_of(module: nn.Module, names: set[str]) -> Iterator[None]:
    """Put back what a forward writes."""
    before = [(owner, leaf, getattr(owner, leaf)) for _, owner, leaf in _owners(module, names)]
    copies = [t.detach().clone() for _, _, t in before]
    try:
        yield
    finally:
        with torch.no_grad():
            for (owner, leaf, tensor), copy in zip(before, copies, strict=True):
                if getattr(owner, leaf) is not tensor:
                    setattr(owner, leaf, tensor)
                tensor.copy_(copy)


def _owners(module: nn.Module, names: set[str]) -> Iterator[tuple[str, nn.Module, str]]:
    """Name, owner and attribute of those that the module has."""
    modules = dict(module.named_modules())
    for name in sorted(names):
        path, _, leaf = name.rpartition(".")
        if path in modules and isinstance(getattr(modules[path], leaf, None), torch.Tensor):
            yield name, modules[path], leaf
