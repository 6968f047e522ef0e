"""Gradients: of which combination of outputs they are taken, and what the plan makes of the old model's."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fxgrow.plan import GrowthPlan, TensorPlan
from fxgrow.weights.materialise import copy_gradient


@dataclass
class Weighed:
    """A fixed random combination of outputs, whose gradients are compared.

    Attributes:
        shapes: of these outputs alone, by place, and of so many entries of them, the first ones along every dim; all
            of all where None.
    """

    shapes: dict[int, list[int]] | None = None

    def of(self, found: Sequence[torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor | None]:
        """Gradients by name."""
        if self.shapes is not None:
            found = [found[i][tuple(slice(0, n) for n in shape)] for i, shape in self.shapes.items()]
        total: Any = 0.0
        for i, t in enumerate(t for t in found if t.is_floating_point()):
            generator = torch.Generator().manual_seed(i)
            weight = (
                torch.randn(t.shape, generator=generator, dtype=t.dtype).to(t.device) if t.dim() else t.new_ones(())
            )
            total = total + (t * weight).sum()
        if not wanted or not isinstance(total, torch.Tensor) or not total.requires_grad:
            return {}
        gradients = torch.autograd.grad(total, list(wanted.values()), allow_unused=True)
        return {n: g if g is not None and g.numel() else None for n, g in zip(wanted, gradients, strict=True)}


class GradientMap:
    """What the plan says of the gradients of the grown model.

    Args:
        plan: its map of gradients.
    """

    def __init__(self, plan: GrowthPlan) -> None:
        self.plan = plan

    def pair(
        self, name: str, small: Mapping[str, torch.Tensor | None], gradient: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """What the plan says of a gradient of the grown model, and the gradient; None where it says nothing."""
        if name.startswith("input "):
            old = small.get(name)
            if old is None or gradient is None:
                return None if old is None and gradient is None else (_full(old, gradient), _full(gradient, old))
            return old, gradient
        plan = self.plan.tensors[name]
        old = small.get(plan.source) if plan.source is not None else None
        if plan.source is None or plan.zero or gradient is None or old is None:
            return None
        if not self.plan.exact_gradients or has_newborn(plan) or self._new_blocks:
            return None  # old entries only are mapped; the output check covers them
        expected = copy_gradient(plan, old)
        for i in plan.appended:  # new rows that old entries are read with may have one of their own
            dim = plan.dims[i]
            if dim is not None:
                rows = torch.from_numpy(np.flatnonzero(dim.index >= 0)).to(gradient.device)
                gradient, expected = gradient.index_select(i, rows), expected.index_select(i, rows)
        return expected, gradient

    @functools.cached_property
    def _new_blocks(self) -> bool:
        sources = [p.source for p in self.plan.tensors.values()]
        return None in sources or len(set(sources)) != len(sources)


def has_newborn(plan: TensorPlan) -> bool:
    """Whether the tensor has newborn entries, other than rows that wait for inputs that use them."""
    return any(d is not None and i not in plan.appended and bool((d.index < 0).any()) for i, d in enumerate(plan.dims))


def _full(t: torch.Tensor | None, other: torch.Tensor | None) -> torch.Tensor:
    """A gradient that is missing is zero."""
    if t is not None:
        return t
    assert other is not None
    return torch.zeros_like(other)
