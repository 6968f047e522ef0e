"""Readable, stable names for axes: ``<module path>/<role>``.

The path is the deepest module that holds every parameter the axis appears in and every op that handles it; the role is
what the graph shows the axis is used for. Names come from module names and graph order only, so they are the same from
run to run, and for a regenerated module, which remembers the modules its ops came from.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from fxgrow.algebra import Axis, Concat, Expr, Product, Unifier, axes_of, is_static, resolve
from fxgrow.analysis.axes import Axes, Member, NamedAxis
from fxgrow.analysis.uses import Uses
from fxgrow.ir.nodes import info_of

#: roles that rules announce, strongest first
RANK = ("kv_heads", "groups", "heads", "head_dim", "value_dim", "experts", "positions", "vocab", "channels")


def name_axes(axes: Axes, unifier: Unifier) -> dict[str, NamedAxis]:
    """Name every static axis of a parameter, with the buffers and constants it is in, in the order of appearance."""
    members: dict[int, list[Member]] = {}
    found: dict[int, Axis] = {}
    trainable: set[int] = set()
    for node in axes.program.graph.nodes:
        dims = axes.dims.get(node)
        if node.op != "get_attr" or dims is None:
            continue
        for i, dim in enumerate(dims):
            for axis in axes_of(dim):
                if is_static(axis.size):
                    found.setdefault(axis.id, axis)
                    members.setdefault(axis.id, []).append(Member(str(node.target), i))
                    if str(node.target) in axes.program.parameters:
                        trainable.add(axis.id)
    use = Uses(axes)
    residual = use.residual()
    _mark_grouped_heads(axes, members)
    has_vocab = any(a.roles.get("vocab", 0) >= 100 for a in unifier.axes)
    out: dict[str, NamedAxis] = {}
    for ident, axis in found.items():
        if ident not in trainable:
            continue  # masks and tables: never what a user grows
        role = _role(axis, residual, has_vocab)
        if role == "hidden" and use.low_rank(axis):
            role = "rank"
        ops = [info_of(n).module_path for n in axes.uses.get(ident, ()) if n.op == "call_function"]
        stem = f"{_common_path([m.tensor for m in members[ident]], ops, axes)}/{role}"
        name, number = stem, 1
        while name in out:
            number += 1
            name = f"{stem}-{number}"
        out[name] = NamedAxis(name, int(axis.size), role, tuple(members[ident]), axis.frozen, axis)
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


def products(dim: Expr) -> Iterator[tuple[Expr, ...]]:
    """The factors of every part of a dim."""
    dim = resolve(dim)
    for part in dim.parts if isinstance(dim, Concat) else (dim,):
        yield part.factors if isinstance(part, Product) else (part,)


def _mark_grouped_heads(axes: Axes, members: dict[int, list[Member]]) -> None:
    """Heads that are a product of two axes, the second of them broadcast: the first are key-value heads."""
    table = axes.tensor_dims()
    for tensor, i in {(m.tensor, m.dim) for found in members.values() for m in found}:
        for part in products(table[tensor][i]):
            for outer, inner in itertools.pairwise(part):
                if isinstance(outer, Axis) and isinstance(inner, Axis) and {"groups", "heads"} <= set(inner.roles):
                    outer.roles.setdefault("kv_heads", 1)


def _role(axis: Axis, residual: dict[int, str], has_vocab: bool) -> str:
    roles = axis.roles
    reason = axis.frozen
    if reason is not None and reason.op == "input":
        return "inputs"
    for role in RANK[:5]:
        if role in roles and (role != "groups" or "heads" in roles):
            return role
    if roles.get("vocab", 0) >= 100 or roles.get("positions", 0) >= 100:
        return "vocab" if roles.get("vocab", 0) >= 100 else "positions"
    for role in ("experts", "kernel", "spatial"):
        if roles.get(role, 0) >= 100:
            return role
    if residual.get(axis.id) == "last":
        return "residual"
    returned = reason is not None and reason.op == "output"
    if "channels" in roles and not returned:
        return "channels"
    if axis.id in residual:
        return "residual"
    if "vocab" in roles or returned:
        return "vocab" if has_vocab else "outputs"
    for role in RANK[5:]:
        if role in roles:
            return role
    return "hidden"
