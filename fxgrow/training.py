"""The training loop: a model trains, grows by a schedule while it runs, and goes on training.

One loop, meant to be read from top to bottom: :func:`train`. What it trains is a :class:`Task`; how long and how fast
is a :class:`Hyper`. ``fxgrow train package.module:callable`` and the examples both end up here.

In the folder of a run::

    log.jsonl                     one JSON object a line: start, step, eval, growth, checkpoint, resume, end
    checkpoints/latest            the name of the newest complete checkpoint
    checkpoints/step-00000100.0/  model.safetensors, optimizer.safetensors, state.json

A checkpoint holds no pickle. A run that has grown is resumed by replaying its growths on the original model, which
gives modules and optimizers of the right shapes, and then loading the tensors into them.

Caveat, also for loops of your own: clipping by the *global* gradient norm is not invariant under growth. A writer's
copies share its gradient, a reader's copies each have all of it, so the norm of the grown model's gradient differs from
the small model's although both compute the same function. Clipping then scales the first updates after a growth
differently. It does not touch the exactness of the growth itself; turn it off (``clip=0``) to compare trajectories.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TextIO

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import fxgrow
from fxgrow.checkpoint import read_tensors
from fxgrow.compile import compile_regions
from fxgrow.errors import CheckpointError, FxgrowError, SpecError
from fxgrow.rates import KEY, STEPS, all_rates
from fxgrow.reading import read_json, read_text
from fxgrow.scheduler import GrowthEvent, GrowthScheduler

Batch = tuple[Any, ...]


@dataclass(frozen=True)
class Hyper:
    """How a run is trained. Counts are optimizer steps unless they say otherwise."""

    steps: int = 1000
    accumulation: int = 1
    """Micro-batches per step, before any growth changes it."""
    learning_rate: float = 1e-3
    min_learning_rate: float = 1e-4
    warmup: int = 50
    decay_steps: int | None = None
    """Where the cosine reaches the minimum; None: at the last step."""
    clip: float = 1.0
    """Largest global gradient norm; 0 turns clipping off. See the module's docstring for the caveat."""
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eval_every: int = 100
    eval_batches: int = 8
    log_every: int = 10
    checkpoint_every: int = 0
    """0: only at the end."""
    keep_checkpoints: int = 2
    seed: int = 0
    compile: bool = False
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("accumulation", "eval_every", "eval_batches", "log_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise SpecError(f"hyper-parameter {name}: {getattr(self, name)} must be at least 1")


def adamw(model: nn.Module, hyper: Hyper) -> torch.optim.Optimizer:
    """AdamW with weight decay on matrices and embeddings only, as in nanoGPT."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": hyper.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=hyper.learning_rate, betas=hyper.betas)


def model_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The mean loss of a model that computes it itself and returns it alone, last in a tuple, or under ``loss``."""
    output = model(*batch)
    if isinstance(output, Mapping):
        output = output["loss"]
    elif isinstance(output, list | tuple):
        output = output[-1]
    return output


def whole_batch(batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs for the compiler: the batch as positional arguments."""
    return batch, {}


def first_numel(batch: Batch) -> int:
    """Tokens in a batch: the elements of its first tensor."""
    return int(batch[0].numel())


@dataclass
class Task:
    """What to train. Every callable is a plain function, so a task is written in one screenful."""

    model: nn.Module
    batches: Callable[[str, torch.Generator], Batch]
    """``batches(split, generator)`` draws one micro-batch of ``"train"`` or ``"val"``, a tuple of CPU tensors. It must
    depend on the generator alone: that is what makes a resumed run equal to an uninterrupted one."""
    hyper: Hyper = field(default_factory=Hyper)
    schedule: Any = None
    """Anything :meth:`fxgrow.schedule.Schedule.parse` takes."""
    loss: Callable[[nn.Module, Batch], Tensor] = model_loss
    """``loss(model, batch)``: the micro-batch's mean loss, a scalar."""
    example: Callable[[Batch], tuple[tuple[Any, ...], dict[str, Any]]] = whole_batch
    """``example(batch)``: the arguments the model is captured with; a batch of at least 2."""
    calls: Callable[[Batch], Mapping[str, Any]] | None = None
    """``calls(batch)``: further ways of calling the model, by name, see :func:`fxgrow.grow`; to sample from it, say."""
    optimizer: Callable[[nn.Module, Hyper], torch.optim.Optimizer] = adamw
    tokens: Callable[[Batch], int] = first_numel
    epoch_tokens: int | None = None
    """Tokens in one pass over the data; needed for ``epoch`` triggers only."""
    verify: Any = "auto"
    """Passed to :func:`fxgrow.grow`."""
    name: str = "run"


@dataclass
class Run:
    """The state of a run, and what :func:`train` returns."""

    task: Task
    out: Path
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: GrowthScheduler
    step: int = 0
    """Completed optimizer steps."""
    batches: int = 0
    """Micro-batches drawn."""
    tokens: int = 0
    flops: int = 0
    """Floating-point operations of training so far, forward and backward; evaluation is not counted."""
    flops_per_batch: int = 0
    """Of one micro-batch of the current module; 0 when not measured yet."""
    seconds: float = 0.0
    loss_sum: float = 0.0
    losses: int = 0
    """Training losses since the last evaluation: their sum and number."""
    val_loss: float = math.nan

    @property
    def accumulation(self) -> int:
        return self.scheduler.accumulation(self.task.hyper.accumulation)

    @property
    def learning_rate(self) -> float:
        """For the step about to be made, growths included."""
        return cosine(self.step, self.task.hyper) * self.scheduler.lr_factor(self.step)


def train(
    task: Task,
    out: str | Path,
    *,
    resume: bool = False,
    stop_at: int | None = None,
    console: Console | None = None,
    on_growth: Callable[[Run, GrowthEvent], None] | None = None,
) -> Run:
    """Train ``task``, growing by its schedule, and leave log and checkpoints in ``out``.

    Args:
        task: what to train; its model is left as it is at the first growth.
        out: folder of the run, made if need be.
        resume: go on from the newest checkpoint in ``out``; without one, start.
        stop_at: stop with a checkpoint after this many steps, as if interrupted.
        console: where progress goes; None prints to the terminal.
        on_growth: called after each growth.

    Raises:
        FxgrowError: a growth was refused, a checkpoint does not fit, or the loss stopped being finite.
    """
    hyper, out, console = task.hyper, Path(out), console or Console()
    device = torch.device(hyper.device)
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(hyper.seed)  # for dropout; batches have generators of their own
    task.model.to(device).train()

    def batch(split: str, number: int) -> Batch:
        return to_device(task.batches(split, seeded(hyper.seed, split, number)), device)

    calls = task.calls
    scheduler = GrowthScheduler(
        task.schedule,
        args=lambda: task.example(batch("train", 0)),
        calls=None if calls is None else lambda: calls(batch("train", 0)),
        verify=task.verify,
    )
    run = Run(task, out, task.model, task.optimizer(task.model, hyper), scheduler)
    resumed = resume and (out / "checkpoints" / "latest").is_file()
    if resumed:
        restore(run)
    else:  # an earlier run's checkpoint in this folder must not be taken for one of this run
        (out / "checkpoints" / "latest").unlink(missing_ok=True)
    if scheduler.next is not None:  # a mistake in the schedule shows now, not at its step
        sizes = scheduler.check(run.model)
        console.print(f"planned: {' → '.join(map(human, sizes))} parameters", highlight=False)
    eval_batches = [batch("val", number) for number in range(hyper.eval_batches)]
    log = Log(out / "log.jsonl", resumed=run if resumed else None)
    log.write("resume" if resumed else "start", **standing(run), name=task.name, hyper=asdict(hyper))
    forward = compiled(run.model) if hyper.compile and run.flops_per_batch else run.model
    apart = Copies.none()
    started = time.perf_counter() - run.seconds

    with progress_bar(console, hyper.steps, run.step) as progress, contextlib.closing(log):
        while True:
            # Evaluate, on the same batches every time.
            metrics: dict[str, float] = {}
            if run.step % hyper.eval_every == 0 or run.step >= hyper.steps:
                run.val_loss = metrics["val_loss"] = evaluate(task, forward, eval_batches)
                if run.losses:
                    metrics["train_loss"] = run.loss_sum / run.losses
                    run.loss_sum, run.losses = 0.0, 0
                run.seconds = time.perf_counter() - started
                log.write("eval", **standing(run), **metrics, **apart.measure(run.model))
                console.print(describe(run, metrics), highlight=False)
            if run.step >= hyper.steps:
                log.write("checkpoint", step=run.step, path=str(save(run).relative_to(out)))
                log.write("end", **standing(run), val_loss=run.val_loss)
                break

            # Grow, when the schedule says so. The loss must not move; both values are logged.
            epoch = None if task.epoch_tokens is None else run.tokens / task.epoch_tokens
            reported = metrics if run.step else {}  # before the first step there is no training loss to watch
            before = count_parameters(run.model)
            grow_started = time.perf_counter()
            while event := due(run, log, epoch, reported):
                assert event.optimizer is not None
                grow_seconds = time.perf_counter() - grow_started
                loss_before = metrics.get("val_loss") or evaluate(task, forward, eval_batches)
                run.model, run.optimizer = event.module.train(), event.optimizer
                forward = run.model
                metrics = {**metrics, "val_loss": evaluate(task, forward, eval_batches)}
                run.val_loss, run.flops_per_batch = metrics["val_loss"], 0
                apart = Copies.of(run.model)
                run.seconds = time.perf_counter() - started
                line = growth_line(run, event, before, loss_before, grow_seconds)
                log.write("growth", **line)
                console.print(describe_growth(line), highlight=False)
                if on_growth is not None:
                    on_growth(run, event)
                before = count_parameters(run.model)
                grow_started = time.perf_counter()

            # One optimizer step: accumulate micro-batches, clip, update.
            lr, accumulation = run.learning_rate, run.accumulation
            for group in run.optimizer.param_groups:
                group["lr"] = lr * group.get("lr_scale", 1.0)
            run.optimizer.zero_grad(set_to_none=True)
            step_loss = 0.0
            for _ in range(accumulation):
                data = batch("train", run.batches)
                # The first micro-batch of every module is counted, and compiled after it: compiled code hides its ops.
                counting = run.flops_per_batch == 0
                with flop_counter() if counting else contextlib.nullcontext() as counter:
                    loss = task.loss(forward, data)
                    (loss / accumulation).backward()
                if counter is not None:
                    run.flops_per_batch = counter.get_total_flops()
                    forward = compiled(run.model) if hyper.compile else run.model
                step_loss += loss.item() / accumulation
                run.batches += 1
                run.tokens += task.tokens(data)
                run.flops += run.flops_per_batch
            parameters = [p for p in run.model.parameters() if p.grad is not None]
            norm = float(nn.utils.clip_grad_norm_(parameters, hyper.clip if hyper.clip > 0 else math.inf))
            if not (math.isfinite(step_loss) and math.isfinite(norm)):
                raise FxgrowError(
                    f"after {run.step} steps the training loss is {step_loss:g} and its gradient's norm {norm:g}; no "
                    f"update was made. Lower the learning rate, or resume from the last checkpoint in {out}"
                )
            run.optimizer.step()
            run.step += 1
            run.seconds = time.perf_counter() - started
            run.loss_sum, run.losses = run.loss_sum + step_loss, run.losses + 1
            if run.step % hyper.log_every == 0:
                log.write("step", **standing(run), loss=step_loss, lr=lr, grad_norm=norm)
            progress(run, step_loss, lr)

            # Checkpoint: before the evaluation and growth of this step, which a resumed run makes anew.
            stop = stop_at is not None and stop_at <= run.step < hyper.steps
            if stop or (hyper.checkpoint_every and run.step % hyper.checkpoint_every == 0):
                log.write("checkpoint", step=run.step, path=str(save(run).relative_to(out)))
            if stop:
                break
    return run


# ---------------------------------------------------------------------------------------------------------------------
# Pieces of the loop


def due(run: Run, log: Log, epoch: float | None, metrics: Mapping[str, float]) -> GrowthEvent | None:
    """The growth that falls due, carried out; one that is refused is logged before the run ends with it."""
    try:
        return run.scheduler.step(
            run.model, run.optimizer, step=run.step, tokens=run.tokens, epoch=epoch, metrics=metrics
        )
    except FxgrowError as error:
        log.write("refused", **standing(run), error=str(error))
        raise


def cosine(step: int, hyper: Hyper) -> float:
    """Learning rate of step ``step`` (from 0): linear warm-up, then a cosine down to the minimum, then the minimum."""
    if step < hyper.warmup:
        return hyper.learning_rate * (step + 1) / hyper.warmup
    end = hyper.steps if hyper.decay_steps is None else hyper.decay_steps
    if step >= end:
        return hyper.min_learning_rate
    progress = (step - hyper.warmup) / max(1, end - hyper.warmup)
    span = hyper.learning_rate - hyper.min_learning_rate
    return hyper.min_learning_rate + span * 0.5 * (1 + math.cos(math.pi * progress))


def evaluate(task: Task, model: nn.Module, batches: list[Batch]) -> float:
    """Mean loss over ``batches`` in eval mode, summed in float64; the model's mode is put back."""
    was_training = model.training
    model.eval()
    with torch.no_grad():
        total = math.fsum(task.loss(model, batch).item() for batch in batches)
    model.train(was_training)
    return total / len(batches)


def seeded(seed: int, split: str, number: int) -> torch.Generator:
    """The generator of one micro-batch: a function of the run's seed, the split and the micro-batch's number."""
    digest = hashlib.blake2b(f"{seed}/{split}/{number}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def to_device(batch: Batch, device: torch.device) -> Batch:
    return tuple(item.to(device) if isinstance(item, Tensor) else item for item in batch)


def compiled(model: nn.Module) -> nn.Module:
    """``model`` compiled: a grown one block by block and in place, any other as a whole."""
    if isinstance(model, torch.fx.GraphModule):
        return compile_regions(model)
    wrapped: Any = torch.compile(model)
    return wrapped


def count_parameters(model: nn.Module) -> int:
    """Elements of all parameters, tied ones once."""
    return sum(p.numel() for p in model.parameters())


def flop_counter() -> FlopCounterMode:
    """Counts forward and backward; PyTorch's own table lacks the CPU's fused attention."""
    aten = torch.ops.aten

    def forward(q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return sdpa_flop_count(q, k, v)

    def backward(grad: Any, q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return sdpa_backward_flop_count(grad, q, k, v)

    table = {
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    return FlopCounterMode(display=False, custom_mapping=table)


@dataclass
class Copies:
    """Which slices of the weights are equal to the bit right after a growth, and how far apart they are later.

    A copy that never parts from its original is wasted. ``pairs`` maps a parameter and a dim to the index vectors of
    equal slices; ``zeros`` are the weights that were born zero (last projections of inserted blocks).
    """

    pairs: dict[tuple[str, int], tuple[Tensor, Tensor]]
    zeros: list[str]

    @classmethod
    def none(cls) -> Copies:
        return cls({}, [])

    @classmethod
    def of(cls, model: nn.Module) -> Copies:
        """Find them in the matrices of ``model`` by comparing values, without asking the compiler."""
        pairs, zeros = {}, []
        for name, parameter in model.named_parameters():
            if parameter.dim() != 2:
                continue
            weight = parameter.detach().cpu()
            if not weight.any():
                zeros.append(name)
                continue
            for dim in (0, 1):
                slices = weight if dim == 0 else weight.t()
                first: dict[bytes, int] = {}
                found = []
                for index, row in enumerate(slices.contiguous()):
                    if row.any():
                        other = first.setdefault(row.numpy().tobytes(), index)
                        if other != index:
                            found.append((other, index))
                if found:
                    left, right = torch.tensor(found).t().to(parameter.device)
                    pairs[name, dim] = (left, right)
        return cls(pairs, zeros)

    def measure(self, model: nn.Module) -> dict[str, Any]:
        """How far the copies have parted.

        Returns:
            ``copies``: number of pairs, ``apart_max``: largest difference of any weight of any two copies,
            ``apart_min``: the same for the two copies that are still nearest to each other; ``born_zero_max``: the
            smallest over the weights born zero of their now largest element. Keys without an object are left out.
        """
        weights = dict(model.named_parameters())
        result: dict[str, Any] = {}
        with torch.no_grad():
            apart = [
                (weights[name].index_select(dim, left) - weights[name].index_select(dim, right)).abs().amax(1 - dim)
                for (name, dim), (left, right) in self.pairs.items()
            ]
            if apart:
                every = torch.cat(apart)
                result = {"copies": every.numel(), "apart_max": float(every.max()), "apart_min": float(every.min())}
            if self.zeros:
                result["born_zero_max"] = min(float(weights[name].abs().max()) for name in self.zeros)
        return result


# ---------------------------------------------------------------------------------------------------------------------
# What is shown and logged


class Log:
    """JSON lines, flushed one by one.

    A new log replaces an old one. ``append`` goes on after its last line; with ``resumed`` the lines after that run's
    checkpoint, which it will write again, are cut off first.
    """

    def __init__(self, path: Path, *, append: bool = False, resumed: Run | None = None) -> None:
        kept: list[str] = []
        if resumed is not None and path.is_file():
            for text in path.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(json.JSONDecodeError):  # the line a crash cut short
                    line = json.loads(text)
                    redone = line["event"] in ("eval", "growth") and line["step"] >= resumed.step
                    if not redone and line.get("step", math.inf) <= resumed.step and line["event"] not in _LAST:
                        kept.append(text + "\n")
        self._file: TextIO = path.open("a" if append else "w", encoding="utf-8")
        self._file.writelines(kept)

    def write(self, event: str, **fields: Any) -> None:
        self._file.write(json.dumps({"event": event, **fields}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


_LAST = ("end", "sample", "strict_load")  # what only a finished run has


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a ``log.jsonl``."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def standing(run: Run) -> dict[str, Any]:
    """Where a run is, for the log."""
    return {
        "step": run.step,
        "tokens": run.tokens,
        "flops": run.flops,
        "parameters": count_parameters(run.model),
        "seconds": round(run.seconds, 3),
    }


def growth_line(run: Run, event: GrowthEvent, before: int, loss_before: float, seconds: float) -> dict[str, Any]:
    """What the log says of a growth; ``seconds`` is capture, planning, new tensors, verification and the optimizer."""
    growth, receipt = run.scheduler.fired[event.index], event.growth.receipt
    return {
        **standing(run),
        "index": event.index,
        "name": event.name,
        "trigger": str(growth.trigger),
        "growth": growth.to_dict(),
        "parameters_before": before,
        "val_loss_before": loss_before,
        "val_loss_after": run.val_loss,
        "moved": abs(run.val_loss - loss_before),
        "error_float64": getattr(receipt, "error_float64", None),
        "error_native": getattr(receipt, "error_native", None),
        "grow_seconds": round(seconds, 3),
        "accumulation": run.accumulation,
    }


def human(value: float, unit: str = "") -> str:
    """Three digits and a prefix: (1234567, "FLOP") → "1.23 MFLOP"."""
    for size, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * size:
            return f"{value / size:#.3g}".rstrip(".") + f" {prefix}{unit}"
    return f"{value:.3g} {unit}".rstrip()


def describe(run: Run, metrics: Mapping[str, float]) -> str:
    """A line of at most 80 characters."""
    total = run.task.hyper.steps
    trained = f"train {metrics['train_loss']:.4f}" if "train_loss" in metrics else " " * 12
    return (
        f"step {run.step:>{len(str(total))}}/{total}  val {run.val_loss:.4f}  {trained}"
        f"  {human(count_parameters(run.model)):>6} params  {human(run.flops, 'FLOP'):>10}  {run.seconds:4.0f} s"
    )


def describe_growth(line: Mapping[str, Any]) -> str:
    """Two lines of at most 80 characters each, with rich's markup."""
    error = line["error_float64"]
    return (
        f"[bold]grown: {escape(line['name'])}[/bold], {human(line['parameters_before'])} → "
        f"{human(line['parameters'])} parameters, in {line['grow_seconds']:.1f} s\n"
        f"       val {line['val_loss_before']:.6f} → {line['val_loss_after']:.6f}, moved by {line['moved']:.1e}"
        + (f"; float64 error {error:.1e}" if error is not None else "")
    )


@contextlib.contextmanager
def progress_bar(console: Console, total: int, done: int) -> Iterator[Callable[[Run, float, float], None]]:
    """A bar on a terminal, nothing elsewhere; yields what to call after each step."""
    columns = (BarColumn(20), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("starting", total=total, completed=done)

        def update(run: Run, loss: float, lr: float) -> None:
            speed = run.tokens / max(run.seconds, 1e-9)
            text = f"loss {loss:.3f}  lr {lr:.1e}  {human(speed)} tokens/s"
            progress.update(bar, completed=run.step, description=text)

        yield update


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def save(run: Run) -> Path:
    """Write a checkpoint of ``run`` and make it the newest; a crash at any moment leaves a complete one behind.

    Returns:
        The checkpoint's folder.
    """
    folder = run.out / "checkpoints"
    folder.mkdir(exist_ok=True)
    for leftover in folder.glob(".new-*"):
        shutil.rmtree(leftover)
    number = 0
    while (target := folder / f"step-{run.step:08d}.{number}").exists():
        number += 1
    new = folder / f".new-{target.name}"
    new.mkdir()
    model_tensors, aliases = untied(run.model.state_dict())
    optimizer_tensors: dict[str, Tensor] = {"rng.cpu": torch.get_rng_state()}
    if torch.device(run.task.hyper.device).type == "cuda":
        optimizer_tensors["rng.cuda"] = torch.cuda.get_rng_state()
    state = {
        "format": 2,
        "fxgrow": fxgrow.__version__,
        "task": run.task.name,
        **{name: getattr(run, name) for name in _COUNTERS},
        "val_loss": None if math.isnan(run.val_loss) else run.val_loss,
        "scheduler": run.scheduler.state_dict(),
        "original": shapes(run.task.model),
        "aliases": aliases,
        "optimizer": pack(run.optimizer.state_dict(), "optimizer", optimizer_tensors),
        "hyper": asdict(run.task.hyper),
    }
    save_file(model_tensors, new / "model.safetensors")
    save_file(optimizer_tensors, new / "optimizer.safetensors")
    (new / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
    for file in new.iterdir():
        sync(file)
    new.rename(target)
    pointer = folder / "latest.new"
    pointer.write_text(target.name, encoding="utf-8")
    sync(pointer)
    os.replace(pointer, folder / "latest")
    kept = sorted(folder.glob("step-*"), key=lambda path: path.stat().st_mtime_ns)
    for old in kept[: -run.task.hyper.keep_checkpoints]:
        shutil.rmtree(old)
    return target


_COUNTERS = ("step", "batches", "tokens", "flops", "flops_per_batch", "seconds", "loss_sum", "losses")


class _Saved(BaseModel):
    """What ``state.json`` holds."""

    model_config = ConfigDict(extra="forbid")
    format: Literal[2]
    fxgrow: str
    task: str
    step: int = Field(ge=0)
    batches: int = Field(ge=0)
    tokens: int = Field(ge=0)
    flops: int = Field(ge=0)
    flops_per_batch: int = Field(ge=0)
    seconds: float = Field(ge=0)
    loss_sum: float
    losses: int = Field(ge=0)
    val_loss: float | None
    scheduler: dict[str, Any]
    original: dict[str, list[int]]
    aliases: dict[str, str]
    optimizer: Any
    hyper: dict[str, Any]


def restore(run: Run) -> None:
    """Bring a fresh ``run`` to its newest checkpoint: replay the growths, then load every tensor, strictly.

    Raises:
        CheckpointError: something is missing, superfluous, or of another shape or dtype. The run is not usable then.
        SpecError: the schedule's past is not this run's.
    """
    folder = run.out / "checkpoints"
    newest = read_text(folder / "latest", 1000, CheckpointError).strip()
    if not re.fullmatch(r"step-\d+\.\d+", newest):
        raise CheckpointError(f"{folder / 'latest'} does not name a checkpoint: {newest[:80]!r}")
    path = folder / newest
    state = _read_state(path / "state.json")
    model_tensors = read_tensors(path / "model.safetensors")
    optimizer_tensors = read_tensors(path / "optimizer.safetensors")
    compare(state.original, shapes(run.task.model), f"checkpoint {path}: the original model")
    run.scheduler.load_state_dict(state.scheduler)
    run.model, optimizer = run.scheduler.replay(run.model, run.optimizer)
    assert optimizer is not None
    run.optimizer = optimizer
    run.model.train()
    load_model(run.model, model_tensors, state.aliases, f"checkpoint {path}: the model")
    try:
        saved = unpack(state.optimizer, optimizer_tensors)
        _check_optimizer(saved, run.optimizer)
        run.optimizer.load_state_dict(saved)
        all_rates(run.optimizer)  # reads what stands in the groups
        _set_random_state(optimizer_tensors)
    except (KeyError, ValueError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        raise CheckpointError(f"checkpoint {path}: the optimizer's state does not fit: {error}") from error
    for name in _COUNTERS:
        setattr(run, name, getattr(state, name))
    run.val_loss = math.nan if state.val_loss is None else state.val_loss


def _read_state(file: Path) -> _Saved:
    data = read_json(file, finite=False)
    if not isinstance(data, dict) or data.get("format") != 2:
        found = data.get("format") if isinstance(data, dict) else None
        raise CheckpointError(f"checkpoint {file.parent} has format {repr(found)[:40]}; this version reads 2")
    try:
        return _Saved.model_validate(data)
    except ValidationError as error:
        item = error.errors()[0]
        raise CheckpointError(f"{file} is damaged: {'.'.join(map(str, item['loc']))}: {item['msg']}") from error


def _check_optimizer(saved: Any, optimizer: torch.optim.Optimizer) -> None:
    """Whether an optimizer's state is of its kind: torch takes any, and fails at the next step.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(saved, dict) or set(saved) != {"state", "param_groups"} or not isinstance(saved["state"], dict):
        raise ValueError("it is no optimizer's state")
    own = optimizer.state_dict()["param_groups"]
    groups = saved["param_groups"]
    if not isinstance(groups, list) or len(groups) != len(own):
        raise ValueError(f"it has not the {len(own)} parameter groups of this optimizer")
    for number, (theirs, mine) in enumerate(zip(groups, own, strict=True)):
        # per-slice rates come and go: a warm-up that the replay begins may have ended before the checkpoint
        own_keys = set(mine) - {KEY, STEPS}
        if not isinstance(theirs, dict) or set(theirs) - {KEY, STEPS} != own_keys or theirs["params"] != mine["params"]:
            raise ValueError(f"parameter group {number} is not like this optimizer's")
        odd = [k for k in mine if k in own_keys and not _alike(theirs[k], mine[k])]
        if odd:
            raise ValueError(f"{odd[0]} of parameter group {number} is {str(theirs[odd[0]])[:40]!r}")
    parameters: dict[int, Tensor] = {}
    kinds: dict[int, dict[str, bool]] = {}
    for mine, group in zip(own, optimizer.param_groups, strict=True):
        parameters |= dict(zip(mine["params"], group["params"], strict=True))
        kinds |= dict.fromkeys(mine["params"], _state_kinds(optimizer, group))
    for number, entries in saved["state"].items():
        if number not in parameters or not isinstance(entries, dict):
            raise ValueError(f"state of parameter {str(number)[:40]!r}, which this optimizer has not")
        shape = parameters[number].shape
        lost = kinds[number].keys() - entries.keys()
        if lost and entries:
            raise ValueError(f"state of parameter {number} lacks {min(lost)}")
        for key, value in entries.items():
            if not isinstance(key, str):
                raise ValueError(f"state of parameter {number} has the key {key!r}")
            if kinds[number].get(key, isinstance(value, Tensor)) != isinstance(value, Tensor) and value is not None:
                raise ValueError(f"{key} of parameter {number} is {str(value)[:40]!r}")
            if isinstance(value, Tensor) and value.dim() == len(shape) and value.numel() > 1 and value.shape != shape:
                raise ValueError(f"{key} of parameter {number} is {list(value.shape)}, the parameter {list(shape)}")


def _state_kinds(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> dict[str, bool]:
    """What the optimizer keeps for a parameter after a step: by name, whether it is a tensor. Empty where not known."""
    scratch = nn.Parameter(torch.zeros(2, 2))
    scratch.grad = torch.zeros(2, 2)
    options = {k: v for k, v in group.items() if k not in ("params", "param_names", KEY, STEPS)}
    try:
        make: Any = type(optimizer)
        fresh = make([{**options, "params": [scratch]}])
        fresh.step()
    except Exception:  # somebody's own optimizer, which asks for more
        return {}
    return {k: isinstance(v, Tensor) for k, v in fresh.state[scratch].items() if v is not None}


def _alike(theirs: Any, mine: Any) -> bool:
    """Whether two hyper-parameters are of one kind; numbers may be of any."""
    if isinstance(mine, bool) or mine is None or theirs is None:
        return theirs is None or mine is None or isinstance(theirs, bool)
    if isinstance(mine, int | float):
        return isinstance(theirs, int | float | Tensor) and not isinstance(theirs, bool)
    if isinstance(mine, tuple | list):
        return isinstance(theirs, tuple | list) and len(theirs) == len(mine) and all(map(_alike, theirs, mine))
    if isinstance(mine, dict):
        return (
            isinstance(theirs, dict) and theirs.keys() == mine.keys() and all(_alike(theirs[k], mine[k]) for k in mine)
        )
    return isinstance(theirs, type(mine))


def _set_random_state(tensors: Mapping[str, Tensor]) -> None:
    saved, own = tensors["rng.cpu"], torch.get_rng_state()
    if saved.dtype != own.dtype or saved.shape != own.shape:
        raise ValueError("the state of the random numbers is not one of this PyTorch's")
    torch.set_rng_state(saved)
    if "rng.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng.cuda"])


def untied(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors as safetensors wants them, each once; and for the other names of tied ones, whose alias they are."""
    seen: dict[Any, str] = {}
    kept: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, tensor in tensors.items():
        key = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tuple(tensor.shape), tensor.stride())
        owner = seen.setdefault(key, name) if tensor.numel() else name
        if owner != name:
            aliases[name] = owner
        else:
            kept[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    return kept, aliases


def load_model(model: nn.Module, tensors: Mapping[str, Tensor], aliases: Mapping[str, str], what: str) -> None:
    """Copy ``tensors`` into ``model``; names, shapes and dtypes must all be its own."""
    every = {**tensors, **{name: tensors[owner] for name, owner in aliases.items() if owner in tensors}}
    own = model.state_dict()
    compare(
        {name: [*tensor.shape, str(tensor.dtype)] for name, tensor in every.items()},
        {name: [*tensor.shape, str(tensor.dtype)] for name, tensor in own.items()},
        what,
    )
    model.load_state_dict(every, strict=True)


def shapes(model: nn.Module) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}


def compare(saved: Mapping[str, Any], own: Mapping[str, Any], what: str) -> None:
    """Raise unless both say the same of the same names."""
    mistakes = [f"{name} is missing in the checkpoint" for name in own if name not in saved]
    mistakes += [f"{name} is not in the model" for name in saved if name not in own]
    for name in own:
        if name in saved and saved[name] != own[name]:
            mistakes.append(f"{name} is {saved[name]} in the checkpoint, {own[name]} in the model")
    if mistakes:
        more = f"; and {len(mistakes) - 5} more" if len(mistakes) > 5 else ""
        raise CheckpointError(f"{what} is another one: {'; '.join(mistakes[:5])}{more}")


def pack(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Nested data as JSON; tensors go to ``tensors`` under their path, and a reference takes their place."""
    if isinstance(value, Tensor):
        tensors[path] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"$tensor": path}
    if isinstance(value, Mapping):
        items = [[pack(k, "", {}), pack(v, f"{path}.{k}", tensors)] for k, v in value.items()]
        return {"$dict": items} if any(not isinstance(k, str) for k in value) else dict(items)
    if isinstance(value, list | tuple):
        items = [pack(item, f"{path}.{number}", tensors) for number, item in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise CheckpointError(f"{path} is a {type(value).__name__}, which a checkpoint without pickle cannot hold")


def unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of :func:`pack`.

    Raises:
        KeyError, TypeError, ValueError: it is not what ``pack`` makes.
    """
    if isinstance(value, list):
        return [unpack(item, tensors) for item in value]
    if isinstance(value, dict):
        if "$tensor" in value:
            return tensors[value["$tensor"]]
        if "$tuple" in value:
            return tuple(unpack(item, tensors) for item in value["$tuple"])
        pairs = value["$dict"] if "$dict" in value else value.items()
        return {key: unpack(item, tensors) for key, item in pairs}
    return value


def sync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def load_task(reference: str) -> Task:
    """Import ``package.module:callable`` and call it.

    Raises:
        SpecError: it cannot be imported or does not return a :class:`Task`.
    """
    module_name, _, name = reference.partition(":")
    if not module_name or not name:
        raise SpecError(f"{reference!r}: a task is named package.module:callable")
    try:
        factory = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise SpecError(f"{reference!r}: {error}") from error
    task = factory()
    if not isinstance(task, Task):
        raise SpecError(f"{reference!r} returned a {type(task).__name__}, not a fxgrow.training.Task")
    return task
