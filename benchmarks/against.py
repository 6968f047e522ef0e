"""This working tree against another revision of fxgrow, side by side in one run: capture, plan, materialise, verify.

Both are laid out as installed packages in a temporary folder and take turns, each round in a fresh process on one
thread. The figure of a stage is the smallest CPU time over the rounds; the ratio is this tree's over the other's.
``python -m benchmarks against --base v0.1.0``.
"""

from __future__ import annotations

import importlib
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import common

#: stages whose ratio is bounded, and the bound
BOUNDED = ("plan", "materialise", "verify")
BOUND = 1.1


def _gpt(width: int, layers: int) -> tuple[nn.Module, tuple[Any, ...]]:
    from examples.gpt.model import GPT, GPTConfig

    config = GPTConfig(vocab_size=256, block_size=64, n_layer=layers, n_head=4, n_embd=width)
    idx = torch.randint(256, (2, 32))
    return GPT(config), (idx, idx)


def _convolutions(width: int) -> tuple[nn.Module, tuple[Any, ...]]:
    layers: list[nn.Module] = []
    channels = 3
    for i in range(4):
        out = width * 2**i
        layers += [nn.Conv2d(channels, out, 3, padding=1, stride=2), nn.BatchNorm2d(out), nn.ReLU()]
        channels = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10)), (
        torch.randn(4, 3, 64, 64),
    )


def _llama(layers: int, small: bool) -> tuple[nn.Module, tuple[Any, ...]]:
    from benchmarks.plan import SMALL, Llama, LlamaConfig

    config = LlamaConfig(layers=layers, **(SMALL if small else {}))
    return Llama(config).to(torch.bfloat16), (torch.zeros(2, 16, dtype=torch.int64),)


def _gpt2(shape: str) -> tuple[nn.Module, tuple[Any, ...]]:
    from benchmarks.grow import SHAPES
    from examples.gpt.model import GPT

    idx = torch.zeros(2, 32, dtype=torch.int64)
    return GPT(SHAPES[shape]), (idx, idx)


#: a model's maker, its sizes, the axes that are doubled, and whether on the meta device (where nothing is made)
MODELS: dict[str, tuple[Any, dict[str, Any], str, bool]] = {
    "gpt": (_gpt, {"width": 256, "layers": 6}, "*/residual", False),
    "convolutions": (_convolutions, {"width": 32}, "*/channels", False),
    "gpt on meta": (_gpt, {"width": 1024, "layers": 24}, "transformer.h.*.mlp/hidden", True),
    "gpt-2": (_gpt2, {"shape": "gpt2"}, "*/heads */hidden */residual", True),
    "llama-70b, 8 layers": (_llama, {"layers": 8, "small": False}, "*/hidden */residual", True),
    "llama-70b": (_llama, {"layers": 80, "small": False}, "*/hidden */residual", True),
}
#: those that ``house`` compares, and those that ``against`` does where it is not told
HOUSE = ("gpt-2", "llama-70b, 8 layers", "llama-70b")
USUAL = tuple(m for m in MODELS if m not in HOUSE)
QUICK: dict[str, dict[str, Any]] = {
    "gpt": {"width": 32, "layers": 2},
    "convolutions": {"width": 4},
    "gpt on meta": {"width": 64, "layers": 2},
    "gpt-2": {"shape": "tiny"},
    "llama-70b, 8 layers": {"layers": 1, "small": True},
    "llama-70b": {"layers": 2, "small": True},
}


