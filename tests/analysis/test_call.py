"""What both contexts answer alike of a call: operands, results, and what a value is made from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxgrow
from fxgrow.algebra import Conflict, Unifier, size_of
from fxgrow.analysis.call import constant_value, from_parameter
from fxgrow.analysis.context import AnalysisContext
from fxgrow.ir.ops import op_name
from fxgrow.rules.forms import Pointwise


class Model(nn.Module):
    def __init__(self, f: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.w, self.f = nn.Parameter(torch.ones(6, 4)), f

    def forward(self, x: Tensor) -> Any:
        return self.f(self, x)


def at(f: Callable[[Any, Tensor], Any], op: str) -> AnalysisContext:
    """The context at the one call of an op, with the dims that analysis found."""
    axes = fxgrow.capture(Model(f), (torch.ones(2, 4),)).axes
    (node,) = (n for n in axes.program.graph.nodes if op_name(n.target) == op)
    context = AnalysisContext(Unifier(), axes.dims, axes.program.constants)
    context.at(node)
    return context


def test_operands_come_by_the_names_of_the_schema() -> None:
    ctx = at(lambda m, x: nn.functional.linear(x, m.w), "aten.linear.default")
    assert (ctx.op, ctx.first, ctx.shape[1], ctx.result_count) == ("aten.linear.default", "input", 6, None)
    assert [(n, size_of(dims[1])) for n, dims in ctx.tensor_operands()] == [("input", 4), ("weight", 4)]
    assert ctx.dims("bias") is None
    with pytest.raises(Conflict, match="operand bias is missing"):
        ctx.operand("bias")


def test_operands_inside_lists_are_operands() -> None:
    ctx = at(lambda m, x: torch.cat([x, m.w], 0), "aten.cat.default")
    assert [n for n, _ in ctx.tensor_operands()] == ["tensors", "tensors"]


def test_an_op_with_several_results_counts_them() -> None:
    ctx = at(lambda m, x: torch.split(x, [1, 3], -1), "aten.split_with_sizes.default")
    assert (ctx.result_count, ctx.shape[1]) == (2, 1)


def test_operands_that_a_rule_never_asked_for_are_told() -> None:
    ctx = at(lambda m, x: nn.functional.linear(x, m.w), "aten.linear.default")
    assert ctx.operand("input")
    assert [n for n, _ in ctx.unseen_operands(Pointwise())] == ["weight"]
    assert ctx.operand("weight")
    assert not ctx.unseen_operands(Pointwise())


def test_a_parameter_is_seen_through_views_and_casts_only() -> None:
    moved = at(lambda m, x: torch.tanh(m.w.T.double()), "aten.tanh.default")
    assert from_parameter(moved.args["self"])
    assert not from_parameter(at(lambda m, x: torch.tanh(m.w + 1), "aten.tanh.default").args["self"])
    assert not from_parameter(at(lambda m, x: torch.tanh(x), "aten.tanh.default").args["self"])


def test_constants_are_read_through_copies() -> None:
    ctx = at(lambda m, x: x * torch.tensor([1.0, 2.0, 3.0, 4.0]), "aten.mul.Tensor")
    value = ctx.constant(ctx.args["other"])
    assert value is not None and value.tolist() == [1, 2, 3, 4]
    assert constant_value(ctx.args["self"], ctx.constants) is None


def test_values_from_inputs_and_values_from_sizes_are_told_apart() -> None:
    values = at(lambda m, x: torch.tanh(m.w * x.sum()), "aten.tanh.default")
    assert values.from_input(values.args["self"])
    sizes = at(lambda m, x: torch.tanh(m.w * x.shape[0]), "aten.tanh.default")
    assert not sizes.from_input(sizes.args["self"])
