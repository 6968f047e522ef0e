"""Where factors go: a literal that follows, a new node, an operand, a parameter, a norm before the product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxgrow
from fxgrow.errors import GrowthRefused
from fxgrow.ir.ops import op_name
from fxgrow.plan import AxisMap
from fxgrow.proof.call import GrowingCall
from fxgrow.proof.contents import Restart
from fxgrow.proof.scales import Scales


class Model(nn.Module):
    """``w`` of (6, 4), ``b`` of 6, a norm over 4 entries."""

    def __init__(self, f: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.ones(6, 4)), nn.Parameter(torch.ones(6))
        self.norm, self.f = nn.LayerNorm(4), f

    def forward(self, x: Tensor) -> Any:
        return self.f(self, x)


def at(f: Callable[[Any, Tensor], Any], op: str) -> tuple[Scales, fx.Node]:
    """Scales at the one call of an op, while the first axis of the model grows by whole copies."""
    axes = fxgrow.capture(Model(f), (torch.ones(2, 4),)).axes
    (info, *_) = axes
    call = GrowingCall(axes, info.axis, info.name, AxisMap.copy(info.size, 2 * info.size, "even"))
    (node,) = (n for n in axes.program.graph.nodes if op_name(n.target) == op)
    call.at(node)
    return Scales(call), node


def test_a_result_is_scaled_in_the_literal_that_follows() -> None:
    scales, node = at(lambda m, x: torch.sum(x @ m.w.T, -1) / 4, "aten.sum.dim_IntList")
    scales.rescale_output(0.5)
    (user,) = node.users
    assert scales.call.outcome.graph.literals == {(user.name, "other"): 8}
    assert not scales.call.outcome.graph.results


def test_a_result_with_other_users_is_scaled_by_a_node() -> None:
    scales, node = at(lambda m, x: torch.sum(x @ m.w.T, -1).sin(), "aten.sum.dim_IntList")
    scales.rescale_output(0.5)
    scales.rescale_output(0.5)
    assert scales.call.outcome.graph.results == {node.name: 0.25}


@pytest.mark.parametrize(("dtype", "factor"), [(torch.int32, 0.5), (torch.int64, 0.4)])
def test_whole_numbers_are_scaled_without_remainder_or_not_at_all(dtype: torch.dtype, factor: float) -> None:
    scales, _ = at(lambda m, x: (x @ m.w.T > 0).sum(-1, dtype=dtype), "aten.sum.dim_IntList")
    with pytest.raises(GrowthRefused, match="whole numbers"):
        scales.rescale_output(factor)


def test_a_product_with_a_bias_is_scaled_in_its_operand() -> None:
    scales, node = at(lambda m, x: nn.functional.linear(x, m.w, m.b), "aten.linear.default")
    scales.rescale_product(0.5, "input", ["bias"])
    (source, *_) = node.all_input_nodes
    assert scales.call.outcome.graph.operands == {(node.name, source.name): 0.5}


def test_a_norm_before_a_product_takes_its_factor_if_nothing_else_uses_its_weight() -> None:
    scales, node = at(lambda m, x: nn.functional.linear(m.norm(x), m.w), "aten.linear.default")
    scales.rescale_product(0.5, "input", ["bias"])
    assert not scales.call.outcome.graph.results
    norm = node.all_input_nodes[0].name
    assert scales.folds == {"norm.weight": {norm: 0.5}, "norm.bias": {norm: 0.5}}
    scales.folds["norm.weight"]["another"] = 0.25
    with pytest.raises(Restart):
        scales.settle()
    assert scales.no_fold


def test_a_parameter_is_scaled_where_all_its_users_agree() -> None:
    scales, node = at(lambda m, x: nn.functional.linear(x, m.w, m.b), "aten.linear.default")
    assert scales.scale_shared("weight", 0.5)
    assert not scales.scale_shared("input", 0.5)  # no parameter
    scales.settle()
    assert scales.call.outcome.scales["w"].factor == 0.5
    scales.begin()
    scales.shared = {"w": {node.name: 0.5, "another": 0.25}}
    with pytest.raises(GrowthRefused, match="several ops use w, and would need it multiplied by different factors"):
        scales.settle()
