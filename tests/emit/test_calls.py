"""Several ways of calling a model: one set of axes and parameters, one graph for each."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import fxgrow
from tests.models import assert_same, relative_error, small_gpt, tokens, trained
from tests.test_growth import GROWTHS


@pytest.fixture(scope="module")
def gpt() -> Any:
    model = small_gpt(dropout=0.1).eval()
    x, y = tokens()
    return model, fxgrow.capture(model, calls={"train": (x, y), "generate": (x,)})


@pytest.mark.parametrize("name", ["hidden x2", "stream x2", "stream 32 -> 48", "heads add 2", "depth gate", "all"])
def test_every_call_keeps_its_function(gpt: Any, name: str) -> None:
    model, program = gpt
    growth = fxgrow.grow(program, GROWTHS[name])
    assert len(growth.receipt.outputs) == 3
    assert growth.receipt.error_float64_train is not None
    assert growth.receipt.error_float64_train <= 1e-12
    module = growth.module.eval()
    x, y = tokens(4, batch=2, length=9)
    assert relative_error(model, module, (x, y)) <= 1e-12
    assert module(x)[1] is None
    assert float((module(x)[0] - model(x)[0]).detach().abs().max()) <= 1e-12
    assert float((module(x, targets=None)[0] - model(x)[0]).detach().abs().max()) <= 1e-12
    assert not any(c.kind == "rescale" for s in growth.plan.steps for c in s.changes), "folded into the norm they share"


def test_state_is_shared_and_copies_dispatch_too(gpt: Any) -> None:
    model, program = gpt
    module = fxgrow.grow(program, GROWTHS["depth x2"], verify=False).module.eval()
    assert set(module.state_dict()) == {
        n.replace("h.1.", f"h.{i}.") if "h.1." in n else n.replace("h.0.", f"h.{i}.") if "h.0." in n else n
        for n in model.state_dict()
        for i in range(4)
    }
    x, y = tokens(5)
    again = copy.deepcopy(module)
    assert_same([again(x)[0], again(x, y)[1]], [module(x)[0], module(x, y)[1]])
    second = fxgrow.grow(module, GROWTHS["stream x2"], calls={"train": (x, y), "generate": (x,)})
    assert relative_error(model, second.module.eval(), (x, y)) <= 1e-12


def test_a_call_that_was_not_captured_is_named(gpt: Any) -> None:
    _, program = gpt
    module = fxgrow.grow(program, GROWTHS["hidden x2"], verify=False).module
    with pytest.raises(TypeError, match=r"captured: train\(idx, targets\); generate\(idx\)"):
        module(targets=tokens()[1])


def test_all_calls_constrain_the_axes() -> None:
    """An axis that one call returns is frozen, though the other call does not."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: torch.Tensor, features: bool = False) -> torch.Tensor:
            h = torch.tanh(self.a(x))
            return h if features else self.b(h)

    model, x = Encoder().double(), torch.randn(5, 4, dtype=torch.float64)
    alone = fxgrow.capture(model, (x,))
    assert alone.axes["./hidden"].growable
    both = fxgrow.capture(model, calls={"classify": (x,), "encode": {"x": x, "features": True}})
    frozen = [a for a in both.axes if a.size == 6]
    assert len(frozen) == 1
    assert not frozen[0].growable
    assert "returns" in str(frozen[0].reason)


def test_layers_are_inserted_into_every_call() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Sequential(nn.Linear(4, 6), nn.ReLU()), nn.Linear(6, 3)

        def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
            out = self.head(self.body(x))
            return out if y is None else (out - y).square().mean()

    model = trained(Net().double()).eval()
    x, y = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    spec = [
        {"op": "insert", "layer": "linear", "after": "body.1"},
        {"op": "insert", "layer": "batch_norm", "after": "body.0"},
    ]
    growth = fxgrow.grow(model, spec, calls={"loss": (x, y), "predict": (x,)})
    module = growth.module.eval()
    assert float((module(x) - model(x)).detach().abs().max()) <= 1e-12
    assert float((module(x, y) - model(x, y)).detach().abs()) <= 1e-12
    assert [n for n in module.state_dict() if n.endswith("weight")] == [
        "body.0.weight",
        "body.1.weight",
        "body.3.weight",
        "head.weight",
    ]


def test_bad_calls_are_named() -> None:
    with pytest.raises(fxgrow.CaptureError, match=r"calls\['train'\] must be a tuple"):
        fxgrow.capture(nn.Linear(2, 2), calls={"train": torch.randn(2, 2)})


def test_plain_values_are_part_of_the_call() -> None:
    """A value that is baked into the graph must not be passed over in silence, nor a default that differs from it."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: torch.Tensor, scale: float = 1.0, flag: bool = True) -> torch.Tensor:
            return self.b(torch.tanh(self.a(x))) * (scale if flag else 0.0)

    model, x = trained(Scaled().double()).eval(), torch.randn(5, 4, dtype=torch.float64)
    spec = {"op": "widen", "axis": "./hidden", "factor": 2}
    module = fxgrow.grow(model, spec, (x,), {"scale": 2.0}).module
    for kwargs in ({"scale": 2.0}, {"scale": 2}, {"scale": 2.0, "flag": True}):
        torch.testing.assert_close(module(x, **kwargs), model(x, **kwargs), rtol=0, atol=1e-12)
    torch.testing.assert_close(module(x, 2.0), model(x, 2.0), rtol=0, atol=1e-12)
    for kwargs in ({}, {"scale": 0.5}, {"scale": 2.0, "flag": False}):
        with pytest.raises(TypeError, match=r"captured: forward\(x, scale=2.0\)"):
            module(x, **kwargs)
    both = fxgrow.grow(model, spec, calls={"plain": (x,), "twice": (x, 2.0)}).module
    for args in ((x,), (x, 1.0), (x, 2.0)):
        torch.testing.assert_close(both(*args), model(*args), rtol=0, atol=1e-12)
    with pytest.raises(TypeError, match="no call with these arguments"):
        both(x, 3.0)


def test_a_plain_value_between_tensors() -> None:
    """``mask`` has a default and is given: the flag before it keeps its captured value, and need not be said."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor, twice: bool = False, mask: torch.Tensor | None = None) -> torch.Tensor:
            h = torch.tanh(self.a(x)) * (2 if twice else 1)
            return self.b(h if mask is None else h * mask)  # type: ignore[no-any-return]

    model = Masked().double().eval()
    x, mask = torch.randn(4, 5).double(), torch.rand(4, 1).double()
    growth = fxgrow.grow(model, {"op": "widen", "axis": "./hidden", "factor": 2}, (x,), {"twice": True, "mask": mask})
    for module in (growth.module, copy.deepcopy(growth.module)):
        module.eval()
        assert torch.allclose(module(x, twice=True, mask=mask), model(x, True, mask))
        assert torch.allclose(module(x, True, mask), model(x, True, mask))
