"""The call at hand while an axis grows: its operands' dims with what is known of new entries, and how it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from fxgrow.algebra import Axis, Concat, Expr, Leaf, Product, Unifier, leaves, map_leaves, product
from fxgrow.analysis.axes import Axes
from fxgrow.analysis.call import CallContext
from fxgrow.errors import GrowthRefused, Refusal
from fxgrow.ir.dtypes import is_fine
from fxgrow.ir.nodes import info_of
from fxgrow.plan import AxisMap
from fxgrow.proof.outcome import Outcome
from fxgrow.rules.annotation import Info, Site, infos


class GrowingCall(CallContext):
    """One call of an op, and what one attempt of the proof has found when it comes to it.

    Args:
        axes, axis: the axis that grows, among those of its program.
        name: of the axis, in refusals.
        growth: its old and new units.
        verb: what is done with it, in refusals.

    Attributes:
        env: dims of the values met so far, annotated; all others have those of the analysis.
        outcome: what was decided so far.
        read_here: sites that the call at hand contracts.
    """

    def __init__(self, axes: Axes, axis: Axis, name: str, growth: AxisMap, verb: str = "grow") -> None:
        super().__init__(Unifier())
        self.axes, self.axis, self.name, self.growth, self.verb = axes, axis, name, growth, verb
        self.env: dict[fx.Node, Any] = {}
        self.outcome = Outcome(growth)
        self.read_here: set[Site] = set()

    def begin(self) -> None:
        """Start a new attempt."""
        self.env, self.outcome = {}, Outcome(self.growth)

    def at(self, node: fx.Node) -> None:
        super().at(node)
        self.read_here = set()

    def dims_of(self, node: fx.Node) -> Any:
        return self.env.get(node, self.axes.dims.get(node))

    @property
    def result_dims(self) -> Any:
        return self.axes.dims[self.node]

    @property
    def newborn(self) -> bool:
        return self.growth.newborn > 0

    @property
    def in_eval(self) -> bool:
        calls, number = self.axes.program.calls, info_of(self.node).call
        return number >= len(calls) or calls[number].serves(False)

    def takes_shares(self, site: Site) -> bool:
        """Whether the entries of a parameter or buffer can be divided among copies."""
        return is_fine(self.axes.program.tensor(site[0]).dtype)

    # dims

    def mark(self, dim: Expr, info: Callable[[int], Info]) -> Expr:
        """A dim of the analysis with the growing axis annotated: ``info`` of each occurrence, by its number."""
        counter = iter(range(1 << 30))
        return map_leaves(dim, lambda x: Leaf(x, info(next(counter))) if x is self.axis else x)

    def grows(self, expr: Expr) -> bool:
        return any(isinstance(x, Leaf) or x is self.axis for x in leaves(expr))

    def is_whole(self, expr: Expr) -> bool:
        return isinstance(expr, Leaf)

    def is_factor(self, expr: Expr, centred: bool) -> bool:
        def one(part: Expr) -> bool:
            factors = part.factors if isinstance(part, Product) else (part,)
            return sum(self.is_whole(f) for f in factors) == 1 == len(infos(part))

        return self.is_whole(expr) or (not centred and all(one(p) for p in parts_of(expr)))

    # refusals

    def refuse(self, why: str, kind: type[GrowthRefused] = GrowthRefused) -> GrowthRefused:
        return self.refuse_at(self.node, why, kind)

    def refuse_at(self, node: fx.Node, why: str, kind: type[GrowthRefused] = GrowthRefused) -> GrowthRefused:
        """The error to raise where the growth fails at another op of the graph."""
        op, line = str(node.target), info_of(node).source
        return kind(Refusal(self.name, why, self.verb, self.growth.old, self.growth.new, op, line))

    def refuse_all(self, why: str) -> GrowthRefused:
        """The error to raise where it fails, at no op in particular."""
        return GrowthRefused(Refusal(self.name, why, self.verb, self.growth.old, self.growth.new))


def parts_of(expr: Expr) -> list[Expr]:
    """A dim as a list of products without concatenation."""
    if isinstance(expr, Concat):
        return [q for p in expr.parts for q in parts_of(p)]
    if isinstance(expr, Product) and expr.factors and isinstance(expr.factors[-1], Concat):
        return [product([*expr.factors[:-1], q]) for p in expr.factors[-1].parts for q in parts_of(p)]
    return [expr]


__all__ = ["GrowingCall", "parts_of"]
