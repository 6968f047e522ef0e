"""A file of torch.save in, a larger one out: weights, settings and the optimizer's state; a script resumes from it."""

from __future__ import annotations

import collections
import dataclasses
import json
import re
import runpy
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import fxgrow
from examples.gpt.model import GPT, GPTConfig
from examples.nanogpt.model import GPT as NanoGPT
from fxgrow import cli
from fxgrow.errors import CheckpointError, DiskError, FxgrowError, GrowthRefused, SpecError
from fxgrow.folders import archive, grow_checkpoint
from fxgrow.folders.archive import Later, save
from fxgrow.ir.packing import pack
from fxgrow.optim.rates import KEY

CONFIG = GPTConfig(vocab_size=40, block_size=12, n_layer=1, n_head=2, n_embd=8, n_hidden=16, head_dim=4)
WIDE = [{"op": "widen", "axis": "./residual", "to": 12, "noise": {"scale": 0.1}}]
HIDDEN = [{"op": "widen", "axis": "*/hidden", "factor": 2}]
DEPTH = [{"op": "deepen", "stack": "transformer.h", "by": 1}]
SEVERAL = [*WIDE, *DEPTH, {"op": "extend", "axis": "*/vocab", "to": 48}]


# nanoGPT's own script ---------------------------------------------------------------------------------------------


def train(out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, **options: Any) -> str:
    """Run the script, which knows nothing of growth."""
    sizes = {"eval_interval": 10, "eval_iters": 2, "log_interval": 1, "batch_size": 2, "block_size": 8, "n_embd": 8}
    usual = {"gradient_accumulation_steps": 1, "device": "cpu", "dtype": "float32", "warmup_iters": 2, "out_dir": out}
    given = sizes | usual | options
    monkeypatch.setattr(sys, "argv", ["train.py", *(f"--{k}={v}" for k, v in given.items())])
    capsys.readouterr()
    runpy.run_module("examples.nanogpt.train", run_name="__main__")
    return capsys.readouterr().out


def losses(said: str) -> dict[int, float]:
    return {int(n): float(x) for n, x in re.findall(r"step (\d+): train loss ([\d.]+)", said)}


@pytest.mark.parametrize("settings", [{"n_embd": 12}, {"n_layer": 3, "n_embd": 16, "n_head": 4}])
def test_nanogpt_resumes_by_its_own_script(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, settings: dict[str, int]
) -> None:
    before = losses(train(tmp_path / "out", capsys, monkeypatch, max_iters=20))
    done = grow_checkpoint(
        tmp_path / "out/ckpt.pt", None, tmp_path / "larger/ckpt.pt", settings=settings, model_class=NanoGPT
    )
    assert done.receipt.error_float64 is not None
    assert done.receipt.error_float64 < 1e-10
    assert any("GPT.configure_optimizers" in note for note in done.receipt.notes)
    small, large = (torch.load(tmp_path / name / "ckpt.pt") for name in ("out", "larger"))
    assert large["model_args"] == small["model_args"] | settings
    assert list(large) == list(small)
    assert all(large[k] == small[k] for k in ("iter_num", "best_val_loss", "config"))
    after = losses(train(tmp_path / "larger", capsys, monkeypatch, max_iters=40, init_from="resume"))
    assert after[20] == pytest.approx(before[20], rel=1e-5), "the loss continues"
    assert after[40] < after[20]
    assert torch.load(tmp_path / "larger/ckpt.pt")["iter_num"] == 40


# states against those that fxgrow carries itself --------------------------------------------------------------------


