"""What a schedule does in the loop beside growing: in place, logged, skipped, and resumed in the middle of an event."""

from __future__ import annotations

import itertools
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fxgrow.errors import SpecError
from fxgrow.training import Task, base_rate, read_log, train
from tests.training.toy import WIDEN, Net, assert_same_losses, assert_same_optimizer, make, quiet, run, same

HIDDEN = {**WIDEN, "axis": "*/hidden"}
EVENTS: list[dict[str, Any]] = [
    {
        "name": "all at once",
        "trigger": {"step": 5},
        "operations": [
            {"op": "accumulation", "factor": 2, "learning_rate": "sqrt"},
            {**HIDDEN, "noise": {"scale": 0.1}},
            {"op": "checkpoint"},
            {"op": "dropout", "p": 0.4},
            {"op": "evaluate"},
            {"op": "batch_size", "factor": 0.5},
            {"op": "weight_decay", "scale": 0.5},
        ],
        "optimizer": "copy",
    },
    {
        "trigger": {"step": 7},
        "on_error": "skip",
        "operations": [{**HIDDEN, "axis": "*/hiden"}, {"op": "freeze", "what": "up.bias"}],
    },
    {"trigger": {"tokens": 240}, "operations": [{"op": "unfreeze"}, {"op": "learning_rate", "set": 0.001}]},
]


