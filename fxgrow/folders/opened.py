"""A folder that was opened: its class, made without memory for weights, and its weights by the names of the class."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Executor, Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxgrow.errors import CheckpointError
from fxgrow.folders.building import Make, build, example_of, maker_of, names_of, prefixes_of
from fxgrow.folders.conversions import Conversions, Stored
from fxgrow.folders.dictionary import Table, open_table, source_of
from fxgrow.folders.source import Source, open_folder
from fxgrow.folders.tensorfile import Entry
from fxgrow.ir.traced import Traced
from fxgrow.program import Program, capture
from fxgrow.trace.foreign import without_values

#: tensors that are read in vain before nothing is read ahead any more
_MISSES = 8


@dataclass
class Opened:
    """What a folder holds.

    Attributes:
        source: its config, and where the tensors are.
        make: makes the class from settings.
        model: the class as its config says, in eval mode; nobody has written its parameters.
        conversions: of the class's library, and the tensors by the names that it gives those in the files.
        names: the model's name for each of these.
        ignored: names in the files that the class says it has no place for.
        inputs: example inputs by name.
        table: the file, where it is one and no folder.
    """

    source: Source
    make: Make
    model: nn.Module
    conversions: Conversions
    names: dict[str, str]
    ignored: list[str]
    inputs: dict[str, Any]
    table: Table | None = None

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Of the stored tensors by the model's names."""
        return {m: self.conversions.tensors[n].dtype for n, m in self.names.items()}

    def again(self) -> nn.Module:
        """The class made anew: the model may have been grown meanwhile."""
        return build(self.make, self.source.config, self.dtypes, self.source.called)

    @without_values()
    def capture(self) -> Program:
        return capture(self.model, (), self.inputs)

    def reader(self, program: Traced) -> Reader:
        """Reads the tensors of the model's trace."""
        return Reader(program, {m: self.conversions.tensors[n] for n, m in self.names.items()})

    def load(self) -> nn.Module:
        """The model, its weights read into memory."""
        with torch.no_grad():
            own = self.model.state_dict(keep_vars=True)
            for file, name in self.names.items():
                own[name].copy_(self.conversions.tensors[file].read())
        return self.model


def opened(
    folder: str | Path, model_class: type[nn.Module] | None = None, inputs: Mapping[str, Any] | None = None
) -> Opened:
    """Open a folder, or a file of ``torch.save`` with weights and settings.

    Args:
        model_class: None for the class of transformers that the config names.
        inputs: example inputs by name; made from signature and config if None.

    Raises:
        CheckpointError: the folder or its class is damaged, or they do not fit each other.
        SpecError: no example is known.
    """
    folder = Path(folder)
    table = open_table(folder) if folder.is_file() else None
    source = open_folder(folder) if table is None else source_of(table, model_class)
    make = maker_of(folder, source.config, model_class)
    dtypes = {n: e.dtype for n, e in source.tensors.items()}
    model = build(make, source.config, dtypes, source.called)
    own = model.state_dict(keep_vars=True)
    fits = lambda n: any(named(n) in own for named in prefixes_of(model))  # noqa: E731
    conversions = Conversions(model if table is None else None, source.tensors, fits)
    names, ignored = names_of(model, conversions.tensors, str(folder))
    dtypes = {m: conversions.tensors[n].dtype for n, m in names.items()}
    model = build(make, source.config, dtypes, source.called)
    _check_tied(model, names, conversions.tensors, str(folder))
    given = example_of(model) if inputs is None else dict(inputs)
    return Opened(source, make, model, conversions, names, ignored, given, table)


def _check_tied(model: nn.Module, names: Mapping[str, str], stored: Mapping[str, Stored], where: str) -> None:
    """See to it that what the class ties is one tensor in the files, too, where they hold it under several names.

    Raises:
        CheckpointError: the values differ, and which of them the class is left with is a matter of order.
    """
    own = model.state_dict(keep_vars=True)
    first: dict[int, str] = {}
    for file, name in names.items():
        other = first.setdefault(id(own[name]), file)
        if other != file and not torch.equal(stored[other].read(), stored[file].read()):
            raise CheckpointError(
                f"{where} holds other values as {file} than as {other}, which {type(model).__name__} ties: take out "
                "the one that is not meant, or save the model again"
            )


class Reader:
    """A traced model's tensors by name: weights from their files, anything else as the class computes it."""

    def __init__(self, program: Traced, stored: Mapping[str, Stored]) -> None:
        self.program = program
        self.stored = {program.aliases.get(n, n): e for n, e in stored.items()}
        self._last: tuple[str, torch.Tensor] | None = None

    def __call__(self, name: str) -> torch.Tensor:
        name = self.program.aliases.get(name, name)
        if name not in self.stored:
            return self.program.tensor(name)
        if self._last is None or self._last[0] != name:
            self._last = None  # one at a time
            self._last = name, self.stored[name].read()
        return self._last[1]

    def entry(self, name: str) -> tuple[str, Entry | None]:
        """A tensor's name, where it has several, and its place in the files if it is one of them as it is there."""
        name = self.program.aliases.get(name, name)
        found = self.stored.get(name)
        return name, found if isinstance(found, Entry) else None

    def table(self, known: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A dict of some of the program's tensors that reads those in files when they are asked for."""
        return _Table(known, self)


class _Table(dict[str, torch.Tensor]):
    def __init__(self, known: Mapping[str, torch.Tensor], reader: Reader) -> None:
        super().__init__(known)
        self._reader = reader

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._reader(name)


class Ahead:
    """Tensors that are asked for one after the other: while one is looked at, the next one is read.

    They are read into the same memory again and again, which takes a third of the time of memory that nobody touched.

    Args:
        thread: reads.
    """

    def __init__(self, reader: Reader, thread: Executor) -> None:
        self._reader, self._thread = reader, thread
        self._free: list[torch.Tensor] = []
        self._held: tuple[str, torch.Tensor, torch.Tensor] | None = None
        self._coming: tuple[str, Future[torch.Tensor], torch.Tensor] | None = None
        self._missed = 0

    def __call__(self, name: str) -> torch.Tensor:
        """A tensor, which is good until another is asked for."""
        name, entry = self._reader.entry(name)
        if entry is None:
            return self._reader(name)
        if self._held is not None and self._held[0] == name:
            return self._held[1]
        if self._held is not None:
            self._free.append(self._held[2])
            self._held = None
        coming, self._coming = self._coming, None
        if coming is not None and coming[0] != name:  # what is asked for comes in another order
            wait([coming[1]])
            self._free.append(coming[2])
            self._missed += 1
            coming = None
        memory = self._memory(entry) if coming is None else coming[2]
        found = entry.read(memory) if coming is None else coming[1].result()
        self._held = name, found, memory
        return found

    def begin(self, name: str) -> None:
        """Read the one that is asked for next, if none is on its way."""
        name, entry = self._reader.entry(name)
        held = self._held is not None and self._held[0] == name
        if entry is not None and self._coming is None and not held and self._missed <= _MISSES:
            memory = self._memory(entry)
            self._coming = name, self._thread.submit(entry.read, memory), memory

    def _memory(self, entry: Entry) -> torch.Tensor:
        known = self._free.pop() if self._free else None
        fits = known is not None and known.numel() >= entry.bytes
        return known if known is not None and fits else torch.empty(entry.bytes, dtype=torch.uint8)
