"""The command line: ``fxgrow inspect | plan | grow | verify | train | schema | passes``.

Results go to standard output (``--json`` where a program reads them), progress and errors to standard error. Exit code
0: done; 1: a verification measured a difference; 2: refused or wrong, with one message that says why.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fxgrow.errors import FxgrowError

if TYPE_CHECKING:
    from fxgrow.axes.analysis import AxisInfo
    from fxgrow.capture import Program
    from fxgrow.modelref import Named
    from fxgrow.plan import GrowthPlan
    from fxgrow.verify import Receipt

app = typer.Typer(
    name="fxgrow",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_state = {"traceback": False}

Model = Annotated[
    str,
    typer.Argument(
        help="package.module:callable that returns a module, (module, args), (module, args, kwargs) or a Task; "
        "or a checkpoint folder.",
        show_default=False,
    ),
]
Config = Annotated[
    list[str] | None, typer.Option("--config", "-c", metavar="KEY=VALUE", help="Argument of the callable; repeat it.")
]
Input = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        "-i",
        metavar="[NAME=]DTYPE[SIZES]<MAX",
        help='Example input, as in "int64[2,16]<65" or "x=float32[2,3,32,32]"; repeat it. Sizes of at least 2.',
    ),
]
Spec = Annotated[
    str, typer.Argument(help="A spec file, or YAML: '{op: widen, axis: \"*/hidden\", factor: 2}'.", show_default=False)
]
Weights = Annotated[
    Path | None,
    typer.Option("--checkpoint", "-w", help="Weights of the model: a .safetensors state dict or a checkpoint folder."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, …")]
Seed = Annotated[int, typer.Option(help="Of new weights and example inputs.")]


def out() -> Console:
    return Console(highlight=False)


def say() -> Console:
    return Console(stderr=True, highlight=False)


@contextmanager
def working(what: str) -> Iterator[None]:
    """A spinner on a terminal, nothing elsewhere."""
    console = say()
    if console.is_terminal:
        with console.status(f"{what} …"):
            yield
    else:
        yield


def print_json(data: Any) -> None:
    sys.stdout.write(json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def amount(value: int) -> str:
    """Bytes for people: 1536 → 1.5 KiB."""
    size = float(value)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


# versions -------------------------------------------------------------------------------------------------------------


def versions() -> list[tuple[str, str]]:
    from importlib.metadata import PackageNotFoundError, version

    import torch

    import fxgrow
    from fxgrow.kernels import backends

    rows = [("fxgrow", fxgrow.__version__), ("Python", sys.version.split()[0]), ("torch", torch.__version__)]
    rows.append(("CUDA", str(torch.version.cuda) if torch.cuda.is_available() else "no device"))
    try:
        rows.append(("triton", version("triton")))
    except PackageNotFoundError:
        rows.append(("triton", "not installed"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows += [(f"kernels: {b.name}", b.devices if b.available else f"not available: {b.reason}") for b in backends()]
    return rows


def _version(value: bool) -> None:
    if value:
        for name, text in versions():
            sys.stdout.write(f"{name:<16} {text}\n")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Versions and kernel backends.")
    ] = False,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error comes from.")] = False,
) -> None:
    """Grow neural networks while they train, exactly.

    \b
    See what can grow:  fxgrow inspect examples.gpt.train:task
    Why, or why not:    fxgrow inspect examples.gpt.train:task --why ./vocab
    Try it on paper:    fxgrow plan examples.gpt.train:task spec.yaml
    Grow a checkpoint:  fxgrow grow my.models:gpt spec.yaml -w w.safetensors -o big
    Check it later:     fxgrow verify big
    Train and grow:     fxgrow train examples.gpt.train:task --out out/run

    A spec is a file or YAML: '{op: widen, axis: "*/hidden", factor: 2}'.

    The current folder is importable. `fxgrow COMMAND --help` explains each command with examples.
    """
    _state["traceback"] = traceback


# inspect --------------------------------------------------------------------------------------------------------------


def collapsed(name: str, stacks: dict[str, list[int]]) -> str:
    """A name with the numbers of repeated blocks as ``*``: the glob that a spec uses."""
    path, slash, role = name.partition("/")
    parts = path.split(".")
    for i in range(1, len(parts)):
        if parts[i].isdigit() and ".".join(p for p in parts[:i]) in stacks:
            parts[i] = "*"
    return ".".join(parts) + slash + role


def axis_groups(program: Program) -> list[dict[str, Any]]:
    """Axes, those of repeated blocks together, as plain data."""
    from fxgrow.regenerate import stacks_of

    stacks = stacks_of(program)
    groups: dict[tuple[str, bool], list[AxisInfo]] = {}
    for info in program.axes:
        groups.setdefault((collapsed(info.name, stacks), info.growable), []).append(info)
    rows = []
    for (name, growable), infos in groups.items():
        rows.append(
            {
                "pattern": name,
                "names": [i.name for i in infos],
                "sizes": [i.size for i in infos],
                "role": infos[0].role,
                "growable": growable,
                "reason": None if growable else _reason(infos[0].reason),
                "members": list(dict.fromkeys(collapsed(str(m), stacks) for i in infos for m in i.members)),
            }
        )
    return rows


def _reason(reason: Any) -> str:
    """A frozen axis's reason in one line: why, by which op, in which line of the user's code."""
    file, _, rest = reason.source.partition(":")
    line = rest.partition(":")[0]
    where = f" at {Path(file).name}:{line}" if line.isdigit() else ""
    op = reason.op.removesuffix(".default")
    return f"{reason.reason} ({op}{where})" if "." in op else f"{reason.reason}{where}"


def inspection(program: Program) -> dict[str, Any]:
    from fxgrow.regenerate import stacks_of

    containers = program.containers
    return {
        "model": program.class_name,
        "parameters": sum(p.numel() for p in program.parameters.values()),
        "bytes": sum(p.numel() * p.element_size() for p in program.parameters.values()),
        "modes": "train and eval, a graph each" if program.mode_reason else "train and eval",
        "mode_reason": program.mode_reason,
        "axes": [
            {
                "name": i.name,
                "size": i.size,
                "role": i.role,
                "growable": i.growable,
                "reason": str(i.reason) if i.reason is not None else None,
                "members": [str(m) for m in i.members],
            }
            for i in program.axes
        ],
        "stacks": [
            {"stack": s, "blocks": len(numbers), "kind": containers.get(f"{s}.{numbers[0]}", "")}
            for s, numbers in stacks_of(program).items()
        ],
        "ties": dict(program.aliases),
        "ops_without_a_rule": sorted(program.axes.unknown_ops),
    }


def _capture(named: Named) -> Program:
    import fxgrow

    with working(f"capturing {named.label}"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said in the output itself
        program = fxgrow.capture(named.module, named.args, named.kwargs)
        len(program.axes)
    return program


def _load(reference: str, **options: Any) -> Named:
    from fxgrow.modelref import load_model

    with working(f"building {reference}"):
        return load_model(reference, **options)


@app.command()
def inspect(
    model: Model,
    config: Config = None,
    input: Input = None,
    json_: Json = False,
    why: Annotated[
        str | None, typer.Option(metavar="AXIS", help="What grows with an axis, or why it cannot grow.")
    ] = None,
    all_: Annotated[bool, typer.Option("--all", help="List the axes of each block one by one.")] = False,
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw the axes and the tensors they tie.")
    ] = None,
    device: Device = "cpu",
    seed: Seed = 0,
) -> None:
    """What can grow in a model: its axes and its repeated blocks.

    \b
    fxgrow inspect examples.gpt.train:task
    fxgrow inspect examples.gpt.train:task --why "transformer.h.0.attn/heads"
    fxgrow inspect my.models:cnn -c width=16 -i "float32[2,3,32,32]" --picture axes.png
    """
    named = _load(model, config=config or (), inputs=input or (), device=device, seed=seed, dry=True)
    program = _capture(named)
    if picture is not None:
        from fxgrow.pictures import draw_axes

        with working("drawing"):
            draw_axes(program, axis_groups(program), picture)
        say().print(f"picture  {picture}", soft_wrap=True)
    if why is not None:
        from fxgrow.errors import SpecError

        infos = program.axes.find(why)
        texts = [program.axes.explain(i.name) for i in infos]
        if json_:
            print_json({i.name: text for i, text in zip(infos, texts, strict=True)})
        else:
            for text in texts:
                out().print(escape(text), soft_wrap=True)
        if not texts:
            raise SpecError(f"no axis matches {why!r}")
        return
    data = inspection(program)
    if json_:
        print_json(data)
        return
    console = out()
    console.print(
        f"[bold]{escape(data['model'])}[/]  {data['parameters']:,} parameters, {amount(data['bytes'])}; "
        f"captured for {data['modes']}" + (f" ({escape(data['mode_reason'])})" if data["mode_reason"] else "")
    )
    table = Table(title="axes", title_justify="left", box=None, pad_edge=False, header_style="bold")
    table.add_column("name", overflow="fold")
    table.add_column("size", justify="right")
    table.add_column("in or, where it cannot grow, why", overflow="fold", ratio=1)
    for group in axis_groups(program):
        names, sizes = group["names"], group["sizes"]
        text = _members(group["members"]) if group["growable"] else f"frozen: {group['reason']}"
        style = "" if group["growable"] else "dim"
        if all_:
            for name, size in zip(names, sizes, strict=True):
                table.add_row(escape(name), str(size), escape(text), style=style)
        else:
            count = f" ×{len(names)}" if len(names) > 1 else ""
            shown = "/".join(map(str, dict.fromkeys(sizes)))
            table.add_row(escape(group["pattern"]) + count, shown, escape(text), style=style)
    console.print(table)
    for stack in data["stacks"]:
        console.print(f"stack [bold]{escape(stack['stack'])}[/]: {stack['blocks']} × {escape(stack['kind'])}")
    if data["ties"]:
        console.print("tied: " + escape(", ".join(f"{a} = {b}" for a, b in data["ties"].items())))
    if data["ops_without_a_rule"]:
        console.print(
            f"[yellow]no rule for {escape(', '.join(data['ops_without_a_rule']))}[/]: what they touch is frozen; "
            "docs/rules.md says how to add one"
        )


def _members(members: Sequence[str], most: int = 4) -> str:
    more = f" and {len(members) - most} more" if len(members) > most else ""
    return ", ".join(members[:most]) + more


# plan -----------------------------------------------------------------------------------------------------------------


@app.command()
def plan(
    model: Model,
    spec: Spec,
    config: Config = None,
    input: Input = None,
    json_: Json = False,
    seed: Seed = 0,
) -> None:
    """Dry run of a growth: what grows, by how much, what it costs. Needs no weights and computes nothing.

    \b
    fxgrow plan examples.gpt.train:task spec.yaml
    fxgrow plan examples.gpt.train:task '{op: widen, axis: "*/hidden", factor: 1.5}'
    fxgrow plan examples.gpt.train:task '{op: extend, axis: "*/positions", factor: 2}'
    fxgrow plan examples.gpt.train:task '[{op: deepen, stack: transformer.h, factor: 2}]' --json > plan.json
    """
    from fxgrow.growth import plan_growth
    from fxgrow.spec import GrowthSpec

    parsed = GrowthSpec.parse(spec)
    named = _load(model, config=config or (), inputs=input or (), seed=seed, dry=True)
    program = _capture(named)
    with working("planning"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made, grown = plan_growth(program, parsed)
    if json_:
        sys.stdout.write(made.to_json(indent=2) + "\n")
        return
    console = out()
    show_plan(console, made, program)
    before = sum(p.numel() * p.element_size() for p in program.parameters.values())
    width = {n: p.element_size() for n, p in program.parameters.items()}
    after = 0
    for name, tensor in made.tensors.items():
        if name in grown.parameters:
            numel = 1
            for s in tensor.shape:
                numel *= s
            after += numel * width.get(tensor.source or "", next(iter(width.values()), 4))
    console.print(
        f"parameters {made.parameters_before:,} → {made.parameters_after:,} "
        f"(×{made.parameters_after / max(1, made.parameters_before):.2f}), {amount(before)} → {amount(after)}"
    )


def show_plan(console: Console, made: GrowthPlan, program: Program | None = None) -> None:
    """A plan as tables: axes, blocks and layers, then what changes in the graph."""
    from fxgrow.regenerate import stacks_of

    stacks = stacks_of(program) if program is not None else {}
    console.print(f"[bold]{escape(made.model)}[/]: [bold]{made.exactness}[/]")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("operation", "what", "from", "to", "how"):
        table.add_column(column, overflow="fold", justify="right" if column in ("from", "to") else "left")
    for step in made.steps:
        rows: dict[tuple[str, ...], int] = {}
        for axis in step.axes:
            key = (step.op, collapsed(axis.name, stacks), str(axis.old), str(axis.new), axis.how)
            rows[key] = rows.get(key, 0) + 1
        for change in step.changes:
            if change.kind == "clone":
                text = {"zero": "last projections zero", "gate": "gate at zero", "stack": "plain copy"}[change.init]
                key = (
                    step.op,
                    f"block {change.stack}.{change.number}",
                    "",
                    "new",
                    f"copy of {change.stack}.{change.source}, {text}",
                )
                rows[key] = 1
            elif change.kind == "insert":
                rows[(step.op, change.path, "", "new", f"identity {change.layer} after {change.after}")] = 1
        for (op, what, old, new, how), count in rows.items():
            table.add_row(op, escape(what) + (f" ×{count}" if count > 1 else ""), old, new, escape(how))
    if table.row_count:
        console.print(table)
    lines: dict[str, int] = {}
    for step in made.steps:
        for change in step.changes:
            if change.kind == "edit":
                arguments = ", ".join(
                    f"{k}={_short(v)}"
                    for k, v in change.arguments.items()
                    if not (isinstance(v, dict) and "$node" in v)  # the same value as before
                )
                base = change.node.rstrip("0123456789").rstrip("_")
                text = f"{base}: {arguments}" + (f", by {change.target}" if change.target else "")
            elif change.kind == "rescale":
                text = f"{change.node.rstrip('0123456789').rstrip('_')}: result × {change.factor:g}"
            else:
                continue
            lines[text] = lines.get(text, 0) + 1
    if lines:
        console.print("in the graph")
        for text, count in lines.items():
            console.print("  " + escape(text) + (f"  ×{count}" if count > 1 else ""), soft_wrap=True)
    for note in made.notes:
        console.print(f"[yellow]note[/] {escape(note)}", soft_wrap=True)


def _short(value: Any) -> str:
    if isinstance(value, dict) and "$node" in value:
        return "*" if str(value["$node"]).startswith("sym_") else str(value["$node"])
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_short(v) for v in value) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)


# grow -----------------------------------------------------------------------------------------------------------------


class Level(StrEnum):
    """How a growth is measured."""

    auto = "auto"
    float64 = "float64"
    native = "native"
    off = "off"


@app.command()
def grow(
    model: Model,
    spec: Spec,
    out_: Annotated[Path, typer.Option("--out", "-o", help="Folder of the grown checkpoint.", show_default=False)],
    checkpoint: Weights = None,
    config: Config = None,
    input: Input = None,
    verify: Annotated[Level, typer.Option(help="What to measure it in.")] = Level.auto,
    examples: Annotated[bool, typer.Option(help="Store the example inputs and outputs, for `fxgrow verify`.")] = True,
    json_: Json = False,
    device: Device = "cpu",
    seed: Seed = 0,
) -> None:
    """Grow a checkpoint: weights in, a larger checkpoint that computes the same out.

    \b
    fxgrow grow my.models:gpt spec.yaml --checkpoint small.safetensors --out big
    fxgrow grow out/big '{op: widen, axis: "*/heads", factor: 2}' --out out/bigger

    Without --checkpoint the weights are those the callable makes.
    """
    import fxgrow
    from fxgrow.checkpoint import save
    from fxgrow.spec import GrowthSpec

    parsed = GrowthSpec.parse(spec)
    named = _load(
        model, config=config or (), inputs=input or (), weights=checkpoint, device=device, seed=seed, dry=False
    )
    level: Any = False if verify is Level.off else verify.value
    with working("growing"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        growth = fxgrow.grow(named.module, parsed, named.args, named.kwargs, verify=level)
    with working(f"writing {out_}"):
        save(growth, out_, examples=examples)
    if json_:
        print_json({"out": str(out_), **json.loads(growth.receipt.model_dump_json())})
        return
    console = out()
    show_plan(console, growth.plan)
    show_receipt(console, growth.receipt, growth.plan.notes)
    console.print(f"written to {out_}", soft_wrap=True)


def show_receipt(console: Console, receipt: Receipt, said: Sequence[str] = ()) -> None:
    """What was measured; notes that were ``said`` already are left out."""

    def error(value: float | None) -> str:
        return "not measured" if value is None else f"{value:.1e}"

    table = Table(title="receipt", title_justify="left", box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    rows = [
        ("function", receipt.exactness),
        ("relative error, float64", error(receipt.error_float64)),
        ("  train mode", error(receipt.error_float64_train)),
        ("relative error, own dtype", error(receipt.error_native)),
        ("gradients against the map", error(receipt.gradient_error)),
        ("compared on", "; ".join(["the example", *receipt.inputs]) if receipt.measured != "nothing" else "nothing"),
        ("not exercised", "; ".join(receipt.unexercised) or "nothing was found"),
        ("new weights without gradient", ", ".join(receipt.dead_parameters) or "none"),
        ("parameters", f"{receipt.params_before:,} → {receipt.params_after:,}"),
        ("bytes", f"{amount(receipt.bytes_before)} → {amount(receipt.bytes_after)}"),
        ("seconds", ", ".join(f"{k} {v:.2f}" for k, v in receipt.seconds.items())),
    ]
    for name, text in rows:
        table.add_row(name, escape(text))
    console.print(table)
    for note in dict.fromkeys(n for n in receipt.notes if n not in said):
        console.print(f"[yellow]note[/] {escape(note)}", soft_wrap=True)


# verify ---------------------------------------------------------------------------------------------------------------

#: largest relative error by dtype of the weights, when a stored model is compared with what it was grown from
TOLERANCE = {"float64": 1e-10, "float32": 1e-5, "float16": 1e-2, "bfloat16": 5e-2}


@app.command()
def verify(
    checkpoint_dir: Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint folder.", show_default=False)],
    against: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Compare with this model (package.module:callable or a checkpoint)."),
    ] = None,
    checkpoint: Weights = None,
    config: Config = None,
    input: Input = None,
    json_: Json = False,
    device: Device = "cpu",
    seed: Seed = 0,
) -> None:
    """Check a grown checkpoint: that it loads, that it computes what it computed, and the same as another model.

    \b
    fxgrow verify out/big
    fxgrow verify out/big --against my.models:gpt --checkpoint small.safetensors

    Exit code 1 when the outputs differ by more than rounding.
    """
    from fxgrow.checkpoint import load
    from fxgrow.verify import output_numbers

    with working(f"loading {checkpoint_dir}"):
        loaded = load(checkpoint_dir, device=device)
    dtype = next((r.dtype for r in loaded.manifest.tensors.values() if "float" in r.dtype), "float32")
    limit = TOLERANCE.get(dtype, 5e-2)
    data: dict[str, Any] = {
        "checkpoint": str(checkpoint_dir),
        "model": loaded.manifest.class_name,
        "parameters": loaded.manifest.parameters,
        "written_by": f"fxgrow {loaded.manifest.fxgrow}, torch {loaded.manifest.torch}",
        "exactness": loaded.plan.exactness if loaded.plan is not None else None,
        "tolerance": limit,
    }
    if loaded.outputs is not None:
        with working("running"):
            data["error_replay"] = loaded.replay_error()
    if against is not None:
        named = _load(
            against, config=config or (), inputs=input or (), weights=checkpoint, device=device, seed=seed, dry=False
        )
        served = [(c, n) for c, n in output_numbers(loaded.program) if c is None or c.serves(False)]
        examples = [(named.args, named.kwargs, served[0][1])]
        if loaded.outputs is not None and not input:
            examples = [(c.args, c.kwargs, n) for c, n in served if c is not None]
        with working("comparing"):
            pairs = [(compare, "error_native"), (compare_float64, "error_float64")]
            for function, key in pairs:
                data[key] = max(function(named.module, loaded.module, a, k, loaded.plan, n) for a, k, n in examples)
    measured = {k: v for k, v in data.items() if k.startswith("error_")}
    lossy = against is not None and loaded.plan is not None and not loaded.plan.exact_elsewhere
    wrong = {k: v for k, v in measured.items() if not v <= limit and (k == "error_replay" or not lossy)}
    data["ok"] = not wrong
    if json_:
        print_json(data)
    else:
        console = out()
        console.print(
            f"[bold]{escape(str(checkpoint_dir))}[/]: {escape(data['model'])}, {data['parameters']:,} parameters, "
            f"written by {data['written_by']}",
            soft_wrap=True,
        )
        names = {
            "error_replay": "against what it computed when it was written",
            "error_native": f"against {against}, own dtype",
            "error_float64": f"against {against}, computed in float64 from the stored {dtype} weights",
        }
        for key, value in measured.items():
            mark = "[red]differs[/]" if key in wrong else "[green]ok[/]"
            console.print(f"{mark}  {value:.1e}  {escape(names[key])}", soft_wrap=True)
        if not measured:
            console.print("it loads; nothing was measured: no examples are stored. Give --against MODEL")
        if lossy:
            console.print(f"[yellow]note[/] the growth was {data['exactness']}: it may differ")
    if wrong:
        raise typer.Exit(1)


def compare(
    old: Any,
    new: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    plan: GrowthPlan | None = None,
    numbers: Sequence[int] | None = None,
) -> float:
    """Largest relative error of an output, both in eval mode.

    Where the plan appends entries to an output, of the old ones; outputs that it changes are left out. ``numbers`` are
    those of the call's outputs among all calls'.
    """
    import torch
    import torch.utils._pytree as pytree

    from fxgrow.errors import CheckpointError, ExactnessError
    from fxgrow.verify import relative_errors

    results = []
    for module in (old, new):
        copies = pytree.tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, (args, kwargs))
        with torch.no_grad():
            results.append(module.eval()(*copies[0], **copies[1]))
    leaves = [[t for t in pytree.tree_leaves(r) if isinstance(t, torch.Tensor)] for r in results]
    shapes = [[list(t.shape) for t in row] for row in leaves]
    differ = f"the models do not return the same: {shapes[0]} against {shapes[1]}"
    if len(leaves[0]) != len(leaves[1]):
        raise CheckpointError(differ)
    try:
        errors = relative_errors(leaves[0], leaves[1], plan, numbers if plan is not None else None)
    except ExactnessError:
        raise CheckpointError(differ) from None
    return max((e.relative_error for e in errors if not e.changed), default=0.0)


def compare_float64(
    old: Any,
    new: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    plan: GrowthPlan | None = None,
    numbers: Sequence[int] | None = None,
) -> float:
    """The same with both graphs in float64, so that the arithmetic's rounding is out of the comparison."""
    import torch
    import torch.utils._pytree as pytree

    import fxgrow
    from fxgrow.regenerate import regenerate
    from fxgrow.verify import widen_float

    args, kwargs = pytree.tree_map(
        lambda x: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x, (args, kwargs)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        modules = []
        for module in (old, new):
            program = fxgrow.capture(module, *_undouble(module, args, kwargs))
            modules.append(regenerate(program, {n: widen_float(t) for n, t in program.tensors.items()}, double=True))
    return compare(modules[0], modules[1], args, kwargs, plan, numbers)


def _undouble(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs in the module's own dtype again, to capture it with."""
    import torch
    import torch.utils._pytree as pytree

    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    back: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map(
        lambda x: x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x, (args, kwargs)
    )
    return back


# train ----------------------------------------------------------------------------------------------------------------


@app.command()
def train(
    task: Annotated[
        str,
        typer.Argument(help="package.module:callable that returns a fxgrow.training.Task.", show_default=False),
    ],
    out_: Annotated[Path, typer.Option("--out", "-o", help="Folder for log and checkpoints.", show_default=False)],
    config: Config = None,
    hyper: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Hyper-parameter of the run, as in steps=500; repeat it."),
    ] = None,
    schedule: Annotated[Path | None, typer.Option(help="When and how to grow, instead of the task's own.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in --out.")] = False,
    stop_at: Annotated[int | None, typer.Option(help="Stop with a checkpoint after this many steps.")] = None,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0 leaves it to PyTorch.")] = 0,
) -> None:
    """Train a task, growing by its schedule, with progress, a log and checkpoints.

    \b
    fxgrow train examples.gpt.train:task --out out/run --hyper steps=300
    fxgrow train examples.gpt.train:task --out out/run --resume
    """
    import dataclasses

    import torch

    from fxgrow.errors import SpecError
    from fxgrow.modelref import call, parse_settings
    from fxgrow.training import Hyper, Task
    from fxgrow.training import train as run_training

    made = call(task, parse_settings(config or ()))
    if not isinstance(made, Task):
        raise SpecError(f"{task!r} returned a {type(made).__name__}, not a fxgrow.training.Task")
    changes = parse_settings(hyper or (), "--hyper")
    known = {f.name for f in dataclasses.fields(Hyper)}
    for key in changes:
        if key not in known:
            import difflib

            near = difflib.get_close_matches(key, known, n=3) or sorted(known)
            raise SpecError(f"--hyper {key}: no such hyper-parameter; did you mean {', '.join(near)}?")
    if changes:
        made = dataclasses.replace(made, hyper=dataclasses.replace(made.hyper, **changes))
    if schedule is not None:
        made = dataclasses.replace(made, schedule=schedule)
    if threads:
        torch.set_num_threads(threads)
    console = out()
    try:
        run = run_training(made, out_, resume=resume, stop_at=stop_at, console=console)
    except KeyboardInterrupt:
        say().print(f"interrupted; go on with --resume --out {out_}", soft_wrap=True)
        raise typer.Exit(130) from None
    if run.step < made.hyper.steps:
        console.print(f"stopped after {run.step} steps; go on with --resume --out {out_}", soft_wrap=True)
    else:
        console.print(f"{run.step} steps, validation loss {run.val_loss:.4f}; log and checkpoints in {out_}")


# schema and passes ----------------------------------------------------------------------------------------------------


class Kind(StrEnum):
    """What a schema is of."""

    spec = "spec"
    schedule = "schedule"
    plan = "plan"
    manifest = "manifest"


@app.command()
def schema(kind: Annotated[Kind, typer.Argument(help="Of which file.")] = Kind.spec) -> None:
    """JSON Schema of a file, plug-ins included, for editors that check YAML as you type.

    \b
    fxgrow schema spec > spec.schema.json
    # first line of a spec: yaml-language-server: $schema=spec.schema.json
    """
    if kind is Kind.spec:
        from fxgrow.spec import json_schema

        data = json_schema()
    elif kind is Kind.schedule:
        from fxgrow.schedule import json_schema as schedule_schema

        data = schedule_schema()
    elif kind is Kind.plan:
        from fxgrow.plan import GrowthPlan

        data = GrowthPlan.model_json_schema(mode="serialization")
    else:
        from fxgrow.checkpoint import Manifest

        data = Manifest.model_json_schema()
    print_json(data)


@app.command()
def passes(json_: Json = False) -> None:
    """The operations a spec can ask for, their fields, and what is plugged in."""
    from fxgrow.passes import PASSES
    from fxgrow.plugins import load_plugins, plugins
    from fxgrow.rules import RULES
    from fxgrow.spec import operations

    for group in ("fxgrow.passes", "fxgrow.rules"):
        load_plugins(group)
    rows: list[dict[str, Any]] = []
    for name, cls in operations().items():
        rows.append(
            {
                "op": name,
                "pass": PASSES[name][1].__name__ if name in PASSES else None,
                "from": cls.__module__,
                "says": (cls.__doc__ or "").strip().splitlines()[0] if cls.__doc__ else "",
                "fields": [f for f in cls.model_fields if f != "op"],
            }
        )
    extra = [p.__dict__ for p in plugins()]
    if json_:
        print_json({"operations": rows, "plugins": extra, "rules": sorted(RULES)})
        return
    console = out()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("operation", "what it does", "fields"):
        table.add_column(column, overflow="fold")
    for row in rows:
        what = row["says"] if row["pass"] else f"{row['says']} [no pass is registered]"
        table.add_row(row["op"], escape(str(what)), ", ".join(row["fields"]))
    console.print(table)
    console.print(f"{len(RULES)} ops have rules; fxgrow passes --json lists them")
    for plugin in plugins():
        console.print(f"plug-in {plugin.name} of {plugin.group}: {plugin.value} ({plugin.package})")
    if not extra:
        console.print("no plug-ins are installed; docs/passes.md and docs/rules.md say how to write one")


# main -----------------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    """Run the command line; errors of fxgrow become one message and exit code 2."""
    try:
        app(args=argv, prog_name="fxgrow")
    except FxgrowError as error:
        if _state["traceback"]:
            raise
        say().print(f"[bold red]error[/] {escape(str(error))}", soft_wrap=True)
        raise SystemExit(2) from None
    except BrokenPipeError:
        raise SystemExit(0) from None


if __name__ == "__main__":
    main()
