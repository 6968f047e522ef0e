"""What a library converts between the files and its class: transformers renames, and merges the experts of a layer.

Its own functions do it here too, a group of tensors at a time: those of the files that make one or several tensors of
the model together. What they make of the files is read; what they would save of the grown class is written, if that
is how the files are, and if reading it again gives the same bits.
"""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from fxgrow.errors import CheckpointError, GrowthRefused
from fxgrow.folders.tensorfile import Entry
from fxgrow.folders.writing import Target

Tensors = Mapping[str, torch.Tensor]


class Stored(Protocol):
    """A tensor that can be read from files."""

    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    def read(self) -> torch.Tensor: ...


@dataclass
class Group:
    """Tensors of files that make tensors of a model together.

    Attributes:
        files: names there.
        own: what they make, without values.
        make: from the ones to the others; None where one tensor has another name, or not even that.
    """

    files: list[str]
    own: dict[str, torch.Tensor]
    make: Callable[[Tensors], dict[str, torch.Tensor]] | None = None
    _held: dict[str, torch.Tensor] = field(default_factory=dict)

    def read(self, name: str, entries: Mapping[str, Entry]) -> torch.Tensor:
        """One of the model's tensors; the others of the group wait to be asked for."""
        assert self.make is not None
        if name not in self._held:
            self._held = self.make({n: entries[n].read() for n in self.files})
        return self._held.pop(name).contiguous()


@dataclass(frozen=True)
class Joined:
    """A tensor of a model that its group makes of the files' tensors."""

    name: str
    group: Group
    entries: Mapping[str, Entry]

    @property
    def dtype(self) -> torch.dtype:
        return self.group.own[self.name].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.group.own[self.name].shape)

    def read(self) -> torch.Tensor:
        return self.group.read(self.name, self.entries)


class Conversions:
    """A model's library's conversions; none where it has none.

    Args:
        model: None where the files have the class's own names.
        fits: whether the model has a tensor of a name, but for a prefix.

    Raises:
        CheckpointError: the library cannot convert these files.
    """

    def __init__(self, model: nn.Module | None, entries: Mapping[str, Entry], fits: Callable[[str], bool]) -> None:
        self._fits, self._entries = fits, entries
        there = {n: torch.empty(e.shape, dtype=e.dtype, device="meta") for n, e in entries.items()}
        groups = _groups(model, there, fits)
        #: what the files hold, by the names that the library gives it
        self.tensors: dict[str, Stored] = {}
        for group in groups:
            for name in group.own:
                self.tensors[name] = Joined(name, group, entries) if group.make else entries[group.files[0]]
        #: whether anything is converted, or has another name
        self.any = any(group.make or group.files != list(group.own) for group in groups)
        own = {n: t for group in groups for n, t in group.own.items()}
        self._undone = self.any and _alike(_undo(model, own), there)

    def written(self, model: nn.Module, targets: Sequence[Target]) -> tuple[list[Target], dict[str, Group]]:
        """What is written where the class has ``targets``, and the groups by the names in the files.

        Raises:
            GrowthRefused: what would be read of it is something else.
        """
        if not self.any:
            return list(targets), {}
        own = {t.name: torch.empty(t.shape, dtype=t.dtype, device="meta") for t in targets}
        files = _undo(model, own) if self._undone else own
        fits = lambda n: n in own or self._fits(n)  # noqa: E731
        groups = _groups(model, files, fits)
        if not _alike({n: t for g in groups for n, t in g.own.items()}, own):
            raise GrowthRefused(
                f"transformers reads the files of {type(model).__name__} under other names than it would write "
                "the grown ones under: save the model under its class's names (save_original_format=False) first"
            )
        of = {name: group for group in groups for name in group.own}
        place = {t.name: i for i, t in enumerate(targets)}
        ordered = sorted({id(g): g for g in of.values()}.values(), key=lambda g: min(place[n] for n in g.own))
        found = [Target(n, files[n].dtype, tuple(files[n].shape)) for g in ordered for n in g.files]
        return found, {n: g for g in ordered for n in g.files}

    def split(self, model: nn.Module, group: Group, own: Tensors) -> dict[str, torch.Tensor]:
        """The files' tensors of a group, from the model's.

        Raises:
            GrowthRefused: reading them would give something else.
        """
        files = _undo(model, own) if self._undone else dict(own)
        again = group.make(files) if group.make else own
        if set(files) != set(group.files) or not all(torch.equal(again[n], t) for n, t in own.items()):
            raise GrowthRefused(f"transformers does not read {group.files[0]} back as it saves it")
        return files


