"""A folder in, a larger folder out: it loads into the class made from its config, and computes the same."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from examples.gpt.model import GPT, GPTConfig
from fxgrow import publish
from fxgrow.cli import app
from fxgrow.cli.models import parse_settings
from fxgrow.errors import CaptureError, CheckpointError, DiskError, GrowthRefused, SpecError
from fxgrow.folders import compare_folders, configs, grow_checkpoint, growing, writing
from fxgrow.landing import retrace
from fxgrow.training import untied

CONFIG = GPTConfig(vocab_size=40, block_size=12, n_layer=2, n_head=2, n_embd=8, n_hidden=16, head_dim=4)
SPECS: dict[str, Any] = {
    "stream": [{"op": "widen", "axis": "./residual", "factor": 2}],
    "stream by half": [{"op": "widen", "axis": "./residual", "to": 12, "noise": {"scale": 0.1}}],
    "hidden": [{"op": "widen", "axis": "*/hidden", "factor": 2, "noise": {"scale": 0.1}}],
    "heads": [{"op": "widen", "axis": "*/heads", "factor": 2}],
    "depth": [{"op": "deepen", "stack": "transformer.h", "by": 1}],
    "vocabulary": [{"op": "extend", "axis": "*/vocab", "to": 48}],
    "all": [
        {"op": "widen", "axis": "./residual", "factor": 2},
        {"op": "widen", "axis": "*/hidden", "factor": 2},
        {"op": "deepen", "stack": "transformer.h", "by": 1},
    ],
}


def model_of(config: dict[str, Any]) -> GPT:
    return GPT(GPTConfig(**config)).double()


def folder_of(path: Path, dtype: torch.dtype = torch.float64) -> Path:
    """A folder as a user may have it: shards with an index, a tokenizer, a card."""
    torch.manual_seed(0)
    model = GPT(CONFIG).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    tensors, _ = untied(model.state_dict())
    path.mkdir()
    names = sorted(tensors)
    places = {n: f"model-{1 + i % 2:05d}-of-00002.safetensors" for i, n in enumerate(names)}
    for file in set(places.values()):
        save_file({n: tensors[n] for n in names if places[n] == file}, path / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": places}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "config.json").write_text(json.dumps(dataclasses.asdict(CONFIG) | {"model_type": "gpt", "note": "kept"}))
    (path / "tokenizer").mkdir()
    (path / "tokenizer" / "words.txt").write_text("a b c")
    (path / "README.md").write_text("# A model\n")
    return path


def loaded(folder: Path) -> tuple[GPT, dict[str, Any]]:
    config = json.loads((folder / "config.json").read_text())
    fields = {f.name for f in dataclasses.fields(GPTConfig)}
    model = model_of({k: v for k, v in config.items() if k in fields})
    tensors: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    tied = {"transformer.wte.weight", "lm_head.weight"}
    assert len(tied & set(tensors)) == 1, "saved once"
    shared = tensors[(tied & set(tensors)).pop()]
    model.load_state_dict(tensors | dict.fromkeys(tied, shared))
    return model.eval(), config


def logits(model: GPT) -> torch.Tensor:
    ids = torch.randint(40, (3, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return torch.Tensor(model(ids, ids)[0][..., :40])


def digest(folder: Path) -> dict[str, str]:
    return {
        str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in sorted(folder.rglob("*"))
        if f.is_file() and f.name not in ("growth.json", "README.md")
    }


@pytest.mark.parametrize("name", SPECS)
def test_the_larger_class_loads_it_and_computes_the_same(tmp_path: Path, name: str) -> None:
    source = folder_of(tmp_path / "small")
    before = digest(source)
    done = grow_checkpoint(source, SPECS[name], tmp_path / "large", model_class=GPT, shard_bytes=3000)
    assert digest(source) == before
    small, large = loaded(source)[0], loaded(done.folder)[0]
    assert sum(p.numel() for p in large.parameters()) > sum(p.numel() for p in small.parameters())
    assert float((logits(small) - logits(large)).abs().max()) < 1e-10
    assert done.receipt.error_float64 is not None
    assert done.receipt.error_float64 < 1e-10
    # everything else is there
    config = json.loads((done.folder / "config.json").read_text())
    assert config["note"] == "kept"
    assert {k for k, v in config.items() if v != getattr(CONFIG, k, v)} == set(done.settings)
    assert (done.folder / "tokenizer" / "words.txt").read_text() == "a b c"
    card = (done.folder / "README.md").read_text()
    assert card.startswith("# A model\n")
    assert "Grown from small" in card
    index = json.loads((done.folder / "model.safetensors.index.json").read_text())
    files = {f.name for f in done.folder.glob("*.safetensors")}
    assert set(index["weight_map"].values()) == files
    assert len(files) > 2
    assert not [f for f in tmp_path.iterdir() if f.name.startswith(".")]


def test_sizes_in_the_words_of_the_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = folder_of(tmp_path / "small")
    traces = counted(monkeypatch)
    by_set = grow_checkpoint(source, None, tmp_path / "set", settings={"n_hidden": 24, "n_layer": 3}, model_class=GPT)
    larger = json.loads((source / "config.json").read_text()) | {"n_hidden": 24, "n_layer": 3}
    assert traces == ["configs"], "the trace that the sizes were read off is the proof's"
    (tmp_path / "larger.json").write_text(json.dumps(larger))
    by_like = grow_checkpoint(source, None, tmp_path / "like", like=tmp_path / "larger.json", model_class=GPT)
    assert by_set.settings == by_like.settings == {"n_hidden": (16, 24), "n_layer": (2, 3)}
    assert digest(by_set.folder) == digest(by_like.folder)
    assert float((logits(loaded(source)[0]) - logits(loaded(by_set.folder)[0])).abs().max()) < 1e-10


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which modules trace a grown class, every time."""
    found: list[str] = []
    for module in (configs, retrace):
        name, before = module.__name__.rpartition(".")[2], module.capture
        monkeypatch.setattr(module, "capture", lambda *a, _n=name, _c=before, **k: (found.append(_n), _c(*a, **k))[1])
    return found


