"""Whether new units learn, told from an outcome alone."""

from __future__ import annotations

import pytest

from fxgrow.plan import AxisMap
from fxgrow.proof.liveness import never_trained
from fxgrow.proof.outcome import Outcome
from fxgrow.rules.annotation import Content

UP, DOWN, TABLE = ("up", 0, 0), ("down", 1, 0), ("table", 1, 0)
PARAMETERS = {"up", "down"}
ADDED = AxisMap.add(4, 7, paired=False)


@pytest.mark.parametrize(
    ("growth", "into", "met", "lives"),
    [
        (ADDED, Content.FREE, Content.FREE, True),  # random in, zero out: the weights out of it learn first
        (ADDED, Content.ZERO, Content.ZERO, True),  # zero in, random out
        (ADDED, Content.ZERO, Content.FREE, False),  # zero on both sides
        (AxisMap.copy(4, 8, "even"), Content.ZERO, Content.FREE, True),  # nothing is new
        (AxisMap.add(4, 8, paired=True), Content.ZERO, Content.FREE, True),  # +z and -z out of it
    ],
)
def test_one_side_of_a_new_unit_must_not_be_zero(growth: AxisMap, into: Content, met: Content, lives: bool) -> None:
    outcome = Outcome(growth, carriers={UP: into}, readers={DOWN: {met}})
    assert (never_trained(outcome, PARAMETERS) == "") is lives


def test_zeros_in_a_buffer_stay() -> None:
    outcome = Outcome(ADDED, carriers={UP: Content.FREE}, readers={TABLE: {Content.FREE}})
    assert never_trained(outcome, PARAMETERS).startswith("only buffers multiply its new units")
    assert not never_trained(Outcome(ADDED, carriers={UP: Content.FREE}, readers={TABLE: {Content.ZERO}}), PARAMETERS)


def test_factors_that_are_both_zero_get_no_gradient_from_each_other() -> None:
    outcome = Outcome(ADDED, carriers={UP: Content.ZERO}, multiplied=True, silenced=True)
    assert never_trained(outcome, PARAMETERS).startswith("two activations are multiplied or compared over it")
    assert not never_trained(Outcome(ADDED, carriers={UP: Content.ZERO}, multiplied=True), PARAMETERS)