def measure(model: str, quick: bool) -> dict[str, Any]:
    """CPU seconds of each stage of doubling a model's axes, in this process; ``package``: of the fxgrow it imports."""
    import fxgrow
    from fxgrow.growth import build
    from fxgrow.spec import GrowthSpec

    torch.set_num_threads(1)
    torch.manual_seed(0)
    make, sizes, axes, meta = MODELS[model]
    with torch.device("meta") if meta else torch.device("cpu"):
        module, args = make(**(QUICK[model] if quick else sizes))
    spec = [{"op": "widen", "axis": axis, "factor": 2} for axis in axes.split()]
    out: dict[str, Any] = {}

    def timed(stage: str, f: Callable[[], Any], times: int = 3) -> Any:
        """Smallest of several: the first also compiles or loads the kernels."""
        for _ in range(times):
            start = time.process_time()
            result = f()
            out[stage] = min(out.get(stage, float("inf")), time.process_time() - start)
        return result

    program = timed("capture", lambda: fxgrow.capture(module, args), times=1)

    def plan() -> Any:
        program._axes = None  # analysed anew
        return fxgrow.plan_growth(program, GrowthSpec.parse(spec))

    decided, grown = timed("plan", plan)
    if not meta:
        timed("materialise", lambda: build(program, grown, decided, {}))
        original = _regenerate()(program, program.tensors)  # remembers its program, so that it is not traced again
        timed("grow", lambda: fxgrow.grow(original, spec, args, verify=False))
        timed("grow and verify", lambda: fxgrow.grow(original, spec, args, verify="float64"))
        out["verify"] = out["grow and verify"] - out["grow"]
    return {**out, "package": str(Path(fxgrow.__file__).parent)}


def _regenerate() -> Callable[..., nn.Module]:
    """Of the fxgrow that is measured: revisions before the layers have it elsewhere."""
    try:  # the old name first: an editable installation would answer for the new one, with this tree's
        return importlib.import_module("fxgrow.regenerate").regenerate  # type: ignore[no-any-return]
    except ModuleNotFoundError:
        return importlib.import_module("fxgrow.emit.module").regenerate  # type: ignore[no-any-return]


def run(argv: list[str], *, name: str = "against", doc: str | None = __doc__, models: Sequence[str] = USUAL) -> int:
    """Compare; exit status 1 where a bounded stage is slower than its bound.

    Args:
        name, doc: of the benchmark whose options these are.
        models: measured where ``--models`` does not say.
    """
    arguments = common.parser(name, doc)
    arguments.add_argument("--base", default="HEAD", metavar="REV", help="the other revision (HEAD)")
    arguments.add_argument("--repeats", type=int, default=5, help="rounds (5)")
    arguments.add_argument("--models", nargs="+", choices=list(MODELS), default=list(models), help="of these")
    options = arguments.parse_args(argv)
    repeats = 1 if options.quick else options.repeats
    samples: dict[str, dict[str, dict[str, list[float]]]] = {}
    with tempfile.TemporaryDirectory(prefix="fxgrow-against-") as temporary:
        folder = Path(temporary)
        common.installed(common.checkout(options.base, folder / "archive"), folder / "base")
        common.installed(common.ROOT, folder / "here")
        for number in range(repeats):
            for model in options.models:
                for tree in ("base", "here") if number % 2 == 0 else ("here", "base"):
                    found = common.isolated(
                        "benchmarks.against:measure",
                        {"model": model, "quick": options.quick},
                        env=common.tree_environment(folder / tree),
                    )
                    if found.pop("package") != str(folder / tree / "fxgrow"):
                        raise RuntimeError("the process imported another fxgrow than the one it was to measure")
                    for stage, seconds in found.items():
                        sides = samples.setdefault(model, {}).setdefault(stage, {"base": [], "here": []})
                        sides[tree].append(seconds)
    rows, worst, result = [], 0.0, []
    for model, stages in samples.items():
        for stage, sides in stages.items():
            base, here = min(sides["base"]), min(sides["here"])
            ratio = here / base
            if stage in BOUNDED:
                worst = max(worst, ratio)
            spread = statistics.median(sides["here"]) / statistics.median(sides["base"])
            rows.append([f"{model}: {stage}", base, here, ratio, spread])
            result.append({"model": model, "stage": stage, "base": sides["base"], "here": sides["here"]})
    common.table(f"CPU seconds, {options.base} and this tree", ["", "base", "here", "ratio", "ratio of medians"], rows)
    measured = [stage for stage in BOUNDED if any(stage in stages for stages in samples.values())]
    met = common.verdict("slowest of " + ", ".join(measured), worst, BOUND)
    with common.figure(options.out, name) as (ax,):
        ax.barh([str(r[0]) for r in rows], [float(r[3]) for r in rows])
        ax.axvline(1.0, color="black", linewidth=0.8)
        ax.set_xlabel(f"CPU time over that of {options.base}")
    common.save(
        options.json,
        {"environment": common.environment(1), "base": options.base, "samples": result, "bounds": [met]},
    )
    return 0 if met["met"] or options.quick else 1
