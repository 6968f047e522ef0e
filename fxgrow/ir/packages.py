"""Compiling ahead of time, by AOTInductor."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim

from fxgrow.ir import trees


def compile_ahead(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], path: Path, options: Mapping[str, Any]
) -> Path:
    """Compile a module as it is called into a ``.pt2`` file.

    Every dim of the inputs but those of size 1 is dynamic, where the module allows it.
    """

    def dims(x: Any) -> dict[int, Any] | None:
        return {i: Dim.AUTO for i, n in enumerate(x.shape) if n != 1} if isinstance(x, torch.Tensor) else None

    bound = inspect.signature(module.forward).bind(*args, **kwargs)
    shapes = trees.tree_map(dims, dict(bound.arguments))
    with torch.no_grad():
        exported = torch.export.export(module, args, dict(kwargs), dynamic_shapes=shapes or None, strict=False)
        made = torch._inductor.aoti_compile_and_package(
            exported, package_path=str(path), inductor_configs=dict(options) or None
        )
    return Path(str(made))


__all__ = ["compile_ahead"]
