"""The grown weights, streamed into a new folder: each old tensor is read once, each new one written once.

The folder has another name until it is whole. A run that was killed goes on after the last whole file; one that is
asked for something else, or of a source that has changed, begins anew. A journal keeps a check sum of every whole file:
one whose bytes are others when a run goes on is written again.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch
from typing_extensions import Self

from fxgrow.errors import CaptureError, DiskError, ExactnessError, GrowthRefused
from fxgrow.folders.tensorfile import disk_errors, header_of, write_bytes, write_tensor
from fxgrow.limits import bytes_in_words
from fxgrow.publish import locked, sync, sync_folder

#: a line that says what is written of what, and one for every whole file, with the CRC-32 of its bytes
JOURNAL = ".growing"
_LINE = re.compile(r"([\w.-]+) ([0-9a-f]{8})")
#: tensors that wait to be written behind the one that is, in bytes, before the next is read
_WAITING = 128 * 2**20
#: bytes that are written before the disk is told to take them
_UNSYNCED = 128 * 2**20
#: files that are whole and not on the disk yet
_OPEN = 2


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
        more: bytes that go into the folder beside the weights.

    Raises:
        DiskError: it is there already, there is no room, it cannot be written, or another run is writing it.
    """

    def __init__(
        self, out: Path, key: str, shards: Sequence[Sequence[Target]], metadata: Mapping[str, str], more: int = 0
    ) -> None:
        self.out, self.shards, self.metadata = out, shards, metadata
        self.part = out.with_name(f".{out.name}.growing")
        self.files = names_of(len(shards))
        check_absent(out, "folder")
        with contextlib.ExitStack() as stack, disk_errors(str(self.part)):
            if os.path.lexists(self.part) and (self.part.is_symlink() or not self.part.is_dir()):
                raise DiskError(f"{self.part} is in the way, and is no folder that a run left: remove it")
            self.part.mkdir(parents=True, exist_ok=True)
            if not stack.enter_context(locked(self.part, wait=False)):
                raise DiskError(f"{self.part} is being written by another run: wait for it, or name another folder")
            self.sums: dict[str, int] = {}  # of whole files
            self.done = self._left(key)
            needed = sum(t.bytes for shard in shards for t in shard) - self.bytes_done + more
            free = shutil.disk_usage(self.part).free
            if needed > free:
                if not self.done:
                    shutil.rmtree(self.part)
                raise DiskError(
                    f"{out} needs {bytes_in_words(needed)}, and {bytes_in_words(free)} are free there: nothing was "
                    "written"
                )
            self._stack = stack.pop_all()

    def _left(self, key: str) -> list[str]:
        """The files that an earlier run of the same wrote whole; whatever else it left is removed."""
        journal = self.part / JOURNAL
        goes_on, self.sums = _noted(journal, key, self.files)
        done = []
        for item in sorted(self.part.iterdir()):
            if goes_on and item.name == JOURNAL:
                continue
            if goes_on and item.name in self.sums and self._is_whole(item):
                done.append(item.name)
            elif item.is_dir() and not item.is_symlink():
                shutil.rmtree(item)
            else:
                item.unlink()
        self.sums = {name: self.sums[name] for name in done}
        journal.write_text(key + "".join(map(_line, self.sums.items())))
        return done

    def check(self, stopped: Callable[[], bool]) -> list[str]:
        """Read what an earlier run wrote, and remove the files whose bytes are others now; returns their names.

        Args:
            stopped: whether nobody waits for it any more.

        Raises:
            DiskError: one cannot be read.
        """
        damaged = []
        for name in itertools.takewhile(lambda _: not stopped(), self.done):
            with disk_errors(f"{self.out} ({name})"):
                if _sum_of(self.part / name) != self.sums[name]:
                    (self.part / name).unlink()
                    damaged.append(name)
        self.done = [name for name in self.done if name not in damaged]
        return damaged

    def _is_whole(self, file: Path) -> bool:
        """Whether a file has the header and the size that it is to have."""
        shard = self.shards[self.files.index(file.name)]
        header = self._header(shard)
        if not _is_file(file) or file.stat().st_size != len(header) + sum(t.bytes for t in shard):
            return False
        with file.open("rb") as opened:
            return opened.read(len(header)) == header

    def _header(self, shard: Sequence[Target]) -> bytes:
        return header_of([(t.name, t.dtype, t.shape) for t in shard], self.metadata)

    @property
    def bytes_done(self) -> int:
        return sum(t.bytes for f, shard in zip(self.files, self.shards, strict=True) if f in self.done for t in shard)

    def write(self, make: Callable[[Sequence[Target]], Iterable[torch.Tensor]], wrote: Callable[[int], None]) -> None:
        """Write what is missing; ``make`` yields the tensors of a file in their order.

        One thread makes tensors, one writes them, one waits for the disk: files that are written are brought there
        while the next ones are made.

        Raises:
            DiskError: a file cannot be written. The files that are whole stay for the next run.
        """
        with ThreadPoolExecutor(1) as writer, ThreadPoolExecutor(1) as disk:
            ending: list[tuple[str, Future[None]]] = []
            for file, shard in zip(self.files, self.shards, strict=True):
                if file not in self.done:
                    with disk_errors(f"{self.out} ({file})"):
                        ending.append((file, self._write(file, shard, make(shard), writer, disk, wrote)))
                while len(ending) > _OPEN or (ending and file == self.files[-1]):
                    self._ended(*ending.pop(0))

    def _ended(self, file: str, end: Future[None]) -> None:
        with disk_errors(f"{self.out} ({file})"):
            end.result()
        self.done.append(file)

    def _end(self, opened: _Summed, file: str) -> None:
        """Bring a file to the disk, give it its name and note its check sum."""
        with opened.file:
            os.fsync(opened.file.fileno())
        (self.part / f"{file}.part").rename(self.part / file)
        with (self.part / JOURNAL).open("a") as journal:
            journal.write(_line((file, opened.sum)))

    def _write(
        self,
        file: str,
        shard: Sequence[Target],
        tensors: Iterable[torch.Tensor],
        writer: ThreadPoolExecutor,
        disk: ThreadPoolExecutor,
        wrote: Callable[[int], None],
    ) -> Future[None]:
        """Write a file; returns what ends when it is on the disk under its name."""
        part = self.part / f"{file}.part"
        waiting: list[tuple[int, Future[Any]]] = []
        syncing: Future[None] | None = None
        unsynced = 0
        part.unlink(missing_ok=True)  # of a writing that was stopped
        opened = _Summed(part.open("xb", buffering=0))
        try:
            waiting.append((0, writer.submit(write_bytes, opened, self._header(shard))))
            for target, tensor in zip(shard, tensors, strict=True):
                assert (tuple(tensor.shape), tensor.dtype) == (target.shape, target.dtype), target
                waiting.append((target.bytes, writer.submit(write_tensor, opened, tensor)))
                del tensor
                while waiting and (waiting[0][1].done() or sum(n for n, _ in waiting[1:]) > _WAITING):
                    size, one = waiting.pop(0)
                    one.result()
                    wrote(size)
                    unsynced += size
                if unsynced > _UNSYNCED and (syncing is None or syncing.done()):
                    syncing, unsynced = disk.submit(_begin, opened.file), 0
            for size, one in waiting:
                one.result()
                wrote(size)
        except BaseException:
            for _, one in waiting:
                one.cancel()
            writer.submit(opened.file.close)
            raise
        return disk.submit(self._end, opened, file)

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
            for file in self.part.rglob("*"):
                if file.is_file():
                    sync(file)
                elif file.is_dir():
                    sync_folder(file)
            check_absent(self.out, "folder")
            (self.part / JOURNAL).unlink()
            sync_folder(self.part)
            self.part.rename(self.out)
            sync_folder(self.out.parent)

    def close(self) -> None:
        """Let other runs write the folder."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """What is refused will be refused again: nothing of it is kept."""
        if isinstance(error, GrowthRefused | ExactnessError | CaptureError):
            shutil.rmtree(self.part, ignore_errors=True)
        self.close()


def _begin(opened: IO[bytes]) -> None:
    """Have the system bring what was written to the disk, and do not wait for it."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class _Summed:
    """A file that is written, and the check sum of what was."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.sum = file, 0

    def write(self, data: memoryview) -> int:
        count = self.file.write(data)
        self.sum = zlib.crc32(data[:count], self.sum)
        return count


def _sum_of(file: Path) -> int:
    """The check sum of what is on the disk."""
    found, held = 0, memoryview(bytearray(2**24))
    with file.open("rb", buffering=0) as opened:
        while count := opened.readinto(held):
            found = zlib.crc32(held[:count], found)
    return found


def _line(noted: tuple[str, int]) -> str:
    return f"{noted[0]} {noted[1]:08x}\n"


def _noted(journal: Path, key: str, files: Sequence[str]) -> tuple[bool, dict[str, int]]:
    """Whether a journal is of a growth, and the check sums in it; a line that was cut off counts for nothing."""
    if not _is_file(journal):
        return False, {}
    with journal.open("rb") as opened:
        data = opened.read(len(key) + 128 * len(files))
    first, *lines = data.decode("utf-8", "replace").splitlines(keepends=True) or [""]
    found = {m[1]: int(m[2], 16) for line in lines if line.endswith("\n") and (m := _LINE.fullmatch(line[:-1]))}
    return first == key, found if first == key else {}


def _is_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def check_absent(out: Path, kind: str) -> None:
    """See to it that nothing is where something is to be written.

    Raises:
        DiskError: with what to do.
    """
    if os.path.lexists(out):
        raise DiskError(f"{out} is there already: remove it, or name another {kind}")


def copy_files(sources: Iterable[Path], folder: Path, target: Path) -> None:
    """Copy files to the same places in another folder."""
    for file in sources:
        place = target / file.relative_to(folder)
        with disk_errors(str(place)):
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, place)
