"""The study's page and picture, from its rows."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.payoff.contestants import BY_NAME, CONTESTANTS, DECAY, DEFAULT, USUAL, Scale, Work, best_rate, sizes_of

#: the three whose curves and budgets are compared
MAIN = ("small only", "scratch", DEFAULT)
COLOURS = {"small only": "#0072B2", "scratch": "#009E73", DEFAULT: "#D55E00"}


@dataclass
class Tuned:
    """A contestant's runs at its best learning rate."""

    name: str
    budget: float
    rate: float
    rows: list[Mapping[str, Any]]

    @property
    def losses(self) -> list[float]:
        return [row["loss"] for row in self.rows]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.losses)

    @property
    def spread(self) -> float:
        """Standard deviation over the seeds."""
        return statistics.stdev(self.losses) if len(self.rows) > 1 else math.nan

    def seconds(self, steps: Mapping[str, float]) -> float:
        """Of a run, by what a step takes at each of its sizes."""
        sizes = sizes_of(BY_NAME[self.name])
        return float(sum(n * steps[size] for n, size in zip(self.rows[0]["stages"], sizes, strict=True)))


class Study:
    """What the rows say."""

    def __init__(self, kept: Mapping[str, Any], scale: Scale) -> None:
        self.rows, self.scale, self.steps = kept["rows"], scale, kept["seconds"]

    def tuned(self, name: str, factor: float = 1.0) -> Tuned | None:
        """None where the rate is not known yet."""
        budget = factor * self.scale.budget
        rate = best_rate(name, self.rows, self.scale, budget)
        if rate is None:
            return None
        works = [Work(name, rate, seed, budget) for seed in range(self.scale.seeds)]
        return Tuned(name, budget, rate, [self.rows[w.key] for w in works if w.key in self.rows])

    def saved(self, of: Tuned, name: str, *, seconds: bool = False) -> list[float] | None:
        """By each seed of a contestant: the part of another's spending to the same loss that it saves.

        The other's loss is drawn as a straight line over the logarithm of what it spends, between its budgets and on
        from the outermost.
        """
        points = []
        for factor in sorted(BY_NAME[name].budgets):
            if other := self.tuned(name, factor):
                points.append((math.log(other.seconds(self.steps) if seconds else other.budget), other.mean))
        own = of.seconds(self.steps) if seconds else of.budget
        if len(points) < 2:
            return None
        return [1 - own / math.exp(_where(points, loss)) for loss in of.losses]


def _where(points: Sequence[tuple[float, float]], loss: float) -> float:
    """Where falling points reach a loss."""
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if loss >= y1 or (x1, y1) == points[-1]:
            return x0 + (loss - y0) * (x1 - x0) / (y1 - y0)
    raise AssertionError("no points")


def write(kept: Mapping[str, Any], scale: Scale, folder: Path) -> None:
    """``payoff-SCALE.md`` in a folder, and its picture in ``images``."""
    study = Study(kept, scale)
    found = {c.name: tuned for c in CONTESTANTS if (tuned := study.tuned(c.name))}
    picture = draw(study, folder / "images")
    page = folder / f"payoff-{scale.name}.md"
    page.write_text("\n".join(_text(study, kept, found, picture)) + "\n", encoding="utf-8")
    print(f"page: {page}")