def trained(groups: str = "one", kind: type[torch.optim.Optimizer] = torch.optim.AdamW) -> tuple[GPT, Any]:
    torch.manual_seed(0)
    model = GPT(dataclasses.replace(CONFIG)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    params = list(model.parameters())
    if groups == "two":
        matrices = {"params": [p for p in params if p.dim() >= 2], "weight_decay": 0.1}
        optimizer = kind([matrices, {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0}], lr=1e-2)  # type: ignore[call-arg]
    else:
        optimizer = kind(params, lr=1e-2)  # type: ignore[call-arg]
    for _ in range(3):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
    return model, optimizer


def saved(file: Path, model: nn.Module, optimizer: Any, prefix: str = "", **more: Any) -> Path:
    data = {
        "model": type(state := model.state_dict())((prefix + n, t) for n, t in state.items()),
        "optimizer": optimizer.state_dict(),
        "args": dataclasses.asdict(CONFIG),
        "script": {"n_embd": 8, "learning_rate": 0.01, "data": "words"},
        "step": 3,
        **more,
    }
    torch.save(data, file)
    return file


def loaded(file: Path) -> tuple[GPT, dict[str, Any]]:
    data = torch.load(file, weights_only=True)
    model = GPT(GPTConfig(**data["args"])).double()
    model.load_state_dict({n.removeprefix("_orig_mod."): t for n, t in data["model"].items()})
    return model.eval(), data


def logits(model: nn.Module) -> torch.Tensor:
    ids = torch.randint(40, (3, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return torch.Tensor(model.eval()(ids, ids)[0][..., :40])


def same(one: Any, two: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(two, torch.Tensor) and one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[k], two[k]) for k in one)
    if isinstance(one, list):
        return len(one) == len(two) and all(map(same, one, two))
    return bool(one == two)


@pytest.mark.parametrize(
    ("policy", "groups", "spec"), [("asymmetric", "two", SEVERAL), ("copy", "one", WIDE), ("reset", "two", HIDDEN)]
)
def test_the_state_is_the_one_that_a_growth_carries(tmp_path: Path, policy: str, groups: str, spec: Any) -> None:
    model, optimizer = trained(groups)
    file = saved(tmp_path / "small.pt", model, optimizer)
    grow_checkpoint(file, spec, tmp_path / "large.pt", model_class=GPT, policy=policy, verify=False)
    large, data = loaded(tmp_path / "large.pt")
    assert float((logits(model) - logits(large)).abs().max()) < 1e-10
    ids = torch.randint(40, (2, 8))
    growth = fxgrow.grow(model, spec, (ids,), verify=False)
    growth.apply_(model)
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in large.state_dict().items())
    growth.carry_(optimizer, policy)
    expected = optimizer.state_dict()
    for group in expected["param_groups"]:
        group.pop(KEY, None), group.pop("fxgrow_steps", None)
    assert same(data["optimizer"], expected)


def test_a_state_of_nothing_but_counts_stays(tmp_path: Path) -> None:
    """Depth scales no weight, so that the small model's steps go on: policy exact needs no rates."""
    model, optimizer = trained()
    file = saved(tmp_path / "small.pt", model, optimizer)
    grow_checkpoint(file, DEPTH, tmp_path / "large.pt", model_class=GPT, policy="exact", verify=False)
    large, data = loaded(tmp_path / "large.pt")
    before = dict(zip((n for n, _ in model.named_parameters()), optimizer.state_dict()["state"].values(), strict=True))
    after = [n for n, _ in large.named_parameters()]
    state = data["optimizer"]["state"]
    assert same({after[k]: v for k, v in state.items()}, before)
    assert len(state) < len(after), "a new block begins without"


def test_rates_per_slice(tmp_path: Path) -> None:
    """Where the script imports fxgrow, a plain optimizer that loads the state takes the small model's steps."""
    model, optimizer = trained("two", torch.optim.SGD)
    optimizer.param_groups[0]["momentum"] = 0.5
    file = saved(tmp_path / "small.pt", model, optimizer)
    with pytest.raises(GrowthRefused, match="--rates"):
        grow_checkpoint(file, HIDDEN, tmp_path / "large.pt", model_class=GPT, policy="exact")
    grow_checkpoint(file, HIDDEN, tmp_path / "large.pt", model_class=GPT, policy="exact", rates=True, verify=False)
    large, data = loaded(tmp_path / "large.pt")
    params = list(large.parameters())
    own = torch.optim.SGD([{"params": [p for p in params if (p.dim() >= 2) is m]} for m in (True, False)], lr=1e-2)
    own.load_state_dict(data["optimizer"])
    assert any(KEY in group for group in own.param_groups)
    ids = torch.randint(40, (2, 8))
    for net, opt in ((model, optimizer), (large, own)):
        net.train()
        for _ in range(3):
            opt.zero_grad()
            net(ids, ids)[1].backward()
            opt.step()
    assert float((logits(model) - logits(large)).abs().max()) < 1e-10


# what else a file holds ---------------------------------------------------------------------------------------------


def test_wrappers_averages_ties_and_everything_else(tmp_path: Path) -> None:
    model, optimizer = trained()
    average = {n: t * 0.5 for n, t in model.state_dict().items()}
    more = {
        "nested": {"ema": average},
        "rng": torch.arange(5),
        "names": ["a", ("b", None)],
        "teacher": {"w": torch.ones(3, 3)},
    }
    file = saved(tmp_path / "small.pt", model, optimizer, "_orig_mod.", **more)
    small = torch.load(file)
    done = grow_checkpoint(file, WIDE, tmp_path / "large.pt", model_class=GPT)
    assert "kept as they are, with tensors in them: teacher" in done.receipt.notes
    large, data = loaded(tmp_path / "large.pt")
    assert list(data["model"]) == list(small["model"])
    tied = [data["model"][f"_orig_mod.{n}.weight"].untyped_storage().data_ptr() for n in ("transformer.wte", "lm_head")]
    assert tied[0] == tied[1], "saved once"
    assert all(same(data[k], small[k]) for k in ("rng", "names", "teacher", "step", "script"))
    model.load_state_dict(average)
    large.load_state_dict(data["nested"]["ema"])
    assert float((logits(model) - logits(large)).abs().max()) < 1e-10
    assert sorted(p.name for p in tmp_path.iterdir()) == ["large.pt", "small.pt"]


def test_moments_that_are_no_numbers(tmp_path: Path) -> None:
    model, optimizer = trained()
    optimizer.state[model.lm_head.weight]["exp_avg_sq"][3, 1] = float("inf")
    file = saved(tmp_path / "small.pt", model, optimizer)
    with pytest.raises(GrowthRefused, match="exp_avg_sq of parameter 0 has values that are NaN or infinite"):
        grow_checkpoint(file, HIDDEN, tmp_path / "large.pt", model_class=GPT)


def test_without_its_optimizer(tmp_path: Path) -> None:
    file = saved(tmp_path / "small.pt", *trained())
    grow_checkpoint(file, HIDDEN, tmp_path / "large.pt", model_class=GPT, optimizer=False, verify=False)
    assert "optimizer" not in torch.load(tmp_path / "large.pt")


# which parameter is which -------------------------------------------------------------------------------------------


def backwards(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(list(model.parameters())[::-1])


def forwards(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters())


def test_a_function_says_how_the_optimizer_is_made(tmp_path: Path) -> None:
    model, _ = trained()
    optimizer = backwards(model)
    for p in model.parameters():
        p.grad = torch.full_like(p, float(p.numel()))
    optimizer.step()
    file = saved(tmp_path / "small.pt", model, optimizer)
    with pytest.raises(CheckpointError, match=r"no way fits .*--make-optimizer"):
        grow_checkpoint(file, HIDDEN, tmp_path / "large.pt", model_class=GPT)
    with pytest.raises(CheckpointError, match=r"no state of the optimizer that forwards\(\) makes"):
        grow_checkpoint(file, HIDDEN, tmp_path / "large.pt", model_class=GPT, make_optimizer=forwards)
    grow_checkpoint(file, HIDDEN, tmp_path / "large.pt", model_class=GPT, make_optimizer=backwards, policy="copy")
    large, data = loaded(tmp_path / "large.pt")
    own = backwards(large)
    own.load_state_dict(data["optimizer"])
    assert all(own.state[p]["exp_avg"].shape == p.shape for p in large.parameters())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda o: o["param_groups"][0]["params"].pop(), "groups of"),
        (lambda o: o["param_groups"][0].update(params=["a", "b"]), "has names for its parameters"),
        (lambda o: o["state"].update({99: {}}), "are not those of its groups"),
        (lambda o: o["state"][0].update(exp_avg=torch.ones(3)), r"exp_avg of parameter 0 is \[3\]"),
        (
            lambda o: o["state"][0].update(shadow=torch.ones(40, 8, dtype=torch.float64)),
            "not known how its state 'shadow'",
        ),
    ],
)
def test_states_that_do_not_fit(tmp_path: Path, change: Any, said: str) -> None:
    model, optimizer = trained()
    file = saved(tmp_path / "small.pt", model, optimizer)
    data = torch.load(file)
    change(data["optimizer"])
    torch.save(data, file)
    with pytest.raises(FxgrowError, match=said):
        grow_checkpoint(file, HIDDEN, tmp_path / "large.pt", model_class=GPT)
    assert not (tmp_path / "large.pt").exists()