def _alike(one: Tensors, other: Tensors) -> bool:
    """Whether two tables have the same names, shapes and dtypes."""
    return {n: (t.shape, t.dtype) for n, t in one.items()} == {n: (t.shape, t.dtype) for n, t in other.items()}


# transformers' functions ---------------------------------------------------------------------------------------------


def _library(model: nn.Module | None) -> tuple[Any, Any] | None:
    """Where transformers 5 has its conversions; None for a class that is not of it, and where it has none."""
    transformers: Any = sys.modules.get("transformers")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return None
    try:
        mapping = importlib.import_module("transformers.conversion_mapping")
        loading = importlib.import_module("transformers.core_model_loading")
    except ImportError:
        return None
    return mapping, loading


def _groups(model: nn.Module | None, files: Tensors, fits: Callable[[str], bool]) -> list[Group]:
    """The groups that transformers makes of files' tensors."""
    library = _library(model)
    if library is None:
        return [_alone(n, n, t) for n, t in files.items()]
    mapping, loading = library
    transforms = mapping.get_model_conversion_mapping(model)
    converters = [t for t in transforms if isinstance(t, loading.WeightConverter)]
    renamings = [t for t in transforms if isinstance(t, loading.WeightRenaming)]
    by_pattern = {p: c for c in converters for p in c.source_patterns}
    found: dict[str, list[tuple[str, str | None]]] = {}
    for name in sorted(files, key=loading.dot_natural_key):
        renamed, pattern = loading.rename_source_key(name, renamings, converters)
        if not fits(renamed) and fits(name):
            renamed, pattern = name, None
        found.setdefault(renamed, []).append((name, pattern))
    order = {n: i for i, n in enumerate(files)}
    out = []
    for first, members in found.items():
        names = [n for n, _ in members]
        pattern = members[0][1]
        if pattern is None:
            out += [_alone(names[0], first, files[names[0]])]
            if len(names) > 1:
                raise CheckpointError(f"transformers reads {' and '.join(names[:3])} as the same tensor, {first}")
            continue

        def make(tensors: Tensors, first: str = first, members: Any = members, how: Any = by_pattern[pattern]) -> Any:
            converter = copy.deepcopy(how)
            for name, pattern in members:
                converter.add_tensor(first, name, pattern, tensors[name])
            made = converter.convert(first, model=model, config=getattr(model, "config", None))
            return {n: t[0] if isinstance(t, list) else t for n, t in made.items()}

        try:
            out.append(Group(names, make({n: files[n] for n in names}), make))
        except Exception as error:  # the library's own code, on files of any kind
            raise CheckpointError(
                f"transformers cannot make {first} of {', '.join(names[:3])}: {type(error).__name__}: {error}"
            ) from error
    return sorted(out, key=lambda g: min(order[n] for n in g.files))


def _alone(file: str, own: str, tensor: torch.Tensor) -> Group:
    return Group([file], {own: tensor})


def _undo(model: nn.Module | None, own: Tensors) -> dict[str, torch.Tensor]:
    """What transformers would save of a model's tensors."""
    library = _library(model)
    if library is None:
        return dict(own)
    try:
        return dict(library[1].revert_weight_conversion(model, dict(own)))
    except Exception as error:  # the library's own code, on tensors of any kind
        raise CheckpointError(
            f"transformers cannot save {next(iter(own))} and more: {type(error).__name__}: {error}"
        ) from error


class Pieces:
    """The tensors of files, one after the other, from what makes those of the model."""

    def __init__(
        self,
        conversions: Conversions,
        model: nn.Module,
        groups: Mapping[str, Group],
        make: Callable[[str], torch.Tensor],
    ) -> None:
        self._conversions, self._model, self._groups, self._make = conversions, model, groups, make
        self._held: dict[str, torch.Tensor] = {}

    def __call__(self, names: Iterable[str]) -> Iterable[torch.Tensor]:
        """In this order."""
        for name in names:
            group = self._groups.get(name)
            if group is None or group.make is None:
                yield self._make(next(iter(group.own)) if group else name)
                continue
            if name not in self._held:
                own = {n: self._make(n) for n in group.own}
                self._held = self._conversions.split(self._model, group, own)
            yield self._held.pop(name)


__all__ = ["Conversions", "Group", "Pieces", "Stored"]
