"""Ranks that run one task together: which of them takes which micro-batch, and how their gradients become one.

The micro-batches of an optimizer step are numbered as in a run on one rank, and go around: number i to rank i modulo
the number of ranks. Each is drawn by its own generator, and what is random in it has a seed of its own, so that a step
computes the same on any number of ranks, up to the order of sums. ``DistributedDataParallel`` averages the gradients.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fxgrow.errors import FxgrowError, SpecError
from fxgrow.ranks import ALONE, Group, answering, size


@dataclass(frozen=True)
class Parallel:
    """This rank among those that run a task; one alone where ``torch.distributed`` is not initialised.

    Attributes:
        options: for ``DistributedDataParallel``.
    """

    rank: int = 0
    ranks: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def here(cls, options: Mapping[str, Any]) -> Parallel:
        """This process as it was started."""
        ranks = size()
        return cls(dist.get_rank() if ranks > 1 else 0, ranks, options)

    @property
    def group(self) -> Group:
        """What :mod:`fxgrow.ranks` takes."""
        return None if self.ranks > 1 else ALONE

    @property
    def first(self) -> bool:
        """Whether this rank writes the log and the checkpoints, and shows the progress."""
        return self.rank == 0

    def check(self, accumulation: int, device: str) -> None:
        """Raises:
        SpecError: there are fewer micro-batches to a step than ranks, or one device for all of them.
        """
        if accumulation < self.ranks:
            raise SpecError(
                f"a step of {accumulation} micro-batch{'es' if accumulation > 1 else ''} cannot be shared by "
                f"{self.ranks} ranks: start fewer, or give more accumulation, of smaller micro-batches"
            )
        if self.ranks > 1 and torch.device(device).index is not None:
            raise SpecError(f"device {device!r} would be that of all {self.ranks} ranks: say {device.split(':')[0]!r}")

    def own(self, count: int) -> range:
        """Which of so many micro-batches are this rank's."""
        return range(self.rank, count, self.ranks)

    def shared_by_all(self, model: nn.Module) -> nn.Module:
        """The model as a step runs it: its gradients become those of all ranks, which begin with the first one's."""
        if self.ranks == 1:
            return model
        try:
            with answering():
                return DistributedDataParallel(model, **self.options)
        except (TypeError, ValueError) as error:
            raise SpecError(
                f"DistributedDataParallel does not take the task's model, or its ddp= options: {error}"
            ) from error

    def gathering(self, model: nn.Module, last: bool) -> contextlib.AbstractContextManager[None]:
        """Around a micro-batch: gradients wait until the step's last one on this rank."""
        if isinstance(model, DistributedDataParallel) and not last:
            return model.no_sync()
        return contextlib.nullcontext()

    def same_buffers(self, model: nn.Module) -> None:
        """Give all ranks the first one's buffers, as ``DistributedDataParallel`` does before it runs a model."""
        if self.ranks > 1:
            with answering(), torch.no_grad():
                for buffer in model.buffers():
                    dist.broadcast(buffer, 0)


@contextlib.contextmanager
def launched() -> Iterator[bool]:
    """The ranks of a launcher such as ``torchrun``, for a block; nothing in a process that none has started.

    Yields:
        Whether this is the first rank.

    An error of fxgrow's is raised on the rank that comes to it first, so that it is said once; the others end without
    a word, with the same exit code.
    """
    if not dist.is_available() or dist.is_initialized() or not all(name in os.environ for name in _VARIABLES):
        yield True
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    try:
        store, rank, ranks = next(iter(dist.rendezvous("env://")))
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.PrefixStore("group", store), rank=rank, world_size=ranks)
    except (RuntimeError, ValueError) as error:
        raise FxgrowError(f"the ranks of the launcher do not find each other: {error}") from error
    try:
        yield rank == 0
        dist.destroy_process_group()
    except FxgrowError:
        try:
            said = store.add("fxgrow/said", 1) > 1
        except RuntimeError:  # it went with its rank
            said = False
        if said:
            raise SystemExit(2) from None
        raise


_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

__all__ = ["Parallel", "launched"]