def _text(study: Study, kept: Mapping[str, Any], found: Mapping[str, Tuned], picture: bool) -> list[str]:
    scale, environment = study.scale, kept["environment"]
    digests = sorted({row["text"] for row in study.rows.values()})
    sizes = {n: f"{s['n_layer']} layers of {s['n_embd']}" for n, s in scale.sizes.items()}
    lines = [
        "# Does growing pay?",
        "",
        f"`python -m benchmarks training --scale {scale.name}`, {len(study.rows)} runs so far. A GPT on the bytes of "
        f"Python's standard library (digest {', '.join(digests)}); {scale.batch_size} × {scale.block_size} tokens a "
        f"step; large is {sizes['large']}, small {sizes['narrow']} (or, in depth, {sizes['flat']}). A run costs "
        f"{scale.budget:.0e} FLOPs, and that times the factor in the second table. The learning rate warms up over "
        f"{scale.warmup} steps, stays, and falls to zero over the last {DECAY:.0%} of the budget. For every contestant "
        "it is tuned in the same way: by factors of two on one seed until the best is not at the edge. A growth in "
        "width lowers it by the factor of the width, where nothing else is said. Growths are after "
        f"{USUAL:.0%} of the budget where nothing else is said. Loss: nats a byte on files that are not trained on, "
        "mean and standard deviation over the seeds.",
        "",
        *_verdict(study),
        "",
    ]
    if picture:
        lines += [f"![Loss against FLOPs and seconds](images/payoff-{scale.name}.png)", ""]
    lines += [
        "## Ways to spend one budget",
        "",
        "Saved: the part of the FLOPs, and of the seconds, that the tuned run from scratch needs to the same loss (its "
        "loss drawn over the logarithm of its budgets). Jump: of the validation loss, by the growth. Worst rise: of "
        f"the validation loss in the {scale.window} steps after it, over that before it; mean and worst of the seeds.",
        "",
        "| contestant | rate | seeds | loss | FLOPs saved | seconds saved | jump | worst rise |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for t in sorted(found.values(), key=lambda t: t.mean):
        rises = [row["rise"] for row in t.rows if row["rise"] is not None]
        jumps = [row["jump"] for row in t.rows if row["jump"] is not None]
        cells = [
            t.name,
            f"{t.rate:g}",
            str(len(t.rows)),
            f"{t.mean:.4f} ± {t.spread:.4f}" if len(t.rows) > 1 else f"{t.mean:.4f}",
            _percent(study.saved(t, "scratch")),
            _percent(study.saved(t, "scratch", seconds=True)),
            f"{max(jumps):.0e}" if jumps else "",
            f"{statistics.fmean(rises):+.3f}, {max(rises):+.3f}" if rises else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "## Budgets",
        "",
        "| budget | " + " | ".join(MAIN) + " | grown, against the better of both |",
        "|---|" + "---|" * (len(MAIN) + 1),
    ]
    for factor in sorted({f for name in MAIN for f in BY_NAME[name].budgets}):
        row = [study.tuned(name, factor) for name in MAIN]
        if any(row):
            cells = [f"{t.mean:.4f} ± {t.spread:.4f} ({len(t.rows)}, {t.rate:g})" if t else "" for t in row]
            small, scratch, grown = row
            both = f"{grown.mean - min(small.mean, scratch.mean):+.4f}" if small and scratch and grown else ""
            lines.append(f"| {factor:g} × | {' | '.join(cells)} | {both} |")
    if study.steps:
        times = ", ".join(f"{name} {1e3 * seconds:.1f} ms" for name, seconds in study.steps.items())
        lines += ["", f"A step takes, measured in turns in one process: {times}."]
    about = ", ".join(f"{k} {environment[k]}" for k in ("cpu", "threads", "python", "torch") if k in environment)
    return [*lines, "", f"Measured on: {about}."]


def _percent(parts: Sequence[float] | None) -> str:
    if parts is None:
        return ""
    spread = f" ± {100 * statistics.stdev(parts):.0f}" if len(parts) > 1 else ""
    return f"{100 * statistics.fmean(parts):.0f}{spread} %"


def _verdict(study: Study) -> list[str]:
    """Where growing wins against both others, and where not, in a sentence a budget; and what does better than all."""
    lines = []
    for how, alone, name in (("width", "small only", DEFAULT), ("depth", "half as deep only", "grown in depth")):
        for factor in BY_NAME[name].budgets:
            three = [study.tuned(each, factor) for each in (alone, "scratch", name)]
            if all(t and len(t.rows) > 1 for t in three):
                small, scratch, grown = three
                assert small
                assert scratch
                assert grown
                other = min(small, scratch, key=lambda t: t.mean)
                gap = other.mean - grown.mean
                error = math.hypot(other.spread, grown.spread) / math.sqrt(min(len(other.rows), len(grown.rows)))
                wins = "wins against both" if gap > 2 * error else "loses" if gap < -2 * error else "is level"
                lines.append(
                    f"- At {factor:g} × the budget growing in {how} **{wins}**: {grown.mean:.4f}, against "
                    f"{scratch.mean:.4f} from scratch and {small.mean:.4f} {small.name} (difference to the better "
                    f"{gap:+.4f}, standard error {error:.4f})."
                )
    ends = [t for c in CONTESTANTS if len(sizes_of(c)) > 1 and (t := study.tuned(c.name))]
    alone = [t for c in CONTESTANTS if len(sizes_of(c)) == 1 and c.start != "large" and (t := study.tuned(c.name))]
    best = min(alone, key=lambda t: t.mean, default=None)
    if best and ends and best.mean < min(t.mean for t in ends):
        lines.append(
            f"- **{best.name.capitalize()} does better than every growth**, {best.mean:.4f}: at this budget the large "
            "size is too large, and who is free to choose need not grow to it."
        )
    return lines


def draw(study: Study, folder: Path) -> bool:
    """Loss against FLOPs and seconds of the three main contestants, each seed's curve and each budget's end."""
    if not all(study.tuned(name) for name in MAIN):
        return False
    with common.figure(folder, f"payoff-{study.scale.name}", columns=2, size=(5.0, 3.9)) as axes:
        ends = []
        for name in MAIN:
            by_budget = [t for f in sorted(BY_NAME[name].budgets) if (t := study.tuned(name, f))]
            for panel, ax in enumerate(axes):
                xs = [t.seconds(study.steps) if panel else t.budget for t in by_budget]
                bars = [0.0 if math.isnan(t.spread) else t.spread for t in by_budget]
                style = {"color": COLOURS[name], "marker": "o", "markersize": 4, "capsize": 3}
                ax.errorbar(xs, [t.mean for t in by_budget], yerr=bars, label=name, linewidth=1.8, **style)
            main = study.tuned(name)
            assert main
            for row in main.rows:
                losses = [c[2] for c in row["curve"]]
                for ax, xs in zip(axes, ([c[1] for c in row["curve"]], _clock(study, name, row)), strict=True):
                    ax.plot(xs, losses, color=COLOURS[name], linewidth=0.6, alpha=0.6)
                ends += losses[len(losses) // 4 :]
        for ax, what in zip(axes, ("training FLOPs", "seconds of training, one thread"), strict=True):
            ax.set_xlabel(what)
            ax.set_xscale("log")
            ax.set_ylim(min(ends) - 0.05, max(ends) + 0.05)
            ax.legend(frameon=False)
        axes[0].set_ylabel("validation loss, nats a byte")
    return True


def _clock(study: Study, name: str, row: Mapping[str, Any]) -> list[float]:
    """The seconds of a curve's steps."""
    contestant, first = BY_NAME[name], row["stages"][0]
    early, late = study.steps[contestant.start], study.steps["large"]
    return [min(step, first) * early + max(0, step - first) * late for step, *_ in row["curve"]]
