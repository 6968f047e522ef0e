"""Which parts of old shards make a rank's part of a grown tensor, and how they get there.

A rank's part is cut into pieces, each made of one rectangle of the old tensor; what of that it does not hold itself,
those who do send it, point to point. Everybody works out everybody's pieces from the same plan, so that nothing is
asked for, and the bytes are known beforehand.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from fxgrow.ir.dtensors import Layout, Rectangle

#: bytes of the old tensor that a rank fetches at a time
MOST = 32 << 20
#: more runs than this along one dim, and the dim is fetched in one
RUNS = 256

Index = np.ndarray | None


class Piece(NamedTuple):
    """A rectangle of a grown tensor, and the one of the old tensor that it is made of."""

    target: Rectangle
    source: Rectangle


class _Run(NamedTuple):
    """Neighbouring entries of a grown dim, and the entries of the old one that they are made of."""

    start: int
    stop: int
    first: int
    last: int  # one after it


def pieces(
    indices: Sequence[Index],
    shape: Sequence[int],
    target: Rectangle,
    *,
    split: set[int],
    whole: set[int],
    itemsize: int,
) -> list[Piece]:
    """Cut a rectangle of a grown tensor, so that each piece is made of neighbouring entries of the old one.

    Args:
        indices: per dim, the old entry of each new one, negative for newborn ones; None: the dim does not grow.
        shape: of the old tensor.
        target: a rectangle of the grown one.
        split: dims of the old tensor that are sharded. The others are fetched in one.
        whole: dims of which every piece needs all old entries.
        itemsize: bytes of an entry.
    """
    if not target.numel:
        return []
    spans = [_Run(a, a + n, *_needed(i, a, a + n, d in whole, shape[d])) for d, a, n, i in _dims(target, indices)]
    other = itemsize
    runs: list[list[_Run]] = []
    for d, span in enumerate(spans):
        if d not in split:
            other *= max(1, span.last - span.first)
    for d, span in enumerate(spans):
        if d in split and d not in whole:
            runs.append(_runs(indices[d], span.start, span.stop, max(1, MOST // other)))
        else:
            runs.append([span])
    return [
        Piece(
            Rectangle(tuple(r.start for r in each), tuple(r.stop - r.start for r in each)),
            Rectangle(tuple(r.first for r in each), tuple(r.last - r.first for r in each)),
        )
        for each in itertools.product(*runs)
    ]


def _dims(target: Rectangle, indices: Sequence[Index]) -> Iterator[tuple[int, int, int, Index]]:
    yield from ((d, *each) for d, each in enumerate(zip(target.start, target.shape, indices, strict=True)))


def _needed(index: Index, start: int, stop: int, whole: bool, size: int) -> tuple[int, int]:
    """The old entries from the first to the last that some new ones are made of."""
    if whole:
        return 0, size
    if index is None:
        return start, stop
    old = index[start:stop]
    old = old[old >= 0]
    return (int(old.min()), int(old.max()) + 1) if len(old) else (0, 0)


def _runs(index: Index, start: int, stop: int, most: int) -> list[_Run]:
    """Cut new entries where the old ones that they are made of do not go on, or are more than so many."""
    if index is None:
        return [_Run(a, min(a + most, stop), a, min(a + most, stop)) for a in range(start, stop, most)]
    old = np.flatnonzero(index[start:stop] >= 0)
    values = index[start:stop][old]
    step = np.diff(values)
    cuts = [0, *(old[1:][(step < 0) | (step > 1)]).tolist(), stop - start]
    if len(cuts) > RUNS:
        return [_Run(start, stop, *_needed(index, start, stop, False, 0))]
    out: list[_Run] = []
    for a, b in itertools.pairwise(cuts):
        first, last = _needed(index, start + a, start + b, False, 0)
        if last - first <= most:
            out.append(_Run(start + a, start + b, first, last))
            continue
        inside = index[start + a : start + b]
        reached = np.maximum.accumulate(np.where(inside >= 0, inside, first))  # newborn entries go with those before
        parts = np.flatnonzero(np.diff((reached - first) // most)) + 1
        for lo, hi in itertools.pairwise([0, *parts.tolist(), b - a]):
            out.append(_Run(start + a + lo, start + a + hi, *_needed(index, start + a + lo, start + a + hi, False, 0)))
    return out


def needed(indices: Sequence[Index], shape: Sequence[int], target: Rectangle, whole: set[int]) -> Rectangle:
    """The rectangle of an old tensor that a rectangle of a grown one is made of; see :func:`pieces`."""
    spans = [_needed(i, a, a + n, d in whole, shape[d]) for d, a, n, i in _dims(target, indices)]
    return Rectangle(tuple(a for a, _ in spans), tuple(b - a for a, b in spans))


class Part(NamedTuple):
    """What one rank holds of a rectangle that another needs."""

    rank: int
    rectangle: Rectangle


def holders(held: Mapping[int, Rectangle], wanted: Rectangle, rank: int) -> list[Part]:
    """Who gives a rank which parts of a rectangle: itself, where it can, and its likes in the other copies' place.

    Args:
        held: by rank, the rectangle that it holds; copies are equal.
    """
    if not wanted.numel:
        return []
    copies: dict[Rectangle, list[int]] = {}
    for each, rectangle in held.items():
        copies.setdefault(rectangle, []).append(each)
    number = copies[held[rank]].index(rank)
    out = []
    for rectangle, ranks in copies.items():
        common = rectangle.meet(wanted)
        if common.numel:
            out.append(Part(rank if rank in ranks else ranks[number % len(ranks)], common))
    return out


@dataclass
class Traffic:
    """Bytes that growths send between ranks.

    Attributes:
        sent: by each rank, as worked out beforehand.
        largest: the bytes of the largest rectangle that is fetched at a time.
        measured: by this rank, as counted when they were sent.
    """

    sent: dict[int, int] = field(default_factory=dict)
    largest: int = 0
    measured: int = 0

    def count(self, held: Mapping[int, Rectangle], wanted: Mapping[int, Sequence[Piece]], itemsize: int) -> None:
        """Add what a tensor's pieces need."""
        for rank, each in wanted.items():
            for piece in each:
                parts = holders(held, piece.source, rank)
                if any(part.rank != rank for part in parts):
                    self.largest = max(self.largest, piece.source.numel * itemsize)
                for part in parts:
                    if part.rank != rank:
                        self.sent[part.rank] = self.sent.get(part.rank, 0) + part.rectangle.numel * itemsize

    @property
    def total(self) -> int:
        """Bytes that all ranks send."""
        return sum(self.sent.values())

    @property
    def words(self) -> str:
        """What is sent, for people."""
        if not self.total:
            return "ranks send each other no weights: every shard is made of what its rank holds"
        most = max(self.sent.values())
        return (
            f"ranks send each other {self.total:,} bytes of weights, one of them {most:,} at most, and hold up to "
            f"{self.largest:,} beside their shards meanwhile; each moment of an optimizer's needs as many again"
        )


