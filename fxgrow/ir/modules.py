"""Modules as PyTorch keeps them: their children, and what ``torch.compile`` wraps."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
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


def children_of(module: nn.Module) -> dict[str, nn.Module | None]:
    """A module's children by name, in their order; None where a name is kept for one."""
    return dict(module._modules)


def set_children(module: nn.Module, children: Mapping[str, nn.Module | None]) -> None:
    """Give a module other children, in this order."""
    module._modules.clear()
    module._modules.update(children)


#: what every module keeps, under other care than a plain attribute's
OWN_ATTRIBUTES = frozenset(vars(nn.Module()))


def named_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """A module's parameters, then its buffers, each under all of its names."""
    kinds = module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)
    return {name: tensor for kind in kinds for name, tensor in kind}


def tensor_of(module: nn.Module, leaf: str) -> torch.Tensor | None:
    """The parameter or buffer that a module itself holds under a name."""
    found = module._parameters.get(leaf)
    return found if found is not None else module._buffers.get(leaf)


def set_tensor(module: nn.Module, leaf: str, tensor: torch.Tensor | None) -> None:
    """Put a tensor in the place of a parameter or buffer, whatever the module's own ``__setattr__`` does."""
    if leaf in module._parameters:
        module._parameters[leaf] = tensor  # type: ignore[assignment]
    else:
        module._buffers[leaf] = tensor


def map_tensors(module: nn.Module, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """What ``module.to(...)`` does, with a function of one's own: the module may have its say about it."""
    module._apply(function)


def version_of(tensor: torch.Tensor) -> int:
    """How often a tensor was written into; -1 where PyTorch does not count."""
    return -1 if tensor.is_inference() else tensor._version


def share_hooks(old: torch.Tensor, new: torch.Tensor) -> None:
    """Let a tensor run the hooks and have the attributes of another; handles of the hooks go on removing them."""
    if old._backward_hooks is not None:
        new._backward_hooks = old._backward_hooks
    hooks = getattr(old, _ACCUMULATED, None)
    if hooks:
        new._post_accumulate_grad_hooks = hooks
    vars(new).update({k: v for k, v in vars(old).items() if k not in vars(new)})


def drop_hooks(tensor: torch.Tensor) -> None:
    """The inverse of :func:`share_hooks`."""
    tensor._backward_hooks = None
    if getattr(tensor, _ACCUMULATED, None):
        tensor._post_accumulate_grad_hooks = {}


_ACCUMULATED = "_post_accumulate_grad_hooks"
