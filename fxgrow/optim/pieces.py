"""Steps at several rates: an optimizer that works entry by entry steps its parameters in pieces.

A piece is a range of a parameter's rows, with the same range of its gradient and its state. One that is newborn steps
at a learning rate of its own, in the same call. Where only some of its entries are newborn, these are kept aside, and
brought back part of the way afterwards; where policy ``exact`` steps in the small model's units, the piece is brought
there and back. Both happen a chunk at a time, so that no more memory is needed than for a chunk.

A processor's loops round the last few entries of a tensor otherwise than the ones before: one at a time, in place of a
vector at a time. Pieces therefore begin and end where vectors do, and while entries warm up the old ones take the steps
that they would take without rates, to the bit. With several threads torch itself divides tensors by their length, so
that the last bit of entries where two threads meet is open, and so it is where a row has more entries than a chunk.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fxgrow.ir.foreach import copy_each, lerp_each
from fxgrow.optim.fused import CACHED, Fused, fused_kernels
from fxgrow.optim.slices import Factors, Slice, SliceRates
from fxgrow.weights.moments import steps_like

#: optimizers of torch that work entry by entry, and whose step is proportional to their group's present learning rate
LINEAR: set[type[torch.optim.Optimizer]] = {
    torch.optim.Adadelta,
    torch.optim.Adagrad,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.Adamax,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.SGD,
}
#: entries that are stepped together where something is kept aside
CHUNK = 1 << 23
#: entries after which every processor's vector loops are where they began: two vectors of 32 numbers of 16 bits
VECTOR = 64
#: more pieces than this and a parameter is stepped as a whole
MOST = 64

Active = Sequence[tuple[SliceRates, Slice]]


def step_groups(optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]], state: Any) -> None:
    """The class's own step, without hooks, over these groups and this state in place of the optimizer's."""
    held = optimizer.param_groups, optimizer.state
    optimizer.param_groups, optimizer.state = groups, state
    try:
        inspect.unwrap(type(optimizer).step)(optimizer)
    finally:
        optimizer.param_groups, optimizer.state = held


@dataclass
class _Piece:
    """Rows ``start`` to ``stop`` of a parameter; None: all of it, as it is.

    ``rate`` is that of newborn rows; ``mixed`` are views of the newborn entries among others.
    """

    tensor: Tensor
    state: dict[str, Any] | None = None
    start: int = 0
    stop: int | None = None
    rate: SliceRates | None = None
    mixed: list[Tensor] = field(default_factory=list)
    aside: list[Tensor] | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """The same rows of a gradient or of a factor."""
        if self.stop is None or tensor.shape[0] == 1:
            return tensor
        return tensor.narrow(0, self.start, self.stop - self.start)


@dataclass
class _Cut:
    """The pieces of one parameter, as long as it and its state stay where they are."""

    address: int
    held: list[Any]
    rates: SliceRates
    pieces: list[_Piece]
    units: bool
    chunk: int
    counts: list[tuple[Tensor, Tensor]]  # step counts of pieces, and the parameter's own

    def is_of(self, p: Tensor, state: Mapping[str, Any], rates: SliceRates, chunk: int) -> bool:
        return (
            self.address == p.data_ptr()
            and self.rates is rates
            and self.chunk == chunk
            and len(self.held) == len(state)
            and all(a is b for a, b in zip(self.held, state.values(), strict=True))
        )


class Stepper:
    """Steps one optimizer in pieces.

    Args:
        factors: of a parameter: of its ``"gradient"`` or ``"value"``, to a power.
        undone: whether multiplying by a parameter's factors undoes a division by them to the bit.
    """

    def __init__(
        self,
        factors: Callable[[nn.Parameter, str, float], Factors],
        undone: Callable[[Active], bool],
    ) -> None:
        self.factors, self.undone = factors, undone
        self.cuts: dict[Tensor, _Cut] = {}
        self.kernels: dict[Tensor, Fused] = {}
        self.buffers: dict[tuple[Any, ...], Tensor] = {}

    def takes(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether it can be stepped so, by its groups' present numbers."""
        if not steps_like(optimizer, LINEAR) or any(g.get("differentiable") for g in optimizer.param_groups):
            return False
        self.kernels = fused_kernels(optimizer)
        return True

    def pieces(self, optimizer: torch.optim.Optimizer, p: nn.Parameter, active: Active) -> _Cut | None:
        """The pieces of a parameter with a gradient; None: it has to be stepped as a whole."""
        grad = p.grad
        if len(active) != 1 or type(p) is not nn.Parameter or type(grad) is not Tensor:
            return None
        (rates, s) = active[0]
        warms = s.warms and rates.steps < rates.warmup
        if s.whole:
            return _Cut(0, [], rates, [_Piece(p, rate=rates)], False, CHUNK, []) if warms and not s.scaled else None
        state = optimizer.state.get(p)
        if not state or p.dim() == 0 or not p.is_contiguous() or p.is_complex() or (warms and s.scaled):
            return None
        if grad.layout != torch.strided or not grad.is_contiguous():
            return None
        chunk = CHUNK
        if not s.scaled and p in self.kernels and self.kernels[p].takes(p, state):
            chunk = min(CHUNK, CACHED * torch.get_num_threads())
        else:
            self.kernels.pop(p, None)
        found = self.cuts.get(p)
        if found is None or not found.is_of(p, state, rates, chunk):
            made = _cut(p, state, rates, s, chunk)
            if made is None:
                self.cuts.pop(p, None)
                return None
            found = self.cuts[p] = made
        return found

    def step(
        self,
        optimizer: torch.optim.Optimizer,
        cuts: Mapping[nn.Parameter, _Cut],
        active: Mapping[nn.Parameter, Active],
    ) -> None:
        """One step of all parameters that have a gradient."""
        apart = [(p, cut) for p, cut in cuts.items() if cut.held and p in self.kernels]
        alone = {p for p, _ in apart}
        counts = [pair for p, cut in cuts.items() if p not in alone for pair in cut.counts]
        if counts:
            copy_each([mine for mine, _ in counts], [own for _, own in counts])
        batch = _Batch(self, optimizer)
        for number, group in enumerate(optimizer.param_groups):
            for p in group["params"]:
                if p.grad is None or p in alone:
                    continue
                cut = cuts.get(p)
                if cut is None:
                    batch.add(number, _Piece(p), p.grad)
                    continue
                for piece in cut.pieces:
                    if cut.units or piece.mixed:
                        size = piece.tensor.numel()
                        if batch.work and batch.work + size > CHUNK:
                            batch.run()
                            batch = _Batch(self, optimizer)
                        batch.work += size
                    batch.add(number, piece, piece.of(p.grad))
                    if cut.units:
                        batch.bring(piece, p, self.undone(active[p]))
                    elif piece.mixed:
                        batch.keep(piece, cut.rates)
        batch.run()
        for p, cut in apart:
            self.step_alone(p, cut, optimizer.state[p])

    def step_alone(self, p: nn.Parameter, cut: _Cut, state: Mapping[str, Any]) -> None:
        """Step the pieces of a parameter one after the other."""
        kernel, grad = self.kernels[p], p.grad
        assert grad is not None
        count = kernel.counted(state)
        for piece in cut.pieces:
            assert piece.state is not None
            aside = self.aside(piece)
            rate = 1.0 if piece.rate is None else piece.rate.newborn_rate
            if aside:
                copy_each(aside, piece.mixed)
            try:
                kernel(piece.tensor, piece.of(grad), piece.state, count, rate)
            finally:
                if aside:
                    lerp_each(piece.mixed, aside, 1.0 - cut.rates.newborn_rate)
        kernel.uncounted(state)

    def aside(self, piece: _Piece) -> list[Tensor]:
        """Memory for a piece's newborn entries; pieces that step one after the other share it."""
        if not piece.mixed:
            return []
        held = self.buffers.get(("newborn", piece.tensor.dtype, piece.tensor.device))
        if piece.aside is None or held is None or piece.aside[0].data_ptr() != held.data_ptr():
            used: dict[tuple[Any, ...], int] = {}
            needed = sum(m.numel() for m in piece.mixed)
            self.scratch("newborn", used, piece.tensor.view(-1)[:needed])
            used.clear()
            piece.aside = [self.scratch("newborn", used, m) for m in piece.mixed]
        return piece.aside

    def scratch(self, kind: str, used: dict[tuple[Any, ...], int], like: Tensor) -> Tensor:
        """Memory of a tensor's shape, out of what is kept from step to step."""
        key = (kind, like.dtype, like.device)
        start = used.get(key, 0)
        used[key] = start + like.numel()
        held = self.buffers.get(key)
        if held is None or held.numel() < used[key]:
            size = max(CHUNK, used[key]) if used[key] > CHUNK // 8 else used[key]
            held = self.buffers[key] = torch.empty(size, dtype=like.dtype, device=like.device)
            start = 0  # what was handed out before keeps the old memory alive
            used[key] = like.numel()
        return held[start : start + like.numel()].view(like.shape)


