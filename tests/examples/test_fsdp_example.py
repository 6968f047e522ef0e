"""The sharded loop: it grows, ends, and goes on at another number of ranks."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from examples.fsdp.train import parsed, train
from tests.processes import run_ranks


def loop(rank: int, folder: str, steps: int) -> list[float]:
    os.chdir(folder)
    grow = ["--grow-at", "2", "--grow-at", "4"]
    return train(parsed(["--steps", str(steps), *grow, "--save-every", "5", "--out", "run"]))


def test_a_run_goes_on_at_another_number_of_ranks(tmp_path: Path) -> None:
    alone, several = tmp_path / "alone", tmp_path / "several"
    alone.mkdir()
    several.mkdir()
    (whole,) = run_ranks(1, loop, str(alone), 8)
    first = run_ranks(2, loop, str(several), 7)  # of which two steps are not saved
    then = run_ranks(4, loop, str(several), 8)
    assert [len(whole), len(first[0]), len(then[0])] == [8, 7, 3]
    for losses in first:
        assert losses == pytest.approx(whole[:7], abs=2e-5)  # float32
    for losses in then:
        assert losses == pytest.approx(whole[5:], abs=2e-5)
