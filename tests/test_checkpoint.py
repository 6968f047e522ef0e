"""Checkpoints: what comes back is the same to the bit, can be grown again, and no damage goes unnoticed."""

from __future__ import annotations

import json
import operator
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fxgrow
from fxgrow import checkpoint
from fxgrow.emit.module import regenerate
from fxgrow.errors import CheckpointError
from fxgrow.ir.serialize import decode_size, encode_size, graph_from_json
from fxgrow.ir.values import decode_value, encode_value
from tests.models import ROUNDING, assert_same, small_cnn, small_gpt, tokens
from tests.zoo.zoo import ZOO

HIDDEN = {"op": "widen", "axis": "*/hidden", "factor": 2}
DEEPER = {"op": "deepen", "stack": "transformer.h", "factor": 2}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    growth = fxgrow.grow(small_gpt(torch.float32, dropout=0.1), [HIDDEN, DEEPER], tokens())
    return fxgrow.save(growth, tmp_path_factory.mktemp("saved") / "grown")


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    """A checkpoint of its own, to damage."""
    return Path(shutil.copytree(saved, tmp_path / "grown"))


@pytest.fixture
def grown(tmp_path: Path) -> tuple[fxgrow.Growth, Path]:
    growth = fxgrow.grow(small_gpt(torch.float32, dropout=0.1), [HIDDEN, DEEPER], tokens())
    return growth, fxgrow.save(growth, tmp_path / "run" / "grown")


def equal_states(a: nn.Module, b: nn.Module) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return list(x) == list(y) and all(torch.equal(x[n], y[n]) and x[n].dtype == y[n].dtype for n in x)


def test_round_trip_to_the_bit(grown: tuple[fxgrow.Growth, Path]) -> None:
    growth, path = grown
    assert sorted(p.name for p in path.iterdir()) == ["examples.safetensors", "manifest.json", "model.safetensors"]
    assert [p.name for p in path.parent.iterdir()] == ["grown"], "no temporary folder stays"
    loaded = fxgrow.load(path)
    assert equal_states(growth.module, loaded.module)
    assert loaded.module.code == growth.module.code
    assert loaded.plan is not None and loaded.plan.to_json() == growth.plan.to_json()
    assert loaded.receipt == growth.receipt
    assert loaded.module.training == growth.module.training
    batch = tokens(seed=5, batch=4, length=9)
    for mode in (False, True):
        outputs = []
        for module in (growth.module.train(mode), loaded.module.train(mode)):
            torch.manual_seed(3)  # the same dropout
            outputs.append(module(*batch))
        assert_same(outputs[1], outputs[0])
    with_dropout, without = loaded.module.train()(*batch)[1], loaded.module.eval()(*batch)[1]
    assert with_dropout != without
    assert loaded.replay_error() <= ROUNDING[torch.float32]
    assert growth.module.get_parameter("lm_head.weight").requires_grad


def test_ties_are_stored_once_and_stay(saved: Path) -> None:
    path = saved
    stored = load_file(path / "model.safetensors")
    assert ("lm_head.weight" in stored) != ("transformer.wte.weight" in stored)
    module = fxgrow.load(path).module
    assert module.get_parameter("lm_head.weight") is module.get_parameter("transformer.wte.weight")
    assert {"lm_head.weight", "transformer.wte.weight"} <= set(module.state_dict())


def test_loaded_programs_have_the_same_axes_and_grow_the_same(grown: tuple[fxgrow.Growth, Path]) -> None:
    growth, path = grown
    loaded = fxgrow.load(path)
    before, after = (fxgrow.capture(m, tokens()) for m in (growth.module, loaded.module))
    assert [(a.name, a.size, a.role, a.growable, a.members) for a in before.axes] == [
        (a.name, a.size, a.role, a.growable, a.members) for a in after.axes
    ]
    spec = [{"op": "widen", "axis": "./residual", "to": 40}, {"op": "widen", "axis": "*/heads", "factor": 2}, DEEPER]
    a, b = (fxgrow.grow(m, spec, tokens()) for m in (growth.module, loaded.module))
    assert equal_states(a.module, b.module) and a.module.code == b.module.code
    assert b.receipt.error_native is not None and b.receipt.error_native < 1e-5
    assert fxgrow.load(fxgrow.save(b, path)).replay_error() <= ROUNDING[torch.float32], "may be replaced"


