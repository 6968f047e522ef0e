"""The short examples run, keep what they say they keep, and learn."""

from __future__ import annotations

import re

import pytest
import torch
from typer.testing import CliRunner

torch.set_num_threads(1)


def run(main: object, *arguments: str) -> str:
    import typer

    app = typer.Typer()
    app.command()(main)  # type: ignore[arg-type]
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_vision() -> None:
    from examples import vision

    output = run(vision.main, "--steps", "4")
    assert ": exact" in output
    before, after = re.findall(r"accuracy ([\d.]+)%", output)[:2]
    assert before == after
    moved = re.findall(r"(\S+) in (?:eval|train)\b", output)
    assert len(moved) == 2
    assert all(float(x) < 1e-12 for x in moved)


def test_huggingface() -> None:
    pytest.importorskip("transformers")
    from examples import huggingface

    output = run(huggingface.main, "--steps", "4")
    assert "(exact)" in output
    (difference,) = re.findall(r"outputs differ by (\S+)", output)
    assert float(difference) < 1e-5