class _Batch:
    """Pieces that step together."""

    def __init__(self, stepper: Stepper, optimizer: torch.optim.Optimizer) -> None:
        self.stepper, self.optimizer = stepper, optimizer
        self.work = 0
        self.used: dict[tuple[Any, ...], int] = {}
        self.members: dict[tuple[int, int], tuple[SliceRates | None, list[Tensor]]] = {}
        self.state: defaultdict[Tensor, Any] = defaultdict(dict)
        self.views: list[Tensor] = []  # that hold on to a gradient
        self.kept: dict[int, tuple[SliceRates, list[Tensor], list[Tensor]]] = {}
        self.after: list[Callable[[], object]] = []

    def add(self, number: int, piece: _Piece, grad: Tensor) -> None:
        tensor = piece.tensor
        if piece.stop is None:
            self.state[tensor] = self.optimizer.state[tensor]
        else:
            tensor.grad = grad
            self.views.append(tensor)
            self.state[tensor] = piece.state
        self.members.setdefault((number, id(piece.rate)), (piece.rate, []))[1].append(tensor)

    def keep(self, piece: _Piece, rates: SliceRates) -> None:
        """Keep newborn entries aside."""
        _, mixed, aside = self.kept.setdefault(id(rates), (rates, [], []))
        for m in piece.mixed:
            mixed.append(m)
            aside.append(self.stepper.scratch("newborn", self.used, m))

    def bring(self, piece: _Piece, p: nn.Parameter, undone: bool) -> None:
        """Into the small model's units."""
        tensor, grad = piece.tensor, piece.tensor.grad
        assert grad is not None
        of_gradient = [_of(piece, f) for f in self.stepper.factors(p, "gradient", -1.0)]
        to = [_of(piece, f) for f in self.stepper.factors(p, "value", -1.0)]
        back = [_of(piece, f) for f in self.stepper.factors(p, "value", 1.0)]
        stepped = tensor
        if to and undone:
            for f in to:
                tensor.mul_(f)
            self.after.append(lambda: _multiply(tensor, back))
        elif to:
            before = self.stepper.scratch("before", self.used, tensor).copy_(tensor)
            _multiply(before, to)
            stepped = self.stepper.scratch("stepped", self.used, tensor).copy_(before)
            self.state[stepped] = self.state.pop(tensor)
            members = next(m for _, m in self.members.values() if m and m[-1] is tensor)
            members[-1] = stepped
            self.views.append(stepped)

            def leave() -> None:
                tensor.add_(_multiply(stepped.sub_(before), back))  # nothing, where nothing moved

            self.after.append(leave)
        if of_gradient:
            scaled = self.stepper.scratch("gradient", self.used, grad)
            torch.mul(grad, of_gradient[0], out=scaled)
            stepped.grad = _multiply(scaled, of_gradient[1:])
            if getattr(self.optimizer, "grad_scale", None) is not None:  # the step unscales gradients in place
                there = [_of(piece, f) for f in self.stepper.factors(p, "gradient", 1.0)]
                self.after.append(lambda: _multiply(grad.copy_(scaled), there))
        else:
            stepped.grad = grad

    def run(self) -> None:
        optimizer = self.optimizer
        groups = []
        for (number, _), (rates, tensors) in self.members.items():
            group = {**optimizer.param_groups[number], "params": tensors}
            if rates is not None:
                group["lr"] = group["lr"] * rates.newborn_rate
            if group.get("capturable") and tensors[0].device.type == "cpu":
                group["capturable"] = False  # asked for where the whole step is compiled, which this one is not
            groups.append(group)
        for _, mixed, aside in self.kept.values():
            copy_each(aside, mixed)
        try:
            step_groups(optimizer, groups, self.state)
        finally:
            for tensor in self.views:
                tensor.grad = None
            for rates, mixed, aside in self.kept.values():
                lerp_each(mixed, aside, 1.0 - rates.newborn_rate)
            for leave in self.after:
                leave()


