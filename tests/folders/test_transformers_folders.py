"""Folders that transformers saves, grown and loaded again by ``from_pretrained``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fxgrow.folders import grow_checkpoint
from fxgrow.folders.source import open_folder

transformers: Any = pytest.importorskip("transformers")

from benchmarks.families import sources  # noqa: E402
from benchmarks.folders import Trial, exact  # noqa: E402

MAKERS = sources("checkpoints")["checkpoints"][0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "growth"),
    [("llama", "KV heads ×2"), ("mixtral", "hidden ×2"), ("vit", "one more block"), ("t5", "stream ×2")],
)
def test_what_is_grown_loads_and_computes_and_says_the_same(tmp_path: Path, name: str, growth: str) -> None:
    trial = Trial(tmp_path, MAKERS[name])
    row = trial.grow(dict(trial.asked)[growth])
    assert exact(row), row["grown"]


@pytest.mark.slow
def test_names_in_the_files_are_the_old_ones_where_the_class_has_others(tmp_path: Path) -> None:
    """A class that merges the experts of a layer when it loads, whose files have them one by one."""
    trial = Trial(tmp_path, MAKERS["mixtral"])
    done = grow_checkpoint(trial.small, dict(trial.asked)["hidden ×2"], tmp_path / "large")
    old, new = (set(open_folder(f).tensors) for f in (trial.small, done.folder))
    assert "model.layers.0.block_sparse_moe.experts.3.w2.weight" in old
    assert new == old
    # and files under the class's own names stay so
    model = trial.kind.from_pretrained(trial.small, dtype=torch.float64)  # type: ignore[attr-defined]
    model.save_pretrained(tmp_path / "own", save_original_format=False)
    done = grow_checkpoint(tmp_path / "own", dict(trial.asked)["hidden ×2"], tmp_path / "own large")
    assert "model.layers.1.mlp.experts.gate_up_proj" in open_folder(done.folder).tensors
    assert trial._outputs(trial._loaded(done.folder))[0].allclose(trial.outputs[0], rtol=0, atol=1e-10)


@pytest.mark.slow
def test_files_of_the_model_inside_without_its_prefix_stay_so(tmp_path: Path) -> None:
    trial = Trial(tmp_path, MAKERS["gpt2"])
    model = trial.kind.from_pretrained(trial.small, dtype=torch.float64)  # type: ignore[attr-defined]
    model.transformer.save_pretrained(tmp_path / "inner")
    config = json.loads((tmp_path / "inner" / "config.json").read_text()) | {"architectures": ["GPT2LMHeadModel"]}
    (tmp_path / "inner" / "config.json").write_text(json.dumps(config))
    done = grow_checkpoint(tmp_path / "inner", None, tmp_path / "large", settings={"n_inner": 192, "n_layer": 3})
    names = set(open_folder(done.folder).tensors)
    assert "h.2.mlp.c_fc.weight" in names and not any(n.startswith("transformer.") for n in names)
    assert trial._outputs(trial._loaded(done.folder))[0].allclose(trial.outputs[0], rtol=0, atol=1e-10)
