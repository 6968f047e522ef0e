"""Schedules: parsing, errors that name the field, and the JSON Schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from fxgrow.errors import SpecError
from fxgrow.schedule import ACTIONS, ALIASES, Accumulation, Grow, LearningRate, Schedule, json_schema

WIDEN = {"op": "widen", "axis": "*/hidden", "factor": 2}


def entry(**trigger: Any) -> dict[str, Any]:
    return {"trigger": trigger, "operations": [WIDEN]}


FULL = """
version: 2
events:
  - name: wider
    trigger: {step: 10}
    operations:
      - {op: widen, axis: "*/hidden", factor: 2, noise: {kind: antisymmetric, scale: 1.0e-3}}
      - {op: learning_rate, rewarm: 4, from: 0.5}
      - {op: accumulation, factor: 2, learning_rate: sqrt}
    optimizer: {policy: exact, warmup: 7}
  - trigger: {tokens: 5000, plateau: {metric: val_loss, patience: 2, min_delta: 0.1}}
    operations: [{op: deepen, stack: h, factor: 2}, {op: learning_rate, scale: 0.5}]
    optimizer: reset
    on_error: skip
"""


def test_yaml_json_python_and_file_agree(tmp_path: Path) -> None:
    parsed = Schedule.parse(FULL)
    data = yaml.safe_load(FULL)
    path = tmp_path / "schedule.yaml"
    path.write_text(FULL)
    for other in (data, data["events"], json.dumps(data), path, str(path), parsed.to_yaml(), parsed.to_dict()):
        assert Schedule.parse(other) == parsed
    first, second = parsed.events
    assert first.trigger.step == 10
    assert first.operations[0].factor == 2
    assert first.optimizer.policy == "exact"
    assert (second.optimizer.policy, second.on_error) == ("reset", "skip")
    assert str(second.trigger) == "tokens 5000 and plateau of val_loss"
    assert Schedule.parse(None).events == []
    json.dumps(parsed.to_dict())


def test_growth_operations_in_a_row_are_one_growth() -> None:
    other = {**WIDEN, "axis": "*/heads"}
    operations = [WIDEN, other, {"op": "learning_rate", "scale": 0.5}, {"op": "accumulation", "set": 3}, WIDEN]
    (event,) = Schedule.parse([{**entry(step=1), "operations": operations, "optimizer": "copy"}]).events
    first, rate, batch, second = event.actions
    assert isinstance(first, Grow) and [o.axis for o in first.spec.operations] == ["*/hidden", "*/heads"]
    assert isinstance(rate, LearningRate) and isinstance(batch, Accumulation)
    assert isinstance(second, Grow) and len(second.spec.operations) == 1
    assert first.optimizer.policy == second.optimizer.policy == "copy"


@pytest.mark.parametrize(
    ("short", "whole"),
    [
        ({"op": "widen_mlp", "value": 2}, {"op": "widen", "axis": "*/hidden", "factor": 2}),
        ({"op": "stack_layers", "value": 1.5}, {"op": "deepen", "stack": "*", "factor": 1.5}),
        ({"op": "change_grad_accum", "value": 0.5}, {"op": "accumulation", "factor": 0.5}),
        ({"op": "change_lr", "value": 0.1}, {"op": "learning_rate", "scale": 0.1}),
    ],
)
def test_short_names_stand_for_operations(short: dict[str, Any], whole: dict[str, Any]) -> None:
    assert short["op"] in ALIASES
    one, other = (Schedule.parse([{**entry(step=1), "operations": [op]}]) for op in (short, whole))
    assert one == other


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"triger": {"step": 1}}, "schedule: events.0.triger: no such field; did you mean trigger?"),
        ({"trigger": {"steps": 1}}, "schedule: events.0.trigger.steps: no such field; did you mean step?"),
        ({"trigger": {}}, "events.0.trigger: give at least one of step, tokens, epoch, seconds, plateau, below"),
        ({"trigger": {"step": -1}}, "events.0.trigger.step: "),
        (
            {"trigger": {"plateau": {"metrik": "val_loss"}}},
            "events.0.trigger.plateau.metrik: no such field; did you mean metric?",
        ),
        ({"trigger": {"below": {"metric": "x"}}}, "events.0.trigger.below.value: Field required"),
        ({"optimizer": "asymetric"}, "events.0.optimizer.policy: no such optimizer policy 'asymetric'; did you mean"),
        ({"optimizer": {"warmpu": 3}}, "events.0.optimizer.warmpu: no such field; did you mean warmup or"),
        ({"on_error": "ignore"}, "events.0.on_error: "),
        ({"operations": []}, "events.0.operations: List should have at least 1 item"),
        ({"operations": [{**WIDEN, "factor": 0.5}]}, "events.0.operations.0: factor 0.5 would shrink the axis"),
        (
            {"operations": [WIDEN, {"op": "widne"}]},
            "events.0.operations.1: no such operation 'widne'; did you mean widen",
        ),
        (
            {"operations": [WIDEN, {"op": "learning_rat"}]},
            "events.0.operations.1: no such operation 'learning_rat'; did you mean learning_rate?",
        ),
        ({"operations": [{**WIDEN, "axsi": "x"}]}, "events.0.operations.0.axsi: no such field; did you mean axis"),
        (
            {"operations": [{"op": "learning_rate"}]},
            "events.0.operations.0: give exactly one of set, scale, rewarm, position",
        ),
        (
            {"operations": [{"op": "learning_rate", "scale": 2, "from": 0.5}]},
            "events.0.operations.0: from belongs to rewarm",
        ),
        (
            {"operations": [{"op": "learning_rate", "rewarm": 2, "form": 0}]},
            "events.0.operations.0.form: no such field; did you mean from",
        ),
        (
            {"operations": [{"op": "accumulation", "factor": 0}]},
            "events.0.operations.0.factor: Input should be greater than 0",
        ),
        ({"operations": [{"op": "dropout", "p": 1}]}, "events.0.operations.0.p: Input should be less than 1"),
        (
            {"operations": [{"op": "widen_mlp", "value": 1}]},
            "events.0.operations.0: widen_mlp: value 1 is not a factor above 1",
        ),
        (
            {"operations": [{"op": "stack_layers", "factor": 2}]},
            "events.0.operations.0: stack_layers takes one `value`, a factor above 1",
        ),
        (
            {"operations": [{"op": "change_grad_accum", "value": 0}]},
            "events.0.operations.0.factor: Input should be greater than 0",
        ),
    ],
)
def test_mistakes_name_the_field_and_the_nearest_name(change: dict[str, Any], expected: str) -> None:
    data = {**entry(step=1), **change}
    if "triger" in change:
        del data["trigger"]
    with pytest.raises(SpecError) as caught:
        Schedule.parse([data])
    assert expected in str(caught.value)
    assert all(line.startswith("schedule: ") for line in str(caught.value).splitlines())


def test_other_mistakes(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="no such field; did you mean events"):
        Schedule.parse({"event": []})
    with pytest.raises(SpecError, match="does not exist"):
        Schedule.parse(tmp_path / "missing.yaml")
    with pytest.raises(SpecError, match="not YAML"):
        Schedule.parse("events: [\n}")
    with pytest.raises(SpecError, match=r"events\.1 waits for step 3 .* after events\.0 at step 5"):
        Schedule.parse([entry(step=5), entry(step=3)])
    path = tmp_path / "bad.yaml"
    path.write_text("events: [{trigger: {step: 1}}]")
    with pytest.raises(SpecError, match=r"bad\.yaml: events\.0\.operations: Field required"):
        Schedule.parse(path)


def test_schema_describes_what_parse_takes() -> None:
    schema = json_schema()
    event = schema["$defs"]["Event"]
    assert event["additionalProperties"] is False
    kinds = {kind.__name__ for kind in ACTIONS.values()}
    assert {"Trigger", "Plateau", "Below", "Widen", "Deepen", *kinds} <= set(schema["$defs"])
    assert event["properties"]["operations"]["minItems"] == 1
    offered = event["properties"]["operations"]["items"]["anyOf"]
    assert {f"#/$defs/{kind}" for kind in kinds} <= {item.get("$ref") for item in offered}
    assert {item["properties"]["op"]["const"] for item in offered if "properties" in item} == set(ALIASES)
    assert "op" in schema["$defs"]["Dropout"]["required"] and "from" in schema["$defs"]["LearningRate"]["properties"]

    def refs(node: Any) -> Any:
        if isinstance(node, dict):
            yield from ([node["$ref"]] if isinstance(node.get("$ref"), str) else [])
            node = list(node.values())
        if isinstance(node, list):
            for item in node:
                yield from refs(item)

    found = set(refs(schema))
    assert found
    assert {ref.removeprefix("#/$defs/") for ref in found} <= set(schema["$defs"])
