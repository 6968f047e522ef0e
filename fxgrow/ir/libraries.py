"""What other libraries keep in a model beside its tensors: adapters of their classes, and numbers that no graph shows.

A module of ours that knows a library registers itself here; it is imported once the library is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

from torch import nn

from fxgrow.plugins import load_companions

#: sets an attribute of an object, or an entry of a table, so that it can be taken back
Setter = Callable[[Any, str, Any], Any]


class Adapter(Protocol):
    """A low-rank adapter beside a layer, as a schedule deals with it.

    Attributes:
        path: of the module that has it.
        alpha: what its product is multiplied by is in proportion to it.
        embedding: the layer looks its input up.
    """

    path: str
    embedding: bool

    @property
    def alpha(self) -> float: ...
    @property
    def module(self) -> nn.Module:
        """The module whose result has the adapter's in it."""
        ...

    @property
    def layer(self) -> nn.Module:
        """The module that has the weight beside which the adapter is."""
        ...

    @property
    def widths(self) -> tuple[int, int]:
        """What it takes, entries or a width, and the width that it hands on."""
        ...

    def parameters(self) -> dict[str, nn.Parameter]:
        """Its own, by their names in the module."""
        ...

    def scale_by(self, factor: float) -> None:
        """Multiply what it adds."""
        ...

    def begin_fade(self, step: int, steps: int, to: float) -> None:
        """Let what it adds go to a part of it, from a step on; :meth:`fade` does so."""
        ...

    def fade(self, step: int) -> bool:
        """Bring what fades to where it is at a step; whether anything does."""
        ...

    def merge(self) -> None:
        """Add it to its layer's weight, and be silent."""
        ...

    def unmerged(self) -> None:
        """Speak again, after the weight was put back."""
        ...

    def remove(self, model: nn.Module) -> None:
        """Take it away, merged."""
        ...


class Library(Protocol):
    """What is known of a library's classes."""

    def adapters(self, model: nn.Module) -> Iterator[Adapter]:
        """The adapters in a model that are the library's."""
        ...

    def say(self, model: nn.Module, put: Setter) -> None:
        """Let the library's configs say what its layers hold."""
        ...

    def keep(self, model: nn.Module) -> Callable[[nn.Module, Setter], None] | None:
        """Look at a model before it grows; what is called with it, once it holds its grown tensors.

        Returns:
            None where nothing is the library's.

        Raises:
            GrowthRefused: it is in a state in which not all of it would grow.
        """
        ...

    def twins(self, model: nn.Module) -> dict[str, str]:
        """Parameters that no call reads while others of the same shape stand in for them, and these, by name."""
        ...


_LIBRARIES: list[Library] = []


def register_library(library: Library) -> None:
    """Let a library's classes be known."""
    _LIBRARIES.append(library)


def libraries() -> list[Library]:
    """Those that are known, and in use."""
    load_companions()
    return list(_LIBRARIES)


def twins_of(model: nn.Module) -> dict[str, str]:
    """See :meth:`Library.twins`."""
    return {name: twin for library in libraries() for name, twin in library.twins(model).items()}


def set_plainly(holder: Any, name: str, value: Any) -> None:
    """A :data:`Setter` that nothing takes back."""
    (holder if isinstance(holder, dict) else vars(holder))[name] = value


__all__ = ["Adapter", "Library", "Setter", "libraries", "register_library", "set_plainly", "twins_of"]
