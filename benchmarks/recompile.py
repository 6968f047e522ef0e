"""Cold ``torch.compile`` against depth: regenerated and hand-written, whole and block by block.

Each figure comes from a fresh process with an empty Inductor cache: the first training step (forward and backward) of
the compiled model, less a later step. Before the clock starts a trivial function is compiled, so that loading Inductor
is not counted. CPU seconds include the C++ compiler's.

And a model that is compiled block by block and grows: the first step after it has become deeper, after it has become
wider, and after it has become wider as foreseen by ``fxgrow.compile_ahead``, against the first step of all.
"""

from __future__ import annotations

import resource
import statistics
import time
from typing import Any

import torch
from torch import nn

from benchmarks import common
from examples.gpt.model import GPT, GPTConfig

WIDER = [{"op": "widen", "axis": "*/hidden", "factor": 2}]
#: name -> (in words, regenerated, block by block)
WAYS: dict[str, tuple[str, bool, bool]] = {
    "regions": ("fxgrow, growth.compile()", True, True),
    "applied": ("the class after apply_, growth.compile(model)", True, True),
    "whole": ("fxgrow, whole module", True, False),
    "hand blocks": ("hand-written, block by block", False, True),
    "hand whole": ("hand-written, whole module", False, False),
}
BOUND = 1.2
#: first step after a growth / first step of all
BOUNDS = {"deeper": 0.1, "wider": 1.2, "foreseen": 0.05}


def sizes(layers: int, scale: int = 1) -> GPTConfig:
    return GPTConfig(
        block_size=32, vocab_size=128, n_layer=layers, n_head=2, n_embd=32 * scale, n_hidden=128 * scale, head_dim=16
    )


