"""What a plan changes, as rows for people."""

from __future__ import annotations

import math
from typing import Any

from fxgrow.ir.stacks import block_path, stacks_of
from fxgrow.plan import GrowthPlan
from fxgrow.program import Program
from fxgrow.report.axes import collapsed


def step_rows(plan: GrowthPlan, program: Program | None = None) -> list[tuple[tuple[str, ...], int]]:
    """Operation, what it grows, from, to and how, each with how often; repeated blocks together with the program."""
    stacks = stacks_of(program) if program is not None else {}
    out: list[tuple[tuple[str, ...], int]] = []
    for step in plan.steps:
        rows: dict[tuple[str, ...], int] = {}
        for axis in step.axes:
            key = (step.op, collapsed(axis.name, stacks), str(axis.old), str(axis.new), axis.how)
            rows[key] = rows.get(key, 0) + 1
        for change in step.changes:
            if change.kind == "clone":
                text = {"zero": "last projections zero", "gate": "gate at zero", "stack": "plain copy"}[change.init]
                how = f"copy of {block_path(change.stack, change.source)}, {text}"
                rows[(step.op, f"block {block_path(change.stack, change.number)}", "", "new", how)] = 1
            elif change.kind == "insert":
                rows[(step.op, change.path, "", "new", f"identity {change.layer} after {change.after}")] = 1
            elif change.kind == "adapt":
                how = f"adapter, {change.sizes[0]} to {change.sizes[1]}, alpha {change.alpha:g}"
                key = (step.op, collapsed(change.path, stacks), "", f"rank {change.rank}", how)
                rows[key] = rows.get(key, 0) + 1
        out += rows.items()
    return out


def graph_lines(plan: GrowthPlan) -> dict[str, int]:
    """The changes of calls in the graph, each with how often."""
    lines: dict[str, int] = {}
    for step in plan.steps:
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
            elif change.kind == "unscale":
                text = f"{change.node.rstrip('0123456789').rstrip('_')}: taken out, weights have its factor"
            else:
                continue
            lines[text] = lines.get(text, 0) + 1
    return lines


def _short(value: Any) -> str:
    if isinstance(value, dict) and "$node" in value:
        return "*" if str(value["$node"]).startswith("sym_") else str(value["$node"])
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_short(v) for v in value) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def parameter_bytes(program: Program, plan: GrowthPlan, grown: Program) -> tuple[int, int]:
    """Bytes of the parameters before and after, tied ones once."""
    before = sum(p.numel() * p.element_size() for p in program.parameters.values())
    width = {n: p.element_size() for n, p in program.parameters.items()}
    usual = next(iter(width.values()), 4)
    made = {n: t for n, t in plan.tensors.items() if n in grown.parameters}
    return before, sum(math.prod(t.shape) * width.get(t.source or "", usual) for t in made.values())
