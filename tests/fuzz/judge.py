"""The fuzzer's own judge: a grown module against the small one, call by call, column by column.

It shares no code with ``fxgrow.verify``. A small and a grown module are called with the same sequence of inputs (other
values, sizes and scales than the example's, in eval and in train mode, so that state that a call leaves behind is part
of what is compared). How far an output may be off follows from the model: its weights and inputs are moved by a
trillionth, and a column that moves much is held to as much (an ill-conditioned sum, a value at a jump).
"""

from __future__ import annotations

import copy
import functools
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from fxgrow.errors import FxgrowError
from tests.fuzz.text import SIZES, Model

#: relative size of the moves that measure how well a column is determined, and how often
NUDGE, NUDGES = 1e-12, 3
#: largest error relative to a column, in float64; relative to a whole tensor, below which all is rounding; and where
#: that tensor is zero since terms of about 1 cancel
COLUMN, FLOOR, ZERO = 1e-9, 3e-14, 1e-13


@dataclass(frozen=True)
class Probe:
    """One call: which of the model's calls, sizes, a seed of the values, their scale, the mode."""

    call: str
    sizes: int
    seed: int
    scale: float = 1.0
    training: bool = False

    def __str__(self) -> str:
        mode = "train" if self.training else "eval"
        return f"{self.call} with sizes {SIZES[self.sizes]}, values {self.seed} x {self.scale:g}, {mode} mode"


@dataclass
class Result:
    """What a call gave: its leaves, or what it raised."""

    leaves: list[Any] = field(default_factory=list)
    error: Exception | None = None
    gradients: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Verdict:
    """What the judge says: ``wrong`` in words or empty; how many calls agreed, and how many the module refused."""

    wrong: str = ""
    probe: Probe | None = None
    agreed: int = 0
    refused: int = 0


def probes(model: Model) -> list[Probe]:
    """The sequence of calls that a pair is judged by."""
    found: list[Probe] = []
    ways = list(model.ways())
    for n, call in enumerate(ways):
        found += [
            Probe(call, 0, 10 + n),
            Probe(call, 1, 20 + n, -8.0),
            Probe(call, 2, 30 + n, 0.0625),
            Probe(call, 0, 40 + n, training=True),
            Probe(call, 3, 50 + n, 3.0, training=True),
            Probe(call, 0, 60 + n),
        ]
    return found


