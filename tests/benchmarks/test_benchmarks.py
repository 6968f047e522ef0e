"""The benchmarks run at all, on tiny sizes, and write what they promise. No time is asserted."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fxgrow
from benchmarks import __main__ as entry
from benchmarks import against, common, face, grow, growability, peers
from examples.gpt.model import GPT
from fxgrow.trace import export


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """Measure in this process instead of a fresh one; returns the calls."""
    calls: list[tuple[str, dict[str, Any]]] = []

    def isolated(target: str, arguments: dict[str, Any], **_: Any) -> dict[str, Any]:
        import importlib

        calls.append((target, arguments))
        module, _, function = target.partition(":")
        return dict(json.loads(json.dumps(getattr(importlib.import_module(module), function)(**arguments))))

    monkeypatch.setattr(common, "isolated", isolated)
    return calls


def _run(name: str, folder: Path, *options: str) -> dict[str, Any]:
    path = folder / "figures.json"
    assert entry.main([name, "--quick", "--threads", "1", "--json", str(path), "--out", str(folder), *options]) == 0
    assert (folder / f"{name}.png").stat().st_size > 1000
    result = json.loads(path.read_text())
    assert result["environment"]["torch"] == torch.__version__
    return dict(result)


def test_grow_measures_every_method_and_agrees_with_the_script(
    tmp_path: Path, here: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    result = _run("grow", tmp_path)
    shape = result["shapes"]["tiny"]
    assert shape["agreement"]["different"] == [] and shape["agreement"]["names_equal"]
    assert shape["agreement"]["error"] < 1e-5
    assert set(shape["samples"]) == set(grow.METHODS)
    assert len({s["new"] for s in [v[0] for v in shape["samples"].values()]}) == 1, "all make the same number of bytes"
    assert "yes, to the bit" in capsys.readouterr().out


def test_both_forms_of_the_script_are_the_growth_to_the_bit() -> None:
    torch.manual_seed(0)
    model = GPT(grow.SHAPES["tiny"])
    for p in model.parameters():
        p.data.add_(torch.randn_like(p), alpha=0.1)
    ours = fxgrow.grow(model, grow.SPEC, grow.inputs(model.config), verify=False).module.state_dict()
    for concatenate in (False, True):
        script = grow.by_hand(model, concatenate).state_dict()
        assert script.keys() == ours.keys()
        assert all(torch.equal(script[n], ours[n]) for n in script)


def test_plan_tells_export_and_own_work_apart(tmp_path: Path, here: list[Any]) -> None:
    found = _run("plan", tmp_path, "--depth", "--layers", "1")["runs"]
    assert [r["layers"] for r in found["width"]] == [1]
    for r in found["width"]:
        assert 0 < r["export"] < r["total"] and r["nodes"] > 50
        assert r["parameters_after"] > 2 * r["parameters_before"]
    assert found["depth"][0]["parameters_after"] > found["depth"][0]["parameters_before"]


def test_capture_counts_both_ways(tmp_path: Path, here: list[Any]) -> None:
    found = _run("capture", tmp_path)["cpu"]
    assert [len(found[way]) for way in ("one", "two")] == [1, 1] and min(*found["one"], *found["two"]) > 0
    assert export._REPLAY


def test_throughput_compares_modules_that_compute_the_same(tmp_path: Path, here: list[Any]) -> None:
    result = _run("throughput", tmp_path)
    assert all(r["difference"] < 1e-5 for r in result["runs"])
    wanted = [f"{m}, eager, {w}" for m in ("tiny", "tiny resnet") for w in ("forward", "training") for _ in range(2)]
    assert [f["name"] for f in result["figures"]] == wanted
    assert [f["module"] for f in result["figures"]] == ["regenerated", "applied"] * 4


@pytest.mark.compile
def test_blocks_share_one_compiled_graph(tmp_path: Path, here: list[Any]) -> None:
    result = _run("recompile", tmp_path, "--ways", "regions", "hand blocks", "--layers", "2", "3", "--no-growth")
    for way in ("regions", "hand blocks"):
        for runs in result["samples"][way].values():
            assert runs[0]["graphs"] == runs[0]["graphs_after"] == 1
            assert runs[0]["losses"][0] == pytest.approx(runs[0]["losses"][1], rel=1e-5)


def test_a_fresh_process_reports_its_result_and_its_failure() -> None:
    assert common.isolated("builtins:dict", {"a": 1}) == {"a": 1}
    with pytest.raises(RuntimeError, match=r"no_such_function"):
        common.isolated("builtins:no_such_function", {})


def test_side_by_side_changes_the_order_of_rounds() -> None:
    seen: list[str] = []
    found = common.side_by_side({n: (lambda n=n: seen.append(n)) for n in "ab"}, 2, warmup=0)  # type: ignore[misc]
    assert seen == ["a", "b", "b", "a"]
    assert len(found["a"]["cpu"]) == len(found["b"]["wall"]) == 2


def test_ratio_is_taken_round_by_round() -> None:
    assert common.ratio([2.0, 4.0, 9.0], [1.0, 2.0, 3.0])["median"] == 2.0


def test_an_unknown_benchmark_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.main(["nothing"]) == 2
    assert "grow" in capsys.readouterr().out


def test_against_measures_every_stage_and_lays_packages_out_as_installed(tmp_path: Path) -> None:
    stages = against.measure("convolutions", quick=True)
    assert {"capture", "plan", "materialise", "grow", "verify"} <= set(stages)
    common.installed(common.ROOT, tmp_path)
    assert (tmp_path / "fxgrow" / "passes" / "widen.py").exists() and (tmp_path / "fxgrow" / "kernels").is_dir()
    with pytest.raises(SystemExit, match="cannot read revision"):
        common.checkout("no-such-revision", tmp_path)


def test_house_plans_on_meta_what_against_measures_by_default_does_not() -> None:
    assert not set(against.HOUSE) & set(against.USUAL)
    stages = against.measure("llama-70b", quick=True)
    assert {"capture", "plan"} <= set(stages) and "materialise" not in stages


def test_growability_names_what_was_lost_and_gained() -> None:
    def row(**axes: str) -> list[dict[str, Any]]:
        return [{"model": "m", "source": "plain", "axes": [{"name": n, "double": v} for n, v in axes.items()]}]

    lost, gained = growability.changes(row(a="exact", b="refused", c="exact"), row(a="refused", b="exact", c="exact"))
    assert lost == ["m a double: refused"] and gained == ["m b double"]
    assert growability.changes(row(a="exact"), []) == ([], []), "a model that was not run is not lost"


def test_face_measures_what_a_start_costs(tmp_path: Path) -> None:
    starts = {name: code for name, code in face.STARTS.items() if name in ("Python", "import torch", "--version")}
    found = face.measure(starts, {"here": common.installed(common.ROOT, tmp_path)}, repeats=1)["here"]
    assert set(found) == set(starts) and all(0 < s["cpu"][0] < 100 for s in found.values())
    assert found["--version"]["torch"] == [0.0] and found["import torch"]["torch"] == [1.0]


def test_peers_that_are_missing_or_fail_say_so(
    here: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "figures.json"
    assert entry.main(["peers", "--quick", "--threads", "1", "--json", str(path), "--tasks", "grow_mlp"]) == 0
    rows = json.loads(path.read_text())["tasks"]["grow_mlp"]
    assert set(rows) == {"fxgrow, traced, proved, measured, in place", "gromo, GrowingMLP", "by hand"}
    for name, row in rows.items():
        missing = not name.startswith(("fxgrow", "by hand")) and "not installed" in row["package"]
        assert ("why" in row) == missing and ("cpu" in row) != missing
        assert missing or row["difference"] < 1e-5
    assert "not installed" in capsys.readouterr().out or "gromo" in sys.modules


def test_readme_shows_the_figures_of_the_peers() -> None:
    shown = peers.MARKED.search(peers.README.read_text(encoding="utf-8"))
    assert shown is not None
    assert shown[0] == peers.table(json.loads(peers.FIGURES.read_text()))
