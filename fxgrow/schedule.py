"""When to grow: a schedule of growths, as one pydantic model. :class:`fxgrow.GrowthScheduler` carries it out.

A schedule is a list of growths; each has a trigger, the operations of a :class:`~fxgrow.spec.GrowthSpec`, and what
happens to the optimizer, the learning rate and the gradient accumulation at that moment::

    version: 1
    growths:
      - name: wider MLP
        trigger: {step: 200}            # or {tokens: 1000000}, {epoch: 2}, {plateau: {metric: val_loss, patience: 3}}
        operations:
          - {op: widen, axis: "transformer.h.*.mlp/hidden", factor: 2, noise: {kind: antisymmetric}}
        optimizer: {policy: asymmetric, warmup: 100}
        learning_rate: {policy: rewarm, steps: 50, from: 0.2}
        accumulation: 2                           # multiply the micro-batches per step
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fxgrow.errors import SpecError, did_you_mean
from fxgrow.limits import OPERATIONS
from fxgrow.reading import as_mapping, read_yaml
from fxgrow.spec import Count, GrowthSpec
from fxgrow.spec import json_schema as spec_schema


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False)


class Plateau(Strict):
    """Fires when ``metric`` has not fallen by ``min_delta`` for ``patience`` reports in a row since the last growth."""

    metric: str = Field("val_loss", description="a key of the metrics that the training loop reports; lower is better")
    patience: Count = Field(3, ge=1, description="how many reports without improvement")
    min_delta: float = Field(0.0, ge=0, description="a smaller fall than this is no improvement")


class Trigger(Strict):
    """When a growth happens: exactly one of the fields. Counts are those of *completed* steps, tokens and epochs."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        json_schema_extra={"minProperties": 1, "maxProperties": 1},
    )
    step: Count | None = Field(None, ge=0, description="after this many optimizer steps")
    tokens: Count | None = Field(None, ge=0, description="after this many training tokens")
    epoch: float | None = Field(None, ge=0, description="after this many passes over the data, fractions allowed")
    plateau: Plateau | None = Field(None, description="when a metric stops improving")

    @model_validator(mode="after")
    def _one(self) -> Trigger:
        if len(self.model_fields_set) != 1 or self.kind is None:
            raise ValueError("give exactly one of step, tokens, epoch, plateau")
        return self

    @property
    def kind(self) -> Literal["step", "tokens", "epoch", "plateau"] | None:
        """Which of the four it is."""
        for name in ("step", "tokens", "epoch", "plateau"):
            if getattr(self, name) is not None:
                return name
        return None

    def __str__(self) -> str:
        if self.plateau is not None:
            return f"plateau of {self.plateau.metric}"
        return f"{self.kind} {getattr(self, self.kind or 'step'):g}"


class OptimizerPolicy(Strict):
    """What happens to the optimizer's state (RECIPES: SPARKLING 2026 for ``asymmetric``, Shen 2022 for ``exact``)."""

    policy: Literal["exact", "asymmetric", "copy", "reset"] = Field(
        "asymmetric",
        description="exact: the grown model takes the steps that the small one would; asymmetric: old entries keep "
        "their state, new ones start without momentum and warm up; copy: copies inherit the state; reset: no state",
    )
    warmup: Count = Field(
        250, ge=0, description="asymmetric: steps over which the learning rate of new entries warms up"
    )
    peak: float | None = Field(
        None, gt=0, le=1e6, description="asymmetric: the highest learning rate of new entries, as a factor"
    )
    ramp: Count | None = Field(
        None,
        ge=1,
        description="exact: steps over which the per-slice learning rates go back to the common one; none: never",
    )


class Unchanged(Strict):
    """The learning-rate schedule goes on as if nothing had happened."""

    policy: Literal["none"] = "none"


class Rewarm(Strict):
    """The learning rate restarts at ``from`` times the schedule's and returns to it linearly over ``steps``."""

    policy: Literal["rewarm"] = "rewarm"
    steps: Count = Field(gt=0)
    from_: float = Field(0.0, ge=0, le=1e6, alias="from", description="factor at the growth itself")


class Scale(Strict):
    """The learning rate is multiplied by ``factor`` from the growth on."""

    policy: Literal["scale"] = "scale"
    factor: float = Field(gt=0, le=1e6)


