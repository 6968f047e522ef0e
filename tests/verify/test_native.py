"""Two modules that are called one after the other, in their own dtype."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import fxgrow
from fxgrow.errors import ExactnessError
from fxgrow.plan import GrowthPlan
from fxgrow.verify.failures import Failures
from fxgrow.verify.native import Abreast
from fxgrow.verify.receipt import Receipt
from fxgrow.verify.trials import Trial


class Net(nn.Module):
    def __init__(self, f: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.f = f
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.add_(1)
        return self.f(x)


def fails(x: torch.Tensor) -> torch.Tensor:
    raise ValueError("not this one\nand more")


def abreast(old: Callable[[torch.Tensor], torch.Tensor], new: Callable[[torch.Tensor], torch.Tensor]) -> Abreast:
    failures, receipt = Failures(GrowthPlan(model="M")), Receipt(exactness="exact")
    out = Abreast(Net(old), Net(new), ({"calls"}, {"calls"}), False, failures, receipt)
    out.rounds.append({})
    return out


EXAMPLE, OTHER = (Trial((torch.ones(3),), {}, words) for words in ("example", "3, drawn anew"))


def test_what_both_take_is_kept_and_undone_in_the_end() -> None:
    both = abreast(torch.sin, torch.cos)
    with both.undone():
        assert both.takes(EXAMPLE, 0) and both.takes(OTHER, 1)
        old, new = both.left_behind()
    assert both.rounds == [{0: EXAMPLE, 1: OTHER}] and set(old.outputs) == {(0, 0), (0, 1)}
    assert torch.equal(new.outputs[0, 0], torch.ones(3).cos())
    assert float(old.state["calls"]) == float(new.state["calls"]) == 2, "calls follow each other on one state"
    assert float(both.module.calls) == float(both.grown.calls) == 0


@pytest.mark.parametrize("old", [fails, lambda x: x * float("nan")])
def test_what_the_old_one_does_not_take_leaves_no_trace(old: Callable[[torch.Tensor], torch.Tensor]) -> None:
    both = abreast(old, torch.cos)
    assert not both.takes(OTHER, 0)
    assert both.rounds == [{}] and float(both.module.calls) == float(both.grown.calls) == 0


def test_an_example_that_fails_is_noted() -> None:
    both = abreast(fails, torch.cos)
    assert not both.takes(EXAMPLE, 0)
    assert both._receipt.notes == ["eval mode not measured in the model's own dtype: ValueError: not this one"]


def test_what_the_grown_one_alone_does_not_take_is_a_failure() -> None:
    words = r"cannot run in eval mode on what the original takes \(3, drawn anew\): ValueError: not this one\. This is"
    with pytest.raises(ExactnessError, match=words):
        abreast(torch.sin, fails).takes(OTHER, 0)


class Counts(nn.Module):
    """Counts its calls in a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.calls = nn.Linear(3, 4), nn.Linear(4, 3), torch.zeros(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.add_(1)
        return self.b(self.a(x).relu()) + self.calls


def test_what_a_forward_writes_into_plain_attributes_is_undone() -> None:
    model = Counts()
    calls = model.calls
    fxgrow.grow(model, {"op": "widen", "axis": "a.weight:0", "to": 6}, (torch.randn(2, 3),), verify="native")
    assert model.calls is calls and float(calls) == 0
