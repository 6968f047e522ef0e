"""Schedules: parsing, errors that name the field, and the JSON Schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from fxgrow.errors import SpecError
from fxgrow.schedule import Scale, Schedule, json_schema

WIDEN = {"op": "widen", "axis": "*/hidden", "factor": 2}


def entry(**trigger: Any) -> dict[str, Any]:
    return {"trigger": trigger, "operations": [WIDEN]}


FULL = """
version: 1
growths:
  - name: wider
    trigger: {step: 10}
    operations:
      - {op: widen, axis: "*/hidden", factor: 2, noise: {kind: antisymmetric, scale: 1.0e-3}}
    optimizer: {policy: exact, warmup: 7}
    learning_rate: {policy: rewarm, steps: 4, from: 0.5}
    accumulation: 2
  - trigger: {plateau: {metric: val_loss, patience: 2, min_delta: 0.1}}
    operations: [{op: deepen, stack: h, factor: 2}]
    optimizer: reset
    learning_rate: {policy: scale, factor: 0.5}
"""


def test_yaml_json_python_and_file_agree(tmp_path: Path) -> None:
    parsed = Schedule.parse(FULL)
    data = yaml.safe_load(FULL)
    path = tmp_path / "schedule.yaml"
    path.write_text(FULL)
    for other in (data, data["growths"], json.dumps(data), path, str(path), parsed.to_yaml(), parsed.to_dict()):
        assert Schedule.parse(other) == parsed
    first, second = parsed.growths
    assert first.trigger.step == 10
    assert first.operations[0].factor == 2
    assert first.optimizer.policy == "exact"
    assert second.optimizer.policy == "reset"
    assert isinstance(second.learning_rate, Scale)
    assert str(second.trigger) == "plateau of val_loss"
    assert Schedule.parse(None).growths == []
    json.dumps(parsed.to_dict())


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"triger": {"step": 1}}, "schedule: growths.0.triger: no such field; did you mean trigger?"),
        ({"trigger": {"steps": 1}}, "schedule: growths.0.trigger.steps: no such field; did you mean step?"),
        ({"trigger": {}}, "growths.0.trigger: give exactly one of step, tokens, epoch, plateau"),
        ({"trigger": {"step": 1, "tokens": 3}}, "growths.0.trigger: give exactly one of"),
        ({"trigger": {"step": -1}}, "growths.0.trigger.step: "),
        (
            {"trigger": {"plateau": {"metrik": "val_loss"}}},
            "growths.0.trigger.plateau.metrik: no such field; did you mean metric?",
        ),
        ({"optimizer": "asymetric"}, "growths.0.optimizer.policy: no such optimizer policy 'asymetric'; did you mean"),
        ({"optimizer": {"warmpu": 3}}, "growths.0.optimizer.warmpu: no such field; did you mean warmup or"),
        (
            {"learning_rate": "rewrm"},
            "growths.0.learning_rate: no such learning-rate policy 'rewrm'; did you mean rewarm?",
        ),
        (
            {"learning_rate": {"policy": "rewarm", "steps": 2, "form": 0}},
            "growths.0.learning_rate.form: no such field; did you mean from?",
        ),
        ({"learning_rate": {"policy": "rewarm"}}, "growths.0.learning_rate.steps: Field required"),
        ({"accumulation": 0}, "growths.0.accumulation: "),
        ({"operations": []}, "growths.0.(top): a spec needs at least one operation"),
        ({"operations": [{**WIDEN, "factor": 0.5}]}, "growths.0.operations.0: factor 0.5 would shrink the axis"),
        (
            {"operations": [WIDEN, {"op": "widne"}]},
            "growths.0.operations.1: no such operation 'widne'; did you mean widen",
        ),
        ({"operations": [{**WIDEN, "axsi": "x"}]}, "growths.0.operations.0.axsi: no such field; did you mean axis"),
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
    with pytest.raises(SpecError, match="no such field; did you mean growths"):
        Schedule.parse({"growth": []})
    with pytest.raises(SpecError, match="does not exist"):
        Schedule.parse(tmp_path / "missing.yaml")
    with pytest.raises(SpecError, match="not YAML"):
        Schedule.parse("growths: [\n}")
    with pytest.raises(SpecError, match=r"growths\.1 waits for step 3 .* after growths\.0 at step 5"):
        Schedule.parse([entry(step=5), entry(step=3)])
    path = tmp_path / "bad.yaml"
    path.write_text("growths: [{trigger: {step: 1}}]")
    with pytest.raises(SpecError, match=r"bad\.yaml: growths\.0\.operations: Field required"):
        Schedule.parse(path)


def test_schema_describes_what_parse_takes() -> None:
    schema = json_schema()
    growth = schema["$defs"]["ScheduledGrowth"]
    assert growth["additionalProperties"] is False
    assert {"Trigger", "Plateau", "Widen", "Deepen", "Rewarm"} <= set(schema["$defs"])
    assert growth["properties"]["operations"]["minItems"] == 1

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
