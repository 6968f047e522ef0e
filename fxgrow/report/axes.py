"""What can grow in a model, as plain data: its axes, its repeated blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fxgrow.analysis.axes import NamedAxis
from fxgrow.emit.blocks import stacks_in_line
from fxgrow.ir.stacks import block_path, stack_name, stacks_of
from fxgrow.program import Program


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
    stacks = stacks_of(program)
    groups: dict[tuple[str, bool], list[NamedAxis]] = {}
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
    """All of it: axes one by one, stacks, ties, and the ops that no rule is known for."""
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
            {"stack": stack_name(s), "blocks": len(numbers), "kind": containers.get(block_path(s, numbers[0]), "")}
            for s, numbers in stacks_in_line(program, program.graph).items()
        ],
        "ties": dict(program.aliases),
        "ops_without_a_rule": sorted(program.axes.unknown_ops),
    }
