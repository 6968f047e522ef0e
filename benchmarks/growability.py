"""What can grow in which model: capture, analyse and grow every named axis of a list of model families.

Every axis is grown twofold and once to an uneven size (half as much again), by copies, else by new units, in float64
and in a fresh process with a time limit. Writes ``docs/growability.md``. The rows that it is made of are kept in
``docs/growability.json``, so that a few models, or an environment with other libraries, replace their own rows only:
``python -m benchmarks growability gpt2 --rows docs/growability.json``.
"""

from __future__ import annotations

import json
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from benchmarks.families import Example, Maker, perturbed, sources
from benchmarks.rows import Table, anonymous, cell, environments, errors_in, first, label, versions

#: roles whose growth is promised wherever a model has them
PROMISED = {
    "stream": ("residual",),
    "hidden": ("hidden",),
    "heads": ("heads", "kv_heads"),
    "channels": ("channels",),
}
LIMIT = 1e-10


def examine(name: str, source: str, maker: Maker, only: str = "*") -> dict[str, Any]:
    """Everything there is to say of one model, in this process."""
    import fnmatch

    import fxgrow

    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    start = time.perf_counter()
    out: dict[str, Any] = {"model": name, "source": source, "axes": []}
    example = maker()
    perturbed(example.model)
    try:
        program = fxgrow.capture(example.model, example.args, example.kwargs, dynamic=example.dynamic)
    except Exception as error:
        return {**out, "failed": f"capture: {first(error)}", "seconds": time.perf_counter() - start}
    calls = [n for n in program.graph.nodes if n.op == "call_function"]
    axes = program.axes
    out |= {
        "versions": versions(source),
        "ops": len(calls),
        "kinds": len({str(n.target) for n in calls}),
        "modes": program.mode_reason,
        "unknown": {k: len(v) for k, v in axes.unknown_ops.items()},
        "capture_seconds": program.seconds,
    }
    for info in axes:
        if not fnmatch.fnmatchcase(info.name, only):
            continue
        row: dict[str, Any] = {"name": info.name, "role": info.role, "size": info.size}
        out["axes"].append(row)
        if not info.growable:
            row["frozen"] = str(info.reason)
            continue
        half = info.size + max(1, info.size // 2)
        row["double"] = _try(example, program, {"op": "widen", "axis": info.name, "factor": 2, "fill": "copy"})
        if not row["double"].startswith(("exact", "ERROR")):
            added = _try(example, program, {"op": "widen", "axis": info.name, "factor": 2, "fill": "add"})
            row["double"] = added if added.startswith(("exact", "ERROR")) else row["double"]
        row["uneven"] = _try(example, program, {"op": "widen", "axis": info.name, "to": half, "fill": "copy"})
        if row["uneven"] != "exact":
            added = _try(example, program, {"op": "widen", "axis": info.name, "to": half, "fill": "add"})
            row["uneven"] = added if added == "exact" or not row["uneven"].startswith("ERROR") else row["uneven"]
    return {**out, "seconds": time.perf_counter() - start}


def _try(example: Example, program: Any, operation: dict[str, Any]) -> str:
    """``exact``, the reason of a refusal, or ``ERROR`` and what went wrong."""
    import fxgrow
    from fxgrow.errors import GrowthRefused
    from fxgrow.verify.outputs import relative_errors

    try:
        growth = fxgrow.grow(program, [operation], verify="float64")
        for module in (example.model, growth.module):
            module.eval()
        args = example.other_args if example.other is not None else example.args
        kwargs = example.other if example.other is not None else example.kwargs
        with torch.no_grad():
            errors = relative_errors(example.model(*args, **kwargs), growth.module(*args, **kwargs))
        worst = max(e.relative_error for e in errors)
        if not worst <= 1e-4:  # the model's own casts to float32 stay in this comparison
            return f"ERROR: other inputs differ by {worst:.1e}"
    except GrowthRefused as refusal:
        return first(refusal)
    except Exception as error:
        return f"ERROR: {type(error).__name__}: {first(error)}"
    dead = growth.receipt.dead_parameters
    return "exact" if not dead else f"exact, but without gradient in {', '.join(dead)}"


# the report --------------------------------------------------------------------------------------------------------


def grown(row: dict[str, Any]) -> bool:
    """Whether an axis grew twofold, exactly."""
    return str(row.get("double", "")).startswith("exact")


def errors_of(results: list[dict[str, Any]]) -> list[str]:
    return errors_in(results, ("double", "uneven"), lambda r, a, _: f"{label(r)} {a['name']}")


def totals(results: list[dict[str, Any]]) -> dict[str, tuple[int, int, int, int]]:
    """Per promised kind: (models in which all of it grows, models that have it, axes that grow, axes)."""
    out = {}
    for kind, roles in PROMISED.items():
        per = [[grown(a) for a in r["axes"] if a["role"] in roles] for r in results]
        per = [p for p in per if p]
        out[kind] = (sum(map(all, per)), len(per), sum(map(sum, per)), sum(map(len, per)))
    return out


def report(results: list[dict[str, Any]], missing: list[str]) -> str:
    """The table, in Markdown."""
    lines = [
        "# Growability",
        "",
        "Generated by `python -m benchmarks growability`. Small random configurations in float64, norms and running",
        "statistics off their initial values; every named axis is grown ×2 and once by half (by copies,",
        "else by new units), each in its own growth, verified in float64 in eval and train mode and on inputs of other",
        "sizes.",
        "",
        *environments(results),
        "",
        "| model | ops | axes | grow ×2 exactly | grow by half exactly | refused | s |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for r in results:
        if r.get("failed"):
            lines.append(f"| {label(r)} | | | | | {cell(r['failed'])} | {r.get('seconds', 0):.0f} |")
            continue
        axes = r["axes"]
        doubled = sum(map(grown, axes))
        uneven = sum(str(a.get("uneven", "")).startswith("exact") for a in axes)
        cells = [label(r), r["ops"], len(axes), doubled, uneven, len(axes) - doubled, f"{r['seconds']:.0f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    if missing:
        lines += ["", "Left out: " + "; ".join(missing) + "."]
    lines += [
        "",
        "## Totals",
        "",
        "| kind | models where every such axis grows ×2 | axes that grow ×2 |",
        "|---|---:|---:|",
    ]
    for kind, (models, of, n, all_of) in totals(results).items():
        if of:
            lines.append(f"| {kind} | {models} of {of} ({models / of:.0%}) | {n} of {all_of} ({n / all_of:.0%}) |")
    unknown: Counter[str] = Counter()
    for r in results:
        for op, n in r.get("unknown", {}).items():
            unknown[op] += n
    lines += ["", "## Ops met with no rule", ""]
    lines += [f"- `{op}`: {n} calls" for op, n in unknown.most_common()] or ["None."]
    errors = errors_of(results)
    lines += ["", "## Errors", "", *([f"- {cell(e)}" for e in errors] or ["None."]), ""]
    lines += [
        "## Refusals",
        "",
        "Per model: first what one might expect to grow, then, in a line each, what is fixed from outside (inputs,",
        "outputs, tables that are looked up, spatial extents) with the number of such axes. Axes with one reason share",
        "a line, which names the first op that gives it.",
        "",
    ]
    for r in results:
        refused = refusals(r["axes"])
        if refused:
            lines += [f"### {label(r)}", "", *refused, ""]
    return "\n".join(lines)


def changes(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> tuple[list[str], list[str]]:
    """Growths that are exact in one table alone: (lost, gained). Models in one table alone are left out."""

    def exact(results: list[dict[str, Any]]) -> dict[tuple[str, str, str], str]:
        return {
            (label(r), a["name"], kind): str(a.get(kind) or a.get("frozen", ""))
            for r in results
            for a in r["axes"]
            for kind in ("double", "uneven")
        }

    old, new = exact(before), exact(after)
    models = {label(r) for r in before} & {label(r) for r in after}
    lost = [k for k, v in old.items() if k[0] in models and v == "exact" and new.get(k) != "exact"]
    gained = [k for k, v in new.items() if k[0] in models and v == "exact" and old.get(k) != "exact"]
    return [f"{' '.join(k)}: {new.get(k, 'no such axis')}" for k in lost], [" ".join(k) for k in gained]


#: axes that the caller, a table or an image fixes
OUTSIDE = ("inputs", "outputs", "vocab", "positions", "kernel", "spatial")


def refusals(axes: list[dict[str, Any]]) -> list[str]:
    """A line per reason: the axes that share it, telling ones by name and those fixed from outside by number."""
    named: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    counted: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for a in axes:
        if grown(a) and str(a.get("uneven", "")).startswith("exact"):
            continue
        if "frozen" in a:
            table = counted if a["role"] in OUTSIDE else named
            table.setdefault(("", _reason(a["frozen"])), []).append(a)
        elif grown(a):
            named.setdefault(("×2: exact; by half: ", _reason(a["uneven"])), []).append(a)
        else:
            named.setdefault(("×2: ", _reason(a["double"]), "; by half: ", _reason(a["uneven"])), []).append(a)
    out = []
    for (sizes, *_), group in named.items():
        head = group[0]
        why = head.get("frozen") or (sizes + _where(head["uneven" if "exact" in sizes else "double"]))
        names = ", ".join(f"`{a['name']}` ({a['size']})" for a in group)
        out.append(f"- {names}: {cell(anonymous(why))}")
    for group in counted.values():
        roles = Counter(a["role"] for a in group)
        what = ", ".join(f"{n} {role}" for role, n in roles.items())
        out.append(f"- {what}: {cell(anonymous(group[0]['frozen']))}")
    return out


def _where(refusal: str) -> str:
    """A refusal without the name and the sizes of the axis it is about."""
    import re

    return re.sub(r"^cannot grow \S+ from \d+ to \d+: ", "", refusal)


def _reason(text: str) -> str:
    """What refusals of one kind have in common: the reason at their end, without the numbers in it."""
    import re

    return re.sub(r"\d+", "#", text.rpartition(": ")[2])


def run(argv: list[str]) -> int:
    """The command line; returns the exit status: 1 where a growth went wrong, or one of before is lost."""
    table = Table("growability", examine, report, line, sources())
    options = table.parser(__doc__)
    options.add_argument("--only", default="*", metavar="GLOB", help="axes to grow")
    options.add_argument(
        "--against", type=Path, metavar="FILE", help="rows of before: print the growths lost and gained since"
    )
    parsed = options.parse_args(argv)
    results = table.run(parsed, {"only": parsed.only})
    lost: list[str] = []
    if parsed.against:
        lost, gained = changes(json.loads(parsed.against.read_text()), results)
        print(f"lost {len(lost)}, gained {len(gained)} exact growths against {parsed.against}")
        print("\n".join([*(f"- lost {x}" for x in lost), *(f"- gained {x}" for x in gained)]))
    return 1 if errors_of(results) or lost else 0


def line(result: dict[str, Any]) -> str:
    """What a model's row says, in a line."""
    n = sum(map(grown, result["axes"]))
    return (
        f"{n}/{len(result['axes'])} axes, {len(result.get('unknown', {}))} ops without a rule, "
        f"{len(errors_of([result]))} errors"
    )