class Scaled(GPT):
    """Its logits hang on a size of its config, whatever its weights are."""

    def forward(self, idx: torch.Tensor, targets: torch.Tensor | None = None) -> Any:
        logits, loss = super().forward(idx, targets)
        return logits.tanh() / self.config.n_hidden, loss


def test_a_config_that_is_found_is_proved_once_and_a_wrong_one_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = folder_of(tmp_path / "small")
    traces = counted(monkeypatch)
    done = grow_checkpoint(source, SPECS["all"], tmp_path / "large", model_class=GPT, verify=False)
    assert traces == ["configs"]
    assert done.settings["n_embd"] == (8, 16)
    monkeypatch.setattr(growing, "_BESIDE", 0)  # as for large folders
    beside = grow_checkpoint(source, SPECS["all"], tmp_path / "beside", model_class=GPT, verify=False)
    assert digest(beside.folder) == digest(done.folder)
    assert traces == ["configs"] * 2
    for asked in ({"spec": SPECS["hidden"]}, {"settings": {"n_hidden": 32}}):
        with pytest.raises(GrowthRefused, match="does not compute what the growth does"):
            grow_checkpoint(source, out=tmp_path / "larger", model_class=Scaled, shard_bytes=3000, **asked)
    assert traces.count("configs") == 6, "a proof beside the writing is repeated alone where it fails"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["beside", "large", "small"]


class Wrapped(GPT):
    """Its sizes stand in a table of its config, as a part's do in models of several parts."""

    def __init__(self, text: dict[str, Any], note: str = "") -> None:
        super().__init__(GPTConfig(**text))