class ScheduledGrowth(Strict):
    """One growth of a schedule."""

    name: str | None = Field(None, description="a label for logs and pictures")
    trigger: Trigger
    operations: list[Any] = Field(description="the operations of a growth spec, applied in order")
    optimizer: OptimizerPolicy = Field(default_factory=lambda: OptimizerPolicy.model_validate({}))
    learning_rate: Annotated[Unchanged | Rewarm | Scale, Field(discriminator="policy")] = Field(
        default_factory=Unchanged
    )
    accumulation: float = Field(
        1.0, gt=0, le=1e6, description="multiply the micro-batches per step; the product is rounded down, at least 1"
    )

    @field_validator("optimizer", "learning_rate", mode="before")
    @classmethod
    def _bare_policy(cls, value: Any) -> Any:
        return {"policy": value} if isinstance(value, str) else value

    @property
    def spec(self) -> GrowthSpec:
        """The operations as a spec that :func:`fxgrow.grow` takes."""
        return GrowthSpec.parse(self.operations)

    def lr_factor(self, steps_since: int) -> float:
        """Factor on the learning rate ``steps_since`` steps after this growth."""
        policy = self.learning_rate
        if isinstance(policy, Scale):
            return policy.factor
        if isinstance(policy, Rewarm):
            return policy.from_ + (1 - policy.from_) * min(1.0, steps_since / policy.steps)
        return 1.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data without defaults; ``ScheduledGrowth.model_validate`` reads it back."""
        data = self.model_dump(exclude_defaults=True, by_alias=True, exclude={"operations", "learning_rate"})
        data["operations"] = self.spec.to_dict()["operations"]
        if not isinstance(self.learning_rate, Unchanged):
            data["learning_rate"] = self.learning_rate.model_dump(by_alias=True)
        return data


class Schedule(Strict):
    """A list of growths that fire once each, in order. See the module's docstring for the file form."""

    version: Literal[1] = 1
    growths: list[ScheduledGrowth] = Field(max_length=OPERATIONS)

    @model_validator(mode="after")
    def _in_order(self) -> Schedule:
        last: dict[str, tuple[int, float]] = {}
        for number, growth in enumerate(self.growths):
            kind = growth.trigger.kind
            if kind is None or kind == "plateau":
                continue
            value = getattr(growth.trigger, kind)
            if kind in last and value < last[kind][1]:
                before, at = last[kind]
                raise ValueError(
                    f"growths fire in order, but growths.{number} waits for {kind} {value:g} and stands after "
                    f"growths.{before} at {kind} {at:g}"
                )
            last[kind] = (number, value)
        return self

    @classmethod
    def parse(cls, schedule: Schedule | Mapping[str, Any] | list[Any] | str | Path | None) -> Schedule:
        """Make a schedule of a dict, a list of growths, YAML or JSON text, or the path of a file. None is empty.

        Raises:
            SpecError: with one line per mistake, each naming the field.
        """
        if isinstance(schedule, Schedule):
            return schedule
        where = "schedule"
        if schedule is None:
            schedule = []
        if isinstance(schedule, str | Path):
            schedule, where = read_yaml(schedule, "schedule")
            schedule = [] if schedule is None else schedule
        given = as_mapping(schedule, where, "growths")
        try:
            parsed = cls.model_validate(given)
        except ValidationError as error:
            raise SpecError(explain(where, error)) from None
        growths, mistakes = [], []
        for number, growth in enumerate(parsed.growths):
            try:
                growths.append(growth.model_copy(update={"operations": growth.spec.operations}))
            except SpecError as error:
                # the spec names its own fields from its own top: put the place in the schedule before them
                mistakes += [
                    f"{where}: growths.{number}.{line.removeprefix('spec: ')}" for line in str(error).splitlines()
                ]
        if mistakes:
            raise SpecError("\n".join(mistakes))
        return parsed.model_copy(update={"growths": growths})

    def to_dict(self) -> dict[str, Any]:
        """Plain data without defaults; ``parse`` reads it back."""
        return {"version": self.version, "growths": [growth.to_dict() for growth in self.growths]}

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


# Where each model stands in a schedule, list indices left out; needed to name the nearest valid field.
_PLACES: dict[tuple[str, ...], type[BaseModel]] = {
    (): Schedule,
    ("growths",): ScheduledGrowth,
    ("growths", "trigger"): Trigger,
    ("growths", "trigger", "plateau"): Plateau,
    ("growths", "optimizer"): OptimizerPolicy,
    ("growths", "learning_rate", "none"): Unchanged,
    ("growths", "learning_rate", "rewarm"): Rewarm,
    ("growths", "learning_rate", "scale"): Scale,
}
_LR_POLICIES = ["none", "rewarm", "scale"]


def explain(where: str, error: ValidationError) -> str:
    """One line per mistake: the field, what is wrong, and the nearest valid names."""
    lines = []
    for item in error.errors():
        place = [str(part) for part in item["loc"]]
        names = tuple(str(part) for part in item["loc"] if not isinstance(part, int))
        if names[:2] == ("growths", "learning_rate") and len(place) > 3:
            del place[3]  # the union's tag is not a field of the file
        message = item["msg"].removeprefix("Value error, ")
        known: list[str] = []
        if item["type"] == "extra_forbidden":
            model = _PLACES.get(names[:-1])
            known = [] if model is None else [f.alias or name for name, f in model.model_fields.items()]
            message, wrong = "no such field", names[-1]
        elif item["type"] in ("union_tag_invalid", "union_tag_not_found"):
            known = _LR_POLICIES
            value = item["input"].get("policy") if isinstance(item["input"], Mapping) else item["input"]
            message, wrong = f"no such learning-rate policy {value!r}", str(value)
        elif item["type"] == "literal_error" and names[-1:] == ("policy",):
            known = ["exact", "asymmetric", "copy", "reset"]
            message, wrong = f"no such optimizer policy {item['input']!r}", str(item["input"])
        if known:
            message += f"; {did_you_mean(wrong, known)}"
        lines.append(f"{where}: {'.'.join(place) or '(top)'}: {' '.join(message.split())}")
    return "\n".join(lines)


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a schedule file, plug-in operations included (draft 2020-12)."""
    schema = Schedule.model_json_schema()
    spec = spec_schema()
    schema["$defs"] |= spec["$defs"]
    schema["$defs"]["ScheduledGrowth"]["properties"]["operations"] = spec["properties"]["operations"]
    for name in ("optimizer", "learning_rate"):  # a bare policy name is enough
        field = schema["$defs"]["ScheduledGrowth"]["properties"][name]
        field.setdefault("anyOf", []).append({"type": "string"})
        for form in ("$ref", "oneOf"):
            if form in field:
                field["anyOf"].insert(0, {form: field.pop(form)})
        field.pop("discriminator", None)  # OpenAPI only
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return schema
