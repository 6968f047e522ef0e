"""The loop itself, meant to be read from top to bottom: :func:`train`."""

from __future__ import annotations

import contextlib
import itertools
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
from fxgrow.errors import DiskError, FxgrowError
from fxgrow.ir.dtensors import whole_of
from fxgrow.ir.flops import flops_of
from fxgrow.ir.replicas import innermost
from fxgrow.ir.running import in_mode
from fxgrow.ranks import agree, answering, shared, together
from fxgrow.schedule import Grow
from fxgrow.scheduler import ActionResult
from fxgrow.scheduler.progress import whole
from fxgrow.training.batches import sow
from fxgrow.training.begin import begin, planned
from fxgrow.training.checkpoints import newest, restore, save
from fxgrow.training.copies import Copies
from fxgrow.training.display import describe, describe_action, describe_growth, human, progress_bar
from fxgrow.training.log import Log, Silent, action_line, growth_line, standing
from fxgrow.training.parallel import Parallel
from fxgrow.training.run import Run
from fxgrow.training.task import Batch, Task, loss_of

#: actions after which a micro-batch costs other operations than before
_COSTS = ("batch_size", "sequence_length", "freeze", "unfreeze", "lora_merge")


def train(
    task: Task,
    out: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    stop_at: int | None = None,
    console: Console | None = None,
    on_growth: Callable[[Run, ActionResult], None] | None = None,
) -> Run:
    """Train ``task``, growing by its schedule, and leave log and checkpoints in ``out``.

    Args:
        task: what to train; its model is the one that grows, if ``task.in_place``.
        out: folder of the run, made if need be.
        resume: go on from the newest checkpoint in ``out``; without one, start.
        overwrite: begin anew in an ``out`` that holds a run already.
        stop_at: stop with a checkpoint after this many steps, as if interrupted.
        console: where progress goes; None prints to the terminal.
        on_growth: called after each growth.

    Raises:
        FxgrowError: a growth was refused, a checkpoint does not fit, ``out`` holds a run that is neither resumed nor
            overwritten, or the loss stopped being finite.
        RankError: on all ranks, where they are several: one of them failed, or has ended.
    """
    hyper, out, console = task.hyper, Path(out), console or Console()
    parallel = Parallel.here(task)
    console = console if parallel.first else Console(quiet=True)
    with together("the start of the run", parallel.group):
        run, resumed = started_run(task, out, resume, overwrite, parallel, lambda action: look(action))
        scheduler, batch = run.scheduler, run.batch
        sizes = [run.accumulation]
        if scheduler.next is not None:  # a mistake in the schedule shows now, not at its step
            timeline = planned(run)
            sizes += [row.sizes.accumulation for row in timeline.rows]
            console.print(f"planned: {' → '.join(map(human, timeline.parameters))} parameters", highlight=False)
        parallel.check(min(sizes), hyper.device)
        eval_batches = [batch("val", number) for number in range(hyper.eval_batches)]
        log = Log(out / "log.jsonl", resumed=run if resumed else None) if parallel.first else Silent()
    if hyper.compile and run.flops_per_batch:
        compiled(run.model)
    forward = parallel.shared_by_all(run.model)
    metrics, loss_before = dict[str, float](), math.nan
    started = time.perf_counter() - run.seconds

    def evaluated() -> float:
        """The loss on the same batches every time."""
        parallel.same_buffers(run.model)
        return evaluate(task, run.model, eval_batches, parallel)

    def measured() -> dict[str, float]:
        run.val_loss, run.evaluated = evaluated(), run.step
        found = {"val_loss": run.val_loss}
        if run.losses:
            found["train_loss"] = run.loss_sum / run.losses
            run.loss_sum, run.losses = 0.0, 0
        run.seconds = time.perf_counter() - started
        with answering(parallel.group):
            apart = run.copies.measure(run.model)
        log.write("eval", **standing(run), **found, **apart)
        console.print(describe(run, found), highlight=False)
        return found

    def look(action: Any) -> None:
        """Measure the loss before a growth, unless it was just measured: the model that has it is what grows."""
        nonlocal loss_before
        if isinstance(action, Grow):
            loss_before = metrics["val_loss"] if metrics else evaluated()

    def checkpoint() -> None:
        with together("the checkpoint", parallel.group):
            run.log_lines = log.lines + 1
            saved = save(run, parallel.group, first=parallel.first)
            if saved is not None:
                log.write("checkpoint", step=run.step, path=str(saved.relative_to(out)))

    if log.lines < (run.log_lines or 0):  # the process ended between the checkpoint and its line
        log.write("checkpoint", step=run.step, path=f"checkpoints/{newest(out)}")
    log.write("resume" if resumed else "start", **standing(run), name=task.name, hyper=asdict(hyper))

    with progress_bar(console, hyper.steps, run.step) as progress, contextlib.closing(log):
        while True:
            metrics = {}
            if (run.step % hyper.eval_every == 0 or run.step >= hyper.steps) and run.evaluated < run.step:
                metrics = measured()

            # What the schedule says: grow, or change how the run goes on. A growth must not move the loss.
            epoch = None if task.epoch_tokens is None else run.tokens / task.epoch_tokens
            reported = metrics if run.step else {}  # before the first step there is no training loss to watch
            while done := due(run, forward, log, epoch, reported):
                run.ended = False
                if done.error or done.growth is None:
                    line = action_line(run, done)
                    log.write("skipped" if done.error else "action", **line)
                    console.print(describe_action(line), highlight=False)
                    if done.op in _COSTS and not done.error:
                        run.flops_per_batch = 0  # to be counted anew
                    if done.op == "evaluate" and not done.error:
                        metrics = measured()
                    elif done.op == "checkpoint" and not done.error:
                        checkpoint()
                    continue
                forward, run.optimizer = done.module.train(), done.optimizer
                run.model = innermost(forward)
                metrics = {**metrics, "val_loss": evaluated()}
                run.val_loss, run.flops_per_batch = metrics["val_loss"], 0
                with answering(parallel.group):
                    run.copies = Copies.of(run.model)
                run.seconds = time.perf_counter() - started
                line = growth_line(run, done, loss_before)
                log.write("growth", **line)
                console.print(describe_growth(line), highlight=False)
                if on_growth is not None:
                    on_growth(run, done)
            if run.step >= hyper.steps:
                if not run.ended:  # or it was killed after that
                    run.ended = True
                    checkpoint()
                log.write("end", **standing(run), val_loss=run.val_loss)
                if scheduler.next is not None:
                    console.print(f"the run ended before the event at {scheduler.next.trigger}", highlight=False)
                break

            # One optimizer step: accumulate micro-batches, clip, update.
            lr, accumulation = run.learning_rate, run.accumulation
            for optimizer in run.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = lr * group.get("lr_scale", 1.0)
                optimizer.zero_grad(set_to_none=True)
            turns, found = parallel.turns(accumulation), dict[int, tuple[float, int]]()
            for turn, (number, counts) in enumerate(turns, 1):
                data = batch("train", run.batches + number)
                if run.sown:
                    sow(hyper.seed, run.batches + number)
                # The first micro-batch of every module is counted, and compiled after it: compiled code hides its ops.
                counting = run.flops_per_batch == 0
                with contextlib.ExitStack() as around:
                    counter = around.enter_context(flops_of(run.model)) if counting else None
                    around.enter_context(parallel.gathering(forward, last=turn == len(turns)))
                    around.enter_context(answering(parallel.group))
                    loss = loss_of(task, forward, data)
                    (loss / (accumulation / parallel.ranks) if counts else loss * 0.0).backward()
                if counter is not None:
                    run.flops_per_batch = counter.get_total_flops()
                    if hyper.compile:
                        compiled(run.model)
                if counts:
                    found[number] = loss.item() / accumulation, whole(task.tokens(data), "tokens(batch)")
            for each in shared(f"step {run.step}", found.copy, parallel.group):
                found |= each
            step_loss = sum(found[number][0] for number in range(accumulation))
            run.batches += accumulation
            run.tokens += sum(tokens for _, tokens in found.values())
            run.flops += run.flops_per_batch * accumulation
            parameters = [p for p in run.model.parameters() if p.grad is not None]
            with answering(parallel.group):
                total = whole_of(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
                nn.utils.clip_grads_with_norm_(parameters, hyper.clip if hyper.clip > 0 else math.inf, total)
            norm = float(total)
            if not (math.isfinite(step_loss) and math.isfinite(norm)):
                raise FxgrowError(
                    f"after {run.step} steps the training loss is {step_loss:g} and its gradient's norm {norm:g}; no "
                    f"update was made. Lower the learning rate, or resume from the last checkpoint in {out}"
                )
            for optimizer in run.optimizers:
                optimizer.step()
            run.step, run.ended = run.step + 1, False
            run.seconds = time.perf_counter() - started
            run.loss_sum, run.losses = run.loss_sum + step_loss, run.losses + 1
            if run.step % hyper.log_every == 0:
                log.write("step", **standing(run), loss=step_loss, lr=lr, grad_norm=norm)
            progress(run, step_loss, lr)

            # Checkpoint: before the evaluation and growth of this step, which a resumed run makes anew.
            stop = stop_at is not None and stop_at <= run.step < hyper.steps
            if stop or (hyper.checkpoint_every and run.step % hyper.checkpoint_every == 0):
                checkpoint()
            if stop:
                break
    return run


def started_run(
    task: Task, out: Path, resume: bool, overwrite: bool, parallel: Parallel, before: Callable[[Any], None]
) -> tuple[Run, bool]:
    """A run at its start or at its newest checkpoint, and whether it is that; see :func:`train`."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise DiskError(f"the folder of the run cannot be made: {error}") from error
    if (out / "log.jsonl").is_file() and not (resume or overwrite):
        raise FxgrowError(f"{out} holds a run already: resume it, overwrite it, or choose another folder")
    run = begin(task, out, before, parallel)
    resumed = resume and (out / "checkpoints" / "latest").is_file()
    agree("the newest checkpoint in the run's folder", newest(out) if resumed else "none", parallel.group)
    if resumed:
        restore(run)
        run.sown |= parallel.ranks > 1  # no rank draws what the others do
    elif parallel.first:  # an earlier run's checkpoint in this folder must not be taken for one of this run
        try:
            (out / "checkpoints" / "latest").unlink(missing_ok=True)
        except OSError as error:
            raise DiskError(f"{out} is no folder of a run: {error}") from error
    return run, resumed


def due(run: Run, model: nn.Module, log: Log, epoch: float | None, metrics: Mapping[str, float]) -> ActionResult | None:
    """The action that falls due, carried out; one that is refused is logged before the run ends with it.

    Args:
        model: the run's, as all ranks share it.
    """
    try:
        return run.scheduler.step(model, run.optimizer, step=run.step, tokens=run.tokens, epoch=epoch, metrics=metrics)
    except FxgrowError as error:
        log.write("refused", **standing(run), error=str(error))
        raise


def evaluate(task: Task, model: nn.Module, batches: list[Batch], parallel: Parallel | None = None) -> float:
    """Mean loss over ``batches`` in eval mode, summed in float64; the model's mode is put back.

    Args:
        parallel: ranks that take their parts of the batches; the sum is the same.
    """
    parallel = parallel or Parallel()

    def own() -> list[float]:
        with parallel.abreast("the evaluation"):
            losses = [(loss_of(task, model, batches[n]).item(), counts) for n, counts in parallel.turns(len(batches))]
        return [loss for loss, counts in losses if counts]

    with in_mode(model, False), torch.no_grad():
        return math.fsum(itertools.chain(*shared("the evaluation", own, parallel.group))) / len(batches)


def compiled(model: nn.Module) -> nn.Module:
    """``model`` compiled block by block, in place."""
    return compile_regions(model)
