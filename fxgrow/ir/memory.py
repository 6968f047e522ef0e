"""Which values of a graph share memory, and which ops write into it: from op schemas, and what schemas leave out."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator
from typing import Any

from torch import fx

from fxgrow.ir.traits import Trait, traits_of

#: operands of an op, by name and place
Operands = tuple[tuple[str, int], ...]


@functools.cache
def _facts(target: Any) -> tuple[Operands, Operands, bool]:
    """Of an op: operands that results may view, those it writes into, and whether its result is what it writes into."""
    schema = getattr(target, "_schema", None)
    if schema is None:
        return (), (), False
    traits = traits_of(target)
    out: set[str] = set()
    for result in schema.returns:
        out |= result.alias_info.after_set | result.alias_info.before_set if result.alias_info is not None else set()
    tensors = [a for a in schema.arguments if "Tensor" in str(a.type)]
    aliased = [a for a in tensors if a.alias_info is not None]
    # an operand that is annotated and not written is viewed, if only by the tensors of a list that is returned
    views = tuple(a.name for a in aliased if not a.alias_info.is_write or a.alias_info.before_set & out)
    writes = tuple(a.name for a in aliased if a.alias_info.is_write)
    if Trait.HIDDEN_VIEW in traits:
        views = tuple(a.name for a in tensors)
    if Trait.WRITES_NOTHING in traits:
        writes = ()
    if hidden := Trait.HIDDEN_STATISTICS in traits:
        writes = ("running_mean", "running_var")
    places = {a.name: i for i, a in enumerate(schema.arguments)}
    returned = not hidden and len(schema.returns) == 1 and len(writes) == 1 and views == writes
    return tuple((n, places[n]) for n in views), tuple((n, places[n]) for n in writes), returned


def _operands(node: fx.Node, operands: Operands) -> list[fx.Node]:
    out: list[fx.Node] = []
    for name, i in operands:
        value = node.args[i] if i < len(node.args) else node.kwargs.get(name)
        out += [v for v in (value if isinstance(value, list | tuple) else [value]) if isinstance(v, fx.Node)]
    return out


def viewed(node: fx.Node) -> list[fx.Node]:
    """The operands that the result may be, or may be a view of."""
    if node.op != "call_function":
        return []
    if node.target is operator.getitem:
        return [n for n in node.args[:1] if isinstance(n, fx.Node)]
    return _operands(node, _facts(node.target)[0])


def writes(node: fx.Node) -> list[fx.Node]:
    """The operands whose values the op changes."""
    return _operands(node, _facts(node.target)[1]) if node.op == "call_function" else []


def returns_what_it_writes(node: fx.Node) -> bool:
    """Whether the op's result is the operand it writes into, as that of ``add_`` and ``copy_`` is."""
    return _facts(node.target)[2]


class Memory:
    """The values of a graph, in groups that may share memory.

    A group is an equivalence class of "may be a view of"; what is in two groups never shares memory.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.place = {node: i for i, node in enumerate(graph.nodes)}
        self._parent: dict[fx.Node, fx.Node] = {}
        self._whole: dict[fx.Node, fx.Node] = {}
        self._groups: dict[fx.Node, list[fx.Node]] = {}
        self._writers: dict[fx.Node, list[fx.Node]] = {}
        writers = []
        attributes: dict[str, fx.Node] = {}
        for node in graph.nodes:
            self._parent[node] = node
            if node.op == "get_attr":  # one tensor may be read by several nodes
                first = attributes.setdefault(str(node.target), node)
                self._parent[node] = self._root(first)
                self._whole[node] = self._whole.get(first, first)
                continue
            operands = viewed(node)
            for operand in operands:
                self._parent[self._root(operand)] = self._root(node)
            same = bool(operands) and (returns_what_it_writes(node) or Trait.SAME in traits_of(node.target))
            self._whole[node] = self._whole[operands[0]] if same else node
            if writes(node):
                writers.append(node)
        for node in graph.nodes:
            self._groups.setdefault(self._root(node), []).append(node)
        for node in writers:
            for root in dict.fromkeys(map(self._root, writes(node))):
                self._writers.setdefault(root, []).append(node)

    def _root(self, node: fx.Node) -> fx.Node:
        while self._parent[node] is not node:
            self._parent[node] = node = self._parent[self._parent[node]]
        return node

    def sharing(self, node: fx.Node) -> list[fx.Node]:
        """Every value that may share memory with ``node``, itself included, in graph order."""
        return self._groups[self._root(node)]

    def same(self, a: fx.Node, b: fx.Node) -> bool:
        """Whether the two are surely one tensor: what is written into one is the other's value."""
        return self._whole[a] is self._whole[b]

    def writers(self, node: fx.Node) -> list[fx.Node]:
        """The ops that may write into the memory of ``node``, in graph order."""
        return self._writers.get(self._root(node), [])

    def written(self, node: fx.Node, before: fx.Node | None = None) -> bool:
        """Whether any op may write into the memory of ``node``, or any that runs before another one."""
        found = self.writers(node)
        return bool(found) and (before is None or self.place[found[0]] < self.place[before])

    def __iter__(self) -> Iterator[list[fx.Node]]:
        return iter(self._groups.values())


__all__ = ["Memory", "returns_what_it_writes", "viewed", "writes"]
