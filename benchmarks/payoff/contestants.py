"""Who competes, and what is still to be run: every contestant is tuned in the same way.

All that grow end at the same size, that of ``scratch``, and have the same budget of FLOPs. The learning rate warms up,
stays, and falls to zero over the last quarter of the budget, so that runs of other budgets, and with other growths,
share the part before (warm-up, stable, decay; Hägele et al. 2024).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Sizes = Mapping[str, int]


@dataclass(frozen=True)
class Scale:
    """Sizes at which the study is run.

    Attributes:
        block_size, batch_size: tokens of a sample, samples of a step.
        starts: fields of GPTConfig, by the name of a size; ``large`` is where all growths end.
        budget: FLOPs of a run.
        rate: the learning rate around which is tuned.
        warmup: steps.
        window: steps after a growth in which the worst rise of the loss is looked for.
    """

    name: str
    device: str
    block_size: int
    batch_size: int
    starts: Mapping[str, Sizes]
    budget: float
    rate: float
    warmup: int = 100
    window: int = 300
    seeds: int = 3


def _sizes(layers: int, heads: int, width: int, hidden: int, head: int) -> dict[str, int]:
    return {"n_layer": layers, "n_head": heads, "n_embd": width, "n_hidden": hidden, "head_dim": head}


SCALES = {
    "cpu": Scale(
        "cpu",
        "cpu",
        64,
        32,
        {"large": _sizes(4, 4, 64, 256, 16), "narrow": _sizes(4, 2, 32, 128, 16), "flat": _sizes(2, 4, 64, 256, 16)},
        4e12,
        8e-3,
    ),
    "gpu": Scale(
        "gpu",
        "cuda",
        256,
        64,
        {
            "large": _sizes(12, 12, 768, 3072, 64),
            "narrow": _sizes(12, 6, 384, 1536, 64),
            "flat": _sizes(6, 12, 768, 3072, 64),
        },
        4e17,
        1e-3,
        warmup=300,
    ),
    # does it run at all: for the tests
    "quick": Scale(
        "quick",
        "cpu",
        16,
        4,
        {"large": _sizes(4, 4, 16, 32, 4), "narrow": _sizes(4, 2, 8, 16, 4), "flat": _sizes(2, 4, 16, 32, 4)},
        6e8,
        8e-3,
        warmup=4,
        window=6,
        seeds=2,
    ),
}
#: the part of the budget over which the learning rate falls to zero
DECAY = 0.25


@dataclass(frozen=True)
class Hop:
    """A growth: after which part of the budget, by what operations, which sizes become large by it; all if none."""

    at: float
    operations: Sequence[Mapping[str, Any]]
    policy: Mapping[str, Any] = field(default_factory=dict)
    to: Sequence[str] = ()


@dataclass(frozen=True)
class Contestant:
    """A way to spend the budget.

    Attributes:
        naive: the seed documents' growth, in place of ``hops[0].operations``: weights repeated, a new optimizer.
        budgets: at which it is also run, as factors of the scale's.
    """

    name: str
    start: str = "large"
    hops: Sequence[Hop] = ()
    optimizer: str = "adamw"
    naive: bool = False
    budgets: Sequence[float] = (1.0,)


def widen(*axes: str, noise: bool = True, **options: Any) -> list[dict[str, Any]]:
    """Every one of some axes twice as large."""
    noisy = {"noise": {"scale": 0.1, "relative": True}} if noise and options.get("fill") != "add" else {}
    return [{"op": "widen", "axis": axis, "factor": 2, **noisy, **options} for axis in axes]


HIDDEN, HEADS, STREAM = "transformer.h.*.mlp/hidden", "transformer.h.*.attn/heads", "./residual"
WIDTH = (HIDDEN, HEADS, STREAM)


def deepen(**options: Any) -> list[dict[str, Any]]:
    return [{"op": "deepen", "stack": "transformer.h", "factor": 2, **options}]


def _wide(name: str, policy: Mapping[str, Any] | None = None, *, at: float = 0.5, **options: Any) -> Contestant:
    return Contestant(name, "narrow", [Hop(at, widen(*WIDTH, **options), policy or {})])


def _deep(name: str, **options: Any) -> Contestant:
    return Contestant(name, "flat", [Hop(0.5, deepen(**options))])


DEFAULT = "grown in width"
CONTESTANTS = [
    Contestant("scratch", budgets=(0.5, 1.0, 2.0, 4.0)),
    Contestant("small only", "narrow", budgets=(0.5, 1.0, 2.0)),
    Contestant(DEFAULT, "narrow", [Hop(0.5, widen(*WIDTH))], budgets=(0.5, 1.0, 2.0)),
    _wide("without noise", noise=False),
    _wide("fill: add", fill="add"),
    _wide("state copied", {"policy": "copy"}),
    _wide("state exact, ramp 250", {"policy": "exact", "ramp": 250}),
    _wide("state dropped", {"policy": "reset"}),
    Contestant("naive", "narrow", [Hop(0.5, [])], naive=True),
    _wide("new entries at 1 ×", {"peak": 1.0}),
    _wide("new entries at 2 ×", {"peak": 2.0}),
    _wide("warm-up of 50 steps", {"warmup": 50}),
    _wide("early, at 0.25", at=0.25),
    _wide("late, at 0.7", at=0.7),
    Contestant(
        "three hops",
        "narrow",
        [
            Hop(0.25, widen(HIDDEN), to=["n_hidden"]),
            Hop(0.4, widen(HEADS), to=["n_head"]),
            Hop(0.55, widen(STREAM)),
        ],
    ),
    Contestant("small only, in depth", "flat"),
    _deep("grown in depth"),
    _deep("depth by gates", init="gate"),
    _deep("depth by copies (lossy)", init="stack", preserve="lossy"),
    Contestant("scratch, Muon", optimizer="muon"),
    Contestant("small only, Muon", "narrow", optimizer="muon"),
    Contestant("grown in width, Muon", "narrow", [Hop(0.5, widen(*WIDTH))], optimizer="muon"),
]
BY_NAME = {contestant.name: contestant for contestant in CONTESTANTS}


@dataclass(frozen=True)
class Work:
    """One run."""

    contestant: str
    rate: float
    seed: int
    budget: float

    @property
    def key(self) -> str:
        return f"{self.contestant} | {self.rate:g} | {self.seed} | {self.budget:g}"


def sizes_of(scale: Scale, contestant: Contestant) -> list[Sizes]:
    """What a contestant's model is like, from each growth to the next."""
    large, now = scale.starts["large"], dict(scale.starts[contestant.start])
    found: list[Sizes] = [now]
    for hop in contestant.hops:
        now = {**now, **{name: large[name] for name in hop.to}} if hop.to else dict(large)
        found.append(now)
    return found


