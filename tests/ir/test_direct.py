"""Generated code that calls ops by PyTorch's own functions: the same ops, arguments and words."""

from __future__ import annotations

import functools
import traceback
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

import fxgrow
from fxgrow.ir.direct import FUNCTIONS, DirectModule
from tests.rules.samples import SAMPLES


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_is_its_op(name: str) -> None:
    op = functools.reduce(getattr, name.split("."), torch.ops)
    for sample in SAMPLES[name]:
        leaves, spec = pytree.tree_flatten((sample.args, sample.kwargs))
        places = [n for n, v in enumerate(leaves) if isinstance(v, torch.Tensor)]

        def run(f: Any, *tensors: torch.Tensor, leaves: Any = leaves, spec: Any = spec, places: Any = places) -> Any:
            given = list(leaves)
            for n, t in zip(places, tensors, strict=True):
                given[n] = t
            args, kwargs = pytree.tree_unflatten(given, spec)
            return f(*args, **kwargs)

        traced = [
            make_fx(functools.partial(run, f), pre_dispatch=True)(*(leaves[n] for n in places))
            for f in (FUNCTIONS[name], op)
        ]
        assert traced[0].code == traced[1].code
        assert next(n.target for n in traced[0].graph.nodes if n.op == "call_function") is op


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)).clamp(max=3))


def test_what_is_printed_is_the_graph_and_an_error_shows_its_line() -> None:
    module = fxgrow.grow(Own(), {"op": "widen", "axis": "*/hidden", "factor": 2}, (torch.randn(3, 4),)).module
    assert isinstance(module, DirectModule)
    assert "torch.ops.aten.linear.default(" in module.code
    assert {"op_aten_linear_default", "op_aten_clamp_default"} <= {*type(module).forward.__globals__}
    module.up.weight = nn.Parameter(torch.randn(8, 5))
    with pytest.raises(RuntimeError) as caught:
        module.forward(torch.randn(3, 4))
    assert "torch.ops.aten.linear.default(x" in "".join(traceback.format_exception(caught.value))


def test_an_edited_graph_runs_what_it_says() -> None:
    module = fxgrow.grow(Own(), {"op": "widen", "axis": "*/hidden", "factor": 2}, (torch.randn(3, 4),)).module
    (node,) = [n for n in module.graph.nodes if n.target is torch.ops.aten.relu.default]
    node.target = torch.ops.aten.tanh.default
    x = torch.randn(3, 4)
    before = module(x)
    module.recompile()
    assert not torch.equal(module(x), before)
    torch.testing.assert_close(module(x), fx.Interpreter(module).run(x), rtol=0, atol=0)
