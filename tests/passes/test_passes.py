"""The passes follow torch.fx's own infrastructure and run inside somebody else's pass manager."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult
from torch.fx.passes.infra.pass_manager import PassManager

import fxgrow
from fxgrow.growth import plan_growth
from fxgrow.ir.graphs import copy_graph
from fxgrow.ir.nodes import info_of
from fxgrow.ir.provenance import Provenance, provenance_of, remember
from fxgrow.passes import PASSES, GrowthPass, State
from fxgrow.plan import Step
from tests.models import small_gpt, tokens


def test_every_pass_is_a_pass_base() -> None:
    assert set(PASSES) >= {"widen", "extend", "deepen", "insert"}
    for name, (_, growth_pass) in PASSES.items():
        assert issubclass(growth_pass, PassBase)
        assert growth_pass.op == name


def flat_module(program: fxgrow.Program) -> fx.GraphModule:
    module = fx.GraphModule(torch.nn.Module(), fx.Graph())
    module._graph = copy_graph(program.graph)
    remember(module, Provenance(program))
    return module


REPLAYED: dict[str, list[dict[str, Any]]] = {
    "widen, extend, deepen": [
        {"op": "widen", "axis": "*/residual", "to": 48},
        {"op": "widen", "axis": "*/head_dim", "factor": 2},
        {"op": "extend", "axis": "*/vocab", "by": 6, "preserve": "approximate"},
        {"op": "deepen", "stack": "transformer.h", "factor": 2, "init": "gate"},
    ],
    "deepen, deepen, widen": [
        {"op": "deepen", "stack": "transformer.h", "after": [1, 0]},
        {"op": "deepen", "stack": "transformer.h", "factor": 2, "init": "gate"},
        {"op": "widen", "axis": "*/residual", "to": 48},
    ],
    "insert, deepen, widen": [
        {"op": "insert", "layer": "linear", "after": "transformer.h.*.mlp"},
        {"op": "deepen", "stack": "transformer.h", "by": 1},
        {"op": "widen", "axis": "*/residual", "by": 3},
    ],
}


@pytest.mark.parametrize("name", REPLAYED)
def test_replaying_a_plans_steps_gives_the_planned_graph(name: str) -> None:
    program = fxgrow.capture(small_gpt(), tokens())
    containers = dict(program.containers)
    plan, grown = plan_growth(program, fxgrow.GrowthSpec.parse(REPLAYED[name]))
    plan = fxgrow.GrowthPlan.from_json(plan.to_json())
    passes: list[GrowthPass] = [PASSES[s.op][1](s) for s in plan.steps]
    module = flat_module(program)
    for growth_pass in passes:
        result = growth_pass(module)
        assert isinstance(result, PassResult)
        assert result.modified
    assert graph_of(module.graph) == graph_of(grown.graph)
    held = provenance_of(module)
    assert held is not None
    assert held.program.containers == grown.containers
    assert program.containers == containers


def graph_of(graph: fx.Graph) -> list[str]:
    """Every node with its arguments and its module."""
    return [f"{n.name} = {n.target}{n.args}{n.kwargs} in {info_of(n).module_path}" for n in graph.nodes]


def test_a_pass_that_moves_modules_asks_for_the_program() -> None:
    program = fxgrow.capture(small_gpt(), tokens())
    plan, grown = plan_growth(program, fxgrow.GrowthSpec.parse([{"op": "deepen", "stack": "transformer.h", "by": 1}]))
    module = flat_module(program)
    module.meta.clear()
    with pytest.raises(fxgrow.GrowthRefused, match="needs the program that the graph is of"):
        PASSES["deepen"][1](plan.steps[0]).call(module)
    module = flat_module(program)
    module.meta.clear()
    PASSES["deepen"][1](plan.steps[0], program).call(module)
    assert graph_of(module.graph) == graph_of(grown.graph)


def test_a_pass_runs_in_a_pass_manager() -> None:
    program = fxgrow.capture(small_gpt(), tokens())
    plan, _ = plan_growth(program, fxgrow.GrowthSpec.parse([{"op": "widen", "axis": "*/heads", "factor": 2}]))
    counted = []

    def count(module: fx.GraphModule) -> PassResult:
        counted.append(len(module.graph.nodes))
        return PassResult(module, False)

    manager = PassManager(passes=[count, PASSES["widen"][1](plan.steps[0]), count])
    module = flat_module(program)
    result = manager(module)
    assert len(counted) == 2
    shapes = [n.args[1] for n in result.graph_module.graph.nodes if n.target == torch.ops.aten.reshape.default]
    assert any(8 in shape for shape in shapes), "the four heads of the views are eight"


def test_a_plan_of_another_graph_is_refused() -> None:
    program = fxgrow.capture(small_gpt(), tokens())
    plan, _ = plan_growth(program, fxgrow.GrowthSpec.parse([{"op": "widen", "axis": "*/heads", "factor": 2}]))
    other = fxgrow.capture(torch.nn.Sequential(torch.nn.Linear(4, 4)), (torch.randn(2, 4),))
    module = flat_module(other)
    with pytest.raises(fxgrow.GrowthRefused, match="another graph"):
        PASSES["widen"][1](plan.steps[0]).call(module)


def test_a_step_of_an_operation_without_a_pass_is_refused() -> None:
    state = State.start(fxgrow.capture(torch.nn.Linear(4, 4), (torch.randn(2, 4),)))
    with pytest.raises(fxgrow.GrowthRefused, match="no pass is registered for operation 'nothing'"):
        state.apply(Step(op="nothing", request={}), [])
