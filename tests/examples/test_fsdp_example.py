"""The sharded loop: it grows, ends, and goes on at another number of ranks."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from examples.fsdp.train import parsed, train
from tests.processes import run_ranks


def loop(rank: int, folder: str, steps: int) -> list[float]:
    os.chdir(folder)
    grow = ["--grow-at", "1", "--grow-at", "2"]
    return train(parsed(["--steps", str(steps), *grow, "--save-every", "3", "--out", "run"]))


def test_a_run_goes_on_at_another_number_of_ranks(tmp_path: Path) -> None:
    """As the run went on whose last two steps are not saved."""
    first = run_ranks(2, loop, str(tmp_path), 5)
    then = run_ranks(4, loop, str(tmp_path), 5)
    assert [len(first[0]), len(then[0])] == [5, 2]
    for losses in (first[1], *(first[0][:3] + each for each in then)):
        assert losses == pytest.approx(first[0], abs=2e-5)  # float32
