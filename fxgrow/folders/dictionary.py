"""Checkpoints that are one file of ``torch.save``: a table that holds weights, settings and an optimizer's state.

Where each of them stands is found by what it holds. Whatever else is in the table is kept as it is.
"""

from __future__ import annotations

import copy
import pickle
import shutil
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxgrow.errors import CheckpointError, DiskError, SpecError
from fxgrow.folders.archive import Later, records_of, save, sizes_in, tensors_in
from fxgrow.folders.building import build, maker_of, names_of, taken_by
from fxgrow.folders.optimizer import is_state
from fxgrow.folders.source import Source
from fxgrow.folders.tensorfile import Entry, disk_errors
from fxgrow.folders.writing import check_absent
from fxgrow.limits import bytes_in_words
from fxgrow.publish import replacing

#: where something stands in a table: keys, one inside the other
Place = tuple[Any, ...]
#: what torch.compile and DistributedDataParallel put before names
_WRAPPERS = ("_orig_mod.", "module.")
_DEPTH = 3
#: in the place of what is left out
LEFT_OUT = object()


@dataclass(frozen=True)
class Loaded(Entry):
    """A tensor of a file that was loaded."""

    tensor: torch.Tensor

    def ahead(self) -> None:
        """It is there."""

    def read(self, memory: torch.Tensor | None = None) -> torch.Tensor:
        """The tensor itself, where it lies."""
        return self.tensor


@dataclass
class Table:
    """What a file holds.

    Attributes:
        weights: places of tables of tensors, and what stands before all names in each.
        settings: places of tables of plain values.
        optimizers: places of optimizers' state dicts.
    """

    file: Path
    data: Any
    weights: dict[Place, str] = field(default_factory=dict)
    settings: list[Place] = field(default_factory=list)
    optimizers: list[Place] = field(default_factory=list)

    def at(self, place: Place) -> Any:
        """What stands at a place."""
        found = self.data
        for key in place:
            found = found[key]
        return found

    def called(self, place: Place) -> str:
        """A place in words."""
        return f"{self.file} [{']['.join(map(repr, place))}]"

    def tensors(self, place: Place) -> dict[str, Entry]:
        """The tensors at a place, by their names without wrappers'."""
        cut = len(self.weights[place])
        return {n[cut:]: Loaded(self.file, t.dtype, tuple(t.shape), 0, t) for n, t in self.at(place).items()}

    def kept(self, weights: Mapping[str, Entry]) -> list[str]:
        """Where tensors stand that are neither weights nor an optimizer's state."""
        grown = [p for p in self.weights if are_of(self.tensors(p), weights)] + self.optimizers
        rest = self.with_(dict.fromkeys(grown, LEFT_OUT))
        return [str(k) for k, v in rest.items() if any(t.dim() > 1 for t in tensors_in(v))]

    def with_(self, new: Mapping[Place, Any]) -> Any:
        """The data with others at some places, down to which tables are copied."""
        return _replaced(self.data, dict(new))

    def named(self, place: Place, tensors: Mapping[str, torch.Tensor]) -> Any:
        """A table of tensors of the kind that stands at a place, in its order, under its names."""
        before, old = self.weights[place], self.at(place)
        made = copy.copy(old)  # keeps what a state dict notes of modules' versions
        made.clear()
        order = {n: i for i, n in enumerate(old)}
        for name in sorted(tensors, key=lambda n: order.get(before + n, len(order))):
            made[before + name] = tensors[name]
        return made


def are_of(tensors: Mapping[str, Entry], weights: Mapping[str, Entry]) -> bool:
    """Whether tensors have the names and shapes of weights."""
    return {n: e.shape for n, e in tensors.items()} == {n: e.shape for n, e in weights.items()}


def is_table(file: Path) -> bool:
    """Whether a file was written by ``torch.save``, by its first bytes."""
    if not file.is_file():
        return False
    with file.open("rb") as opened:
        first = opened.read(2)
    return first == b"PK" or first == b"\x80\x02"


