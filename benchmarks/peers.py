"""fxgrow against what else there is: torch-pruning, gromo, a script by hand, ``torch.export`` alone.

`bash benchmarks/peers-env.sh` makes an environment with all of them and runs this in it. Tools of one task stand in one
process and take turns, each on a fresh copy of the model that is made before the clock starts; CPU seconds, medians and
quartiles over the rounds. A peer that cannot be imported, or that fails, stands in the table with the reason.

The figures go to `docs/peers.json`, and README's table is made of them.
"""

from __future__ import annotations

import copy
import importlib.metadata
import re
import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import common

FIGURES = common.ROOT / "docs" / "peers.json"
README = common.ROOT / "README.md"
MARKED = re.compile(r"(?<=<!-- peers: begin -->\n).*?(?=<!-- peers: end -->)", re.DOTALL)


@dataclass(frozen=True)
class Tool:
    """What one tool does in a task: ``act(prepare())`` is timed in ``act``; ``check`` looks at one result."""

    prepare: Callable[[], Any]
    act: Callable[[Any], Any]
    check: Callable[[Any], dict[str, Any]] = lambda _: {}
    package: str | None = None
    """The distribution that it comes from, if not fxgrow or torch."""


# planning: which dims of which parameters go with one axis ---------------------------------------------------------


def _planning(model: nn.Module, example: tuple[Tensor, ...], axis: str, layer: str) -> dict[str, Tool]:
    """One axis of a model, and the layer whose outputs lie along it."""
    import fxgrow

    def fresh() -> nn.Module:
        return copy.deepcopy(model)

    def export(m: nn.Module) -> Any:
        dynamic = tuple(dict.fromkeys(range(x.dim()), torch.export.Dim.AUTO) for x in example)
        return torch.export.export(m, example, dynamic_shapes=dynamic, strict=False)

    def again(program: Any) -> Any:
        return fxgrow.plan_growth(program, fxgrow.GrowthSpec.parse({"op": "widen", "axis": axis, "factor": 2}))[0]

    def plan(m: nn.Module) -> Any:
        return again(fxgrow.capture(m, example))

    def group(m: nn.Module) -> Any:
        import torch_pruning

        graph = torch_pruning.DependencyGraph().build_dependency(
            m, example_inputs=example, verbose=False, output_transform=lambda y: y[0] if isinstance(y, tuple) else y
        )
        own = m.get_submodule(layer)
        prune = torch_pruning.prune_conv_out_channels
        if isinstance(own, nn.Linear):
            prune = torch_pruning.prune_linear_out_channels
        return graph.get_pruning_group(own, prune, idxs=[0])

    def touched(plan: Any) -> dict[str, Any]:
        return {"touched": sum(d is not None for t in plan.tensors.values() for d in t.dims)}

    return {
        "torch.export alone": Tool(fresh, export),
        "fxgrow, captured and planned": Tool(fresh, plan, touched),
        "fxgrow, of a captured program": Tool(lambda: fxgrow.capture(fresh(), example), again, touched),
        "torch-pruning, dependency graph": Tool(fresh, group, lambda g: {"members": len(g)}, "torch-pruning"),
    }


def plan_gpt(quick: bool) -> dict[str, Tool]:
    """The hidden width of one MLP in a GPT of twelve layers."""
    from examples.gpt.model import GPT, GPTConfig

    config = GPTConfig(n_layer=2 if quick else 12, n_head=2, n_embd=64)
    tokens = torch.randint(0, config.vocab_size, (2, 17), generator=torch.Generator().manual_seed(0))
    return _planning(
        GPT(config), (tokens[:, :-1].contiguous(),), "transformer.h.0.mlp/hidden", "transformer.h.0.mlp.c_fc"
    )


def plan_resnet(quick: bool) -> dict[str, Tool]:
    """The channels that a stage of a ResNet shares: convolutions, batch norms and a shortcut."""
    from benchmarks.families.classes import ResNet

    return _planning(ResNet(), (torch.randn(2, 3, 16, 16),), "layer2.0.conv2.weight:0", "layer2.0.conv2")


# growing ----------------------------------------------------------------------------------------------------------


