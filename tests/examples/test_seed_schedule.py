"""The schedule of the hand-written growing trainer, by its own names, from start to end on the example GPT."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from examples.gpt import train
from examples.gpt.model import GPTConfig
from fxgrow.ir.adapters import adapters_of
from fxgrow.training import Run, read_log
from fxgrow.training import train as loop

SCHEDULE = """
version: 2
events:
  - {name: wider, trigger: {step: 3}, operations: [{op: widen_mlp, value: 2}], optimizer: {policy: copy}}
  - {name: larger, trigger: {step: 5}, operations: [{op: change_grad_accum, value: 2}, {op: change_lr, value: 0.5}]}
  - {name: deeper, trigger: {step: 7}, operations: [{op: stack_layers, value: 2}], optimizer: {policy: copy}}
  - name: adapters
    trigger: {step: 9}
    operations:
      - {op: lora, modules: "transformer.h.*.c_*", rank: 2, alpha: 4}
      - {op: freeze, what: old}
  - {name: less of them, trigger: {step: 12}, operations: [{op: decrease_attn_lora_scaling, value: 0.5}]}
  - {name: fade, trigger: {step: 13}, operations: [{op: lora_decay, steps: 4, to: 0.5, modules: "*mlp*"}]}
  - {name: merged, trigger: {step: 18}, operations: [{op: unfreeze, what: old}, {op: merge_lora_weights}]}
"""
STEPS = 22


def gpt(out: Path, **how: Any) -> Run:
    config = GPTConfig(block_size=16, n_embd=16, n_layer=2, n_head=2)
    task = train.task(
        None, SCHEDULE, config, 4, steps=STEPS, warmup=2, log_every=1, eval_every=11, eval_batches=2, learning_rate=1e-2
    )
    task.model.double()
    return loop(task, out, console=Console(file=io.StringIO(), width=200), **how)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("seed")
    return gpt(out), out


def test_every_operation_is_in_the_log_and_no_growth_moves_the_loss(whole: tuple[Run, Path]) -> None:
    final, out = whole
    lines = [x for x in read_log(out / "log.jsonl") if x["event"] in ("growth", "action", "skipped", "refused")]
    assert [(x["event"], x["op"], x["step"], x["name"]) for x in lines] == [
        ("growth", "grow", 3, "wider"),
        ("action", "accumulation", 5, "larger"),
        ("action", "learning_rate", 5, "larger"),
        ("growth", "grow", 7, "deeper"),
        ("growth", "grow", 9, "adapters"),
        ("action", "freeze", 9, "adapters"),
        ("action", "lora_scale", 12, "less of them"),
        ("action", "lora_decay", 13, "fade"),
        ("action", "unfreeze", 18, "merged"),
        ("action", "lora_merge", 18, "merged"),
    ]
    assert all(x["moved"] < 1e-12 for x in lines if x["event"] == "growth")
    model: Any = final.model
    assert (model.config.n_hidden, model.config.n_layer, len(model.transformer.h)) == (128, 4, 4)
    assert not list(adapters_of(model)) and not [n for n, _ in model.named_parameters() if "lora" in n]
    assert final.accumulation == 2 and all(p.requires_grad for p in model.parameters())
    held = [p for g in final.optimizer.param_groups for p in g["params"]]
    assert {id(p) for p in held} == {id(p) for p in model.parameters()} == {id(p) for p in final.optimizer.state}
    train.GPT(model.config).double().load_state_dict(model.state_dict())


@pytest.mark.parametrize("stop", [11, 15])  # adapters alone learn; they fade
def test_stopped_and_resumed_it_ends_in_the_same(whole: tuple[Run, Path], tmp_path: Path, stop: int) -> None:
    final, out = whole
    gpt(tmp_path, stop_at=stop)
    rest = gpt(tmp_path, resume=True)
    for (name, a), (other, b) in zip(final.model.state_dict().items(), rest.model.state_dict().items(), strict=True):
        assert name == other
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-12)
    ours, theirs = (
        [
            (x["event"], x.get("op"), x["step"])
            for x in read_log(o / "log.jsonl")
            if x["event"] not in ("resume", "checkpoint")
        ]
        for o in (out, tmp_path)
    )
    assert ours == theirs
