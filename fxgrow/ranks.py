"""Ranks that train one model together: what one of them cannot do, none of them does.

A rank that stops where the others go on lets them wait for ever in their next collective operation. So what can fail on
one rank alone runs in :func:`together`, and what must be equal is held against the others' by :func:`agree`: every rank
raises the same :class:`~fxgrow.errors.RankError` then, which names the ranks and the reason. All of it is nothing where
``torch.distributed`` is not initialised, in a group of one, on ranks outside the group, and for :data:`ALONE`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist

from fxgrow.errors import FxgrowError, RankError

Group = Any  #: a ``torch.distributed.ProcessGroup``; None: all ranks
Value = TypeVar("Value")

#: the group of a rank that works by itself, whatever others do
ALONE: Group = "alone"

#: how many different failures or values a message shows
_SHOWN = 3
_LONGEST = 300


class _Report(NamedTuple):
    """What a rank tells the others at a place where all of them meet."""

    place: str
    value: Any = None
    kind: str = ""  # of error; "" where there is none
    message: str = ""
    expected: bool = False  # one of fxgrow's own errors


def size(group: Group = None) -> int:
    """How many ranks work together; 1 without ``torch.distributed``, and for a rank that is not in the group."""
    if group is ALONE or not (dist.is_available() and dist.is_initialized()):
        return 1
    return max(1, dist.get_world_size(group))


def gathered(value: Value, group: Group = None) -> list[Value]:
    """The value of every rank, in their order; a collective operation.

    Args:
        value: plain data, which is pickled.

    Raises:
        RankError: another rank has ended, or does not answer in time.
    """
    if size(group) == 1:
        return [value]
    values: list[Any] = [None] * size(group)
    with answering(group):
        dist.all_gather_object(values, value, group=group)
    return values


@contextmanager
def answering(group: Group = None) -> Iterator[None]:
    """Say in words what a collective operation in a block raises where another rank is gone.

    Raises:
        RankError: another rank has ended, or does not answer in time.
    """
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        if size(group) == 1 or not (isinstance(error, dist.DistError) or _OF_A_BACKEND.search(reason)):
            raise
        raise RankError(
            f"another of the {size(group)} ranks has ended, or does not answer ({reason:.{_LONGEST}}); start them all "
            "again"
        ) from error


_OF_A_BACKEND = re.compile("gloo|nccl|connection|timed out|socket", re.IGNORECASE)


@contextmanager
def together(what: str, group: Group = None) -> Iterator[None]:
    """Run a block on all ranks: where it raises on one of them, it raises on all.

    ::

        with together("the growth", group):
            ...  # of collective operations, only agree, shared and together

    Args:
        what: what the block is for, as the message begins with it.

    Raises:
        RankError: on every rank, where some ranks raised and others did not, or not the same; what a rank itself raised
            is the cause. Where all of them raised the same class of error, each raises its own.
    """
    failure: BaseException | None = None
    try:
        yield
    except BaseException as error:
        failure = error
    _meet(what, None, failure, group)


def shared(what: str, make: Callable[[], Value], group: Group = None) -> list[Value]:
    """What a function returns on every rank, in their order; as :func:`together` where it raises on one of them.

    Args:
        make: returns plain data.
    """
    failure, value = None, None
    try:
        value = make()
    except BaseException as error:
        failure = error
    values: list[Any] = _meet(what, value, failure, group)
    return values


def agree(what: str, value: Any, group: Group = None) -> None:
    """Hold a value against the other ranks'.

    Args:
        what: the value is.
        value: plain data, compared by ``==``; a digest of what is large.

    Raises:
        RankError: on every rank, where they are not all equal, or one of them has failed.
    """
    values = _meet(what, value, None, group)
    if any(v != values[0] for v in values):
        raise RankError(f"{what} is not the same on all ranks: {_by_rank(list(map(repr, values)), 'has')}")


def agree_by_name(what: str, values: Mapping[str, Any], group: Group = None) -> None:
    """Hold many values against the other ranks', such as digests of tensors; the message names the first that differs.

    Args:
        what: each of the values is; its name follows.

    Raises:
        RankError: as :func:`agree`.
    """
    every = _meet(what, dict(values), None, group)
    for name in {name: None for each in every for name in each}:
        found = [each.get(name) for each in every]
        if any(v != found[0] for v in found):
            raise RankError(f"{what} {name} is not the same on all ranks: {_by_rank(list(map(repr, found)), 'has')}")


def _meet(what: str, value: Any, failure: BaseException | None, group: Group) -> list[Any]:
    """Every rank's value; or the end of all of them.

    All exchanges are of this one kind: a rank that fails meets the others at the next one of theirs.
    """
    if size(group) == 1 or isinstance(failure, RankError):  # which every rank has raised by now
        if failure is not None:
            raise failure
        return [value]
    own = _Report(what, value)
    if failure is not None:
        own = _Report(what, None, type(failure).__name__, str(failure).strip(), isinstance(failure, FxgrowError))
    reports = gathered(own, group)
    if any(r.kind for r in reports):
        alike = len({(r.kind, r.expected) for r in reports}) == 1
        if failure is not None and (alike or not isinstance(failure, Exception)):  # who interrupts a rank ends it
            raise failure
        place = next(r.place for r in reports if r.kind)
        raise RankError(f"{place}: {_by_rank(list(map(_in_words, reports)), 'failed:')}") from failure
    if any(r.place != what for r in reports):
        raise RankError(f"the ranks do not do the same: {_by_rank([r.place for r in reports], 'is at')}")
    return [r.value for r in reports]


def _in_words(report: _Report) -> str:
    return report.message if report.expected else f"{report.kind}: {report.message}".rstrip(": ")


def _by_rank(words: list[str], verb: str) -> str:
    """What ranks say, by those that say the same; nothing of those that say nothing."""
    ranks: dict[str, list[int]] = {}
    for rank, each in enumerate(words):
        ranks.setdefault(each, []).append(rank)
    ranks.pop("", None)
    said = [f"{_named(who)} of {len(words)} {verb} {each:.{_LONGEST}}" for each, who in list(ranks.items())[:_SHOWN]]
    return "; ".join(said) + (f"; and {len(ranks) - _SHOWN} more" if len(ranks) > _SHOWN else "")


def _named(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:4])) + (", …" if len(ranks) > 4 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"


__all__ = ["ALONE", "Group", "agree", "agree_by_name", "answering", "gathered", "shared", "size", "together"]
