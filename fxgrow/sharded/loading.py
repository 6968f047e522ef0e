"""Distributed checkpoints that grow while they are loaded: saved at one size and number of ranks, read at others.

A load planner for ``torch.distributed.checkpoint``: the state dict is the grown model's, the checkpoint the small
one's, and each rank reads what its shards are made of. Nothing is sent between ranks::

    planner = GrowthLoadPlanner(plan)
    planner.measure(reader)  # where the plan needs averages of whole tensors: a noise that is relative, say
    dcp.load(state, storage_reader=reader, planner=planner)
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import create_default_local_load_plan
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem

from fxgrow import kernels
from fxgrow.errors import CheckpointError
from fxgrow.ir.dtensors import Layout, Rectangle, is_sharded, local_of
from fxgrow.plan import FILL_MEAN, DimPlan, GrowthPlan, TensorPlan
from fxgrow.ranks import gathered
from fxgrow.weights.exchange import Piece, needed, pieces
from fxgrow.weights.jobs import TensorJob, filled, keyed_stages, moment_job, needs_sums, shifted, stage_job
from fxgrow.weights.moments import MOMENTS, Moment

_EVERY = torch.optim.Optimizer
_NOTHING = kernels.Sums(0.0, 0.0, 0.0)


class _Found(NamedTuple):
    """What a name in a state dict is in a plan.

    Attributes:
        source: the name in the checkpoint. moment: None of a weight.
    """

    plan: TensorPlan
    source: str
    moment: Moment | None = None


class _Reading:
    """A piece of a grown tensor on its way: what it is made of is read part by part."""

    def __init__(self, piece: Piece, found: _Found, whole: list[int], target: torch.Tensor, dtype: torch.dtype) -> None:
        self.piece, self.found, self.whole, self.target = piece, found, whole, target
        self.left = 0
        self.source = torch.empty(piece.source.shape, dtype=dtype)


class GrowthLoadPlanner(dcp.DefaultLoadPlanner):
    """Read a small model's distributed checkpoint into a grown model's state dict, moments of its optimizer included.

    What a plan does not name is read as it is. Moments are carried as policy ``copy`` does; for the others, load the
    small model, and grow it with :func:`fxgrow.grow`, ``apply_`` and ``carry_``, which sends shards between ranks.

    Args:
        plan: of the growth.
        prefix: before the names of the model's tensors in the checkpoint; found where None.
        options: of ``DefaultLoadPlanner``.

    Raises:
        CheckpointError: when loading: a tensor that the plan needs is missing or has another shape, or sums that it
            needs were not measured; a second growth of a tensor needs averages of what the first makes.
    """

    def __init__(self, plan: GrowthPlan, prefix: str | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.plan, self.prefix = plan, prefix
        self._sums: dict[str, kernels.Sums] = {}
        self._readings: dict[tuple[str, int], _Reading] = {}

    def measure(self, reader: Any, dtype: torch.dtype | None = None) -> None:
        """Read the tensors whose sums the plan needs, a part on each rank; a collective operation.

        Args:
            reader: the ``StorageReader`` of the checkpoint.
            dtype: of the grown model, where it is narrower than the checkpoint's.
        """
        summing = _SumsPlanner(self, dtype)
        dcp.load({}, storage_reader=reader, planner=summing)
        own = {name: tuple(sums) for name, sums in summing.sums.items()}
        for each in gathered(own) if dist.is_initialized() else [own]:
            for name, sums in each.items():
                self._sums[name] = self._sums.get(name, _NOTHING).plus(kernels.Sums(*sums))

    # names

    def find(self, fqn: str, known: Mapping[str, Any]) -> _Found | None:
        """What a name in the grown state dict is; None where the plan says nothing of it.

        Args:
            known: names in the checkpoint.
        """
        parts = fqn.split(".")
        for start in range(len(parts)):
            prefix = "".join(f"{p}." for p in parts[:start])
            for stop in (len(parts), len(parts) - 1):
                name, key = ".".join(parts[start:stop]), ".".join(parts[stop:])
                tensor = self.plan.tensors.get(self.plan.aliases.get(name, name))
                if tensor is None or (key and self._moment(key) is None):
                    continue
                if self.prefix is not None and not key and prefix != self.prefix:
                    continue
                source = tensor.source
                if source is None:
                    return None if key else _Found(tensor, "")
                suffix = f".{key}" if key else ""
                # a tied tensor may have been saved under another of its names
                names = [source, *(a for a, n in self.plan.aliases.items() if n == source), name]
                there = next((f"{prefix}{n}{suffix}" for n in names if f"{prefix}{n}{suffix}" in known), None)
                if there is None:
                    raise CheckpointError(
                        f"{fqn} grows out of {prefix}{source}{suffix}, which the checkpoint does not have"
                    )
                return _Found(tensor, there, self._moment(key) if key else None)
        return None

    @staticmethod
    def _moment(key: str) -> Moment | None:
        found = MOMENTS.get((_EVERY, key))
        return None if found is None or found.count or found.averaged is not None else found

    # planning

    def create_local_plan(self) -> LoadPlan:
        """The reads of this rank: see ``LoadPlanner``."""
        metadata = _checked(self.metadata)
        rest, items = {}, list[ReadItem]()
        for fqn, value in self.state_dict.items():
            found = self.find(fqn, metadata.state_dict_metadata) if isinstance(value, torch.Tensor) else None
            if found is None:
                rest[fqn] = value
            else:
                items += self._reads(fqn, value, found, metadata)
        plain = create_default_local_load_plan(rest, metadata, not self.allow_partial_load)
        return LoadPlan(plain.items + items)

    def _reads(self, fqn: str, value: torch.Tensor, found: _Found, metadata: Metadata) -> Iterator[ReadItem]:
        tensor, local = found.plan, local_of(value)
        mine = Layout.of(value).own(value.shape) if is_sharded(value) else Rectangle.whole(value.shape)
        if list(value.shape) != list(tensor.shape):
            raise CheckpointError(f"{fqn} is {list(value.shape)} in the state dict, {list(tensor.shape)} in the plan")
        if tensor.zero or not found.source:
            if found.moment is not None or tensor.zero:
                local.fill_(0.0 if found.moment is not None else tensor.level)
                return
            raise CheckpointError(f"{fqn} is made of nothing: initialise it, and leave it out of what is loaded")
        stages = [] if found.moment is not None else [stage for stage, _ in keyed_stages(tensor)]
        if any(needs_sums(stage, stage.dims) for stage in stages[1:]) or tensor.continuation is not None:
            raise CheckpointError(
                f"{fqn} grows in several steps, one of which needs averages of what the one before makes, or goes on "
                "in a pattern: that is not done while reading. Load the small model, and grow it"
            )
        stored = metadata.state_dict_metadata[found.source]
        if not isinstance(stored, TensorStorageMetadata):
            raise CheckpointError(f"{found.source} is no tensor in the checkpoint")
        indices = [None if d is None else d.index for d in tensor.dims]
        shape, all_dims = list(stored.size), set(range(len(stored.size)))
        if any(i is not None and len(i) and i.max() >= n for i, n in zip(indices, shape, strict=True)):
            raise CheckpointError(f"{found.source} is {shape} in the checkpoint, smaller than the plan has it")
        whole = {d for stage in stages for d in filled(stage.dims, FILL_MEAN)}
        dtype = stored.properties.dtype
        cut = pieces(indices, shape, mine, split=all_dims, whole=whole, itemsize=dtype.itemsize)
        for number, piece in enumerate(cut):
            # what is read is cast first: as the small model would be loaded, and grown then
            reading = _Reading(piece, found, shape, local[piece.target.within(mine)], value.dtype)
            self._readings[fqn, number] = reading
            for chunk in stored.chunks:
                common = Rectangle(tuple(chunk.offsets), tuple(chunk.sizes)).meet(piece.source)
                if common.numel:
                    reading.left += 1
                    yield _read(fqn, number, piece.source, found.source, chunk, common)
            if not reading.left:  # newborn entries alone
                self._make(reading)
                del self._readings[fqn, number]

    # reading

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Plain data alone: nothing else is unpickled."""
        loaded = torch.load(value, weights_only=True)
        super().load_bytes(read_item, _pickled(loaded))

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        """Where a read goes: see ``LoadPlanner``."""
        reading = self._readings.get(_key(read_item))
        if reading is None:
            out: torch.Tensor = super().resolve_tensor(read_item)
            return out
        spans = zip(read_item.dest_offsets, read_item.lengths, strict=True)
        return reading.source[tuple(slice(a, a + n) for a, n in spans)]

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """A read is there: with the last of its piece, that is made."""
        reading = self._readings.get(_key(read_item))
        if reading is not None:
            reading.left -= 1
            if not reading.left:
                self._make(reading)
                del self._readings[_key(read_item)]

    def _make(self, reading: _Reading) -> None:
        found, here, shape = reading.found, reading.piece.source, reading.whole
        made = reading.source
        for job, dims, there in self._jobs(reading):
            made = kernels.materialise(
                made,
                job.dims,
                offset=there.start,
                local_shape=there.shape,
                source_offset=here.start,
                source_shape=shape,
                dtype=reading.target.dtype,
                **job.options,
            )
            here, shape = there, [n if d is None else d.size for n, d in zip(shape, dims, strict=True)]
        reading.target.copy_(made if found.moment is not None else shifted(made, found.plan.shift))
        if found.moment is not None and found.moment.seeded:
            self._seed(reading)

    def _jobs(self, reading: _Reading) -> list[tuple[TensorJob, list[DimPlan | None], Rectangle]]:
        """The growths of a piece, in their order, each with the rectangle that it makes."""
        found, target = reading.found, reading.piece.target
        if found.moment is not None:
            return [(moment_job(found.plan, found.moment, scale_gradients=True), found.plan.dims, target)]
        stages = [(s, key, s.dims or [None] * len(reading.whole)) for s, key in keyed_stages(found.plan)]
        shapes = [reading.whole]
        for _, _, dims in stages:
            shapes.append([n if d is None else d.size for n, d in zip(shapes[-1], dims, strict=True)])
        made = [target]  # the last first
        for (stage, _, dims), shape in zip(stages[:0:-1], shapes[-2:0:-1], strict=True):
            indices = [None if d is None else d.index for d in dims]
            made.append(needed(indices, shape, made[-1], filled(stage.dims, FILL_MEAN)))
        return [
            (stage_job(s, key, reading.source.dtype, reading.whole, lambda: self._sums_of(found.source)), dims, there)
            for (s, key, dims), there in zip(stages, reversed(made), strict=True)
        ]

    def _seed(self, reading: _Reading) -> None:
        """Newborn entries begin with the average, as they do in memory."""
        for i, d in enumerate(reading.found.plan.dims):
            start, size = reading.piece.target.start[i], reading.piece.target.shape[i]
            if d is not None and bool((newborn := d.index[start : start + size] < 0).any()):
                rows = torch.from_numpy(newborn.nonzero()[0])
                reading.target.index_fill_(i, rows, self._sums_of(reading.found.source).mean)

    def _sums_of(self, source: str) -> kernels.Sums:
        if source not in self._sums:
            raise CheckpointError(
                f"the growth of {source} needs averages of all of it (a noise that is relative, say): call "
                "planner.measure(reader) before dcp.load, on all ranks"
            )
        return self._sums[source]

    def needs_sums(self, metadata: Metadata) -> list[str]:
        """Tensors of the checkpoint of which the plan needs averages; more are named than may be asked for."""
        out = []
        for source, stored in metadata.state_dict_metadata.items():
            if isinstance(stored, TensorStorageMetadata) and stored.properties.dtype.is_floating_point:
                parts = source.split(".")
                names = {".".join(parts[a:b]) for a in range(len(parts)) for b in (len(parts), len(parts) - 1)}
                if any(t.source in names and _relative(t) for t in self.plan.tensors.values()):
                    out.append(source)
        return out