def test_sizes_in_a_table_of_the_config(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "small")
    (source / "config.json").write_text(json.dumps({"text": dataclasses.asdict(CONFIG), "note": "kept"}))
    how: dict[str, Any] = {"model_class": Wrapped, "inputs": {"idx": torch.randint(40, (2, 8))}}
    for wrong, said in (("txt.n_hidden", "has no table txt; did you mean text"), ("text.n_hiden", "mean n_hidden")):
        with pytest.raises(SpecError, match=said):
            grow_checkpoint(source, settings={wrong: 32}, **how)
    done = grow_checkpoint(source, settings={"text.n_hidden": 32, "text.n_layer": 3}, **how)
    config = json.loads((done.folder / "config.json").read_text())
    assert config == {"text": dataclasses.asdict(CONFIG) | {"n_hidden": 32, "n_layer": 3}, "note": "kept"}
    assert done.receipt.error_float64 is not None
    assert done.receipt.error_float64 < 1e-10
    assert parse_settings(["text.n_hidden=32"], "--set", nested=True) == {"text.n_hidden": 32}


def test_the_dtype_is_kept(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "small", torch.bfloat16)
    done = grow_checkpoint(source, SPECS["stream"], tmp_path / "large", model_class=GPT)
    tensors = load_file(done.folder / "model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    small, large = loaded(source)[0], loaded(done.folder)[0]
    assert float((logits(small) - logits(large)).abs().max()) < 1e-10, "powers of two are exact in any dtype"


def test_what_stays_as_it_is_waits_for_the_disk_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, write = folder_of(tmp_path / "small"), writing.write_tensor

    def slow(file: Any, tensor: torch.Tensor) -> None:
        time.sleep(0.02)
        write(file, tensor)

    monkeypatch.setattr(writing, "write_tensor", slow)
    done = grow_checkpoint(source, SPECS["depth"], tmp_path / "large", model_class=GPT, verify=False)
    new = load_file(done.folder / "model.safetensors")
    old = {n: t for f in sorted(source.glob("*.safetensors")) for n, t in load_file(f).items()}
    assert all(torch.equal(new[n], t) for n, t in old.items() if ".h.1." not in n)


def test_a_run_that_was_cut_off_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = folder_of(tmp_path / "small")

    def run(out: str) -> Any:
        return grow_checkpoint(source, SPECS["all"], tmp_path / out, model_class=GPT, shard_bytes=3000)

    whole = digest(run("whole").folder)
    write, left = writing.write_tensor, 30

    def dying(file: Any, tensor: torch.Tensor) -> None:
        nonlocal left
        left -= 1
        if not left:
            raise OSError(28, "No space left on device")
        write(file, tensor)

    monkeypatch.setattr(writing, "write_tensor", dying)
    with pytest.raises(DiskError, match="No space left"):
        run("large")
    assert not (tmp_path / "large").exists()
    there = {f.name: f.stat().st_mtime_ns for f in (tmp_path / ".large.growing").glob("*.safetensors")}
    assert there
    monkeypatch.setattr(writing, "write_tensor", write)
    done = run("large")
    assert digest(done.folder) == whole
    assert {n: (done.folder / n).stat().st_mtime_ns for n in there} == there, "what was whole is not written again"
    with pytest.raises(DiskError, match="is there already"):
        run("large")


def cut_off(source: Path, out: Path, after: int) -> Path:
    """A growth that ends after so many tensors; the hidden folder that it leaves."""
    left = after

    def stop(done: int, total: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        grow_checkpoint(source, SPECS["hidden"], out, model_class=GPT, shard_bytes=3000, progress=stop)
    return out.with_name(f".{out.name}.growing")


def test_what_was_left_is_looked_at(tmp_path: Path) -> None:
    """Files that were cut short or damaged since, links and pipes are neither kept nor written through; runs take
    turns.
    """
    source = folder_of(tmp_path / "small")
    whole = digest(
        grow_checkpoint(source, SPECS["hidden"], tmp_path / "whole", model_class=GPT, shard_bytes=3000).folder
    )
    part = cut_off(source, tmp_path / "large", 25)
    one, two, three, four, *_ = sorted(part.glob("*.safetensors"))
    (tmp_path / "mine").write_text("mine")
    one.write_bytes(one.read_bytes()[:-8])
    two.unlink()
    two.symlink_to(tmp_path / "mine")
    three.unlink()
    os.mkfifo(three)
    flipped = bytearray(four.read_bytes())
    flipped[-3] ^= 4
    four.write_bytes(flipped)
    (part / "config.json").symlink_to(tmp_path / "mine")
    with publish.locked(part), pytest.raises(DiskError, match="written by another run"):
        grow_checkpoint(source, SPECS["hidden"], tmp_path / "large", model_class=GPT, shard_bytes=3000)
    done = grow_checkpoint(source, SPECS["hidden"], tmp_path / "large", model_class=GPT, shard_bytes=3000)
    assert digest(done.folder) == whole
    assert [n for n in done.receipt.notes if "damaged since" in n] == [
        f"{four.name} of an earlier run was damaged since, and was written again"
    ]
    assert (tmp_path / "mine").read_text() == "mine"
    part.symlink_to(tmp_path)
    shutil.rmtree(tmp_path / "large")
    with pytest.raises(DiskError, match="is in the way"):
        grow_checkpoint(source, SPECS["hidden"], tmp_path / "large", model_class=GPT)


def test_a_shard_that_vanishes(tmp_path: Path) -> None:
    """One error; what was written waits for the shard to be there again."""
    source = folder_of(tmp_path / "small")
    how: dict[str, Any] = {"model_class": GPT, "shard_bytes": 3000}
    whole = digest(grow_checkpoint(source, SPECS["hidden"], tmp_path / "whole", **how).folder)
    shard, away = source / "model-00002-of-00002.safetensors", tmp_path / "away"

    def take(done: int, total: int) -> None:
        if done > total / 2 and shard.exists():
            shard.rename(away)

    with pytest.raises(CheckpointError, match=f"{shard.name} cannot be read: .*No such file"):
        grow_checkpoint(source, SPECS["hidden"], tmp_path / "large", progress=take, **how)
    assert not (tmp_path / "large").exists()
    there = len(list((tmp_path / ".large.growing").glob("*.safetensors")))
    assert there
    away.rename(shard)
    assert digest(grow_checkpoint(source, SPECS["hidden"], tmp_path / "large", **how).folder) == whole


def test_free_space_is_that_of_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = folder_of(tmp_path / "small")
    (source / "tokenizer" / "large.bin").write_bytes(bytes(2 * 10**6))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=900_000))
    with pytest.raises(DiskError, match=r"needs 1\.\d MiB, and 878\.9 KiB are free there: nothing was written"):
        grow_checkpoint(source, SPECS["hidden"], tmp_path / "large", model_class=GPT)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["small"]


