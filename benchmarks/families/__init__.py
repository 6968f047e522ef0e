"""Small random models of many families, for the growability table. Nothing is downloaded.

Each module of this package has ``FAMILIES``: model name to a function that returns an :class:`Example`, and
``REQUIRES``: the library it needs, or an empty string.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

SOURCES = ("plain", "classes", "huggingface", "strangers", "vision")


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


def sources(*more: str) -> dict[str, tuple[dict[str, Maker], str]]:
    """Every list of families: its models (none where the library is missing), and a note for what is missing.

    Args:
        more: lists beside :data:`SOURCES`.
    """
    out: dict[str, tuple[dict[str, Maker], str]] = {}
    for name in (*SOURCES, *more):
        module = importlib.import_module(f"benchmarks.families.{name}")
        for library, table in module.FAMILIES.items():
            missing = bool(library) and importlib.util.find_spec(library) is None
            out[getattr(module, "LABEL", library or name)] = (
                {} if missing else table,
                f"{library} is not installed" if missing else "",
            )
    return out


def from_file(reference: str) -> Maker:
    """``FILE.py:FUNCTION``, a function that returns a module and the tuple of its example inputs."""

    def make() -> Example:
        path, _, name = reference.rpartition(":")
        spec = importlib.util.spec_from_file_location(Path(path).stem, path)
        assert spec is not None and spec.loader is not None, f"{reference} is not FILE.py:FUNCTION"
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
        model, inputs = getattr(module, name)()
        return Example(model, {}, None, tuple(inputs))

    return make


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