class Asking(GPT):
    """Its optimizer may be made in any order."""

    def configure_optimizers(self, train_config: Any) -> torch.optim.Optimizer:
        raise AssertionError


def test_a_method_that_cannot_be_called_is_no_usual_way(tmp_path: Path) -> None:
    file = saved(tmp_path / "small.pt", *trained())
    with pytest.raises(CheckpointError, match=r"takes train_config.*--make-optimizer"):
        grow_checkpoint(file, HIDDEN, tmp_path / "large.pt", model_class=Asking)


def test_a_state_beside_a_folder(tmp_path: Path) -> None:
    """As fxgrow.training keeps it, its rates of an earlier growth included."""
    model, optimizer = trained("two")
    ids = torch.randint(40, (2, 8))
    growth = fxgrow.grow(model, HIDDEN, (ids,), verify=False)
    growth.apply_(model)
    growth.carry_(optimizer, "asymmetric", warmup=7)
    tensors: dict[str, torch.Tensor] = {}
    small = tmp_path / "small"
    small.mkdir()
    (small / "config.json").write_text(json.dumps(dataclasses.asdict(model.config)))
    save_file({n: t for n, t in model.state_dict().items() if "wte" not in n}, small / "model.safetensors")
    packed = pack(optimizer.state_dict(), "optimizer", tensors)
    (tmp_path / "state.json").write_text(json.dumps({"optimizer": packed}))
    save_file(tensors, tmp_path / "optimizer.safetensors")
    given: Any = {"model_class": GPT, "optimizer": tmp_path / "optimizer.safetensors", "policy": "copy"}
    done = grow_checkpoint(small, WIDE, tmp_path / "large", verify=False, **given)
    assert {f.name for f in done.folder.iterdir()} >= {"optimizer.pt", "model.safetensors"}
    saved_state = torch.load(done.folder / "optimizer.pt")
    growth = fxgrow.grow(model, WIDE, (ids,), verify=False)
    growth.apply_(model)
    growth.carry_(optimizer, "copy")
    assert same(saved_state["state"], optimizer.state_dict()["state"])
    for mine, theirs in zip(saved_state["param_groups"], optimizer.state_dict()["param_groups"], strict=True):
        assert mine[KEY]["names"] == theirs[KEY]["names"]
        assert mine["fxgrow_steps"] == theirs["fxgrow_steps"] == [0]
    optimizer.load_state_dict(saved_state)
    (tmp_path / "state.json").unlink()
    with pytest.raises(CheckpointError, match=r"state\.json, which says what they are"):
        grow_checkpoint(small, WIDE, tmp_path / "other", **given)


