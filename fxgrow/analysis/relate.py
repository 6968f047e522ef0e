"""Analysis: run every op's rule over a graph and collect the model's axes."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import Any

from torch import fx

import fxgrow.rules  # noqa: F401 - the table
from fxgrow.algebra import Conflict, Expr, Frozen, Size, Unifier, is_static, same_size, size_of
from fxgrow.analysis.axes import Axes
from fxgrow.analysis.context import AnalysisContext
from fxgrow.analysis.naming import name_axes
from fxgrow.ir import trees
from fxgrow.ir.nodes import info_of
from fxgrow.ir.ops import op_name
from fxgrow.ir.sizes import result_sizes, sizes_of
from fxgrow.ir.traced import Traced
from fxgrow.plugins import load_plugins
from fxgrow.rules.annotation import flat_dims
from fxgrow.rules.base import rule_of
from fxgrow.rules.forms import Opaque
from fxgrow.warn import warn

_warned: set[str] = set()


def analyse(program: Traced) -> Axes:
    """Find the axes of a program. Never fails: what cannot be related is frozen with the reason."""
    load_plugins("fxgrow.rules")
    unifier = Unifier()
    env: dict[fx.Node, Any] = {}
    ctx = AnalysisContext(unifier, env, program.constants)
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
                unknown.setdefault(name, []).append(info_of(node).source)
                rule = Opaque(f"fxgrow has no rule for {name}")
            try:
                env[node] = rule.relate(ctx)
            except Conflict as conflict:
                env[node] = Opaque(f"fxgrow cannot relate its dims ({conflict})").relate(ctx)
            except Exception as error:  # a call that the rule was not written for is no reason to give up on the model
                warn(
                    f"the rule for {name} fails ({type(error).__name__}: {error}) at {ctx.source or 'unknown line'}: "
                    "a bug in the rule; the axes it touches are frozen"
                )
                env[node] = Opaque(f"fxgrow's rule for {name} does not fit this call").relate(ctx)
            ctx.freeze_unseen(rule)
            env[node] = _specialised(ctx, node, env[node])
            wrong = _wrong_result(node, env[node])
            if wrong:
                warn(f"{wrong}: a bug in the rule; the axes it touches are frozen")
                env[node] = Opaque(f"fxgrow's rule for {name} does not fit this call").relate(ctx)
    for name, places in unknown.items():
        if name not in _warned:
            _warned.add(name)
            warn(
                f"no rule for {name} (at {places[0] or 'unknown line'}); the axes it touches are frozen. "
                f"If it is element-wise: fxgrow.register_rule({name!r}, fxgrow.rules.Pointwise())"
            )
    axes = Axes.of(program, env, unknown, ctx.freezes, ctx.contractions)
    return replace(axes, by_name=MappingProxyType(name_axes(axes, unifier)))


def _output_nodes(node: fx.Node) -> list[fx.Node]:
    return [x for x in trees.tree_leaves(node.args[0]) if isinstance(x, fx.Node)]


def _specialised(ctx: AnalysisContext, node: fx.Node, dims: Any) -> Any:
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
