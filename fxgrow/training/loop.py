"""The loop itself, meant to be read from top to bottom: :func:`train`."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from fxgrow.compile import compile_regions
from fxgrow.errors import FxgrowError
from fxgrow.ir.running import in_mode
from fxgrow.scheduler import GrowthEvent, GrowthScheduler
from fxgrow.training.batches import seeded, to_device
from fxgrow.training.checkpoints import restore, save
from fxgrow.training.copies import Copies
from fxgrow.training.counting import count_parameters, flop_counter
from fxgrow.training.display import describe, describe_growth, human, progress_bar
from fxgrow.training.log import Log, growth_line, standing
from fxgrow.training.run import Run
from fxgrow.training.task import Batch, Task


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


def due(run: Run, log: Log, epoch: float | None, metrics: Mapping[str, float]) -> GrowthEvent | None:
    """The growth that falls due, carried out; one that is refused is logged before the run ends with it."""
    try:
        return run.scheduler.step(
            run.model, run.optimizer, step=run.step, tokens=run.tokens, epoch=epoch, metrics=metrics
        )
    except FxgrowError as error:
        log.write("refused", **standing(run), error=str(error))
        raise


def evaluate(task: Task, model: nn.Module, batches: list[Batch]) -> float:
    """Mean loss over ``batches`` in eval mode, summed in float64; the model's mode is put back."""
    with in_mode(model, False), torch.no_grad():
        return math.fsum(task.loss(model, batch).item() for batch in batches) / len(batches)


def compiled(model: nn.Module) -> nn.Module:
    """``model`` compiled: a grown one block by block and in place, any other as a whole."""
    if isinstance(model, torch.fx.GraphModule):
        return compile_regions(model)
    wrapped: Any = torch.compile(model)
    return wrapped
