"""nanoGPT's loop, and the same one growing: what that costs in lines, and that everything in the loop goes on."""

from __future__ import annotations

import difflib
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.nanogpt.model import GPT, GPTConfig

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "nanogpt"
TINY = ["--block_size=16", "--batch_size=2", "--n_embd=16", "--eval_iters=2", "--log_interval=1", "--warmup_iters=2"]
GROWING = ["--wider_at=2", "--deeper_at=4", "--eval_interval=6", "--max_iters=9"]


def diff() -> str:
    """What growth adds to the loop, as the docs print it."""
    plain, growing = ((FOLDER / f"{name}.py").read_text().splitlines() for name in ("train", "train_growing"))
    lines = difflib.unified_diff(plain, growing, "train.py", "train_growing.py", n=1, lineterm="")
    return "\n".join(line.rstrip() for line in lines)


def run(name: str, *settings: str) -> dict[str, Any]:
    """A script's variables at its end."""
    arguments, sys.argv = sys.argv, [name, *TINY, *settings]
    try:
        return runpy.run_module(f"examples.nanogpt.{name}", run_name="__main__")
    finally:
        sys.argv = arguments


def losses(output: str) -> dict[int, float]:
    return {int(i): float(x) for i, x in re.findall(r"^iter (\d+): loss ([\d.]+)", output, re.MULTILINE)}


def test_growth_adds_few_lines_and_changes_none() -> None:
    changed = [line for line in diff().splitlines() if line[:1] in ("+", "-") and line[:3] not in ("+++", "---")]
    assert not [line for line in changed if line.startswith("-")], "no line of the loop is changed"
    added = [line for line in changed if line[1:].strip() and not line[1:].strip().startswith("#")]
    page = (ROOT / "docs" / "landing.md").read_text()
    assert f"{len(added)} lines are new" in page, len(added)
    assert diff() in page, "docs/landing.md prints another diff"


def test_the_loop_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("train", f"--out_dir={tmp_path / 'plain'}", "--max_iters=2", "--eval_interval=6")
    plain = losses(capsys.readouterr().out)
    found = run("train_growing", f"--out_dir={tmp_path}", *GROWING)
    grown = losses(capsys.readouterr().out)
    assert grown[2] == pytest.approx(plain[2], abs=2e-6), "the model has grown between this loss and the one before"

    model, optimizer, sizes = found["model"], found["optimizer"], found["model_args"]
    assert type(model) is GPT and (sizes["n_head"], sizes["n_embd"], sizes["n_layer"]) == (4, 32, 4)
    again = GPT(GPTConfig(**sizes))
    again.load_state_dict(model.state_dict(), strict=True)
    assert model.estimate_mfu(4, 1.0) == again.estimate_mfu(4, 1.0)
    tokens = torch.randint(256, (2, 16), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(again.eval()(tokens)[0], model.eval()(tokens)[0], rtol=0, atol=0)
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in model.parameters()}
    assert model.generate(tokens[:1], 20, top_k=5).shape == (1, 36)

    checkpoint = torch.load(tmp_path / "ckpt.pt")
    assert (checkpoint["iter_num"], checkpoint["model_args"]) == (6, sizes)
    command = [sys.executable, "-m", "examples.nanogpt.train_growing", *TINY, f"--out_dir={tmp_path}", *GROWING]
    done = subprocess.run([*command, "--init_from=resume"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    resumed = losses(done.stdout)
    assert list(resumed) == [6, 7, 8, 9]
    for i, loss in resumed.items():
        assert loss == pytest.approx(grown[i], abs=2e-6), i