def test_the_weights_of_now_are_saved_and_a_loaded_model_trains_on(grown: tuple[fxgrow.Growth, Path]) -> None:
    growth, path = grown
    optimizer = torch.optim.AdamW(growth.module.parameters())
    growth.module(*tokens())[1].backward()
    optimizer.step()
    assert not equal_states(growth.module, fxgrow.load(path).module)
    loaded = fxgrow.load(fxgrow.save(growth, path))
    assert equal_states(growth.module, loaded.module)
    again = fxgrow.load(fxgrow.save(loaded, path))
    assert equal_states(loaded.module, again.module) and again.plan is not None
    loaded.module.train()(*tokens())[1].backward()
    assert all(p.grad is not None for p in loaded.module.parameters())


class Everything(nn.Module):
    """Buffers of both kinds, a constant, a frozen parameter, an odd name, and two outputs in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({"in-proj": nn.Linear(4, 6)})
        self.layers["in-proj"].bias.requires_grad_(False)
        self.norm = nn.BatchNorm1d(6)
        self.out = nn.Linear(6, 3)
        self.register_buffer("kept", torch.arange(6.0))
        self.register_buffer("unkept", torch.ones(6), persistent=False)
        self.limit = torch.tensor([-1.0, 0.5, 2.0])

    def forward(self, x: torch.Tensor, scale: float = 2.0) -> dict[str, Any]:
        h = self.norm(self.layers["in-proj"](x)).relu() * self.kept + self.unkept
        y = self.out(h) * scale + self.limit
        return {"y": y.masked_fill(y < -1e9, float("-inf")), "rest": (h.mean(), x.shape[0])}


def test_buffers_constants_flags_and_structure(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Everything().eval()
    x = torch.randn(5, 4)
    growth = fxgrow.grow(model, {"op": "widen", "axis": "layers.in-proj.weight:0", "factor": 2}, (x,), {"scale": 3.0})
    loaded = fxgrow.load(fxgrow.save(growth, tmp_path / "c"))
    module = loaded.module
    assert not module.training
    assert "kept" in module.state_dict() and "unkept" not in module.state_dict()
    assert set(module.state_dict()) == set(model.state_dict())
    assert {n: p.requires_grad for n, p in module.named_parameters()} == {
        n: p.requires_grad for n, p in model.named_parameters()
    }
    y = torch.randn(7, 4)
    old, new = model(y, scale=3.0), module(y, scale=3.0)
    assert torch.allclose(old["y"], new["y"], atol=1e-5) and old["rest"][1] == new["rest"][1] == 7
    module.train()(y, scale=3.0)
    assert int(module.get_buffer("norm.num_batches_tracked")) == 1
    assert loaded.kwargs == {"scale": 3.0} and torch.equal(loaded.args[0], x)


class Coder(nn.Module):
    """Called in two ways: with and without targets."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor, target: torch.Tensor | None = None) -> Any:
        y = self.down(self.up(x).relu())
        return y if target is None else (y - target).square().mean()


