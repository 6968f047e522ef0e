"""What a rule sees during analysis, which ties the dims of operands and results to axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from fxgrow.algebra import Conflict, Expr, Frozen, Size, Unifier, resolve
from fxgrow.analysis.call import CallContext, constant_value
from fxgrow.ir.sizes import result_sizes, sizes_of
from fxgrow.rules.annotation import flat_dims
from fxgrow.rules.base import Rule


class AnalysisContext(CallContext):
    """One call of an op under analysis.

    Args:
        env: dims of the values known so far, one list for each node; a list of such lists for several results.
        constants: tensors whose values rules may read.

    Attributes:
        freezes: every dim that a rule froze, the op and why.
        contractions: the dims over which a call sums products.
    """

    def __init__(
        self, unifier: Unifier, env: Mapping[fx.Node, Any], constants: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        super().__init__(unifier)
        self.env, self.constants = env, constants or {}
        self.freezes: list[tuple[Expr, fx.Node, str]] = []
        self.contractions: dict[fx.Node, list[Expr]] = {}

    def dims_of(self, node: fx.Node) -> Any:
        dims = self.env.get(node)
        if dims is None or any(d is None or isinstance(d, list) for d in dims):
            return dims
        return [resolve(d) for d in dims]

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

    def freeze_unseen(self, rule: Rule) -> None:
        """Freeze the operands that the rule never asked for."""
        for name, operand in self.unseen_operands(rule):
            for dim in flat_dims(self.env.get(operand)):
                self.freeze(dim, f"fxgrow's rule for it does not follow its operand {name}")

    def role(self, expr: Expr, role: str, weight: int = 1) -> None:
        self.unifier.role(expr, role, weight)

    def contracted(self, expr: Expr) -> None:
        self.contractions.setdefault(self.node, []).append(expr)

    # new dims of the result

    def constant_dim(self, i: int) -> Expr:
        return self.sized(self.shape[i])

    def inner(self, i: int, size: int) -> Expr:
        return self.sized(size)

    def outer(self, i: int, size: Size) -> Expr:
        return self.sized(size)

    def constant_like(self, dim: Expr) -> Expr:
        return dim

    def merge(self, exprs: Sequence[Expr]) -> Expr:
        for other in exprs[1:]:
            self.unify(exprs[0], other)
        return resolve(exprs[0])

    def close(self, expr: Expr) -> Expr:
        return expr

    def opaque(self, size: Size, why: str) -> Expr:
        axis = self.sized(size)
        self.freeze(axis, why)
        return axis

    def opaque_results(self, why: str) -> Any:
        several = result_sizes(self.node)
        if several is not None:
            return [None if r is None else [self.opaque(s, why) for s in r] for r in several]
        one = sizes_of(self.node)
        return None if one is None else [self.opaque(s, why) for s in one]

    # where values come from

    def constant(self, value: Any) -> torch.Tensor | None:
        if isinstance(value, fx.Node):
            self.seen.add(value)
        return constant_value(value, self.constants)

    def from_input(self, value: Any) -> bool:
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


__all__ = ["AnalysisContext"]