def _multiply(tensor: Tensor, factors: Factors) -> Tensor:
    for f in factors:
        tensor.mul_(f)
    return tensor


def _of(piece: _Piece, factor: Tensor | float) -> Tensor | float:
    return piece.of(factor) if isinstance(factor, Tensor) else factor


def _cut(p: nn.Parameter, state: Mapping[str, Any], rates: SliceRates, s: Slice, chunk: int) -> _Cut | None:
    tensors = [v for v in state.values() if isinstance(v, Tensor)]
    if any(v is None for v in state.values()):
        return None  # it will be made in this step
    if not all(
        type(v) is Tensor and (v.dim() == 0 or (v.shape == p.shape and v.is_contiguous() and v.layout == torch.strided))
        for v in tensors
    ):
        return None
    found = _Cut(p.data_ptr(), list(state.values()), rates, [], s.scaled, chunk, [])
    data = p.detach()
    row = max(1, data[0].numel()) if len(data) else 1
    newborn = s.newborn if s.warms else []
    rows = newborn[0] if newborn else None
    together = VECTOR // math.gcd(VECTOR, row)  # rows that end where a vector does
    for start, stop, new in _runs(_aligned(rows, together), p.shape[0]):
        among = rows is not None and bool(rows[start:stop].any())
        mixed = not new and (among or any(v is not None for v in newborn[1:]))
        size = stop - start
        if mixed or s.scaled:
            size = max(1, chunk // row)
            size -= size % together if size > together else 0
        for a in range(start, stop, size):
            b = min(stop, a + size)
            view = data.narrow(0, a, b - a)
            mine: dict[str, Any] = {}
            for key, v in state.items():
                if isinstance(v, Tensor) and v.dim():
                    mine[key] = v.narrow(0, a, b - a)
                elif isinstance(v, Tensor) and found.pieces:
                    mine[key] = v.clone()
                    found.counts.append((mine[key], v))
                else:
                    mine[key] = v
            inside = [None if rows is None else rows[a:b], *newborn[1:]]
            blocks = list(newborn_blocks(view, inside, 0)) if mixed else []
            found.pieces.append(_Piece(view, mine, a, b, rates if new else None, blocks))
            if len(blocks) > MOST:
                return None
    return found if len(found.pieces) <= MOST + p.numel() // chunk else None


def _aligned(newborn: np.ndarray | None, together: int) -> np.ndarray | None:
    """Rows that step as newborn ones: groups of so many rows, counted from the first, that hold no old row."""
    if newborn is None:
        return None
    groups = np.arange(len(newborn)) // together
    old = np.bincount(groups, ~newborn)
    return np.asarray(old[groups] == 0)


def _runs(mask: np.ndarray | None, size: int) -> Iterator[tuple[int, int, bool]]:
    """Ranges of equal values: start, stop, value."""
    if mask is None:
        yield 0, size, False
        return
    edges = [0, *(np.flatnonzero(mask[1:] != mask[:-1]) + 1).tolist(), size]
    for a, b in itertools.pairwise(edges):
        if b > a:
            yield a, b, bool(mask[a])


def newborn_blocks(view: Tensor, newborn: Sequence[np.ndarray | None], dim: int) -> Iterator[Tensor]:
    """Views of the entries that are newborn along a dim from ``dim`` on; none twice."""
    while dim < len(newborn) and newborn[dim] is None:
        dim += 1
    if dim >= len(newborn):
        return
    mask, after = newborn[dim], list(newborn[dim + 1 :])
    assert mask is not None
    period = _period(mask)
    inside = dim
    if period < len(mask):  # the same in every head, say: one view for all of them
        view, mask, inside = view.unflatten(dim, (-1, period)), mask[:period], dim + 1
    for a, b, new in _runs(mask, len(mask)):
        part = view.narrow(inside, a, b - a)
        if new:
            yield part
        else:
            yield from newborn_blocks(part, [None] * (inside + 1) + after, inside + 1)


def _period(mask: np.ndarray) -> int:
    """Entries after which a mask repeats itself to its end; its length where it does not."""
    edges = np.flatnonzero(mask[1:] != mask[:-1]) + 1
    for period in edges[1:MOST:2].tolist():  # after a run of each value
        if len(mask) % period == 0 and bool((mask.reshape(-1, period) == mask[:period]).all()):
            return int(period)
    return len(mask)
