"""A fixed seed of the fuzzer, and what keeps it honest: its judge finds wrong growths, its shrinker keeps them."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxgrow
from fxgrow.errors import GrowthRefused
from tests.fuzz import trial
from tests.fuzz.__main__ import main
from tests.fuzz.calls import OPS
from tests.fuzz.features import FEATURES
from tests.fuzz.generate import OPS_EACH, _turn, generate
from tests.fuzz.judge import Judge, Probe
from tests.fuzz.script import script
from tests.fuzz.shrink import shrink
from tests.fuzz.text import Input, Member, Model, Step
from tests.fuzz.trial import Case, Finding, captured, check

FIXED = ("--models", "14", "--seed", "20", "--growths", "16")

# runs ---------------------------------------------------------------------------------------------------------------


def test_a_fixed_seed_finds_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    status = main([*FIXED, "--jobs", "1", "--shrink", "10", "--no-database", "--json", str(file)])
    said, figures = capsys.readouterr().out, json.loads(file.read_text())
    assert status == 0, said
    assert figures["wrong"] == figures["raw"] == 0
    assert figures["exact"] >= 60
    assert figures["ops_touched"] >= 40
    assert "ops never reached" in said


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "examples:" in capsys.readouterr().out


def test_a_model_depends_on_seed_and_number_alone() -> None:
    first = generate(3, 7, database=False).definition()
    generate(3, 8, database=False)
    assert generate(3, 7, database=False).definition() == first
    assert generate(4, 7, database=False).definition() != first


def test_every_op_has_its_turn_in_each_round() -> None:
    models = -(-len(OPS) // OPS_EACH)
    assert {op for n in range(models) for op in _turn(1, n)} == set(OPS)


# the judge ------------------------------------------------------------------------------------------------------------


def mlp(
    *steps: str, buffers: tuple[str, ...] = (), outputs: tuple[str, ...] = ("v3",), dtype: torch.dtype = torch.float64
) -> Model:
    """v1 = tanh(x a), steps, v3 = v2 b."""
    lines = ["v1 = torch.tanh(F.linear(x, self.w1))", *steps, "v3 = F.linear(v2, self.w2)"]
    kinds: Callable[[str], tuple[Any, ...]] = lambda line: (("B", 8), "torch.float64")  # noqa: E731
    return Model(
        inputs=[Input("x", ("B", 5))],
        members=[
            Member("w1", "self.w1 = nn.Parameter(rnd(8, 5))"),
            Member("w2", "self.w2 = nn.Parameter(rnd(3, 8))"),
            *(Member(b.split('"')[1], b) for b in buffers),
        ],
        steps=[
            Step(line, (line.split(" = ")[0],), (kinds(line),)) if line.startswith("v") else Step(line, keep=True)
            for line in lines
        ],
        outputs=list(outputs),
        dtype=dtype,
    )


class Wrapped(nn.Module):
    """A model whose outputs are passed through a function; what a wrong growth would be."""

    def __init__(self, inner: nn.Module, change: Callable[[Any, Tensor, int, bool], Any]) -> None:
        super().__init__()
        self.inner, self.change = inner, change
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        return self.change(self.inner(x), x, int(self.calls), self.training)


def column(y: Tensor, *_: Any) -> Tensor:
    y = y.clone()
    y[:, 1] *= 1 + 1e-6
    return y


def nothing(y: Tensor, *_: Any) -> Tensor:
    return y


WRONG: dict[str, tuple[Callable[..., Any], str]] = {
    "NaN": (lambda y, *_: torch.where(y > y.median(), torch.nan, y), "NaN"),
    "all NaN": (lambda y, *_: y * torch.nan, "NaN"),
    "another dtype": (lambda y, *_: y.float(), "float32"),
    "one small column": (column, "off by"),
    "another shape": (lambda y, *_: y[:, :2], "shape"),
    "another batch size": (lambda y, x, *_: y + (x.shape[0] == 4), "off by"),
    "large values": (lambda y, x, *_: torch.where(x.abs().amax(-1, keepdim=True) > 8, 0 * y, y), "off by"),
    "negative values": (lambda y, x, *_: y + 1e-3 * (x.amin() < -8), "off by"),
    "the third call": (lambda y, x, calls, _: y + 1e-4 * (calls >= 3), "off by"),
    "train mode": (lambda y, x, calls, training: y * (1 + 1e-5 * training), "off by"),
    "a gradient": (lambda y, x, *_: y + (x.sum() - x.sum().detach()), "gradient"),
    "one more output": (lambda y, *_: (y, y), "outputs"),
    "an error": (lambda y, x, *_: y if x.shape[0] == 3 else torch.zeros(2) + torch.zeros(3), "raises RuntimeError"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_the_judge_finds(kind: str) -> None:
    model = mlp("v2 = v1 * 1.5")
    small = model.build(1)
    change, words = WRONG[kind]
    judge = Judge(model, small)
    assert not judge.judge(Wrapped(copy.deepcopy(small), nothing)).wrong
    assert words in judge.judge(Wrapped(copy.deepcopy(small), change)).wrong


def test_a_column_far_smaller_than_others_counts() -> None:
    model = mlp("v2 = v1", outputs=("v3 * torch.tensor([1.0, 1e-6, 1.0])",))
    small = model.build(1)
    assert "off by" in Judge(model, small).judge(Wrapped(copy.deepcopy(small), column)).wrong


def test_a_state_that_drifts_is_found() -> None:
    model = mlp(
        "v2 = v1 + self.b1",
        "self.b1.mul_(0.9).add_(0.1 * v1.detach().mean(0))",
        buffers=('self.register_buffer("b1", rnd(8))',),
    )
    small = model.build(1)
    other = model.copy(steps=[Step(s.code.replace("0.9", "0.9001"), s.outs, s.types, s.keep) for s in model.steps])
    judge = Judge(model, small)
    assert not judge.judge(model.build(1)).wrong
    verdict = judge.judge(other.build(1))
    assert "off by" in verdict.wrong
    assert verdict.probe is not None and verdict.probe != judge.sequence[0]


def test_rounding_is_no_error() -> None:
    """A matrix product in another order, in front of a sum that cancels and of a value at a jump."""
    model = mlp("v2 = v1 + (F.layer_norm(v1, (8,)).sum(-1, keepdim=True)).sign()")
    small = model.build(1)
    flipped = model.build(1)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        flipped.w1.copy_(flipped.w1[order])  # type: ignore[index, operator]
        flipped.w2.copy_(flipped.w2[:, order])  # type: ignore[index, operator]
    assert not Judge(model, small).judge(flipped).wrong


def test_a_refused_input_is_no_error_and_no_proof() -> None:
    model = mlp("v2 = v1")
    small = model.build(1)

    def refuse(y: Tensor, x: Tensor, *_: Any) -> Tensor:
        if x.shape[0] != 3:
            raise GrowthRefused("x has size 4 in dim 0")
        return y

    verdict = Judge(model, small).judge(Wrapped(copy.deepcopy(small), refuse))
    assert not verdict.wrong
    assert verdict.refused == 3
    assert verdict.agreed == 3


def test_integers_must_be_equal() -> None:
    model = mlp("v2 = v1", outputs=("(v3 > 0).sum(-1)",))
    small = model.build(1)
    judge = Judge(model, small)
    assert "float64" in judge.judge(Wrapped(copy.deepcopy(small), lambda y, *_: y.double())).wrong
    assert "integers" in judge.judge(Wrapped(copy.deepcopy(small), lambda y, *_: y + (y == 2))).wrong


# findings -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that is not so: exp maps zero to zero."""
    from fxgrow.rules import RULES, Pointwise

    monkeypatch.setitem(RULES, "aten.exp.default", Pointwise(zero=True))


