"""The demo from one command, shortened: it grows four times, its loss does not move, and it leaves a report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from examples.gpt import report, train
from examples.gpt.model import GPT, GPTConfig
from fxgrow.training import read_log

torch.set_num_threads(1)
STEPS = 10


def demo(out: Path, *arguments: Any) -> str:
    result = CliRunner().invoke(train.app, ["--out", str(out), *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """The example's own schedule, its triggers brought forward to steps 2, 4, 6 and 8."""
    schedule = yaml.safe_load(train.SCHEDULE.read_text(encoding="utf-8"))
    for number, event in enumerate(schedule["events"]):
        event["trigger"] = {"step": 2 * (number + 1)}
    path = tmp_path_factory.mktemp("schedule") / "schedule.yaml"
    path.write_text(yaml.safe_dump(schedule, sort_keys=False), encoding="utf-8")
    return ["--schedule", path, "--steps", STEPS, "--eval-every", 1, "--batch-size", 2, "--threads", 1]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, options: list[Any]) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("demo")
    return out, demo(out, *options)


def test_no_growth_moves_the_loss(finished: tuple[Path, str]) -> None:
    growths = [line for line in read_log(finished[0] / "log.jsonl") if line["event"] == "growth"]
    assert [line["name"] for line in growths] == ["MLP ×2", "heads ×2", "stream ×2", "depth ×2"]
    for line in growths:
        assert line["moved"] < 1e-5
        assert line["receipt"]["error_float64"] < 1e-12
        assert line["parameters"] > line["parameters_before"]


def test_it_ends_as_a_plain_gpt_of_the_larger_config(finished: tuple[Path, str]) -> None:
    out, _ = finished
    line = next(line for line in read_log(out / "log.jsonl") if line["event"] == "strict_load")
    assert line["difference"] < 1e-5
    assert {key: line["config"][key] for key in ("n_layer", "n_head", "head_dim", "n_embd", "n_hidden")} == {
        "n_layer": 4,
        "n_head": 4,
        "head_dim": 32,
        "n_embd": 128,
        "n_hidden": 512,
    }
    # the checkpoint's tensors alone make that model too
    checkpoint = out / "checkpoints" / (out / "checkpoints" / "latest").read_text()
    tensors = load_file(checkpoint / "model.safetensors")
    model = GPT(GPTConfig(n_layer=4, n_head=4, n_embd=128))
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected
    assert set(missing) < {"transformer.wte.weight", "lm_head.weight"}  # tied: stored under one of the names


def test_copies_part_and_inserted_blocks_wake_up(finished: tuple[Path, str]) -> None:
    lines = read_log(finished[0] / "log.jsonl")
    for number in range(3):
        after = next(line for line in lines if line["event"] == "eval" and line["step"] == 2 * (number + 1) + 1)
        assert after["copies"] > 100
        assert after["apart_max"] > 0
    assert lines[-1]["event"] == "strict_load"
    last = [line for line in lines if line["event"] == "eval"][-1]
    assert last["zero_max"] > 0


def test_the_screen_ends_with_where_things_are_and_they_are_there(finished: tuple[Path, str]) -> None:
    out, screen = finished
    picture, page = screen.rstrip().splitlines()[-2:]
    assert picture.split() == ["picture", str(out / "loss.png")]
    assert page.split() == ["report", str(out / "report.md")]
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    text = (out / "report.md").read_text(encoding="utf-8")
    for name in ("MLP ×2", "heads ×2", "stream ×2", "depth ×2"):
        assert text.count(f"| {name} |") == 2
    assert "claims no savings" in text
    assert "not invariant under growth" in text
    assert report.write_report(out) == (out / "loss.png", out / "report.md")


def test_stopped_and_resumed_it_gives_the_same(finished: tuple[Path, str], options: list[Any], tmp_path: Path) -> None:
    said = demo(tmp_path, *options, "--stop-at", 5)
    assert "go on with --resume" in said
    demo(tmp_path, *options, "--resume")

    def curve(out: Path) -> dict[int, float]:
        return {line["step"]: line["val_loss"] for line in read_log(out / "log.jsonl") if line["event"] == "eval"}

    assert curve(tmp_path) == pytest.approx(curve(finished[0]), rel=1e-5)
