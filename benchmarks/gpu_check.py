"""Everything that only a GPU can tell, in parts that are bounded in time: `bash benchmarks/gpu_check.sh` runs them all.

Each part has a process of its own, and its figures go to `docs/gpu/PART.json` when it ends. A part that is there
already, of the same card and commit, is not run again, so that a run that was cut off goes on. `docs/gpu/README.md` is
made of what is there. --rehearse runs every part at a tiny size on the CPU, the kernels in Triton's interpreter: it
tests this script, and writes to `out/gpu-rehearsal`.
"""

from __future__ import annotations

import json
import math
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import common

SECONDS = 460  # that all parts may take together
START = 8  # of which a process needs to import torch


@dataclass(frozen=True)
class Part:
    """A part, in words, and the seconds that it may take; it stops by itself a little before."""

    title: str
    seconds: int


PARTS = {
    "bits": Part("Random calls of the kernels, against the CPU, to the bit", 60),
    "speed": Part("Doubled weights: against a device copy, and against `cat` and `randn_like`", 100),
    "tests": Part("The tests that need CUDA", 60),
    "growth": Part("GPT-2 124M in bfloat16, grown to twice the width with its optimizer", 80),
    "throughput": Part("Compile time and tokens a second, regenerated against hand-written", 110),
    "graphs": Part("CUDA graphs of a grown module", 45),
    "payoff": Part("Training from scratch and growing in width, for the same FLOPs", 110),
}


def _device(rehearse: bool) -> torch.device:
    return torch.device("cpu" if rehearse else "cuda")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _timed(device: torch.device, call: Callable[[], Any]) -> tuple[Any, float]:
    _wait(device)
    began = time.perf_counter()
    result = call()
    _wait(device)
    return result, time.perf_counter() - began


# ---- the parts: each is called in a process of its own ----


def bits(rehearse: bool, seconds: float) -> dict[str, Any]:
    """Random maps, dtypes, noises, fills and shards, until the time is up."""
    sys.path.insert(0, str(common.ROOT / "tests" / "kernels"))
    from kernel_oracle import random_case, same_bits

    from fxgrow.kernels import materialise

    device, end = _device(rehearse), time.monotonic() + seconds
    cases, wrong, seed = 0, [], 0
    while time.monotonic() < end and cases < (2 if rehearse else 2000):
        x, dims, arguments = random_case(seed)
        seed += 1
        if rehearse and (x.numel() > 50 or arguments["noise"] is not None):
            continue  # the interpreter takes minutes
        want = materialise(x, dims, **arguments)
        got = materialise(x.to(device), dims, backend="triton", **arguments)
        if not same_bits(got.cpu(), want):
            wrong.append(seed - 1)
        cases += 1
    return {"cases": cases, "wrong": wrong, "ok": not wrong}


def speed(rehearse: bool, seconds: float) -> dict[str, Any]:
    """The rows of `gpu_materialise`, until the time is up."""
    from benchmarks import gpu_materialise
    from benchmarks.materialise import DTYPES, cases

    end, rows = time.monotonic() + seconds, []
    shape = (16, 32) if rehearse else (8192, 4096)
    for noise in ("none", "bytes"):
        for dtype in DTYPES[: 2 if rehearse else 4]:
            x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
            for name, dims in list(cases(*shape).items())[: 1 if rehearse else 5]:
                if time.monotonic() < end:
                    rows.append(gpu_materialise.measure(name, dims, x, noise, 1 if rehearse else 20, _device(rehearse)))
    return {"rows": rows, "ok": all(row["equal_bits"] for row in rows)}


