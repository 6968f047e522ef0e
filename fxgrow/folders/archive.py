"""``torch.save`` of data whose tensors are made one at a time, while they are written.

The file is what ``torch.save`` writes: a ZIP archive with the data as a pickle, and a record for each storage, in the
order in which the pickle first meets them. PyTorch writes it without the bytes of the records
(``torch.serialization.skip_data``), which are filled in here, with their checksums.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch

from fxgrow.folders.tensorfile import write_bytes

#: a tensor that is smaller is made at once
_SMALL = 1 << 16
#: bytes that are summed up and written at a time
_PIECE = 1 << 24
_ENTRY, _DESCRIPTOR = b"PK\x01\x02", b"PK\x07\x08"


@dataclass
class Later:
    """Tensors that are made when they are written; in data, memory that nobody writes stands for them."""

    _makers: dict[int, Callable[[], torch.Tensor]] = field(default_factory=dict)
    _held: list[torch.Tensor] = field(default_factory=list)

    def takes(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is large enough to wait."""
        return tensor.nbytes >= _SMALL

    def put_off(self, like: torch.Tensor, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What stands for a tensor that ``make`` makes, which has the shape, dtype and strides of ``like``."""
        stands = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype)
        self._makers[stands.untyped_storage().data_ptr()] = make
        self._held.append(stands)  # so that no other memory has its address
        return stands

    def made(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor itself."""
        make = self._makers.get(tensor.untyped_storage().data_ptr())
        return tensor if make is None else make()

    def make_all(self) -> None:
        """Make what is left, in the memory that stands for it."""
        for stands in self._held:
            stands.copy_(self.made(stands))
        self._makers.clear()


def tensors_in(data: Any) -> Iterator[torch.Tensor]:
    """The tensors of nested tables and lists, in the order of a pickle."""
    if isinstance(data, torch.Tensor):
        yield data
    elif isinstance(data, Mapping):
        for value in data.values():
            yield from tensors_in(value)
    elif isinstance(data, list | tuple):
        for value in data:
            yield from tensors_in(value)


def storages_in(data: Any) -> dict[int, torch.Tensor]:
    """Of the tensors of data, those with memory of their own, by its address: the first of each, none without bytes."""
    out: dict[int, torch.Tensor] = {}
    for tensor in tensors_in(data):
        if tensor.layout is torch.strided and tensor.untyped_storage().nbytes():
            out.setdefault(tensor.untyped_storage().data_ptr(), tensor)
    return out


def sizes_in(data: Any) -> list[int]:
    """Bytes of the memory of each."""
    return [t.untyped_storage().nbytes() for t in storages_in(data).values()]


def save(file: Path, data: Any, later: Later) -> None:
    """Write a file as ``torch.save`` does.

    Raises:
        OSError: it cannot be written.
        RuntimeError: of PyTorch's own writer.
    """
    tensors = storages_in(data)
    with torch.serialization.skip_data():
        torch.save(data, file)
    records = records_of(file)
    if sizes_in(data) != [r.file_size for r in records]:
        later.make_all()  # tensors in other tensors (sparse ones), or in objects
        torch.save(data, file)
        return
    with file.open("r+b", buffering=0) as opened:
        sums = {}
        for record, tensor in zip(records, tensors.values(), strict=True):
            start = _start(opened, record)
            made = later.made(tensor)
            assert (made.shape, made.dtype, made.stride()) == (tensor.shape, tensor.dtype, tensor.stride())
            sums[record.filename] = _fill(opened, start, made)
        _sign(opened, sums)


def records_of(file: Path) -> list[zipfile.ZipInfo]:
    """The entries of a file of ``torch.save`` that hold storages, in their order, those without bytes left out."""
    with zipfile.ZipFile(file) as archive:
        found = [e for e in archive.infolist() if "/data/" in e.filename and e.file_size]
    return sorted(found, key=lambda e: (len(e.filename), e.filename))  # they end in numbers


def _start(opened: IO[bytes], record: zipfile.ZipInfo) -> int:
    """Where the bytes of an entry begin: after its header, its name, and what aligns it."""
    opened.seek(record.header_offset)
    names, extra = struct.unpack("<26xHH", opened.read(30))
    return int(record.header_offset + 30 + names + extra)


def _fill(opened: IO[bytes], start: int, tensor: torch.Tensor) -> int:
    """Write a tensor's storage; returns the checksum, which stands behind it too."""
    view = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy().data
    opened.seek(start)
    found = 0
    for place in range(0, len(view), _PIECE):
        piece = view[place : place + _PIECE]
        found = zlib.crc32(piece, found)
        write_bytes(opened, piece)
    mark = opened.read(4)
    if mark != _DESCRIPTOR:
        raise RuntimeError("an entry of the archive has no checksum behind it")
    write_bytes(opened, struct.pack("<I", found))
    return found


def _sign(opened: IO[bytes], sums: Mapping[str, int]) -> None:
    """Write the checksums into the archive's directory."""
    with zipfile.ZipFile(opened) as archive:
        place, count = archive.start_dir, len(archive.infolist())
    for _ in range(count):
        opened.seek(place)
        head = opened.read(46)
        names, extra, comment = struct.unpack("<28xHHH12x", head)
        if head[:4] != _ENTRY:
            raise RuntimeError("the archive has no directory where one is")
        name = opened.read(names).decode()
        if name in sums:
            opened.seek(place + 16)
            write_bytes(opened, struct.pack("<I", sums[name]))
        place += 46 + names + extra + comment
