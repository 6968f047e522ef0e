"""Tokens a second: the regenerated module against the hand-written one with the same weights.

Both stand in one process and take turns, so that whatever else the machine does disturbs both alike; ratios are taken
round by round. Eager and compiled (block by block), forward and training step.
"""

from __future__ import annotations

import functools
import statistics
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import common
from examples.gpt.model import GPT, GPTConfig

#: name -> (sizes before the hidden width is doubled, batch, tokens)
SHAPES: dict[str, tuple[GPTConfig, int, int]] = {
    "tiny": (GPTConfig(block_size=16, vocab_size=64, n_layer=1, n_head=2, n_embd=32), 2, 16),
    "example": (GPTConfig(n_layer=4, n_head=4, n_embd=128), 8, 128),
    "small ops": (GPTConfig(n_layer=12, n_head=2, n_embd=32, block_size=32), 2, 32),
    "gpt2": (GPTConfig(block_size=1024, vocab_size=50257, n_layer=12, n_head=12, n_embd=768), 1, 64),
}


def measure(shape: str, threads: int, repeats: int, compiled: bool) -> dict[str, Any]:
    """Time both modules in one process; CPU and wall seconds of each round."""
    import fxgrow

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    config, batch, length = SHAPES[shape]
    tokens = torch.randint(0, config.vocab_size, (batch, length + 1))
    example = (tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    traced = tuple(torch.cat([x, x]) if batch == 1 else x for x in example)  # a batch of 1 would be taken as fixed
    growth = fxgrow.grow(GPT(config), [{"op": "widen", "axis": "*/hidden", "factor": 2}], traced, verify=False)
    assert config.n_hidden is not None
    hand = GPT(replace(config, n_hidden=2 * config.n_hidden))
    hand.load_state_dict(growth.module.state_dict())
    same = float((hand(*example)[0] - growth.module(*example)[0]).detach().abs().max())
    if compiled:
        growth.compile()
        for block in hand.get_submodule("transformer.h").children():
            block.compile()
    modules: dict[str, nn.Module] = {"hand-written": hand, "regenerated": growth.module}
    out: dict[str, Any] = {"tokens": batch * length, "difference": same, "compiled": compiled, "shape": shape}
    for name, step in (("forward", _forward), ("training", _training)):
        candidates = {n: functools.partial(step, m, example) for n, m in modules.items()}
        out[name] = common.side_by_side(candidates, repeats, warmup=3)
    return out


def _forward(module: nn.Module, example: tuple[Tensor, ...]) -> None:
    with torch.no_grad():
        module(*example)


def _training(module: nn.Module, example: tuple[Tensor, ...]) -> None:
    module.zero_grad(set_to_none=True)
    module(*example)[1].backward()


def run(argv: list[str]) -> int:
    """Measure, print, save."""
    options = common.parser("throughput", __doc__)
    options.add_argument("--repeats", type=int, default=40, help="rounds for each figure")
    options.add_argument("--shapes", nargs="*", choices=list(SHAPES), default=None)
    options.add_argument("--eager", action="store_true", help="do not compile")
    given = options.parse_args(argv)
    shapes = given.shapes or (["tiny"] if given.quick else ["small ops", "example", "gpt2"])
    threads = common.threads(given)
    runs = []
    for shape in shapes:
        for compiled in (False,) if given.eager or given.quick else (False, True):
            repeats = 3 if given.quick else max(6, given.repeats // (5 if shape == "gpt2" else 1))
            arguments = {"shape": shape, "threads": threads, "repeats": repeats, "compiled": compiled}
            runs.append(common.isolated("benchmarks.throughput:measure", arguments))
    rows: list[list[str]] = []
    figures: list[dict[str, Any]] = []
    for r in runs:
        for what in ("forward", "training"):
            hand, ours = r[what]["hand-written"], r[what]["regenerated"]
            found = {k: common.ratio(hand[k], ours[k]) for k in ("cpu", "wall")}
            name = f"{r['shape']}, {'compiled' if r['compiled'] else 'eager'}, {what}"
            speed = [r["tokens"] / statistics.median(x["wall"]) for x in (hand, ours)]
            figures.append({"name": name, "ratio": found, "tokens_per_second": speed})
            rows.append(
                [name, *[f"{s:,.0f}" for s in speed]]
                + [f"{found[k]['median']:.3f} ({found[k]['low']:.2f}–{found[k]['high']:.2f})" for k in ("wall", "cpu")]
            )
    common.table(
        "tokens a second; ratio above 1: the regenerated module is faster (quartiles over rounds)",
        ["model", "hand-written", "regenerated", "ratio, wall", "ratio, CPU"],
        rows,
    )
    with common.figure(given.out, "throughput", size=(6.4, 3.6)) as (ax,):
        names = [f["name"] for f in figures]
        ax.barh(names, [f["ratio"]["cpu"]["median"] for f in figures], color="#4c72b0")
        ax.axvline(1, color="#444444", lw=1)
        ax.set_xlabel("speed, regenerated / hand-written (CPU time)")
        ax.invert_yaxis()
    common.save(given.json, {"environment": common.environment(threads), "runs": runs, "figures": figures})
    return 0
