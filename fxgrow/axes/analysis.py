"""Analysis: run every op's rule over a graph and collect the model's axes."""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import networkx as nx
import torch
from torch import fx
from torch.utils.weak import WeakIdKeyDictionary

from fxgrow.axes.expr import (
    Axis,
    Conflict,
    Expr,
    Frozen,
    Size,
    Unifier,
    axes_of,
    is_static,
    resolve,
    same_size,
    size_of,
)
from fxgrow.axes.naming import name_axes
from fxgrow.errors import SpecError
from fxgrow.memory import Memory

if TYPE_CHECKING:
    from fxgrow.capture import Program
    from fxgrow.rules.base import Dims, Rule


@dataclass(frozen=True)
class Member:
    """One place where an axis appears in a parameter or buffer: ``mlp.c_fc.weight:0``."""

    tensor: str
    dim: int

    def __str__(self) -> str:
        return f"{self.tensor}:{self.dim}"


@dataclass
class AxisInfo:
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
    members: list[Member]
    reason: Frozen | None
    axis: Axis = field(repr=False)

    @property
    def growable(self) -> bool:
        return self.reason is None


def sizes_of(node: fx.Node) -> list[Size] | None:
    """Sizes of a node's tensor: ints, or sympy expressions where dynamic; None where the result is no tensor.

    ``node.meta["sizes"]`` holds them where a growth has changed them since capture.
    """
    if "sizes" in node.meta:
        return list(node.meta["sizes"])
    value = node.meta.get("val")
    return shape_of(value) if isinstance(value, torch.Tensor) else None


#: sizes of the fake tensors of traces: asked for again and again, and dynamic ones take time to read
_SIZES: MutableMapping[torch.Tensor, tuple[Size, ...]] = WeakIdKeyDictionary()


def shape_of(value: torch.Tensor) -> list[Size]:
    """Sizes of a tensor as :func:`sizes_of` gives them."""
    known = _SIZES.get(value)
    if known is None:
        known = _SIZES[value] = tuple(map(_size, value.shape))
    return list(known)


def _size(size: int | torch.SymInt) -> Size:
    if not isinstance(size, torch.SymInt):
        return int(size)
    expr = size.node.expr
    return int(expr) if expr.is_number else expr


def literal_size(value: Any) -> Size | None:
    """A size among an op's arguments: an int, or the expression of a dynamic one that another node computes."""
    if isinstance(value, fx.Node):
        value = value.meta.get("val")
    if isinstance(value, torch.SymInt):
        expr = value.node.expr
        return int(expr) if expr.is_number else expr
    return value if isinstance(value, int) else None


def result_sizes(node: fx.Node) -> list[list[Size] | None] | None:
    """Sizes of each result of an op with several, None where it has one."""
    if "result_sizes" in node.meta:
        return list(node.meta["result_sizes"])
    value = node.meta.get("val")
    if isinstance(value, list | tuple):
        return [shape_of(v) if isinstance(v, torch.Tensor) else None for v in value]
    return None


