"""Analysis: run every op's rule over a graph and collect the model's axes."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

import fxgrow.rules  # noqa: F401 - the table
from fxgrow.algebra import Conflict, Expr, Frozen, Size, Unifier, is_static, resolve, same_size, size_of
from fxgrow.analysis.axes import Axes
from fxgrow.analysis.naming import name_axes
from fxgrow.ir import trees
from fxgrow.ir.ops import bound_arguments, nodes_among, op_name
from fxgrow.ir.sizes import result_sizes, sizes_of
from fxgrow.ir.traced import Traced
from fxgrow.plugins import load_plugins
from fxgrow.rules.annotation import Dims, flat_dims
from fxgrow.rules.base import Rule, moves, rule_of
from fxgrow.rules.forms import Opaque


def from_parameter(value: Any) -> bool:
    """Whether a value is a parameter, seen through views and casts only."""

    while isinstance(value, fx.Node):
        if value.op == "get_attr":
            return True
        if not moves(value) or not value.all_input_nodes:
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
        self.node, self.args, self.seen = node, bound_arguments(node), set()
        return self

    def freeze_unseen(self, rule: Rule) -> None:
        """Operands that a rule never asked for: nothing says what growth of them would do."""
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

    def operand(self, name: str | fx.Node) -> Dims:
        found = self.dims(name)
        if found is None:
            raise Conflict(f"operand {name} is missing")
        return found

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

    def constant_dim(self, i: int) -> Expr:
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


def analyse(program: Traced) -> Axes:
    """Find the axes of a program. Never fails: what cannot be related is frozen with the reason."""

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
            rule = rule_of(node)
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
    axes = Axes(program, unifier, env, unknown, ctx.freezes)
    axes.by_name = name_axes(axes)
    return axes


def _output_nodes(node: fx.Node) -> list[fx.Node]:
    return [x for x in trees.tree_leaves(node.args[0]) if isinstance(x, fx.Node)]


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
