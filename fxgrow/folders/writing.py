"""The grown weights, streamed into a new folder: each old tensor is read once, each new one written once.

The folder has another name until it is whole. A run that was killed goes on after the last whole file; one that is
asked for something else, or of a source that has changed, begins anew.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from fxgrow.errors import DiskError
from fxgrow.folders.tensorfile import disk_errors, finish, header_of, write_tensor
from fxgrow.limits import bytes_in_words

JOURNAL = "growing.json"
#: tensors that wait to be written, in bytes, before the next is read
_WAITING = 64 * 2**20


@dataclass(frozen=True)
class Target:
    """A tensor to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def shards_of(targets: Sequence[Target], most: int) -> list[list[Target]]:
    """In their order, into files of so many bytes at most; a larger tensor has a file of its own."""
    out: list[list[Target]] = [[]]
    size = 0
    for target in targets:
        if out[-1] and size + target.bytes > most:
            out.append([])
            size = 0
        out[-1].append(target)
        size += target.bytes
    return out


def names_of(count: int) -> list[str]:
    """The files' names as transformers has them."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


class Writing:
    """A new folder that is being written.

    Args:
        out: where it goes when it is whole.
        key: says what is written of what: a run with the same goes on.

    Raises:
        DiskError: it is there already, there is no room, or it cannot be written.
    """

    def __init__(self, out: Path, key: str, shards: Sequence[Sequence[Target]], metadata: Mapping[str, str]) -> None:
        self.out, self.shards, self.metadata = out, shards, metadata
        self.part = out.with_name(f".{out.name}.growing")
        self.files = names_of(len(shards))
        if out.exists():
            raise DiskError(f"{out} is there already: remove it, or name another folder")
        with disk_errors(str(self.part)):
            journal = self.part / JOURNAL
            if self.part.exists() and not (journal.is_file() and journal.read_text() == key):
                shutil.rmtree(self.part)
            self.part.mkdir(parents=True, exist_ok=True)
            journal.write_text(key)
        self.done = [file for file in self.files if (self.part / file).is_file()]
        needed = sum(t.bytes for shard in shards for t in shard) - self.bytes_done
        free = shutil.disk_usage(self.part).free
        if needed > free:
            raise DiskError(
                f"{out} needs {bytes_in_words(needed)}, and {bytes_in_words(free)} are free there: nothing was written"
            )

    @property
    def bytes_done(self) -> int:
        return sum(t.bytes for f, shard in zip(self.files, self.shards, strict=True) if f in self.done for t in shard)

    def write(self, make: Callable[[Sequence[Target]], Iterable[torch.Tensor]], wrote: Callable[[int], None]) -> None:
        """Write what is missing; ``make`` yields the tensors of a file in their order.

        Raises:
            DiskError: a file cannot be written. The files that are whole stay for the next run.
        """
        with ThreadPoolExecutor(1) as pool:
            for file, shard in zip(self.files, self.shards, strict=True):
                if file not in self.done:
                    with disk_errors(f"{self.out} ({file})"):
                        self._write(file, shard, make(shard), pool, wrote)
                    self.done.append(file)

    def _write(
        self,
        file: str,
        shard: Sequence[Target],
        tensors: Iterable[torch.Tensor],
        pool: ThreadPoolExecutor,
        wrote: Callable[[int], None],
    ) -> None:
        part = self.part / f"{file}.part"
        waiting: list[tuple[int, Future[None]]] = []
        with part.open("wb") as opened:
            opened.write(header_of([(t.name, t.dtype, t.shape) for t in shard], self.metadata))
            for target, tensor in zip(shard, tensors, strict=True):
                assert (tuple(tensor.shape), tensor.dtype) == (target.shape, target.dtype), target
                waiting.append((target.bytes, pool.submit(write_tensor, opened, tensor)))
                del tensor
                while waiting and (sum(n for n, _ in waiting) > _WAITING or waiting[0][1].done()):
                    size, one = waiting.pop(0)
                    one.result()
                    wrote(size)
            for size, one in waiting:
                one.result()
                wrote(size)
            finish(opened)
        part.rename(self.part / file)

    def index(self) -> None:
        """The index of several files."""
        if len(self.files) > 1:
            places = {t.name: f for f, shard in zip(self.files, self.shards, strict=True) for t in shard}
            size = sum(t.bytes for shard in self.shards for t in shard)
            text = json.dumps({"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}, indent=2)
            with disk_errors(str(self.out)):
                (self.part / "model.safetensors.index.json").write_text(text + "\n", encoding="utf-8")

    def settle(self) -> None:
        """Move the folder, which is whole, to its place."""
        with disk_errors(str(self.out)):
            (self.part / JOURNAL).unlink()
            self.part.rename(self.out)


def copy_files(sources: Iterable[Path], folder: Path, target: Path) -> None:
    """Copy files to the same places in another folder."""
    for file in sources:
        place = target / file.relative_to(folder)
        with disk_errors(str(place)):
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, place)