class Axes:
    """The axes of a program; iterates :class:`AxisInfo`, and answers what is tied to what and why.

    ``graph`` is a bipartite networkx graph of axes and ops: an edge says that the op handles the axis; the node of
    each axis carries its name, size and frozen reason.
    """

    def __init__(
        self,
        program: Program,
        unifier: Unifier,
        dims: dict[fx.Node, Any],
        unknown: dict[str, list[str]],
        freezes: Sequence[tuple[Expr, fx.Node, str]] = (),
    ):
        self.program, self.unifier, self.unknown_ops, self._freezes = program, unifier, unknown, freezes
        self.dims: dict[fx.Node, Any] = {n: _resolve_all(d) for n, d in dims.items()}
        self._infos: dict[str, AxisInfo] | None = None

    @property
    def by_name(self) -> dict[str, AxisInfo]:
        if self._infos is None:
            self._infos = name_axes(self)
        return self._infos

    def __iter__(self) -> Iterator[AxisInfo]:
        return iter(self.by_name.values())

    def __len__(self) -> int:
        return len(self.by_name)

    def __getitem__(self, name: str) -> AxisInfo:
        return self.by_name[name]

    def tensor_dims(self) -> dict[str, Dims]:
        """The dims of every parameter, buffer and constant that the graph reads."""
        return {str(n.target): d for n, d in self.dims.items() if n.op == "get_attr" and isinstance(d, list)}

    @cached_property
    def uses(self) -> dict[int, list[fx.Node]]:
        """Axis id to the nodes whose operands or results carry it, in graph order."""
        out: dict[int, list[fx.Node]] = {}
        carried: dict[fx.Node, set[int]] = {}
        for node in self.program.graph.nodes:
            own = {a.id for d in flat_dims(self.dims.get(node)) for a in axes_of(d)}
            carried[node] = own
            touched = set(own)
            for source in node.all_input_nodes:
                touched |= carried.get(source, set())
            for axis in touched:
                out.setdefault(axis, []).append(node)
        return out

    @cached_property
    def memory(self) -> Memory:
        """Which values share memory, and which ops write into it."""
        return Memory(self.program.graph)

    @cached_property
    def blockers(self) -> dict[int, dict[fx.Node, str]]:
        """Axis id to every op whose rule froze it, with the first reason of each; ``frozen`` has the first op alone."""
        out: dict[int, dict[fx.Node, str]] = {}
        for expr, node, why in self._freezes:
            for axis in axes_of(expr):
                out.setdefault(axis.id, {}).setdefault(node, why)
        return out

    def find(self, pattern: str) -> list[AxisInfo]:
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
        raise SpecError(f"no axis matches {pattern!r}. Nearest names: {', '.join(self._nearest(pattern)) or '(none)'}")

    def _nearest(self, pattern: str) -> list[str]:
        """Names whose role is spelled almost like the pattern's; else whole names that are."""
        import difflib

        role = pattern.rpartition("/")[2].strip("*")
        roles = difflib.get_close_matches(role, {i.role for i in self}, n=2)
        near = [i.name for i in self if i.role in roles][:4]
        return near or difflib.get_close_matches(pattern, list(self.by_name), n=4, cutoff=0.4) or list(self.by_name)[:6]

    def _by_dim(self, tensor: str, dim: int, pattern: str) -> list[AxisInfo]:
        table = self.tensor_dims()
        aliases = self.program.aliases
        matching = [n for n in [*table, *aliases] if fnmatch.fnmatchcase(n, tensor)]
        if not matching:
            import difflib

            near = difflib.get_close_matches(tensor, list(table), n=3, cutoff=0.3)
            raise SpecError(f"{pattern!r}: no parameter matches {tensor!r}; nearest: {', '.join(near) or 'none'}")
        found: dict[str, AxisInfo] = {}
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

    def name_of(self, axis: Axis) -> str:
        for info in self:
            if info.axis is axis:
                return info.name
        return f"(unnamed axis of size {axis.size})"

    def describe(self, dim: Expr) -> str:
        """A dim in words: ``heads 4 x head_dim 8 + ...``."""
        from fxgrow.axes.expr import Concat, Leaf, Product

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
        out: nx.Graph[str] = nx.Graph()
        infos = {i.axis.id: i for i in self}
        for info in self:
            out.add_node(info.name, kind="axis", size=info.size, role=info.role, frozen=str(info.reason or ""))
        for ident, nodes in self.uses.items():
            if ident not in infos:
                continue
            for node in nodes:
                if node.op == "get_attr":
                    out.add_node(str(node.target), kind="tensor")
                    out.add_edge(infos[ident].name, str(node.target))
                elif node.op == "call_function":
                    out.add_node(node.name, kind="op", target=str(node.target), source=node.meta.get("source", ""))
                    out.add_edge(infos[ident].name, node.name)
        return out

    def explain(self, name: str) -> str:
        """Why an axis is frozen, or what grows with it: tensors, and the ops that tie them, with source lines."""
        (info, *_) = self.find(name)
        lines = [f"{info.name}  size {info.size}, {'growable' if info.growable else 'frozen'}"]
        if info.reason is not None:
            from fxgrow.extension import in_words

            lines.append(f"  frozen by {info.reason}")
            lines.append(f"  {in_words(self, info)}")
        lines.append("  in " + ", ".join(map(str, info.members)) if info.members else "  in no parameter")
        seen: set[tuple[str, str]] = set()
        for node in self.uses.get(info.axis.id, []):
            if node.op != "call_function":
                continue
            key = (str(node.target), node.meta.get("source", ""))
            if key not in seen:
                seen.add(key)
                lines.append(f"  => {node.target}" + (f"  {key[1]}" if key[1] else ""))
        return "\n".join(lines)


