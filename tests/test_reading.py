"""Bad files: whatever is wrong with one, the error is fxgrow's and says where."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

import fxgrow
from fxgrow.errors import CheckpointError, SpecError
from fxgrow.plan import GrowthPlan
from fxgrow.reading import parse_json, read_yaml
from fxgrow.schedule import Schedule
from fxgrow.scheduler import GrowthScheduler
from fxgrow.spec import GrowthSpec, Widen

LAUGHS = "a0: &a0 [lol]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)  # 9 to the power of 11 values
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 12))
CHAIN = "a0: &a0 [1]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 200))

TEXTS = {
    "deep list": ("[" * 5000, "nested too deeply|nested more than 64"),
    "deep mapping": ("{a: " * 300 + "1" + "}" * 300, "nested"),
    "65 levels": ("[" * 65 + "]" * 65, "nested more than 64 levels deep"),
    "billion laughs": (LAUGHS, "more than 100,000 values, aliases written out"),
    "merged laughs": (MERGES, "more than 100,000 values, aliases written out"),
    "deep by aliases": (CHAIN, "line 64: nested more than 64 levels deep|nested more than 64"),
    "itself": ("operations: &o [*o]\n", "an alias refers to what it is part of"),
    "key twice": ("version: 1\nversion: 1\n", "line 2: the key 'version' appears twice"),
    "inner key twice": ("operations: [{op: widen, op: deepen}]\n", "line 1: the key 'op' appears twice"),
    "tag": ("!!python/object/apply:os.system [echo]\n", "not YAML or JSON"),
    "date": ("a: 2026-99-99\n", "not YAML or JSON"),
    "huge number": ("a: " + "9" * 10_000 + "\n", "not YAML or JSON"),
    "control": ("a: \x01\n", "not YAML or JSON"),
    "unhashable key": ("{[a]: 1}\n", "not YAML or JSON|hashable"),
    "long": ("a: " + "b" * (1 << 20) + "\n", "longer than 1.0 MiB"),
    "empty": ("\n", "expected a mapping|got NoneType"),
    "number": ("3.5\n", "expected a mapping"),
    "number key": ("{1: 2}\n", "the key is not a string"),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_texts(kind: str) -> None:
    text, words = TEXTS[kind]
    with pytest.raises(SpecError, match=words):
        GrowthSpec.parse(text)
    if kind != "empty":  # an empty schedule grows nothing
        with pytest.raises(SpecError, match=words):
            Schedule.parse(text)


def test_aliases_are_fine_where_they_do_not_multiply() -> None:
    text = "- &w {op: widen, axis: a, to: 3}\n- {<<: *w, axis: b}\n- *w\n"
    assert [op.axis for op in GrowthSpec.parse(text).operations] == ["a", "b", "a"]
    assert read_yaml("[" * 60 + "1" + "]" * 60, "spec")[1] == "spec"


FILES: dict[str, tuple[Any, str]] = {
    "missing": (lambda p: None, "does not exist"),
    "folder": (lambda p: p.mkdir(), "is a folder, not a file"),
    "empty": (lambda p: p.touch(), "expected a mapping"),
    "latin": (lambda p: p.write_bytes("a: ä\n".encode("latin-1")), "is not UTF-8 text: .* at byte 3"),
    "utf-16": (lambda p: p.write_bytes("a: b\n".encode("utf-16")), "is not UTF-8 text"),
    "zeros": (lambda p: p.write_bytes(bytes(100)), "not YAML or JSON"),
    "large": (lambda p: p.write_bytes(b"#" * ((1 << 20) + 1)), "is larger than 1.0 MiB"),
    "pipe": (lambda p: os.mkfifo(p), "is not an ordinary file"),
    "dangling": (lambda p: p.symlink_to("nowhere"), "does not exist"),
    "loop": (lambda p: p.symlink_to(p.name), "does not exist|cannot be read"),
}


@pytest.mark.parametrize("kind", FILES)
def test_files(kind: str, tmp_path: Path) -> None:
    make, words = FILES[kind]
    path = tmp_path / "spec.yaml"
    make(path)
    with pytest.raises(SpecError, match=words) as caught:
        GrowthSpec.parse(path)
    assert "spec.yaml" in str(caught.value)
    with pytest.raises(SpecError, match=words):
        GrowthSpec.parse(str(path))


@pytest.mark.parametrize("name", ["a\0b.yaml", "x" * 5000 + ".yaml", "a/" * 3000 + "b.json"])
def test_names_that_no_file_can_have(name: str) -> None:
    with pytest.raises(SpecError, match=r"cannot be read|does not exist"):
        GrowthSpec.parse(name)


def test_a_byte_order_mark_is_no_mistake(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text("{op: widen, axis: a, to: 3}", encoding="utf-8-sig")
    assert GrowthSpec.parse(path).operations[0].axis == "a"


@pytest.mark.parametrize(
    ("operation", "words"),
    [
        ({"op": "widen", "axis": "a", "factor": float("inf")}, "operations.0.factor: .*finite"),
        ({"op": "widen", "axis": "a", "factor": float("nan")}, "operations.0.factor: .*finite"),
        ({"op": "widen", "axis": "a", "to": 10**40}, "operations.0.to: "),
        ({"op": "widen", "axis": "a", "by": 10**5000}, "operations.0.by: "),
        ({"op": "widen", "axis": "a" * 2000, "by": 1}, "operations.0.axis: .*1000 characters"),
        ({"op": "widen", "axis": ["a"], "by": 1}, "operations.0.axis: "),
        ({"op": "widen", "axis": "a", "by": 1, "noise": {"scale": float("nan")}}, "noise.scale: "),
        ({"op": "deepen", "stack": "h", "after": list(range(5000))}, "operations.0.after: .*4096"),
        ({"op": "deepen", "stack": "h", "after": [[1]]}, "operations.0.after.0: "),
        ({"op": ["widen"], "axis": "a"}, "operations.0: "),
        ({"op": "insert", "layer": "conv", "after": "a", "kernel_size": 10**9 + 1}, "kernel_size: "),
        ("widen", "operations.0: "),
        (None, "operations.0: "),
        ({}, "operations.0: an operation needs `op`"),
    ],
)
def test_a_spec_validates_however_it_is_made(operation: Any, words: str) -> None:
    with pytest.raises(SpecError, match=words):
        GrowthSpec(operations=[operation])
    with pytest.raises(SpecError, match=words):
        GrowthSpec.parse([operation])
    with pytest.raises(ValueError, match=words):
        GrowthSpec.model_validate({"operations": [operation]})


def test_a_spec_made_by_hand_holds_operations() -> None:
    made = GrowthSpec(operations=[{"op": "widen", "axis": "a", "factor": 2}])
    assert isinstance(made.operations[0], Widen)
    assert made.to_dict() == GrowthSpec.parse(made.to_yaml()).to_dict()
    widen = {"op": "widen", "axis": "a", "to": 2}
    with pytest.raises(SpecError, match=r"^spec: operations\.1\.axs: .*\nspec: operations\.2: "):
        GrowthSpec(operations=[widen, {**widen, "axs": 1}, {"op": "x"}])
    with pytest.raises(SpecError, match="at most 1000"):
        GrowthSpec(operations=[{"op": "widen", "axis": "a", "factor": 2}] * 1001)


# scheduler state ------------------------------------------------------------------------------------------------------

GROWTH = {"trigger": {"step": 1}, "operations": [{"op": "widen", "axis": "a", "factor": 2}]}
STATE: dict[str, Any] = {
    "version": 2,
    "done": [{"event": Schedule.parse([GROWTH]).events[0].to_dict(), "steps": [3], "errors": {}, "rates": {}}],
    "best": 0.5,
    "bad": 1,
    "reported": 2,
    "latest": {"val_loss": 0.5},
    "seconds": 0.0,
    "step": 3,
}
WRONG: list[Any] = [None, True, -1, 1.5, "x", [], {}, [[]], [None], 10**30, float("nan"), {"a": 1}]
FINE = {("best", "None"), ("best", "True"), ("best", "-1"), ("best", "1.5"), ("reported", "None"), ("reported", "-1")}
FINE |= {
    ("done", "[]"),
    ("bad", "True"),
    ("reported", "True"),
    ("best", f"{10**30}"),
    ("latest", "{}"),
    ("seconds", "True"),
}
FINE |= {("latest", "{'a': 1}"), ("seconds", "1.5"), ("seconds", f"{10**30}"), ("step", "True")}


@pytest.mark.parametrize("key", [*STATE, "done.0", "done.0.steps", "done.0.event", "done.0.event.operations"])
@pytest.mark.parametrize("value", WRONG, ids=lambda v: str(v)[:12])
def test_a_damaged_state_changes_nothing(key: str, value: Any) -> None:
    scheduler = GrowthScheduler([GROWTH])
    scheduler.load_state_dict(STATE)
    before = scheduler.state_dict()
    assert before == STATE
    state = json.loads(json.dumps(STATE))
    at, *path = [int(k) if k.isdigit() else k for k in key.split(".")][::-1]
    place: Any = state
    for part in reversed(path):
        place = place[part]
    place[at] = value
    if (key, str(value)) in FINE:
        scheduler.load_state_dict(state)
        return
    with pytest.raises(SpecError):
        scheduler.load_state_dict(state)
    assert scheduler.state_dict() == before


@pytest.mark.parametrize("state", [None, [], "x", 3, {}, {"version": 1}, {**STATE, "more": 1}])
def test_what_is_no_state(state: Any) -> None:
    with pytest.raises(SpecError, match="scheduler state"):
        GrowthScheduler([GROWTH]).load_state_dict(state)


def test_a_state_of_the_first_version_is_read() -> None:
    growth = {**GROWTH, "learning_rate": {"policy": "scale", "factor": 0.5}, "accumulation": 2}
    old = {"version": 1, "fired": [{"growth": growth, "step": 3}], "best": None, "bad": 0, "reported": 2}
    scheduler = GrowthScheduler({"version": 1, "growths": [growth, {**GROWTH, "trigger": {"step": 9}}]})
    scheduler.load_state_dict(old)
    assert [(d.event, d.action.op, d.step) for d in scheduler.done] == [
        *((0, "grow", 3), (0, "learning_rate", 3), (0, "accumulation", 3)),
    ]
    assert (scheduler.accumulation, scheduler.lr_factor(5)) == (2, 0.5)
    assert scheduler.next is not None and scheduler.next.trigger.step == 9
    assert GrowthScheduler(scheduler.schedule).load_state_dict(scheduler.state_dict()) is None


# plans and JSON -------------------------------------------------------------------------------------------------------

PLAN: dict[str, Any] = {
    "version": 1,
    "model": "M",
    "tensors": {
        "w": {"source": "w", "shape": [4, 2], "dims": [{"index": [[0, 2], [0, 2]], "split": [[0.5, 4]]}, None]}
    },
}


def test_plans_come_back() -> None:
    plan = GrowthPlan.from_json(json.dumps(PLAN))
    assert plan.tensors["w"].dims[0] is not None and plan.tensors["w"].dims[0].index.tolist() == [0, 1, 0, 1]
    assert GrowthPlan.from_json(plan.to_json()).to_json() == plan.to_json()
    plan.tensors["w"].constant = float("-inf")
    assert GrowthPlan.from_json(plan.to_json()).tensors["w"].constant == float("-inf")


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("version", 2, "version"),
        ("model", 3, "model"),
        ("steps", [{}], r"steps\.0\.op"),
        ("tensors", [], "tensors"),
        ("tensors.w", None, r"tensors\.w"),
        ("tensors.w.shape", [4, -2], "negative size"),
        ("tensors.w.shape", [4, 3, 2], "2 dims for the shape"),
        ("tensors.w.shape", [5, 2], r"dims\.0: 4 entries for the size 5"),
        ("tensors.w.shape", [2**40, 2**40], "281,474,976,710,656 elements"),
        ("tensors.w.source", None, "one of source and init"),
        ("tensors.w.dims.0.index", [[0, 10**13]], "268,435,456 units"),
        ("tensors.w.dims.0.index", [[0, 2**27]] * 3, "268,435,456 units"),
        ("tensors.w.dims.0.index", [[0, -4]], "not a pair"),
        ("tensors.w.dims.0.index", [[0.5, 4]], "not a pair"),
        ("tensors.w.dims.0.index", [[2**70, 4]], "268,435,456 units"),
        ("tensors.w.dims.0.index", [4], "pairs"),
        ("tensors.w.dims.0.index", "0", "pairs"),
        ("tensors.w.dims.0.split", [["a", 4]], "not a pair"),
        ("tensors.w.dims.0.split", [[1.0, 3]], "3 entries for the size 4"),
        ("tensors.w.dims.0.split", {"a": 1}, "pairs"),
        ("tensors.w.dims", {"a": 1}, "dims"),
    ],
)
def test_damaged_plans(path: str, value: Any, words: str) -> None:
    data = json.loads(json.dumps(PLAN))
    place, *rest = data, *path.split(".")
    for part in rest[:-1]:
        place = place[int(part) if part.isdigit() else part]
    place[rest[-1]] = value
    with pytest.raises(CheckpointError, match=f"^plan: .*{words}"):
        GrowthPlan.from_json(json.dumps(data))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[]", "plan: .*dictionary"),
        ("null", "plan: "),
        ('{"version": 1, "version": 1}', "'version' appears twice"),
        ('{"version": NaN}', "NaN is not a finite number"),
        ('{"version": 1e999}', "1e999 is not a finite number"),
        ('{"version": ' + "9" * 5000 + "}", "not JSON"),
        ("[" * 100_000, "nested too deeply"),
        ("[" * 500 + "]" * 500, "nested more than 64"),
    ],
)
def test_what_is_no_plan(text: str, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        GrowthPlan.from_json(text)


def test_json_as_python_writes_it_can_be_read() -> None:
    assert parse_json('{"a": Infinity}', "x", finite=False) == {"a": float("inf")}
    with pytest.raises(CheckpointError, match=re.escape("x is not JSON")):
        parse_json('{"a": Infinity}', "x")
    assert parse_json(r'"\ud83d\ude00"', "x") == "😀"
    for half in (r'["\ud800"]', r'{"\ud800": 1}'):
        with pytest.raises(CheckpointError, match="x is not JSON: surrogates not allowed"):
            parse_json(half, "x")
    assert issubclass(CheckpointError, fxgrow.FxgrowError)
