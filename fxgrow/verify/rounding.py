"""How far two results may differ by rounding, and how far they do, slice by slice.

A difference is measured in every slice of a result (every index of every dim: every column, row, channel, example), so
that an error in a small column is not hidden by a large one. Where a result is the difference of large numbers, a slice
may hold little but rounding; how much is measured and not guessed: the *small* model runs again with every computed
value moved by a few units in the last place (Monte Carlo arithmetic, Parker 1997), and what that moves is rounding.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import fx

from fxgrow.ir.traits import Trait, traits_of


@dataclass(frozen=True)
class Tolerance:
    """How far results may differ.

    Attributes:
        relative: of a slice's largest value, where nothing amplifies rounding.
        steps: units in the last place by which every value is moved to see what amplifies it.
        amplified: a slice may differ by so many times what that moves it by.
    """

    relative: float
    steps: int = 4
    amplified: int = 64


#: runs whose largest effect counts
RUNS = 3


class Moved:
    """Moves every computed value by a few units in the last place, up or down at random; hooks of a run.

    Args:
        seed: of the directions.
        steps: how many units.
    """

    def __init__(self, seed: int, steps: int) -> None:
        self._steps = steps
        generator = torch.Generator().manual_seed(seed)
        # of prime length, so that no dim lines up with it
        self._signs = torch.randint(0, 2, (65537,), generator=generator, dtype=torch.int8) * 2 - 1
        self._start = seed * 7919 % 65537

    def tensor(self, t: torch.Tensor) -> torch.Tensor:
        """``t`` moved; integers stay."""
        if not t.is_floating_point() or t.numel() == 0:
            return t
        self._start = (self._start + 104729) % 65537
        signs = self._signs.roll(self._start)
        if t.numel() > signs.numel():
            signs = signs.repeat(-(-t.numel() // signs.numel()))
        step = self._steps * torch.finfo(t.dtype).eps
        return t * (1 + step * signs[: t.numel()].reshape(t.shape).to(t.device, t.dtype))

    def read(self, read: Callable[[str], torch.Tensor]) -> Callable[[str], torch.Tensor]:
        """Reads tensors moved; those that a graph writes must come from ``Tensors`` made of moved ones."""
        return lambda name: self.tensor(read(name))

    def after(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
        """Moves what an op computed, unless it only moved, chose or cast what it was given."""
        if Trait.EXACT in traits_of(node.target):
            return result
        if isinstance(result, torch.Tensor):
            return result if _shares(result, args) else self.tensor(result)
        if isinstance(result, tuple | list):
            return type(result)(
                self.tensor(r) if isinstance(r, torch.Tensor) and not _shares(r, args) else r for r in result
            )
        return result


def _shares(result: torch.Tensor, args: Sequence[Any]) -> bool:
    """Whether a result lies in the memory of an operand: a view of it, or written in place."""
    memory = result.untyped_storage().data_ptr()
    return any(isinstance(a, torch.Tensor) and a.untyped_storage().data_ptr() == memory for a in args)


def difference(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """|a - b| in float64; 0 where both are NaN or the same infinity, infinite where only one is."""
    a, b = _real(a), _real(b)
    gap = (a - b).abs_()
    if math.isfinite(float(gap.sum())):
        return gap
    same = (a == b) | (a.isnan() & b.isnan())
    out = torch.where(same, torch.zeros_like(a), (a - b).abs())
    return torch.where(out.isnan(), torch.full_like(out, torch.inf), out)


def _real(t: torch.Tensor) -> torch.Tensor:
    t = t.detach()
    return torch.view_as_real(t).double() if t.is_complex() else t.double()


def slices(t: torch.Tensor) -> list[torch.Tensor]:
    """Largest value of every slice of what is nowhere negative: for every dim, a vector over its indices."""
    if t.dim() <= 1:
        return [t.reshape(-1)]
    half = t.dim() // 2  # two passes over all values, however many dims there are
    return [*slices(t.amax(list(range(half, t.dim())))), *slices(t.amax(list(range(half))))]


def sizes(t: torch.Tensor) -> list[torch.Tensor]:
    """Largest finite absolute value of every slice."""
    t = _real(t).abs()
    found = slices(t)
    if bool(found[0].isfinite().all()):  # every entry is in a slice of the first dim
        return found
    return slices(torch.where(t.isfinite(), t, torch.zeros_like(t)))


def slice_error(
    old: torch.Tensor,
    new: torch.Tensor,
    limit: Tolerance,
    moved: Sequence[torch.Tensor] = (),
    plain: torch.Tensor | None = None,
    gap: torch.Tensor | None = None,
) -> float:
    """The largest relative error of a slice; what rounding explains counts as none.

    Args:
        old, new: of one shape.
        moved: ``plain`` as it comes out where every value was moved by a few units in the last place; up to
            ``limit.amplified`` times what that moves a slice by is rounding.
        plain: the result that ``moved`` is of; ``old`` where None.
        gap: the difference of the two, where it is known.
    """
    if old.numel() == 0:
        return 0.0
    gap = difference(old, new) if gap is None else gap
    if not bool(gap.any()):
        return 0.0
    jitters = [difference(old if plain is None else plain, m) for m in moved]
    jitters = [torch.where(j.isfinite(), j, torch.zeros_like(j)) for j in jitters]
    if not old.is_floating_point() and not old.is_complex():
        return 0.0 if any(bool(j.any()) for j in jitters) else 1.0
    errors = slices(gap)
    explained = [torch.zeros_like(e) for e in errors]
    for jitter in jitters:
        explained = [torch.maximum(e, limit.amplified * j) for e, j in zip(explained, slices(jitter), strict=True)]
    worst = 0.0
    for error, scale, rounding in zip(errors, sizes(old), explained, strict=True):
        ratio = torch.where(error <= rounding, torch.zeros_like(error), error / scale)
        worst = max(worst, float(ratio.max()))
    return worst


def amplification(plain: torch.Tensor, moved: Sequence[torch.Tensor], limit: Tolerance) -> float:
    """How many units in the last place of its largest value a result moves by, for one unit in every computed value."""
    if not plain.is_floating_point() or plain.numel() == 0 or not moved:
        return 0.0
    size = float(_real(plain).nan_to_num(0, 0, 0).abs().max())
    jitter = max(float(difference(plain, m).nan_to_num(0, 0, 0).max()) for m in moved)
    return jitter / size / (limit.steps * torch.finfo(plain.dtype).eps) if size else 0.0


R = TypeVar("R")


class Rerun(Generic[R]):
    """Looks into errors that are suspicious: the small model runs again with its values moved, once for all of them.

    Args:
        again: runs it; what it gives is called results.
        steps: units in the last place by which values are moved.

    Attributes:
        amplification: the largest that was seen; None where nothing was looked into.
    """

    def __init__(self, again: Callable[[Moved], R], steps: int) -> None:
        self._again, self._steps = again, steps
        self.amplification: float | None = None

    def explain(
        self,
        error: float,
        old: torch.Tensor,
        new: torch.Tensor,
        limit: Tolerance,
        pick: Callable[[R], torch.Tensor | None],
    ) -> float:
        """An error without the rounding that the model amplifies.

        Args:
            error: that of the two with it.
            pick: what ``old`` is of the results; None where they lack it.
        """
        plain, *moved = self._results
        base, others = pick(plain), [pick(m) for m in moved]
        found = [o for o in others if o is not None]
        if base is None or not found:
            return error
        self.amplification = max(self.amplification or 0.0, amplification(base, found, limit))
        return slice_error(old, new, limit, found, base)

    @functools.cached_property
    def _results(self) -> list[R]:
        """As they are, and moved several times."""
        return [self._again(Moved(0, 0)), *(self._again(Moved(k + 1, self._steps)) for k in range(RUNS))]