def wordy() -> Case:
    """A finding among much that has nothing to do with it."""
    model = mlp("v2 = torch.exp(v1) + v1 * 0", outputs=("v3", "v9.sum(-1)"))
    model.steps[1:1] = [
        Step("v9 = torch.sin(v1)", ("v9",), ((("B", 8), "torch.float64"),)),
        Step("v10 = v9 * 2", ("v10",), ((("B", 8), "torch.float64"),)),
    ]
    spec = [
        {"op": "widen", "axis": "w1:0", "by": 2, "fill": "add", "fan_in": "zero", "fan_out": "random", "seed": 3},
    ]
    return Case(model, [spec])


def test_a_wrong_rule_is_found_confirmed_and_printed(broken: None) -> None:
    found = check(wordy())
    assert found is not None and found.kind == "wrong"
    assert trial.confirmed(found.case, found)
    with pytest.raises(AssertionError, match="not close"):
        exec(compile(script(found), "finding", "exec"), {"__name__": "finding"})


def test_a_finding_shrinks_to_what_it_needs() -> None:
    """Held to its text, where a check would take a capture each time."""

    def fails(case: Case) -> Finding | None:
        text = case.model.definition()
        case.model.build(1)
        wrong = "exp" in text and any("fan_out" in op for spec in case.growths for op in spec)
        return Finding("wrong", "output 0: off", case) if wrong else None

    case = wordy()
    case.growths.append([{"op": "widen", "axis": "w1:0", "factor": 3}])
    case.before.append([{"op": "widen", "axis": "w1:0", "factor": 3}])
    small = shrink(Finding("wrong", "output 0: off", case), 60, fails)
    text = small.case.model.definition()
    assert small.shrunk
    assert "exp" in text
    assert "sin" not in text and "v10" not in text and "w2" not in text
    assert [list(op) for spec in small.case.growths for op in spec] == [["op", "axis", "by", "fan_out"]]
    assert not small.case.before