class Judge:
    """Judges growths of one small module. ``build`` makes it anew; it is never changed."""

    def __init__(self, model: Model, small: nn.Module, sequence: Sequence[Probe] | None = None) -> None:
        self.model, self.small = model, small
        self.sequence = list(sequence or probes(model))
        self.epsilon = _coarsest(model)
        self.expected = self._play(copied(small), gradients=True)
        self.moves = self._moves()

    def usable(self) -> str:
        """Why nothing can be judged by this model; empty where something can."""
        first = self.expected[0]
        if first.error is not None:
            return f"eager raises {type(first.error).__name__}"
        tensors = [x for x in first.leaves if isinstance(x, Tensor)]
        if not tensors:
            return "returns no tensor"
        again = self._play(copied(self.small))
        for a, b, moves in zip(self.expected, again, self.moves, strict=True):
            if (a.error is None) != (b.error is None) or (a.error is None and compare(a.leaves, b.leaves, moves, 0.0)):
                return "not deterministic"
        if all(bool(x.isnan().all()) for x in tensors if x.is_floating_point() and x.numel()) and any(
            x.is_floating_point() for x in tensors
        ):
            return "NaN"
        return ""

    def judge(self, grown: nn.Module, extended: bool = False, eval_only: bool = False) -> Verdict:
        """Compare; ``extended``: outputs may have further entries after the old ones; ``eval_only``: no train mode."""
        verdict = Verdict()
        small, grown = copied(self.small), copied(grown)
        track = False  # whether the small one has to be run anew, since a refused call left the states apart
        for number, probe in enumerate(self.sequence):
            if eval_only and probe.training:
                track = track or _stateful(small)  # what the call would have left behind is missing on both sides
                continue
            before, large = _state(small), _state(grown)
            mine = self.expected[number]
            if track:
                mine = self._call(small, probe, gradients=False)
            elif _stateful(small):
                self._call(small, probe, gradients=False)
            theirs = self._call(grown, probe, gradients=not track)
            if mine.error is not None:  # nothing is said of what the grown one may do, nor of what either left behind
                _restore(small, before)
                _restore(grown, large)
                track = _stateful(small)
                continue
            if theirs.error is not None:
                if _refusal(theirs.error):
                    verdict.refused += 1
                    _restore(small, before)
                    track = _stateful(small)
                    continue
                error = theirs.error
                first = str(error).partition("\n")[0]
                verdict.wrong = f"the grown module raises {type(error).__name__}: {first}"
                verdict.probe = probe
                return verdict
            if track and self.expected[number].error is not None:
                continue  # the state is another one than where the small one raised: how far it moves is not known
            problem = compare(mine.leaves, theirs.leaves, self.moves[number], self.epsilon, extended)
            if not problem and not extended:
                problem = self._gradients(mine, theirs, number)
            if problem:
                verdict.wrong, verdict.probe = problem, probe
                return verdict
            verdict.agreed += 1
        return verdict

    # runs ---------------------------------------------------------------------------------------------------------

    def _play(self, module: nn.Module, gradients: bool = False, nudge: int = 0) -> list[Result]:
        return [self._call(module, p, gradients, nudge) for p in self.sequence]

    def _call(self, module: nn.Module, probe: Probe, gradients: bool, nudge: int = 0) -> Result:
        names = self.model.ways()[probe.call]
        values = self.model.draw(SIZES[probe.sizes], probe.seed, probe.scale)
        if nudge:
            generator = torch.Generator().manual_seed(1000 + nudge)
            values = {n: _nudged(x, self.epsilon, generator) for n, x in values.items()}
        given = [values[n] for n in names]
        floats = [x for x in given if x.is_floating_point()] if gradients else []
        for x in floats:
            x.requires_grad_(True)
        module.train(probe.training)
        torch.manual_seed(probe.seed)
        with warnings.catch_warnings(), torch.set_grad_enabled(gradients):
            warnings.simplefilter("ignore")
            try:
                out = module(*given)
            except Exception as error:
                if gradients and "leaf" in str(error):
                    return self._call(module, probe, False, nudge)
                return Result(error=error)
            found = Result([x.detach().clone() if isinstance(x, Tensor) else x for x in pytree.tree_leaves(out)])
            if floats:
                found.gradients = _backward(out, floats, [n for n in names if values[n].is_floating_point()])
        return found

    def _moves(self) -> list[list[Tensor | None]]:
        """How far each output of each call moves at most, entry by entry, when all numbers are nudged."""
        out: list[list[Tensor | None]] = [
            [torch.zeros(x.shape, dtype=torch.float64) if isinstance(x, Tensor) else None for x in r.leaves]
            for r in self.expected
        ]
        for n in range(1, NUDGES + 1):
            module = self._moved_by_rounding(n)
            for a, b, moves in zip(self.expected, self._play(module, nudge=n), out, strict=True):
                for k, (x, y) in enumerate(zip(a.leaves, b.leaves, strict=False)):
                    m = moves[k]
                    if isinstance(x, Tensor) and isinstance(y, Tensor) and m is not None:
                        if x.shape != y.shape:
                            moves[k] = torch.full(x.shape, math.inf, dtype=torch.float64)
                        else:
                            moves[k] = torch.maximum(m, _distance(x, y))
        return out

    def _moved_by_rounding(self, seed: int) -> nn.Module:
        module = copied(self.small)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for t in [*module.parameters(), *module.buffers()]:
                t.copy_(_nudged(t, self.epsilon, generator))
        return module

    @functools.cached_property
    def _swings(self) -> list[dict[str, float]]:
        """How far the gradient of each input moves at most in each call, when all numbers are nudged.

        Far, where the largest of several numbers is taken that are equal but for rounding: one of them gets it all.
        """
        found: list[dict[str, float]] = [{} for _ in self.expected]
        for n in range(1, NUDGES + 1):
            played = self._play(self._moved_by_rounding(n), gradients=True, nudge=n)
            for a, b, swings in zip(self.expected, played, found, strict=True):
                for name, mine in a.gradients.items():
                    theirs = b.gradients.get(name, mine)
                    moved = float((mine - theirs).abs().max()) if mine.numel() else 0.0
                    swings[name] = max(swings.get(name, 0.0), moved)
        return found

    def _gradients(self, a: Result, b: Result, number: int) -> str:
        """Gradients of the inputs: the two are the same function."""
        for name, mine in a.gradients.items():
            theirs = b.gradients.get(name)
            if theirs is None or not mine.isfinite().all():
                continue
            scale = float(mine.abs().max()) if mine.numel() else 0.0
            moved = any(m is not None and bool((m > 1e-6 * (1 + m.abs())).any()) for m in self.moves[number])
            limit = max(1e-7 * scale, 3e-13 * (1 + scale), 60 * self.epsilon * scale)
            error = float((mine - theirs).abs().max()) if mine.numel() else 0.0
            if not moved and not error <= limit and self._swings[number].get(name, 0.0) <= limit:
                return f"the gradient of {name} is off by {error:.1e} of {scale:.1e}"
        return ""