class _SumsPlanner(dcp.DefaultLoadPlanner):
    """Reads some tensors chunk by chunk, each on one rank, and keeps their sums."""

    def __init__(self, planner: GrowthLoadPlanner, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.planner, self.dtype = planner, dtype
        self.sums: dict[str, kernels.Sums] = {}
        self._held: dict[tuple[str, int], torch.Tensor] = {}

    def create_local_plan(self) -> LoadPlan:
        metadata = _checked(self.metadata)
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        items, turn = [], 0
        for source in self.planner.needs_sums(metadata):
            stored = metadata.state_dict_metadata[source]
            assert isinstance(stored, TensorStorageMetadata)
            for number, chunk in enumerate(stored.chunks):
                turn += 1
                if turn % world == rank and 0 not in chunk.sizes:
                    here = Rectangle(tuple(chunk.offsets), tuple(chunk.sizes))
                    self._held[source, number] = torch.empty(here.shape, dtype=self.dtype or stored.properties.dtype)
                    items.append(_read(source, number, here, source, chunk, here))
        return LoadPlan(items)

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        return self._held[_key(read_item)]

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        name, _ = _key(read_item)
        own = kernels.Sums.of(self._held.pop(_key(read_item)))
        self.sums[name] = self.sums.get(name, _NOTHING).plus(own)


def _checked(metadata: Metadata | None) -> Metadata:
    if metadata is None:
        raise CheckpointError("the checkpoint has no metadata")
    return metadata


def _read(fqn: str, number: int, buffer: Rectangle, source: str, chunk: Any, common: Rectangle) -> ReadItem:
    """Read what a chunk of the checkpoint has of a rectangle, into a tensor that holds that rectangle."""

    def offsets(outer: Rectangle) -> torch.Size:
        return torch.Size(a - b for a, b in zip(common.start, outer.start, strict=True))

    return ReadItem(
        type=LoadItemType.TENSOR,
        dest_index=MetadataIndex(fqn, torch.Size(buffer.start), number),
        dest_offsets=offsets(buffer),
        storage_index=MetadataIndex(source, chunk.offsets),
        storage_offsets=offsets(Rectangle(tuple(chunk.offsets), tuple(chunk.sizes))),
        lengths=torch.Size(common.shape),
    )


def _key(read_item: ReadItem) -> tuple[str, int]:
    index = read_item.dest_index
    return index.fqn, -1 if index.index is None else index.index


def _pickled(value: Any) -> io.BytesIO:
    out = io.BytesIO()
    torch.save(value, out)
    out.seek(0)
    return out


def _relative(tensor: TensorPlan) -> bool:
    """Whether a tensor's growth, or that of its moments, needs averages of the whole of it."""
    born = any(d is not None and bool((d.index < 0).any()) for d in tensor.dims)
    return born or any(needs_sums(stage, stage.dims) for stage in tensor.stages or [tensor])


__all__ = ["GrowthLoadPlanner"]