def from_parameter(value: Any) -> bool:
    """Whether a value is a parameter, seen through views and casts only."""
    from fxgrow.rules.base import RULES, op_name

    while isinstance(value, fx.Node):
        if value.op == "get_attr":
            return True
        rule = RULES.get(op_name(value.target)) if value.op == "call_function" else None
        if rule is None or not rule.moves or not value.all_input_nodes:
            return False
        value = value.all_input_nodes[0]
    return False


def constant_value(value: Any, constants: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """The value of a constant tensor, seen through copies; None where it is none, or on the meta device."""
    while isinstance(value, fx.Node) and value.op == "call_function" and str(value.target) in _COPIES:
        value = value.args[0]
    if not isinstance(value, fx.Node) or value.op != "get_attr":
        return None
    found = constants.get(str(value.target))
    return None if found is None or found.is_meta else found


def flat_dims(dims: Any) -> Iterator[Expr]:
    """Every dim of a node's result or results."""
    if dims is None:
        return
    for d in dims:
        if isinstance(d, list):
            yield from d
        elif d is not None:
            yield d


def _resolve_all(dims: Any) -> Any:
    if dims is None:
        return None
    return [_resolve_all(d) if isinstance(d, list) or d is None else resolve(d) for d in dims]


class Relate:
    """What a rule sees during analysis."""

    def __init__(
        self, unifier: Unifier, env: dict[fx.Node, Any], constants: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        self.unifier, self.env, self.constants = unifier, env, constants or {}
        self.freezes: list[tuple[Expr, fx.Node, str]] = []  # every dim that a rule froze, the op and why
        self.node: fx.Node
        self.args: dict[str, Any] = {}
        self.seen: set[fx.Node] = set()  # the operands whose dims the rule asked for

    def at(self, node: fx.Node) -> Relate:
        from fxgrow.rules.base import bound_arguments

        self.node, self.args, self.seen = node, bound_arguments(node), set()
        return self

    def freeze_unseen(self, rule: Rule) -> None:
        """Operands that a rule never asked for: nothing says what growth of them would do."""
        from fxgrow.rules.base import nodes_among

        for name, operand in nodes_among(self.args):
            if operand not in self.seen and name not in rule.ignored:
                for dim in flat_dims(self.env.get(operand)):
                    self.freeze(dim, f"fxgrow's rule for it does not follow its operand {name}")

    @property
    def op(self) -> str:
        return str(self.node.target)

    @property
    def source(self) -> str:
        return str(self.node.meta.get("source", ""))

    @property
    def first(self) -> str:
        return next(n for n, a in self.args.items() if isinstance(a, fx.Node) and self.env.get(a) is not None)

    @property
    def shape(self) -> list[Size]:
        """Sizes of the result; of the first one where there are several."""
        several = result_sizes(self.node)
        return (several[0] if several else sizes_of(self.node)) or []

    @property
    def result_count(self) -> int | None:
        """Number of results of an op with several, else None."""
        several = result_sizes(self.node)
        return len(several) if several is not None else None

    def results(self, node: fx.Node) -> Any:
        self.seen.add(node)
        return self.env.get(node)

    def dims(self, name: str | fx.Node) -> Dims | None:
        value = self.args.get(name) if isinstance(name, str) else name
        if isinstance(value, fx.Node):
            self.seen.add(value)
        dims = self.env.get(value) if isinstance(value, fx.Node) else None
        return [resolve(d) for d in dims] if dims is not None else None

    def tensor_operands(self) -> list[tuple[str, Dims]]:
        """Every tensor operand, those inside lists included, in order."""
        out: list[tuple[str, Dims]] = []
        for name, value in self.args.items():
            for item in value if isinstance(value, list | tuple) else [value]:
                dims = self.env.get(item) if isinstance(item, fx.Node) else None
                if dims is not None and not any(isinstance(d, list) for d in dims):
                    self.seen.add(item)
                    out.append((name, [resolve(d) for d in dims]))
        return out

    def unify(self, a: Expr, b: Expr) -> None:
        """Tie two dims; where that cannot be, freeze both and say why."""
        try:
            self.unifier.unify(a, b, self.op, self.source)
        except Conflict as conflict:
            self.freeze(a, str(conflict))
            self.freeze(b, str(conflict))

    def freeze(self, expr: Expr, why: str) -> None:
        self.freezes.append((expr, self.node, why))
        self.unifier.freeze(expr, Frozen(why, self.op, self.source))

    def role(self, expr: Expr, role: str, weight: int = 1) -> None:
        self.unifier.role(expr, role, weight)

    def regroup(self, dims: Sequence[Expr], sizes: Sequence[Size]) -> list[Expr]:
        return self.unifier.regroup(dims, sizes)

    def split(self, dim: Expr, sizes: Sequence[Size]) -> list[Expr]:
        """Cut a dim into parts end to end."""
        out: list[Expr] = []
        for size in sizes[:-1]:
            head, dim = self.unifier.split_concat(dim, size)
            out.append(resolve(head))
        return [*out, resolve(dim)]

    def units(self, dim: Expr) -> list[Expr] | None:
        return self.unifier.units(dim)

    def sized(self, size: Size) -> Expr:
        """A new axis that nothing ties yet."""
        return self.unifier.fresh(size)

    def born(self, i: int) -> Expr:
        """A new axis for dim ``i`` of the result, along which the result does not vary."""
        return self.sized(self.shape[i])

    def inner(self, i: int, size: int) -> Expr:
        """A new axis that becomes the inner factor of dim ``i`` of the result, a broadcast."""
        return self.sized(size)

    def outer(self, i: int, size: Size) -> Expr:
        """A new axis that becomes the outer factor of dim ``i`` of the result, a repetition."""
        return self.sized(size)

    def constant_like(self, dim: Expr) -> Expr:
        """The dim of another tensor, along which the result does not vary."""
        return dim

    def merge(self, exprs: Sequence[Expr]) -> Expr:
        """One dim that several operands share, each with entries of its own."""
        for other in exprs[1:]:
            self.unify(exprs[0], other)
        return resolve(exprs[0])

    def close(self, expr: Expr) -> Expr:
        return expr

    def from_parameter(self, value: Any) -> bool:
        return from_parameter(value)

    def constant(self, value: Any) -> torch.Tensor | None:
        if isinstance(value, fx.Node):
            self.seen.add(value)
        return constant_value(value, self.constants)

    def from_input(self, value: Any) -> bool:
        """Whether a value depends on what the user passes in, and not only on its sizes."""
        stack, seen = [value], set()
        while stack:
            node = stack.pop()
            if not isinstance(node, fx.Node) or node in seen:
                continue
            seen.add(node)
            if node.op == "placeholder":
                return True
            if isinstance(node.meta.get("val"), torch.Tensor | list | tuple):
                stack.extend(node.all_input_nodes)
        return False

    def opaque(self, size: Size, why: str) -> Expr:
        """A new axis that cannot grow."""
        axis = self.unifier.fresh(size)
        self.freeze(axis, why)
        return axis

    def opaque_results(self, why: str) -> Any:
        several = result_sizes(self.node)
        if several is not None:
            return [None if r is None else [self.opaque(s, why) for s in r] for r in several]
        one = sizes_of(self.node)
        return None if one is None else [self.opaque(s, why) for s in one]


_COPIES = {
    f"aten.{n}" for n in ("lift_fresh_copy.default", "detach_.default", "detach.default", "to.dtype", "clone.default")
}
_warned: set[str] = set()


def analyse(program: Program) -> Axes:
    """Find the axes of a program. Never fails: what cannot be related is frozen with the reason."""
    from fxgrow.plugins import load_plugins
    from fxgrow.rules import RULES
    from fxgrow.rules.base import Opaque, op_name

    load_plugins("fxgrow.rules")
    unifier = Unifier()
    env: dict[fx.Node, Any] = {}
    ctx = Relate(unifier, env, program.constants)
    unknown: dict[str, list[str]] = {}
    attributes: dict[str, fx.Node] = {}  # one tensor read in several places has one set of axes
    for node in program.graph.nodes:
        sizes = sizes_of(node)
        if node.op == "placeholder":
            if sizes is not None:
                env[node] = [unifier.fresh(s) for s in sizes]
                for i, dim in enumerate(env[node]):
                    unifier.freeze(dim, Frozen(f"dim {i} of the input {node.name!r}", "input"))
        elif node.op == "get_attr":
            if sizes is not None:
                known = attributes.setdefault(str(node.target), node)
                env[node] = env[known] if known in env else [unifier.fresh(s) for s in sizes]
                for dim, size in zip(env[node], sizes, strict=True):
                    if size == 0:
                        unifier.freeze(dim, Frozen(f"{node.target} has no entries"))
                if str(node.target) in program.constants and not program.tensor(str(node.target)).is_floating_point():
                    for dim in env[node]:  # numbers to look up with: rules read their values
                        unifier.freeze(dim, Frozen(f"dim of the constant tensor {node.target}", "constant"))
        elif node.op == "output":
            for number, out in enumerate(_output_nodes(node)):
                for i, dim in enumerate(flat_dims(env.get(out))):
                    unifier.freeze(
                        dim, Frozen(f"dim {i} of output {number} ({out.name}), which the model returns", "output")
                    )
        elif node.op == "call_function":
            if sizes is None and all(r is None for r in result_sizes(node) or []):
                continue  # sizes and flags
            name = op_name(node.target)
            rule = RULES.get(name)
            ctx.at(node)
            if rule is None:
                unknown.setdefault(name, []).append(node.meta.get("source", ""))
                rule = Opaque(f"fxgrow has no rule for {name}")
            try:
                env[node] = rule.relate(ctx)
            except Conflict as conflict:
                env[node] = Opaque(f"fxgrow cannot relate its dims ({conflict})").relate(ctx)
            except Exception as error:  # a call that the rule was not written for is no reason to give up on the model
                warnings.warn(
                    f"the rule for {name} fails ({type(error).__name__}: {error}) at {ctx.source or 'unknown line'}: "
                    "a bug in the rule; the axes it touches are frozen",
                    stacklevel=3,
                )
                env[node] = Opaque(f"fxgrow's rule for {name} does not fit this call").relate(ctx)
            ctx.freeze_unseen(rule)
            env[node] = _specialised(ctx, node, env[node])
            wrong = _wrong_result(node, env[node])
            if wrong:
                warnings.warn(f"{wrong}: a bug in the rule; the axes it touches are frozen", stacklevel=3)
                env[node] = Opaque(f"fxgrow's rule for {name} does not fit this call").relate(ctx)
    for name, places in unknown.items():
        if name not in _warned:
            _warned.add(name)
            warnings.warn(
                f"no rule for {name} (at {places[0] or 'unknown line'}); the axes it touches are frozen. "
                f"If it is element-wise: fxgrow.register_rule({name!r}, fxgrow.rules.Pointwise())",
                stacklevel=3,
            )
    return Axes(program, unifier, env, unknown, ctx.freezes)


def _output_nodes(node: fx.Node) -> list[fx.Node]:
    import torch.utils._pytree as pytree

    return [x for x in pytree.tree_leaves(node.args[0]) if isinstance(x, fx.Node)]


def _specialised(ctx: Relate, node: fx.Node, dims: Any) -> Any:
    """Dims with the sizes that the trace gave the result: an op may pin a dynamic size to the one number it can be.

    Batch norm pins ``(s - 1) // 2`` to 1 so. Such a dim is frozen, and the result's is a new one, frozen too.
    """

    def one(dim: Expr, size: Size) -> Expr:
        if is_static(size) == is_static(size_of(dim)):
            return dim
        why = f"its size {size_of(dim)} is pinned to {size}"
        ctx.freeze(dim, why)
        return ctx.opaque(size, why)

    def each(dims: Any, sizes: list[Size] | None) -> Any:
        fits = isinstance(dims, list) and sizes is not None and len(dims) == len(sizes)
        if not fits or any(d is None or isinstance(d, list) for d in dims):
            return dims
        return [one(d, s) for d, s in zip(dims, sizes or [], strict=True)]

    several = result_sizes(node)
    if several is None:
        return each(dims, sizes_of(node))
    if not isinstance(dims, list) or len(dims) != len(several):
        return dims
    return [each(d, s) for d, s in zip(dims, several, strict=True)]


def _wrong_result(node: fx.Node, dims: Any) -> str:
    """What is wrong with the dims that a rule returned, by their sizes; empty where nothing is."""
    several = result_sizes(node)
    if several is not None and (
        not isinstance(dims, list) or any(d is not None and not isinstance(d, list) for d in dims)
    ):
        return f"the rule for {node.target} gives one result where the op has {len(several)}"
    pairs = list(zip(several, dims or [], strict=False)) if several is not None else [(sizes_of(node), dims)]
    for sizes, d in pairs:
        if sizes is None or d is None:
            continue
        if len(sizes) != len(d) or not all(same_size(size_of(x), s) for x, s in zip(d, sizes, strict=True)):
            return f"the rule for {node.target} gives dims of {[size_of(x) for x in d]} for a tensor of {sizes}"
    return ""
