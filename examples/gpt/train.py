"""Train a small GPT on English text and grow it while it learns.

    python -m examples.gpt.train --out out/demo

The model is :mod:`examples.gpt.model`, the text :mod:`examples.gpt.data`, the growths ``schedule.yaml``, and the loop
:func:`fxgrow.training.train`. This file puts them together, and checks at the end that what has grown is an ordinary
GPT: its state dict loads with ``strict=True`` into ``GPT(larger config)``, which gives the same outputs.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor, nn

from examples.gpt.data import VOCAB_SIZE, Text, decode, encode
from examples.gpt.model import GPT, GPTConfig
from examples.gpt.report import write_report
from fxgrow.errors import FxgrowError
from fxgrow.schedule import Schedule
from fxgrow.training import Log, Run, Task, hyper_of, seeded, train

SCHEDULE = Path(__file__).with_name("schedule.yaml")
STEPS = 1200


def task(
    text: Path | None = None,
    schedule: Any = SCHEDULE,
    config: GPTConfig | None = None,
    batch_size: int = 16,
    **hyper: Any,
) -> Task:
    """The example as a task; also for ``fxgrow train examples.gpt.train:task``."""
    config = config or GPTConfig(vocab_size=VOCAB_SIZE)
    defaults = {"steps": STEPS, "learning_rate": 3e-3, "min_learning_rate": 3e-4, "eval_every": 50}
    settings = hyper_of(defaults | hyper)
    data = Text(text, config.block_size, batch_size)
    torch.manual_seed(settings.seed)
    return Task(
        model=GPT(config),
        batches=data.batch,
        hyper=settings,
        schedule=schedule,
        # two samples, shorter than a block, are enough to capture the graph: batch and time stay dynamic
        example=lambda batch: (tuple(t[:2, : config.block_size // 2] for t in batch), {}),
        epoch_tokens=len(data.splits["train"]),
        name=f"GPT on {data.name}",
    )


def plain_gpt(module: nn.Module, config: GPTConfig) -> GPT:
    """``GPT(config)`` with the parameters of ``module``, loaded strictly."""
    model = GPT(config)
    model.load_state_dict(module.state_dict(), strict=True)
    return model


@torch.no_grad()
def difference(module: nn.Module, model: nn.Module, batch: tuple[Tensor, ...]) -> float:
    """Largest absolute difference of the logits of two models, in eval mode."""
    return float((module.eval()(*batch)[0] - model.eval()(*batch)[0]).abs().max())


def sample(model: GPT, prompt: str, length: int, seed: int) -> str:
    """``prompt`` and ``length`` more bytes, temperature 0.8."""
    tokens = model.eval().generate(encode(prompt)[None], length, 0.8, 40, seeded(seed, "sample", 0))[0]
    # a model that has learnt little writes control characters, which a terminal would obey
    return "".join(c if c.isprintable() or c in "\n\t" else "�" for c in decode(tokens))


def from_scratch(run: Run, config: GPTConfig, text: Path | None, batch_size: int, console: Console) -> None:
    """Train ``GPT(config)`` from new weights for the FLOPs of ``run``, same hyper-parameters; log in ``scratch``."""
    hyper = dataclasses.asdict(run.task.hyper)
    hyper["steps"] = max(1, round(run.flops / (run.flops_per_batch * run.accumulation)))
    console.rule(f"from scratch at full size: {hyper['steps']} steps for the same FLOPs")
    train(task(text, None, config, batch_size, **hyper), run.out / "scratch", overwrite=True, console=console)


def finish(run: Run, grown: GPTConfig, console: Console) -> None:
    """What comes after training: the grown module as a plain GPT, a sample, and the report."""
    batch = run.task.batches("val", seeded(run.task.hyper.seed, "val", 0))
    module, model = run.model.cpu(), plain_gpt(run.model, grown)
    apart = difference(module, model, batch)
    text = sample(model, "The ", 400, run.task.hyper.seed)
    log = Log(run.out / "log.jsonl", append=True)
    log.write("sample", text=text)
    log.write("strict_load", step=run.step, config=dataclasses.asdict(grown), difference=apart)
    log.close()
    console.rule("what it writes now")
    console.print(text, markup=False, highlight=False)
    console.rule()
    picture, report = write_report(run.out)
    console.print(
        f"The grown state dict loads with strict=True into GPT({grown.n_layer} layers, {grown.n_head} heads, stream "
        f"{grown.n_embd}, MLP {grown.n_hidden}); largest difference of the logits: {apart:.1e}",
        highlight=False,
    )
    console.print(f"picture  {picture}\nreport   {report}", highlight=False, soft_wrap=True)


def fail(error: Exception) -> typer.Exit:
    """Say what is wrong in one line; a traceback helps nobody here."""
    print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
    return typer.Exit(1)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="Folder for log, checkpoints, picture and report.")] = Path("out/demo"),
    text: Annotated[
        Path | None, typer.Option(help="A text file to learn from; without it, Python's own help texts.")
    ] = None,
    schedule: Annotated[
        Path, typer.Option(help="When and how to grow (YAML).", show_default="schedule.yaml beside this file")
    ] = SCHEDULE,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = STEPS,
    batch_size: Annotated[int, typer.Option(min=2, help="Samples in a micro-batch.")] = 16,
    accumulation: Annotated[int, typer.Option(min=1, help="Micro-batches per step.")] = 1,
    learning_rate: Annotated[float, typer.Option(help="Peak of the cosine schedule.")] = 3e-3,
    clip: Annotated[float, typer.Option(min=0, help="Largest gradient norm; 0 turns clipping off.")] = 1.0,
    eval_every: Annotated[int, typer.Option(min=1, help="Steps between evaluations.")] = 50,
    checkpoint_every: Annotated[int, typer.Option(min=0, help="Steps between checkpoints; 0: at the end.")] = 200,
    seed: Annotated[int, typer.Option(help="Of the weights and the batches.")] = 0,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0 leaves it to PyTorch.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in --out.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Begin anew in an --out that holds a run already.")
    ] = False,
    stop_at: Annotated[int | None, typer.Option(help="Stop with a checkpoint after this many steps.")] = None,
    scratch: Annotated[
        bool, typer.Option("--from-scratch", help="Also train the final size from scratch, for as many FLOPs.")
    ] = False,
    compile: Annotated[bool, typer.Option("--compile", help="Use torch.compile (needs a C++ compiler).")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, …")] = "cpu",
) -> None:
    """Train a small GPT on English text and grow it, exactly, while it learns."""
    console = Console()
    if threads:
        torch.set_num_threads(threads)
    config = GPTConfig(vocab_size=VOCAB_SIZE)
    try:
        job = task(
            text,
            Schedule.parse(schedule),
            config,
            batch_size,
            steps=steps,
            accumulation=accumulation,
            learning_rate=learning_rate,
            min_learning_rate=learning_rate / 10,
            clip=clip,
            eval_every=eval_every,
            checkpoint_every=checkpoint_every,
            seed=seed,
            compile=compile,
            device=device,
        )
    except (FxgrowError, OSError, ValueError) as error:
        raise fail(error) from None
    console.print(f"{job.name}; growing by {schedule.name}; log and checkpoints in {out}", highlight=False)
    if not resume:  # of an earlier run in the same folder
        (out / "scratch" / "log.jsonl").unlink(missing_ok=True)
    try:
        run = train(job, out, resume=resume, overwrite=overwrite, stop_at=stop_at, console=console)
    except FxgrowError as error:
        raise fail(error) from None
    except KeyboardInterrupt:
        console.print(f"interrupted; go on with --resume --out {out}", highlight=False)
        raise typer.Exit(130) from None
    if run.step < steps:
        console.print(f"stopped after {run.step} steps; go on with --resume --out {out}", highlight=False)
        return
    model: Any = run.model
    grown = model.config  # grown in place, it is a GPT still, and its config says which
    if scratch:
        from_scratch(run, grown, text, batch_size, console)
    finish(run, grown, console)


if __name__ == "__main__":
    app()