class Module(GPT):
    """As Lightning has it: settings by name, an optimizer without being asked anything."""

    def __init__(self, n_hidden: int, lr: float = 0.1) -> None:
        super().__init__(dataclasses.replace(CONFIG, n_hidden=n_hidden))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 3)]


def test_files_of_lightnings_shape(tmp_path: Path) -> None:
    model = Module(16).double()
    optimizer = model.configure_optimizers()[0][0]
    ids = torch.randint(40, (2, 8))
    model(ids, ids)[1].backward()
    optimizer.step()
    data = {"epoch": 1, "state_dict": model.state_dict(), "loops": {"fit": {"state_dict": {}}}, "lr_schedulers": [{}]}
    data |= {"optimizer_states": [optimizer.state_dict()], "hyper_parameters": {"n_hidden": 16, "lr": 0.1}}
    torch.save(data, tmp_path / "small.ckpt")
    inputs = {"idx": ids}
    grow_checkpoint(tmp_path / "small.ckpt", settings={"n_hidden": 32}, model_class=Module, inputs=inputs, verify=False)
    larger = torch.load(tmp_path / "small-grown.ckpt")
    assert larger["hyper_parameters"] == {"n_hidden": 32, "lr": 0.1}
    again = Module(**larger["hyper_parameters"]).double()
    again.load_state_dict(larger["state_dict"])
    assert float((logits(model) - logits(again)).abs().max()) < 1e-10
    own = again.configure_optimizers()[0][0]
    own.load_state_dict(larger["optimizer_states"][0])
    assert all(own.state[p]["momentum_buffer"].shape == p.shape for p in again.parameters())


class Shifted(nn.Module):
    """A setting of its moves no shape."""

    def __init__(self, width: int = 4, hidden: int = 8, shift: int = 0) -> None:
        super().__init__()
        self.shift = shift
        self.layers = nn.Sequential(nn.Embedding(7, width), nn.Linear(width, hidden), nn.Linear(hidden, 3))

    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.layers(idx + self.shift))


