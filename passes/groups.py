"""Units that a group of others shares, such as key and value heads of grouped queries: more of them, for fewer each.

``m`` copies of every unit serve a group of ``g``, each ``g / m`` of its members: what a member reads is what it read.
The graph repeats the units ``g`` times; with copies in place it repeats them ``g / m`` times, and from there on nothing
has changed. So the proof needs to look at what makes the units alone: the graph is cut where they are repeated.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import fx

from fxgrow.algebra import Axis, Product, is_unit, resolve, size_of
from fxgrow.analysis.axes import Axes, NamedAxis
from fxgrow.errors import GrowthRefused, Refusal
from fxgrow.ir.graphs import copy_graph
from fxgrow.ir.nodes import info_of, meta_like
from fxgrow.ir.ops import bound_arguments
from fxgrow.ir.traced import Traced
from fxgrow.plan import AxisMap, Edit

_REPEAT = torch.ops.aten.repeat_interleave.self_int
_EXPAND = torch.ops.aten.expand.default
_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default


@dataclass
class Repeat:
    """Where units are repeated for their groups.

    Attributes:
        node: the op that does.
        before: what it repeats, with the dim of the units.
        after: what does not know any more how many units there are; empty for an op that takes the units as they are.
        groups: members of a group.
        sizes: of an op that is told its sizes, those by place that say units and members.
    """

    node: fx.Node
    before: list[tuple[fx.Node, int]]
    after: list[fx.Node]
    groups: int
    sizes: dict[int, str] = field(default_factory=dict)

    def edit(self, copies: int) -> Edit | None:
        """What the op is to be told where every unit has copies."""
        if not self.after:
            return None
        if self.node.target is _REPEAT:
            return Edit(node=self.node.name, arguments={"repeats": self.groups // copies}, why="size")
        size: list[Any] = [s if isinstance(s, int) else {"$node": s.name} for s in bound_arguments(self.node)["size"]]
        return Edit(node=self.node.name, arguments={"size": self.scaled(size, copies)}, why="size")

    def scaled(self, sizes: Sequence[Any], copies: int) -> list[Any]:
        """The op's sizes where every unit has copies; -1, for as many as there are, stays."""
        known = {i: what for i, what in self.sizes.items() if sizes[i] != -1}
        return [
            s if i not in known else s * copies if known[i] == "units" else s // copies for i, s in enumerate(sizes)
        ]


def repeats_of(axes: Axes, info: NamedAxis) -> list[Repeat]:
    """Where the units of an axis are repeated for groups.

    Raises:
        GrowthRefused: nowhere, or in a way that is not followed.
    """
    graph = axes.program.graph
    found = [r for node in graph.nodes if node.op == "call_function" and (r := _repeat(axes, info.axis, node))]
    if not found:
        why = "nothing repeats its units for groups: no group is there to be shared out among copies"
        raise GrowthRefused(Refusal(info.name, why, "widen"))
    return found


def _repeat(axes: Axes, axis: Axis, node: fx.Node) -> Repeat | None:
    given = bound_arguments(node) if node.target in (_REPEAT, _EXPAND, _ATTENTION) else {}
    if node.target is _REPEAT:
        before, dim, repeats = given["self"], given["dim"], given["repeats"]
        dims = axes.dims.get(before) or []
        if dim is None or not isinstance(repeats, int) or not _is(dims[int(dim)], axis):
            return None
        return Repeat(node, [(before, int(dim) % len(dims))], [node], repeats)
    if node.target is _EXPAND:
        before, out = given["self"], axes.dims.get(node) or []
        dims = axes.dims.get(before) or []
        for i in range(1, len(dims) if len(dims) == len(out) else 0):
            groups = resolve(out[i])
            if not _is(dims[i - 1], axis) or not is_unit(dims[i]) or not isinstance(groups, Axis):
                continue
            merged = [_merges(axes, user, axis, groups) for user in node.users]
            size = list(given["size"])
            if all(merged) and isinstance(size[i], int) and isinstance(size[i - 1], int):
                return Repeat(node, [(before, i - 1)], list(node.users), groups.size, {i - 1: "units", i: "members"})
        return None
    if node.target is _ATTENTION and given.get("enable_gqa"):
        places = [(given[n], axes.dims.get(given[n]) or []) for n in ("query", "key", "value")]
        (_, q), *units = places
        if all(len(d) > 2 and _is(d[-3], axis) for _, d in units) and not _is(q[-3], axis):
            return Repeat(node, [(n, len(d) - 3) for n, d in units], [], size_of(q[-3]) // axis.size)
    return None


def _is(dim: Any, axis: Axis) -> bool:
    return resolve(dim) is axis


def _merges(axes: Axes, node: fx.Node, axis: Axis, groups: Axis) -> bool:
    """Whether a value has units and members of groups in one dim, and no longer one by one."""
    for dim in axes.dims.get(node) or []:
        found = resolve(dim)
        factors = [resolve(f) for f in found.factors] if isinstance(found, Product) else []
        if any(a is axis and b is groups for a, b in itertools.pairwise(factors)):
            return True
    return False


def cut(program: Traced, repeats: list[Repeat]) -> Traced:
    """The program up to where units are repeated: what is made of them comes from outside."""
    graph = copy_graph(program.graph)
    nodes = {n.name: n for n in graph.nodes}
    first = next(iter(graph.nodes))

    def outside(node: fx.Node) -> fx.Node:
        with graph.inserting_before(first):
            new = graph.placeholder(f"{node.name}_outside")
        new.meta = meta_like(node, module_path="", input=new.name)
        return new

    for repeat in repeats:
        for old in repeat.after:
            nodes[old.name].replace_all_uses_with(outside(nodes[old.name]))
            graph.erase_node(nodes[old.name])
        if repeat.after and repeat.node not in repeat.after:
            graph.erase_node(nodes[repeat.node.name])
        if not repeat.after:
            user = nodes[repeat.node.name]
            for name in {n.name for n, _ in repeat.before}:
                user.replace_input_with(nodes[name], outside(nodes[name]))
    return replace(program, graph=graph)


def copied(size: int, copies: int) -> AxisMap:
    """Copies of a unit stand side by side: they share the unit's group in its order."""
    return AxisMap(size, np.repeat(np.arange(size), copies), np.full(size * copies, 1.0 / copies))


def made_units(cut_axes: Axes, repeats: list[Repeat], info: NamedAxis) -> Iterator[NamedAxis]:
    """The axes of the units where they are made, each once.

    Raises:
        GrowthRefused: one of them is pinned by something else.
    """
    nodes = {n.name: n for n in cut_axes.program.graph.nodes}
    named = {a.axis.id: a for a in cut_axes}
    seen: set[int] = set()
    for repeat in repeats:
        for node, dim in repeat.before:
            axis = resolve((cut_axes.dims.get(nodes[node.name]) or [])[dim])
            if not isinstance(axis, Axis) or axis.id not in named:
                why = "what makes its units does not say which of its entries belong to which"
                raise GrowthRefused(Refusal(info.name, why, "widen", op=str(repeat.node.target)))
            if axis.id not in seen:
                seen.add(axis.id)
                yield named[axis.id]


def note_of(node: fx.Node) -> dict[str, Any]:
    """What is noted of sizes."""
    found = info_of(node)
    return {"sizes": found.sizes, "result_sizes": found.result_sizes}
