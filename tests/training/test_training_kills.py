"""A run that is killed at random moments: see :mod:`tests.run_kills`, which kills more often."""

from __future__ import annotations

import pytest
import torch

from tests import run_kills


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_as_if_nothing_had_been() -> None:
    found = run_kills.run(5, seed=1, close=1e-9)
    assert found.kills == 5 and not found.wrong, found.wrong


def test_differences_are_seen() -> None:
    one = {"w": torch.ones(3), "n": torch.ones(2, dtype=torch.int64)}
    assert run_kills.difference(one, {**one, "w": torch.ones(3) + 1e-3}, 1e-9) == "w"
    assert run_kills.difference(one, {"w": one["w"]}, 1e-9) == "other tensors: n"
    lines = [{"event": "step", "loss": 1.0}, {"event": "end"}]
    assert run_kills.difference(lines, lines, 0.0) == ""
    assert "became" in run_kills.difference(lines, [{"event": "step", "loss": 1.1}, lines[1]], 1e-9)
    assert run_kills.difference(lines, lines[:1], 1e-9) == "2 lines became 1"
