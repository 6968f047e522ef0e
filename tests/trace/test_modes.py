"""Train and eval graphs that differ in ops: both are captured, constrain one set of axes, and stay side by side."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxgrow
from tests.models import relative_error, trained


def drop_path(x: torch.Tensor, p: float, training: bool, style: str) -> torch.Tensor:
    """Stochastic depth (Huang et al. 2016) as libraries write it."""
    if p == 0.0 or not training:
        return x
    keep, shape = 1 - p, (x.shape[0],) + (1,) * (x.ndim - 1)
    if style == "empty":
        noise = torch.empty(shape, dtype=x.dtype, device=x.device).bernoulli_(keep)
        return x * noise.div_(keep)
    if style == "new_empty":
        return x * x.new_empty(shape).bernoulli_(keep).div_(keep)
    noise = keep + torch.rand(shape, dtype=x.dtype, device=x.device)
    return x.div(keep) * noise.floor_()


class Block(nn.Module):
    def __init__(self, width: int, p: float, style: str) -> None:
        super().__init__()
        self.norm, self.p, self.style = nn.LayerNorm(width), p, style
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.down(F.gelu(self.up(self.norm(x))))
        return x + drop_path(h, self.p, self.training, self.style)


class Net(nn.Module):
    """A stack with stochastic depth, and a second head that only training uses."""

    def __init__(self, style: str = "empty", aux: bool = False) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.blocks = nn.ModuleList(Block(8, 0.3 * i, style) for i in range(3))
        self.norm, self.head = nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.aux = nn.Linear(8, 3) if aux else None

    def forward(self, x: torch.Tensor) -> Any:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        y = self.head(self.norm(x))
        return (y, self.aux(x)) if self.aux is not None and self.training else y


SPECS: dict[str, Any] = {
    "hidden x2": {"op": "widen", "axis": "blocks.*/hidden", "factor": 2},
    "stream x2": {"op": "widen", "axis": "./residual", "factor": 2},
    "stream 8 -> 12": {"op": "widen", "axis": "./residual", "to": 12},
    "hidden add": {"op": "widen", "axis": "blocks.1*/hidden", "by": 4, "fill": "add"},
    "depth x2": {"op": "deepen", "stack": "blocks", "factor": 2},
}


def example(seed: int = 0) -> torch.Tensor:
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(seed)).double()


def in_mode(module: nn.Module, x: torch.Tensor, training: bool) -> Any:
    """What a copy gives, with one seed for what it draws."""
    module = copy.deepcopy(module).train(training)
    torch.manual_seed(7)
    return module(x)


@pytest.mark.parametrize("style", ["empty", "new_empty", "rand"])
def test_capture_keeps_both_graphs(style: str) -> None:
    model = trained(Net(style).double())
    program = fxgrow.capture(model, (example(),))
    assert [c.training for c in program.calls] == [True, False]
    assert "train runs" in program.mode_reason
    assert program.axes["./residual"].growable
    module = fxgrow.grow(program, SPECS["hidden x2"]).module
    x = example(3)
    for mode in (True, False):
        torch.testing.assert_close(in_mode(module, x, mode), in_mode(model, x, mode), rtol=0, atol=1e-12)
    drawn = in_mode(module, x, True)
    torch.manual_seed(8)
    assert not torch.equal(copy.deepcopy(module).train()(x), drawn), "training draws"


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("aux", [False, True])
def test_growth_is_exact_in_both_modes(name: str, aux: bool) -> None:
    model = trained(Net(aux=aux).double()).train()
    x = example()
    growth = fxgrow.grow(model, SPECS[name], (x,))
    assert growth.receipt.error_float64 is not None
    assert growth.receipt.error_float64 <= 1e-12
    assert growth.receipt.error_float64_train is not None
    assert growth.receipt.error_float64_train <= 1e-12
    other = example(5)
    torch.testing.assert_close(in_mode(growth.module, other, False), in_mode(model, other, False), rtol=0, atol=1e-12)
    if "depth" not in name:  # inserted blocks draw, too
        torch.testing.assert_close(in_mode(growth.module, other, True), in_mode(model, other, True), rtol=0, atol=1e-12)


def test_what_only_training_uses_constrains_the_axes() -> None:
    """The stream is frozen where the training graph returns it, though the eval graph does not."""

    class Returns(Net):
        def forward(self, x: torch.Tensor) -> Any:
            x = self.blocks[0](self.stem(x))
            return (self.head(x), x) if self.training else self.head(x)

    program = fxgrow.capture(Returns().double().eval(), (example(),))
    (stream,) = [a for a in program.axes if a.size == 8 and any(m.tensor == "stem.weight" for m in a.members)]
    assert not stream.growable
    assert "returns" in str(stream.reason)


def test_growths_chain_and_checkpoints_keep_both_graphs(tmp_path: Path) -> None:
    model = trained(Net(aux=True).double()).eval()
    x = example()
    first = fxgrow.grow(model, SPECS["stream x2"], (x,))
    second = fxgrow.grow(first.module, SPECS["hidden x2"], (x,))
    fxgrow.save(second, tmp_path / "grown")
    loaded = fxgrow.load(tmp_path / "grown")
    assert loaded.replay_error() <= 1e-12
    for module in (second.module, loaded.module):
        for mode in (True, False):
            torch.testing.assert_close(in_mode(module, x, mode), in_mode(model, x, mode), rtol=0, atol=1e-12)
    assert relative_error(model, loaded.module.eval(), (x,)) <= 1e-12


def test_named_calls_and_modes_multiply() -> None:
    class Loss(Net):
        def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> Any:
            out = super().forward(x)
            return out if y is None else (out - y).square().mean()

    model = trained(Loss().double()).eval()
    x, y = example(), torch.randn(5, 3, dtype=torch.float64)
    program = fxgrow.capture(model, calls={"loss": (x, y), "predict": (x,)})
    assert [c.label for c in program.calls] == ["loss_train", "loss_eval", "predict_train", "predict_eval"]
    module = fxgrow.grow(program, SPECS["stream x2"]).module
    for mode in (True, False):
        torch.testing.assert_close(in_mode(module, x, mode), in_mode(model, x, mode), rtol=0, atol=1e-12)
    assert float((module.eval()(x, y) - model(x, y)).detach().abs()) <= 1e-12


class Either(nn.Module):
    """``f`` is given both the layers and the mode."""

    def __init__(self, f: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.out, self.f = nn.Linear(5, 8), nn.Linear(8, 3), f
        self.register_buffer("calls", torch.zeros(8, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.f(self, x)


LITERALS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a size": lambda m, x: m.up(x).reshape(x.shape[0], 2 if m.training else 4, -1).amax(1).mean(-1),
    "a dim": lambda m, x: m.up(x).unflatten(1, (4, 2)).amax(1 if m.training else 2).sum(-1),
    "a length": lambda m, x: m.up(x).narrow(1, 0, 4 if m.training else 8).amax(-1),
    "how many": lambda m, x: m.up(x).topk(2 if m.training else 5, -1)[0].sum(-1),
    "an eps": lambda m, x: m.out(nn.functional.layer_norm(m.up(x), (8,), eps=1e-1 if m.training else 1e-5)),
    "a scale": lambda m, x: nn.functional.scaled_dot_product_attention(
        *(m.up(x).unsqueeze(0),) * 2, x.unsqueeze(0), scale=0.5 if m.training else 0.25
    ).sum(-1),
    "a divisor": lambda m, x: m.out(m.up(x).relu() / (4 if m.training else 8)),
    "an exponent": lambda m, x: m.out(m.up(x).relu().pow(3 if m.training else 1)),
    "one added to floats in train mode alone": lambda m, x: m.out(m.up(x).add_(1) if m.training else m.up(x)),
    "a float buffer that counts": lambda m, x: m.out(
        (m.up(x) * m.calls.add_(1) if m.training else m.up(x) * m.calls).tanh()
    ),
}


@pytest.mark.parametrize("name", LITERALS)
def test_a_literal_that_differs_between_the_modes(name: str) -> None:
    model = trained(Either(LITERALS[name]).double())
    program = fxgrow.capture(model, (torch.randn(4, 5, dtype=torch.float64),))
    assert program.mode_reason, "only a mode's own literals share a graph"
    names = [a.name for a in program.axes if any(str(m) == "up.weight:0" for m in a.members)]
    assert names
    for axis, size in itertools.product(names, ({"factor": 2}, {"by": 3})):
        try:
            growth = fxgrow.grow(program, {"op": "widen", "axis": axis, **size}, verify=False)
        except fxgrow.GrowthRefused:
            assert "by" in size or name in ("a size", "a dim", "a length", "how many", "a float buffer that counts")
            continue
        for rows in (4, 7):
            x = torch.randn(rows, 5, dtype=torch.float64)
            for mode in (True, False, True):
                torch.testing.assert_close(in_mode(growth.module, x, mode), in_mode(model, x, mode), rtol=0, atol=1e-12)


class Masked(nn.Module):
    """Hides features at random in training, by numpy (as SpecAugment does): such a mask cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.out = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.up(x))
        if self.training:
            length = int(np.random.default_rng().integers(1, 1 + int(h.detach().abs().sum().item() > 0)))
            h = h * torch.from_numpy(np.random.default_rng().random(h.shape) > 0.1 * length)
        return self.out(h)


@pytest.mark.parametrize("training", [True, False])
def test_a_model_whose_train_mode_cannot_be_traced(tmp_path: Path, training: bool) -> None:
    model = trained(Masked().double()).train(training)
    x = torch.randn(4, 5, dtype=torch.float64)
    with pytest.warns(UserWarning, match="captured in eval mode only"):
        growth = fxgrow.grow(model, {"op": "widen", "axis": "up.weight:0", "factor": 2}, (x,))
    assert growth.receipt.error_float64 is not None
    assert growth.receipt.error_float64 <= 1e-12
    assert not growth.module.training
    fxgrow.save(growth, tmp_path / "a")
    y = torch.randn(7, 5, dtype=torch.float64)
    for module in (growth.module, fxgrow.load(tmp_path / "a").module, copy.deepcopy(growth.module)):
        torch.testing.assert_close(module(y), model.eval()(y), rtol=0, atol=1e-12)
        with pytest.raises(
            fxgrow.InputError, match=r"in train mode, and was captured in the other mode only .*eval\(\)"
        ):
            module.train()(y)
    assert model.train(training).training == training
