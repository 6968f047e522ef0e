"""A compiler of somebody's own, whose passes stand beside growth passes."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from examples.custom_compiler.compiler import Compiler, Model, TanhOfTwice, exported_graph


@pytest.mark.compile
@pytest.mark.parametrize("front", ["export", "symbolic"])
def test_a_growth_between_foreign_passes(front: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, x = Model().double(), torch.randn(4, 5, dtype=torch.float64)
    module = exported_graph(model, (x,)) if front == "export" else fx.symbolic_trace(model)
    compiler = Compiler([{"op": "widen", "axis": "first.weight:0", "factor": 2}], first=[TanhOfTwice()])
    compiled = compiler.compile(module, (x,))
    assert compiled.module.get_parameter("second.weight").shape == (3, 16)
    assert compiled.after["aten.tanh.default"] == 1 and not compiled.after["aten.sigmoid.default"]
    torch.testing.assert_close(compiled.run(x), model(x))
    torch.testing.assert_close(compiled.run(x[:3]), model(x[:3]))
    assert compiler.seen, "the back end was given the grown graph"
    compiled.run(x).sum().backward()
    assert all(p.grad is not None for p in compiled.module.parameters())
    model(x).sum().backward()
    assert model.first.weight.shape == (8, 5), "the model itself is as it was"
