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
    assert output.rstrip().endswith("learning rate 0e+00"), "the schedule drove the optimizer to its end"


def test_huggingface() -> None:
    pytest.importorskip("transformers")
    from examples import huggingface

    output = run(huggingface.main, "--steps", "4")
    assert "(exact)" in output
    itself, loaded = map(float, re.findall(r"logits differ by ([^\s,]+)", output))
    assert itself < 1e-5
    assert loaded < 1e-6
    assert "hidden size 64" in output
    before, after = re.findall(r"'([a-z ]+)'", output)
    assert before == after, "greedy, with a cache"


def test_the_trainer_trains_the_grown_model() -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    import random

    from examples import huggingface

    torch.manual_seed(0)
    model = huggingface.build()
    losses = huggingface.train_by_trainer(model, 12, random.Random(0))
    sizes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    assert sizes["model.layers.2.mlp.up_proj.weight"] == (128, 64), "the model that was passed has grown"
    assert len(losses) == 24
    assert abs(losses[12] - losses[11]) < 0.2, "no step back at the growth"
    assert losses[-1] < losses[11] - 0.1, "what has grown goes on learning"
