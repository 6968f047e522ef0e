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
        sizes: fields of GPTConfig, by the name of a size; ``large`` is where all growths end.
        budget: FLOPs of a run.
        rates: by the size a run starts with, the learning rate around which is tuned.
        warmup: steps.
        window: steps after a growth in which the worst rise of the loss is looked for.
    """

    name: str
    device: str
    block_size: int
    batch_size: int
    sizes: Mapping[str, Sizes]
    budget: float
    rates: Mapping[str, float]
    warmup: int = 100
    window: int = 300
    seeds: int = 3


def _gpt(layers: int, heads: int, head: int) -> dict[str, int]:
    """A GPT as usual: the stream as wide as all heads, the MLP four times that."""
    width = heads * head
    return {"n_layer": layers, "n_head": heads, "n_embd": width, "n_hidden": 4 * width, "head_dim": head}


def _four(layers: int, heads: int, head: int) -> dict[str, Sizes]:
    """Large; a quarter and half of it in width; half of it in depth."""
    return {
        "large": _gpt(layers, heads, head),
        "narrow": _gpt(layers, heads // 4, head),
        "middle": _gpt(layers, heads // 2, head),
        "flat": _gpt(layers // 2, heads, head),
    }


def _rates(large: float) -> dict[str, float]:
    """The wider, the lower (Yang et al. 2022)."""
    return {"large": large, "flat": large, "middle": 2 * large, "narrow": 4 * large}


SCALES = {
    "cpu": Scale("cpu", "cpu", 64, 32, _four(4, 8, 8), 2e12, _rates(8e-3)),
    "gpu": Scale("gpu", "cuda", 256, 64, _four(12, 16, 64), 1e18, _rates(1e-3), warmup=300),
    # a glance in two minutes, one seed: for `gpu_check`
    "gpu check": Scale("gpu check", "cuda", 256, 32, _four(12, 8, 64), 4e14, _rates(1e-3), warmup=50, seeds=1),
    # does it run at all: for the tests
    "quick": Scale("quick", "cpu", 16, 4, _four(4, 8, 4), 6e8, _rates(8e-3), warmup=4, window=6, seeds=2),
}
#: the part of the budget over which the learning rate falls to zero
DECAY = 0.25


@dataclass(frozen=True)
class Hop:
    """A growth: after which part of the budget, by what operations, to which of the scale's sizes."""

    at: float
    operations: Sequence[Mapping[str, Any]]
    policy: Mapping[str, Any] = field(default_factory=dict)
    to: str = "large"


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


#: where a growth is, in parts of the budget, if nothing else is said
USUAL = 0.2


def widen(factor: int = 4, *, noise: float = 2.0, rate: bool = True, **options: Any) -> list[dict[str, Any]]:
    """Every axis so many times as large, and the learning rate as many times lower.

    Args:
        noise: its standard deviation, in those of the weights.
    """
    noisy = {"noise": {"scale": noise, "relative": True}} if noise and options.get("fill") != "add" else {}
    axes = ("transformer.h.*.mlp/hidden", "transformer.h.*.attn/heads", "./residual")
    lower = [{"op": "learning_rate", "scale": 1 / factor}] if rate else []
    return [*({"op": "widen", "axis": axis, "factor": factor, **noisy, **options} for axis in axes), *lower]


def deepen(**options: Any) -> list[dict[str, Any]]:
    return [{"op": "deepen", "stack": "transformer.h", "factor": 2, **options}]


#: of new entries: they are at the common learning rate after so many steps
POLICY = {"policy": "asymmetric", "warmup": 50}


def _wide(name: str, policy: Mapping[str, Any] = POLICY, *, at: float = USUAL, **options: Any) -> Contestant:
    return Contestant(name, "narrow", [Hop(at, widen(**options), policy)])


def _deep(name: str, **options: Any) -> Contestant:
    return Contestant(name, "flat", [Hop(USUAL, deepen(**options))])


DEFAULT = "grown in width"
CONTESTANTS = [
    Contestant("scratch", budgets=(0.5, 1.0, 2.0, 4.0)),
    Contestant("small only", "narrow", budgets=(0.5, 1.0, 2.0)),
    Contestant(DEFAULT, "narrow", [Hop(USUAL, widen(), POLICY)], budgets=(0.5, 1.0, 2.0)),
    _wide("noise of 0.1", noise=0.1),
    _wide("one rate throughout", rate=False),
    Contestant("naive", "narrow", [Hop(USUAL, [])], naive=True),
    _wide("state dropped", {"policy": "reset"}),
    _wide("state copied", {"policy": "copy"}),
    _wide("state exact, ramp of 250", {"policy": "exact", "ramp": 250}),
    _wide("fill: add", fill="add"),
    _wide("warm-up of 250 steps", {"warmup": 250}),
    _wide("new entries at once", {"warmup": 0, "peak": 1.0}),
    _wide("noise of 4", noise=4.0),
    _wide("without noise", noise=0.0),
    _wide("early, at 0.1", at=0.1),
    _wide("late, at 0.5", at=0.5),
    Contestant("two hops", "narrow", [Hop(0.1, widen(2), POLICY, to="middle"), Hop(0.25, widen(2), POLICY)]),
    Contestant("half as wide only", "middle"),
    Contestant("half as deep only", "flat"),
    _deep("grown in depth"),
    _deep("depth by gates", init="gate"),
    _deep("depth by copies (lossy)", init="stack", preserve="lossy"),
    Contestant("scratch, Muon", optimizer="muon"),
    Contestant("small only, Muon", "narrow", optimizer="muon"),
    Contestant("grown in width, Muon", "narrow", [Hop(USUAL, widen(), POLICY)], optimizer="muon"),
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


def sizes_of(contestant: Contestant) -> list[str]:
    """The names of the sizes that a contestant's model goes through."""
    return [contestant.start, *(hop.to for hop in contestant.hops)]


Rows = Mapping[str, Mapping[str, Any]]


def best_rate(name: str, rows: Rows, scale: Scale, budget: float | None = None) -> float | None:
    """The learning rate that a contestant does best with on the first seed; None while that is not known.

    Tried are the rate of the size it starts with, twice and half of it, and on from there as long as the best is at the
    edge.
    """
    return _tuned(name, rows, scale, scale.budget if budget is None else budget)[0]


def _tuned(name: str, rows: Rows, scale: Scale, budget: float) -> tuple[float | None, list[Work]]:
    middle = scale.rates[BY_NAME[name].start]
    rates = [middle / 2, middle, middle * 2]
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
