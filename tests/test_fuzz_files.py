"""Damaged files of every kind: nothing but fxgrow's errors comes out, and nothing hangs. More: tests/fuzz_files.py."""

from __future__ import annotations

import os
import random

import pytest

from tests import fuzz_files, fuzz_folders


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_damaged_files() -> None:
    result = fuzz_files.run(480, seed=20)
    assert not result.failures, "\n".join(result.failures)
    assert sum(result.outcomes.values()) == 480
    for kind in fuzz_files.KINDS:
        refused = result.outcomes[f"{kind} refused"]
        assert refused >= 10, f"{kind}: {refused} of 40 refused"
    assert result.peak < 2 << 30


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_damaged_checkpoints_of_other_classes() -> None:
    how = {"kinds": fuzz_folders.KINDS, "good": fuzz_folders.Seeds, "turns": fuzz_folders.TURNS}
    result = fuzz_files.run(190, seed=20, **how)
    assert not result.failures, "\n".join(result.failures)
    assert sum(result.outcomes.values()) == 190
    for kind in fuzz_folders.KINDS:
        assert result.outcomes[f"{kind} ok"] + result.outcomes[f"{kind} refused"] >= 10


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("number", [2971, 5538, 7747])
def test_files_that_once_failed(number: int) -> None:
    """A layout for four dims on another tensor; pairs that are none, in a graph and in example inputs."""
    result = fuzz_files.run(1, seed=0, only=number)
    assert not result.failures, "\n".join(result.failures)


def test_a_failure_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A raw error, a hang, a death and a large allocation count, each for one file."""

    def raw(*_: object) -> None:
        raise KeyError("x")

    def hang(*_: object) -> None:
        while True:
            pass

    def die(*_: object) -> None:
        os._exit(11)

    def large(*_: object) -> None:
        bytearray(1200 << 20)[:: 1 << 12] = bytes(b"x" * (1200 << 8))

    def fine(*_: object) -> None:
        return None

    kinds = {"raw": raw, "hang": hang, "die": die, "large": large, "fine": fine}
    monkeypatch.setattr(fuzz_files, "KINDS", kinds)
    monkeypatch.setattr(fuzz_files, "Seeds", lambda folder: type("", (), {"folder": folder})())
    result = fuzz_files.run(6, seed=0, limit=5.0)
    said = [f.partition(":")[2].strip() for f in result.failures]
    assert said[0].startswith("KeyError") and said[1] == "took longer than 5 s"
    assert said[2].startswith("the process died") and said[3].startswith("took 1") and said[4].startswith("KeyError")
    assert len(said) == 5 and result.outcomes["fine ok"] == 1


def test_files_are_the_same_for_the_same_seed() -> None:
    texts = [fuzz_files.text_of(fuzz_files.SPEC, random.Random(f"3-{n}")) for n in range(50)]
    assert texts == [fuzz_files.text_of(fuzz_files.SPEC, random.Random(f"3-{n}")) for n in range(50)]
    assert len(set(texts)) > 45
