"""``fxgrow train``: a task, growing by its schedule."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from fxgrow.cli.console import out, say
from fxgrow.cli.options import Config
from fxgrow.errors import SpecError


def train(
    task: Annotated[
        str,
        typer.Argument(help="package.module:callable that returns a fxgrow.training.Task.", show_default=False),
    ],
    out_: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for log and checkpoints.", show_default=False)
    ] = None,
    config: Config = None,
    hyper: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Hyper-parameter of the run, as in steps=500; repeat it."),
    ] = None,
    schedule: Annotated[Path | None, typer.Option(help="When and how to grow, instead of the task's own.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in --out.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Begin anew in an --out that holds a run already.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what the schedule will make of the run, and train nothing.")
    ] = False,
    stop_at: Annotated[int | None, typer.Option(help="Stop with a checkpoint after this many steps.")] = None,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0 leaves it to PyTorch.")] = 0,
) -> None:
    """Train a task, growing by its schedule, with progress, a log and checkpoints.

    \b
    fxgrow train examples.gpt.train:task --out out/run --hyper steps=300
    fxgrow train examples.gpt.train:task --out out/run --resume
    fxgrow train examples.gpt.train:task --schedule mine.yaml --dry-run
    torchrun --nproc-per-node 2 -m fxgrow train examples.gpt.train:task --out out/run --hyper accumulation=4
    """
    import torch

    from fxgrow import training
    from fxgrow.cli.models import call, parse_settings
    from fxgrow.ranks import together

    with training.launched() as first:
        with together("the task"):
            made = call(task, parse_settings(config or ()))
            if not isinstance(made, training.Task):
                raise SpecError(f"{task!r} returned a {type(made).__name__}, not a fxgrow.training.Task")
            changes = parse_settings(hyper or (), "--hyper")
            made = dataclasses.replace(made, hyper=training.hyper_of(changes, made.hyper, "--hyper"))
            if schedule is not None:
                made = dataclasses.replace(made, schedule=schedule)
            if out_ is None and not dry_run:
                raise SpecError("give --out, the folder for log and checkpoints, or --dry-run")
        if threads:
            torch.set_num_threads(threads)
        console = out()
        console.quiet = not first
        if dry_run or out_ is None:
            console.print(
                str(training.planned(training.begin(made, Path(), None, training.Parallel.here(made)))),
                highlight=False,
                soft_wrap=True,
            )
            return
        try:
            run = training.train(made, out_, resume=resume, overwrite=overwrite, stop_at=stop_at, console=console)
        except KeyboardInterrupt:
            if first:
                say().print(f"interrupted; go on with --resume --out {out_}", soft_wrap=True)
            raise typer.Exit(130) from None
        if run.step < made.hyper.steps:
            console.print(f"stopped after {run.step} steps; go on with --resume --out {out_}", soft_wrap=True)
        else:
            console.print(f"{run.step} steps, validation loss {run.val_loss:.4f}; log and checkpoints in {out_}")