def tests(rehearse: bool, seconds: float) -> dict[str, Any]:
    """pytest on the files that hold them."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/kernels/test_kernel_cuda.py"]
    done = subprocess.run(command, cwd=common.ROOT, capture_output=True, text=True, timeout=seconds, check=False)
    said = done.stdout.strip().splitlines()[-25:]
    counts = {what: int(n) for n, what in re.findall(r"(\d+) (passed|failed|skipped|error)", "\n".join(said[-1:]))}
    return {"counts": counts, "said": [] if done.returncode == 0 else said, "ok": done.returncode == 0}


def _gpt(rehearse: bool) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """GPT-2 124M in bfloat16 (a tiny one in float32), and an example."""
    from benchmarks.grow import SHAPES
    from examples.gpt.model import GPT

    device, config = _device(rehearse), SHAPES["tiny" if rehearse else "gpt2"]
    torch.manual_seed(0)
    model = GPT(config).to(device, torch.float32 if rehearse else torch.bfloat16)
    length = 16 if rehearse else 512
    tokens = torch.randint(0, config.vocab_size, (2 if rehearse else 8, length + 1)).to(device)
    return model, (tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())


def growth(rehearse: bool, seconds: float) -> dict[str, Any]:
    """A step, a growth of model and optimizer, and a step of the grown one."""
    import fxgrow
    from benchmarks.grow import SPEC

    device = _device(rehearse)
    model, example = _gpt(rehearse)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    model(*example)[1].backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    small = tuple(x[:2, :64] for x in example)
    old = sum(p.numel() * p.element_size() for p in model.parameters())
    before = 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    noisy = [{**step, "noise": {"kind": "antisymmetric"}} for step in SPEC]
    out: dict[str, Any] = {}
    grown, out["seconds"] = _timed(device, lambda: fxgrow.grow(model, noisy, small, verify="native"))
    new = sum(p.numel() * p.element_size() for p in grown.module.parameters())
    if device.type == "cuda":
        out["peak_over_old_and_new"] = (torch.cuda.max_memory_allocated() - before) / new
    carried, out["carry_seconds"] = _timed(device, lambda: grown.carry(optimizer))
    with torch.no_grad():
        a, b = model.eval()(*small)[1], grown.module.eval()(*small)[1]
    grown.module.train()
    grown.module(*example)[1].backward()
    carried.step()
    out |= {"bytes": [old, new], "losses": [float(a), float(b)], "error": grown.receipt.error_native}
    return out | {"ok": math.isclose(float(a), float(b), rel_tol=1e-4 if rehearse else 2e-2)}


def throughput(rehearse: bool, seconds: float) -> dict[str, Any]:
    """Both modules with equal weights, taking turns: eager, then compiled block by block, whose first step is cold."""
    import fxgrow
    from examples.gpt.model import GPT

    device, end = _device(rehearse), time.monotonic() + seconds
    model, example = _gpt(rehearse)
    small = tuple(x[:2] for x in example)
    grown = fxgrow.grow(model, [{"op": "widen", "axis": "*/hidden", "factor": 2}], small, verify=False)
    config = model.config
    hand = GPT(replace(config, n_hidden=2 * config.n_hidden)).to(device, next(model.parameters()).dtype)
    hand.load_state_dict(grown.module.state_dict())
    modules = {"hand-written": hand, "regenerated": grown.module}

    def step(module: nn.Module) -> None:
        module.zero_grad(set_to_none=True)
        module(*example)[1].backward()
        _wait(device)

    out: dict[str, Any] = {"tokens": example[0].numel()}
    rounds = 2 if rehearse else 15
    for how in ("eager", "compiled"):
        if how == "compiled":
            backend = "aot_eager" if rehearse else "inductor"
            for block in hand.get_submodule("transformer.h").children():
                block.compile(backend=backend)
            grown.compile(backend=backend)
            out["cold"] = {name: _timed(device, lambda m=m: step(m))[1] for name, m in modules.items()}
        times = common.side_by_side({n: lambda m=m: step(m) for n, m in modules.items()}, rounds, warmup=3)
        walls = {name: found["wall"] for name, found in times.items()}
        out[how] = {
            "tokens_per_second": {n: out["tokens"] / statistics.median(w) for n, w in walls.items()},
            "ratio": common.ratio(walls["hand-written"], walls["regenerated"]),
        }
        if time.monotonic() > end:
            break
    return out | {"ok": "compiled" in out}


def graphs(rehearse: bool, seconds: float) -> dict[str, Any]:
    """A forward pass of a grown module, captured and replayed on other tokens, against the same without."""
    import fxgrow

    device = _device(rehearse)
    model, example = _gpt(rehearse)
    small = tuple(x[:2] for x in example)
    grown = fxgrow.grow(model, [{"op": "widen", "axis": "*/hidden", "factor": 2}], small, verify=False).module.eval()
    other = tuple(x.flip(1).contiguous() for x in small)
    with torch.no_grad():
        want = grown(*other)[1].clone()
        if device.type != "cuda":
            return {"ok": bool(torch.equal(grown(*other)[1], want)), "captured": False}
        held = tuple(x.clone() for x in small)
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(3):
                grown(*held)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = grown(*held)[1]
        for place, value in zip(held, other, strict=True):
            place.copy_(value)
        graph.replay()
        _wait(device)
        eager = statistics.median(_timed(device, lambda: grown(*other))[1] for _ in range(10))
        replayed = statistics.median(_timed(device, graph.replay)[1] for _ in range(10))
    return {
        "ok": bool(torch.equal(result, want)),
        "captured": True,
        "milliseconds": {"eager": eager * 1e3, "replayed": replayed * 1e3},
    }


def payoff(rehearse: bool, seconds: float) -> dict[str, Any]:
    """Two contestants of `training`, one seed, one rate each: a glance, not the study."""
    import tempfile

    from benchmarks.payoff.contestants import BY_NAME, SCALES
    from benchmarks.payoff.work import perform

    scale, end, rows = SCALES["quick" if rehearse else "gpu check"], time.monotonic() + seconds, []
    with tempfile.TemporaryDirectory() as folder:
        for name in ("scratch", "grown in width"):
            if time.monotonic() > end - seconds / 2 and rows:
                break
            rate = scale.rates[BY_NAME[name].start]
            found, took = _timed(
                _device(rehearse), lambda name=name, rate=rate: perform(scale.name, name, rate, 0, scale.budget, folder)
            )
            rows.append({"name": name, "rate": rate, "seconds": took, "loss": found["loss"]})
    return {"flops": scale.budget, "rows": rows, "ok": len(rows) == 2}


# ---- one after the other ----


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=common.ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def perform(names: list[str], folder: Path, rehearse: bool) -> bool:
    """Run the parts that are not there yet; whether all of them are there and right."""
    end = time.monotonic() + SECONDS
    card = "rehearsal on the CPU" if rehearse else torch.cuda.get_device_name()
    key = {"card": card, "commit": _commit()}
    good = True
    for name in names:
        file, part = folder / f"{name}.json", PARTS[name]
        kept = json.loads(file.read_text()) if file.exists() else {}
        if kept.get("ok") and {k: kept.get(k) for k in key} == key:
            print(f"{name}: there already")
            continue
        limit = min(part.seconds, end - time.monotonic())
        if limit < 3 * START:
            print(f"{name}: no time left; run it again to go on")
            good = False
            continue
        began = time.monotonic()
        arguments = {"rehearse": rehearse, "seconds": limit - 2 * START}
        environment = {"TRITON_INTERPRET": "1" if rehearse else "0"}
        try:
            found = common.isolated(f"benchmarks.gpu_check:{name}", arguments, env=environment, timeout=limit)
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            found = {"ok": False, "failed": str(error)[-1500:]}
        found |= {**key, "wall": round(time.monotonic() - began, 1), "environment": common.environment()}
        common.save(file, found)
        good &= found["ok"]
        print(f"{name}: {'good' if found['ok'] else 'NOT GOOD'} after {found['wall']} s", flush=True)
    return good


# ---- the page ----


def page(folder: Path) -> str:
    """What there is, as a document."""
    lines = [
        "# On a GPU",
        "",
        "Made by `bash benchmarks/gpu_check.sh`; see [docs/benchmarks.md](../benchmarks.md).",
        "",
    ]
    found = {name: json.loads(f.read_text()) for name in PARTS if (f := folder / f"{name}.json").exists()}
    if not found:
        return "\n".join([*lines, *NONE])
    for name, result in found.items():
        lines += [f"## {PARTS[name].title}", ""]
        environment = result["environment"]
        lines += [
            f"{result['card']}, torch {environment['torch']}, commit {result['commit'][:12]}, {result['wall']} s."
        ]
        lines += [
            "",
            *(_WORDS[name](result) if "failed" not in result else ["Failed:", "", "```", result["failed"], "```"]),
            "",
        ]
    return "\n".join(lines).rstrip() + "\n"


NONE = [
    "No GPU was lent for this commit: nothing here has been measured on one. What stands in for it:",
    "",
    "- the kernels' bits, in Triton's interpreter (`tests/kernels/test_kernel_triton.py`);",
    "- registers, spills and access widths of their machine code, compiled ahead of time for sm_80, sm_90, sm_100,",
    "  gfx942 and gfx950 (`python -m benchmarks machine_code`, [docs/kernels.md](../kernels.md));",
    "- the parts of the check at a tiny size on the CPU (`gpu_check.sh --rehearse`; what needs CUDA is left out",
    "  there), each by itself, on torch 2.11, Triton 3.6 and Python 3.12; Triton's interpreter fails with numpy 2.5.5.",
    "",
]


def _table(heads: list[str], rows: list[list[Any]]) -> list[str]:
    cells = [[f"{x:.3g}" if isinstance(x, float) else str(x) for x in row] for row in rows]
    return ["| " + " | ".join(row) + " |" for row in (heads, ["---"] * len(heads), *cells)]


def _bits(r: Mapping[str, Any]) -> list[str]:
    return [
        f"{r['cases']} calls, {len(r['wrong'])} of them wrong{': seeds ' + str(r['wrong'][:20]) if r['wrong'] else ''}."
    ]


def _speed(r: Mapping[str, Any]) -> list[str]:
    heads = ["case", "dtype", "noise", "equal_bits", "gigabytes_per_second", "ratio_copy", "speedup_naive"]
    words = ["case", "dtype", "noise", "equal bits", "GB/s", "over a copy", "faster than `cat`, `randn_like`"]
    return _table(words, [[row[h] for h in heads] for row in r["rows"]])


def _tests(r: Mapping[str, Any]) -> list[str]:
    said = ", ".join(f"{n} {what}" for what, n in r["counts"].items())
    return [said + ".", *(["", "```", *r["said"], "```"] if r["said"] else [])]


def _growth(r: Mapping[str, Any]) -> list[str]:
    peak = r.get("peak_over_old_and_new")
    return [
        f"{r['bytes'][0] / 1e6:.0f} MB of parameters become {r['bytes'][1] / 1e6:.0f} MB in {r['seconds']:.2f} s "
        f"(verified in the model's own dtype), the optimizer's state in {r['carry_seconds']:.2f} s. "
        + (f"Peak memory above what there was: {peak:.2f} × the new parameters. " if peak else "")
        + f"Loss before and after: {r['losses'][0]:.4f}, {r['losses'][1]:.4f}."
    ]


def _throughput(r: Mapping[str, Any]) -> list[str]:
    rows = []
    for how in ("eager", "compiled"):
        if how in r:
            rate, ratio = r[how]["tokens_per_second"], r[how]["ratio"]
            rows.append([how, *(f"{rate[n]:,.0f}" for n in ("hand-written", "regenerated")), ratio["median"]])
    cold = r.get("cold", {})
    words = [f"First compiled step: {', '.join(f'{n} {s:.1f} s' for n, s in cold.items())}."] if cold else []
    return [*_table(["training step", "hand-written, tokens/s", "regenerated, tokens/s", "ratio"], rows), "", *words]


def _graphs(r: Mapping[str, Any]) -> list[str]:
    if not r["captured"]:
        return ["Not captured: there are no CUDA graphs on a CPU."]
    equal = "equal" if r["ok"] else "NOT equal"
    return [
        f"Replayed and eager are {equal} to the bit; "
        + ", ".join(f"{n} {t:.2f} ms" for n, t in r["milliseconds"].items())
    ]


def _payoff(r: Mapping[str, Any]) -> list[str]:
    rows = [[row["name"], row["rate"], row["loss"], row["seconds"]] for row in r["rows"]]
    return [f"{r['flops']:.0e} FLOPs each, one seed, one rate.", "", *_table(["", "rate", "loss", "seconds"], rows)]


_WORDS: dict[str, Callable[[Mapping[str, Any]], list[str]]] = {
    "bits": _bits,
    "speed": _speed,
    "tests": _tests,
    "growth": _growth,
    "throughput": _throughput,
    "graphs": _graphs,
    "payoff": _payoff,
}


def run(argv: list[str]) -> int:
    """Entry of ``python -m benchmarks gpu_check``."""
    parser = common.parser("gpu_check", __doc__)
    parser.add_argument("--rehearse", action="store_true", help="every part at a tiny size on the CPU")
    parser.add_argument("--part", action="append", choices=list(PARTS), help="only these; may be repeated")
    parser.add_argument("--page", action="store_true", help="only make the page of what is there")
    options = parser.parse_args(argv)
    folder = common.ROOT / ("out/gpu-rehearsal" if options.rehearse else "docs/gpu")
    good = True
    if not options.page:
        if not options.rehearse and not torch.cuda.is_available():
            print("No GPU that torch can use here: nothing was measured. --rehearse runs every part, tiny, on the CPU.")
            return 2
        good = perform(options.part or list(PARTS), folder, options.rehearse)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text(page(folder))
    print(f"page: {folder / 'README.md'}")
    return 0 if good else 1
