"""``torch.compile`` by region: blocks that are alike share one class, so that one is compiled for all."""

from __future__ import annotations

from typing import Any

from torch import fx, nn


def blocks_of(module: nn.Module) -> list[tuple[str, fx.GraphModule]]:
    """The generated blocks of a regenerated module, by path."""
    return [(n, m) for n, m in module.named_modules() if n and isinstance(m, fx.GraphModule)]


def compile_regions(module: fx.GraphModule, **options: Any) -> fx.GraphModule:
    """Compile every block by itself, in place; a module without blocks is compiled whole.

    Args:
        module: from :func:`fxgrow.grow`.
        options: for ``torch.compile``.

    Returns:
        The module itself; names and state dict are unchanged.
    """
    blocks = blocks_of(module)
    for _, block in blocks:
        block.compile(**options)
    if not blocks:
        module.compile(**options)
    return module
