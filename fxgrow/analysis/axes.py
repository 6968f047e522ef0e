"""The axes of a program: their names, what they are in, what ties them and what freezes them.

Nothing here changes once it is made: planning, which grows axes, makes further ones (:meth:`Axes.resized`).
"""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any

import networkx as nx
from torch import fx

from fxgrow.algebra import (
    Axis,
    Concat,
    Expr,
    Frozen,
    Leaf,
    Product,
    axes_of,
    leaves,
    replaced,
    resolve,
    same_size,
    size_of,
)
from fxgrow.errors import SpecError, did_you_mean
from fxgrow.ir.memory import Memory
from fxgrow.ir.nodes import info_of
from fxgrow.ir.traced import Traced
from fxgrow.rules.annotation import Dims, flat_dims


@dataclass(frozen=True)
class Member:
    """One place where an axis appears in a parameter or buffer: ``mlp.c_fc.weight:0``."""

    tensor: str
    dim: int

    def __str__(self) -> str:
        return f"{self.tensor}:{self.dim}"


@dataclass(frozen=True)
class NamedAxis:
    """One named axis of the model.

    Attributes:
        name: ``<module path>/<role>``, unique and the same from run to run.
        size: number of units.
        role: what the axis is (hidden, heads, residual ...).
        members: the parameter and buffer dims it appears in.
        growable: nothing found pins it.
        reason: why it is frozen, else None.
    """

    name: str
    size: int
    role: str
    members: tuple[Member, ...]
    reason: Frozen | None
    axis: Axis = field(repr=False)

    @property
    def growable(self) -> bool:
        return self.reason is None


def _role_of(name: str) -> str:
    return name.rpartition("/")[2].strip("*")


