"""What growths leave behind for an optimizer's next steps: factors of slices, and how they change from step to step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from fxgrow.ir.dtensors import Layout, is_sharded
from fxgrow.plan import TensorPlan, decode_values, encode_values

Vectors = list[np.ndarray | None]


@dataclass
class Slice:
    """Factors of one parameter, per dim (None: 1 everywhere) and for the whole tensor.

    ``value`` is s, ``gradient`` g; ``newborn`` marks entries that learn under ``warmup``; ``copies`` is how many
    entries have the same source, where there are factors.
    """

    value: Vectors = field(default_factory=list)
    gradient: Vectors = field(default_factory=list)
    newborn: Vectors = field(default_factory=list)
    value_scale: float = 1.0
    gradient_scale: float = 1.0
    whole: bool = False  # the tensor is newborn as a whole
    copies: Vectors = field(default_factory=list)

    @property
    def scaled(self) -> bool:
        return (
            self.value_scale != 1.0
            or self.gradient_scale != 1.0
            or any(v is not None for v in (*self.value, *self.gradient))
        )

    @property
    def tiles(self) -> float:
        """How many whole copies of its source the tensor holds."""
        return math.prod(float(v[0]) for v in self.copies if v is not None and len(v))

    @property
    def warms(self) -> bool:
        return self.whole or any(n is not None for n in self.newborn)

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether the vectors are those of a tensor of that shape."""
        return all(
            len(vectors) in (0, len(shape))
            and all(v is None or len(v) == n for v, n in zip(vectors, shape, strict=False))
            for vectors in (self.value, self.gradient, self.newborn, self.copies)
        )

    def part(self, tensor: torch.Tensor, whole: int | None = None) -> Slice:
        """The same of this rank's shard of a tensor; of a plain one, it is itself.

        Args:
            whole: a dim of which all factors are wanted: one that the tensor was averaged over.
        """
        if not is_sharded(tensor):
            return self
        mine = Layout.of(tensor).own(tensor.shape)

        def cut(vectors: Vectors) -> Vectors:
            spans = enumerate(zip(vectors, mine.start, mine.shape, strict=True)) if vectors else ()
            return [v if v is None or i == whole else v[a : a + n] for i, (v, a, n) in spans]

        return replace(
            self,
            value=cut(self.value),
            gradient=cut(self.gradient),
            newborn=cut(self.newborn),
            copies=cut(self.copies),
        )

    def grown(self, plan: TensorPlan) -> Slice:
        """The same factors after a growth of the parameter: copies have their unit's, newborn entries none."""

        def mapped(vectors: Vectors, missing: float) -> Vectors:
            out = list(vectors)
            for i, d in enumerate(plan.dims[: len(out)]):
                v = out[i]
                if v is not None and d is not None:
                    out[i] = np.where(d.index >= 0, v[np.maximum(d.index, 0)], missing).astype(v.dtype)
            return out

        return Slice(
            mapped(self.value, 1.0),
            mapped(self.gradient, 1.0),
            mapped(self.newborn, 0.0),
            self.value_scale,
            self.gradient_scale,
            self.whole,
            mapped(self.copies, 1.0),
        )


