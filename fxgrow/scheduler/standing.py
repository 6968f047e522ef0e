"""What the actions that have been done make of the batch and the learning rate: pure functions of what was done."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from fxgrow.errors import SpecError
from fxgrow.schedule import Accumulation, Action, BatchSize, Grow, LearningRate, SequenceLength


@dataclass(frozen=True)
class Done:
    """An action that has been done, or was left out by an error.

    Attributes:
        event, number: which event of the schedule, and which of its actions.
        step: after so many steps.
        error: why it was left out; "" where it was done.
        rate: the learning rate of the optimizer then, where a learning rate was set and there was one.
    """

    event: int
    number: int
    action: Grow | Action
    step: int
    error: str = ""
    rate: float | None = None


@dataclass(frozen=True)
class Sizes:
    """Micro-batches a step, examples a micro-batch, and the length of sequences; None where the loop did not say."""

    accumulation: int = 1
    batch_size: int | None = None
    sequence_length: int | None = None

    def after(self, action: Grow | Action, place: str) -> Sizes:
        """What an action makes of them.

        Raises:
            SpecError: it multiplies what the loop did not say.
        """
        if not isinstance(action, Accumulation | BatchSize | SequenceLength):
            return self
        old = getattr(self, action.op)
        if old is None and action.set is None:
            raise SpecError(
                f"{place} multiplies the {action.op.replace('_', ' ')}, and the scheduler does not know it: pass "
                f"{action.op}= to GrowthScheduler, or `set` it"
            )
        return replace(self, **{action.op: action.of(old or 1)})


def sizes_after(first: Sizes, done: Iterable[Done]) -> Sizes:
    """The sizes after what has been done."""
    for each in done:
        if not each.error:
            first = first.after(each.action, f"events.{each.event}")
    return first


def rate_of(action: Grow | Action, before: Sizes, after: Sizes) -> float:
    """The factor by which the learning rate follows a change of the batch."""
    if not isinstance(action, Accumulation | BatchSize):
        return 1.0
    old, new = getattr(before, action.op), getattr(after, action.op)
    if old is None and action.learning_rate != "keep":
        raise SpecError(f"{action.op}: the learning rate cannot follow a size that the scheduler does not know")
    return action.rate(old, new) if old else 1.0


def learning_rate(done: Iterable[Done], first: Sizes, base: Callable[[int], float], step: int) -> float:
    """The learning rate of a step, from the loop's own schedule and what has been done.

    Args:
        base: the loop's own, of a step from 0.
    """
    offset, factor = _standing(done, first, step, lambda each, offset: base(each.step + offset))
    return base(step + offset) * factor


def rate_factor(done: Iterable[Done], first: Sizes, step: int) -> float:
    """The factor on a learning rate that others set, whose place in their schedule is theirs."""
    return _standing(done, first, step, lambda each, _: each.rate or 1.0)[1]


def _standing(
    done: Iterable[Done], first: Sizes, step: int, rate_then: Callable[[Done, int], float]
) -> tuple[int, float]:
    """How far the loop's own schedule is moved, and the factor on it.

    Args:
        rate_then: the loop's own rate when an action was done.
    """
    offset, factor, warmups, sizes = 0, 1.0, list[tuple[int, LearningRate]](), first
    for each in done:
        action = each.action
        if each.error:
            continue
        after = sizes.after(action, f"events.{each.event}")
        factor *= rate_of(action, sizes, after)
        sizes = after
        if not isinstance(action, LearningRate):
            continue
        if action.set is not None:
            then = rate_then(each, offset)
            if not then:
                raise SpecError(
                    f"events.{each.event} sets the learning rate after step {each.step}, where the loop's own is "
                    f"{then:g}, so that its schedule cannot go on from there: set it at another step"
                )
            factor, warmups = action.set / then, []
        elif action.scale is not None:
            factor *= action.scale
        elif action.position is not None:
            offset = action.position - each.step
        else:
            warmups.append((each.step, action))
    for at, action in warmups:
        factor *= action.from_ + (1 - action.from_) * min(1.0, (step - at) / (action.rewarm or 1))
    return offset, factor


__all__ = ["Done", "Sizes", "learning_rate", "rate_factor", "rate_of", "sizes_after"]