def test_weights_that_are_left_over_stay_behind(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "small")
    for name in ("model-00001-of-00005.safetensors", "pytorch_model.bin"):
        (source / name).write_bytes(b"of an earlier save")
    done = grow_checkpoint(source, SPECS["hidden"], tmp_path / "large", model_class=GPT, shard_bytes=3000)
    loaded(done.folder)
    assert not (done.folder / "pytorch_model.bin").exists()
    assert sum("was left out: it holds weights of the small model" in note for note in done.receipt.notes) == 2
    (source / "model.safetensors").write_bytes(b"of an earlier save")
    with pytest.raises(CheckpointError, match="which one holds the weights"):
        grow_checkpoint(source, SPECS["hidden"], tmp_path / "larger", model_class=GPT)


def test_another_growth_does_not_go_on_from_what_was_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = folder_of(tmp_path / "small")
    monkeypatch.setattr(writing.Writing, "settle", lambda self: None)
    grow_checkpoint(source, SPECS["stream"], tmp_path / "large", model_class=GPT, shard_bytes=3000)
    monkeypatch.undo()
    done = grow_checkpoint(source, SPECS["hidden"], tmp_path / "large", model_class=GPT, shard_bytes=3000)
    assert float((logits(loaded(source)[0]) - logits(loaded(done.folder)[0])).abs().max()) < 1e-10