def test_several_calls(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x, t = Coder(), torch.randn(3, 4), torch.randn(3, 4)
    program = fxgrow.capture(model, calls={"loss": (x, t), "predict": (x,)})
    growth = fxgrow.grow(program, {"op": "widen", "axis": "up.weight:0", "factor": 2})
    loaded = fxgrow.load(fxgrow.save(growth, tmp_path / "c"))
    assert [c.name for c in loaded.program.calls] == ["loss", "predict"]
    assert loaded.replay_error() <= ROUNDING[torch.float32]
    assert_same([loaded.module(x), loaded.module(x, t)], [growth.module(x), growth.module(x, t)])
    again = fxgrow.capture(loaded.module, calls={"loss": (x, t), "predict": (x,)})
    assert [a.name for a in again.axes] == [a.name for a in growth.program.axes]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_and_memory_formats(tmp_path: Path, dtype: torch.dtype) -> None:
    model = small_cnn(dtype).to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    growth = fxgrow.grow(
        model, {"op": "widen", "axis": "4.weight:0", "factor": 2}, (torch.randn(2, 3, 12, 12).to(dtype),)
    )
    loaded = fxgrow.load(fxgrow.save(growth, tmp_path / "c"))
    assert equal_states(growth.module, loaded.module) and loaded.replay_error() <= ROUNDING[dtype]
    for (name, a), b in zip(growth.module.named_parameters(), loaded.module.parameters(), strict=True):
        assert a.stride() == b.stride(), name


@pytest.mark.parametrize(
    "name", ["llama", "vit", "resnet", "unet", "einsum-attention", "biased-kind=table", "repeated"]
)
def test_whole_models(tmp_path: Path, name: str) -> None:
    example = ZOO[name]()
    program = fxgrow.capture(example.model, example.args)
    module = regenerate(program, program.tensors)
    loaded = fxgrow.load(fxgrow.save(module, tmp_path / "c"))
    again = fxgrow.capture(loaded.module, example.args)
    assert [(a.name, a.size, a.growable, a.members) for a in again.axes] == [
        (a.name, a.size, a.growable, a.members) for a in program.axes
    ]
    for a, b in zip(program.graph.nodes, loaded.program.graph.nodes, strict=True):
        assert (a.op, a.name, a.target, str(a.args), str(a.kwargs)) == (
            b.op,
            b.name,
            b.target,
            str(b.args),
            str(b.kwargs),
        )
    dtype = next(module.parameters()).dtype
    assert equal_states(module, loaded.module) and loaded.replay_error() <= ROUNDING[dtype]


def test_gates_and_inserted_layers(tmp_path: Path) -> None:
    gated = fxgrow.grow(small_gpt(torch.float32), {**DEEPER, "init": "gate"}, tokens())
    loaded = fxgrow.load(fxgrow.save(gated, tmp_path / "gated"))
    assert any(n.endswith(".alpha") for n in loaded.module.state_dict()) and equal_states(gated.module, loaded.module)
    spec = [{"op": "insert", "layer": kind, "after": "2"} for kind in ("conv", "batch_norm")]
    inserted = fxgrow.grow(small_cnn(torch.float32), spec, (torch.randn(2, 3, 12, 12),))
    loaded = fxgrow.load(fxgrow.save(inserted, tmp_path / "inserted"))
    assert equal_states(inserted.module, loaded.module) and loaded.replay_error() <= ROUNDING[torch.float32]
    again = fxgrow.grow(loaded.module, spec, loaded.args).receipt.error_float64
    assert again is not None and again <= 1e-12


def test_private_inputs_can_be_left_out(tmp_path: Path) -> None:
    growth = fxgrow.grow(small_gpt(torch.float32), [HIDDEN], tokens())
    path = fxgrow.save(growth, tmp_path / "c", examples=False)
    assert not (path / "examples.safetensors").exists()
    with pytest.raises(CheckpointError, match="without examples"):
        fxgrow.load(path).replay_error()


# damage -----------------------------------------------------------------------------------------------------------


def change(path: Path, f: Any) -> None:
    file = path / "manifest.json"
    data = json.loads(file.read_text())
    f(data)
    file.write_text(json.dumps(data))


def node(data: dict[str, Any], name: str) -> dict[str, Any]:
    return next(n for n in data["graph"] if n["name"] == name)


DAMAGE: dict[str, tuple[Any, str]] = {
    "newer version": (lambda d: d.update(version=99), "version 99.*Update fxgrow"),
    "other file": (lambda d: d.update(format="npz"), "does not say format"),
    "missing key": (lambda d: d.pop("containers"), "damaged: containers"),
    "unknown key": (lambda d: d.update(extra=1), "damaged: extra"),
    "unknown op": (lambda d: node(d, "linear").update(target="aten.linearly.default"), "linear calls aten.linearly"),
    "unknown library": (lambda d: node(d, "linear").update(target="mylib.op.default"), "Import the package"),
    "python function": (lambda d: node(d, "linear").update(target="os.system"), "not the name of an operator"),
    "not an op": (lambda d: node(d, "linear").update(target="aten.__class__.mro"), "not know|not the name"),
    "reads files": (lambda d: node(d, "linear").update(target="aten.from_file.default"), "reads files"),
    "code in a name": (lambda d: node(d, "idx").update(name="x=print(1)"), "not a Python name"),
    "code in an input": (lambda d: node(d, "idx").update(target="x=print(1)"), "not a Python name"),
    "code in an input name": (lambda d: node(d, "idx").update(input="x=print(1)"), "not a Python name"),
    "code in a path": (lambda d: d["containers"].update({'x"]+print(1)#': "A"}), "not a path"),
    "dunder path": (lambda d: node(d, "transformer_h_0_ln_1_weight").update(target="__class__.x"), "not a path"),
    "code in a size": (
        lambda d: node(d, "linear")["value"].update(sizes=["exit()", 2, 3]),
        "'exit\\(\\)' is not a size",
    ),
    "later node": (
        lambda d: node(d, "linear").update(args=[{"node": "output"}]),
        "refers to the node 'output'",
    ),
    "unknown tensor": (lambda d: node(d, "transformer_h_0_ln_1_weight").update(target="nowhere"), "no stored tensor"),
    "no output": (lambda d: d["graph"].pop(), "does not end in one output"),
    "wrong tie": (lambda d: d["ties"].update({"a.b": "c"}), "a.b is tied to c"),
    "wrong shape": (lambda d: d["tensors"]["transformer.wpe.weight"].update(shape=[1, 2]), "the manifest says"),
    "lost tensor": (
        lambda d: d["tensors"].pop("transformer.wpe.weight"),
        "transformer.wpe.weight is not in the manifest",
    ),
    "bad plan": (lambda d: d["plan"].update(steps=[{"op": 1}]), "plan or receipt"),
    "attribute": (
        lambda d: node(d, "linear").update(target="builtins.getattr", args=[{"node": "layer_norm"}, "__class__"]),
        "attribute other than",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_manifests_are_refused(copy: Path, kind: str) -> None:
    f, message = DAMAGE[kind]
    change(copy, f)
    with pytest.raises(CheckpointError, match=message) as caught:
        fxgrow.load(copy)
    assert "manifest.json" in str(caught.value) or "model.safetensors" in str(caught.value), "the message says where"


def test_missing_and_damaged_files(copy: Path, tmp_path: Path) -> None:
    path = copy
    with pytest.raises(CheckpointError, match=r"is not a checkpoint folder.*manifest\.json"):
        fxgrow.load(tmp_path)
    whole = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(whole[:-8])
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        fxgrow.load(path)
    (path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing"):
        fxgrow.load(path)
    (path / "manifest.json").write_text('{"format": ')
    with pytest.raises(CheckpointError, match=r"manifest\.json cannot be read"):
        fxgrow.load(path)


def test_a_failed_save_leaves_what_was_there(
    grown: tuple[fxgrow.Growth, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    growth, path = grown
    before = {p.name: p.read_bytes() for p in path.iterdir()}

    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="no space"):
        fxgrow.save(growth, path)
    with pytest.raises(OSError, match="no space"):
        fxgrow.save(growth, path.parent / "new")
    assert {p.name: p.read_bytes() for p in path.iterdir()} == before
    assert [p.name for p in path.parent.iterdir()] == ["grown"]


def test_what_cannot_be_saved(grown: tuple[fxgrow.Growth, Path], tmp_path: Path) -> None:
    growth, _ = grown
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match="is not a checkpoint; choose another path"):
        fxgrow.save(growth, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").exists()
    with pytest.raises(CheckpointError, match="only modules made by fxgrow"):
        fxgrow.save(nn.Linear(2, 2), tmp_path / "c")  # type: ignore[arg-type]
    growth.module.get_submodule("lm_head").weight = nn.Parameter(growth.module.get_parameter("lm_head.weight").clone())
    with pytest.raises(CheckpointError, match=r"were one tensor.*two now"):
        fxgrow.save(growth, tmp_path / "c")
    edited = fxgrow.grow(small_gpt(torch.float32), [HIDDEN], tokens())
    output = next(iter(reversed(edited.module.graph.nodes)))
    output.args = (output.args[0][0],)  # type: ignore[index]
    edited.module.recompile()
    with pytest.raises(CheckpointError, match="edited after the growth"):
        fxgrow.save(edited, tmp_path / "c")


# values and sizes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        *(None, True, 3, -2.5, float("inf"), float("-inf"), "text", 1 + 2j, slice(0, None, 2)),
        *([1, [2.0, None]], (1, (2, [3])), {"a": (1, 2)}, torch.bfloat16, torch.device("cuda", 1)),
        *(torch.strided, torch.channels_last, []),
    ],
)
def test_values(value: Any) -> None:
    back = decode_value(json.loads(json.dumps(encode_value(value), allow_nan=False)), {})
    assert back == value and type(back) is type(value)


def test_values_that_are_refused() -> None:
    with pytest.raises(CheckpointError, match="is of the class object"):
        encode_value(object())
    for bad in (
        {"dtype": "nn"},
        {"dtype": "float31"},
        {"node": "x"},
        {"device": "toaster"},
        {"a": 1, "b": 2},
        {"eval": "1"},
    ):
        with pytest.raises(CheckpointError):
            decode_value(bad, {})


def test_sizes() -> None:
    import sympy

    s, t = (sympy.Symbol(x, integer=True, positive=True) for x in ("s0", "s1"))
    for expr in (s * t, 2 * s + 1, (s + 3) * t - 1, s**2):
        assert decode_size(encode_size(expr)) == expr
    floor = decode_size("((s0 + 1)//2)")
    assert decode_size(encode_size(floor)) == floor and floor.subs({"s0": 7}) != 7
    assert decode_size("3*4") == 12 and type(decode_size("3*4")) is int
    strange = sympy.sin(s)
    assert encode_size(strange) == encode_size(sympy.sin(s)) == "opaque_sin_s0"
    for bad in (
        "__import__('os')",
        "s0.x",
        "[s0]",
        "s0 if s0 else 1",
        "9**9**9",
        "1/0",
        "lambda: 1",
        "x" * 501,
        "",
        1.5,
    ):
        with pytest.raises(CheckpointError, match=r"is not a size|not a size"):
            decode_size(bad)  # type: ignore[arg-type]


def test_only_the_listed_python_functions_are_found() -> None:
    entries = [
        {"op": "placeholder", "name": "x", "target": "x"},
        {"op": "call_function", "name": "y", "target": "operator.mul", "args": [{"node": "x"}, 2]},
        {"op": "output", "name": "output", "args": [{"node": "y"}]},
    ]
    assert [n.target for n in graph_from_json(entries).nodes] == ["x", operator.mul, "output"]
    for name in ("operator.attrgetter", "builtins.eval", "torch.load", "eval", "aten.add", "", None, 3):
        entries[1]["target"] = name  # type: ignore[assignment]
        with pytest.raises(CheckpointError, match="graph node y calls"):
            graph_from_json(entries)


# plain state dicts ------------------------------------------------------------------------------------------------


def test_load_weights(tmp_path: Path, grown: tuple[fxgrow.Growth, Path]) -> None:
    model, other = small_gpt(torch.float32), small_gpt(torch.float32)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.5)
    state = dict(other.state_dict())
    file = tmp_path / "w.safetensors"
    del state["lm_head.weight"]  # tied: once is enough
    save_file(state, file)
    checkpoint.load_weights(model, file)
    assert equal_states(model, other)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    wrong = {**state, "surplus": torch.ones(2), "transformer.wpe.weight": torch.ones(3, 3)}
    del wrong["transformer.ln_f.bias"]
    save_file(wrong, file)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load_weights(model, file)
    text = str(caught.value)
    assert "surplus is not in the model" in text and "transformer.ln_f.bias [32] is missing in the file" in text
    assert re.search(r"wpe\.weight is \[3, 3\] in the file, \[12, 32\] in the model", text)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items()), "nothing was loaded"
    save_file({n: t.bfloat16() for n, t in state.items()}, file)
    checkpoint.load_weights(model, file)
    save_file({n: t.double() for n, t in state.items()}, file)
    with pytest.raises(CheckpointError, match="float64 in the file, which float32 cannot hold"):
        checkpoint.load_weights(model, file)
    (tmp_path / "w.pt").write_bytes(b"pickle")
    with pytest.raises(CheckpointError, match=r"looks like a pickle.*save_model"):
        checkpoint.load_weights(model, tmp_path / "w.pt")
    bigger = small_gpt(torch.float32, n_layer=4, n_hidden=256, dropout=0.1)
    checkpoint.load_weights(bigger, grown[1])  # the state dict inside a checkpoint folder
    assert_same(bigger.eval()(*tokens())[0], grown[0].module.eval()(*tokens())[0])
