"""What is trained: a task, and what its callables are unless it says otherwise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fxgrow.compile import blocks_of
from fxgrow.errors import SpecError
from fxgrow.ir.fsdp import shard_parts
from fxgrow.training.hyper import Hyper

Batch = tuple[Any, ...]
Kind = TypeVar("Kind")


def adamw(model: nn.Module, hyper: Hyper) -> torch.optim.Optimizer:
    """AdamW with weight decay on matrices and embeddings only, as in nanoGPT."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": hyper.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=hyper.learning_rate, betas=hyper.betas)


def model_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The mean loss of a model that computes it itself and returns it alone, last in a tuple, or under ``loss``."""
    output = model(*batch)
    if isinstance(output, Mapping):
        output = output["loss"]
    elif isinstance(output, list | tuple):
        output = output[-1]
    return output


def whole_batch(batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs for the compiler: the batch as positional arguments."""
    return batch, {}


def first_numel(batch: Batch) -> int:
    """Tokens in a batch: the elements of its first tensor."""
    return int(batch[0].numel())


def shard_blocks(model: nn.Module, mesh: Any) -> None:
    """``fully_shard`` each block of the model's stacks, as :func:`fxgrow.compile_regions` compiles them, and the rest.

    A block that has a parameter in common with something outside of it goes with the rest.
    """
    blocks = [block for _, block in blocks_of(model)]
    users: dict[int, int] = {}
    for module in model.modules():
        for p in module.parameters(recurse=False):
            users[id(p)] = users.get(id(p), 0) + 1

    def apart(block: nn.Module) -> bool:
        inside = [id(p) for m in block.modules() for p in m.parameters(recurse=False)]
        return bool(inside) and all(users[i] == inside.count(i) for i in inside)

    shard_parts(model, filter(apart, blocks), mesh)


@dataclass
class Task:
    """What to train. Every callable is a plain function, so a task is written in one screenful."""

    model: nn.Module
    batches: Callable[..., Batch]
    """``batches(split, generator)`` draws one micro-batch of ``"train"`` or ``"val"``, a tuple of CPU tensors. It must
    depend on the generator alone: that is what makes a resumed run equal to an uninterrupted one. Where the task has a
    ``batch_size`` or a ``sequence_length``, it is also passed the one of the moment, by that name."""
    hyper: Hyper = field(default_factory=Hyper)
    schedule: Any = None
    """Anything :meth:`fxgrow.schedule.Schedule.parse` takes."""
    loss: Callable[[nn.Module, Batch], Tensor] = model_loss
    """``loss(model, batch)``: the micro-batch's mean loss, a scalar."""
    example: Callable[[Batch], tuple[tuple[Any, ...], dict[str, Any]]] = whole_batch
    """``example(batch)``: the arguments the model is captured with; a batch of at least 2."""
    calls: Callable[[Batch], Mapping[str, Any]] | None = None
    """``calls(batch)``: further ways of calling the model, by name, see :func:`fxgrow.grow`; to sample from it, say."""
    optimizer: Callable[[nn.Module, Hyper], torch.optim.Optimizer | list[torch.optim.Optimizer]] = adamw
    """``optimizer(model, hyper)``: one, or a list of several, each for some of the parameters. The loop sets the rate
    of every group at every step; a group that is to have another has an ``lr_scale``, a factor."""
    tokens: Callable[[Batch], int] = first_numel
    epoch_tokens: int | None = None
    """Tokens in one pass over the data; needed for ``epoch`` triggers only."""
    batch_size: int | None = None
    """Examples of a micro-batch at the start, where a schedule is to change them."""
    sequence_length: int | None = None
    """The length of sequences at the start, where a schedule is to change it."""
    in_place: bool = True
    """Grow the model itself; False for a class that cannot compute what it grows to: see :class:`GrowthScheduler`."""
    verify: Any = "auto"
    """Passed to :func:`fxgrow.grow`."""
    ddp: Mapping[str, Any] = field(default_factory=dict)
    """Over several ranks: options of ``DistributedDataParallel``, such as ``find_unused_parameters``."""
    shard: Callable[[nn.Module, Any], Any] = shard_blocks
    """Over several ranks with ``parallel: fsdp``: ``shard(model, mesh)`` calls ``fully_shard``, for the model itself
    last; ``mesh`` is the one of all ranks."""
    name: str = "run"


def checked(value: Any, kind: type[Kind], what: str) -> Kind:
    """What a task gives, which is of a kind.

    Raises:
        SpecError: it is of another.
    """
    if not isinstance(value, kind):
        raise SpecError(f"the task's {what} is of type {type(value).__name__}, not {kind.__name__}")
    return value


def loss_of(task: Task, model: nn.Module, batch: Batch) -> Tensor:
    """A micro-batch's loss.

    Raises:
        SpecError: it is no single number.
    """
    loss = checked(task.loss(model, batch), Tensor, "loss(model, batch)")
    if loss.numel() != 1:
        raise SpecError(
            f"the task's loss(model, batch) has the shape {list(loss.shape)}: it is to be one number, a mean"
        )
    return loss
