"""Ranks that run one task together: which of them takes which micro-batch, and how their gradients become one.

The micro-batches of an optimizer step are numbered as in a run on one rank, and go around: number i to rank i modulo
the number of ranks. Each is drawn by its own generator, and what is random in it has a seed of its own, so that a step
computes the same on any number of ranks, up to the order of sums. ``DistributedDataParallel`` averages the gradients
of copies of the model, :class:`Parallel`; or ``fully_shard`` those of shards, :class:`Sharded`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fxgrow.errors import FxgrowError, RankError, SpecError
from fxgrow.ir.fsdp import mesh_of_all, wrappings_of
from fxgrow.ranks import ALONE, Group, agree_by_name, answering, size
from fxgrow.training.task import Task


@dataclass(frozen=True)
class Parallel:
    """This rank among those that run a task; one alone where ``torch.distributed`` is not initialised.

    Attributes:
        options: for ``DistributedDataParallel``.
    """

    rank: int = 0
    ranks: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def here(task: Task) -> Parallel:
        """This process as it was started.

        Raises:
            SpecError: the task grows no model in place, and ranks are to hold shards of it.
        """
        if size() == 1:
            return Parallel()
        if task.hyper.parallel == "ddp":
            return Parallel(dist.get_rank(), size(), task.ddp)
        if not task.in_place:
            raise SpecError(
                "in_place=False makes a new model, which no rank has room for: parallel=fsdp grows in place"
            )
        return Sharded(dist.get_rank(), size(), shard=task.shard)

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

    def take(self, model: nn.Module, device: str) -> None:
        """Make a model what this rank holds of it, before it has an optimizer."""

    def turns(self, count: int) -> list[tuple[int, bool]]:
        """Which of so many micro-batches this rank runs, in their order, and whether each counts."""
        return [(number, True) for number in range(self.rank, count, self.ranks)]

    @contextlib.contextmanager
    def abreast(self, what: str) -> Iterator[None]:
        """Around a part of the loop in which every rank runs the model as often as the others."""
        yield

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


@dataclass(frozen=True)
class Sharded(Parallel):
    """A rank that holds shards of the model, and gathers the parameters of a block when it runs it.

    So no rank runs the model alone: one that has fewer micro-batches than others runs one again, which does not count.

    Attributes:
        shard: calls ``fully_shard``, given the model and the mesh of all ranks.
    """

    shard: Callable[[nn.Module, Any], Any] | None = None

    def take(self, model: nn.Module, device: str) -> None:
        """Shard a model; all ranks begin with the first one's weights and buffers.

        Raises:
            SpecError: ``fully_shard`` does not take it, or gradients of some parameter would not be those of all ranks.
        """
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        agree_by_name("the model's", {n: [*t.shape, str(t.dtype)] for n, t in tensors.items()})
        with answering(), torch.no_grad():
            for tensor in tensors.values():
                dist.broadcast(tensor, 0)
        before = _places(model)
        assert self.shard is not None
        try:
            self.shard(model, mesh_of_all(torch.device(device).type, self.ranks))
        except (ValueError, TypeError, NotImplementedError, AssertionError) as error:
            raise SpecError(f"fully_shard does not take the task's model, or its shard= does not: {error}") from error
        parted = [names for names in before if names not in _places(model)]
        if parted:
            raise SpecError(
                f"{' and '.join(parted[0])} are one parameter, and sharded apart: give the task a shard= in which one "
                "call of fully_shard has all of them"
            )
        managed = {n: (w, m) for w in wrappings_of(model) for n, m in w.parameters.items()}
        for name, p in model.named_parameters():
            if name not in managed:
                if p.is_floating_point():
                    raise SpecError(f"the task's shard= leaves {name} to each rank, whose gradients would be its own")
            elif managed[name][0].options["mesh"].size() != self.ranks or managed[name][1].mesh is not None:
                raise SpecError(
                    f"the task's shard= does not shard {name} by fully_shard over all {self.ranks} ranks, each of "
                    "which has micro-batches of its own"
                )

    def turns(self, count: int) -> list[tuple[int, bool]]:
        """As many on every rank."""
        own = super().turns(count)
        again = own[-1][0] if own else 0
        return own + [(again, False)] * (-(-count // self.ranks) - len(own))

    def shared_by_all(self, model: nn.Module) -> nn.Module:
        """The model itself."""
        return model

    def gathering(self, model: nn.Module, last: bool) -> contextlib.AbstractContextManager[None]:
        """Gradients are reduced to shards at once, which wait; buffers are the first rank's, as under DDP."""
        if last:
            self.same_buffers(model)
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def abreast(self, what: str) -> Iterator[None]:
        """A rank that fails ends: the others wait in an operation of the model's, where it cannot meet them.

        Raises:
            RankError: it failed, or another rank has ended.
        """
        try:
            with answering():
                yield
        except RankError:
            raise
        except Exception as error:
            raise RankError(f"{what}: rank {self.rank} of {self.ranks} failed: {error}") from error


def _places(model: nn.Module) -> list[list[str]]:
    """The names of each parameter."""
    names: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    return list(names.values())


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

__all__ = ["Parallel", "Sharded", "launched"]
