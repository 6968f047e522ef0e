"""The cost of per-slice rates: an optimizer's step with them, without, and after them.

The same parameters, gradients and state stand thrice in one process: under an optimizer without rates, one whose new
entries warm up or that follows the small model, and one whose warm-up is over. They take turns, so that whatever else
the machine does disturbs all alike; ratios are taken round by round. Shapes are those of a GPT whose hidden width,
heads and stream were doubled (all, or the hidden width alone); and matrices of which half the rows, half the columns or
both are new, or every second column. Memory is the most that one step takes on top of what is there before, over the
bytes of the parameters.
"""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import torch
from torch import nn

import fxgrow
from benchmarks import common
from examples.gpt.model import GPT, GPTConfig
from fxgrow.optim.rates import write_rates
from fxgrow.optim.slices import Slice, SliceRates

#: name -> (sizes before the growth, example batch)
SHAPES: dict[str, GPTConfig] = {
    "tiny": GPTConfig(block_size=16, vocab_size=64, n_layer=2, n_head=2, n_embd=32),
    "small": GPTConfig(block_size=64, vocab_size=512, n_layer=4, n_head=4, n_embd=256),
    "gpt2, 4 layers": GPTConfig(block_size=64, vocab_size=8192, n_layer=4, n_head=12, n_embd=768),
}
SPECS: dict[str, list[dict[str, Any]]] = {
    "hidden": [{"op": "widen", "axis": "*/hidden", "factor": 2}],
    "hidden, heads, stream": [{"op": "widen", "axis": f"*/{a}", "factor": 2} for a in ("hidden", "heads", "residual")],
}
WAYS: dict[str, dict[str, Any]] = {
    "warm-up": {"policy": "asymmetric", "warmup": 10**6},
    "exact": {"policy": "exact"},
    "after": {"policy": "asymmetric", "warmup": 1},
}


def _grown(shape: str, spec: str, fused: bool) -> tuple[fxgrow.Growth, torch.optim.AdamW]:
    """A growth, and the small model's optimizer after one step."""
    config = SHAPES[shape]
    tokens = torch.randint(0, config.vocab_size, (2, config.block_size))
    small = GPT(config)
    optimizer = torch.optim.AdamW(small.parameters(), lr=1e-4, fused=fused)
    for p in small.parameters():
        p.grad = torch.randn_like(p).mul_(1e-3)
    optimizer.step()
    optimizer.zero_grad()
    return fxgrow.grow(small, SPECS[spec], (tokens, tokens), verify=False), optimizer


