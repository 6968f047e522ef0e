"""The landing table tells landed, refused and wrong apart. Which growths land is for the table itself to say."""

from __future__ import annotations

import copy
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxgrow
from benchmarks import landing
from benchmarks.families import Example, from_file, perturbed
from benchmarks.living import Wide, differences, picture, reloaded, spoken
from benchmarks.rows import Table
from examples.gpt.model import GPT, GPTConfig
from fxgrow.errors import GrowthRefused


def _mlp() -> Example:
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 3))
    x = torch.randn(4, 6, dtype=torch.float64)
    return Example(model, {}, {}, (x,), (x[:3] + 1,))


@pytest.fixture
def trial() -> landing.Trial:
    torch.manual_seed(0)
    example = _mlp()
    perturbed(example.model)
    return landing.Trial(example, fxgrow.capture(example.model, example.args))


def _fake(trial: landing.Trial, apply: Any) -> Any:
    growth = fxgrow.grow(trial.program, {"op": "widen", "axis": "0.weight:0", "factor": 2}, verify=False)
    return types.SimpleNamespace(module=growth.module, plan=growth.plan, apply_=apply)


def _land(trial: landing.Trial, apply: Any) -> dict[str, Any]:
    return trial._land(_fake(trial, apply), copy.deepcopy(trial.example.model))


def _by_hand(trial: landing.Trial, model: nn.Sequential) -> None:
    grown = _fake(trial, None).module.state_dict()
    model[0], model[1], model[3] = nn.Linear(6, 16), nn.LayerNorm(16), nn.Linear(16, 3)
    model.double().load_state_dict(grown)


def test_a_class_that_computes_the_grown_function_has_landed(trial: landing.Trial) -> None:
    row = _land(trial, lambda model: _by_hand(trial, model))
    assert row["landed"] == "exact"
    assert row["error"] < 1e-12 and row["gradients"] < 1e-12


def test_a_class_that_computes_something_else_is_an_error(trial: landing.Trial) -> None:
    def apply(model: nn.Sequential) -> None:
        _by_hand(trial, model)
        model[1].eps = 1e-2  # type: ignore[union-attr]

    assert _land(trial, apply)["landed"].startswith("ERROR: the class differs by ")


def test_a_refusal_that_leaves_a_bit_changed_is_an_error(trial: landing.Trial) -> None:
    def refuse(model: nn.Sequential, *, spoil: bool) -> None:
        if spoil:
            model[0].weight.data[0, 0] += 1e-15  # type: ignore[index, union-attr, operator]
        raise GrowthRefused("a literal\nand more")

    assert _land(trial, lambda m: refuse(m, spoil=False))["landed"] == "a literal"
    spoiled = _land(trial, lambda m: refuse(m, spoil=True))["landed"]
    assert spoiled == "ERROR: refused, and 0.weight changed: a literal"


def test_a_picture_sees_bits_identities_plain_values_modes_and_hooks() -> None:
    model = GPT(GPTConfig(vocab_size=9, block_size=8, n_layer=1, n_head=2, n_embd=8))
    before = picture(model)
    assert differences(before, picture(model)) == []

    def seen(change: Any, undo: Any) -> list[str]:
        change()
        found = differences(before, picture(model))
        undo()
        return found

    attention = model.get_submodule("transformer.h.0.attn")
    assert isinstance(attention.n_head, int)
    assert seen(lambda: setattr(attention, "n_head", 3), lambda: setattr(attention, "n_head", 2))
    assert seen(lambda: setattr(model.config, "n_embd", 9), lambda: setattr(model.config, "n_embd", 8))
    assert seen(lambda: attention.eval(), lambda: attention.train())
    handles: list[Any] = []
    assert seen(
        lambda: handles.append(attention.register_forward_hook(lambda *_: None)), lambda: handles.pop().remove()
    )
    assert differences(before, picture(model)) == []
    attention.c_proj.weight = nn.Parameter(attention.c_proj.weight.detach().clone())  # type: ignore[union-attr, operator]
    assert differences(before, picture(model)) == ["transformer.h.0.attn.c_proj.weight"]


def test_a_model_of_nanogpts_kind_speaks_and_is_built_again() -> None:
    model = GPT(GPTConfig(vocab_size=9, block_size=8, n_layer=1, n_head=2, n_embd=8)).double().eval()
    tokens = torch.randint(9, (2, 5))
    example = Example(model, {}, None, (tokens,))
    said, again = spoken(model, example), spoken(model, example)
    assert said is not None and again is not None
    assert torch.equal(said["sampled"], again["sampled"])
    made = reloaded(model)
    assert made is not None
    torch.testing.assert_close(made(tokens)[0], model(tokens)[0], rtol=0, atol=0)


def test_narrow_casts_are_wide() -> None:
    x = torch.randn(5, dtype=torch.float64)
    with Wide():
        assert torch.equal(x.float().to(torch.float64), x)


def test_a_file_of_ones_own_becomes_a_row_and_a_page(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "import torch\nfrom torch import nn\n\n\ndef net():\n"
        "    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), (torch.randn(4, 6).double(),)\n"
    )
    row = landing.examine("own:net", "file", from_file(f"{tmp_path / 'own.py'}:net"), "hidden*")
    assert [(a["growth"], a["module"]) for a in row["axes"]] == [("hidden ×2", "exact")]
    page = landing.report([row, {"model": "m", "source": "plain", "axes": [], "failed": "capture: no"}], [])
    assert "file/own:net" in page and str(tmp_path) not in page


def test_rows_replace_those_of_the_same_model_only(tmp_path: Path) -> None:
    def examine(name: str, source: str, maker: Any) -> dict[str, Any]:
        raise AssertionError("nothing is run")

    table = Table("landing", examine, lambda rows, _: f"{len(rows)} rows", lambda _: "", {})
    rows = tmp_path / "rows.json"
    rows.write_text('[{"model": "a", "source": "plain", "axes": []}, {"model": "b", "source": "plain", "axes": []}]')
    page = tmp_path / "page.md"
    options = table.parser("").parse_args(["--rows", str(rows), "--report-only", "--out", str(page)])
    assert [r["model"] for r in table.run(options, {})] == ["a", "b"]
    assert page.read_text() == "2 rows"
