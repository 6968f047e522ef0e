"""The passes follow torch.fx's own infrastructure and run inside somebody else's pass manager."""

from __future__ import annotations

import pytest
import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult
from torch.fx.passes.infra.pass_manager import PassManager

import fxgrow
from fxgrow.growth import plan_growth
from fxgrow.ir.graphs import copy_graph
from fxgrow.passes import PASSES, GrowthPass
from tests.models import small_gpt, tokens


def test_every_pass_is_a_pass_base() -> None:
    assert set(PASSES) >= {"widen", "extend", "deepen", "insert"}
    for name, (_, growth_pass) in PASSES.items():
        assert issubclass(growth_pass, PassBase)
        assert growth_pass.op == name


def flat_module(program: fxgrow.Program) -> fx.GraphModule:
    module = fx.GraphModule(torch.nn.Module(), fx.Graph())
    module._graph = copy_graph(program.graph)
    module.meta["fxgrow"] = program
    return module


def test_replaying_a_plans_steps_gives_the_planned_graph() -> None:
    program = fxgrow.capture(small_gpt(), tokens())
    spec = fxgrow.GrowthSpec.parse(
        [
            {"op": "widen", "axis": "*/residual", "to": 48},
            {"op": "widen", "axis": "*/head_dim", "factor": 2},
            {"op": "extend", "axis": "*/vocab", "by": 6, "preserve": "approximate"},
            {"op": "deepen", "stack": "transformer.h", "factor": 2, "init": "gate"},
        ]
    )
    plan, grown = plan_growth(program, spec)
    plan = fxgrow.GrowthPlan.from_json(plan.to_json())
    passes: list[GrowthPass] = [PASSES[s.op][1](s) for s in plan.steps]
    module = flat_module(program)
    for growth_pass in passes:
        result = growth_pass(module)
        assert isinstance(result, PassResult)
        assert result.modified
    planned = [(n.op, str(n.target)) for n in grown.graph.nodes]
    replayed = [(n.op, str(n.target)) for n in module.graph.nodes]
    assert replayed == planned


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
