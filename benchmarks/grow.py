"""A growth against a hand-written script for one model, and against a bare allocate-and-copy.

The example GPT and GPT-2 124M are grown to twice the width (stream, hidden and heads), by fxgrow and by a script that
knows this one model. Every measurement has a process of its own. CPU seconds are user plus system over all threads;
memory is the peak over the growth, less what the process held before the model was built, in units of old + new.
"""

from __future__ import annotations

import gc
import statistics
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import common
from examples.gpt.model import GPT, GPTConfig

SHAPES: dict[str, GPTConfig] = {
    "tiny": GPTConfig(block_size=32, vocab_size=64, n_layer=2, n_head=2, n_embd=32),
    "example": GPTConfig(),
    "gpt2": GPTConfig(block_size=1024, vocab_size=50257, n_layer=12, n_head=12, n_embd=768),
}
SPEC = [{"op": "widen", "axis": f"*/{role}", "factor": 2} for role in ("hidden", "heads", "residual")]

#: what is measured, in words
METHODS = {
    "fxgrow": "fxgrow",
    "fxgrow consume": "fxgrow, consume=True",
    "fxgrow native": "fxgrow, verify native",
    "script": "hand-written, repeat",
    "script cat": "hand-written, cat",
    "bare": "allocate and copy",
}


# the hand-written script ------------------------------------------------------------------------------------------


def by_hand(model: GPT, concatenate: bool = False) -> GPT:
    """Twice the stream, hidden width and heads of this one class, exactly, as one would write it for it alone.

    Args:
        concatenate: the straightforward form, ``cat`` and a division; else scale the small tensor, then ``repeat``.
    """
    c = model.config
    assert c.n_hidden is not None
    with torch.device("meta"):
        grown = GPT(replace(c, n_embd=2 * c.n_embd, n_head=2 * c.n_head, n_hidden=2 * c.n_hidden))
    new: dict[str, Tensor] = {}

    def rows(w: Tensor) -> Tensor:
        return torch.cat([w, w]) if concatenate else w.repeat(2, *[1] * (w.dim() - 1))

    def columns(w: Tensor) -> Tensor:
        return torch.cat([w, w], 1) if concatenate else w.repeat(1, 2)

    def both(w: Tensor) -> Tensor:
        if concatenate:
            return torch.cat([torch.cat([w, w], 1)] * 2) / 2
        return (w / 2).repeat(2, 2)

    with torch.no_grad():
        for name, w in model.state_dict().items():
            if name == "lm_head.weight":
                continue  # tied
            if name.endswith(("wte.weight", "wpe.weight")):
                new[name] = columns(w)
            elif name.endswith("c_attn.weight"):  # queries, keys and values, each with its own heads
                if concatenate:
                    new[name] = torch.cat([both(part) for part in w.chunk(3)])
                else:
                    d = w.shape[1]
                    new[name] = (w / 2).view(3, -1, d).repeat(1, 2, 2).view(-1, 2 * d)
            elif name.endswith("c_attn.bias"):
                new[name] = torch.cat([rows(part) for part in w.chunk(3)])
            elif "ln_f" in name:  # the tied head reads every unit twice
                new[name] = rows(w / 2)
            elif w.dim() == 2:
                new[name] = both(w)
            else:
                new[name] = rows(w)
    new["lm_head.weight"] = new["transformer.wte.weight"]
    grown.load_state_dict(new, assign=True)
    grown.transformer["wte"].weight = grown.lm_head.weight
    return grown.train(model.training)


def bare(model: nn.Module) -> list[Tensor]:
    """Memory of the grown sizes, filled from the old tensors: no less can be done."""
    out = []
    with torch.no_grad():
        for name, w in model.named_parameters():
            copies = 4 if w.dim() == 2 and not name.endswith(("wte.weight", "wpe.weight", "lm_head.weight")) else 2
            new = torch.empty(copies, *w.shape)
            new.copy_(w)
            out.append(new)
    return out


# one measurement, in its own process ------------------------------------------------------------------------------


