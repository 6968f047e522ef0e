"""What a model returns: the old part of grown outputs, and how far two are apart."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxgrow
from fxgrow.errors import ExactnessError
from fxgrow.plan import GrowthPlan, OutputGrowth, Step
from fxgrow.verify.outputs import old_part, output_numbers, plain_values, relative_errors, says_something

APPENDED = GrowthPlan(
    model="M", steps=[Step(op="extend", request={}, outputs=[OutputGrowth(output=1, dim=0, old=2, new=5)])]
)


def test_the_outputs_of_all_calls_are_counted_on() -> None:
    class Two(nn.Module):
        def forward(self, x: torch.Tensor, twice: bool = False) -> tuple[torch.Tensor, ...]:
            return (x.sin(), x.cos()) if twice else (x.tanh(),)

    x = torch.ones(3)
    program = fxgrow.capture(Two(), calls={"one": {"x": x}, "two": {"x": x, "twice": True}})
    assert [list(numbers) for _, numbers in output_numbers(program)] == [[0], [1, 2]]


def test_of_an_output_with_new_entries_the_old_ones_are_compared() -> None:
    new = torch.arange(5.0)
    assert torch.equal(old_part(1, torch.zeros(2), new, APPENDED), new[:2])
    with pytest.raises(ExactnessError, match=r"output 1 changed its shape from \(2,\) to \(4,\)"):
        old_part(1, torch.zeros(2), new[:4], APPENDED)
    with pytest.raises(ExactnessError, match=r"output 0 changed its shape from \(2,\) to \(5,\)"):
        old_part(0, torch.zeros(2), new, APPENDED)
    with pytest.raises(ExactnessError, match=r"output 0 changed its dtype from torch.float32 to torch.float64"):
        old_part(0, torch.zeros(5), new.double(), None)


def test_errors_are_relative_to_the_largest_value_and_whole_numbers_differ_or_not() -> None:
    old = {"a": torch.tensor([1.0, -4.0]), "b": torch.tensor([1, 2])}
    new = {"a": torch.tensor([2.0, -4.0]), "b": torch.tensor([1, 3])}
    assert [e.relative_error for e in relative_errors(old, new)] == [0.25, 1.0]
    assert [e.relative_error for e in relative_errors(old, old)] == [0.0, 0.0]
    assert [e.output for e in relative_errors(old, new, numbers=[3, 4])] == ["3", "4"]


def test_outputs_that_are_no_number_say_nothing() -> None:
    nothing = torch.full((3,), float("nan"))
    assert not says_something([nothing, nothing])
    assert says_something([nothing, torch.zeros(2)]) and says_something([nothing, torch.tensor([1])])
    assert says_something("no tensors at all")
    assert plain_values({"loss": torch.ones(1), "steps": 3, "name": "a"}) == [3, "a"]
