"""When an event of a schedule happens."""

from __future__ import annotations

from pydantic import ConfigDict, Field, model_validator

from fxgrow.schedule.base import Strict
from fxgrow.spec import Count


class Plateau(Strict):
    """Holds when ``metric`` has not fallen by ``min_delta`` for ``patience`` reports in a row since the last event."""

    metric: str = Field("val_loss", description="a key of the metrics that the training loop reports; lower is better")
    patience: Count = Field(3, ge=1, description="how many reports without improvement")
    min_delta: float = Field(0.0, ge=0, description="a smaller fall than this is no improvement")


class Below(Strict):
    """Holds when the last reported value of ``metric`` since the last event is below ``value``."""

    metric: str = Field("val_loss", description="a key of the metrics that the training loop reports")
    value: float


class Trigger(Strict):
    """When an event happens: one of the fields, or several that must all hold.

    Counts are those of *completed* steps, tokens and epochs.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, json_schema_extra={"minProperties": 1})
    step: Count | None = Field(None, ge=0, description="after this many optimizer steps")
    tokens: Count | None = Field(None, ge=0, description="after this many training tokens")
    epoch: float | None = Field(None, ge=0, description="after this many passes over the data, fractions allowed")
    seconds: float | None = Field(None, ge=0, description="after this much wall-clock time of training")
    plateau: Plateau | None = Field(None, description="when a metric stops improving")
    below: Below | None = Field(None, description="when a metric is low enough")

    @model_validator(mode="after")
    def _any(self) -> Trigger:
        if all(getattr(self, name) is None for name in type(self).model_fields):
            raise ValueError(f"give at least one of {', '.join(type(self).model_fields)}")
        return self

    @property
    def counts(self) -> dict[str, float]:
        """The counts that must be reached."""
        return {n: v for n in COUNTS if (v := getattr(self, n)) is not None}

    @property
    def metrics(self) -> list[str]:
        """The metrics that it watches."""
        return [watched.metric for watched in (self.plateau, self.below) if watched is not None]

    def __str__(self) -> str:
        words = [f"{kind} {value:g}" for kind, value in self.counts.items()]
        words += [f"plateau of {self.plateau.metric}"] if self.plateau is not None else []
        words += [f"{self.below.metric} below {self.below.value:g}"] if self.below is not None else []
        return " and ".join(words)


#: fields of a trigger that only rise
COUNTS = ("step", "tokens", "epoch", "seconds")

__all__ = ["COUNTS", "Below", "Plateau", "Trigger"]
