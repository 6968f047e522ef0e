"""Ranks that train one model together: what one of them cannot do, none of them does.

A rank that stops where the others go on lets them wait for ever in their next collective operation. So what can fail on
one rank alone runs in :func:`together`, and what must be equal is held against the others' by :func:`agree`: every rank
raises the same :class:`~fxgrow.errors.RankError` then, which names the ranks and the reason. All of it is nothing where
``torch.distributed`` is not initialised, in a group of one, and on ranks outside the group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist

from fxgrow.errors import FxgrowError, RankError

Group = Any  #: a ``torch.distributed.ProcessGroup``; None: all ranks
Value = TypeVar("Value")

#: how many different failures or values a message shows
_SHOWN = 3
_LONGEST = 300


class _Failure(NamedTuple):
    """What a rank raised, as the others can read it."""

    kind: str
    message: str
    expected: bool  # one of fxgrow's own


def size(group: Group = None) -> int:
    """How many ranks work together; 1 without ``torch.distributed``, and for a rank that is not in the group."""
    if not (dist.is_available() and dist.is_initialized()):
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
    try:
        dist.all_gather_object(values, value, group=group)
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        raise RankError(
            f"another of the {len(values)} ranks has ended, or does not answer ({reason:.{_LONGEST}}); start them all "
            "again"
        ) from error
    return values


@contextmanager
def together(what: str, group: Group = None) -> Iterator[None]:
    """Run a block on all ranks: where it raises on one of them, it raises on all.

    ::

        with together("the growth", group):
            ...  # no collective operation in here, unless nothing before it can fail

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
    _settle(what, None, failure, group)


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
    values: list[Any] = _settle(what, value, failure, group)
    return values


def agree(what: str, value: Any, group: Group = None) -> None:
    """Hold a value against the other ranks'.

    Args:
        what: the value is.
        value: plain data, compared by ``==``; a digest of what is large.

    Raises:
        RankError: on every rank, where they are not all equal.
    """
    values = gathered(value, group)
    if all(v == values[0] for v in values):
        return
    raise RankError(f"{what} is not the same on all ranks: {_by_rank(list(map(repr, values)), 'has')}")


def _settle(what: str, value: Any, failure: BaseException | None, group: Group) -> list[Any]:
    """Every rank's value; or the end of all of them."""
    if size(group) == 1 or isinstance(failure, RankError):  # which every rank has raised by now
        if failure is not None:
            raise failure
        return [value]
    said = None
    if failure is not None:
        said = _Failure(type(failure).__name__, str(failure).strip(), isinstance(failure, FxgrowError))
    reports = gathered((value, said), group)
    failures = [each for _, each in reports]
    if not any(failures):
        return [each for each, _ in reports]
    alike = len({(each.kind, each.expected) if each is not None else None for each in failures}) == 1
    if failure is not None and (alike or not isinstance(failure, Exception)):  # who interrupts a rank ends it
        raise failure
    words = ["" if each is None else _in_words(each) for each in failures]
    raise RankError(f"{what}: {_by_rank(words, 'failed:')}") from failure


def _in_words(failure: _Failure) -> str:
    return failure.message if failure.expected else f"{failure.kind}: {failure.message}".rstrip(": ")


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


__all__ = ["Group", "agree", "gathered", "shared", "size", "together"]