def test_a_setting_that_the_file_lacks_and_the_class_knows(tmp_path: Path) -> None:
    torch.save({"model": Shifted().state_dict(), "args": {"width": 4}}, tmp_path / "small.pt")
    how: dict[str, Any] = {"model_class": Shifted, "inputs": {"idx": torch.arange(6).reshape(2, 3)}}
    grow_checkpoint(tmp_path / "small.pt", settings={"hidden": 16, "shift": 0}, **how)
    assert torch.load(tmp_path / "small-grown.pt")["args"] == {"width": 4, "hidden": 16, "shift": 0}
    with pytest.raises(GrowthRefused):
        grow_checkpoint(tmp_path / "small.pt", out=tmp_path / "no.pt", settings={"hidden": 16, "shift": 1}, **how)
    with pytest.raises(SpecError, match="has no shifted"):
        grow_checkpoint(tmp_path / "small.pt", out=tmp_path / "no.pt", settings={"hidden": 16, "shifted": 1}, **how)


# several optimizers -------------------------------------------------------------------------------------------------


def halves(model: nn.Module) -> dict[str, torch.optim.Optimizer]:
    """Muon for the matrices of blocks, AdamW for the rest, as they are used together."""
    inner = [p for n, p in model.named_parameters() if ".h." in n and p.dim() == 2]
    rest = [p for n, p in model.named_parameters() if not (".h." in n and p.dim() == 2)]
    return {"muon": torch.optim.Muon(inner, lr=1e-2), "adamw": torch.optim.AdamW(rest, lr=1e-2)}


def stepped(model: nn.Module) -> dict[str, torch.optim.Optimizer]:
    made = halves(model)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    for optimizer in made.values():
        optimizer.step()
    return made


@pytest.mark.parametrize("where", ["names", "list", "table"])
def test_several_optimizers(tmp_path: Path, where: str) -> None:
    model, _ = trained()
    made = stepped(model)
    states = {name: optimizer.state_dict() for name, optimizer in made.items()}
    more: dict[str, Any] = {f"optimizer_{name}": state for name, state in states.items()}
    more = {"names": more, "list": {"optimizers": list(states.values())}, "table": {"optimizers": states}}[where]
    data = {"model": model.state_dict(), "args": dataclasses.asdict(CONFIG), **more}
    torch.save(data, tmp_path / "small.pt")
    named = halves if where == "list" else None
    spec = [*HIDDEN, *DEPTH]
    how: dict[str, Any] = {"model_class": GPT, "policy": "copy", "verify": False, "make_optimizer": named}
    grow_checkpoint(tmp_path / "small.pt", spec, tmp_path / "large.pt", **how)
    large, grown = loaded(tmp_path / "large.pt")
    assert list(grown) == list(data)
    found = grown["optimizers"] if where != "names" else {n: grown[f"optimizer_{n}"] for n in states}
    found = dict(zip(states, found, strict=True)) if where == "list" else found
    growth = fxgrow.grow(model, spec, (torch.randint(40, (2, 8)),), verify=False)
    growth.apply_(model)
    growth.carry_(list(made.values()), "copy")
    for name, optimizer in halves(large).items():
        optimizer.load_state_dict(found[name])
        expected = [made[name].state.get(p, {}) for p in halves(model)[name].param_groups[0]["params"]]
        got = [optimizer.state.get(p, {}) for p in optimizer.param_groups[0]["params"]]
        assert same(list(map(dict, got)), list(map(dict, expected)))


def test_several_optimizers_that_do_not_fit(tmp_path: Path) -> None:
    model, _ = trained()
    states = [o.state_dict() for o in stepped(model).values()]
    for several, said in (
        (states[:1] * 2, "hold the same parameters"),
        ([states[0], {**states[1], "x": 1}, states[0]], "same"),
    ):
        data = {"model": model.state_dict(), "args": dataclasses.asdict(CONFIG), "optimizers": several}
        torch.save(data, tmp_path / "small.pt")
        with pytest.raises(CheckpointError, match=said):
            grow_checkpoint(tmp_path / "small.pt", HIDDEN, tmp_path / "large.pt", model_class=GPT)


# a tensor at a time -------------------------------------------------------------------------------------------------


