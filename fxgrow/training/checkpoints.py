"""Checkpoints of a run: model, optimizer, schedule and random numbers, so that it goes on as if nothing had been."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from torch import Tensor, nn

from fxgrow.checkpoint import mapped_tensors
from fxgrow.errors import CheckpointError, DiskError
from fxgrow.ir.dtensors import is_sharded
from fxgrow.ir.packing import pack, unpack
from fxgrow.optim.rates import all_rates
from fxgrow.publish import clean, create, replacing
from fxgrow.ranks import ALONE, Group
from fxgrow.reading import first_problem, read_json, read_text
from fxgrow.training.copies import Copies
from fxgrow.training.optimizer_state import check_optimizer_state, placed
from fxgrow.training.run import Run
from fxgrow.training.tensors import in_order, laid_as, wholes, write
from fxgrow.version import __version__


def save(run: Run, group: Group = ALONE, *, first: bool = True) -> Path | None:
    """Write a checkpoint of ``run`` and make it the newest; a crash at any moment leaves a complete one behind.

    Tensors are written one after the other, and where ranks hold shards of them, each is gathered for that.

    Args:
        group: the ranks that train it, all of which call.
        first: whether this one writes; the others give their shards.

    Returns:
        The checkpoint's folder; None where another rank writes it.

    Raises:
        DiskError: it cannot be written; the newest is the one before.
        RankError: another rank has ended.
    """
    state, files = _pictured(run)
    values = wholes((t for tensors in files.values() for t in tensors.values()), group, first)
    try:
        return _written(run, state, files, values) if first else None
    except (OSError, SafetensorError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise DiskError(f"the checkpoint after {run.step} steps cannot be written in {run.out}: {error}") from error
    finally:
        for _ in values:  # the other ranks give all of theirs, whatever has become of this one
            pass


def _pictured(run: Run) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """What a checkpoint holds: plain data, and the tensors of each file; the same names and shapes on every rank."""
    own = run.model.state_dict(keep_vars=True)
    aliases = ties(own)
    optimizer_tensors: dict[str, Tensor] = {"rng.cpu": torch.get_rng_state()}
    if torch.device(run.task.hyper.device).type == "cuda":
        optimizer_tensors["rng.cuda"] = torch.cuda.get_rng_state()
    state = {
        "format": 3,
        "fxgrow": __version__,
        "task": run.task.name,
        **{name: getattr(run, name) for name in _COUNTERS},
        "val_loss": None if math.isnan(run.val_loss) else run.val_loss,
        "scheduler": run.scheduler.state_dict(),
        "copies": run.copies.packed(optimizer_tensors),
        "original": run.original,
        "aliases": aliases,
        "optimizer": pack(_optimizer_states(run), "optimizer", optimizer_tensors),
        "hyper": asdict(run.task.hyper),
    }
    model_tensors = {name: tensor for name, tensor in own.items() if name not in aliases}
    return state, {_MODEL: in_order(model_tensors), _OPTIMIZER: in_order(optimizer_tensors)}


def _written(
    run: Run, state: dict[str, Any], files: Mapping[str, Mapping[str, Tensor]], values: Iterator[Tensor]
) -> Path:
    folder = run.out / "checkpoints"
    folder.mkdir(exist_ok=True)
    clean(folder)
    number = 0
    while (target := folder / f"step-{run.step:08d}.{number}").exists():
        number += 1

    def write_all(place: Callable[[str], Path]) -> None:
        for name, tensors in files.items():
            write(place(name), tensors, values)
        place(_STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")

    if not create(target, [*files, _STATE], write_all):
        raise CheckpointError(f"{target} has appeared meanwhile: another run writes into this folder")
    with replacing(folder / "latest") as pointer:
        pointer.write_text(target.name, encoding="utf-8")
    kept = sorted(folder.glob("step-*"), key=lambda path: path.stat().st_mtime_ns)
    for old in kept[: -run.task.hyper.keep_checkpoints]:
        shutil.rmtree(old)
    return target


_MODEL, _OPTIMIZER, _STATE = "model.safetensors", "optimizer.safetensors", "state.json"
_COUNTERS = (
    *("step", "batches", "tokens", "flops", "flops_per_batch", "seconds", "loss_sum", "losses"),
    *("evaluated", "ended", "log_lines", "sown"),
)


class _Saved(BaseModel):
    """What ``state.json`` holds."""

    model_config = ConfigDict(extra="forbid")
    format: Literal[2, 3]
    fxgrow: str
    task: str
    step: int = Field(ge=0)
    batches: int = Field(ge=0)
    tokens: int = Field(ge=0)
    flops: int = Field(ge=0)
    flops_per_batch: int = Field(ge=0)
    seconds: float = Field(ge=0)
    loss_sum: float
    losses: int = Field(ge=0)
    evaluated: int = Field(-1, ge=-1)
    ended: bool = False
    log_lines: int | None = Field(None, ge=0)
    sown: bool = False
    val_loss: float | None
    scheduler: dict[str, Any]
    copies: dict[str, Any] = Field(default_factory=lambda: {"pairs": [], "zeros": []})
    original: dict[str, list[int]]
    aliases: dict[str, str]
    optimizer: Any
    hyper: dict[str, Any]


def restore(run: Run) -> None:
    """Bring a fresh ``run`` to its newest checkpoint: replay what was done, then load every tensor, strictly.

    Where ranks hold shards of the model, each reads its own, however many ranks there were when it was saved.

    Raises:
        CheckpointError: something is missing, superfluous, or of another shape or dtype. The run is not usable then.
        SpecError: the schedule's past is not this run's.
    """
    path = run.out / "checkpoints" / newest(run.out)
    state = _read_state(path / _STATE)
    model_tensors, optimizer_tensors = mapped_tensors(path / _MODEL), mapped_tensors(path / _OPTIMIZER)
    compare(state.original, run.original, f"checkpoint {path}: the original model")
    run.scheduler.load_state_dict(state.scheduler)
    run.model, optimizer = run.scheduler.replay(run.model, run.optimizer)
    assert optimizer is not None
    run.optimizer = optimizer
    run.model.train()
    load_model(run.model, model_tensors, state.aliases, f"checkpoint {path}: the model")
    try:
        saved = unpack(state.optimizer, optimizer_tensors, f"checkpoint {path}: the optimizer's state")
        _load_optimizers(run, saved)
        run.copies = Copies.unpacked(state.copies, optimizer_tensors, torch.device(run.task.hyper.device))
        _set_random_state(optimizer_tensors)
    except (KeyError, ValueError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        raise CheckpointError(f"checkpoint {path}: the optimizer's state does not fit: {error}") from error
    for name in _COUNTERS:
        setattr(run, name, getattr(state, name))
    run.val_loss = math.nan if state.val_loss is None else state.val_loss


def _optimizer_states(run: Run) -> dict[str, Any] | list[dict[str, Any]]:
    """Of the one optimizer, or of each in their order."""
    if isinstance(run.optimizer, list):
        return [optimizer.state_dict() for optimizer in run.optimizer]
    return run.optimizer.state_dict()


def _load_optimizers(run: Run, saved: Any) -> None:
    """The inverse of :func:`_optimizer_states`.

    Raises:
        ValueError: the states are not those of this run's optimizers.
    """
    states = saved if isinstance(run.optimizer, list) else [saved]
    if not isinstance(states, list) or len(states) != len(run.optimizers):
        raise ValueError(f"this run has {len(run.optimizers)} optimizers, and it has not")
    for state, optimizer in zip(states, run.optimizers, strict=True):
        check_optimizer_state(state, optimizer)
        optimizer.load_state_dict({**state, "state": placed(state, optimizer)})
        all_rates(optimizer)  # reads what stands in the groups


def newest(out: Path) -> str:
    """The name of a run's newest checkpoint.

    Raises:
        CheckpointError: it is not named, or not by a checkpoint's name.
    """
    latest = out / "checkpoints" / "latest"
    name = read_text(latest, 1000, CheckpointError).strip()
    if not re.fullmatch(r"step-\d+\.\d+", name):
        raise CheckpointError(f"{latest} does not name a checkpoint: {name[:80]!r}")
    return name


def _read_state(file: Path) -> _Saved:
    data = read_json(file, finite=False)
    if not isinstance(data, dict) or data.get("format") not in (2, 3):
        found = data.get("format") if isinstance(data, dict) else None
        raise CheckpointError(f"checkpoint {file.parent} has format {repr(found)[:40]}; this version reads 3")
    try:
        return _Saved.model_validate(data)
    except ValidationError as error:
        raise CheckpointError(f"{file} is damaged: {first_problem(error)}") from error


def _set_random_state(tensors: Mapping[str, Tensor]) -> None:
    saved, own = tensors["rng.cpu"], torch.get_rng_state()
    if saved.dtype != own.dtype or saved.shape != own.shape:
        raise ValueError("the state of the random generator is of another PyTorch")
    torch.set_rng_state(saved)
    if "rng.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng.cuda"])


def untied(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors as safetensors wants them, each once; and for the other names of tied ones, whose alias they are."""
    aliases = ties(tensors)
    contiguous = torch.contiguous_format
    kept = {n: t.detach().cpu().clone(memory_format=contiguous) for n, t in tensors.items() if n not in aliases}
    return kept, aliases