def load(file: Path) -> Any:
    """The data of a file of ``torch.save``; its tensors are read when they are needed, where the format allows.

    Raises:
        CheckpointError: it cannot be read, or holds more than tensors and plain data.
    """
    try:
        data = _loaded(file)
    except pickle.UnpicklingError as error:
        reason = str(error).strip().splitlines()
        said = next((line for line in reason if "Unsupported" in line or "GLOBAL" in line), reason[0] if reason else "")
        raise CheckpointError(
            f"{file} holds more than tensors and plain data, which is not loaded ({said.strip()[:200]}): save state "
            "dicts and settings as tables"
        ) from error
    except CheckpointError:
        raise
    except Exception as error:  # whatever damaged bytes make of a pickle
        said = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{file} is no file of torch.save, or was damaged: {type(error).__name__}: {said}"
        ) from error
    return data


def _loaded(file: Path) -> Any:
    """What ``torch.load`` makes of a file.

    Its tensors stay in the file where that is an archive of theirs and nothing else: without a copy, PyTorch does not
    look at what a record of the archive is, or how long.
    """
    how: dict[str, Any] = {"map_location": "cpu", "weights_only": True}
    if not zipfile.is_zipfile(file):
        return torch.load(file, **how)
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
    if any(e.compress_type != zipfile.ZIP_STORED for e in entries) or len({e.filename for e in entries}) < len(entries):
        raise CheckpointError(f"{file} has entries that are compressed or twice there, which torch.save writes never")
    data = torch.load(file, mmap=True, **how)
    if sorted(sizes_in(data)) == sorted(r.file_size for r in records_of(file)):
        return data
    return torch.load(file, mmap=False, **how)


def open_table(file: Path) -> Table:
    """Load a file, and find what it holds.

    Raises:
        CheckpointError: it has no weights, or no settings.
    """
    data = load(file)
    out = Table(file, data)
    if isinstance(data, Mapping):
        _find(data, (), out)
    if () in out.weights:
        raise CheckpointError(
            f"{file} is a table of tensors alone: beside the weights it has to hold the settings that the class is "
            "made from. Or write a folder with config.json and model.safetensors"
        )
    if not out.weights:
        raise CheckpointError(f"{file} holds no table of weights by name (a state dict)")
    if not out.settings:
        raise CheckpointError(f"{file} holds no table of settings that the class could be made from")
    return out


def _find(data: Mapping[Any, Any], place: Place, out: Table) -> None:
    if is_state(data):
        out.optimizers.append(place)
        return
    if data and all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in data.items()):
        if any(v.dim() for v in data.values()):
            out.weights[place] = _before(data)
        return
    plain = {k: v for k, v in data.items() if isinstance(k, str) and not isinstance(v, torch.Tensor)}
    if place and plain and len(plain) == len(data) and not any(_holds_tensors(v) for v in plain.values()):
        out.settings.append(place)
    if len(place) < _DEPTH:
        for key, value in data.items():
            if isinstance(value, Mapping):
                _find(value, (*place, key), out)
            elif isinstance(value, list):  # Lightning has a list of optimizers
                for number, item in enumerate(value):
                    if is_state(item):
                        out.optimizers.append((*place, key, number))


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_holds_tensors, value.values()))
    return any(map(_holds_tensors, value)) if isinstance(value, list | tuple) else isinstance(value, torch.Tensor)


def _before(names: Mapping[str, Any]) -> str:
    """What wrappers put before all names."""
    out = ""
    while found := next((w for w in _WRAPPERS if all(n.startswith(out + w) for n in names)), ""):
        out += found
    return out