def test_the_same_growth_passes_where_the_rule_is_right() -> None:
    assert check(wordy()) is None


def test_an_error_that_is_none_of_fxgrows_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise IndexError("list index out of range")

    monkeypatch.setattr("fxgrow.growth.plan_growth", fails)
    found = check(wordy())
    assert found is not None and found.kind == "raw"
    assert "IndexError" in found.detail


def test_a_crash_ends_one_worker_only() -> None:
    import os
    import signal

    from tests.fuzz.pool import each

    def job(number: int) -> int:
        if number == 1:
            os.kill(os.getpid(), signal.SIGSEGV)
        return number * 10

    done = {n: (result, problem) for n, result, problem in each(job, iter(range(4)), 2, 30)}
    assert done[1] == (None, "crashed with signal 11")
    assert {n: r for n, (r, _) in done.items() if n != 1} == {0: 0, 2: 20, 3: 30}


def test_a_hanging_model_is_given_up() -> None:
    import time

    from tests.fuzz.pool import each

    (found,) = each(lambda n: time.sleep(60), iter([0]), 1, 0.5)
    assert found[2].startswith("longer than")


@pytest.mark.parametrize("name", sorted(FEATURES))
def test_every_feature_gives_models_that_run(name: str) -> None:
    import random

    from tests.fuzz.compose import Composer, Rejected

    made = 0
    for seed in range(4):
        inputs = [Input("x", ("B", "T", 4)), Input("ids", ("B", "T"), high=7)] if seed % 2 else [Input("x", ("B", 4))]
        c = Composer(random.Random(seed), inputs)
        try:
            FEATURES[name](c)
        except Rejected:
            continue
        real = [v for v in c.pool if v.name.startswith("v")]
        c.model.outputs = [real[-1].name] if real else ["x"]
        model = c.model.pruned()
        with torch.no_grad():
            model.build(1)(*model.draw({"B": 3, "T": 5, "U": 4}, 0).values())
        made += 1
    assert made


def test_calls_of_several_kinds_are_captured() -> None:
    model = Model(
        inputs=[Input("x", ("B", 5)), Input("y", ("B", 4), optional=True)],
        members=[Member("w1", "self.w1 = nn.Parameter(rnd(8, 5))"), Member("w2", "self.w2 = nn.Parameter(rnd(3, 8))")],
        steps=[
            Step("v1 = F.linear(x, self.w1)", ("v1",)),
            Step("if y is None:\n    v2 = v1\nelse:\n    v2 = v1 * y.sum(-1, keepdim=True)", ("v2",)),
            Step("v3 = F.linear(v2, self.w2)", ("v3",)),
        ],
        outputs=["v3"],
        calls={"short": ["x"]},
    )
    small = model.build(1)
    program = captured(model, small)
    assert len(program.calls) == 2
    judge = Judge(model, small)
    assert {p.call for p in judge.sequence} == {"forward", "short"}
    growth = fxgrow.grow(program, {"op": "widen", "axis": "w1:0", "factor": 2}, verify=False)
    assert not judge.judge(growth.module).wrong


def test_a_finding_names_its_probe() -> None:
    case = wordy()
    text = script(Finding("wrong", "off", case, Probe("forward", 1, 20, -8.0), 4))
    assert "randn(4, 5" in text and "* -8" in text
    compile(text, "finding", "exec")


def test_every_mend_can_be_taken_back() -> None:
    """In a process of its own: what a mend replaces has not moved."""
    code = "from tests.fuzz.without import MENDS\nfor mend in MENDS.values(): mend.undo()"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