Rows = Mapping[str, Mapping[str, Any]]


def best_rate(name: str, rows: Rows, scale: Scale, budget: float | None = None) -> float | None:
    """The learning rate that a contestant does best with on the first seed; None while that is not known.

    Tried are the scale's rate, twice and half of it, and on from there as long as the best is at the edge.
    """
    return _tuned(name, rows, scale, scale.budget if budget is None else budget)[0]


def _tuned(name: str, rows: Rows, scale: Scale, budget: float) -> tuple[float | None, list[Work]]:
    rates = [scale.rate / 2, scale.rate, scale.rate * 2]
    while True:
        works = [Work(name, rate, 0, budget) for rate in rates]
        if missing := [work for work in works if work.key not in rows]:
            return None, missing
        losses = [rows[work.key]["loss"] for work in works]
        best = losses.index(min(losses))
        if 0 < best < len(rates) - 1 or len(rates) > 6:
            return rates[best], []
        rates = [rates[0] / 2, *rates] if best == 0 else [*rates, rates[-1] * 2]


def pending(rows: Rows, scale: Scale, names: Sequence[str], factors: Sequence[float]) -> Iterator[Work]:
    """What is to be run next, as far as it is known already: rates on the first seed, then the other seeds."""
    for name in names:
        for factor in factors:
            if factor in BY_NAME[name].budgets:
                budget = factor * scale.budget
                rate, missing = _tuned(name, rows, scale, budget)
                yield from missing
                if rate is not None:
                    works = [Work(name, rate, seed, budget) for seed in range(1, scale.seeds)]
                    yield from (work for work in works if work.key not in rows)