def fetched(
    local: torch.Tensor,
    layout: Layout,
    held: Mapping[int, Rectangle],
    wanted: Mapping[int, Sequence[Piece]],
    traffic: Traffic | None = None,
) -> Iterator[tuple[Piece, torch.Tensor]]:
    """This rank's pieces, each with the rectangle of the old tensor that it is made of; a collective operation.

    Args:
        local: this rank's shard of the old tensor.
        layout: of the old tensor. held: its rectangles by rank.
        wanted: every rank's pieces.
        traffic: counts what this rank sends.
    """
    me = layout.me
    for number in range(max(map(len, wanted.values()), default=0)):
        operations: list[dist.P2POp] = []
        arriving: list[tuple[Rectangle, torch.Tensor]] = []
        own: list[Rectangle] = []
        for rank, each in wanted.items():
            for part in holders(held, each[number].source, rank) if number < len(each) else ():
                if part.rank == me and rank == me:
                    own.append(part.rectangle)
                elif part.rank == me:
                    sending = local[part.rectangle.within(held[me])].to(layout.device).contiguous()
                    operations.append(dist.P2POp(dist.isend, _as_bytes(sending), rank))
                    if traffic is not None:
                        traffic.measured += sending.nbytes
                elif rank == me:
                    there = torch.empty(part.rectangle.shape, dtype=local.dtype, device=_device(local, layout))
                    operations.append(dist.P2POp(dist.irecv, _as_bytes(there), part.rank))
                    arriving.append((part.rectangle, there))
        for request in dist.batch_isend_irecv(operations) if operations else ():
            request.wait()
        mine = wanted.get(me, ())
        if number < len(mine):
            piece = mine[number]
            yield piece, _assembled(piece.source, local, held[me], own, arriving)


def _assembled(
    wanted: Rectangle,
    local: torch.Tensor,
    here: Rectangle,
    own: Sequence[Rectangle],
    arriving: Sequence[tuple[Rectangle, torch.Tensor]],
) -> torch.Tensor:
    if own and not arriving:
        return local[wanted.within(here)]  # of the shard itself
    if len(arriving) == 1 and not own:
        return arriving[0][1].to(local.device)
    out = torch.empty(wanted.shape, dtype=local.dtype, device=local.device)
    for rectangle in own:
        out[rectangle.within(wanted)] = local[rectangle.within(here)]
    for rectangle, values in arriving:
        out[rectangle.within(wanted)] = values.to(local.device)
    return out


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The memory itself: not every backend knows every dtype."""
    return tensor.view(-1).view(torch.uint8)


def _device(local: torch.Tensor, layout: Layout) -> torch.device:
    """Where what arrives is put: shards in main memory travel through the accelerator of their mesh."""
    return local.device if local.device.type == layout.device else torch.device(layout.device)


__all__ = ["Part", "Piece", "Traffic", "fetched", "holders", "needed", "pieces"]
