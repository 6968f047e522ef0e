"""CONTRIBUTING.md, "A pass": a package that is found through its entry points changes the graph by its own pass."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

import fxgrow
from fxgrow import passes, plugins

PACKAGE = '''
"""``value = 2 * (value / 2)``: what a layer gives is as it was, its weight is half the size."""
from typing import Literal

import fxgrow
from fxgrow import passes
from fxgrow.plan import Rescale, Step
from fxgrow.spec import Operation


class Halve(Operation):
    """Store a bias-free layer's weight at half its size, and double what comes out."""

    op: Literal["halve"] = "halve"
    layer: str


class HalvePass(passes.GrowthPass):
    op = "halve"


def plan_halve(state: passes.State, operation: Halve) -> list[Step]:
    weight = f"{operation.layer}.weight"
    if weight not in state.tensors or f"{operation.layer}.bias" in state.tensors:
        raise fxgrow.SpecError(f"halve: {operation.layer!r} is no layer without a bias")
    (node,) = [u for n in state.graph.nodes if n.target == weight for u in n.users]
    step = Step(op="halve", request=operation.model_dump(mode="json"))
    state.tensors[weight].multiply(0.5)
    state.tensors[weight].gradient_scale *= 2.0
    state.apply(step, [Rescale(node=node.name, factor=2.0, name=f"{node.name}_double", why="halved")])
    return [step]


def register() -> None:
    passes.register_pass("halve", plan_halve, HalvePass)
'''
POINTS = """
    [fxgrow.operations]
    halve = contributed_package:Halve

    [fxgrow.passes]
    halve = contributed_package:register
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As pip lays a package out."""
    (tmp_path / "contributed_package.py").write_text(PACKAGE, encoding="utf-8")
    info = tmp_path / "contributed_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: contributed-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(textwrap.dedent(POINTS))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "contributed_package", raising=False)


#: the factor that the new operation leaves stays where it put it
WIDEN = {"op": "widen", "axis": "./hidden", "factor": 2}


@pytest.mark.usefixtures("installed")
def test_a_package_adds_an_operation() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 2)).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    growth = fxgrow.grow(model, [{"op": "halve", "layer": "0"}, {**WIDEN, "constants": "keep"}], (x,))
    weight = growth.module.get_parameter("0.weight")
    assert torch.equal(weight, model[0].weight.repeat(2, 1) / 2)
    assert growth.receipt.error_float64 is not None and growth.receipt.error_float64 < 1e-12
    again = fxgrow.GrowthPlan.from_json(growth.plan.to_json())
    assert [step.op for step in again.steps] == ["halve", "widen"] and again.to_json() == growth.plan.to_json()
    with pytest.raises(fxgrow.SpecError, match="no layer without a bias"):
        fxgrow.grow(model, {"op": "halve", "layer": "2"}, (x,))
    assert {"halve"} == {p.name for p in plugins.plugins() if p.package == "contributed-package"}
    assert "halve" in passes.PASSES
