"""Literals that a growth writes into a graph are numbers or ops, never expressions."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor, nn

import fxgrow
from tests.models import trained


class Modulated(nn.Module):
    """Filters made of a second input, one set for each example (StyleGAN2's modulated convolution, depthwise)."""

    def __init__(self, style: str) -> None:
        super().__init__()
        self.inp, self.up, self.style = nn.Conv2d(2, 4, 1), nn.Linear(5, 4), style
        self.out = nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        h = self.inp(x)
        b, c, height, width = h.shape
        if self.style == "all dynamic":
            filters = self.up(z).reshape(b * c, 1, 1, 1).expand(-1, -1, 3, 3)
            y = F.conv2d(h.reshape(1, b * c, height, width), filters, padding=1, groups=b * c)
        elif self.style == "inferred":
            filters = self.up(z).reshape(-1, 1, 1, 1).expand(-1, -1, 3, 3)
            y = F.conv2d(h.reshape(1, -1, height, width), filters, padding=1, groups=b * c)
        elif self.style == "flattened":
            y = (h.reshape(b * c, height, width) * self.up(z).reshape(b * c, 1, 1)).repeat_interleave(1, 0)
        elif self.style == "repeated":
            y = h.reshape(b * c, height, width) * torch.ones(1, 1, 1, dtype=x.dtype).repeat(b * c, 1, 1)
        elif self.style == "expanded":
            y = h.reshape(b * c, height, width) * self.up(z)[0, 0].expand(b * c, height, width)
        else:
            parts = torch.split(h.reshape(b * c * height, width), [b * c, b * c * (height - 1)])
            y = torch.cat([parts[1], parts[0]])
        return self.out(y.reshape(b, c, height, width))


@pytest.mark.parametrize("style", ["all dynamic", "inferred", "flattened", "repeated", "expanded", "split"])
def test_a_literal_of_a_dynamic_and_a_grown_size(style: str) -> None:
    model = trained(Modulated(style).double()).eval()
    args = (torch.randn(3, 2, 5, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64))
    program = fxgrow.capture(model, args)
    grown = 0
    for axis in [a.name for a in program.axes if a.growable]:
        for spec in ({"factor": 2}, {"factor": 3, "fill": "add"}, {"by": 2}):
            try:
                growth = fxgrow.grow(program, {"op": "widen", "axis": axis, **spec}, verify=False)
                growth = fxgrow.grow(growth.module, {"op": "widen", "axis": axis, "factor": 2}, args, verify=False)
            except fxgrow.GrowthRefused:
                continue
            grown += 1
            for node in growth.program.graph.nodes:
                leaves = pytree.tree_leaves([node.args, node.kwargs])
                assert not any(isinstance(x, torch.SymInt | sympy.Basic) for x in leaves), node.format_node()
            for b, size in ((4, 6), (1, 5)):
                other = (
                    torch.randn(b, 2, size, size + 1, dtype=torch.float64),
                    torch.randn(b, 5, dtype=torch.float64),
                )
                torch.testing.assert_close(growth.module(*other), model(*other), rtol=0, atol=1e-12)
    assert grown or style in ("split", "inferred")  # sizes that the analysis does not relate


def test_the_plan_of_such_a_literal_is_json() -> None:
    model = trained(Modulated("all dynamic").double()).eval()
    args: Any = (torch.randn(3, 2, 5, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64))
    program = fxgrow.capture(model, args)
    plan, _ = fxgrow.plan_growth(program, fxgrow.GrowthSpec.parse({"op": "widen", "axis": "up.weight:0", "factor": 2}))
    assert "$times" in plan.model_dump_json()
    assert fxgrow.GrowthPlan.model_validate_json(plan.model_dump_json()).steps == plan.steps