def copied(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module)


def _backward(out: Any, inputs: list[Tensor], names: list[str]) -> dict[str, Tensor]:
    """Gradients of a fixed mix of all outputs."""
    generator = torch.Generator().manual_seed(5)
    total: Any = 0
    for x in pytree.tree_leaves(out):
        if isinstance(x, Tensor) and x.is_floating_point() and x.requires_grad:
            total = total + (x.double() * torch.randn(x.shape, generator=generator, dtype=torch.float64)).sum()
    if not isinstance(total, Tensor):
        return {}
    try:
        found = torch.autograd.grad(total, inputs, allow_unused=True)
    except Exception:
        return {}
    return {n: g.detach().double() for n, g in zip(names, found, strict=True) if g is not None}


def _coarsest(model: Model) -> float:
    """The rounding of the coarsest dtype that the text mentions; 0 where all is float64 or a constant."""
    text = model.definition()
    worst = 0.0 if model.dtype is torch.float64 else torch.finfo(model.dtype).eps
    for words, dtype in (
        (("bfloat16",), torch.bfloat16),
        (("float16", "half()"), torch.float16),
        (("float32", ".float()", "torch.zeros(", "torch.ones(", "torch.full(", "arange", "linspace"), torch.float32),
    ):
        for word in words:
            if word in text.replace("bfloat16", "") or (word == "bfloat16" and word in text):
                worst = max(worst, torch.finfo(dtype).eps)
    return worst


def _nudged(t: Tensor, epsilon: float, generator: torch.Generator) -> Tensor:
    if not (t.is_floating_point() or t.is_complex()):
        return t.detach()
    size = max(NUDGE, epsilon / 2) if torch.finfo(t.dtype).eps <= epsilon or not epsilon else NUDGE
    noise = torch.randn(t.shape, generator=generator, dtype=torch.float64)
    return (t.detach().double() * (1 + size * noise)).to(t.dtype) if not t.is_complex() else t.detach()


def _distance(x: Tensor, y: Tensor) -> Tensor:
    """|x - y|, infinite where one of them is no number and the other is."""
    if x.is_complex():
        x, y = torch.view_as_real(x).norm(dim=-1), torch.view_as_real(y).norm(dim=-1)
    a, b = x.double(), y.double()
    d = (a - b).abs()
    same = (a == b) | (a.isnan() & b.isnan())
    return torch.where(same, torch.zeros_like(d), d.nan_to_num(math.inf, math.inf))


