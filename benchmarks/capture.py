"""What a capture costs with one trace that tells of both modes, against a trace of each.

A GPT of GPT-2's 124M sizes, in turns in one process; CPU seconds. ``torch.export`` runs once where train and eval mode
run the same ops, which a second run of the forward finds out without making a graph.
"""

from __future__ import annotations

import statistics

import torch

from benchmarks import common
from examples.gpt.model import GPT, GPTConfig

SIZES = {"block_size": 1024, "vocab_size": 50304, "n_layer": 12, "n_head": 12, "n_embd": 768}
QUICK = {"block_size": 16, "vocab_size": 65, "n_layer": 2, "n_head": 2, "n_embd": 32}


def measure(sizes: dict[str, int], repeats: int, threads: int) -> dict[str, list[float]]:
    """CPU seconds of captures, in turns, by the number of traces."""
    import fxgrow
    from fxgrow.trace import export

    torch.set_num_threads(threads)
    model, x = GPT(GPTConfig(dropout=0.1, **sizes)), torch.randint(0, sizes["vocab_size"], (2, 16))

    def capture(replay: bool) -> None:
        before, export._REPLAY = export._REPLAY, replay
        try:
            fxgrow.capture(model, (x, x))
        finally:
            export._REPLAY = before

    ways = {"one": lambda: capture(True), "two": lambda: capture(False)}
    return {way: times["cpu"] for way, times in common.side_by_side(ways, repeats).items()}


def run(argv: list[str]) -> int:
    """Measure, print, save."""
    options = common.parser("capture", __doc__)
    options.add_argument("--repeats", type=int, default=5, help="captures each way; the median is shown")
    given = options.parse_args(argv)
    sizes, repeats = (QUICK, 1) if given.quick else (SIZES, given.repeats)
    threads = common.threads(given)
    found = common.isolated("benchmarks.capture:measure", {"sizes": sizes, "repeats": repeats, "threads": threads})
    common.table(
        f"capture of a GPT of {sizes['n_layer']} layers, CPU seconds",
        ["traces", f"median of {repeats}", "range"],
        [[way, statistics.median(t), f"{min(t):.2f}–{max(t):.2f}"] for way, t in found.items()],
    )
    ratio = common.ratio(found["one"], found["two"])
    print(f"one trace / two traces: {ratio['median']:.2f} ({ratio['low']:.2f}–{ratio['high']:.2f})")
    with common.figure(given.out, "capture") as (ax,):
        ax.boxplot(list(found.values()), tick_labels=[f"{way} trace{'s' if way == 'two' else ''}" for way in found])
        ax.set_ylim(bottom=0)
        ax.set_ylabel("capture, CPU seconds")
    common.save(given.json, {"environment": common.environment(threads), "cpu": found, "ratio": ratio})
    return 0
