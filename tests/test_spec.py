"""Specs: YAML, JSON and Python are one; mistakes are named; plug-ins extend the union."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from pydantic import TypeAdapter

import fxgrow
from fxgrow import spec as specs
from fxgrow.spec import Deepen, GrowthSpec, Noise, Operation, Widen, json_schema

YAML = """
version: 1
operations:
  - op: widen
    axis: "transformer.h.*.mlp/hidden"
    factor: 2
    fill: copy
    split: even
    noise: {kind: antisymmetric, scale: 1.0e-3, seed: 0}
    preserve: exact
  - {op: widen, axis: "*/residual", to: 48}
  - {op: deepen, stack: transformer.h, factor: 2, order: interleave}
  - {op: insert, layer: linear, after: "features.4"}
"""


def test_every_form_reads_the_same(tmp_path: Path) -> None:
    parsed = GrowthSpec.parse(YAML)
    (tmp_path / "spec.yaml").write_text(YAML)
    (tmp_path / "spec.json").write_text(json.dumps(parsed.to_dict()))
    same = [
        GrowthSpec.parse(tmp_path / "spec.yaml"),
        GrowthSpec.parse(str(tmp_path / "spec.json")),
        GrowthSpec.parse(parsed.to_dict()),
        GrowthSpec.parse(parsed.to_yaml()),
        GrowthSpec.parse(list(parsed.operations)),
        GrowthSpec.parse(parsed),
    ]
    assert all(s.to_dict() == parsed.to_dict() for s in same)
    assert isinstance(parsed.operations[0], Widen)
    assert parsed.operations[0].noise == Noise(scale=1e-3)
    assert parsed.operations[2] == Deepen(stack="transformer.h", factor=2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("operations: [{op: wident, axis: a}]", r"operations\.0: no such operation 'wident'; did you mean widen\?"),
        ("operations: [{axis: a}]", r"operations\.0: an operation needs `op`; known: deepen"),
        ("operations: [{op: widen, axs: a, factor: 2}]", r"operations\.0\.axs: no such field; did you mean axis\?"),
        ("operations: [{op: widen, axis: a, to: big}]", r"operations\.0\.to: .*integer"),
        (
            "operations: [{op: widen, axis: a, factor: 2, noise: {sede: 1}}]",
            r"noise\.sede: no such field; did you mean seed",
        ),
        ("operations: [{op: deepen, stack: h, factor: 0.5}]", "remove blocks"),
        ("operations: [{op: insert, layer: conv, after: a, kernel_size: 4}]", "even: a Dirac convolution"),
        ("operations: []", "at least one operation"),
        ("opperations: []", "did you mean operations"),
        ("version: 2\noperations: [{op: widen, axis: a, factor: 2}]", "version"),
        ("{", "not YAML or JSON"),
        ("3", "expected a mapping"),
    ],
)
def test_mistakes_are_named(text: str, message: str) -> None:
    with pytest.raises(fxgrow.SpecError, match=message):
        GrowthSpec.parse(text + "\n")


def test_missing_file() -> None:
    with pytest.raises(fxgrow.SpecError, match="does not exist"):
        GrowthSpec.parse("nowhere.yaml")


def test_schema_describes_every_operation() -> None:
    schema = json_schema()
    assert {"Widen", "Deepen", "Insert", "Noise"} <= set(schema["$defs"])
    assert schema["$defs"]["Widen"]["additionalProperties"] is False
    assert schema["properties"]["operations"]["items"]["oneOf"]


def test_a_plug_in_extends_the_union() -> None:
    class Polish(Operation):
        op: Literal["polish"] = "polish"
        times: int = 1

    try:
        fxgrow.register_operation(Polish)
        parsed = GrowthSpec.parse([{"op": "polish", "times": 3}])
        assert parsed.operations == [Polish(times=3)]
        assert "Polish" in json_schema()["$defs"]
        with pytest.raises(fxgrow.GrowthRefused, match="no pass is registered"):
            fxgrow.grow(torch.nn.Linear(2, 2), [{"op": "polish"}], (torch.randn(2, 2),))
    finally:
        specs._OPERATIONS.pop("polish")
        GrowthSpec._adapter = None
    assert isinstance(GrowthSpec.operation_adapter(), TypeAdapter)


@pytest.mark.parametrize(
    ("given", "scale", "relative"),
    [
        ({}, 2.0, True),
        ({"seed": 1}, 2.0, True),
        ({"scale": 0.1}, 0.1, False),
        ({"scale": 2.0}, 2.0, False),
        ({"scale": 0.1, "relative": True}, 0.1, True),
        ({"scale": 2.0, "relative": True}, 2.0, True),
        ({"kind": "independent"}, 1e-3, False),
    ],
)
def test_noise_is_absolute_where_a_scale_is_given(given: dict[str, Any], scale: float, relative: bool) -> None:
    op = {"op": "widen", "axis": "a", "factor": 2, "preserve": "approximate", "noise": given}
    spec = GrowthSpec.parse(op)
    noise = spec.operations[0].noise
    assert (noise.scale, noise.relative) == (scale, relative)
    assert GrowthSpec.parse(spec.to_dict()) == spec
    assert GrowthSpec.parse(spec.to_yaml()) == spec