def measure(shape: str, spec: str, fused: bool, threads: int, repeats: int) -> dict[str, Any]:
    """Time the steps in one process; CPU and wall seconds of each round, and peak bytes."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    growth, optimizer = _grown(shape, spec, fused)
    carried = {"none": growth.carry(optimizer, "copy")}
    carried.update({name: growth.carry(optimizer, **how) for name, how in WAYS.items()})
    sizes = {"parameters": sum(p.numel() * p.element_size() for p in growth.module.parameters())}
    for name, one in carried.items():  # each has parameters of its own
        own = {p: nn.Parameter(p.detach().clone()) for group in one.param_groups for p in group["params"]}
        for group in one.param_groups:
            group["params"] = [own[p] for p in group["params"]]
        state = {own[p]: s for p, s in one.state.items()}
        one.state.clear()
        one.state.update(state)
        for p in own.values():
            p.grad = torch.randn_like(p).mul_(1e-3)
        for _ in range(3):  # the warm-up of the last is over, and its hooks are gone
            one.step()
        hooks = len(one._optimizer_step_pre_hooks) + len(one._optimizer_step_post_hooks)
        assert bool(hooks) == (name in ("warm-up", "exact")), f"{name} has {hooks} hooks"
    del growth, optimizer
    gc.collect()
    steps = {name: one.step for name, one in carried.items()}
    times = common.side_by_side(steps, repeats, warmup=1)
    return {"shape": shape, "spec": spec, "fused": fused, "times": times, **sizes}


def matrices(fused: bool, threads: int, repeats: int, rows: int = 1536, columns: int = 1024) -> dict[str, Any]:
    """CPU and wall seconds of steps over six matrices of which parts warm up."""
    torch.set_num_threads(threads)
    lower, right = np.arange(rows) >= rows // 2, np.arange(columns) >= columns // 2
    new: dict[str, list[np.ndarray | None] | None] = {
        "none": None,
        "rows": [lower, None],
        "columns": [None, right],
        "rows and columns": [lower, right],
        "every second column": [None, np.arange(columns) % 2 == 1],
    }
    steps = {}
    for name, newborn in new.items():
        torch.manual_seed(0)
        own = [nn.Parameter(torch.randn(rows, columns)) for _ in range(6)]
        for p in own:
            p.grad = torch.randn_like(p).mul_(1e-3)
        one = torch.optim.AdamW(own, lr=1e-4, fused=fused)
        one.step()
        if newborn is not None:
            rates = SliceRates(warmup=10**6, peak=1.3)
            rates.slices = {str(k): Slice(newborn=newborn) for k in range(len(own))}
            write_rates(one, [rates], {id(p): str(k) for k, p in enumerate(own)})
        for _ in range(3):
            one.step()
        steps[name] = one.step
    return {"fused": fused, "rows": rows, "columns": columns, "times": common.side_by_side(steps, repeats, warmup=1)}


def peak(shape: str, spec: str, fused: bool, threads: int, way: str) -> dict[str, Any]:
    """Bytes that the second step takes at most, on top of what is there before it, in a process of its own."""
    torch.set_num_threads(threads)
    growth, optimizer = _grown(shape, spec, fused)
    one = growth.carry(optimizer, **(WAYS[way] if way != "none" else {"policy": "copy"}))
    for p in growth.module.parameters():
        p.grad = torch.randn_like(p).mul_(1e-3)
    with common.Meter() as meter:
        one.step()
    return {"bytes": meter.peak - meter.before}


def run(argv: list[str]) -> int:
    """Measure, print, save."""
    options = common.parser("optimizer", __doc__)
    options.add_argument("--repeats", type=int, default=20, help="rounds for each figure")
    options.add_argument("--shapes", nargs="*", choices=list(SHAPES), default=None)
    options.add_argument("--specs", nargs="*", choices=list(SPECS), default=list(SPECS))
    given = options.parse_args(argv)
    shapes = given.shapes or (["tiny"] if given.quick else list(SHAPES))
    threads = common.threads(given)
    repeats = 3 if given.quick else given.repeats
    runs, rows, figures = [], [], []
    for shape in shapes:
        for spec in given.specs:
            for fused in (True, False):
                where = {"shape": shape, "spec": spec, "fused": fused, "threads": threads}
                found = common.isolated("benchmarks.optimizer:measure", {**where, "repeats": repeats})
                memory = {
                    way: common.isolated("benchmarks.optimizer:peak", {**where, "way": way})["bytes"]
                    for way in ("none", "warm-up", "exact")
                }
                runs.append({**found, "memory": memory})
                base = found["times"]["none"]
                name = f"{shape}, {spec}, {'fused' if fused else 'default'}"
                ratios = {way: common.ratio(found["times"][way]["cpu"], base["cpu"]) for way in WAYS}
                extra = {w: (memory[w] - memory["none"]) / found["parameters"] for w in ("warm-up", "exact")}
                figures.append({"name": name, "ratio": ratios, "extra": extra})
                milliseconds = 1e3 * sorted(base["cpu"])[len(base["cpu"]) // 2]
                rows.append(
                    [name, f"{milliseconds:.2f}"]
                    + [f"{r['median']:.2f} ({r['low']:.2f}–{r['high']:.2f})" for r in ratios.values()]
                    + [f"{extra[w]:.2f}" for w in extra]
                )
    common.table(
        "AdamW: CPU ms of a step without rates; the others over it (quartiles); extra peak memory over the parameters",
        ["model, growth, step", "none, ms", *WAYS, "memory, warm-up", "memory, exact"],
        rows,
    )
    runs_of_matrices, lines = [], []
    size = {"rows": 48, "columns": 32} if given.quick else {}
    for fused in (True, False):
        found = common.isolated(
            "benchmarks.optimizer:matrices", {"fused": fused, "threads": threads, "repeats": repeats, **size}
        )
        runs_of_matrices.append(found)
        base = found["times"].pop("none")
        for name, time in found["times"].items():
            one = common.ratio(time["cpu"], base["cpu"])
            way = "fused" if fused else "default"
            lines.append([f"{name}, {way}", f"{one['median']:.2f} ({one['low']:.2f}–{one['high']:.2f})"])
            figures.append({"name": f"new {name}, {way}", "ratio": {"warm-up": one}})
    common.table(
        "AdamW while parts of six matrices warm up: CPU time over a step without rates", ["new", "ratio"], lines
    )
    checks = [
        common.verdict(f"{f['name']}: {way}", f["ratio"][way]["median"], bound)
        for f in figures
        for way, bound in (("warm-up", 1.15), ("after", 1.03))
        if way in f["ratio"]
    ]
    with common.figure(given.out, "optimizer", size=(6.4, 3.6)) as (ax,):
        ax.barh([f["name"] for f in figures], [f["ratio"]["warm-up"]["median"] for f in figures], color="#4c72b0")
        ax.axvline(1, color="#444444", lw=1)
        ax.set_xlabel("step while new entries warm up / step without rates (CPU time)")
        ax.invert_yaxis()
    common.save(
        given.json,
        {
            "environment": common.environment(threads),
            "runs": runs,
            "matrices": runs_of_matrices,
            "figures": figures,
            "checks": checks,
        },
    )
    return 0
