"""One trace tells what two would: the same graph, the same switches on the mode, the same guards."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxgrow
from fxgrow.trace import export
from fxgrow.trace.tracer import trace
from tests.models import trained
from tests.zoo.test_families import CASES
from tests.zoo.test_zoo import MODELS

Count = Callable[[], int]


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> Count:
    """How often ``torch.export`` ran."""
    ran, original = [0], torch.export.export

    def counted(*args: Any, **kwargs: Any) -> Any:
        ran[0] += 1
        return original(*args, **kwargs)

    monkeypatch.setattr(torch.export, "export", counted)
    return lambda: ran[0]


def told(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
    """All that a trace tells but for the names of sizes, which are a trace's own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            traced = trace(model, args, kwargs)
        except fxgrow.CaptureError as error:
            return str(error)
    guards = [sorted({(g.condition, g.edge) for g in call.guards}) for call in traced.calls]
    constants = {n: (t.shape, t.dtype) for n, t in traced.constants.items()}
    calls = [(c.label, c.inputs, c.constants, c.sizes, c.treespec, c.nested) for c in traced.calls]
    return str(traced.graph), guards, constants, calls, traced.mode_reason, traced.containers, traced.module_types


def both_ways(
    monkeypatch: pytest.MonkeyPatch, make: Callable[[], nn.Module], args: tuple[Any, ...], kwargs: Any = None
) -> None:
    torch.manual_seed(0)
    model = make()
    once = told(model, args, kwargs)
    with monkeypatch.context() as patch:
        patch.setattr(export, "_REPLAY", False)
        twice = told(model, args, kwargs)
    assert once == twice


