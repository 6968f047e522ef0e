"""What an axis is used for, as far as no rule can tell from one op: streams that blocks add to, and low ranks."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import fx

from fxgrow.algebra import Axis, axes_of
from fxgrow.analysis.axes import Axes
from fxgrow.ir.ops import bound_arguments, nodes_among
from fxgrow.rules.annotation import flat_dims
from fxgrow.rules.base import casts, copies, factors, is_linear, moves, picks, rule_of
from fxgrow.rules.forms import Opaque, Pattern, Pointwise, along_of


class Uses:
    """The ways that values take between the layers of a model.

    A layer here is a call that sums products of an activation and weights: what depends on no input.
    """

    def __init__(self, axes: Axes) -> None:
        self.axes = axes
        self._order = {n: i for i, n in enumerate(axes.program.graph.nodes)}

    @cached_property
    def _activations(self) -> set[fx.Node]:
        """Values that depend on what the user passes in, and not only on its sizes."""
        out: set[fx.Node] = set()
        for node in self.axes.program.graph.nodes:
            value = node.meta.get("val")
            if isinstance(value, torch.Tensor | list | tuple) and (
                node.op == "placeholder" or any(n in out for n in node.all_input_nodes)
            ):
                out.add(node)
        return out

    @cached_property
    def _mixed(self) -> dict[fx.Node, frozenset[int]]:
        """The layers, and the axes over which each sums."""
        return {
            node: over
            for node, over in self.axes.contractions.items()
            if any(isinstance(n.meta.get("val"), torch.Tensor) and n not in self._activations for n in _tensors(node))
        }

    def _carry(self, node: fx.Node, axis: Axis) -> bool:
        return any(a.id == axis.id for d in flat_dims(self.axes.dims.get(node)) for a in axes_of(d))

    # streams ----------------------------------------------------------------------------------------------------------

    def residual(self) -> dict[int, str]:
        """Axes along which a value is added to one that layers made of it, ``x + f(x)``: in the last dim, or in dim 1.

        A layer of f sums over the axis, so that a function of single entries is none: ``x + 0.04 * x ** 3`` of an
        activation written out, or a Taylor sum.
        """
        out: dict[int, str] = {}
        for node in self.axes.program.graph.nodes:
            if node.op != "call_function" or "aten.add" not in str(node.target):
                continue
            operands = [a for a in node.args[:2] if isinstance(a, fx.Node)]
            dims = self.axes.dims.get(node)
            if not dims or len(operands) != 2 or any(a.op != "call_function" for a in operands):
                continue
            early, late = sorted(operands, key=lambda n: self._order[n])
            mixed = self._mixed_between(early, late)
            if not mixed:
                continue
            for place, dim in (("second", dims[1] if len(dims) > 2 else None), ("last", dims[-1])):
                ids = set() if dim is None else {a.id for a in axes_of(dim)}
                if ids & mixed:
                    out.update({i: place for i in ids if place == "last" or i not in out})
        return out

    def _mixed_between(self, early: fx.Node, late: fx.Node) -> set[int]:
        """The axes that layers sum over on the ways from one value to another."""
        floor = self._order[early]
        stack, between = [late], {late}
        while stack:  # the search stays between the two in graph order
            for source in stack.pop().all_input_nodes:
                if source not in between and self._order[source] > floor:
                    between.add(source)
                    stack.append(source)
        on_the_way: dict[fx.Node, bool] = {early: True}
        out: set[int] = set()
        for node in sorted(between, key=self._order.__getitem__):
            on_the_way[node] = any(on_the_way.get(n, False) for n in node.all_input_nodes)
            if on_the_way[node]:
                out |= self._sums(node)
        return out if on_the_way.get(late) else set()

    def _sums(self, node: fx.Node) -> set[int] | frozenset[int]:
        """The axes over which a call sums; all that it is given, where nothing is known of it."""
        if node in self.axes.contractions:
            return self._mixed.get(node, frozenset())
        rule = rule_of(node)
        if node.op != "call_function" or (rule is not None and not isinstance(rule, Opaque)):
            return frozenset()
        return {a.id for n in _tensors(node) for d in flat_dims(self.axes.dims.get(n)) for a in axes_of(d)}

    # low ranks --------------------------------------------------------------------------------------------------------

    def low_rank(self, axis: Axis) -> bool:
        """Whether an axis lies between two linear maps with nothing between them that is not linear, but for a norm.

        The two are one map of that rank, such as LoRA's; between hidden units and what reads them there is an
        activation.
        """
        readers = [n for n in self.axes.uses.get(axis.id, ()) if axis.id in self.axes.contractions.get(n, ())]
        seen: set[fx.Node] = set()
        for reader in readers:
            read = [n for n in _tensors(reader) if n in self._activations and self._carry(n, axis)]
            linear = isinstance(rule_of(reader), Pattern) and len(read) <= 1
            if not linear or not all(self._linear(n, axis, seen) for n in read):
                return False
        return bool(readers)

    def _linear(self, node: fx.Node, axis: Axis, seen: set[fx.Node]) -> bool:
        """Whether a value is linear in what a layer made, up to a norm."""
        if node in seen or node not in self._activations:
            return True
        seen.add(node)
        if node.op != "call_function":
            return False
        before = [n for n in _tensors(node) if n in self._activations and self._carry(n, axis)]
        rule = rule_of(node)
        if not before:
            return node in self._mixed or bool(picks(node))
        if node in self.axes.contractions or rule is None:
            passes = node in self._mixed and len(before) == 1
        elif product := factors(node):
            passes = len(before) == 1 and before[0] in product
        else:
            affine = isinstance(rule, Pointwise) and _holds(rule, node)
            row = along_of(node)
            affine = affine or (row is not None and row.kind in ("mean", "sum"))
            norm = bool(rule.weights)
            passes = affine or norm or moves(node) or is_linear(node) or casts(node) or copies(node)
        return passes and all(self._linear(n, axis, seen) for n in before)


def _holds(rule: Pointwise, node: fx.Node) -> bool:
    return rule.mean(bound_arguments(node)) if callable(rule.mean) else rule.mean


def _tensors(node: fx.Node) -> Iterator[fx.Node]:
    """The operands of a call that are tensors; one that it has twice comes twice."""
    operands = (n for _, n in nodes_among(bound_arguments(node)))
    return (n for n in operands if isinstance(n.meta.get("val"), torch.Tensor))


__all__ = ["Uses"]