def sized(split: str, generator: torch.Generator, batch_size: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(batch_size, 3, generator=generator, dtype=torch.float64)
    return x, x.prod(1, keepdim=True)


def task(schedule: Any = EVENTS, **hyper: Any) -> Task:
    return replace(make(dropout=0.1, schedule=schedule, **hyper), batches=sized, batch_size=8, in_place=True)


def test_actions_happen_in_order_and_are_logged(tmp_path: Path) -> None:
    job = task()
    final = run(job, tmp_path)
    assert final.model is job.model and isinstance(final.model, Net) and final.model.up.out_features == 8
    assert final.model.dropout.p == 0.4
    assert [g["weight_decay"] for g in final.optimizer.param_groups] == [0.05, 0.0]
    lines = read_log(tmp_path / "log.jsonl")
    names = [(x["event"], x.get("op"), x["step"]) for x in lines if x["event"] not in ("step", "start", "end")]
    assert names == [
        ("eval", None, 0),
        ("eval", None, 4),
        ("action", "accumulation", 5),
        ("growth", "grow", 5),
        ("action", "checkpoint", 5),
        ("checkpoint", None, 5),
        ("action", "dropout", 5),
        ("action", "evaluate", 5),
        ("eval", None, 5),
        ("action", "batch_size", 5),
        ("action", "weight_decay", 5),
        ("skipped", "grow", 7),
        ("action", "freeze", 7),
        ("eval", None, 8),
        ("action", "unfreeze", 10),
        ("action", "learning_rate", 10),
        ("eval", None, 12),
        ("checkpoint", None, 12),
    ]
    actions = {x["op"]: x for x in lines if x["event"] == "action"}
    assert (actions["accumulation"]["before"], actions["accumulation"]["after"]) == (
        {"accumulation": 1},
        {"accumulation": 2, "learning_rate_factor": 2**0.5},
    )
    assert actions["batch_size"]["after"] == {"batch_size": 4}
    skipped = next(x for x in lines if x["event"] == "skipped")
    assert "no axis matches '*/hiden'" in skipped["error"] and skipped["name"] == "event 2"
    growth = next(x for x in lines if x["event"] == "growth")
    assert growth["moved"] < 1e-12 and growth["receipt"]["exactness"] == "exact"
    steps = {x["step"]: x for x in lines if x["event"] == "step"}
    assert [steps[s]["tokens"] - steps[s - 1]["tokens"] for s in (5, 6, 7)] == [24, 24, 24]  # 2 × 4 of 3 for 8 of 3
    assert steps[7]["lr"] == pytest.approx(2**0.5 * base_rate(6, job.hyper))
    assert steps[11]["lr"] == pytest.approx(0.001)
    assert steps[12]["lr"] == pytest.approx(0.001 * base_rate(11, job.hyper) / base_rate(10, job.hyper))


@pytest.mark.parametrize("stop", [4, 5, 6, 8, 11])
def test_stopped_anywhere_it_goes_on_as_if_nothing_had_been(tmp_path: Path, stop: int) -> None:
    whole = run(task(), tmp_path / "whole")
    run(task(), tmp_path / "parts", stop_at=stop)
    rest = run(task(), tmp_path / "parts", resume=True)
    assert same(whole.model, rest.model)
    assert_same_losses(tmp_path / "whole", tmp_path / "parts")
    assert_same_optimizer(whole.optimizer, rest.optimizer)
    assert [p.requires_grad for p in whole.model.parameters()] == [p.requires_grad for p in rest.model.parameters()]
    ours, theirs = (
        [(x["event"], x.get("op"), x["step"]) for x in read_log(tmp_path / out / "log.jsonl")]
        for out in ("whole", "parts")
    )
    stops = {("checkpoint", None, stop), ("resume", None, stop)}
    assert [x for x in theirs if x not in stops] == [x for x in ours if x not in stops]


def test_a_checkpoint_in_the_middle_of_an_event_goes_on_with_its_next_action(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process ends right after the event's own checkpoint: neither its growth nor its evaluation is made twice."""
    whole = run(task(), tmp_path / "whole")

    def power_cut(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("fxgrow.scheduler.scheduler.set_dropout", power_cut)
        with pytest.raises(KeyboardInterrupt):
            run(task(), tmp_path / "parts")
    text = (tmp_path / "parts" / "log.jsonl").read_text(encoding="utf-8")
    lost = text[: text.rindex('{"event": "checkpoint"')]
    for number, log in enumerate((text, lost, text + '{"event": "step", "st')):  # its line lost, or one begun after it
        out = Path(shutil.copytree(tmp_path / "parts", tmp_path / f"rest-{number}"))
        (out / "log.jsonl").write_text(log, encoding="utf-8")
        rest = run(task(), out, resume=True)
        assert same(whole.model, rest.model)
        assert_same_optimizer(whole.optimizer, rest.optimizer)
        lines = [(x["event"], x.get("op"), x["step"]) for x in read_log(out / "log.jsonl") if x["event"] != "resume"]
        assert lines == [(x["event"], x.get("op"), x["step"]) for x in read_log(tmp_path / "whole" / "log.jsonl")]


def test_what_is_due_after_the_last_step_is_done_before_the_last_checkpoint(tmp_path: Path) -> None:
    last = {"trigger": {"step": 6}, "operations": [{"op": "lora_merge"}]}
    adapters = {"trigger": {"step": 2}, "operations": [{"op": "lora", "modules": "*", "rank": 2}]}
    never = {"trigger": {"step": 9}, "operations": [{"op": "evaluate"}]}
    console = quiet()
    whole = train(task([adapters, last, never], steps=6), tmp_path / "whole", console=console)
    assert "lora_A" not in " ".join(whole.model.state_dict())
    assert "the run ended before the event at step 9" in console.file.getvalue()  # type: ignore[attr-defined]
    names = [(x["event"], x.get("op"), x["step"]) for x in read_log(tmp_path / "whole" / "log.jsonl")]
    assert names[-4:] == [("eval", None, 6), ("action", "lora_merge", 6), ("checkpoint", None, 6), ("end", None, 6)]
    run(task([adapters, last, never], steps=6), tmp_path / "parts", stop_at=4)
    assert same(whole.model, run(task([adapters, last, never], steps=6), tmp_path / "parts", resume=True).model)
    assert same(whole.model, run(task([adapters, last, never], steps=6), tmp_path / "whole", resume=True).model)


def test_operations_are_counted_anew_where_they_change(tmp_path: Path) -> None:
    events = [
        {"trigger": {"step": 2}, "operations": [{"op": "batch_size", "factor": 0.5}]},
        {"trigger": {"step": 4}, "operations": [{"op": "freeze", "what": "up.*"}]},
    ]
    run(task(events, steps=6), tmp_path)
    flops = [0, *(x["flops"] for x in read_log(tmp_path / "log.jsonl") if x["event"] == "step")]
    costs = [b - a for a, b in itertools.pairwise(flops)]
    assert costs[1] == 2 * costs[2] and costs[3] > costs[4] == costs[5]


def test_sizes_that_the_task_does_not_draw_by_are_refused_at_the_start(tmp_path: Path) -> None:
    schedule = [{"trigger": {"step": 3}, "operations": [{"op": "sequence_length", "set": 4}]}]
    with pytest.raises(SpecError, match=r"events\.0 changes the sequence length, and the task does not draw by it"):
        run(task(schedule), tmp_path)
