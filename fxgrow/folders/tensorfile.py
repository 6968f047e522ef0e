"""The safetensors format, a tensor at a time: neither reading nor writing needs memory for a whole file.

Eight bytes with the length of the header, the header in JSON (dtype, shape, place of each tensor), then the bytes of
the tensors one after the other; see the format's own description (huggingface/safetensors).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from fxgrow.errors import CheckpointError, DiskError
from fxgrow.limits import host_bytes
from fxgrow.reading import parse_json

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
#: what the format's own reader takes at most
_MOST_HEADER = 100_000_000
#: bytes that are read at a time into the system's cache
_EARLY = 2**28


@dataclass(frozen=True)
class Entry:
    """Where a tensor is.

    Attributes:
        start: of its first byte in the file.
    """

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, memory: torch.Tensor | None = None) -> torch.Tensor:
        """The tensor, in memory of its own.

        Args:
            memory: bytes to read it into, at least as many as it has.

        Raises:
            CheckpointError: the file has gone, or is shorter than it was.
        """
        held = torch.empty(self.bytes, dtype=torch.uint8) if memory is None else memory[: self.bytes]
        view = held.numpy().data
        try:
            with self.file.open("rb", buffering=0) as opened:
                opened.seek(self.start)
                done = 0
                while done < self.bytes:
                    count = opened.readinto(view[done:])
                    if not count:
                        raise CheckpointError(f"{self.file} ends {self.bytes - done} bytes early: it was cut off")
                    done += count
        except OSError as error:
            raise CheckpointError(f"{self.file} cannot be read: {error}") from error
        return held.view(self.dtype).reshape(self.shape) if self.bytes else torch.empty(self.shape, dtype=self.dtype)


@contextlib.contextmanager
def into_cache(tensors: Iterable[Entry]) -> Iterator[None]:
    """Have the system read files into its cache while something else is done that leaves the disk idle.

    At most a quarter of the memory that is free is filled so, which the system takes back where it is needed. What is
    wrong with a file is said where it is read for its sake.
    """
    ended = threading.Event()
    places = sorted((e.file, e.start, e.bytes) for e in tensors)

    def read() -> None:
        left = (host_bytes() or 0) // 4
        memory = [bytearray(2**20)] * (_EARLY >> 20)  # the same again and again: few calls, and little memory
        for file, start, size in places:
            with contextlib.suppress(OSError), file.open("rb", buffering=0) as opened:
                while size > 0 and left > 0 and not ended.is_set():
                    count = os.preadv(opened.fileno(), memory[: -(-min(size, left) // 2**20)], start) or size
                    start, size, left = start + count, size - count, left - count

    if sum(size for _, _, size in places) > _EARLY and hasattr(os, "preadv"):
        threading.Thread(target=read, daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def entries(file: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors of a file by name, and its metadata.

    Raises:
        CheckpointError: it is no such file, or its header does not fit its bytes.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if size < 8 or not 2 <= length <= min(_MOST_HEADER, size - 8):
                raise CheckpointError(f"{file} is no safetensors file, or was cut off")
            text = opened.read(length)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    try:
        header = parse_json(text.decode("utf-8"), f"the header of {file}")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"the header of {file} is not UTF-8 text: {error.reason}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"the header of {file} is no table of tensors")
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"the header of {file} has metadata that are no text")
    out = {name: _entry(file, name, given, 8 + length) for name, given in header.items()}
    end = 8 + length
    for name, entry in sorted(out.items(), key=lambda item: (item[1].start, item[1].bytes)):
        if entry.start != end:  # the format allows neither holes nor overlaps
            raise CheckpointError(f"{file}: {name} does not begin where the tensor before it ends")
        end += entry.bytes
    if end != size:
        raise CheckpointError(f"{file} has {size} bytes, its header says {end}: it was cut off, or added to")
    return out, metadata


def _entry(file: Path, name: str, given: Any, base: int) -> Entry:
    where = f"{file}: {name[:200]!r}"
    if not isinstance(given, dict) or set(given) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = given["dtype"], given["shape"], given["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{where} has the dtype {str(dtype)[:40]!r}, which is none of {', '.join(DTYPES)}")
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{where} has sizes or offsets that are no counts")
    found = Entry(file, DTYPES[dtype], tuple(shape), base + offsets[0])
    if found.bytes != offsets[1] - offsets[0]:
        raise CheckpointError(f"{where} takes {offsets[1] - offsets[0]} bytes, its shape and dtype need {found.bytes}")
    return found


def _counts(given: Any) -> bool:
    return isinstance(given, list) and all(type(n) is int and 0 <= n < 2**62 for n in given) and len(given) <= 64


def header_of(tensors: Sequence[tuple[str, torch.dtype, Sequence[int]]], metadata: Mapping[str, str]) -> bytes:
    """The first bytes of a file with these tensors in this order, up to where the first one begins."""
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, dtype, shape in tensors:
        start, end = end, end + math.prod(shape) * dtype.itemsize
        table[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at multiples of eight
    return len(text).to_bytes(8, "little") + text


@contextlib.contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """Errors of the file system as a DiskError that says what could not be written."""
    try:
        yield
    except OSError as error:
        if isinstance(error, DiskError):
            raise
        raise DiskError(f"{what} cannot be written: {error.strerror or error}") from error


class Writable(Protocol):
    """What takes bytes, and says how many it took."""

    def write(self, data: memoryview, /) -> int: ...


def write_bytes(file: Writable, data: bytes | memoryview) -> None:
    """Append bytes: all of them, which a file without a buffer need not do in one go."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def write_tensor(file: Writable, tensor: torch.Tensor) -> None:
    """Append a tensor's bytes."""
    data = tensor.detach().contiguous()
    if data.numel():
        write_bytes(file, data.reshape(-1).view(torch.uint8).numpy().data)
