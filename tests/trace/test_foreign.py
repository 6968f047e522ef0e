"""What ``forward`` may do besides computing: it is kept exactly, or refused at capture with the reason and the line."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fxgrow
from tests.models import trained


class M(nn.Module):
    def __init__(self, f: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.out, self.f = nn.Linear(5, 8), nn.Linear(8, 3), f

    def forward(self, x: Tensor) -> Tensor:
        return self.f(self, x)

    def mlp(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.up(x)))


def differentiated(m: Any, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_(True)
    (g,) = torch.autograd.grad(m.mlp(x).sum(), x, create_graph=True)
    return m.mlp(g)


def without_gradient(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        h = m.up(x)
    return m.out(h) + m.mlp(x)


def inference(m: Any, x: Tensor) -> Tensor:
    with torch.inference_mode():
        h = m.up(x)
    return m.out(h.clone())


def autocast(m: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h = m.up(x)
    return m.out(h.to(x.dtype))


REFUSED: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "vmap": (lambda m, x: m.out(torch.vmap(lambda r: torch.tanh(m.up(r)))(x)), "vmap"),
    "vmap over one of two": (
        lambda m, x: torch.vmap(torch.dot, in_dims=(0, None))(torch.tanh(m.up(x)), m.up.bias)[:, None] * m.out.bias,
        "vmap",
    ),
    "jvp": (lambda m, x: torch.func.jvp(m.mlp, (x,), (torch.ones_like(x),))[1], "jvp"),
    "grad": (lambda m, x: torch.func.grad(lambda y: m.mlp(y).sum())(x) @ m.up.weight.t(), "differentiates inside"),
    "jacrev": (lambda m, x: torch.func.jacrev(m.mlp)(x[0]).sum(0, keepdim=True), "differentiates inside"),
    "autograd.grad": (differentiated, "differentiates inside forward at .*test_foreign.py"),
    "inference_mode": (inference, "inference_mode inside forward at .*no_grad"),
    "autocast": (autocast, "autocast inside forward"),
    "cond": (
        lambda m, x: m.out(torch.cond(x.sum() > 0, lambda h: h.tanh(), lambda h: h.relu(), (m.up(x),))),
        "control flow on data .*torch.where",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_at_capture_with_the_reason(name: str) -> None:
    f, words = REFUSED[name]
    with pytest.raises(fxgrow.CaptureError, match=f"(?s){words}") as caught:
        fxgrow.capture(M(f).double(), (torch.randn(4, 5, dtype=torch.float64),))
    if name != "autocast":
        assert "autocast" not in str(caught.value)
    assert not torch.is_autocast_enabled("cpu") and not torch.is_inference_mode_enabled() and torch.is_grad_enabled()


def test_a_capture_under_autocast_leaves_it_on() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(fxgrow.CaptureError):
            fxgrow.capture(M(autocast), (torch.randn(4, 5),))
        assert torch.is_autocast_enabled("cpu")
    assert not torch.is_autocast_enabled("cpu")


KEPT: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "no_grad": without_gradient,
    "functional_call": lambda m, x: m.out(
        torch.func.functional_call(m.up, {k: v * 2 for k, v in m.up.named_parameters()}, (x,)).tanh()
    ),
    "checkpoint": lambda m, x: checkpoint(m.mlp, x, use_reentrant=False),
}


@pytest.mark.parametrize("name", KEPT)
def test_kept_with_its_gradients(name: str) -> None:
    model = trained(M(KEPT[name]).double()).eval()
    x = torch.randn(4, 5, dtype=torch.float64)
    module = fxgrow.grow(model, {"op": "widen", "axis": "up.weight:0", "factor": 2}, (x,), verify=False).module
    for rows in (1, 7):
        given = [torch.randn(rows, 5, dtype=torch.float64).requires_grad_() for _ in range(1)] * 2
        results = [m(t) for m, t in zip((model, module), given, strict=True)]
        torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-12)
        small, large = (torch.autograd.grad(r.square().sum(), given[0])[0] for r in results)
        torch.testing.assert_close(large, small, rtol=0, atol=1e-12)


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        return g


def test_other_threads_do_not_see_a_capture() -> None:
    """A custom function that another thread calls meanwhile is no part of this model, and ``apply`` is put back."""
    before = torch.autograd.Function.__dict__["apply"]
    done, seen = threading.Event(), []

    def other() -> None:
        while not done.is_set():
            seen.append(Straight.apply(torch.ones(2)))  # type: ignore[no-untyped-call]

    thread = threading.Thread(target=other)
    thread.start()
    try:
        program = fxgrow.capture(M(M.mlp).double(), (torch.randn(4, 5, dtype=torch.float64),))
    finally:
        done.set()
        thread.join()
    assert program.axes["./hidden"].growable and seen
    assert torch.autograd.Function.__dict__["apply"] is before
    with pytest.raises(fxgrow.CaptureError, match="Straight"):
        fxgrow.capture(
            M(lambda m, x: m.out(Straight.apply(m.up(x)))).double(),  # type: ignore[no-untyped-call]
            (torch.randn(4, 5, dtype=torch.float64),),
        )
    assert torch.autograd.Function.__dict__["apply"] is before