def ties(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Of tensors that are one, all names but the first, and that one."""
    seen: dict[Any, str] = {}
    aliases: dict[str, str] = {}
    for name, tensor in tensors.items():
        key: Any = id(tensor)  # the same on every rank, as memory is not: a rank's shard may be empty
        if not is_sharded(tensor):
            key = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tuple(tensor.shape), tensor.stride())
        owner = seen.setdefault(key, name) if tensor.numel() else name
        if owner != name:
            aliases[name] = owner
    return aliases


def load_model(model: nn.Module, tensors: Mapping[str, Tensor], aliases: Mapping[str, str], what: str) -> None:
    """Copy ``tensors`` into ``model``; names, shapes and dtypes must all be its own."""
    every = {**tensors, **{name: tensors[owner] for name, owner in aliases.items() if owner in tensors}}
    own = model.state_dict()
    compare(
        {name: [*tensor.shape, str(tensor.dtype)] for name, tensor in every.items()},
        {name: [*tensor.shape, str(tensor.dtype)] for name, tensor in own.items()},
        what,
    )
    sharded = {name: laid_as(every[name], tensor) for name, tensor in own.items() if is_sharded(tensor)}
    model.load_state_dict({**every, **sharded}, strict=True)


def compare(saved: Mapping[str, Any], own: Mapping[str, Any], what: str) -> None:
    """Raise unless both say the same of the same names."""
    mistakes = [f"{name} is missing in the checkpoint" for name in own if name not in saved]
    mistakes += [f"{name} is not in the model" for name in saved if name not in own]
    for name in own:
        if name in saved and saved[name] != own[name]:
            mistakes.append(f"{name} is {saved[name]} in the checkpoint, {own[name]} in the model")
    if mistakes:
        more = f"; and {len(mistakes) - 5} more" if len(mistakes) > 5 else ""
        raise CheckpointError(f"{what} does not match: {'; '.join(mistakes[:5])}{more}")
