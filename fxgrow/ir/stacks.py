"""Repeated stacks of the module tree and their blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fxgrow.ir.traced import Traced


def stacks_of(program: Traced) -> dict[str, list[int]]:
    """Repeated stacks of the module tree: path of the container to the numbers of its blocks.

    A block is a numbered child that has modules of its own; a chain of plain layers is no stack.
    """
    paths = set(program.containers)
    out: dict[str, list[int]] = {}
    for path in program.containers:
        parent, _, number = path.rpartition(".")
        if number.isdigit() and any(p.startswith(path + ".") for p in paths):
            out.setdefault(parent, []).append(int(number))
    return {k: sorted(v) for k, v in out.items()}


def stack_name(stack: str) -> str:
    """What users call a stack: its path, and ``.`` where the model itself is one."""
    return stack or "."


def block_path(stack: str, number: int | str) -> str:
    """Module path of a block; the model itself may be the stack."""
    return f"{stack}.{number}" if stack else str(number)


def children_of(program: Traced, stack: str) -> list[int]:
    """The numbers that stand in a container: its blocks, and the plain layers among them."""
    prefix = f"{stack}." if stack else ""
    names = {p.removeprefix(prefix) for p in program.containers if p.startswith(prefix)}
    return sorted(int(n) for n in names if n.isdigit())


def block_of(path: str, stacks: Mapping[str, Any], inside: str = "") -> str | None:
    """The outermost block a module path lies in, as ``stack.number``."""
    parts = path.split(".")
    for i in range(len(parts)):
        stack = ".".join(parts[:i])
        if stack in stacks and parts[i].isdigit() and int(parts[i]) in stacks[stack]:
            found = block_path(stack, parts[i])
            if found != inside:
                return found
    return None