def _replaced(data: Any, new: dict[Place, Any]) -> Any:
    if () in new:
        return new[()]
    if not new:
        return data
    made = copy.copy(data)
    for key in reversed({place[0]: None for place in new}):  # of a list, the last ones first
        inner = {place[1:]: value for place, value in new.items() if place[0] == key}
        if inner.get(()) is LEFT_OUT:
            del made[key]
        else:
            made[key] = _replaced(data[key], inner)
    return made


def source_of(table: Table, kind: type[nn.Module] | None) -> Source:
    """The weights and settings in a file, as a folder would have them.

    Raises:
        SpecError: the class is not named.
        CheckpointError: no class can be made of the settings that fits the weights.
    """
    if kind is None:
        raise SpecError(f"name the class that {table.file} is of: --class package.module:Class (model_class)")
    make = maker_of(table.file, {}, kind)
    problems: list[str] = []

    def fitting(settings: Mapping[str, Any]) -> list[Place]:
        out = []
        for place in table.weights:
            try:
                names_of(build(make, settings, {}, "settings"), table.tensors(place), table.called(place))
            except CheckpointError as error:
                problems.append(str(error))
            else:
                out.append(place)
        return out

    place = settings_of(table, taken_by(kind)[1], lambda given: bool(fitting(given)), problems)
    config = table.at(place)
    weights = fitting(config)
    source = Source(table.file, dict(config), table.tensors(weights[0]), called=table.called(place))
    known = {n: e.shape for n, e in source.tensors.items()}
    for other in set(table.weights) - set(weights):
        alike = next((n for n, e in table.tensors(other).items() if e.shape and known.get(n) == e.shape), None)
        if alike is not None:
            raise CheckpointError(
                f"{table.called(other)} has {alike} as the weights in {table.called(weights[0])} have, but not all of "
                "them: what is to become of it is not known. Take it out of the file"
            )
    return source


def settings_of(
    table: Table, known: set[str] | None, fits: Callable[[Mapping[str, Any]], bool], problems: list[str]
) -> Place:
    """The settings that the class is made from: most of its own, fewest others.

    Args:
        known: the settings that the class takes; None where it takes any.
        fits: whether the class made from settings has the weights' names and shapes.
        problems: why not, of those that were tried.

    Raises:
        CheckpointError: there are none, or several as good.
    """
    scores: dict[Place, tuple[int, int]] = {}
    for place in table.settings:
        given = table.at(place)
        mine = len(given) if known is None else len(known & set(given))
        if mine and fits(given):
            scores[place] = mine, mine - len(given)
    best = [place for place, score in scores.items() if score == max(scores.values())]
    if len(best) == 1:
        return best[0]
    if not best:
        tried = ", ".join(".".join(map(str, p)) for p in table.settings)
        raise CheckpointError(
            f"{table.file}: from none of its tables of settings ({tried}) a class is made that fits its weights: "
            f"{problems[0] if problems else 'they hold no setting that the class takes'}"
        )
    raise CheckpointError(
        f"{table.file}: {' and '.join(table.called(p) for p in best)} are both settings that the class can be made from"
    )


def check_room(out: Path, data: Any) -> None:
    """Refuse a file for which there is no room, or that is there already.

    Raises:
        DiskError: with what to do.
    """
    check_absent(out, "file")
    with disk_errors(str(out)):
        out.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(out.parent).free
    needed = sum(sizes_in(data))
    if needed > free:
        raise DiskError(f"{out} needs {bytes_in_words(needed)}, and {bytes_in_words(free)} are free there")


def write(out: Path, data: Any, later: Later) -> None:
    """Write data as ``torch.save`` does, a tensor at a time; the file appears whole.

    Raises:
        DiskError: it cannot be written; nothing is left over.
    """
    try:
        with disk_errors(str(out)), replacing(out) as part:
            save(part, data, later)
    except RuntimeError as error:  # of torch's own writer
        if isinstance(error, DiskError):
            raise
        raise DiskError(f"{out} cannot be written: {str(error).splitlines()[0]}") from error
