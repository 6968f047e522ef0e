"""Bounds of index tensors, against the values that come out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import sympy
import torch
from torch import Tensor, nn

import fxgrow
from fxgrow.analysis.ranges import Ranges

CASES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "numbers": lambda x, b: torch.arange(x.shape[1]) + 2,
    "from two": lambda x, b: torch.arange(2, x.shape[1] + 2),
    "minus one": lambda x, b: torch.arange(x.shape[1]) - 1,
    "buffer": lambda x, b: b[: x.shape[1]],
    "buffer, as a batch": lambda x, b: b[None].expand(x.shape[0], -1)[:, : x.shape[1]],
    "counted": lambda x, b: x.ne(0).long().cumsum(1) - 1,
    "clamped": lambda x, b: x.clamp(0, 5),
    "clamped from below": lambda x, b: torch.arange(x.shape[1]).clamp(min=3),
    "smaller of two": lambda x, b: torch.minimum(x, torch.full_like(x, 4)),
    "larger of two": lambda x, b: torch.maximum(torch.arange(x.shape[1]), torch.full_like(torch.arange(x.shape[1]), 4)),
    "remainder": lambda x, b: x % 7,
    "absolute": lambda x, b: (torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])[None]).abs(),
    "chosen": lambda x, b: torch.where(x.abs() < 3, x.abs(), 9),
    "times": lambda x, b: torch.arange(x.shape[1]) * 3,
    "flags": lambda x, b: (x > 2).long(),
}


class Index(nn.Module):
    def __init__(self, f: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.register_buffer("numbers", torch.arange(0, 60, 2) + 1)
        self.f = f

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x, self.numbers)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("length", [5, 20])
def test_bounds_hold(name: str, length: int) -> None:
    model, generator = Index(CASES[name]), torch.Generator().manual_seed(0)
    program = fxgrow.capture(model, (torch.randint(-9, 9, (3, 7), generator=generator),))
    (out,) = (n for n in program.graph.nodes if n.op == "output")
    found = Ranges(program).of(out.args[0])
    x = torch.randint(-30, 30, (3, length), generator=generator)
    placeholder = next(n for n in program.graph.nodes if n.op == "placeholder")
    values = model(x)
    assert found.low is not None or found.high is not None, "something is known"
    sizes = dict(zip((s.node.expr for s in placeholder.meta["val"].shape), x.shape, strict=True))
    for bound, holds in ((found.low, lambda b: b <= values.min()), (found.high, lambda b: values.max() <= b)):
        if bound is not None:
            assert holds(float(sympy.sympify(bound).subs(sizes)))


def written_through_a_view(x: Tensor, b: Tensor) -> Tensor:
    numbers = torch.arange(x.shape[1])
    numbers[:2].sub_(1)
    return numbers


def written_after_a_view(x: Tensor, b: Tensor) -> Tensor:
    numbers = torch.arange(x.shape[1])
    tail = numbers[1:]
    numbers.sub_(1)
    return tail


def a_buffer_that_the_call_before_wrote(x: Tensor, b: Tensor) -> Tensor:
    numbers = b[: x.shape[1]].clone()
    b.sub_(1)
    return numbers


@pytest.mark.parametrize(
    "f", [written_through_a_view, written_after_a_view, a_buffer_that_the_call_before_wrote], ids=lambda f: f.__name__
)
def test_what_is_written_over_is_unknown(f: Callable[[Tensor, Tensor], Tensor]) -> None:
    program = fxgrow.capture(Index(f), (torch.zeros(2, 7, dtype=torch.long),))
    (out,) = (n for n in program.graph.nodes if n.op == "output")
    found = Ranges(program).of(out.args[0])
    assert found.low is None and found.high is None


def test_numbers_that_are_written_over_are_not_counted_from_the_front() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.places = nn.Parameter(torch.randn(5, 4))

        def forward(self, x: Tensor) -> Tensor:
            numbers = torch.arange(x.shape[0])
            numbers[:2].sub_(1)
            return self.places[numbers].sum(0) + x.sum()

    with pytest.raises(fxgrow.GrowthRefused, match="may be negative"):
        fxgrow.grow(Model(), {"op": "extend", "axis": "places:0", "to": 8}, (torch.randn(3),))


def test_what_the_caller_passes_in_is_unknown() -> None:
    program = fxgrow.capture(Index(lambda x, b: x + b[0]), (torch.zeros(2, 3, dtype=torch.long),))
    (out,) = (n for n in program.graph.nodes if n.op == "output")
    found = Ranges(program).of(out.args[0])
    assert found.low is None and found.high is None