def test_an_archive_is_written_a_tensor_at_a_time(tmp_path: Path) -> None:
    """What PyTorch and Python's own reader of archives find is what torch.save would have written."""
    large, other = torch.randn(300, 400), torch.randn(200, 500, dtype=torch.bfloat16)
    later, made = Later(), []

    def make(name: str, tensor: torch.Tensor) -> torch.Tensor:
        made.append(name)
        return tensor

    one, two = later.put_off(large, lambda: make("one", large)), later.put_off(other, lambda: make("two", other))
    table = collections.OrderedDict(x=one, small=torch.ones(3), tied=one)
    table._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]
    data = {"model": table, "state": {0: {"m": two, "step": torch.tensor(3.0)}, 1: {"m": other[10:20]}}, "n": (2, [])}
    save(tmp_path / "a.pt", data, later)
    assert made == ["one", "two"]
    found = torch.load(tmp_path / "a.pt", weights_only=True)
    assert same(found["model"], {"x": large, "small": torch.ones(3), "tied": large})
    assert found["model"]["x"].data_ptr() == found["model"]["tied"].data_ptr()
    assert found["model"]._metadata == {"": {"version": 1}}
    assert same(found["state"], {0: {"m": other, "step": torch.tensor(3.0)}, 1: {"m": other[10:20]}})
    assert zipfile.ZipFile(tmp_path / "a.pt").testzip() is None
    save(tmp_path / "b.pt", {"odd": torch.eye(3).to_sparse(), "x": one}, later)  # tensors within a tensor
    assert torch.equal(torch.load(tmp_path / "b.pt")["x"], large)


def test_large_moments_are_made_when_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = trained()
    file = saved(tmp_path / "small.pt", model, optimizer)
    for name, size in (("whole", 1 << 30), ("large", 1)):
        monkeypatch.setattr(archive, "_SMALL", size)
        grow_checkpoint(file, SEVERAL, tmp_path / f"{name}.pt", model_class=GPT, verify=False)
    assert same(*(torch.load(tmp_path / f"{name}.pt") for name in ("whole", "large")))


# files that are none ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d["model"], "tensors alone"),
        (lambda d: {k: v for k, v in d.items() if k not in ("args", "script")}, "no table of settings"),
        (lambda d: {k: v for k, v in d.items() if k != "model"}, "no table of weights"),
        (lambda d: d | {"args": d["args"] | {"n_embd": 12}}, "is made that fits its weights"),
        (lambda d: d | {"again": d["args"]}, "are both settings"),
        (lambda d: d | {"model": {**d["model"], "more": torch.ones(2)}}, "has no such tensor"),
        (lambda d: d | {"ema": dict(list(d["model"].items())[:3])}, "what is to become of it"),
        (lambda d: d | {"odd": Path("here")}, "more than tensors and plain data"),
        (lambda d: [d], "no table of weights"),
    ],
)
def test_files_that_are_not_grown(tmp_path: Path, change: Any, said: str) -> None:
    file = saved(tmp_path / "small.pt", *trained())
    torch.save(change(torch.load(file)), file)
    with pytest.raises(CheckpointError, match=said):
        grow_checkpoint(file, HIDDEN, tmp_path / "large.pt", model_class=GPT)
    assert [p.name for p in tmp_path.iterdir()] == ["small.pt"]


def test_damaged_files_and_bad_requests(tmp_path: Path) -> None:
    file = saved(tmp_path / "small.pt", *trained())
    with pytest.raises(SpecError, match="name the class"):
        grow_checkpoint(file, HIDDEN, tmp_path / "large.pt")
    with pytest.raises(DiskError, match="there already"):
        grow_checkpoint(file, HIDDEN, file, model_class=GPT)
    with pytest.raises(FxgrowError, match="unknown optimizer policy"):
        grow_checkpoint(file, HIDDEN, tmp_path / "large.pt", model_class=GPT, policy="most")
    whole = file.read_bytes()
    for cut in (b"", whole[:100], whole[: len(whole) // 2]):
        file.write_bytes(cut)
        with pytest.raises(CheckpointError, match="is no file of"):
            grow_checkpoint(file, HIDDEN, tmp_path / "large.pt", model_class=GPT)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = saved(tmp_path / "small.pt", *trained()), tmp_path / "large.pt"
    more = ["--class", "examples.gpt.model:GPT", "--set", "n_hidden=24", "--policy", "copy", "--verify", "off"]
    with pytest.raises(SystemExit) as ended:
        cli.main(["grow", str(file), *more, "--out", str(out)])
    said = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0
    assert "the optimizer's state is of AdamW, its parameters in the order of model.parameters()" in said
    assert "config n_hidden: 16 → 24" in said
    assert loaded(out)[1]["args"]["n_hidden"] == 24
    with pytest.raises(SystemExit) as ended:
        cli.main(["grow", str(file), *more, "--optimizer", str(file), "--out", str(tmp_path / "other.pt")])
    assert ended.value.code == 2
    assert "is not read" in " ".join(capsys.readouterr().err.split())
