"""The study of the payoff: what is run next, how a run goes, what the page says of it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.payoff import page
from benchmarks.payoff.contestants import (
    BY_NAME,
    CONTESTANTS,
    DEFAULT,
    SCALES,
    USUAL,
    Work,
    best_rate,
    pending,
    sizes_of,
)
from benchmarks.payoff.work import flops, perform

SCALE = replace(SCALES["quick"], seeds=3)
BUDGET = 8e7


def row(loss: float) -> dict[str, Any]:
    curve = [[10, 1e8, loss + 0.5], [20, 2e8, loss + 0.2], [30, 3e8, loss]]
    return {"loss": loss, "stages": [30], "jump": None, "rise": None, "curve": curve, "text": "0"}


def fill(name: str, losses: dict[float, float], rows: dict[str, Any], factor: float = 1.0) -> None:
    """Rows of everything that comes up, until nothing does; losses by the rate, a little more with each seed."""
    while works := [w for w in pending(rows, SCALE, [name], [factor]) if w.key not in rows]:
        for work in works:
            found = row(losses[work.rate] + 0.01 * work.seed)
            hops = len(BY_NAME[name].hops)
            rows[work.key] = found | ({"stages": [20, 10], "jump": 1e-8, "rise": 0.02} if hops else {})


def test_the_rate_is_looked_for_until_the_best_is_not_at_the_edge() -> None:
    rows: dict[str, Any] = {}
    assert [w.rate for w in pending(rows, SCALE, ["scratch"], [1.0])] == [0.004, 0.008, 0.016]
    assert [w.rate for w in pending(rows, SCALE, ["small only"], [1.0])] == [0.016, 0.032, 0.064]
    assert best_rate("scratch", rows, SCALE) is None
    fill("scratch", {0.004: 3.0, 0.008: 2.0, 0.016: 1.0, 0.032: 0.5, 0.064: 0.7}, rows)
    assert best_rate("scratch", rows, SCALE) == 0.032
    assert sorted(rows) == sorted(
        [Work("scratch", rate, 0, SCALE.budget).key for rate in (0.004, 0.008, 0.016, 0.032, 0.064)]
        + [Work("scratch", 0.032, seed, SCALE.budget).key for seed in (1, 2)]
    )


def test_the_page_says_where_growing_wins(tmp_path: Path) -> None:
    rows: dict[str, Any] = {}
    for factor, (scratch, small, grown) in {0.5: (3.0, 2.0, 2.5), 1.0: (2.0, 1.9, 1.5), 2.0: (1.0, 1.8, 1.0)}.items():
        for name, loss in (("scratch", scratch), ("small only", small), (DEFAULT, grown)):
            middle = SCALE.rates[BY_NAME[name].start]
            fill(name, {middle / 2: loss + 1, middle: loss, middle * 2: loss + 1}, rows, factor)
    kept = {"environment": {}, "rows": rows, "seconds": {"large": 2.0, "narrow": 1.0, "flat": 1.0}}
    study = page.Study(kept, SCALE)
    grown = study.tuned(DEFAULT)
    assert grown is not None
    assert grown.mean == pytest.approx(1.51)
    assert grown.spread == pytest.approx(0.01)
    assert grown.seconds(study.steps) == 20 * 1.0 + 10 * 2.0
    # from scratch the loss falls by 1 with every doubling: it is at 1.51 after the square root of 2 budgets
    saved = study.saved(grown, "scratch")
    assert saved is not None
    assert saved[1] == pytest.approx(1 - 1 / math.sqrt(2))
    page.write(kept, SCALE, tmp_path)
    said = (tmp_path / "payoff-quick.md").read_text()
    assert "At 0.5 × the budget growing in width **loses**" in said
    assert "At 1 × the budget growing in width **wins against both**" in said
    assert "At 2 × the budget growing in width **is level**" in said
    assert "does better" not in said
    assert "| grown in width | 0.032 | 3 | 1.5100 ± 0.0100 | 29 ± 0 % |" in said
    assert (tmp_path / "images" / "payoff-quick.png").stat().st_size > 1000
    fill("half as deep only", {0.004: 1.8, 0.008: 1.4, 0.016: 1.8}, rows)
    fill("grown in depth", {0.004: 1.8, 0.008: 1.6, 0.016: 1.8}, rows)
    page.write(kept, SCALE, tmp_path)
    said = (tmp_path / "payoff-quick.md").read_text()
    assert "At 1 × the budget growing in depth **loses**: 1.6100, against 2.0100" in said
    assert "**Half as deep only does better than every growth**, 1.4100" in said


def test_sizes_follow_the_hops() -> None:
    for contestant in CONTESTANTS:
        sizes = sizes_of(contestant)
        assert sizes[-1] == ("large" if contestant.hops else contestant.start)
        assert all(name in scale.sizes for scale in SCALES.values() for name in sizes)
    assert sizes_of(BY_NAME["two hops"]) == ["narrow", "middle", "large"]


def test_a_run_spends_its_budget_and_goes_on_from_what_it_shares(tmp_path: Path) -> None:
    results = {name: perform("quick", name, 0.01, 0, BUDGET, str(tmp_path)) for name in (DEFAULT, "naive")}
    small, large = (flops("quick", tuple(SCALE.sizes[n].items())) for n in ("narrow", "large"))
    for name, result in results.items():
        assert result["stages"] == [round(BUDGET * USUAL / small), round(BUDGET * (1 - USUAL) / large)]
        assert result["flops"] == result["stages"][0] * small + result["stages"][1] * large
        assert result["flops"] == pytest.approx(BUDGET, rel=0.2)
        steps = [step for step, *_ in result["curve"]]
        assert steps == sorted(steps)
        assert steps[-1] == sum(result["stages"])
        assert (result["jump"] > 0.01) == (name == "naive")
        assert result["jump"] <= 1e-5 or name == "naive"
        assert result["rise"] >= -1e-5 or name == "naive"
    shared = [p.name for p in (tmp_path / "shared").rglob("*.complete")]
    assert shared == [f"{results[DEFAULT]['stages'][0]:08d}.complete"], "one for both"
    until = [c for c in results[DEFAULT]["curve"] if c[0] < results[DEFAULT]["stages"][0]]
    assert until
    assert until == results["naive"]["curve"][: len(until)]
    # cut off after its last step and before its row was written, it is what it was
    again = perform("quick", DEFAULT, 0.01, 0, BUDGET, str(tmp_path))
    assert again["loss"] == pytest.approx(results[DEFAULT]["loss"], rel=1e-6)
    assert again["flops"] == results[DEFAULT]["flops"]
