"""Everything fxgrow raises. Each message says what is wrong, where, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass


class FxgrowError(Exception):
    """Base of every error fxgrow raises on purpose."""


class CaptureError(FxgrowError):
    """The model could not be turned into a graph by ``torch.export``."""


class InputError(FxgrowError, ValueError):
    """A module was called with an input that its graph is not for; the message names the input, its size and why."""


class SpecError(FxgrowError, ValueError):
    """A spec, a schedule or a name in it is wrong."""


def placed(why: str, op: str, line: str) -> str:
    """A reason with the op and the user's line where it holds, as far as they are known."""
    where = f" at {line}" if line else ""
    return f"{op}{where}: {why}" if op else f"{why}{where}"


@dataclass(frozen=True)
class Refusal:
    """Why something cannot be grown, and where it fails; the text of it is the message.

    Attributes:
        what: an axis, a stack or a layer, by name.
        why: the reason, in words.
        verb: what was to be done with it.
        old, new: its sizes, where the refusal is about these.
        op, line: where in the model it fails: the op, and the user's source line.
    """

    what: str
    why: str
    verb: str = "grow"
    old: int | None = None
    new: int | None = None
    op: str = ""
    line: str = ""

    @property
    def reason(self) -> str:
        """Where and why, without what was asked for."""
        return placed(self.why, self.op, self.line)

    def __str__(self) -> str:
        sizes = "" if self.new is None else f" to {self.new}" if self.old is None else f" from {self.old} to {self.new}"
        return f"cannot {self.verb} {self.what}{sizes}: {self.reason}"


class GrowthRefused(FxgrowError):
    """The growth asked for cannot be proved exact; the message gives the op, the source line and the reason.

    Attributes:
        refusal: the parts of the message, where it is about one axis, stack or layer; of several ways that were tried
            the first.
    """

    def __init__(self, message: str | Refusal, refusal: Refusal | None = None) -> None:
        super().__init__(str(message))
        self.refusal = message if isinstance(message, Refusal) else refusal


class ExactnessError(FxgrowError):
    """A growth that the planner called exact measured inexact: a bug in a rule. Nothing was changed."""


class CheckpointError(FxgrowError):
    """A checkpoint does not fit the model or the plan it is used with."""


class DiskError(CheckpointError, OSError):
    """A checkpoint cannot be written: no space, no permission. What was there before is unchanged."""


class RankError(FxgrowError):
    """Ranks that train one model together differ, or one of them failed; raised on all of them, with one message."""


def did_you_mean(
    wrong: str, known: Iterable[str], part: Callable[[str], str] | None = None, cutoff: float = 0.6
) -> str:
    """The end of a message about a name that does not exist.

    Args:
        wrong: the name.
        known: the names that exist.
        part: the part of a name that tells most, such as an axis's role: names that are alike in it come first.
        cutoff: how alike two names have to be, from 0 to 1; less for paths and globs than for words.

    Returns:
        "did you mean a or b?", or what is known where no name is like it.
    """
    names, close = list(known), list[str]()
    if part is not None:
        parts = difflib.get_close_matches(part(wrong), list(dict.fromkeys(map(part, names))), n=2)
        close = [name for name in names if part(name) in parts][:4]
    close = close or difflib.get_close_matches(wrong, names, n=3, cutoff=cutoff)
    if close:
        return f"did you mean {' or '.join(close)}?"
    more = ", …" if len(names) > _MOST else ""
    return f"known: {', '.join(names[:_MOST]) or 'none'}{more}"


_MOST = 16


def reworded(error: FxgrowError, message: str) -> FxgrowError:
    """The same error with another message: one that says where it happened, say."""
    if isinstance(error, GrowthRefused):
        return GrowthRefused(message, error.refusal)
    return (SpecError if isinstance(error, SpecError) else type(error))(message)
