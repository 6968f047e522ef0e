"""Readable, stable names for axes: ``<module path>/<role>``.

The path is the deepest module that holds every parameter the axis appears in and every op that handles it; the role is
what the graph shows the axis is used for. Names come from module names and graph order only, so they are the same from
run to run, and for a regenerated module, which remembers the modules its ops came from.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import fx

from fxgrow.axes.expr import Axis, axes_of, is_static

if TYPE_CHECKING:
    from fxgrow.axes.analysis import Axes, AxisInfo

#: roles that rules announce, strongest first
RANK = ("kv_heads", "heads", "head_dim", "value_dim", "experts", "positions", "vocab", "channels")


def name_axes(axes: Axes) -> dict[str, AxisInfo]:
    """Name every static axis that appears in a parameter or buffer, in the order of first appearance."""
    from fxgrow.axes.analysis import AxisInfo, Member

    members: dict[int, list[Member]] = {}
    found: dict[int, Axis] = {}
    trainable: set[int] = set()
    for node in axes.program.graph.nodes:
        dims = axes.dims.get(node)
        if node.op != "get_attr" or dims is None or str(node.target) in axes.program.constants:
            continue
        for i, dim in enumerate(dims):
            for axis in axes_of(dim):
                if is_static(axis.size):
                    found.setdefault(axis.id, axis)
                    members.setdefault(axis.id, []).append(Member(str(node.target), i))
                    if str(node.target) in axes.program.parameters:
                        trainable.add(axis.id)
    residual = _residual_axes(axes)
    out: dict[str, AxisInfo] = {}
    for ident, axis in found.items():
        if ident not in trainable:
            continue  # masks and tables: never what a user grows
        role = _role(axis, residual, axes)
        ops = [n.meta.get("module_path", "") for n in axes.uses.get(ident, ()) if n.op == "call_function"]
        stem = f"{_common_path([m.tensor for m in members[ident]], ops, axes)}/{role}"
        name, number = stem, 1
        while name in out:
            number += 1
            name = f"{stem}-{number}"
        out[name] = AxisInfo(name, int(axis.size), role, members[ident], axis.frozen, axis)
    return out


def _common_path(tensors: list[str], ops: list[str], axes: Axes) -> str:
    """Deepest module that owns all the tensors and runs all the ops; a tied tensor counts under each of its names."""
    reverse: dict[str, list[str]] = {}
    for alias, name in axes.program.aliases.items():
        reverse.setdefault(name, []).append(alias)
    names = [n for t in tensors for n in [t, *reverse.get(t, [])]]
    parts = [n.split(".")[:-1] for n in names] + [o.split(".") if o else [] for o in ops]
    common: list[str] = []
    for column in zip(*parts, strict=False):
        if len(set(column)) > 1:
            break
        common.append(column[0])
    return ".".join(common) or "."


def _role(axis: Axis, residual: set[int], axes: Axes) -> str:
    roles = axis.roles
    for role in RANK[:4]:
        if role in roles:
            return role
    if roles.get("vocab", 0) >= 100 or roles.get("positions", 0) >= 100:
        return "vocab" if roles.get("vocab", 0) >= 100 else "positions"
    if "channels" in roles:
        return "channels"
    if axis.id in residual:
        return "residual"
    reason = axis.frozen
    if reason is not None and reason.op == "input":
        return "inputs"
    if "vocab" in roles or (reason is not None and reason.op == "output"):
        return "vocab" if _has_vocab(axes) else "outputs"
    for role in RANK[4:]:
        if role in roles:
            return role
    return "hidden"


def _has_vocab(axes: Axes) -> bool:
    return any(a.roles.get("vocab", 0) >= 100 for a in axes.unifier.axes)


def _residual_axes(axes: Axes) -> set[int]:
    """Axes along which a value is added to one computed from it: ``x + f(x)``."""
    out: set[int] = set()
    order = {n: i for i, n in enumerate(axes.program.graph.nodes)}
    for node in axes.program.graph.nodes:
        if node.op != "call_function" or "aten.add" not in str(node.target):
            continue
        operands = [a for a in node.args[:2] if isinstance(a, fx.Node)]
        if len(operands) != 2 or any(a.op != "call_function" for a in operands):
            continue
        early, late = sorted(operands, key=lambda n: order[n])
        dims = axes.dims.get(node)
        if dims and _reaches(late, early, order):
            for axis in axes_of(dims[-1]) + (axes_of(dims[1]) if len(dims) > 2 else []):
                out.add(axis.id)
    return out


def _reaches(node: fx.Node, target: fx.Node, order: dict[fx.Node, int]) -> bool:
    """Whether ``target`` is an ancestor of ``node``; the search stays between the two in graph order."""
    floor = order[target]
    stack, seen = [node], {node}
    while stack:
        for source in stack.pop().all_input_nodes:
            if source is target:
                return True
            if source not in seen and order[source] > floor:
                seen.add(source)
                stack.append(source)
    return False
