"""The weights that the models are compared with: those they have, and others near them.

The plan is linear in the weights, so that it must hold for any: gates and projections at zero hide what lies behind
them, until they are opened.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Collection

import torch

from fxgrow.ir.dtypes import same_kind
from fxgrow.ir.traced import Traced
from fxgrow.plan import GrowthPlan
from fxgrow.weights.materialise import materialise_all


class Weights:
    """Tensors of the two models by name, in float64.

    Args:
        program: the old model.
        plan: what makes the grown tensors of the old ones.
        written: names of what the old model's forward writes into.
    """

    def __init__(self, program: Traced, plan: GrowthPlan, written: Collection[str]) -> None:
        self.program, self.plan, self.written = program, plan, written
        self._continued = {p.source for p in plan.tensors.values() if p.continuation is not None}

    def own(self, name: str) -> torch.Tensor:
        """A tensor of the old model as it is, in its own dtype."""
        return self.program.tensor(name).detach()

    def old(self, name: str) -> torch.Tensor:
        """A copy of it."""
        return widen_float(self.own(name))

    def shaken(self, name: str) -> torch.Tensor:
        """A copy, with other values where it may have others."""
        tensor = self.own(name)
        if self._stays(name):
            return widen_float(tensor)
        trained, written = name in self.program.parameters, name in self.written
        opens = trained or (name in self.program.buffers and not written)
        return shake(name, tensor, opens=opens, moves=trained or written)

    def grown(self, source: Callable[[str], torch.Tensor], *, noise: bool = True) -> Callable[[str], torch.Tensor]:
        """Makes tensors of the grown model of those that ``source`` gives."""
        plan = self.plan if noise else _noiseless(self.plan)

        def make(name: str) -> torch.Tensor:
            ((_, tensor),) = materialise_all(plan, source, [name], dtype=torch.float64)
            return tensor

        return make

    def once(self, shaken: Callable[[str], torch.Tensor]) -> Callable[[str], torch.Tensor]:
        """What grown tensors are made of where the old ones are shaken: those that stay need no copy."""
        return lambda name: self.own(name) if self._stays(name) else shaken(name)

    def _stays(self, name: str) -> bool:
        """Whether a tensor has the same values everywhere: integers, and patterns that the plan continues."""
        return not self.own(name).is_floating_point() or name in self._continued


def widen_float(t: torch.Tensor) -> torch.Tensor:
    """A copy in float64, complex numbers likewise; of integers as they are."""
    return t.detach().to(same_kind(t.dtype, torch.float64), copy=True)


@functools.cache
def _drawn() -> torch.Tensor:
    """Numbers between -1 and 1, a prime number of them, so that they do not line up with any dim; twice over."""
    return (torch.rand(65537, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1).repeat(2)


#: a parameter is moved by up to this part of itself, and opened by up to this
_MOVED = 0.2


def shake(name: str, tensor: torch.Tensor, *, opens: bool, moves: bool) -> torch.Tensor:
    """Other values for a weight, as training might leave it; the same for the same name. A copy, in float64.

    Args:
        opens: a tensor of zeros becomes small random numbers.
        moves: others are multiplied entry by entry with numbers around 1, so that signs and zeros stay.
    """
    t = tensor.to(torch.float64, copy=True)
    if not t.numel():
        return t
    start = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "little")
    period = len(_drawn()) // 2
    drawn = _drawn()[-start % period :][:period] * _MOVED
    if t.numel() > period:
        drawn = drawn.repeat(-(-t.numel() // period))
    drawn = drawn[: t.numel()].reshape(t.shape).to(t.device)
    if not bool(t.any()):
        return drawn if opens else t
    return t.mul_(drawn.add_(1)) if moves else t


def _noiseless(plan: GrowthPlan) -> GrowthPlan:
    return plan.model_copy(update={"tensors": {n: t.noiseless() for n, t in plan.tensors.items()}})
