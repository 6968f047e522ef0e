"""Tensors of which every rank of a device mesh holds a shard: where it is, and what is there.

``torch.distributed.tensor`` is slow to import, and nobody has one of its tensors who has not imported it: what is
needed of it is reached through the tensor at hand.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch


class Rectangle(NamedTuple):
    """A part of a tensor: first entry and size along every dim."""

    start: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Rectangle:
        return cls((0,) * len(shape), tuple(shape))

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def meet(self, other: Rectangle) -> Rectangle:
        """What both have; of size 0 along a dim where that is nothing."""
        start = tuple(map(max, self.start, other.start))
        stops = (min(a + n, b + m) for a, n, b, m in zip(self.start, self.shape, other.start, other.shape, strict=True))
        return Rectangle(start, tuple(max(0, stop - a) for a, stop in zip(start, stops, strict=True)))

    def within(self, outer: Rectangle) -> tuple[slice, ...]:
        """Where it is in a tensor that holds another rectangle, of which it is a part."""
        return tuple(slice(a - b, a - b + n) for a, n, b in zip(self.start, self.shape, outer.start, strict=True))


def is_sharded(tensor: Any) -> bool:
    """Whether it is a ``DTensor``, or a parameter that is one."""
    return type(tensor).__name__ == "DTensor" and type(tensor).__module__.startswith("torch.distributed")


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """The shard of this rank, sharing memory; any other tensor as it is. Without gradient history."""
    if not is_sharded(tensor):
        return tensor.detach()
    local: torch.Tensor = tensor.detach().to_local()  # type: ignore[attr-defined]
    return local


class Layout(NamedTuple):
    """How a tensor lies on a mesh.

    Attributes:
        mesh: the ``DeviceMesh``. placements: one for each of its dims.
    """

    mesh: Any
    placements: tuple[Any, ...]

    @classmethod
    def of(cls, tensor: Any) -> Layout:
        """A ``DTensor``'s."""
        return cls(tensor.device_mesh, tuple(tensor.placements))

    @property
    def ranks(self) -> list[int]:
        """Of the mesh, in its order."""
        return [int(r) for r in self.mesh.mesh.flatten().tolist()]

    @property
    def me(self) -> int:
        """The number of this rank."""
        coordinate = self.mesh.get_coordinate()
        return int(self.mesh.mesh[tuple(coordinate)])

    @property
    def device(self) -> str:
        """The type of device through which its ranks talk."""
        return str(self.mesh.device_type)

    def problem(self) -> str:
        """Why a tensor that lies so cannot be grown where it is; "" where it can."""
        odd = [p for p in self.placements if not (p.is_shard() or p.is_replicate() or _strided(p))]
        return f"its placement {odd[0]} is neither a shard nor a copy" if odd else ""

    def rectangles(self, shape: Sequence[int]) -> dict[int, Rectangle]:
        """Which part of a tensor of that shape each rank holds, by the rank's number."""
        at = torch.cartesian_prod(*(torch.arange(n) for n in self.mesh.mesh.shape))
        places = at.reshape(-1, self.mesh.mesh.dim()).tolist()
        return {rank: self._rectangle(shape, place) for rank, place in zip(self.ranks, places, strict=True)}

    def own(self, shape: Sequence[int]) -> Rectangle:
        """Which part of a tensor of that shape this rank holds."""
        return self._rectangle(shape, self.mesh.get_coordinate())

    def _rectangle(self, shape: Sequence[int], place: Sequence[int]) -> Rectangle:
        """Split as ``torch.chunk`` splits; what shards the shards of a later dim of the mesh comes after that one."""
        start, size = [0] * len(shape), list(shape)
        order = sorted(range(len(self.placements)), key=lambda i: _strided(self.placements[i]))
        for i in order:
            placement = self.placements[i]
            if not (placement.is_shard() or _strided(placement)):
                continue
            d = placement.dim % len(shape)
            chunk = -(-size[d] // self.mesh.mesh.shape[i])
            first = min(place[i] * chunk, size[d])
            start[d] += first
            size[d] = min(chunk, size[d] - first)
        return Rectangle(tuple(start), tuple(size))

    def sharded_dims(self, shape: Sequence[int]) -> set[int]:
        """Dims of which no rank need hold the whole."""
        return {p.dim % len(shape) for p in self.placements if p.is_shard() or _strided(p)}

    def summed(self, values: torch.Tensor) -> torch.Tensor:
        """Add up numbers of all shards, each counted once; a collective operation, in place."""
        for i, placement in enumerate(self.placements):
            if placement.is_shard() or _strided(placement):
                torch.distributed.all_reduce(values, group=self.mesh.get_group(i))
        return values


class Rows(NamedTuple):
    """The layout that FSDP gives parameters where nothing else is said: rows, divided among so many ranks."""

    ranks: int

    def rectangles(self, shape: Sequence[int]) -> dict[int, Rectangle]:
        """Which part of a tensor of that shape each rank holds."""
        chunk = -(-shape[0] // self.ranks)
        starts = [min(rank * chunk, shape[0]) for rank in range(self.ranks)]
        rest = tuple(shape[1:])
        return {
            rank: Rectangle((a, *(0,) * len(rest)), (min(chunk, shape[0] - a), *rest)) for rank, a in enumerate(starts)
        }

    def sharded_dims(self, shape: Sequence[int]) -> set[int]:
        """Dims of which no rank need hold the whole."""
        return {0} if shape else set()


def _strided(placement: Any) -> bool:
    return type(placement).__name__ == "_StridedShard"


def sharded_as(tensor: Any, local: torch.Tensor, shape: Sequence[int], layout: Layout | None = None) -> torch.Tensor:
    """A ``DTensor`` of another shape, of this rank's shard; it lies as another one does where no layout is given."""
    mesh, placements = Layout.of(tensor) if layout is None else layout
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    out: torch.Tensor = type(tensor).from_local(
        local,
        mesh,
        placements,
        run_check=False,
        shape=torch.Size(shape),  # without it, uneven shards would count for equal ones
        stride=tuple(strides),
    )
    return out


def whole_of(tensor: Any) -> torch.Tensor:
    """All of a tensor on this rank; a collective operation where it is sharded."""
    if not is_sharded(tensor):
        out: torch.Tensor = tensor.detach()
        return out
    gathered: torch.Tensor = tensor.detach().full_tensor()
    return gathered


__all__ = ["Layout", "Rectangle", "Rows", "is_sharded", "local_of", "sharded_as", "whole_of"]
