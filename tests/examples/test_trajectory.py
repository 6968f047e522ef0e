"""The example GPT in the training loop: under policy ``exact`` an evenly grown run follows the small one."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from examples.gpt import train
from examples.gpt.model import GPTConfig
from fxgrow.training import Hyper, read_log
from fxgrow.training import train as loop

torch.set_num_threads(1)


def step_losses(out: Path, schedule: Any) -> list[float]:
    config = GPTConfig(block_size=16, n_embd=16, n_layer=2, n_head=2)
    task = train.task(
        None, schedule, config, 4, steps=60, warmup=10, clip=0.0, log_every=1, eval_every=60, learning_rate=1e-2
    )
    assert isinstance(task.hyper, Hyper)
    task.model.double()
    loop(task, out, console=Console(file=io.StringIO()))
    return [line["loss"] for line in read_log(out / "log.jsonl") if line["event"] == "step"]


def test_fifty_adamw_steps_after_an_exact_growth_are_those_of_the_small_model(tmp_path: Path) -> None:
    growth = {
        "trigger": {"step": 10},
        "operations": [
            {"op": "widen", "axis": "transformer.h.*.mlp/hidden", "factor": 2},
            {"op": "widen", "axis": "transformer.h.*.attn/heads", "factor": 2},
            {"op": "widen", "axis": "./residual", "factor": 2},
        ],
        "optimizer": "exact",
    }
    small, grown = step_losses(tmp_path / "small", None), step_losses(tmp_path / "grown", [growth])
    assert len(small) == len(grown) == 60
    assert max(abs(a - b) for a, b in zip(small, grown, strict=True)) < 1e-9
    assert small[0] - small[-1] > 1  # there was something to follow
