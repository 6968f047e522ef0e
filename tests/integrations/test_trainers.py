"""Growth in ``transformers.Trainer`` and in Lightning, with the real libraries where they are there."""

from __future__ import annotations

import pytest
import torch

from benchmarks import trainers
from fxgrow.errors import SpecError
from fxgrow.integrations import common
from fxgrow.schedule import Schedule


@pytest.mark.slow
@pytest.mark.parametrize("name", trainers.TRAINERS)
def test_a_trainer_grows_goes_on_and_resumes(name: str) -> None:
    result = trainers.measured(name)
    if result is None:
        pytest.skip(f"{name} is not installed")
    assert result.jump <= trainers.JUMP
    assert result.at_end < result.at_growth, "it goes on learning"
    assert result.resumed == 0.0
    assert result.done == ["grow", "learning_rate", "checkpoint"]


def test_what_a_trainer_fixes_cannot_be_scheduled() -> None:
    schedule = [{"trigger": {"step": 1}, "operations": [{"op": "accumulation", "factor": 2}]}]
    with pytest.raises(SpecError, match=r"events\.0 changes the accumulation, which the Trainer fixes"):
        common.check_sizes(Schedule.parse(schedule), "the Trainer")


def test_metrics_are_the_numbers_among_what_is_logged() -> None:
    logged = {"loss": torch.tensor(0.5), "step": 3, "ok": True, "name": "x", "many": torch.ones(2)}
    assert common.numbers(logged) == {"loss": 0.5, "step": 3.0}
    assert common.numbers(None) == {}
