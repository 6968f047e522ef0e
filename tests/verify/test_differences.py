"""What two models differ in, told from what they gave."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fxgrow.errors import ExactnessError
from fxgrow.plan import GrowthPlan, Step, TensorPlan
from fxgrow.verify.differences import Differences, Errors
from fxgrow.verify.rounding import Moved, Rerun, Tolerance
from fxgrow.verify.side import Results

ONE = torch.tensor([1.0, 2.0], dtype=torch.float64)


def plan(**step: Any) -> GrowthPlan:
    tensors = {n: TensorPlan(source=n, shape=[2], dims=[None]) for n in ("mean", "weight")}
    return GrowthPlan(model="M", tensors=tensors, steps=[Step(op="widen", request={}, **step)])


def results(outputs: Any = ONE, state: torch.Tensor = ONE, gradient: torch.Tensor = ONE) -> Results:
    return Results({(0, 0): outputs}, {"mean": state}, {"weight": gradient})


def between(old: Results, new: Results, suspicious: float = 1e-12, again: Any = None, **step: Any) -> Errors:
    def never(moved: Moved) -> Results:
        raise AssertionError("nothing is suspicious")

    how = {"suspicious": suspicious, "gradient_limit": Tolerance(1e-7)}
    differences = Differences(plan(**step), [range(2)] if isinstance(old.outputs[0, 0], tuple) else [range(1)])
    return differences.between(old, new, Tolerance(1e-10), Rerun(again or never, 4), **how)  # type: ignore[arg-type]


def test_what_is_equal_is_not_looked_into() -> None:
    found = between(results(), results())
    assert (found.worst, found.state, found.gradient, found.amplification) == (0.0, 0.0, 0.0, None)
    assert [(o.output, o.shape, o.relative_error) for o in found.outputs] == [("0", [2], 0.0)]


@pytest.mark.parametrize("what", ["outputs", "state", "gradient"])
def test_each_is_measured_by_itself(what: str) -> None:
    found = between(results(), results(**{what: ONE * 1.5}), again=lambda moved: results())
    errors = {"outputs": found.worst, "state": found.state, "gradient": found.gradient}
    assert errors.pop(what) == 0.5 and set(errors.values()) == {0.0}


def test_what_moving_the_values_does_as_well_is_no_error() -> None:
    found = between(results(), results(ONE * 1.5), again=lambda moved: results(ONE * 1.1))
    assert found.worst == 0.5 and found.amplification == 0.0, "the moved runs do not differ from the plain one"
    seen: list[Moved] = []

    def again(moved: Moved) -> Results:
        seen.append(moved)
        return results(ONE * (1.0 if len(seen) == 1 else 1.1))

    found = between(results(), results(ONE * 1.5), again=again)
    assert found.worst == 0.0 and found.amplification is not None and found.amplification > 1e10


def test_what_may_change_is_listed_and_left_out() -> None:
    found = between(results((ONE, ONE)), results((ONE, ONE * 3)), exactness="approximate", changed_outputs=[1])
    assert found.worst == 0.0
    assert [(o.relative_error, o.changed) for o in found.outputs] == [(0.0, False), (2.0, True)]


def test_other_numbers_of_tensors_and_other_plain_values_are_refused() -> None:
    with pytest.raises(ExactnessError, match="returns 1 tensors instead of 2"):
        between(results((ONE, ONE)), results(ONE))
    with pytest.raises(ExactnessError, match=r"returns \[3\] instead of \[2\]"):
        between(results((ONE, ONE, 2)), results((ONE, ONE, 3)))


def test_gradients_that_are_rounding_alone_count_as_that() -> None:
    """A key's bias: its gradient is zero but for rounding, beside others that are not."""
    old, new = results(), results()
    old.gradients["mean"], new.gradients["mean"] = ONE * 1e-17, ONE * -1e-17
    found = between(old, new)
    assert found.gradient is not None and 0 < found.gradient <= 1e-16
