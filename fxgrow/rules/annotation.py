"""What is known of the newborn entries of a growing axis in one tensor, and how it meets that of another."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from fxgrow.algebra import (
    Axis,
    Expr,
    Leaf,
    leaves,
    map_leaves,
)

Dims = list[Expr]


class Content(enum.Enum):
    """What is known of the newborn entries of an axis in one tensor."""

    CONST = "const"  # the tensor does not vary along the axis (broadcast): the value every old entry has
    ZERO = "zero"
    MEAN = "mean"  # the mean of the old entries
    FREE = "free"  # anything finite

    @staticmethod
    def join(a: Content, b: Content) -> Content:
        return a if a is b else Content.FREE


Site = tuple[str, int, int]  # parameter name, dim, number of the axis's occurrence in that dim


@dataclass(frozen=True)
class Info:
    """Annotation of one occurrence of the growing axis in a tensor.

    ``sources`` are the parameter sites that decide the newborn content; ``site`` is set while the tensor is still the
    parameter itself, seen through views and casts only, so that its use decides how the parameter grows.
    ``zeroable``: the entries would be zero if all the sources were.
    """

    content: Content
    sources: frozenset[Site] = frozenset()
    site: Site | None = None
    zeroable: bool = True

    def join(self, other: Info) -> Info:
        return Info(
            Content.join(self.content, other.content),
            self.sources | other.sources,
            zeroable=self.zeroable and other.zeroable,
        )

    def closed(self) -> Info:
        return replace(self, site=None) if self.site is not None else self

    def becomes(self, content: Content, zeroable: bool = True) -> Info:
        """The same entries after an op that leaves ``content`` of them; ``zeroable``: the op maps zero to zero."""
        return Info(content, self.sources, zeroable=self.zeroable and zeroable)

    def changed(self) -> Info:
        """The same entries after an op that maps them in ways not followed: those that do not vary still do not."""
        return self.becomes(self.content if self.content is Content.CONST else Content.FREE, zeroable=False)


def add_contents(a: Content, b: Content) -> Content:
    if Content.CONST in (a, b):
        other = b if a is Content.CONST else a
        return other if other in (Content.CONST, Content.MEAN) else Content.FREE
    return a if a is b else Content.FREE


def mul_contents(a: Content, b: Content) -> Content:
    if Content.ZERO in (a, b):
        return Content.ZERO
    if Content.CONST in (a, b):
        return b if a is Content.CONST else a
    return Content.FREE


COMBINE: dict[str, Callable[[Content, Content], Content]] = {
    "add": add_contents,
    "mul": mul_contents,
    "any": lambda a, b: a if a is b and a in (Content.CONST,) else Content.FREE,
    "zero": lambda a, b: a if a is b and a in (Content.CONST, Content.ZERO) else Content.FREE,
}


def annotate(expr: Expr, f: Callable[[Info], Info]) -> Expr:
    """Change the annotations of a dim's leaves."""
    return map_leaves(expr, lambda x: Leaf(x.axis, f(x.info)) if isinstance(x, Leaf) else x)


def infos(expr: Expr) -> list[Info]:
    """Annotations of the growing axis's occurrences in a dim, in memory order."""
    if isinstance(expr, Axis):
        return []
    return [x.info for x in leaves(expr) if isinstance(x, Leaf)]


def flat_dims(dims: Any) -> Iterator[Expr]:
    """Every dim of a node's result or results."""
    if dims is None:
        return
    for d in dims:
        if isinstance(d, list):
            yield from d
        elif d is not None:
            yield d
