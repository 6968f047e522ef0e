"""The schedule as a file: a list of events, read from YAML, JSON or Python."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from fxgrow.errors import SpecError, did_you_mean
from fxgrow.limits import OPERATIONS
from fxgrow.reading import as_mapping, read_yaml
from fxgrow.schedule.actions import ACTIONS, Action
from fxgrow.schedule.aliases import ALIASES
from fxgrow.schedule.base import Strict
from fxgrow.schedule.events import Event, Grow, OptimizerPolicy, read_operations
from fxgrow.schedule.triggers import Below, Plateau, Trigger
from fxgrow.schedule.version1 import from_version_1, is_version_1
from fxgrow.spec import json_schema as spec_schema


class Schedule(Strict):
    """A list of events that happen once each, in order. See the package's docstring for the file form."""

    version: Literal[2] = 2
    events: list[Event] = Field(max_length=OPERATIONS)

    @model_validator(mode="after")
    def _in_order(self) -> Schedule:
        last: dict[str, tuple[int, float]] = {}
        for number, event in enumerate(self.events):
            for kind, value in event.trigger.counts.items():
                if kind in last and value < last[kind][1]:
                    before, at = last[kind]
                    raise ValueError(
                        f"events happen in order, but events.{number} waits for {kind} {value:g} and stands after "
                        f"events.{before} at {kind} {at:g}"
                    )
                last[kind] = (number, value)
        return self

    def placed_actions(self) -> Iterator[tuple[str, Grow | Action]]:
        """Every action of every event, in order, and the event's place, as errors name it."""
        for number, event in enumerate(self.events):
            for action in event.actions:
                yield f"events.{number}", action

    @classmethod
    def parse(cls, schedule: Schedule | Mapping[str, Any] | list[Any] | str | Path | None) -> Schedule:
        """Make a schedule of a dict, a list of events, YAML or JSON text, or the path of a file. None is empty.

        Schedules of fxgrow 0.1 (``version: 1``, with ``growths``) are read as well.

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
        given = as_mapping(schedule, where, "events")
        if is_version_1(given):
            given = from_version_1(given, where)
        try:
            parsed = cls.model_validate(given)
        except ValidationError as error:
            raise SpecError(explain(where, error)) from None
        events, mistakes = [], []
        for number, event in enumerate(parsed.events):
            operations, wrong = read_operations(event.operations)
            events.append(event.model_copy(update={"operations": operations}))
            mistakes += [f"{where}: events.{number}.{line}" for line in wrong]
        if mistakes:
            raise SpecError("\n".join(mistakes))
        return parsed.model_copy(update={"events": events})

    def to_dict(self) -> dict[str, Any]:
        """Plain data without defaults; ``parse`` reads it back."""
        return {"version": self.version, "events": [event.to_dict() for event in self.events]}

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


# Where each model stands in a schedule, list indices left out; needed to name the nearest valid field.
_PLACES: dict[tuple[str, ...], type[BaseModel]] = {
    (): Schedule,
    ("events",): Event,
    ("events", "trigger"): Trigger,
    ("events", "trigger", "plateau"): Plateau,
    ("events", "trigger", "below"): Below,
    ("events", "optimizer"): OptimizerPolicy,
}


def explain(where: str, error: ValidationError) -> str:
    """One line per mistake: the field, what is wrong, and the nearest valid names."""
    lines = []
    for item in error.errors():
        place = [str(part) for part in item["loc"]]
        names = tuple(str(part) for part in item["loc"] if not isinstance(part, int))
        message = item["msg"].removeprefix("Value error, ")
        known: list[str] = []
        if item["type"] == "extra_forbidden":
            model = _PLACES.get(names[:-1])
            known = [] if model is None else [f.alias or name for name, f in model.model_fields.items()]
            message, wrong = "no such field", names[-1]
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
    operations = [spec["properties"]["operations"]["items"]]
    for name, action in ACTIONS.items():
        made = action.model_json_schema(by_alias=True)
        made["required"] = sorted({"op", *made.get("required", [])})
        schema["$defs"] |= made.pop("$defs", {})
        schema["$defs"][action.__name__] = made
        operations.append({"$ref": f"#/$defs/{action.__name__}"})
        assert made["properties"]["op"]["const"] == name
    for name, (_, what) in ALIASES.items():
        value = {"type": "number", "exclusiveMinimum": 0, "description": what}
        short = {"type": "object", "properties": {"op": {"const": name}, "value": value}}
        operations.append({**short, "required": ["op", "value"], "additionalProperties": False})
    event = schema["$defs"]["Event"]["properties"]
    event["operations"]["items"] = {"anyOf": operations}
    policy = event["optimizer"]  # a bare policy name is enough
    event["optimizer"] = {"anyOf": [{"$ref": policy.pop("$ref")}, {"type": "string"}], **policy}
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return schema


__all__ = ["Schedule", "explain", "json_schema"]