@pytest.mark.parametrize(
    ("how", "error", "said"),
    [
        ({"settings": {"n_hiden": 4}}, SpecError, "n_hidden"),
        ({"settings": {"n_hidden": 16}}, SpecError, "nothing to grow"),
        ({"settings": {"n_hidden": 8}}, SpecError, "16 units, the larger model 8"),
        ({}, SpecError, "give one of"),
        ({"spec": SPECS["stream"], "settings": {"n_layer": 3}}, SpecError, "give one of"),
        ({"settings": {"n_layer": "x"}}, CheckpointError, "class cannot be made"),
    ],
)
def test_bad_requests(tmp_path: Path, how: dict[str, Any], error: type[Exception], said: str) -> None:
    source = folder_of(tmp_path / "small")
    with pytest.raises((error, GrowthRefused), match=said):
        grow_checkpoint(source, out=tmp_path / "large", model_class=GPT, **how)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["small"]


@pytest.mark.parametrize(("out", "said"), [("small/large", "is inside"), ("small", "is there already")])
def test_places_that_cannot_be_written_to(tmp_path: Path, out: str, said: str) -> None:
    source = folder_of(tmp_path / "small")
    before = digest(source)
    with pytest.raises((SpecError, DiskError), match=said):
        grow_checkpoint(source, SPECS["stream"], tmp_path / out, model_class=GPT)
    assert digest(source) == before