@pytest.mark.parametrize("name", [n for i, n in enumerate(MODELS) if i % 3 == 0])
def test_one_trace_of_the_zoo_tells_what_two_do(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    example = MODELS[name]()
    both_ways(monkeypatch, lambda: example.model, example.args)


@pytest.mark.parametrize("name", CASES)
def test_one_trace_of_a_family_tells_what_two_do(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, args, _ = CASES[name]
    both_ways(monkeypatch, lambda: make().double(), args)


class Either(nn.Module):
    """``f`` is given the layers, whose mode it may ask for."""

    def __init__(self, f: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.up, self.out, self.f = nn.Linear(5, 8), nn.Linear(8, 3), f
        self.norm, self.drop = nn.BatchNorm1d(8), nn.Dropout(0.3)
        self.register_buffer("mean", torch.zeros(8))
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Any:
        return self.f(self, x)


def _caught(m: Any, x: Tensor) -> Tensor:
    """What eval tries first is not what it ends with; a replay must not take the second for the whole."""
    h = m.up(x)
    if not m.training:
        try:
            h = h.reshape(x.shape[0] * 2, 4).reshape(x.shape[0], 8)
        except Exception:
            h = h.relu()
    return m.out(h.relu())


def _assigned(m: Any, x: Tensor) -> Tensor:
    h = m.up(x)
    if not m.training:
        m.mean = 0.5 * m.mean + h.mean(0).detach()
    return m.out(h)


def _without_gradients(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        h = m.drop(m.up(x))
    return m.out(h * m.up(x))


def _gradients_in_train(m: Any, x: Tensor) -> Tensor:
    with torch.set_grad_enabled(m.training):
        h = m.up(x)
    return m.out(h)


def _twice(m: Any, x: Tensor) -> Tensor:
    h = m.up(x)
    return m.out(m.drop(h) + h)


#: whether one trace is enough, and the forward
WAYS: dict[str, tuple[bool, Callable[[Any, Tensor], Any]]] = {
    "dropout and batch norm": (True, lambda m, x: m.out(m.drop(m.norm(m.up(x))))),
    "what was dropped is used once more": (True, _twice),
    "a range of numbers": (True, lambda m, x: m.out(m.up(x)) + torch.arange(x.shape[0], device=x.device)[:, None]),
    "a look-up by numbers": (True, lambda m, x: m.out(m.up(x)[torch.arange(x.shape[0], device=x.device)])),
    "a constant": (True, lambda m, x: m.out(m.up(x) * torch.tensor(0.5))),
    "a bound on both": (True, lambda m, x: m.out(m.up(x[:, :5] if x.shape[0] < 9 else x[:1]))),
    "a constant that differs": (False, lambda m, x: m.out(m.up(x) * torch.tensor(0.5 if m.training else 0.25))),
    "a size asked for in eval": (
        False,
        lambda m, x: m.out(m.up(x).tanh() if m.training or x.shape[0] < 9 else m.up(x).relu()),
    ),
    "a size asked for in train": (
        True,
        lambda m, x: m.out(m.up(x).tanh() if not m.training or x.shape[0] < 9 else m.up(x).relu()),
    ),
    "ops that differ": (False, lambda m, x: m.out(m.up(x).relu() if m.training else m.up(x).tanh())),
    "more ops in eval": (False, lambda m, x: m.out(m.up(x)) if m.training else m.out(m.up(x)).softmax(-1)),
    "fewer ops in eval": (False, lambda m, x: m.out(m.up(x)).softmax(-1) if m.training else m.out(m.up(x))),
    "other operands": (False, lambda m, x: m.out(m.up(x).mul(m.mean if m.training else m.up.bias))),
    "another order of results": (False, lambda m, x: (m.up(x), m.out(m.up(x)))[:: 1 if m.training else -1]),
    "another structure": (False, lambda m, x: (m.out(m.up(x)),) if m.training else [m.out(m.up(x))]),
    "other keys": (False, lambda m, x: {"a" if m.training else "b": m.out(m.up(x))}),
    "a write in eval": (
        False,
        lambda m, x: m.out(m.up(x)) if m.training else m.out(m.up(x)) + m.mean.add_(1.0).sum(),
    ),
    "assigned in eval": (False, _assigned),
    "an error that is caught": (False, _caught),
    "dropout without gradients": (False, _without_gradients),
    "gradients in train alone": (False, _gradients_in_train),
}


@pytest.mark.parametrize("name", WAYS)
def test_a_replay_agrees_where_the_modes_do(name: str, traces: Count, monkeypatch: pytest.MonkeyPatch) -> None:
    enough, f = WAYS[name]
    model = Either(f).double()
    args = (torch.randn(6, 5, dtype=torch.float64),)
    once = told(model, args)
    assert (traces() == 1) == enough
    monkeypatch.setattr(export, "_REPLAY", False)
    assert once == told(model, args)
    assert model.training


class Recurrent(nn.Module):
    """Its first layer keeps a list of its weights, and makes it anew for those of a trace."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.out = nn.LSTM(5, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(x)[0])


def test_a_list_of_own_weights_is_nothing_that_a_forward_assigns(traces: Count) -> None:
    told(Recurrent(), (torch.randn(2, 6, 5),))
    assert traces() == 1


@pytest.mark.parametrize("name", [n for n, (enough, _) in WAYS.items() if not enough])
def test_modes_that_differ_are_kept_apart(name: str) -> None:
    """What one trace cannot tell stays right: the grown model follows the original in both modes."""
    model = trained(Either(WAYS[name][1]).double())
    x = torch.randn(6, 5, dtype=torch.float64)
    try:
        growth = fxgrow.grow(model, {"op": "widen", "axis": "up.weight:0", "factor": 2}, (x,), verify=False)
    except fxgrow.FxgrowError:
        return
    other = torch.randn(7, 5, dtype=torch.float64)
    for mode in (True, False):
        torch.manual_seed(0)
        expected = model.train(mode)(other)
        torch.manual_seed(0)
        found = growth.module.train(mode)(other)
        if mode and "dropout" in name:
            continue  # draws of their own
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_an_end_of_the_domain_that_only_train_mode_has_does_not_move() -> None:
    """Eval crops where train raises; a bound that eval does not have as its end is no end."""

    class Cropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.positions = nn.Embedding(11, 8), nn.Embedding(6, 8)

        def forward(self, x: Tensor) -> Tensor:
            if self.training and x.shape[1] > 6:
                raise ValueError("too long")
            if x.shape[1] > 6:
                x = x[:, -6:]
            return self.tokens(x) + self.positions(torch.arange(x.shape[1], device=x.device))

    traced = trace(Cropped(), (torch.zeros(2, 4, dtype=torch.int64),))
    assert any(g.condition == "x.shape[1] <= 6" and not g.edge for c in traced.calls for g in c.guards)
