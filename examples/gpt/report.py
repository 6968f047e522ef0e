"""Picture and one-page report of a run, from its log alone.

python -m examples.gpt.report out/demo
"""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import torch
import typer

from fxgrow.training import human, read_log

matplotlib.use("Agg")  # a picture in a file needs no display
import matplotlib.pyplot as plt

Line = dict[str, Any]
# Okabe and Ito's palette: distinguishable with every common kind of colour blindness, and by brightness in print
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#999999"


def write_report(out: str | Path) -> tuple[Path, Path]:
    """Write ``loss.png`` and ``report.md`` beside the ``log.jsonl`` of ``out``; returns their paths.

    Raises:
        ValueError: the log holds no evaluation yet.
    """
    out = Path(out)
    lines = read_log(out / "log.jsonl")
    if not any(line["event"] == "eval" for line in lines):
        raise ValueError(f"{out / 'log.jsonl'} holds no evaluation yet")
    picture, report = out / "loss.png", out / "report.md"
    other = out / "scratch" / "log.jsonl"
    scratch = read_log(other) if other.is_file() else []
    draw(lines, scratch, picture)
    report.write_text(text(lines, scratch, out, picture), encoding="utf-8")
    return picture, report


def events(lines: list[Line], name: str) -> list[Line]:
    return [line for line in lines if line["event"] == name]


