"""What a folder holds for training to go on: optimizers' states, and what transformers' Trainer notes of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fxgrow.errors import CheckpointError
from fxgrow.folders import dictionary
from fxgrow.folders.tensorfile import disk_errors, entries
from fxgrow.ir.packing import unpack
from fxgrow.reading import read_json

#: as transformers' Trainer and accelerate call it
_STATES = ("optimizer.pt", "optimizer.bin")
#: states that are in parts, each of a process
_IN_PARTS = ("global_step*", "optimizer_[0-9]*", "pytorch_model_fsdp*", "optimizer.pt_*", "rank*-of-*-optimizer.pt")
_NOTES = "trainer_state.json"


def states_in(folder: Path) -> list[Path]:
    """The files of optimizers' states in a folder.

    Raises:
        CheckpointError: there are some that were divided among processes.
    """
    for pattern in _IN_PARTS:
        for found in sorted(folder.glob(pattern)):
            raise CheckpointError(
                f"{found} is the state of an optimizer in parts, which are not grown: make one state dict of them, or "
                "leave the optimizer out (--no-optimizer)"
            )
    return [folder / name for name in _STATES if (folder / name).is_file()]


def parts_in(folder: Path) -> set[Path]:
    """All files of optimizers' states, whatever they are like."""
    places = [folder / name for name in _STATES] + [f for p in _IN_PARTS for f in folder.glob(p)]
    return {f for place in places for f in (place.rglob("*") if place.is_dir() else [place]) if f.is_file()}


def is_of_trainer(folder: Path) -> bool:
    """Whether transformers' Trainer wrote a folder."""
    return (folder / _NOTES).is_file()


def state_of(file: Path) -> Any:
    """An optimizer's state dict: of ``torch.save``, or as :mod:`fxgrow.training` keeps it.

    Raises:
        CheckpointError: it cannot be read.
    """
    if not file.is_file():
        raise CheckpointError(f"{file} is not a file")
    if file.suffix != ".safetensors":
        return dictionary.load(file)
    beside = file.with_name("state.json")
    if not beside.is_file():
        raise CheckpointError(f"{file} has tensors alone; {beside.name}, which says what they are, is not beside it")
    packed = read_json(beside, finite=False)
    if not isinstance(packed, dict) or "optimizer" not in packed:
        raise CheckpointError(f"{beside} holds no optimizer's state")
    return unpack(packed["optimizer"], {n: e.read() for n, e in entries(file)[0].items()}, str(beside))


def place_of(file: Path, folder: Path) -> Path:
    """Where a grown state goes in the new folder: a file of ``torch.save``."""
    place = file.relative_to(folder) if file.is_relative_to(folder) else Path(file.name)
    return place.with_suffix(".pt") if place.suffix == ".safetensors" else place


def without_the_best(folder: Path) -> str | None:
    """A Trainer's notes without what the small model's best checkpoint is; None where there are none, or name none.

    At the end of a run it is loaded into the model, whose blocks may have other numbers by now.

    Raises:
        CheckpointError: they cannot be read.
    """
    file = folder / _NOTES
    if not file.is_file():
        return None
    notes = read_json(file, finite=False)
    if not isinstance(notes, dict):
        raise CheckpointError(f"{file} is no table of a Trainer's notes: remove it, or put the right one there")
    best = ("best_metric", "best_model_checkpoint", "best_global_step")
    if all(notes.get(key) is None for key in best):
        return None
    return json.dumps(notes | {key: None for key in best if key in notes}, indent=2, sort_keys=True) + "\n"


def write_notes(folder: Path, text: str) -> list[str]:
    """Write a Trainer's notes into a folder; returns what is to be said of it."""
    with disk_errors(str(folder / _NOTES)):
        (folder / _NOTES).write_text(text, encoding="utf-8")
    return [f"{_NOTES} names no best checkpoint any more: it is of the small model"]
