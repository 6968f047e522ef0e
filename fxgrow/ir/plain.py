"""A sharded model as the plain one that its class makes, for as long as it is traced or changed.

Parameters stand for shapes: they are memory that nobody writes, which a system hands out when it is written. No
collective operation runs, and nothing is gathered but what buffers hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn

from fxgrow.ir.dtensors import is_sharded, whole_of
from fxgrow.ir.fsdp import Stripped, is_fsdp
from fxgrow.ir.modules import set_tensor


def is_distributed(model: nn.Module) -> bool:
    """Whether a model holds shards, or gathers its parameters when it runs: FSDP2, or tensor parallelism."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    return any(map(is_fsdp, model.modules())) or any(map(is_sharded, (*model.parameters(), *model.buffers())))


class Plain:
    """A model without its sharding, until :meth:`undo`.

    Attributes:
        stripped: what was taken off.
        parameters, buffers: the model's own tensors, by each of their names.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._undo: list[Callable[[], None]] = []
        self.stripped = Stripped(model)  # before its parameters are looked at: they are shards from here on
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        self.buffers = dict(model.named_buffers(remove_duplicate=False))
        try:
            self._exchange()
        except BaseException:
            self.undo()
            raise

    def _exchange(self) -> None:
        places: dict[int, torch.Tensor] = {}
        for name, p in self.parameters.items():
            if is_sharded(p) or p.device.type != "cpu":
                if id(p) not in places:
                    empty = torch.empty(p.shape, dtype=p.dtype)  # never written
                    places[id(p)] = nn.Parameter(empty, requires_grad=p.requires_grad)
                self._put(name, p, places[id(p)])
        for name, b in self.buffers.items():
            if is_sharded(b) or b.device.type != "cpu":
                if id(b) not in places:
                    places[id(b)] = whole_of(b).cpu()
                self._put(name, b, places[id(b)])

    def _put(self, name: str, own: torch.Tensor, place: torch.Tensor) -> None:
        path, _, leaf = name.rpartition(".")
        holder = self.model.get_submodule(path)
        self._undo.append(lambda: set_tensor(holder, leaf, own))
        set_tensor(holder, leaf, place)

    def undo(self) -> None:
        """The model as it was."""
        while self._undo:
            self._undo.pop()()
        self.stripped.undo()


@contextmanager
def as_plain(model: nn.Module) -> Iterator[Plain | None]:
    """The model without its sharding inside the block, and as it was afterwards; None where it has none."""
    if not is_distributed(model):
        yield None
        return
    plain = Plain(model)
    try:
        yield plain
    finally:
        plain.undo()


__all__ = ["Plain", "as_plain", "is_distributed"]