def _close(model: nn.Module, grown: nn.Module, x: tuple[Tensor, ...]) -> dict[str, Any]:
    """The largest difference of outputs, over the largest output."""
    with torch.no_grad():
        a, b = model.eval()(*x), grown.eval()(*x)
    a, b = (t[0] if isinstance(t, tuple) else t for t in (a, b))
    return {
        "difference": float((a - b).abs().max() / a.abs().max()),
        "parameters": sum(p.numel() for p in grown.parameters()),
    }


def grow_mlp(quick: bool) -> dict[str, Tool]:
    """A quarter more units in one hidden layer of an MLP, in pairs that cancel."""
    import fxgrow

    width, more = (32, 8) if quick else (512, 128)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, width), nn.SELU(), nn.Linear(width, width), nn.SELU(), nn.Linear(width, 10))
    x = torch.randn(16, 784)
    spec = {"op": "widen", "axis": "2.weight:0", "by": more, "fill": "add"}

    def ours(m: nn.Module) -> nn.Module:
        growth = fxgrow.grow(m, spec, (x,))
        return growth.apply_(m)

    def by_hand(m: nn.Sequential) -> nn.Module:
        up, down = m[2], m[4]
        assert isinstance(up, nn.Linear) and isinstance(down, nn.Linear)
        with torch.no_grad():
            rows = torch.randn(more // 2, width) * up.weight.std()
            columns = torch.randn(10, more // 2) * down.weight.std()
            up.weight = nn.Parameter(torch.cat([up.weight, rows, rows]))
            up.bias = nn.Parameter(torch.cat([up.bias, torch.zeros(more)]))
            down.weight = nn.Parameter(torch.cat([down.weight, columns, -columns], 1))
        up.out_features = down.in_features = width + more
        return m

    def gromo_model() -> Any:
        from gromo.containers.growing_mlp import GrowingMLP

        made = GrowingMLP(784, 10, width, 2, activation=nn.SELU(), device=torch.device("cpu"))
        old = iter(model.state_dict().values())
        with torch.no_grad():
            for layer in made.layers:
                layer.layer.weight.copy_(next(old))
                layer.layer.bias.copy_(next(old))
        return made

    def gromo(m: Any) -> Any:
        layer = m.layers[2]
        layer.create_layer_extensions(more, neuron_pairing="vv_z_negz", noise_ratio=0)
        layer.apply_change(extension_size=more, scaling_factor=1.0)
        layer.delete_update(include_previous=True)
        return m

    def check(m: nn.Module) -> dict[str, Any]:
        return _close(model, m, (x,))

    def fresh() -> nn.Sequential:
        return copy.deepcopy(model)

    return {
        "fxgrow, traced, proved, measured, in place": Tool(fresh, ours, check),
        "gromo, GrowingMLP": Tool(gromo_model, gromo, check, "gromo"),
        "by hand": Tool(fresh, by_hand, check),
    }


def grow_gpt(quick: bool) -> dict[str, Tool]:
    """Stream, heads and hidden width of a GPT doubled."""
    import fxgrow
    from benchmarks.grow import SHAPES, SPEC, by_hand, inputs
    from examples.gpt.model import GPT, GPTConfig

    config = SHAPES["tiny"] if quick else GPTConfig(n_layer=4, n_head=4, n_embd=256, vocab_size=4096)
    torch.manual_seed(0)
    model = GPT(config)
    x = inputs(config)
    program = fxgrow.capture(copy.deepcopy(model), x)

    def fresh() -> GPT:
        return copy.deepcopy(model)

    def check(grown: nn.Module) -> dict[str, Any]:
        return _close(model, grown, x)

    return {
        "fxgrow, traced, proved, measured": Tool(fresh, lambda m: fxgrow.grow(m, SPEC, x).module, check),
        "fxgrow, traced and proved": Tool(fresh, lambda m: fxgrow.grow(m, SPEC, x, verify=False).module, check),
        "fxgrow, of a captured program": Tool(
            lambda: None, lambda _: fxgrow.grow(program, SPEC, verify=False).module, check
        ),
        "by hand, for this one class": Tool(fresh, by_hand, check),
    }


TASKS: dict[str, tuple[str, Callable[[bool], dict[str, Tool]]]] = {
    "plan_gpt": ("What goes with one hidden axis, GPT of 12 layers", plan_gpt),
    "plan_resnet": ("What goes with a stage's channels, ResNet", plan_resnet),
    "grow_mlp": ("Grow one hidden layer, 512 to 640", grow_mlp),
    "grow_gpt": ("Double a GPT (3 to 14 M parameters)", grow_gpt),
}


# measuring --------------------------------------------------------------------------------------------------------


def measure(task: str, threads: int, repeats: int, quick: bool) -> dict[str, Any]:
    """The tools of one task in turns: name -> seconds of each round and what came out, or why there is nothing."""
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    rows: dict[str, dict[str, Any]] = {}
    ready: dict[str, Tool] = {}
    for name, tool in TASKS[task][1](quick).items():
        rows[name] = {"package": _installed(tool.package)}
        try:  # a first turn loads what every process loads once, and shows whether it works at all
            rows[name] |= tool.check(tool.act(tool.prepare()))
            ready[name] = tool
        except Exception as error:
            rows[name]["why"] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
    prepare = {name: tool.prepare for name, tool in ready.items()}
    times = common.side_by_side({n: t.act for n, t in ready.items()}, repeats, prepare=prepare)
    return {name: row | times.get(name, {}) for name, row in rows.items()}


def _installed(package: str | None) -> str | None:
    if package is None:
        return None
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{package}, not installed"


# the table --------------------------------------------------------------------------------------------------------


def table(found: dict[str, Any]) -> str:
    """README's table of the figures, in Markdown."""
    lines = ["| | CPU ms, median (quartiles) | what came out |", "|---|---|---|"]
    for task, rows in found["tasks"].items():
        lines.append(f"| **{TASKS[task][0]}** | | |")
        for name, row in rows.items():
            tool = f"{name} ({row['package']})" if row["package"] else name
            time = _milliseconds(row["cpu"]) if "cpu" in row else "–"
            lines.append(f"| {tool} | {time} | {_outcome(row)} |")
    e = found["environment"]
    where = f"{e['cpu']}, {e['cores']} cores of which {e['threads']} used, load {e['load'][0]}"
    where += f", Python {e['python']}, torch {e['torch']}"
    lines += ["", f"`bash benchmarks/peers-env.sh` makes it again. Measured on: {where}."]
    return "\n".join(lines) + "\n"


def _milliseconds(seconds: list[float]) -> str:
    low, middle, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
    shown = [f"{s * 1e3:,.0f}" if s > 0.1 else f"{s * 1e3:.3g}" for s in (middle, low, high)]
    return "{} ({}–{})".format(*shown)


def _outcome(row: dict[str, Any]) -> str:
    if "why" in row:
        return f"fails: {row['why']}".replace("|", "/")
    if "touched" in row:
        return f"{row['touched']} dims of parameters and buffers"
    if "members" in row:
        return f"{row['members']} members of the group"
    if "difference" in row:
        return f"outputs differ by {row['difference']:.0e}, {row['parameters'] / 1e6:.2f} M parameters"
    return ""


def run(argv: list[str]) -> int:
    """Measure, print, write the figures and README's table."""
    options = common.parser("peers", __doc__)
    options.add_argument("--repeats", type=int, default=15, help="rounds for each task")
    options.add_argument("--tasks", nargs="*", choices=list(TASKS), default=list(TASKS))
    given = options.parse_args(argv)
    threads, repeats = common.threads(given), 2 if given.quick else given.repeats
    tasks = {}
    for task in given.tasks:
        arguments = {"task": task, "threads": threads, "repeats": repeats, "quick": given.quick}
        tasks[task] = common.isolated("benchmarks.peers:measure", arguments)
    found = {"environment": common.environment(threads), "tasks": tasks}
    print(table(found))
    common.save(given.json or (None if given.quick else FIGURES), found)
    if given.json is None and not given.quick:
        write(README, found)
    return 0


def write(page: Path, found: dict[str, Any]) -> None:
    """Put the table between its marks."""
    page.write_text(MARKED.sub(lambda _: table(found), page.read_text(encoding="utf-8")), encoding="utf-8")
