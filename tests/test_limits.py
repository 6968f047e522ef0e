"""Sizes and depths have limits: what no machine could hold is refused at once, in one line."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

import fxgrow
from fxgrow import devices, limits
from fxgrow.errors import SpecError
from tests.models import small_cnn, small_gpt, tokens

HUGE = [
    ({"op": "widen", "axis": "*/hidden", "by": 10**13}, r"more than the 268,435,456 that an axis may have"),
    ({"op": "widen", "axis": "*/hidden", "to": 2**62}, r"more than the 268,435,456"),
    ({"op": "widen", "axis": "*/hidden", "factor": 1e300}, r"transformer\.h\.0\.mlp/hidden has \d+ units; .*e\+30"),
    ({"op": "widen", "axis": "*/hidden", "factor": 1.7e308}, r"inf are more than the 268,435,456"),
    ({"op": "widen", "axis": "*/hidden", "fill": "add", "by": 10**12}, r"more than the 268,435,456"),
    ({"op": "extend", "axis": "*/vocab", "by": 10**13}, r"vocab has \d+ units; 1e\+13 are more than"),
    ({"op": "extend", "axis": "*/positions", "factor": 1e200}, r"positions has \d+ units"),
    ({"op": "deepen", "stack": "transformer.h", "by": 10**9}, r"transformer\.h has 2 blocks; 1e\+09 more are over the"),
    ({"op": "deepen", "stack": "transformer.h", "factor": 1e300}, r"over the 4,096 that a stack may have"),
    ({"op": "deepen", "stack": "transformer.h", "factor": 1.7e308}, r"inf more are over the 4,096"),
    ({"op": "deepen", "stack": "transformer.h", "by": 2**62, "init": "stack", "preserve": "lossy"}, "over the 4,096"),
    ([{"op": "deepen", "stack": "transformer.h", "factor": 16}] * 9, r"operations\.3 \(deepen\): .*over the 4,096"),
]


@pytest.fixture(scope="module")
def program() -> fxgrow.Program:
    made = fxgrow.capture(small_gpt(torch.float32), tokens())
    len(made.axes)
    return made


@pytest.mark.parametrize(("spec", "words"), HUGE[:-1], ids=lambda v: str(v)[:60])
def test_what_is_too_large_is_refused_at_once(program: fxgrow.Program, spec: Any, words: str) -> None:
    start = time.process_time()
    with pytest.raises(SpecError, match=words):
        fxgrow.grow(program, spec, verify=False)
    assert time.process_time() - start < 2


def test_blocks_are_counted_over_all_operations(program: fxgrow.Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BLOCKS", 40)
    spec, words = HUGE[-1]
    with pytest.raises(SpecError, match=r"operations\.1 \(deepen\): transformer\.h has 32 blocks; 480 more are over"):
        fxgrow.grow(program, spec, verify=False)
    assert "4,096" in words


def test_memory_is_checked_before_anything_is_made(program: fxgrow.Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "host_bytes", lambda: 1 << 20)
    monkeypatch.setattr(devices, "host_bytes", lambda: 1 << 20)
    with pytest.raises(SpecError, match=r"the grown model needs .* on cpu, where 1\.0 MiB are available"):
        fxgrow.grow(program, {"op": "widen", "axis": "*/hidden", "to": 8192}, verify=False)
    with pytest.raises(SpecError, match=r"planning 100,000 takes 6\.1 MiB, and 1\.0 MiB are available"):
        fxgrow.grow(program, {"op": "widen", "axis": "*/hidden", "to": 100_000}, verify=False)
    with pytest.raises(SpecError, match=r"the grown model needs .* on cpu, where 1\.0 MiB are available"):
        fxgrow.grow(program, {"op": "deepen", "stack": "transformer.h", "by": 60}, verify=False)


def test_plans_on_paper_need_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_cnn().float().to("meta")
    program = fxgrow.capture(model, (torch.randn(4, 3, 8, 8, device="meta"),))
    axes = {a.name: a for a in program.axes}
    name = next(n for n, a in axes.items() if a.growable)
    plan, grown = fxgrow.plan_growth(program, fxgrow.GrowthSpec.parse({"op": "widen", "axis": name, "to": 1 << 20}))
    assert plan.parameters_after > 1 << 24
    assert all(t.is_meta for t in grown.tensors.values())


def test_depth_costs_what_it_adds(program: fxgrow.Program) -> None:
    """Twice the blocks, about twice the time: it was four times."""

    def seconds(count: int) -> float:
        start = time.process_time()
        spec = fxgrow.GrowthSpec.parse({"op": "deepen", "stack": "transformer.h", "by": count})
        plan, _ = fxgrow.plan_growth(program, spec)
        assert sum(n.endswith("c_fc.weight") for n in plan.tensors) == 2 + count
        return time.process_time() - start

    few, many = (min(seconds(n) for _ in range(2)) for n in (40, 160))
    assert many < 8 * few


def test_what_is_available() -> None:
    free = devices.available_bytes(torch.device("cpu"))
    assert free is None or free > 1 << 20
    assert devices.available_bytes(torch.device("meta")) is None
    assert [limits.bytes_in_words(n) for n in (10, 1536, 3 << 20, 5 << 30, 7 << 40)] == [
        "10 bytes",
        "1.5 KiB",
        "3.0 MiB",
        "5.0 GiB",
        "7.0 TiB",
    ]
