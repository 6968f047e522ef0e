"""Tensors of a checkpoint: written one at a time, and read as they lie, whether or not ranks hold shards of them.

No rank has a whole model for it: what is sharded is gathered tensor by tensor, and what is read goes into this rank's
shards from the file's own pages.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fxgrow.errors import CheckpointError
from fxgrow.folders.tensorfile import NAMES, header_of, write_tensor
from fxgrow.ir.dtensors import Layout, Rectangle, is_sharded, local_of, sharded_as, whole_of
from fxgrow.ranks import Group, answering


def in_order(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As a file has them: the largest entries first, so that all begin at multiples of their size.

    Raises:
        CheckpointError: one is of a dtype that the format does not know.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in NAMES:
            raise CheckpointError(f"{name} is {tensor.dtype}, which a safetensors file cannot hold")
    return dict(sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])))


def wholes(tensors: Iterable[Tensor], group: Group, first: bool) -> Iterator[Tensor]:
    """Each tensor in main memory, whole; a collective operation, for which every rank goes through them to the end.

    Args:
        first: whether this rank wants them; others only give their shards.
    """
    for tensor in tensors:
        if is_sharded(tensor):
            with answering(group):
                whole = whole_of(tensor)
            yield whole.cpu()
        elif first:
            yield tensor.detach().cpu()


def write(file: Path, tensors: Mapping[str, Tensor], values: Iterator[Tensor]) -> None:
    """Write a safetensors file.

    Args:
        tensors: of which it has names, dtypes and shapes, in order.
        values: gives the tensors themselves.

    Raises:
        OSError: it cannot be written.
    """
    with file.open("wb", buffering=0) as opened:
        opened.write(header_of([(name, t.dtype, t.shape) for name, t in tensors.items()], {}))
        for _ in tensors:
            write_tensor(opened, next(values))


def laid_as(whole: Tensor, own: Any) -> Tensor:
    """Of a whole tensor, what this rank holds where another one lies: memory of its own, on that one's device."""
    if not is_sharded(own):
        return whole.clone()
    mine = Layout.of(own).own(whole.shape)
    part = whole[mine.within(Rectangle.whole(whole.shape))].to(local_of(own).device, copy=True)
    return sharded_as(own, part.contiguous(), whole.shape)


__all__ = ["in_order", "laid_as", "wholes", "write"]
