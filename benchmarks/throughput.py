"""Speed of grown models, regenerated and grown in place by ``apply_``, against hand-written ones with the same weights.

All three stand in one process and take turns, so that whatever else the machine does disturbs them alike; ratios are
taken round by round, and of the fastest rounds. Eager and compiled (block by block), forward and training step.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import common
from examples.gpt.model import GPT, GPTConfig


@dataclass(frozen=True)
class Case:
    """A small model, the class that is as large as the grown one, and what both are given."""

    small: nn.Module
    large: nn.Module
    axis: str
    example: tuple[Tensor, ...]
    items: int
    """Tokens or images in the example."""
    stacks: tuple[str, ...]


class Residual(nn.Module):
    """ResNet's basic block (He et al. 2016) with a width of its own between the convolutions."""

    def __init__(self, i: int, middle: int, o: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(i, middle, 3, stride, 1, bias=False), nn.BatchNorm2d(middle)
        self.conv2, self.bn2 = nn.Conv2d(middle, o, 3, 1, 1, bias=False), nn.BatchNorm2d(o)
        self.down = nn.Sequential()
        if stride != 1 or i != o:
            self.down = nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False), nn.BatchNorm2d(o))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.down(x))


class ResNet(nn.Module):
    """ResNet-18 for small images; with targets its loss too."""

    def __init__(self, width: int, factor: int, blocks: int) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        widths = [width * 2**n for n in range(4)]
        for n, (i, o) in enumerate(zip([width, *widths], widths, strict=False)):
            sizes = [(i, factor * o, o, 1 + (n > 0)), *[(o, factor * o, o, 1)] * (blocks - 1)]
            setattr(self, f"layer{n + 1}", nn.Sequential(*(Residual(*s) for s in sizes)))
        self.fc = nn.Linear(widths[-1], 10)

    def forward(self, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        h = F.relu(self.norm(self.stem(x)))
        h = self.layer4(self.layer3(self.layer2(self.layer1(h))))
        logits = self.fc(h.mean((2, 3)))
        return logits, F.cross_entropy(logits, targets)


def _gpt(config: GPTConfig, batch: int, length: int) -> Case:
    tokens = torch.randint(0, config.vocab_size, (batch, length + 1))
    example = (tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    small = GPT(config)
    assert config.n_hidden is not None
    large = GPT(replace(config, n_hidden=2 * config.n_hidden))
    return Case(small, large, "*/hidden", example, batch * length, ("transformer.h",))


def _resnet(width: int, batch: int, size: int, blocks: int = 2) -> Case:
    example = (torch.randn(batch, 3, size, size), torch.randint(0, 10, (batch,)))
    stacks = tuple(f"layer{n}" for n in range(1, 5))
    return Case(ResNet(width, 1, blocks), ResNet(width, 2, blocks), "*.conv1.weight:0", example, batch, stacks)


CASES: dict[str, Callable[[], Case]] = {
    "tiny": lambda: _gpt(GPTConfig(block_size=16, vocab_size=64, n_layer=1, n_head=2, n_embd=32), 2, 16),
    "tiny resnet": lambda: _resnet(4, 2, 8, 1),
    "small ops": lambda: _gpt(GPTConfig(n_layer=12, n_head=2, n_embd=32, block_size=32), 2, 32),
    "example": lambda: _gpt(GPTConfig(n_layer=4, n_head=4, n_embd=128), 8, 128),
    "gpt2": lambda: _gpt(GPTConfig(block_size=1024, vocab_size=50257, n_layer=12, n_head=12, n_embd=768), 1, 64),
    "resnet": lambda: _resnet(16, 8, 32),
}
GROWN = ("regenerated", "applied")


def measure(shape: str, threads: int, repeats: int, compiled: bool) -> dict[str, Any]:
    """Time the three modules in one process; CPU and wall seconds of each round."""
    import fxgrow

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    case = CASES[shape]()
    example, hand = case.example, case.large
    traced = tuple(torch.cat([x, x]) if len(x) == 1 else x for x in example)  # a batch of 1 would be taken as fixed
    growth = fxgrow.grow(case.small, {"op": "widen", "axis": case.axis, "factor": 2}, traced, verify=False)
    hand.load_state_dict(growth.module.state_dict())
    modules = {"hand-written": hand, "regenerated": growth.module, "applied": growth.apply_(case.small)}
    with torch.no_grad():
        want = hand.eval()(*example)[0]
        same = max(float((want - modules[n].eval()(*example)[0]).abs().max()) for n in GROWN)
    for module in modules.values():
        module.train()
    if compiled:
        growth.compile()
        growth.compile(modules["applied"])
        for stack in case.stacks:
            for block in hand.get_submodule(stack).children():
                block.compile()
    out: dict[str, Any] = {"items": case.items, "difference": same, "compiled": compiled, "shape": shape}
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
    options.add_argument("--shapes", nargs="*", choices=list(CASES), default=None)
    options.add_argument("--eager", action="store_true", help="do not compile")
    given = options.parse_args(argv)
    shapes = given.shapes or (["tiny", "tiny resnet"] if given.quick else ["small ops", "example", "gpt2", "resnet"])
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
            hand = r[what]["hand-written"]
            name = f"{r['shape']}, {'compiled' if r['compiled'] else 'eager'}, {what}"
            row = [name, f"{min(hand['cpu']) * 1e3:,.1f}"]
            for kind in GROWN:
                ours = r[what][kind]
                found = common.ratio(hand["cpu"], ours["cpu"])
                best = min(hand["cpu"]) / min(ours["cpu"])
                speed = r["items"] / statistics.median(ours["wall"])
                figures.append({"name": name, "module": kind, "ratio": found, "best": best, "items_per_second": speed})
                row += [f"{best:.2f}", f"{found['median']:.2f} ({found['low']:.2f}–{found['high']:.2f})"]
            rows.append(row)
    common.table(
        "speed / hand-written, CPU time; above 1: the grown one is faster (fastest rounds; median and quartiles)",
        ["model", "hand-written, ms", *(f"{k}{s}" for k in GROWN for s in (", best", ""))],
        rows,
    )
    verdicts = []
    if not given.quick:
        worst = {k: max((1 / f["best"], f["name"]) for f in figures if f["module"] == k) for k in GROWN}
        verdicts = [common.verdict(f"time of {k} / hand-written, {n}", round(v, 2), 1.0) for k, (v, n) in worst.items()]
    with common.figure(given.out, "throughput", size=(6.4, 3.6)) as (ax,):
        names = [f"{f['name']}, {f['module']}" for f in figures]
        ax.barh(names, [f["ratio"]["median"] for f in figures], color="#4c72b0")
        ax.axvline(1, color="#444444", lw=1)
        ax.set_xlabel("speed / hand-written (CPU time)")
        ax.tick_params(labelsize=6)
        ax.invert_yaxis()
    environment = common.environment(threads)
    common.save(given.json, {"environment": environment, "runs": runs, "figures": figures, "verdicts": verdicts})
    return 0
