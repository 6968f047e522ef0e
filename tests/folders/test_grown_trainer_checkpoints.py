"""A checkpoint folder of transformers' Trainer: grown with its optimizer's state, and resumed by a Trainer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fxgrow.errors import CheckpointError
from fxgrow.folders import grow_checkpoint

transformers: Any = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytestmark = pytest.mark.filterwarnings("ignore")

SIZES = {"vocab_size": 64, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
DATA = [
    {"input_ids": (ids := torch.randint(64, (8,), generator=torch.Generator().manual_seed(i))), "labels": ids}
    for i in range(24)
]


def trainer(folder: Path, config: Any, steps: int) -> Any:
    options = {"save_steps": 4, "eval_strategy": "steps", "eval_steps": 4, "logging_steps": 1, "weight_decay": 0.1}
    quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "metric_for_best_model": "loss"}
    args = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=2, learning_rate=1e-2, **options, **quiet
    )
    model = transformers.LlamaForCausalLM(config)
    return transformers.Trainer(model, args, train_dataset=DATA, eval_dataset=DATA[:4])


def test_a_trainer_goes_on(tmp_path: Path) -> None:
    torch.manual_seed(0)
    run = trainer(tmp_path / "run", transformers.LlamaConfig(**SIZES, attention_bias=True), 4)
    run.train()
    loss = run.evaluate()["eval_loss"]
    source, out = tmp_path / "run/checkpoint-4", tmp_path / "larger"
    done = grow_checkpoint(source, None, out, settings={"intermediate_size": 24}, verify=False)
    assert any("transformers' Trainer" in note for note in done.receipt.notes)
    for name in ("scheduler.pt", "training_args.bin", "rng_state.pth"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    notes = [json.loads((f / "trainer_state.json").read_text()) for f in (source, out)]
    assert notes[0]["best_model_checkpoint"] and not notes[1]["best_model_checkpoint"]
    assert {k: v for k, v in notes[0].items() if "best" not in k} == {
        k: v for k, v in notes[1].items() if "best" not in k
    }

    config = transformers.AutoConfig.from_pretrained(out)
    again = trainer(tmp_path / "again", config, 6)
    seen: list[float] = []

    class First(transformers.TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, model: Any, optimizer: Any, **__: Any) -> None:
            model.eval()
            with torch.no_grad():
                batch = {k: torch.stack([d[k] for d in DATA[:4]]) for k in DATA[0]}
                seen.append(float(model(**batch).loss))
            model.train()
            for group in optimizer.param_groups:
                for p in group["params"]:
                    assert optimizer.state[p]["exp_avg"].shape == p.shape
                    assert float(optimizer.state[p]["step"]) == 4

    again.add_callback(First())
    again.train(resume_from_checkpoint=str(out))
    assert seen[0] == pytest.approx(loss, rel=1e-4), "the loss continues"
    assert again.state.global_step == 6

    # a state in parts, and none at all
    (source / "global_step4").mkdir()
    (source / "global_step4" / "zero_pp_rank_0_optim_states.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="--no-optimizer"):
        grow_checkpoint(source, None, tmp_path / "other", settings={"intermediate_size": 24})
    grow_checkpoint(source, None, tmp_path / "other", settings={"intermediate_size": 24}, optimizer=False, verify=False)
    there = {f.name for f in (tmp_path / "other").rglob("*")}
    assert "scheduler.pt" in there
    assert not {"optimizer.pt", "zero_pp_rank_0_optim_states.pt"} & there