def _cpu() -> float:
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def measure(way: str, layers: int, threads: int, backend: str = "inductor") -> dict[str, Any]:
    """Compile cold by one training step; seconds, and the number of graphs that were compiled."""
    import torch._dynamo
    from torch._dynamo.utils import counters

    import fxgrow

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    _, regenerated, blocks = WAYS[way]
    config = sizes(layers)
    tokens = torch.randint(0, config.vocab_size, (2, config.block_size + 1))
    example = (tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    model: nn.Module
    if regenerated:
        small = GPT(config)
        growth = fxgrow.grow(small, WIDER, example, verify=False)
        model = growth.apply_(small) if way == "applied" else growth.module
    else:
        assert config.n_hidden is not None
        config.n_hidden *= 2
        model = GPT(config)
    torch.compile(lambda x: x.sin() + 1, backend=backend)(torch.randn(8, requires_grad=True)).sum().backward()
    torch._dynamo.reset()
    counters.clear()
    if regenerated and blocks:
        growth.compile(model, backend=backend)
    elif blocks:
        for block in model.get_submodule("transformer.h").children():
            block.compile(backend=backend)
    else:
        model.compile(backend=backend)
    cpu, wall = _cpu(), time.perf_counter()
    first = _step(model, example)
    cold = {"cpu": _cpu() - cpu, "wall": time.perf_counter() - wall}
    graphs = int(counters["stats"]["unique_graphs"])
    _step(model, example)
    cpu, wall = _cpu(), time.perf_counter()
    again = _step(model, example)
    return {
        "way": way,
        "layers": layers,
        "cpu": cold["cpu"] - (_cpu() - cpu),
        "wall": cold["wall"] - (time.perf_counter() - wall),
        "graphs": graphs,
        "graphs_after": int(counters["stats"]["unique_graphs"]),
        "losses": [first, again],
    }


def measure_growing(in_place: bool, threads: int, options: dict[str, Any]) -> dict[str, Any]:
    """First steps of one model that grows twice, and of one that grows as foreseen; CPU and wall seconds of each."""
    import fxgrow
    from fxgrow.compile import compile_regions

    torch.set_num_threads(threads)
    torch.compile(lambda x: x.sin() + 1, **options)(torch.randn(8, requires_grad=True)).sum().backward()
    config = sizes(2)
    tokens = torch.randint(0, config.vocab_size, (2, config.block_size + 1))
    example = (tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())

    def timed(model: nn.Module) -> dict[str, float]:
        cpu, wall = _cpu(), time.perf_counter()
        _step(model, example)
        first = {"cpu": _cpu() - cpu, "wall": time.perf_counter() - wall}
        _step(model, example)
        cpu, wall = _cpu(), time.perf_counter()
        _step(model, example)
        return {"cpu": first["cpu"] - (_cpu() - cpu), "wall": first["wall"] - (time.perf_counter() - wall)}

    def grown(model: nn.Module, spec: Any) -> nn.Module:
        growth = fxgrow.grow(model, spec, example, verify=False)
        return growth.apply_(model) if in_place else growth.compile(**options)

    model: nn.Module = GPT(config)
    if not in_place:  # a growth that adds a unit makes the first module
        model = fxgrow.grow(model, {**WIDER[0], "factor": 1.25}, example, verify=False).module
    out = {"cold": timed(compile_regions(model, **options))}
    model = grown(model, {"op": "deepen", "stack": "transformer.h", "by": 2})
    out["deeper"] = timed(model)
    model = grown(model, WIDER)
    out["wider"] = timed(model)
    ahead = fxgrow.compile_ahead(model, WIDER, example, in_place=in_place, **options)
    ahead.wait()
    if ahead.error:
        raise RuntimeError(ahead.error)
    out["foreseen"] = timed(grown(model, WIDER))
    return out


def _step(model: nn.Module, example: tuple[torch.Tensor, ...]) -> float:
    model.zero_grad()
    loss = model(*example)[1]
    loss.backward()
    return float(loss.detach())


def run(argv: list[str]) -> int:
    """Measure, print, save."""
    options = common.parser("recompile", __doc__)
    options.add_argument("--layers", type=int, nargs="*", default=None)
    options.add_argument("--repeats", type=int, default=3, help="processes for each figure; the median is shown")
    options.add_argument("--ways", nargs="*", choices=list(WAYS), default=list(WAYS))
    options.add_argument("--no-growth", action="store_true", help="leave out models that grow")
    given = options.parse_args(argv)
    depths = given.layers or ([1, 2] if given.quick else [2, 6, 12])
    repeats = 1 if given.quick else given.repeats
    threads = common.threads(given)
    samples: dict[str, dict[int, list[dict[str, Any]]]] = {w: {d: [] for d in depths} for w in given.ways}
    for r in range(repeats):
        for depth in depths if r % 2 == 0 else depths[::-1]:
            for way in given.ways:
                with common.fresh_caches() as env:
                    found = common.isolated(
                        "benchmarks.recompile:measure",
                        {"way": way, "layers": depth, "threads": threads}
                        | ({"backend": "aot_eager"} if given.quick else {}),
                        env=env | {"TORCHINDUCTOR_COMPILE_THREADS": "1"},
                    )
                samples[way][depth].append(found)
    middle = {w: {d: _middle(x) for d, x in by.items()} for w, by in samples.items()}
    common.table(
        f"cold compile of one training step, CPU seconds (wall), {repeats} processes each",
        ["model", *[f"{d} layers" for d in depths], f"{depths[-1]} / {depths[0]}", "graphs"],
        [
            [
                WAYS[w][0],
                *[f"{by[d]['cpu']:.1f} ({by[d]['wall']:.1f})" for d in depths],
                f"{by[depths[-1]]['cpu'] / by[depths[0]]['cpu']:.2f}",
                " / ".join(str(samples[w][d][0]["graphs"]) for d in depths),
            ]
            for w, by in middle.items()
        ],
    )
    verdicts = []
    for way in () if given.quick else [w for w in ("regions", "applied") if w in middle]:
        by = middle[way]
        what = f"cold compile of {depths[-1]} layers / {depths[0]} layers, {way}, CPU"
        verdicts.append(common.verdict(what, by[depths[-1]]["cpu"] / by[depths[0]]["cpu"], BOUND))
    growing = [] if given.no_growth else _growing(given.quick, threads, repeats, verdicts)
    with common.figure(given.out, "recompile") as (ax,):
        for w, by in middle.items():
            ax.plot(depths, [by[d]["cpu"] for d in depths], "o-" if WAYS[w][1] else "s--", label=WAYS[w][0])
        ax.set_xlabel("layers")
        ax.set_ylabel("cold compile, CPU seconds")
        ax.set_ylim(bottom=0)
        ax.set_xticks(depths)
        ax.legend(frameon=False, fontsize=8)
    common.save(
        given.json,
        {"environment": common.environment(threads), "samples": samples, "growing": growing, "verdicts": verdicts},
    )
    return 0


def _growing(quick: bool, threads: int, repeats: int, verdicts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Measure models that grow, print, and judge."""
    samples = []
    for _ in range(repeats):
        for in_place in (True, False):
            arguments = {"in_place": in_place, "threads": threads, "options": {"backend": "aot_eager"} if quick else {}}
            with common.fresh_caches() as env:
                cached = {n: "1" if v == "0" else v for n, v in env.items()}
                found = common.isolated(
                    "benchmarks.recompile:measure_growing",
                    arguments,
                    env=cached | {"TORCHINDUCTOR_COMPILE_THREADS": "1"},
                )
            samples.append({"in_place": in_place, **found})
    rows = []
    for in_place, name in ((True, "the class after apply_"), (False, "growth.module")):
        own = [s for s in samples if s["in_place"] is in_place]
        ratios = {k: statistics.median(s[k]["cpu"] / s["cold"]["cpu"] for s in own) for k in BOUNDS}
        rows.append([name, statistics.median(s["cold"]["cpu"] for s in own), *(f"{r:.3f}" for r in ratios.values())])
        if not quick:
            what = "{} of {}, first step after / cold, CPU"
            verdicts += [common.verdict(what.format(k, name), r, BOUNDS[k]) for k, r in ratios.items()]
    common.table(
        f"first step after a growth / first step of all, CPU, {repeats} processes each",
        ["model", "cold, seconds", *BOUNDS],
        rows,
    )
    return samples


def _middle(samples: list[dict[str, Any]]) -> dict[str, float]:
    return {k: statistics.median(s[k] for s in samples) for k in ("cpu", "wall")}
