"""Small random models of many families, for the growability table. Nothing is downloaded.

Each module of this package has ``FAMILIES``: model name to a function that returns an :class:`Example`, and
``REQUIRES``: the library it needs, or an empty string.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

SOURCES = ("plain", "huggingface", "strangers", "vision")


@dataclass
class Example:
    """A model, the inputs it is captured with, and inputs of other sizes to check with (None: of the same sizes).

    ``dynamic``: which dims of the inputs :func:`fxgrow.capture` leaves open.
    """

    model: nn.Module
    kwargs: dict[str, Any]
    other: dict[str, Any] | None = None
    args: tuple[Any, ...] = ()
    other_args: tuple[Any, ...] = ()
    notes: list[str] = field(default_factory=list)
    dynamic: Literal["all", "batch"] = "all"


Maker = Callable[[], Example]


def sources() -> dict[str, tuple[dict[str, Maker], str]]:
    """Every list of families: its models (none where the library is missing), and a note for what is missing."""
    out: dict[str, tuple[dict[str, Maker], str]] = {}
    for name in SOURCES:
        module = importlib.import_module(f"benchmarks.families.{name}")
        for library, table in module.FAMILIES.items():
            missing = bool(library) and importlib.util.find_spec(library) is None
            out[getattr(module, "LABEL", library or name)] = (
                {} if missing else table,
                f"{library} is not installed" if missing else "",
            )
    return out


def perturbed(model: nn.Module, seed: int = 0, scale: float = 0.1) -> nn.Module:
    """Every parameter and running statistic off its initial value, in float64 and eval mode.

    Growth of a model whose norms are all ones and biases all zeros proves little.
    """
    model = model.double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.is_floating_point():
                p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * scale)
        for name, b in model.named_buffers():
            if name.endswith("running_mean"):
                b.add_(torch.randn(b.shape, generator=generator, dtype=b.dtype) * 0.3)
            if name.endswith("running_var"):
                b.mul_(0.5 + torch.rand(b.shape, generator=generator, dtype=b.dtype))
    return model
