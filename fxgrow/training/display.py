"""What a run shows on the terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fxgrow.training.counting import count_parameters
from fxgrow.training.run import Run


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
    error = line["receipt"]["error_float64"]
    return (
        f"[bold]grown: {escape(line['name'])}[/bold], {human(line['parameters_before'])} → "
        f"{human(line['parameters'])} parameters, in {line['took']:.1f} s\n"
        f"       val {line['val_loss_before']:.6f} → {line['val_loss_after']:.6f}, moved by {line['moved']:.1e}"
        + (f"; float64 error {error:.1e}" if error is not None else "")
    )


def describe_action(line: Mapping[str, Any]) -> str:
    """One line, with rich's markup."""
    if line.get("error"):
        return f"[bold]left out: {escape(line['name'])}[/bold], {line['op']}: {escape(line['error'])}"
    changes = [f"{k} {line['before'].get(k, '')} → {v}".replace("  ", " ") for k, v in line["after"].items()]
    what = ", ".join(changes) or ", ".join(f"{k} {v}" for k, v in line["what"].items() if k != "op")
    return f"[bold]{escape(line['name'])}[/bold]: {line['op']} {escape(what)}".rstrip()


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