class SliceRates:
    """Per-slice learning rates that one growth left.

    ``exact`` slices are stepped in the small model's units, see the module's docstring; with ``ramp`` the learning rate
    factor s goes to 1 over that many steps. ``newborn`` entries get a learning rate of their own for ``warmup`` steps:
    from 0 to ``peak`` over the first half, then to 1 (SPARKLING, ICML 2026).
    """

    def __init__(self, *, warmup: int = 0, peak: float = 1.0, ramp: int | None = None) -> None:
        self.warmup, self.peak, self.ramp = warmup, peak, ramp
        self.steps = 0
        self.slices: dict[str, Slice] = {}

    @property
    def newborn_rate(self) -> float:
        """Learning-rate factor of newborn entries at the current step."""
        if self.steps >= self.warmup:
            return 1.0
        half = max(1.0, self.warmup / 2)
        t = self.steps + 1
        return self.peak * t / half if t <= half else self.peak + (1.0 - self.peak) * (t - half) / half

    @property
    def exponent(self) -> float:
        """s ** exponent is the present learning-rate factor."""
        return 1.0 if self.ramp is None else max(0.0, 1.0 - self.steps / max(1, self.ramp))

    @property
    def finished(self) -> bool:
        """Every later step would be a plain one, once moments are in the grown model's units."""
        warm = self.steps < self.warmup and any(s.warms for s in self.slices.values())
        scaled = self.exponent > 0.0 and any(s.scaled for s in self.slices.values())
        return not warm and not scaled

    def state_dict(self) -> dict[str, Any]:
        """Plain data, JSON-able."""

        def encode(vectors: Vectors) -> list[Any]:
            return [None if v is None else encode_values(v.astype(np.float64)) for v in vectors]

        return {
            "warmup": self.warmup,
            "peak": self.peak,
            "ramp": self.ramp,
            "steps": self.steps,
            "slices": {
                n: {
                    "value": encode(s.value),
                    "gradient": encode(s.gradient),
                    "newborn": encode(s.newborn),
                    "value_scale": s.value_scale,
                    "gradient_scale": s.gradient_scale,
                    "whole": s.whole,
                    "copies": encode(s.copies),
                }
                for n, s in self.slices.items()
            },
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> SliceRates:
        def decode(vectors: Sequence[Any]) -> Vectors:
            return [None if v is None else decode_values(v) for v in vectors]

        out = cls(warmup=state["warmup"], peak=state["peak"], ramp=state["ramp"])
        out.steps = state["steps"]
        for name, s in state["slices"].items():
            out.slices[name] = Slice(
                decode(s["value"]),
                decode(s["gradient"]),
                [None if v is None else v.astype(bool) for v in decode(s["newborn"])],
                s["value_scale"],
                s["gradient_scale"],
                s["whole"],
                decode(s.get("copies", [])),
            )
        return out

    def grown(self, plans: Mapping[str, TensorPlan], names: Sequence[str]) -> SliceRates:
        """These rates after a further growth, for the parameters ``names`` of the newly grown model."""
        out = SliceRates(warmup=self.warmup, peak=self.peak, ramp=self.ramp)
        out.steps = self.steps
        for name in names:
            plan = plans[name]
            if plan.source in self.slices and plan.init is None and not (plan.zero or plan.fresh):
                out.slices[name] = self.slices[plan.source].grown(plan)
        return out


Factors = list[torch.Tensor | float]


def combined(of: Sequence[tuple[Slice, float]], kind: str, p: torch.Tensor, averaged: int | None = None) -> Factors:
    """The product of slices' factors, each to a power: numbers, and tensors that broadcast to the parameter.

    Args:
        kind: ``"value"``, ``"gradient"`` or ``"copies"``.
        averaged: a dim over which the factors are averaged.
    """
    scale = 1.0
    dims: Vectors = [None] * p.dim()
    for s, power in of:
        whole, vectors = {
            "value": (s.value_scale, s.value),
            "gradient": (s.gradient_scale, s.gradient),
            "copies": (1.0, s.copies),
        }[kind]
        scale *= whole**power
        for i, v in enumerate(vectors):
            if v is not None:
                before = dims[i]
                dims[i] = v**power if before is None else before * v**power
    for i, v in enumerate(dims):
        if v is not None and len(v) and (i == averaged or bool(np.all(v == v[0]))):
            scale, dims[i] = scale * float(np.mean(v) if i == averaged else v[0]), None
    out: Factors = [] if scale == 1.0 else [scale]
    return out + [along(v, i, p) for i, v in enumerate(dims) if v is not None]


def wide(p: torch.Tensor) -> torch.dtype:
    """What factors are computed in: a third in bfloat16 is off by a thousandth."""
    return torch.float64 if p.dtype in (torch.float64, torch.complex128) else torch.float32


def along(values: np.ndarray, dim: int, p: torch.Tensor) -> torch.Tensor:
    """Values of one dim, to be broadcast to the parameter."""
    shape = [1] * p.dim()
    shape[dim] = len(values)
    return torch.from_numpy(values.astype(np.float64)).to(wide(p)).to(p.device).view(shape)


def halves(v: np.ndarray) -> bool:
    """Whether multiplying by these undoes a division by them to the bit: 1, 1/2, 1/4 and so on."""
    return bool(np.all(np.frexp(v)[0] == 0.5) and np.all(v <= 1.0))