def compare(
    a: Sequence[Any], b: Sequence[Any], moves: Sequence[Tensor | None], epsilon: float, extended: bool = False
) -> str:
    """What of the outputs ``b`` is not as in ``a``, in words; empty where nothing is.

    Each column (the entries that share a place in the last dim) is measured by its own largest entry; ``moves`` say how
    far each entry may be off for reasons of its own.
    """
    if len(a) != len(b):
        return f"{len(b)} outputs instead of {len(a)}"
    for number, (x, y, moved) in enumerate(zip(a, b, moves, strict=True)):
        where = f"output {number}"
        if not isinstance(x, Tensor):
            if type(x) is not type(y) or x != y:
                return f"{where} is {y!r} instead of {x!r}"
            continue
        if not isinstance(y, Tensor):
            return f"{where} is {type(y).__name__} instead of a tensor"
        if x.dtype is not y.dtype:
            return f"{where} is {y.dtype} instead of {x.dtype}"
        if x.shape != y.shape and moved is not None and bool(moved.isinf().any()):
            continue
        if x.shape != y.shape:
            larger = x.dim() == y.dim() and all(m <= n for m, n in zip(x.shape, y.shape, strict=True))
            if not (extended and larger):
                return f"{where} has the shape {tuple(y.shape)} instead of {tuple(x.shape)}"
            y = y[tuple(slice(0, m) for m in x.shape)]
        if not x.numel():
            continue
        problem = _columns(x, y, moved, epsilon)
        if problem:
            return f"{where}: {problem}"
    return ""


def _columns(x: Tensor, y: Tensor, moved: Tensor | None, epsilon: float) -> str:
    error = _distance(x, y)
    if x.is_complex():
        x = x.abs()
    size = x.double().abs().nan_to_num(0.0, 0.0, 0.0)
    if moved is None:
        moved = torch.zeros_like(error)
    if not x.is_floating_point():  # numbers of places and flags: equal, but where a nudge moves them too
        columns = _by_column(moved)
        bad = (error > 0) & (columns == 0).expand_as(error)
        return f"{int(bad.sum())} of {x.numel()} integers differ" if bool(bad.any()) else ""
    scale = _by_column(size)
    floor = float(size.detach().max()) * FLOOR + ZERO
    limit = COLUMN * scale + (6 if epsilon else 100) * _by_column(moved) + floor
    limit = limit + epsilon * (8 * scale + float(size.detach().max()))
    bad = ~(error <= limit)
    if not bool(bad.any()):
        return ""
    worst = float((error / (scale + 1e-300)).max())
    odd = int((x.isnan() ^ y.isnan()).sum())
    words = f"{odd} entries are NaN in one of the two" if odd else f"off by {worst:.2g} of its column"
    return f"{words} ({int(bad.sum())} of {x.numel()} entries)"


def _by_column(t: Tensor) -> Tensor:
    """Largest entry of each place in the last dim, broadcast back over the others."""
    if t.dim() < 2:
        return t.amax().expand_as(t) if t.dim() == 1 and t.numel() else t
    return t.amax(tuple(range(t.dim() - 1)), keepdim=True).expand_as(t)


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {n: b.detach().clone() for n, b in module.named_buffers()}


def _restore(module: nn.Module, state: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for n, b in module.named_buffers():
            b.copy_(state[n])


def _stateful(module: nn.Module) -> bool:
    return any(True for _ in module.buffers())


def _refusal(error: Exception) -> bool:
    """Whether a module says by name which input or argument it was not made for."""
    if isinstance(error, FxgrowError):
        return True
    words = ("this graph takes", "was captured", "Capture it with", "captured:", "holds for", "was traced with")
    return isinstance(error, ValueError | TypeError) and any(w in str(error) for w in words)