def inputs(config: GPTConfig, batch: int = 2, length: int = 16) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, config.vocab_size, (batch, length + 1), generator=torch.Generator().manual_seed(0))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def _perturb(model: GPT) -> GPT:
    """Norms and biases that are not 1 and 0, in place and without a second copy."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(torch.randn(p.shape, generator=generator), alpha=0.05)
    return model


def measure(shape: str, method: str, threads: int) -> dict[str, Any]:
    """Grow once; seconds and bytes."""
    import fxgrow

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    ours = method.startswith("fxgrow")
    if shape != "tiny":
        # a first growth of a toy loads what every process loads once: torch.export, the kernels' library
        tiny = SHAPES["tiny"]
        if ours:
            fxgrow.grow(_perturb(GPT(tiny)), SPEC, inputs(tiny), verify=False)
        else:
            by_hand(GPT(tiny), method == "script cat")
    gc.collect()
    empty = common.resident()
    config = SHAPES[shape]
    model = _perturb(GPT(config)).eval()
    example = inputs(config)
    old = _bytes(model)
    out: dict[str, Any] = {"method": method}
    meters: dict[str, common.Meter] = {}
    result: Any
    if method == "fxgrow native":
        with common.Meter() as meters["all"]:
            growth = fxgrow.grow(model, SPEC, example, verify="native")
    elif ours:
        with common.Meter() as meters["capture"]:
            program = fxgrow.capture(model, example)
            gc.collect()  # what torch.export leaves behind
        with common.Meter() as meters["analyse"]:
            _ = program.axes
        with common.Meter() as meters["growth"]:
            growth = fxgrow.grow(program, SPEC, verify=False, consume=method == "fxgrow consume")
    else:
        with common.Meter() as meters["growth"]:
            result = bare(model) if method == "bare" else by_hand(model, method == "script cat")
    if ours:
        result = growth.module
        out |= {"stages": growth.receipt.seconds, "error_native": growth.receipt.error_native}
    new = _bytes(result) if isinstance(result, nn.Module) else sum(t.numel() * t.element_size() for t in result)
    highest = max(m.peak for m in meters.values()) - empty
    out |= {"meters": {n: m.figures() for n, m in meters.items()}}
    return out | {"old": old, "new": new, "peak_bytes": highest, "peak": highest / (old + new)}


def _bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def agreement(shape: str, threads: int) -> dict[str, Any]:
    """Whether fxgrow and the script give the same tensors, and how far the grown outputs are from the old ones."""
    import fxgrow

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    config = SHAPES[shape]
    model = _perturb(GPT(config)).eval()
    example = inputs(config)
    mine = fxgrow.grow(model, SPEC, example, verify=False).module
    theirs = by_hand(model)
    a, b = mine.state_dict(), theirs.state_dict()
    different = [n for n in b if not torch.equal(a[n], b[n])]
    with torch.no_grad():
        old, new = model(*example)[0], mine(*example)[0]
        other = theirs(*example)[0]
    scale = float(old.abs().max())
    return {
        "names_equal": list(a) == list(b) or sorted(a) == sorted(b),
        "different": different,
        "error": float((old - new).abs().max()) / scale,
        "error_script": float((old - other).abs().max()) / scale,
    }


# the whole benchmark ----------------------------------------------------------------------------------------------


def run(argv: list[str]) -> int:
    """Measure, print, save."""
    options = common.parser("grow", __doc__)
    options.add_argument("--repeats", type=int, default=5, help="processes for each method")
    options.add_argument("--shapes", nargs="*", default=None, choices=list(SHAPES))
    given = options.parse_args(argv)
    threads = common.threads(given)
    shapes = given.shapes or (["tiny"] if given.quick else ["example", "gpt2"])
    repeats = 1 if given.quick else given.repeats
    result: dict[str, Any] = {"environment": common.environment(threads), "shapes": {}}
    verdicts = []
    for shape in shapes:
        same = common.isolated("benchmarks.grow:agreement", {"shape": shape, "threads": threads})
        samples: dict[str, list[dict[str, Any]]] = {m: [] for m in METHODS}
        for r in range(repeats):
            for m in METHODS if r % 2 == 0 else list(METHODS)[::-1]:
                arguments = {"shape": shape, "method": m, "threads": threads}
                samples[m].append(common.isolated("benchmarks.grow:measure", arguments))
        result["shapes"][shape] = {"agreement": same, "samples": samples}
        _show(shape, same, samples)
        if shape == "gpt2":
            verdicts += _judge(samples)
    result["verdicts"] = verdicts
    _plot(given.out, result)
    common.save(given.json, result)
    return 0


def _middle(samples: list[dict[str, Any]], meter: str, key: str) -> float:
    return statistics.median(s["meters"][meter][key] for s in samples)


def _main(method: str) -> str:
    return "all" if method == "fxgrow native" else "growth"


def _show(shape: str, same: dict[str, Any], samples: dict[str, list[dict[str, Any]]]) -> None:
    first = samples["script"][0]
    rows = []
    for method, words in METHODS.items():
        runs = samples[method]
        cpu = [s["meters"][_main(method)]["cpu"] for s in runs]
        row = [words + (" (capture included)" if method == "fxgrow native" else "")]
        row += [f"{statistics.median(cpu):.2f} ({min(cpu):.2f}–{max(cpu):.2f})"]
        row += [f"{_middle(runs, _main(method), k):.2f}" for k in ("user", "system", "wall")]
        row += [f"{max(s['peak'] for s in runs):.2f}", f"{max(s['peak_bytes'] for s in runs) / 1e6:.0f}"]
        rows.append(row)
    common.table(
        f"{shape}: {first['old'] / 4e6:.1f} M to {first['new'] / 4e6:.1f} M parameters, "
        f"old + new = {(first['old'] + first['new']) / 1e6:.0f} MB; medians of {len(samples['script'])} processes",
        ["growth", "CPU s (range)", "user", "system", "wall", "peak / (old+new)", "MB"],
        rows,
    )
    runs = samples["fxgrow"]
    stages = {k: statistics.median(s["stages"][k] for s in runs) for k in runs[0]["stages"] if k != "capture"}
    print(
        "fxgrow apart: "
        + ", ".join(f"{k} {_middle(runs, k, 'cpu'):.2f} CPU s" for k in ("capture", "analyse"))
        + "; inside the growth, wall s: "
        + ", ".join(f"{k} {v:.2f}" for k, v in stages.items())
    )
    print(
        f"same tensors as the script: {'yes, to the bit' if not same['different'] else same['different'][:4]}; "
        f"outputs off by {same['error']:.1e} (script {same['error_script']:.1e}) of their largest, float32"
    )


def _judge(samples: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    best = min(_middle(samples[m], "growth", "cpu") for m in ("script", "script cat"))
    out = [
        common.verdict("CPU time, fxgrow / the better script", _middle(samples["fxgrow"], "growth", "cpu") / best, 1)
    ]
    for method in ("fxgrow", "fxgrow consume", "fxgrow native"):
        worst = max(s["peak"] for s in samples[method])
        out.append(common.verdict(f"peak memory / (old + new), {METHODS[method]}", worst, 1.1))
    return out


def _plot(folder: Any, result: dict[str, Any]) -> None:
    shape, data = list(result["shapes"].items())[-1]
    samples = data["samples"]
    with common.figure(folder, "grow", columns=2, size=(5.2, 3.4)) as (left, right):
        names = [m for m in METHODS if m != "fxgrow native"]
        bottom = [0.0] * len(names)
        for key, colour in (("user", "#4c72b0"), ("system", "#c7d3ea")):
            values = [_middle(samples[m], "growth", key) for m in names]
            left.barh([METHODS[m] for m in names], values, left=bottom, label=key, color=colour)
            bottom = [a + b for a, b in zip(bottom, values, strict=True)]
        left.set_xlabel("CPU seconds of the growth")
        left.set_title(f"{shape}, twice the width", fontsize=10)
        left.legend(frameon=False)
        left.invert_yaxis()
        right.barh(
            [METHODS[m] for m in METHODS], [max(s["peak"] for s in samples[m]) for m in METHODS], color="#4c72b0"
        )
        right.axvline(1.1, color="#c44e52", lw=1)
        right.set_xlabel("peak memory / (old + new); the line is the bound")
        right.invert_yaxis()