def draw(lines: list[Line], scratch: list[Line], path: Path) -> None:
    """Loss against training FLOPs, each growth marked and labelled; and the run from scratch where there is one."""
    growths = events(lines, "growth")
    # a growth is a point of the curve too: its loss just before and just after, at the same place
    evals = [line for line in events(lines, "eval") if line["flops"] > 0]
    steps = [line for line in events(lines, "step") if line["flops"] > 0]
    figure, axes = plt.subplots(figsize=(9, 5.2), dpi=140)
    axes.plot(
        [line["flops"] for line in steps],
        [line["loss"] for line in steps],
        color=GREY,
        linewidth=0.8,
        alpha=0.8,
        label="training loss (each batch)",
        zorder=1,
    )
    axes.plot(
        [line["flops"] for line in evals],
        [line["val_loss"] for line in evals],
        color=BLUE,
        linewidth=2,
        marker="o",
        markersize=3.5,
        label="validation loss (same batches every time)",
        zorder=3,
    )
    if scratch:
        points = [line for line in events(scratch, "eval") if line["flops"] > 0]
        axes.plot(
            [line["flops"] for line in points],
            [line["val_loss"] for line in points],
            color=GREEN,
            linewidth=1.6,
            linestyle=":",
            marker="s",
            markersize=3.5,
            label="validation loss, final size from scratch",
            zorder=2,
        )
    if evals:  # the first steps, where the loss falls from that of guessing, would take most of the picture
        losses = [line["val_loss"] for line in evals]
        pad = max(losses) - min(losses) or 1.0
        axes.set_ylim(min(losses) - 0.25 * pad, max(losses) + 0.45 * pad)
        axes.set_xlim(evals[0]["flops"] / 1.15, evals[-1]["flops"] * 1.15)
    for line in growths:
        axes.axvline(line["flops"], color=ORANGE, linestyle="--", linewidth=1.2, zorder=2)
        axes.annotate(
            f"{line['name']}  {human(line['parameters_before'])} → {human(line['parameters'])}",
            xy=(line["flops"], 0.985),
            xycoords=("data", "axes fraction"),
            xytext=(-4, 0),
            textcoords="offset points",
            rotation=90,
            ha="right",
            va="top",
            fontsize=8.5,
            color=ORANGE,
        )
    if growths:
        axes.plot(
            [line["flops"] for line in growths],
            [line["val_loss_after"] for line in growths],
            linestyle="none",
            marker="D",
            markersize=6.5,
            markerfacecolor="white",
            markeredgecolor=ORANGE,
            markeredgewidth=1.6,
            label="growth: validation loss right before and right after",
            zorder=4,
        )
    axes.set_xscale("log")
    axes.set_xlabel("training compute so far, FLOPs (log scale; measured, forward and backward)")
    axes.set_ylabel("loss, nats per byte")
    axes.grid(True, which="major", color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower left", frameon=True, framealpha=0.95, edgecolor="none", fontsize=8.5)
    last = events(lines, "eval")[-1]
    moved = f", no growth moved the loss by more than {max(g['moved'] for g in growths):.1e}" if growths else ""
    axes.set_title(f"A GPT grown while it trains: validation loss {last['val_loss']:.3f}{moved}", fontsize=11)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def number(value: float | None, form: str = ".1e") -> str:
    return "not measured" if value is None else format(value, form)


def parted(lines: list[Line], growth: Line) -> str:
    """One table row: how far what a growth made has moved by the last evaluation before the next growth."""
    after = [line for line in events(lines, "growth") if line["index"] > growth["index"]]
    until = after[0]["step"] if after else None
    seen = [
        line
        for line in events(lines, "eval")
        if line["step"] > growth["step"] and (until is None or line["step"] <= until)
    ]
    if not seen:
        return f"| {growth['name']} | – | not trained on | | |"
    line = seen[-1]
    copies = line.get("copies")
    return (
        f"| {growth['name']} | {line['step'] - growth['step']} | "
        + (f"{copies} | {line['apart_max']:.1e} | {line['apart_min']:.1e} |" if copies else "– | – | – |")
        + (f" {line['zero_max']:.1e} |" if "zero_max" in line else " – |")
    )


def compared(scratch: list[Line]) -> str:
    """What the run says, and does not say, of training from scratch."""
    if not events(scratch, "eval"):
        return "It does not compare with a model trained from scratch at its full size, and claims no savings."
    last = events(scratch, "eval")[-1]
    return (
        f"The final size trained from scratch with {human(last['flops'], 'FLOP')} reaches {last['val_loss']:.4f}. One "
        "run of each, at this tiny scale and with one set of hyper-parameters, supports no claim of savings."
    )


def text(lines: list[Line], scratch: list[Line], out: Path, picture: Path) -> str:
    """The report as Markdown."""
    start = events(lines, "start")[0]
    hyper, growths, last = start["hyper"], events(lines, "growth"), events(lines, "eval")[-1]
    page = [
        f"# {start['name']}",
        "",
        f"{last['step']} steps, {human(last['tokens'], 'bytes')} of text seen, {human(last['flops'], 'FLOP')} to train "
        f"in {last['seconds']:.0f} s. From {human(start['parameters'])} to {human(last['parameters'])} parameters in "
        f"{len(growths)} growths. **Final validation loss {last['val_loss']:.4f}** nats per byte.",
        "",
        f"![loss against FLOPs]({picture.name})",
        "",
        "## Growths",
        "",
        "Validation loss on the same batches right before and right after each growth, in the model's own precision. "
        "The float64 error is the largest relative difference of the two modules' outputs, measured by the compiler. "
        "Seconds: capture, planning, new weights, verification and optimizer together.",
        "",
        "| step | growth | parameters | loss before | loss after | difference | float64 error | seconds |",
        "|---:|---|---|---:|---:|---:|---:|---:|",
    ]
    for line in growths:
        page.append(
            f"| {line['step']} | {line['name']} | {line['parameters_before']:,} → {line['parameters']:,} "
            f"| {line['val_loss_before']:.6f} | {line['val_loss_after']:.6f} | {line['moved']:.1e} "
            f"| {number(line['receipt']['error_float64'])} | {line['took']:.1f} |"
        )
    page += [
        "",
        "## Have the copies parted?",
        "",
        "Right after a widening, many rows and columns of the weights are equal to the bit: the copies of one unit. "
        "*Steps* later (before the next growth), the largest difference between any two copies, and the largest "
        "difference within the pair that has parted least. For a deepening: the weights that began "
        "at zero, and the smallest of their largest elements now.",
        "",
        "| growth | steps | pairs | largest difference | least parted pair | zero at first, now |",
        "|---|---:|---:|---:|---:|---:|",
        *(parted(lines, growth) for growth in growths),
        "",
    ]
    for line in events(lines, "strict_load")[-1:]:
        sizes = ", ".join(f"{k} {line['config'][k]}" for k in ("n_layer", "n_head", "head_dim", "n_embd", "n_hidden"))
        page += [
            "## The grown model is an ordinary GPT",
            "",
            f"Its state dict loads with `strict=True` into `GPT({sizes})`; largest difference of the logits between "
            f"that and the compiler's module: {line['difference']:.1e}.",
            "",
        ]
    for line in events(lines, "sample")[-1:]:
        page += ["## What it writes", "", *("    " + row for row in line["text"].splitlines()), ""]
    page += [
        "## To be read with care",
        "",
        "- This run shows that growing is exact and that training goes on; it does not show that growing pays. At its "
        "size and budget the small model alone, trained for as many FLOPs, is the better one: `docs/payoff-cpu.md` is "
        "a study of where growing pays, and `python -m benchmarks training` makes it. " + compared(scratch),
        f"- Gradients are clipped by their global norm ({hyper['clip']:g}), which is not invariant under growth: the "
        "gradient of a grown model has another norm although the function is the same, so the first updates after a "
        "growth are clipped differently. The growth itself is exact all the same.",
        "- FLOPs are those of PyTorch's operators counted on one step of each module; evaluation is left out.",
        "",
        "## Again",
        "",
        f"    python -m examples.gpt.train --out {out} --steps {hyper['steps']} --seed {hyper['seed']}",
        f"    python -m examples.gpt.report {out}",
        "",
        f"Python {platform.python_version()}, PyTorch {torch.__version__}, {torch.get_num_threads()} threads. All "
        "figures: `log.jsonl`. Weights: `checkpoints/`.",
        "",
        "<details><summary>Hyper-parameters</summary>",
        "",
        f"`{json.dumps(hyper)}`",
        "",
        "</details>",
        "",
    ]
    return "\n".join(page)


def main(
    out: Annotated[Path, typer.Argument(help="Folder of a run, with its log.jsonl.")] = Path("out/demo"),
) -> None:
    """Write the picture and the report of a run again, from its log."""
    for path in write_report(out):
        print(path)


if __name__ == "__main__":
    typer.run(main)
