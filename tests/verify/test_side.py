"""One of the two models, run on several inputs in a row."""

from __future__ import annotations

import torch
from torch import nn

import fxgrow
from fxgrow.verify.gradients import Weighed
from fxgrow.verify.rounding import Moved
from fxgrow.verify.side import Side
from fxgrow.verify.trials import Trial


class Counter(nn.Module):
    """Its output is ``w * x`` plus the number of calls before."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([2.0, 3.0]))
        self.register_buffer("calls", torch.zeros(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.w * x + self.calls
        self.calls.add_(1)
        return out


class Numbered(nn.Module):
    """Its output is ``x`` plus the number of calls so far, a whole number."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.calls.add_(1)


ONE = Trial((torch.ones(2),), {}, "example")


def side(keep: bool = True) -> tuple[Side, list[str]]:
    program = fxgrow.capture(Counter(), ONE.args)
    made: list[str] = []

    def make(name: str) -> torch.Tensor:
        made.append(name)
        return program.tensor(name).detach().clone()

    return Side(program, make, keep=keep), made


def test_rounds_follow_each_other_on_one_state_and_runs_do_not() -> None:
    model, _ = side()
    for _ in range(2):
        found = model.run([{0: ONE}, {0: ONE}], False)
        assert [t.tolist() for t in found.outputs.values()] == [[2.0, 3.0], [3.0, 4.0]]
        assert found.state["calls"].tolist() == [2.0, 2.0] and model.changed(found)
    assert ONE.args[0].tolist() == [1.0, 1.0]


def test_tensors_are_kept_or_made_anew() -> None:
    for keep, times in ((True, 1), (False, 2)):
        model, made = side(keep)
        model.run([{0: ONE}], False)
        model.run([{0: ONE}], False)
        assert made.count("w") == times


def test_gradients_are_of_the_last_round_and_of_inputs_too() -> None:
    model, _ = side()
    found = model.run([{0: ONE}, {0: ONE}], False, gradients=Weighed())
    assert set(found.gradients) == {"w", "input x of call 0"}
    assert not any(t.requires_grad for t in found.outputs.values())
    by_weight, by_input = found.gradients["w"], found.gradients["input x of call 0"]
    assert by_weight is not None and by_input is not None
    assert torch.equal(by_input, by_weight * torch.tensor([2.0, 3.0]))


def test_moved_values_differ_by_rounding_alone() -> None:
    model, _ = side()
    plain, moved = (model.run([{0: ONE}], False, moved=m).outputs[0, 0] for m in (Moved(0, 0), Moved(1, 4)))
    assert not torch.equal(plain, moved) and torch.allclose(plain, moved, rtol=1e-5)


def test_a_moved_run_leaves_whole_numbers_as_they_were() -> None:
    program = fxgrow.capture(Numbered(), ONE.args)
    model = Side(program, lambda name: program.tensor(name).detach(), keep=True)
    for _ in range(2):
        found = model.run([{0: ONE}], False, moved=Moved(1, 4))
        assert found.state["calls"].item() == 1 and program.tensor("calls").item() == 0


def test_other_tensors_under_the_same_graphs() -> None:
    model, _ = side()
    other = model.with_tensors(lambda name: torch.zeros(2))
    assert other.run([{0: ONE}], False).outputs[0, 0].tolist() == [0.0, 0.0]
    assert model.run([{0: ONE}], False).outputs[0, 0].tolist() == [2.0, 3.0]
