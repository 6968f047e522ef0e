"""Casts of the grown module: it computes what the cast model computes, or says why it cannot."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxgrow
from fxgrow.errors import GrowthRefused, InputError
from tests.models import trained

X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
WIDER = {"op": "widen", "axis": "up.weight:0", "factor": 2}


class Model(nn.Module):
    """A forward of one's own in front of two layers."""

    def __init__(self, first: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.out = nn.Linear(8, 16), nn.Linear(16, 8)
        self.weight = nn.Parameter(torch.ones(8))
        self.register_buffer("table", torch.linspace(-2.1, 2.3, 8))
        self.plain, self.first = torch.linspace(-1.1, 1.7, 8), first

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.up(self.first(self, x))))


def norm(m: Any, x: Tensor) -> Tensor:
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)
    return x + m.weight * h.type_as(x)


def norm_to(m: Any, x: Tensor) -> Tensor:
    dtype, h = x.dtype, x.to(torch.float32)
    return x + m.weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)).to(dtype)


def causal(m: Any, x: Tensor) -> Tensor:
    n = x.shape[1]
    mask = torch.full((n, n), torch.finfo(x.dtype).min, dtype=x.dtype).triu(1)
    return ((x @ x.mT + mask).softmax(-1, dtype=torch.float32)).to(x.dtype) @ x


def clamped(m: Any, x: Tensor) -> Tensor:
    return x.clamp(-0.3, 0.3) if x.dtype is torch.float16 else x


def sized(m: Any, x: Tensor) -> Tensor:
    return x * x.element_size()


FORWARDS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a cast that does nothing in float32": norm,
    "a literal that is a dtype's own": norm_to,
    "a mask of the dtype's least number": causal,
    "a branch that one dtype takes": clamped,
    "a number that follows the dtype": sized,
    "zeros of a dtype": lambda m, x: x + torch.zeros(8, dtype=x.dtype),
    "positions": lambda m, x: x + torch.arange(8, dtype=m.weight.dtype) / 8,
    "a table": lambda m, x: x * m.table.to(x) + m.table,
    "constants keep their dtype": lambda m, x: (x * torch.tensor([1.1, 2, 3, 4, 5, 6, 7, 8.3])).to(x.dtype),
    "attributes keep their dtype": lambda m, x: (x * m.plain).to(m.weight.dtype),
    "constants of a dtype": lambda m, x: x + torch.tensor([1.1, 2, 3, 4, 5, 6, 7, 8.3], dtype=x.dtype),
    "an eps that the op chooses": lambda m, x: F.rms_norm(x * 1e-3, (8,), m.weight),
    "sums": lambda m, x: x * x.cumsum(-1, dtype=x.dtype),
}


def assert_near(new: Tensor, old: Tensor) -> None:
    assert new.dtype is old.dtype
    limit = {torch.float64: 1e-12, torch.float16: 4e-3, torch.bfloat16: 3e-2}[old.dtype]
    assert (new - old).abs().max() <= limit * old.abs().max()


@pytest.mark.parametrize("name", FORWARDS)
def test_a_cast_module_computes_what_the_cast_model_does(name: str) -> None:
    model = trained(Model(FORWARDS[name]))
    module = fxgrow.grow(model, WIDER, (X,), verify=False).module
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        new = copy.deepcopy(module).to(dtype)(X.to(dtype))
        assert_near(new, copy.deepcopy(model).to(dtype)(X.to(dtype)))
    assert all(p.dtype is torch.float32 for p in model.parameters())


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.out, self.drop = nn.Linear(8, 16), nn.Linear(16, 8), nn.Dropout(0.0)
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.out(torch.tanh(self.up(norm_to(self, x)))))


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_blocks_that_are_copies_follow_and_still_share_a_class() -> None:
    model = trained(Deep())
    spec = [{"op": "widen", "axis": "layers.*.up.weight:0", "factor": 2}, {"op": "deepen", "stack": "layers", "by": 1}]
    module = fxgrow.grow(model, spec, (X,)).module
    module.bfloat16()
    assert_near(module(X.bfloat16()), copy.deepcopy(model).bfloat16()(X.bfloat16()))
    assert len({type(block) for block in module.layers}) == 1
    module.float()
    assert "bfloat16" not in module.layers[2].code
    assert module(X).dtype is torch.float32


def test_casts_follow_one_another_and_growths_of_growths() -> None:
    model = trained(Model(norm_to))
    first = fxgrow.grow(model, WIDER, (X,), verify=False).module
    second = fxgrow.grow(first, WIDER, (X,), verify=False).module
    other = copy.deepcopy(second)
    second.half().bfloat16()
    assert_near(second(X.bfloat16()), copy.deepcopy(model).half().bfloat16()(X.bfloat16()))
    assert next(first.parameters()).dtype is torch.float32
    assert_near(other.double()(X.double()), copy.deepcopy(model).double()(X.double()))
    third = fxgrow.grow(second, WIDER, (X.bfloat16(),), verify=False).module  # of the module as it is now
    assert_near(third(X.bfloat16()), second(X.bfloat16()))


def test_a_growth_that_was_applied_is_asked_itself() -> None:
    model = trained(Model(norm_to))
    before = copy.deepcopy(model).bfloat16()(X.bfloat16())
    growth = fxgrow.grow(model, WIDER, (X,), verify=False)
    # modules of the class hold the very tensors
    growth.apply_(model)
    growth.module.bfloat16()
    assert_near(growth.module(X.bfloat16()), before)


def test_a_module_whose_model_is_gone_is_not_cast() -> None:
    growth = fxgrow.grow(trained(Model(norm_to)), WIDER, (X,), verify=False)
    gc.collect()
    before = growth.module(X)
    with pytest.raises(GrowthRefused, match=r"cannot be cast from torch.float32 to torch.float16.*test_casts.py:\d+"):
        growth.module.half()
    assert torch.equal(growth.module(X), before)
    growth.module.to("cpu")
    plain = fxgrow.grow(trained(Model(lambda m, x: x.relu())), WIDER, (X,), verify=False).module
    again = pickle.loads(pickle.dumps(plain))  # nothing asks for dtypes
    assert_near(again.half()(X.half()), plain.half()(X.half()))


def test_inputs_of_another_dtype_than_the_cast_ones_are_refused() -> None:
    model = trained(Model(lambda m, x: (x * 3).to(m.weight.dtype)))
    module = fxgrow.grow(model, WIDER, (X,), verify=False).module.half()
    assert module(X.half()).dtype is torch.float16
    with pytest.raises(InputError, match=r"input x is torch.float32"):
        module(X)


def test_a_cast_module_is_saved_and_loaded(tmp_path: Path) -> None:
    model = trained(Model(norm_to))
    growth = fxgrow.grow(model, WIDER, (X,), verify=False)
    new = growth.module.bfloat16()(X.bfloat16())
    for again in (
        fxgrow.load(fxgrow.save(growth, tmp_path / "grown")).module,
        pickle.loads(pickle.dumps(growth.module)),
    ):
        assert torch.equal(again(X.bfloat16()), new)
        with pytest.raises(InputError):
            again(X)
        with pytest.raises(GrowthRefused):
            again.float()