def test_links_become_files_and_the_folder_one_is_in_has_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a cache of downloads keeps them: every file a link to a blob elsewhere."""
    source = folder_of(tmp_path / "small")
    (tmp_path / "blobs").mkdir()
    for i, file in enumerate(sorted(f for f in source.iterdir() if f.is_file())):
        file.rename(tmp_path / "blobs" / str(i))
        file.symlink_to(f"../blobs/{i}")
    monkeypatch.chdir(source)
    done = grow_checkpoint(".", SPECS["hidden"], model_class=GPT)
    assert done.folder == tmp_path / "small-grown"
    assert not [f for f in done.folder.rglob("*") if f.is_symlink()]
    assert float((logits(loaded(source)[0]) - logits(loaded(done.folder)[0])).abs().max()) < 1e-10


def _cut(folder: Path) -> None:
    file = next(folder.glob("model-00001*"))
    file.write_bytes(file.read_bytes()[:-8])


def _rename(folder: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] = {n.replace("ln_f", "norm"): f for n, f in index["weight_map"].items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _long(folder: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["lm_head.weight"] = "a" * 5000
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _many(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text()) | {"n_layer": 10**6}
    (folder / "config.json").write_text(json.dumps(config))


def _outside(folder: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["lm_head.weight"] = "../elsewhere.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: (f / "config.json").unlink(), "has no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "is not JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "no table of settings"),
        (lambda f: (f / "model-00002-of-00002.safetensors").unlink(), "which is not there"),
        (lambda f: (f / "model-00002-of-00002.safetensors").write_bytes(b"12"), "no safetensors file"),
        (_cut, "cut off"),
        (_rename, "which model.safetensors.index.json has elsewhere"),
        (_outside, "not a file of the folder"),
        (_long, "which is not there"),
        (_many, "far more than there are tensors"),
        (lambda f: [p.unlink() for p in f.glob("*.safetensors*")], "has neither model.safetensors nor"),
    ],
)
def test_damaged_folders(tmp_path: Path, damage: Callable[[Path], Any], said: str) -> None:
    source = folder_of(tmp_path / "small")
    damage(source)
    with pytest.raises(CheckpointError, match=said):
        grow_checkpoint(source, SPECS["stream"], tmp_path / "large", model_class=GPT)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["small"]


def test_weights_that_are_not_numbers_are_refused_and_nothing_appears(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "small")
    file = next(source.glob("model-00002*"))
    tensors = load_file(file)
    tensors[min(tensors)].view(-1)[0] = float("nan")
    save_file(tensors, file)
    with pytest.raises(GrowthRefused, match="NaN or infinite"):
        grow_checkpoint(source, SPECS["stream"], tmp_path / "large", model_class=GPT)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["small"]


def test_two_folders_are_compared_as_functions(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "small")
    large = grow_checkpoint(source, SPECS["all"], tmp_path / "large", model_class=GPT).folder
    found = compare_folders(source, large, model_class=GPT)
    assert found.same
    assert found.parting is None
    other = folder_of(tmp_path / "other")
    name = "transformer.h.1.mlp.c_fc.weight"
    index = json.loads((other / "model.safetensors.index.json").read_text())
    file = other / index["weight_map"][name]
    tensors = load_file(file)
    tensors[name][0] += 0.5
    save_file(tensors, file)
    found = compare_folders(source, other, model_class=GPT)
    assert not found.same
    assert found.parting is not None
    assert found.parting.module == name.rpartition(".")[0]
    assert "model.py" in found.parting.source


def test_the_command_line_takes_folders(tmp_path: Path) -> None:
    source, large, named = str(folder_of(tmp_path / "small")), str(tmp_path / "large"), "examples.gpt.model:GPT"
    runner = CliRunner()

    def said(*command: str, code: int = 0) -> str:
        result = runner.invoke(app, [*command, "--class", named])
        assert result.exit_code == code, result.output
        return result.output

    assert "n_hidden: 16 → 32" in said("grow", source, "--set", "n_hidden=32", "-o", large)
    assert json.loads((Path(large) / "config.json").read_text())["n_hidden"] == 32
    assert "same" in said("verify", source, large)
    assert "hidden" in said("inspect", large)
    assert "deepen" in said("plan", large, "{op: deepen, stack: transformer.h, factor: 2}")
    again = runner.invoke(app, ["grow", source, "--set", "n_hidden=32", "-o", large, "--class", named])
    assert "is there already" in str(again.exception)


def test_ties_that_are_none_in_the_files_are_refused(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "small")
    index = json.loads((source / "model.safetensors.index.json").read_text())
    saved = next(n for n in ("lm_head.weight", "transformer.wte.weight") if n in index["weight_map"])
    (other,) = {"lm_head.weight", "transformer.wte.weight"} - {saved}
    file = source / index["weight_map"][saved]
    for factor in (1.0, 1.5):
        tensors = load_file(file)
        save_file(tensors | {other: factor * tensors[saved]}, file, {"format": "pt"})
        index["weight_map"][other] = file.name
        (source / "model.safetensors.index.json").write_text(json.dumps(index))
        if factor == 1.0:
            done = grow_checkpoint(source, SPECS["hidden"], tmp_path / "large", model_class=GPT)
            assert {other, saved} <= set(load_file(done.folder / "model.safetensors"))
        else:
            with pytest.raises(CheckpointError, match=r"other values as .* than as .*, which GPT ties"):
                grow_checkpoint(source, SPECS["hidden"], tmp_path / "larger", model_class=GPT)
    assert not (tmp_path / "larger").exists()


class _Turned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return -gradients[0]


class Reversed(GPT):
    """Its backward is not that of its forward, which no weights of zero show."""

    def forward(self, idx: torch.Tensor, targets: torch.Tensor | None = None) -> Any:
        logits, loss = super().forward(idx, targets)
        return _Turned.apply(logits), loss


def test_a_backward_is_not_measured_on_weights_that_nobody_wrote(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "small")
    with pytest.raises(CaptureError, match=r"custom autograd function .*_Turned"):
        grow_checkpoint(source, SPECS["hidden"], tmp_path / "large", model_class=Reversed)
    assert not (tmp_path / "large").exists()
