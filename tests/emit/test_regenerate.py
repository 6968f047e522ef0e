"""Regenerated modules: hierarchy, shared classes, short code, names."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import fx, nn

import fxgrow
from fxgrow.compile import blocks_of
from tests.models import assert_same, small_gpt, tokens
from tests.test_growth import ALL


@pytest.fixture(scope="module")
def growth() -> Any:
    return fxgrow.grow(small_gpt(torch.float32, dropout=0.1), ALL, tokens(), verify=False)


def test_blocks_are_modules_of_one_class(growth: Any) -> None:
    module = growth.module
    assert isinstance(module, fx.GraphModule)
    assert isinstance(module.transformer.h, nn.ModuleList)
    assert len(module.transformer.h) == 4
    kinds = {type(b) for b in module.transformer.h}
    assert len(kinds) == 1
    assert len({b.forward.__func__.__code__ for b in module.transformer.h}) == 1
    assert kinds.pop().__name__.startswith("Block")


def test_code_is_short_and_does_not_grow_with_depth(growth: Any) -> None:
    assert len(growth.module.code.splitlines()) < 40
    assert len(growth.module.transformer.h[0].code.splitlines()) < 70
    deeper = fxgrow.grow(growth.module, [{"op": "deepen", "stack": "transformer.h", "by": 4}], tokens(), verify=False)
    assert len(deeper.module.code.splitlines()) == len(growth.module.code.splitlines()) + 4


def test_state_dict_names_are_the_originals(growth: Any) -> None:
    names = set(growth.module.state_dict())
    one = {n for n in small_gpt().state_dict() if ".h." not in n}
    assert one <= names
    assert {n.split(".")[2] for n in names if ".h." in n} == {"0", "1", "2", "3"}


def test_copies_and_modes_survive(growth: Any) -> None:
    module = copy.deepcopy(growth.module).eval()
    args = tokens(2)
    assert_same(module(*args)[0], growth.module.eval()(*args)[0])
    module.train()
    assert all(b.training for _, b in blocks_of(module))
    state = {k: torch.zeros_like(v) for k, v in module.state_dict().items()}
    module.load_state_dict(state)
    assert float(module.eval()(*args)[0].detach().abs().max()) == 0.0


def test_double_and_half_precision(growth: Any) -> None:
    module = copy.deepcopy(growth.module).eval()
    args = tokens(2)
    expected = module(*args)[0].detach()
    assert torch.allclose(module.double()(*args)[0].float(), expected, atol=1e-4)


@pytest.mark.compile
def test_compiles_whole_and_by_region() -> None:
    model = small_gpt(torch.float32, n_layer=3)
    args = tokens(1)
    expected = model.eval()(*args)[0].detach()
    growth = fxgrow.grow(model, [{"op": "widen", "axis": "*/hidden", "factor": 2}], args, verify=False)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    whole = torch.compile(copy.deepcopy(growth.module).eval(), fullgraph=True)
    assert torch.allclose(whole(*args)[0], expected, atol=1e-4)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    regions = growth.compile().train()
    out, loss = regions(*args)
    loss.backward()
    assert torch.allclose(out.detach(), expected, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, "three equal blocks are one compilation"
    assert set(growth.module.state_dict()) == set(model.state_dict())


def test_sizes_that_the_trace_fixed_are_checked() -> None:
    """Export may make a size part of the graph; another one would then give wrong numbers in silence."""

    class Mean(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = torch.nn.Linear(4, 6), torch.nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = torch.tanh(self.up(x))
            return self.down(sum(h[:, i] for i in range(x.shape[1])))  # a loop in Python: the trace fixes its length

    model, x = Mean(), torch.randn(3, 5, 4)
    module = fxgrow.grow(model, {"op": "widen", "axis": "./hidden", "factor": 2}, (x,)).module
    torch.testing.assert_close(module(x[:2]), model(x[:2]))
    with pytest.raises(ValueError, match=r"input x has shape \(3, 10, 4\); this graph takes \(any, 5, 4\)"):
        module(torch.cat([x, x], 1))


class Watched(nn.Module):
    """A block that counts in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.register_buffer("m", torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.m.mul_(0.9).add_(x.detach().mean(0))
        return x + torch.tanh(self.a(x))


class Observed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(3, 4), nn.Linear(4, 2)
        self.h = nn.ModuleList(Watched() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.up(x)
        watched = y
        for block in self.h:
            watched = block(watched)  # for what it leaves in the buffers
        return self.down(y)


def test_a_block_whose_result_nobody_uses_still_writes() -> None:
    torch.manual_seed(0)
    model, x = Observed().double(), torch.randn(5, 3, dtype=torch.float64)
    growth = fxgrow.grow(model, {"op": "widen", "axis": "./residual", "factor": 2}, (x,), verify=False)
    for _ in range(2):
        torch.testing.assert_close(growth.module(x), model(x))
    for name in ("h.0.m", "h.1.m"):
        old, new = model.get_buffer(name), growth.module.get_buffer(name)
        torch.testing.assert_close(new[: old.numel()] if new.shape == old.shape else new.reshape(2, -1)[0], old)
    with pytest.raises(fxgrow.GrowthRefused, match=r"nothing that h\.1 computes is used outside it|cannot deepen h"):
        fxgrow.grow(model, {"op": "deepen", "stack": "h", "after": [1]}, (x,), verify=False)
