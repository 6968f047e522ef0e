"""Axes do not change: a plan makes further ones, and leaves those of the program and of earlier steps as they are."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

import fxgrow
from fxgrow.algebra import leaves
from fxgrow.analysis.axes import Axes
from fxgrow.growth import plan_growth
from fxgrow.passes import State, run_operation
from tests.models import small_gpt, tokens


@pytest.fixture
def program() -> fxgrow.Program:
    return fxgrow.capture(small_gpt(), tokens())


def seen(axes: Axes) -> Any:
    """All that axes say, sizes included."""
    return (
        [dataclasses.astuple(dataclasses.replace(i, axis=None)) for i in axes],  # type: ignore[arg-type]
        {n.name: repr(d) for n, d in axes.dims.items()},
        {k: [n.name for n in nodes] for k, nodes in axes.uses.items()},
    )


SPECS: dict[str, tuple[list[dict[str, Any]], bool]] = {
    "widen": ([{"op": "widen", "axis": "*/residual", "to": 48}, {"op": "widen", "axis": "*/heads", "factor": 2}], True),
    "extend": ([{"op": "extend", "axis": "*/positions", "factor": 2}], True),
    "deepen": ([{"op": "deepen", "stack": "transformer.h", "factor": 2}], True),
    "refused at the second step": (
        [{"op": "widen", "axis": "*/hidden", "factor": 2}, {"op": "widen", "axis": "*/vocab", "factor": 2}],
        False,
    ),
    "refused at the second axis": ([{"op": "widen", "axis": "*", "factor": 2}], False),
}


@pytest.mark.parametrize("name", SPECS)
def test_a_plan_leaves_the_programs_axes_as_they_were(name: str, program: fxgrow.Program) -> None:
    operations, possible = SPECS[name]
    axes = program.axes
    before = seen(axes)
    if possible:
        plan_growth(program, fxgrow.GrowthSpec.parse(operations))
    else:
        with pytest.raises(fxgrow.GrowthRefused):
            plan_growth(program, fxgrow.GrowthSpec.parse(operations))
    assert program.axes is axes
    assert seen(axes) == before


def test_a_step_leaves_the_axes_before_it_as_they_were(program: fxgrow.Program) -> None:
    state = State.start(program)
    first = state.axes
    before = seen(first)
    run_operation(state, fxgrow.GrowthSpec.parse({"op": "widen", "axis": "*/residual", "to": 48}).operations[0])
    second = state.axes
    assert seen(first) == before
    assert [i.name for i in second] == [i.name for i in first]
    assert {i.name for i in second if i.size != first[i.name].size} == {"./residual"}
    assert second["./residual"].size == 48
    (width,) = {leaf.size for leaf in leaves(second.tensor_dims()["transformer.ln_f.weight"][0])}
    assert width == 48
    after = seen(second)
    with pytest.raises(fxgrow.GrowthRefused):
        run_operation(state, fxgrow.GrowthSpec.parse({"op": "widen", "axis": "*/vocab", "factor": 2}).operations[0])
    assert state.axes is second
    assert seen(second) == after


def test_grown_axes_are_those_that_analysis_finds_in_the_grown_graph(program: fxgrow.Program) -> None:
    state = State.start(program)
    spec = fxgrow.GrowthSpec.parse([{"op": "widen", "axis": "*/residual", "by": 5}, {"op": "extend", "axis": "*/vocab",
                                    "by": 3, "preserve": "approximate"}])  # fmt: skip
    for operation in spec.operations:
        run_operation(state, operation)
    held = seen(state.axes)
    state._axes = None
    found = seen(state.axes)
    assert [i[:3] for i in held[0]] == [i[:3] for i in found[0]]
    assert held[1] == found[1]
    assert held[2] == found[2]


def test_nothing_of_axes_can_be_assigned(program: fxgrow.Program) -> None:
    axes = program.axes
    info = axes["./residual"]
    node = next(iter(axes.dims))
    for owner, name in ((axes, "dims"), (axes, "by_name"), (info, "size"), (info.axis, "size"), (info.axis, "binding")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(owner, name, 3)
    with pytest.raises(TypeError):
        axes.dims[node] = []  # type: ignore[index]
    with pytest.raises(TypeError):
        axes.by_name["x"] = info  # type: ignore[index]


class Named(nn.Module):
    """A parameter that is called like an op."""

    def __init__(self) -> None:
        super().__init__()
        self.mul = nn.Parameter(torch.ones(3))
        self.up, self.down = nn.Linear(2, 3), nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.up(x)
        return self.down(torch.mul(hidden, self.mul))  # type: ignore[no-any-return]


def test_the_graph_holds_what_explain_says() -> None:
    axes = fxgrow.capture(Named(), (torch.randn(5, 2),)).axes
    (info,) = [i for i in axes if i.growable]
    assert {str(m) for m in info.members} == {"mul:0", "up.weight:0", "up.bias:0", "down.weight:1"}
    assert {name: about["dims"] for name, about in axes.around(info.name, "tensor")} == {
        "mul": [0],
        "up.weight": [0],
        "up.bias": [0],
        "down.weight": [1],
    }
    ops = [about["target"] for _, about in axes.around(info.name, "op")]
    assert ops == ["aten.linear.default", "aten.mul.Tensor", "aten.linear.default"]
    words = axes.explain(info.name)
    assert "mul:0" in words
    assert words.count("=> aten.linear.default") == 2
    assert words.count("=> aten.mul.Tensor") == 1
    assert axes.graph.nodes[info.name]["size"] == 3
