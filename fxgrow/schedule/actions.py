"""What a schedule does beside growing: to the learning rate, the batch, dropout, what learns, and the run itself.

In a schedule they stand among the operations of an event, each by its ``op``::

    operations:
      - {op: widen, axis: "*/hidden", factor: 2}
      - {op: learning_rate, rewarm: 50, from: 0.2}
      - {op: accumulation, factor: 2, learning_rate: sqrt}
"""

from __future__ import annotations

from fractions import Fraction
from typing import Literal

from pydantic import Field, model_validator

from fxgrow.schedule.base import Strict, exactly_one
from fxgrow.spec import Count

_ADAPTED = "globs over the paths of adapted modules, with | between them; or vocabulary: tables and heads of tokens"


class Action(Strict):
    """Something that a schedule does at a moment of a run; ``op`` names it."""

    op: str


class LearningRate(Action):
    """Change the learning rate from here on: to a value, by a factor, by a warm-up, or by the schedule's place."""

    op: Literal["learning_rate"] = "learning_rate"
    set: float | None = Field(None, gt=0, description="what it is now; the loop's own schedule goes on from there")
    scale: float | None = Field(None, gt=0, le=1e6, description="multiply it")
    rewarm: Count | None = Field(None, ge=1, description="steps over which it returns to the schedule's, linearly")
    from_: float = Field(0.0, ge=0, le=1e6, alias="from", description="rewarm: the factor that it returns from")
    position: Count | None = Field(
        None, ge=0, description="the loop's own schedule goes on from its step of this number"
    )

    @model_validator(mode="after")
    def _check(self) -> LearningRate:
        exactly_one(self, "set", "scale", "rewarm", "position")
        if self.from_ and self.rewarm is None:
            raise ValueError("from belongs to rewarm")
        return self


class WeightDecay(Action):
    """Change the weight decay of the optimizer's groups."""

    op: Literal["weight_decay"] = "weight_decay"
    set: float | None = Field(None, ge=0, description="what it is now, in groups that have any")
    scale: float | None = Field(None, ge=0, le=1e6, description="multiply it")

    @model_validator(mode="after")
    def _check(self) -> WeightDecay:
        exactly_one(self, "set", "scale")
        return self


class Sized(Action):
    """A size of the batch: set, or multiplied and rounded down, and never below 1."""

    set: Count | None = Field(None, ge=1, description="what it is now")
    factor: float | None = Field(None, gt=0, le=1e6, description="multiply it")

    @model_validator(mode="after")
    def _check(self) -> Sized:
        exactly_one(self, "set", "factor")
        return self

    def of(self, old: int) -> int:
        """What becomes of a size."""
        if self.set is not None:
            return self.set
        return max(1, int(old * Fraction(str(self.factor or 1))))  # as it is written: 100 * 0.57 is 57


class Batch(Sized):
    """A size of the effective batch, and what follows for the learning rate.

    By the factor by which the effective batch changes, the learning rate is multiplied linearly (Goyal 2017, for SGD)
    or by its root (Malladi 2022, for Adam), or is kept.
    """

    learning_rate: Literal["keep", "linear", "sqrt"] = Field("keep", description="how the learning rate follows")

    def rate(self, old: int, new: int) -> float:
        """The factor on the learning rate."""
        return {"keep": 1.0, "linear": new / old, "sqrt": (new / old) ** 0.5}[self.learning_rate]


class Accumulation(Batch):
    """Change how many micro-batches an optimizer step has."""

    op: Literal["accumulation"] = "accumulation"


class BatchSize(Batch):
    """Change how many examples a micro-batch has."""

    op: Literal["batch_size"] = "batch_size"


class SequenceLength(Sized):
    """Change how long the sequences are that the loop draws."""

    op: Literal["sequence_length"] = "sequence_length"


class Dropout(Action):
    """Set the probability of dropout, where a model has any."""

    op: Literal["dropout"] = "dropout"
    p: float = Field(ge=0, lt=1, description="the probability that an entry is dropped")
    modules: str = Field("*", description="a glob over module paths")


class Freeze(Action):
    """Let parameters stand still: by name, or all that the last growth made, or did not make."""

    op: Literal["freeze"] = "freeze"
    what: str = Field(description="old, new, or a glob over parameter names")


class Unfreeze(Action):
    """Let parameters learn again that a ``freeze`` of this schedule holds."""

    op: Literal["unfreeze"] = "unfreeze"
    what: str = Field("*", description="old, new, or a glob over parameter names")


class LoraScale(Action):
    """Multiply what adapters add, from here on."""

    op: Literal["lora_scale"] = "lora_scale"
    factor: float = Field(ge=0, le=1e6)
    modules: str = Field("*", description=_ADAPTED)


class LoraDecay(Action):
    """Bring what adapters add down to a part of it, linearly over some steps."""

    op: Literal["lora_decay"] = "lora_decay"
    steps: Count = Field(ge=1)
    to: float = Field(0.0, ge=0, le=1e6, description="the factor at the end")
    modules: str = Field("*", description=_ADAPTED)


class LoraMerge(Action):
    """Add adapters to the weights that they adapt, exactly, and take them away with their optimizer state."""

    op: Literal["lora_merge"] = "lora_merge"
    modules: str = Field("*", description=_ADAPTED)


class Evaluate(Action):
    """Evaluate now, whatever the loop's interval is."""

    op: Literal["evaluate"] = "evaluate"


class Checkpoint(Action):
    """Save a checkpoint now."""

    op: Literal["checkpoint"] = "checkpoint"


ACTIONS: dict[str, type[Action]] = {
    str(kind.model_fields["op"].default): kind
    for kind in (
        *(LearningRate, WeightDecay, Accumulation, BatchSize, SequenceLength),
        *(Dropout, Freeze, Unfreeze, LoraScale, LoraDecay, LoraMerge, Evaluate, Checkpoint),
    )
}

__all__ = [
    "ACTIONS",
    "Accumulation",
    "Action",
    "Batch",
    "BatchSize",
    "Checkpoint",
    "Dropout",
    "Evaluate",
    "Freeze",
    "LearningRate",
    "LoraDecay",
    "LoraMerge",
    "LoraScale",
    "SequenceLength",
    "Sized",
    "Unfreeze",
    "WeightDecay",
]
