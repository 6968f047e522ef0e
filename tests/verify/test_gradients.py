"""Gradients: of what they are taken, and what the plan makes of the old model's."""

from __future__ import annotations

import torch
from torch import nn

import fxgrow
from fxgrow.growth import plan_growth
from fxgrow.plan import GrowthPlan
from fxgrow.spec import GrowthSpec
from fxgrow.verify.gradients import GradientMap, Weighed, has_newborn


def planned(**how: object) -> GrowthPlan:
    """Of a model whose first layer ``0`` of 3 features is widened; ``2`` reads it."""
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    program = fxgrow.capture(model, (torch.ones(4, 2),))
    plan, _ = plan_growth(program, GrowthSpec.parse([{"op": "widen", "axis": "0.weight:0", **how}]))
    return plan


def test_the_same_outputs_are_weighed_the_same() -> None:
    x = torch.ones(3, dtype=torch.float64, requires_grad=True)
    of = Weighed().of([x * 2, torch.tensor([1])], {"x": x, "y": torch.ones(1, requires_grad=True)})
    again = Weighed().of([x * 2], {"x": x})
    assert of["y"] is None and of["x"] is not None and again["x"] is not None and torch.equal(of["x"], again["x"])
    assert len(set(of["x"].tolist())) == 3, "every entry has another weight"


def test_new_entries_and_outputs_that_change_are_left_out() -> None:
    x = torch.ones(4, dtype=torch.float64, requires_grad=True)
    part = Weighed({1: [2]}).of([x * 7, x * 2], {"x": x})["x"]
    assert part is not None and part[:2].all() and not part[2:].any()
    assert Weighed({}).of([x], {"x": x}) == {}, "nothing stays as it was"


def test_a_parameter_s_gradient_is_mapped_by_the_plan() -> None:
    gradients = GradientMap(planned(factor=2))
    old, new = torch.tensor([[1.0], [2.0], [3.0]]).T, torch.ones(1, 6)
    pair = gradients.pair("2.weight", {"2.weight": old}, new)
    assert pair is not None and pair[0].shape == (1, 6) and pair[1] is new
    assert sorted(set(pair[0].flatten().tolist())) == [1.0, 2.0, 3.0], "a unit's copies are read with equal gradients"
    assert gradients.pair("2.weight", {"2.weight": None}, new) is None
    assert gradients.pair("2.weight", {"2.weight": old}, None) is None


def test_nothing_is_said_of_new_units() -> None:
    plan = planned(by=2, fill="add")
    assert has_newborn(plan.tensors["0.weight"]) and not has_newborn(plan.tensors["2.bias"])
    old = torch.ones(3, 2)
    assert GradientMap(plan).pair("0.weight", {"0.weight": old}, torch.ones(5, 2)) is None


def test_an_input_s_gradient_stays_and_a_missing_one_is_zero() -> None:
    gradients, name, one = GradientMap(planned(factor=2)), "input x of call 0", torch.ones(2)
    assert gradients.pair(name, {name: one}, one) == (one, one)
    assert gradients.pair(name, {}, None) is None
    for small, large in (({}, one), ({name: one}, None)):
        pair = gradients.pair(name, small, large)  # type: ignore[arg-type]
        assert pair is not None and sorted(float(t.sum()) for t in pair) == [0.0, 2.0]
