"""One op while entries are appended to an axis: the old entries come first, and none sees a new one.

Look-ups keep that as long as they count from the front, and ops that act entry by entry keep it. An op that sums,
normalises or compares over the axis breaks it; where that is tolerated, what depends on the op changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch import fx

from fxgrow.algebra import Axis, Expr, Leaf, Product, leaves, same_size
from fxgrow.analysis.ranges import Ranges
from fxgrow.errors import GrowthRefused
from fxgrow.ir.ops import op_name
from fxgrow.ir.sizes import sizes_of
from fxgrow.proof.context import ProofContext
from fxgrow.proof.lookups import Lookup, lookups_of
from fxgrow.rules.annotation import Content, Info
from fxgrow.rules.base import Rule
from fxgrow.rules.indexing import indexed_dims


class Append:
    """What is done with each call (:class:`fxgrow.proof.interpreter.Step`).

    Args:
        blocked: the ops whose rules froze the axis in analysis, with the reasons.
        tolerate: results may change, of ops that reduce over the axis and of all that follows them.

    Attributes:
        tainted: ops whose result changes, with the reason.
        lookups: where the axis is looked up.
    """

    def __init__(self, context: ProofContext, ranges: Ranges, blocked: Mapping[fx.Node, str], tolerate: bool) -> None:
        self.context, self.ranges, self.blocked, self.tolerate = context, ranges, blocked, tolerate
        self.begin()

    def begin(self) -> None:
        self.tainted: dict[fx.Node, str] = {}
        self.lookups: list[Lookup] = []

    def take(self, rule: Rule) -> Any:
        node = self.context.node
        try:
            return self._look_up(rule) if node in self.blocked else rule.grow(self.context)
        except GrowthRefused as refusal:
            after = any(n in self.tainted for n in node.all_input_nodes)
            reducing = rule.depends_on_all
            if self.tolerate and (reducing or after) and not self._has_fixed_operand():
                self.tainted[node] = str(refusal)
                return self._unknown()
            if reducing and not self.tolerate:
                raise GrowthRefused(
                    f"{refusal}. Only what is computed from it changes: leave it out of the call (return the logits, "
                    "and compute the loss outside), or set preserve: approximate, which keeps all other outputs exact",
                    refusal.refusal,
                ) from None
            raise

    def _has_fixed_operand(self) -> bool:
        """Class weights, or probabilities as targets: an entry per class, which analysis does not tie to them."""
        args = self.context.args
        target = args.get("target")
        value = target.meta.get("val") if isinstance(target, fx.Node) else None
        soft = isinstance(value, torch.Tensor) and value.is_floating_point()
        return isinstance(args.get("weight"), fx.Node) or (soft and "cross_entropy" in self.context.op)

    def _unknown(self) -> Any:
        """The result's dims as analysis has them; new entries of the axis hold anything."""

        def mark(dims: Any) -> Any:
            if dims is None:
                return None
            return [
                mark(d) if isinstance(d, list) or d is None else self.context.mark(d, lambda _: Info(Content.FREE))
                for d in dims
            ]

        return mark(self.context.axes.dims.get(self.context.node))

    def _look_up(self, rule: Rule) -> Any:
        """An op whose rule froze the axis: fine where it picks entries by number, counted from the front."""
        context, node = self.context, self.context.node
        if op_name(node.target) == "aten.one_hot.default":
            high = self.ranges.of(context.args["self"]).high
            self.lookups.append(Lookup(node, node, -1, None if high is None else high + 1))
            return rule.grow(context)
        found = list(lookups_of(node, self.ranges))
        picked = False
        for one in found:
            dims = context.dims(one.operand)
            if dims is None or not context.grows(dims[one.dim]):
                continue
            picked = True
            if not starts_with_old(dims[one.dim], context.axis):
                raise context.refuse("new entries would lie between old ones, which are looked up by number")
            self._check_front(one)
            self.lookups.append(one)
        if not picked:
            raise context.refuse(self.blocked[node])
        for operand in node.all_input_nodes:
            for i, dim in enumerate(context.dims(operand) or []):
                known = any(one.operand is operand and one.dim == i for one in found)
                if context.grows(dim) and not known and operand is not found[0].operand:
                    raise context.refuse("its index has entries for these units too")
        if op_name(node.target).startswith("aten.embedding"):
            return rule.grow(context)
        return self._unknown()

    def _check_front(self, one: Lookup) -> None:
        context = self.context
        name, args = op_name(context.node.target), context.args
        if name == "aten.slice.Tensor":
            start, end = args["start"], args["end"]
            begin = self.ranges.of(0 if start is None else start)
            if not begin.not_negative or (isinstance(end, int) and end < 0):
                raise context.refuse("it is sliced from its end, where new entries would be")
            length = self.ranges.size(end)
            size = (sizes_of(context.node) or [])[one.dim]
            step = args.get("step") or 1
            if length is None or (
                step == 1 and begin.low == 0 and not same_size(sympy.sympify(length), sympy.sympify(size))
            ):
                raise context.refuse(f"it is sliced to {length} entries but gives {size}: what lies beyond is cut off")
            if step != 1 or begin.low != 0:
                raise context.refuse("it is sliced with a step, or not from its first entry on")
            return
        if name == "aten.select.int" and not self.ranges.of(args["index"]).not_negative:
            raise context.refuse("it takes an entry counted from the end, where new entries would be")
        if name == "aten.index.Tensor":
            index = next(node for node, covered in indexed_dims(args["indices"]) if one.dim in covered)
            value = index.meta.get("val")
            if not isinstance(value, torch.Tensor) or value.dtype in (torch.bool, torch.uint8):
                raise context.refuse("a mask picks its entries, and has none for new ones")
            constant = context.constant(index)
            low = constant.min() if constant is not None and constant.numel() else None
            if not (low is not None and low >= 0) and not self.ranges.of(index).not_negative:
                raise context.refuse(
                    "its numbers may be negative, which counts from the end. Use nn.functional.embedding, or clamp them"
                )


def starts_with_old(dim: Expr, axis: Axis) -> bool:
    """Whether new entries of the axis come after all old entries of the dim."""

    def has(e: Expr) -> bool:
        return any((x.axis if isinstance(x, Leaf) else x) is axis for x in leaves(e))

    if isinstance(dim, Axis | Leaf):
        return has(dim)
    parts = dim.factors if isinstance(dim, Product) else dim.parts[::-1]
    return bool(parts) and starts_with_old(parts[0], axis) and not any(map(has, parts[1:]))


__all__ = ["Append", "starts_with_old"]
