"""One run of the study, by fxgrow's own training loop: the shared part at the full rate, the growths, the decay.

Runs that begin alike share that part: it is trained once, and kept as a run that others go on from. A process that is
killed goes on from its last checkpoint.
"""

from __future__ import annotations

import functools
import io
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from benchmarks.payoff import text
from benchmarks.payoff.contestants import BY_NAME, DECAY, SCALES, Scale, Work, sizes_of
from examples.gpt.model import GPT, GPTConfig
from fxgrow.ir.flops import flop_counter
from fxgrow.training import Hyper, Run, Task, adamw, begin, evaluate, model_loss, newest, read_log, restore, train

Line = Mapping[str, Any]
#: evaluations of a run, and in the steps after a growth; batches of one, and of the last
EVALUATIONS, CLOSE, BATCHES, LAST_BATCHES = 30, 12, 8, 64


def perform(scale: str, contestant: str, rate: float, seed: int, budget: float, folder: str) -> dict[str, Any]:
    """Carry out a :class:`Work`; returns what it came to, for JSON."""
    torch.set_num_threads(1)
    job = _Job(SCALES[scale], Work(contestant, rate, seed, budget), Path(folder))
    return job.naive() if job.contestant.naive else job.grown()


class _Job:
    """A run's plan in steps, and its folders."""

    def __init__(self, scale: Scale, work: Work, folder: Path) -> None:
        self.scale, self.work, self.folder = scale, work, folder
        self.contestant = BY_NAME[work.contestant]
        self.sizes = [scale.sizes[name] for name in sizes_of(self.contestant)]
        costs = [flops(scale.name, tuple(sizes.items())) for sizes in self.sizes]
        parts = [0.0, *(hop.at for hop in self.contestant.hops), 1.0]
        spans = [round((b - a) * work.budget / cost) for a, b, cost in zip(parts, parts[1:], costs, strict=False)]
        self.hops = [sum(spans[: i + 1]) for i in range(len(spans) - 1)]
        self.steps = sum(spans)
        self.decay_from = self.steps - round(DECAY * work.budget / costs[-1])
        self.shared = self.hops[0] if self.hops else self.decay_from
        self.place = folder / "runs" / _slug(work.key)

    def grown(self) -> dict[str, Any]:
        """By a schedule, from the shared part on."""
        events: list[dict[str, Any]] = []
        for step, hop in zip(self.hops, self.contestant.hops, strict=True):
            optimizer = {"optimizer": dict(hop.policy)} if hop.policy else {}
            events += [{"trigger": {"step": step}, "operations": [dict(o) for o in hop.operations], **optimizer}]
            events += [{"trigger": {"step": s}, "operations": [{"op": "evaluate"}]} for s in self._close(step)]
        events.sort(key=lambda event: event["trigger"]["step"])
        if not self.place.exists():
            _copy(self._trunk(), self.place)
        run = self._train(self.place, self._task(self.sizes[0], self.steps, self.decay_from, events))
        lines = read_log(self.place / "log.jsonl")
        starts = [(g["step"], g["val_loss_before"], g["val_loss_after"]) for g in lines if g["event"] == "growth"]
        return self._result(run, lines, starts, run.flops)

    def naive(self) -> dict[str, Any]:
        """As hand-written loops grow: weights repeated, nothing divided, a new optimizer; at the rate of the others."""
        trunk = self._trunk()
        before = begin(self._task(self.sizes[0], self.shared, None, []), trunk)
        restore(before)
        model = _model(self.scale, self.sizes[-1], self.work.seed)
        repeat(before.model, model)
        wider = model.config.n_embd // before.model.get_parameter("transformer.wte.weight").shape[1]
        steps, start = self.steps - self.shared, self.decay_from - self.shared
        rate = self.work.rate / wider
        marks = [{"trigger": {"step": s}, "operations": [{"op": "evaluate"}]} for s in self._close(0)]
        run = self._train(self.place, self._task(self.sizes[-1], steps, start, marks, model, rate))
        shift = {"step": self.shared, "flops": before.flops}
        later = [
            line | {key: line[key] + more for key, more in shift.items() if key in line}
            for line in read_log(self.place / "log.jsonl")
        ]
        loss = evaluate(before.task, before.model, [before.batch("val", number) for number in range(BATCHES)])
        first = next(line["val_loss"] for line in later if line["event"] == "eval")
        lines = [*read_log(trunk / "log.jsonl"), *later]
        return self._result(run, lines, [(self.shared, loss, first)], run.flops + before.flops)

    def _close(self, step: int) -> list[int]:
        return sorted({step + -(-i * self.scale.window // CLOSE) for i in range(1, CLOSE + 1)})

    def _result(
        self, run: Run, lines: Sequence[Line], starts: Sequence[tuple[int, float, float]], spent: int
    ) -> dict[str, Any]:
        """``starts``: of each growth its step and the loss right before and right after it."""
        evals = [line for line in lines if line["event"] == "eval"]
        rises = [
            max([after, *(e["val_loss"] for e in evals if step < e["step"] <= step + self.scale.window)]) - before
            for step, before, after in starts
        ]
        last = [run.batch("val", number) for number in range(LAST_BATCHES)]
        return {
            "loss": evaluate(run.task, run.model, last),
            "flops": spent,
            "stages": [b - a for a, b in zip([0, *self.hops], [*self.hops, self.steps], strict=True)],
            "jump": max((abs(after - before) for _, before, after in starts), default=None),
            "rise": max(rises, default=None),
            "parameters": sum(p.numel() for p in run.model.parameters()),
            "curve": [[e["step"], e["flops"], round(e["val_loss"], 4)] for e in evals if e["step"]],
            "text": text.corpus()[1],
            "torch": torch.__version__.partition("+")[0],
        }

    def _trunk(self) -> Path:
        """A run of the first size, at the full rate, that has stopped where this one goes its own way."""
        start = f"{self.contestant.start} {self.contestant.optimizer} {self.work.rate:g} {self.work.seed}"
        folder = self.folder / "shared" / _slug(start)
        here = folder / f"{self.shared:08d}"
        if not here.exists():
            earlier = [p for p in sorted(folder.glob("*.complete")) if int(p.stem) < self.shared]
            if earlier:
                _copy(folder / earlier[-1].stem, here)
        if not here.with_suffix(".complete").exists():
            if not (here / "checkpoints" / "latest").exists() or int(newest(here)[5:13]) < self.shared:
                self._train(here, self._task(self.sizes[0], self.shared, None, []))
            here.with_suffix(".complete").touch()
        return here

    def _train(self, out: Path, task: Task) -> Run:
        """A run to its end, or on from where it was cut off; one that others go on from stops before that."""
        goes_on = task.hyper.decay_from == task.hyper.steps
        stop = task.hyper.steps - 1 if goes_on else None
        return train(task, out, resume=True, stop_at=stop, console=Console(file=io.StringIO()))

    def _task(
        self,
        sizes: Mapping[str, int],
        steps: int,
        decay_from: int | None,
        events: Sequence[Mapping[str, Any]],
        model: nn.Module | None = None,
        rate: float | None = None,
    ) -> Task:
        """What is trained; without a decay, a run that others go on from, which is not to come to its end."""
        scale, half = self.scale, self.scale.block_size // 2
        hyper = Hyper(
            steps=steps + (decay_from is None),
            learning_rate=self.work.rate if rate is None else rate,
            min_learning_rate=0.0,
            warmup=scale.warmup if model is None else 0,
            decay="linear",
            decay_from=steps + 1 if decay_from is None else decay_from,
            eval_every=max(1, self.steps // EVALUATIONS),
            eval_batches=BATCHES,
            log_every=10**9,
            checkpoint_every=max(1, self.steps // 4),
            keep_checkpoints=1,
            seed=self.work.seed,
            device=scale.device,
        )
        return Task(
            _model(scale, sizes, self.work.seed) if model is None else model,
            functools.partial(_draw, scale),
            hyper,
            list(events),
            optimizer=muon if self.contestant.optimizer == "muon" else adamw,
            example=lambda batch: (tuple(t[:2, :half] for t in batch), {}),
            name=self.contestant.name,
            verify=False,  # the jump of the loss is measured
        )


def step_of(scale: Scale, sizes: Mapping[str, int]) -> Callable[[], None]:
    """What makes one step of training at some sizes, for the time that it takes."""
    model, hyper = _model(scale, sizes, 0), Hyper(learning_rate=1e-3)
    optimizer = adamw(model, hyper)
    batch = tuple(x.to(scale.device) for x in _draw(scale, "train", torch.Generator().manual_seed(0)))

    def step() -> None:
        optimizer.zero_grad()
        model_loss(model, batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), hyper.clip)
        optimizer.step()
        if scale.device == "cuda":
            torch.cuda.synchronize()

    return step


@functools.cache
def flops(scale: str, sizes: tuple[tuple[str, int], ...]) -> int:
    """Of one step of training at some sizes, as the training loop counts them."""
    where = SCALES[scale]
    model = _model(where, dict(sizes), 0)
    batch = tuple(x.to(where.device) for x in _draw(where, "train", torch.Generator().manual_seed(0)))
    with flop_counter() as counter:
        model_loss(model, batch).backward()
    return int(counter.get_total_flops())


def repeat(small: nn.Module, large: nn.Module) -> None:
    """Fill a model with the weights of a smaller one, each repeated as often as it fits: not the same function."""
    old = dict(small.named_parameters())
    with torch.no_grad():
        for name, p in large.named_parameters():
            p.copy_(old[name].repeat([n // m for n, m in zip(p.shape, old[name].shape, strict=True)]))


def muon(model: nn.Module, hyper: Hyper) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, in steps as large as AdamW's, AdamW for all others (Jordan 2024, Liu 2025)."""
    inner = [p for name, p in model.named_parameters() if p.dim() == 2 and ".h." in f".{name}"]
    others = [p for p in model.parameters() if not any(p is q for q in inner)]
    options: dict[str, Any] = {"lr": hyper.learning_rate, "weight_decay": hyper.weight_decay}
    return [
        torch.optim.Muon(inner, adjust_lr_fn="match_rms_adamw", **options),
        torch.optim.AdamW(others, betas=hyper.betas, **options),
    ]


def _model(scale: Scale, sizes: Mapping[str, int], seed: int) -> GPT:
    torch.manual_seed(seed)
    return GPT(GPTConfig(block_size=scale.block_size, **sizes)).to(scale.device)


def _draw(scale: Scale, split: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return text.batch(split, generator, scale.batch_size, scale.block_size)


def _slug(name: str) -> str:
    return re.sub(r"[^\w.+-]+", "-", name)


def _copy(source: Path, target: Path) -> None:
    """A copy that is there as a whole, or not at all."""
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(source, part)
    part.rename(target)
