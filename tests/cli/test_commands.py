"""The command line, run as a newcomer would: what it prints, its exit codes and its error messages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import fxgrow
from fxgrow import cli
from fxgrow.errors import SpecError
from tests.models import small_cnn, small_gpt, tokens

GPT, NET = "tests.cli.test_commands:gpt", "tests.cli.test_commands:Net"
HIDDEN = '{op: widen, axis: "*/hidden", factor: 2}'
CNN, IMAGE = "tests.cli.test_commands:cnn", "float32[2,3,12,12]"


class Net(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, width), nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x).relu())


def gpt(**sizes: Any) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    return small_gpt(torch.float32, **sizes), tokens()


def cnn() -> nn.Module:
    return small_cnn(torch.float32)


def square(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3))


def broken() -> nn.Module:
    raise ValueError("no such luck")


def wrong() -> int:
    return 3


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*argv: str, code: int = 0) -> tuple[str, str]:
        with pytest.raises(SystemExit) as stop:
            cli.main(list(argv))
        captured = capsys.readouterr()
        assert (stop.value.code or 0) == code, captured.out + captured.err
        return captured.out, captured.err

    return call


def weights(path: Path, model: nn.Module) -> Path:
    save_file({n: t for n, t in model.state_dict().items() if n != "lm_head.weight"}, path)
    return path


# inspect ----------------------------------------------------------------------------------------------------------


def test_inspect_shows_axes_by_the_globs_a_spec_uses(run: Any) -> None:
    out, _ = run("inspect", GPT)
    assert "transformer.h.*.mlp/hidden ×2" in out and "./residual" in out
    assert "stack transformer.h: 2 × Block" in out
    assert "tied: " in out and "lm_head.weight" in out
    assert "frozen: its entries are looked up by" in out
    every, _ = run("inspect", GPT, "--all")
    assert "transformer.h.1.mlp/hidden" in every


def test_inspect_json(run: Any) -> None:
    data = json.loads(run("inspect", GPT, "--json")[0])
    model, args = gpt()
    assert data["parameters"] == sum(p.numel() for p in model.parameters())
    assert {a["name"]: a["size"] for a in data["axes"]} == {a.name: a.size for a in fxgrow.capture(model, args).axes}
    (residual,) = [a for a in data["axes"] if a["name"] == "./residual"]
    assert residual["growable"] and "transformer.wpe.weight:1" in residual["members"]
    assert data["stacks"] == [{"stack": "transformer.h", "blocks": 2, "kind": "Block"}]
    assert data["ops_without_a_rule"] == []


def test_why(run: Any) -> None:
    out, _ = run("inspect", GPT, "--why", "./vocab")
    assert "frozen by aten.embedding" in out and "model.py" in out
    assert "growable" in run("inspect", GPT, "--why", "transformer.h.0.attn/heads")[0]
    _, err = run("inspect", GPT, "--why", "residul", code=2)
    assert err.startswith("error no axis matches 'residul'; did you mean") and "./residual" in err


def test_picture(run: Any, tmp_path: Path) -> None:
    run("inspect", CNN, "-i", IMAGE, "--picture", str(tmp_path / "axes.png"))
    from matplotlib.image import imread

    picture = imread(tmp_path / "axes.png")
    assert picture.shape[1] > 300 and picture[..., :3].std() > 0.01
    _, err = run(
        *("inspect", "tests.cli.test_commands:cnn", "-i", IMAGE, "--picture", str(tmp_path / "axes.docx")), code=2
    )
    assert "the picture" in err and "docx" in err


def test_a_model_without_inputs_says_which_to_give(run: Any) -> None:
    _, err = run("inspect", NET, code=2)
    assert "without example inputs for forward(x)" in err and '--input "int64[2,16]<65"' in err
    assert json.loads(run("inspect", NET, "-i", "float32[2,4]", "-c", "width=16", "--json")[0])["parameters"] == 131


def test_a_dry_run_builds_nothing(run: Any) -> None:
    """A model of 40 GB is planned on the meta device."""
    spec = '{op: widen, axis: "0.weight:0", factor: 2}'
    out, _ = run("plan", "tests.cli.test_commands:square", spec, "-i", "float32[2,4]", "-c", "width=100000")
    assert "parameters 10,000,900,003 → 20,001,400,003" in out and "37.3 GiB → 74.5 GiB" in out


# plan and grow ----------------------------------------------------------------------------------------------------


def test_plan_of_adapters(run: Any, tmp_path: Path) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text("[{op: lora, modules: '*', rank: 2, alpha: 4}]")
    text, _ = run("plan", "tests.cli.test_commands:make_task", str(spec))
    lines = [line.split() for line in text.splitlines() if line.startswith("lora")]
    assert [(words[1], "rank 2 adapter" in " ".join(words)) for words in lines] == [("up", True), ("down", True)]


def test_plan(run: Any) -> None:
    spec = f'[{HIDDEN}, {{op: widen, axis: "./residual", to: 40}}, {{op: deepen, stack: transformer.h, factor: 2}}]'
    out, _ = run("plan", GPT, spec)
    assert "GPT: exact" in out and "transformer.h.*.mlp/hidden" in out
    assert "normalized_shape=[40]" in out
    assert "block transformer.h.1" in out and "last projections zero" in " ".join(out.split())
    plan = fxgrow.GrowthPlan.from_json(run("plan", GPT, spec, "--json")[0])
    growth = fxgrow.grow(gpt()[0], spec, gpt()[1])
    assert plan.to_json() == growth.plan.to_json()
    assert f"{plan.parameters_before:,} → {plan.parameters_after:,}" in out
    assert plan.parameters_after == growth.receipt.params_after


def test_grow_and_verify(run: Any, tmp_path: Path) -> None:
    file, big, bigger = weights(tmp_path / "small.safetensors", gpt()[0]), tmp_path / "big", tmp_path / "bigger"
    (tmp_path / "spec.yaml").write_text(f"version: 1\noperations:\n  - {HIDDEN}\n")
    out, _ = run("grow", GPT, str(tmp_path / "spec.yaml"), "--checkpoint", str(file), "--out", str(big))
    assert "relative error, float64" in out and "written to" in out
    loaded = fxgrow.load(big)
    assert loaded.receipt is not None and loaded.receipt.error_float64 is not None
    assert loaded.receipt.error_float64 < 1e-12
    out, _ = run("verify", str(big), "--against", GPT, "--checkpoint", str(file))
    assert out.count("ok  ") == 3 and "differs" not in out
    run("grow", str(big), '{op: widen, axis: "*/heads", factor: 2}', "--out", str(bigger), "--json")
    data = json.loads(run("verify", str(bigger), "--against", str(big), "--json")[0])
    assert data["ok"] and data["error_native"] < 1e-5 and data["error_float64"] < 1e-6 and data["error_replay"] == 0
    with torch.no_grad():
        loaded.module.get_parameter("transformer.ln_f.bias").add_(0.1)
    fxgrow.save(loaded, big)
    out, _ = run("verify", str(big), "--against", GPT, "--checkpoint", str(file), code=1)
    assert "differs" in out
    tensors = dict(loaded.module.state_dict())
    tensors["transformer.ln_f.bias"] = tensors["transformer.ln_f.bias"] + 1
    del tensors["lm_head.weight" if "lm_head.weight" in loaded.program.aliases else "transformer.wte.weight"]
    save_file(tensors, big / "model.safetensors")  # weights exchanged behind our back
    out, _ = run("verify", str(big), code=1)
    assert "against what it computed when it was written" in out


def test_extend_and_verify(run: Any, tmp_path: Path) -> None:
    path, big = weights(tmp_path / "small.safetensors", gpt()[0]), str(tmp_path / "big")
    spec = '{op: extend, axis: "*/vocab", by: 6, preserve: approximate}'
    text, _ = run("plan", GPT, spec)
    assert "appended, mean" in text and "output 1 is computed from old and new entries together" in text
    run("grow", GPT, spec, "--checkpoint", str(path), "--out", big)
    data = json.loads(run("verify", big, "--against", GPT, "--checkpoint", str(path), "--json")[0])
    assert data["ok"] and data["exactness"] == "approximate"
    assert data["error_float64"] < 1e-12, "of the old logits; the loss is left out"
    assert json.loads(run("schema", "spec")[0])["$defs"]["Extend"]["properties"]["op"]["const"] == "extend"


def test_refusals_are_one_message_and_change_nothing(run: Any, tmp_path: Path) -> None:
    cases = [
        (("grow", GPT, '{op: widen, axis: "./vocab", factor: 2}', "--out"), "cannot grow ./vocab"),
        (("grow", GPT, '{op: widen, axis: "./residul", factor: 2}', "--out"), "did you mean ./residual?"),
        (("grow", GPT, '{op: widen, axis: "./residual", factor: 0.5}', "--out"), "would shrink"),
        (("grow", GPT, "{op: wide}", "--out"), "did you mean widen?"),
        (("grow", GPT, "nothing.yaml", "--out"), "spec file nothing.yaml does not exist"),
        (("grow", "tests.cli.test_commands:broken", HIDDEN, "--out"), "fails: ValueError: no such luck"),
        (("grow", "tests.cli.test_commands:wrong", HIDDEN, "--out"), "returned int"),
        (("grow", "tests.cli.test_commands:Net2", HIDDEN, "--out"), "has no 'Net2'; did you mean Net"),
        (("grow", "tests.no_such:x", HIDDEN, "--out"), "cannot import tests.no_such"),
        (("grow", "gpt", HIDDEN, "--out"), "names no model"),
        (("grow", GPT, HIDDEN, "-c", "n_layers=2", "--out"), "unexpected keyword argument 'n_layers'"),
        (("grow", GPT, HIDDEN, "-c", "n_layer", "--out"), "write key=value"),
        (("grow", GPT, HIDDEN, "--checkpoint", "none.safetensors", "--out"), "none.safetensors does not exist"),
    ]
    for argv, message in cases:
        out, err = run(*argv, str(tmp_path / "big"), code=2)
        assert message in err and err.startswith("error ") and "Traceback" not in err and out == "", argv
        assert not (tmp_path / "big").exists()
    wider = weights(tmp_path / "wide.safetensors", small_gpt(torch.float32, n_embd=40))
    _, err = run("grow", GPT, HIDDEN, "--checkpoint", str(wider), "--out", str(tmp_path / "big"), code=2)
    assert "[50, 40] in the file, [50, 32] in the model" in err
    _, err = run("verify", str(tmp_path), code=2)
    assert "is not a checkpoint folder" in err
    with pytest.raises(SpecError):
        cli.main(["--traceback", "inspect", "gpt"])


# train, schema, passes --------------------------------------------------------------------------------------------


def make_task(width: int = 8) -> Any:
    from fxgrow.training import Hyper, Task

    def batches(split: str, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randn(8, 4, generator=generator)
        return x, x[:, :3] * 2

    class WithLoss(Net):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return (super().forward(x) - y).square().mean()

    schedule = [{"trigger": {"step": 6}, "operations": [{"op": "widen", "axis": "./hidden", "factor": 2}]}]
    hyper = Hyper(steps=12, eval_every=4, eval_batches=2, log_every=2, warmup=2)
    return Task(model=WithLoss(width), batches=batches, schedule=schedule, hyper=hyper, name="toy")


def test_train(run: Any, tmp_path: Path) -> None:
    from fxgrow.training import read_log

    task, out = "tests.cli.test_commands:make_task", str(tmp_path / "run")
    text, _ = run("train", task, "--dry-run")
    assert text.splitlines()[0].startswith("when") and "step 6" in text.splitlines()[2] and not Path(out).exists()
    _, err = run("train", task, code=2)
    assert "give --out" in err
    text, _ = run("train", task, "--out", out, "--hyper", "steps=10", "--stop-at", "8")
    assert "stopped after 8 steps" in text
    text, _ = run("train", task, "--out", out, "--hyper", "steps=10", "--resume")
    assert "10 steps, validation loss" in text
    events = [line["event"] for line in read_log(tmp_path / "run" / "log.jsonl")]
    assert events.count("growth") == 1 and events[-1] == "end" and "resume" in events
    _, err = run("train", task, "--out", out, "--hyper", "step=10", code=2)
    assert "did you mean steps" in err
    _, err = run("train", NET, "--out", out, code=2)
    assert "not a fxgrow.training.Task" in err
    assert json.loads(run("inspect", task, "--json")[0])["model"] == "WithLoss"


@pytest.mark.parametrize("kind", ["spec", "schedule", "plan", "manifest"])
def test_schema(run: Any, kind: str) -> None:
    schema = json.loads(run("schema", kind)[0])
    assert schema["properties"]["version"]


def test_rules_are_listed_by_name(run: Any) -> None:
    text = run("rules", "aten.silu")[0]
    assert "aten.silu aten.silu_" in text and "Pointwise" in text and "zero" in text and "2 ops: 2 in 1 row" in text
    (row,) = json.loads(run("rules", "aten.linear.default", "--json")[0])
    assert row["says"] == "... i, o i, o? -> ... o" and row["columns"]["sum"] == "i" and row["row"]
    assert "product" in row["traits"]
    for op in json.loads(run("rules", "--classes", "--json")[0]):
        assert not op["row"] and op["special"]
    assert "no op with a rule matches" in run("rules", "nosuch", code=2)[1]


def test_passes(run: Any) -> None:
    out, _ = run("passes")
    assert all(op in out for op in ("widen", "deepen", "insert"))
    data = json.loads(run("passes", "--json")[0])
    assert {"widen", "deepen", "insert"} <= {o["op"] for o in data["operations"]}
    assert all(o["pass"] for o in data["operations"] if o["from"] == "fxgrow.spec")
    assert "aten.linear.default" in data["rules"]


# the program itself -----------------------------------------------------------------------------------------------


def test_as_a_program_elsewhere(tmp_path: Path) -> None:
    """From another folder, without a terminal: the folder is importable, no colours, no spinner, nothing on stderr."""
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "def model():\n"
        "    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))\n"
        "    return net, (torch.randn(3, 4),)\n"
    )

    def program(*argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "fxgrow", *argv],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            check=False,
        )

    done = program("grow", "mine:model", '{op: widen, axis: "./hidden", by: 3}', "--out", "big")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert "\x1b" not in done.stdout and "written to big" in done.stdout
    versions = program("--version").stdout
    assert f"fxgrow           {fxgrow.__version__}" in versions and f"torch            {version('torch')}" in versions
    environment = program("env").stdout
    assert torch.__version__ in environment and "kernels: torch" in environment and "triton" in environment
    assert json.loads(program("env", "--json").stdout)["torch"] == torch.__version__


@pytest.mark.parametrize("command", ["inspect", "plan", "grow", "verify", "train", "schema", "env"])
def test_help_teaches_by_example(run: Any, command: str) -> None:
    out, _ = run(command, "--help")
    assert f"fxgrow {command} " in out.partition("Options")[0]