@dataclass(frozen=True, eq=False, repr=False)
class Axes:
    """The axes of a program; iterates :class:`NamedAxis`, and answers what is tied to what and why.

    Attributes:
        program: what was analysed.
        dims: of every node that has any, as expressions over axes; a list of them for ops with several results.
        uses: axis id to the nodes whose operands or results carry it, in graph order.
        memory: which values share memory, and which ops write into it.
        by_name: the axes that have names, which are those of parameters.
        unknown_ops: without a rule, and the lines they are called in.
        freezes: every dim that a rule froze, the op and why.
        contractions: of every call that sums products, the axes it sums them over, by id.
    """

    program: Traced
    dims: Mapping[fx.Node, Any]
    uses: Mapping[int, Sequence[fx.Node]]
    memory: Memory
    unknown_ops: Mapping[str, list[str]]
    freezes: Sequence[tuple[Expr, fx.Node, str]] = ()
    by_name: Mapping[str, NamedAxis] = field(default_factory=lambda: MappingProxyType({}))
    contractions: Mapping[fx.Node, frozenset[int]] = field(default_factory=lambda: MappingProxyType({}))

    @classmethod
    def of(
        cls,
        program: Traced,
        dims: Mapping[fx.Node, Any],
        unknown: Mapping[str, list[str]],
        freezes: Sequence[tuple[Expr, fx.Node, str]],
        contractions: Mapping[fx.Node, Sequence[Expr]],
    ) -> Axes:
        """What analysis found, before the axes have names."""
        over = {n: frozenset(a.id for e in exprs for a in axes_of(resolve(e))) for n, exprs in contractions.items()}
        known = MappingProxyType({n: _resolved(d) for n, d in dims.items()})
        uses, memory = _uses(program.graph, known), Memory(program.graph)
        return cls(program, known, uses, memory, unknown, tuple(freezes), contractions=MappingProxyType(over))

    def resized(self, axis: Axis, size: int) -> Axes:
        """The same with another size of one axis."""
        new = replace(axis, size=size)
        made: dict[int, Any] = {}  # nodes that share a dim go on sharing it

        def now(dim: Any) -> Any:
            if isinstance(dim, list):
                return [now(d) for d in dim]
            if dim is not None and id(dim) not in made:
                made[id(dim)] = replaced(dim, axis, new)
            return None if dim is None else made[id(dim)]

        dims = {n: now(self.dims[n]) for n in self.uses.get(axis.id, ()) if n in self.dims}
        infos = {n: replace(i, size=size, axis=new) for n, i in self.by_name.items() if i.axis is axis}
        return replace(
            self,
            dims=MappingProxyType({**self.dims, **dims}),
            by_name=MappingProxyType({**self.by_name, **infos}),
        )

    def with_nodes(self, like: Mapping[fx.Node, fx.Node], removed: Collection[fx.Node] = ()) -> Axes:
        """The same after nodes were added to the graph, each with the dims of another one, and others removed."""
        dims = {n: d for n, d in self.dims.items() if n not in removed}
        for node, other in like.items():
            dims[node] = dims[other]
        graph = self.program.graph
        return replace(self, dims=MappingProxyType(dims), uses=_uses(graph, dims), memory=Memory(graph))

    def __iter__(self) -> Iterator[NamedAxis]:
        return iter(self.by_name.values())

    def __len__(self) -> int:
        return len(self.by_name)

    def __getitem__(self, name: str) -> NamedAxis:
        return self.by_name[name]

    def tensor_dims(self) -> dict[str, Dims]:
        """The dims of every parameter, buffer and constant that the graph reads."""
        return {str(n.target): d for n, d in self.dims.items() if n.op == "get_attr" and isinstance(d, list)}

    def members_of(self, axis: Axis) -> list[Member]:
        """Where an axis appears in parameters and buffers, also one that has no name."""
        found: dict[Member, None] = {}
        for node in self.uses.get(axis.id, ()):
            if node.op == "get_attr":
                for i, dim in enumerate(self.dims[node]):
                    if axis in leaves(dim):
                        found[Member(str(node.target), i)] = None
        return list(found)

    @cached_property
    def blockers(self) -> dict[int, dict[fx.Node, str]]:
        """Axis id to every op whose rule froze it, with the first reason of each; ``frozen`` has the first op alone."""
        out: dict[int, dict[fx.Node, str]] = {}
        for expr, node, why in self.freezes:
            for axis in axes_of(expr):
                out.setdefault(axis.id, {}).setdefault(node, why)
        return out

    def find(self, pattern: str) -> list[NamedAxis]:
        """Axes by a glob over names, or by a parameter's dim (``mlp.c_fc.weight:0``, the name may be a glob).

        Raises:
            SpecError: nothing matches (the nearest names are listed), or a dim carries several axes.
        """
        names = [n for n in self.by_name if fnmatch.fnmatchcase(n, pattern)]
        if names:
            return [self.by_name[n] for n in names]
        tensor, colon, dim = pattern.rpartition(":")
        if colon and dim.lstrip("-").isdigit():
            return self._by_dim(tensor, int(dim), pattern)
        raise SpecError(f"no axis matches {pattern!r}; {did_you_mean(pattern, self.by_name, _role_of, cutoff=0.4)}")

    def _by_dim(self, tensor: str, dim: int, pattern: str) -> list[NamedAxis]:
        table = self.tensor_dims()
        aliases = self.program.aliases
        matching = [n for n in [*table, *aliases] if fnmatch.fnmatchcase(n, tensor)]
        if not matching:
            raise SpecError(f"{pattern!r}: no parameter matches {tensor!r}; {did_you_mean(tensor, table, cutoff=0.4)}")
        found: dict[str, NamedAxis] = {}
        for name in matching:
            dims = table[aliases.get(name, name)]
            if not -len(dims) <= dim < len(dims):
                raise SpecError(f"{pattern!r}: {name} has {len(dims)} dims")
            ids = {a.id for a in axes_of(dims[dim])}
            infos = [i for i in self if i.axis.id in ids]
            if len(infos) > 1:
                names = ", ".join(i.name for i in infos)
                raise SpecError(
                    f"{pattern!r} is ambiguous: dim {dim} of {name} is {self.describe(dims[dim])}; "
                    f"name one of its axes instead: {names}"
                )
            if not infos and not same_size(size_of(dims[dim]), 1):
                raise SpecError(
                    f"{pattern!r}: the entries of dim {dim} of {name} are used one by one, so that it is no axis"
                )
            if not infos:
                raise SpecError(f"{pattern!r}: dim {dim} of {name} has size 1 and no axis of its own")
            found[infos[0].name] = infos[0]
        return list(found.values())

    def describe(self, dim: Expr) -> str:
        """A dim in words: ``heads 4 x head_dim 8 + ...``."""
        names = {i.axis.id: i.name.rpartition("/")[2] for i in self}
        dim = resolve(dim)
        if isinstance(dim, Leaf):
            dim = dim.axis
        if isinstance(dim, Axis):
            return f"{names.get(dim.id, 'size')} {dim.size}"
        if isinstance(dim, Product):
            return " x ".join(self.describe(f) for f in dim.factors) or "1"
        assert isinstance(dim, Concat)
        return "(" + " + ".join(self.describe(p) for p in dim.parts) + ")"

    @cached_property
    def graph(self) -> nx.Graph:
        """Axes, the tensors they are in and the ops that handle them, each by its name, neighbours in graph order.

        Nodes have a ``kind``: an ``axis`` has its size, role and why it is frozen, an ``op`` its target and source.
        The edge between an axis and a ``tensor`` has the ``dims`` in which it lies.
        """
        out: nx.Graph[str] = nx.Graph()
        tensors = self.program.tensors
        for info in self:
            out.add_node(info.name, kind="axis", size=info.size, role=info.role, frozen=str(info.reason or ""))
            for member in info.members:
                out.add_node(member.tensor, kind="tensor")
                dims = out.edges[info.name, member.tensor]["dims"] if out.has_edge(info.name, member.tensor) else []
                out.add_edge(info.name, member.tensor, dims=sorted({*dims, member.dim}))
            for node in self.uses.get(info.axis.id, ()):
                if node.op == "call_function":
                    name = f"{node.name}()" if node.name in tensors else node.name
                    out.add_node(name, kind="op", target=str(node.target), source=info_of(node).source)
                    out.add_edge(info.name, name)
        return out

    def around(self, name: str, kind: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """The neighbours of an axis in the graph that are of a kind, and what the graph knows of each."""
        for other, edge in self.graph.adj[name].items():
            about = self.graph.nodes[other]
            if about["kind"] == kind:
                yield other, {**about, **edge}

    def explain(self, name: str) -> str:
        """Why an axis is frozen, or what grows with it: tensors, and the ops that tie them, with source lines."""
        (info, *_) = self.find(name)
        lines = [f"{info.name}  size {info.size}, {'growable' if info.growable else 'frozen'}"]
        if info.reason is not None:
            lines.append(f"  frozen by {info.reason}")
        places = [
            str(Member(tensor, dim)) for tensor, about in self.around(info.name, "tensor") for dim in about["dims"]
        ]
        lines.append("  in " + ", ".join(places) if places else "  in no parameter")
        ops = dict.fromkeys((about["target"], about["source"]) for _, about in self.around(info.name, "op"))
        lines += [f"  => {target}" + (f"  {source}" if source else "") for target, source in ops]
        return "\n".join(lines)


def _resolved(dims: Any) -> Any:
    if dims is None:
        return None
    return [_resolved(d) if isinstance(d, list) or d is None else resolve(d) for d in dims]


def _uses(graph: fx.Graph, dims: Mapping[fx.Node, Any]) -> Mapping[int, Sequence[fx.Node]]:
    out: dict[int, list[fx.Node]] = {}
    carried: dict[fx.Node, set[int]] = {}
    for node in graph.nodes:
        own = {a.id for d in flat_dims(dims.get(node)) for a in axes_of(d)}
        carried[node] = own
        touched = set(own)
        for source in node.all_input_nodes:
            touched |= carried.get(source, set())
        for axis in touched:
            out.setdefault(axis, []).append(node)
    return MappingProxyType(out)
