"""What a rule asks while an axis grows: :class:`fxgrow.rules.context.GrowthContext`, put together from its parts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import fx

from fxgrow.algebra import Axis, Conflict, Expr, Leaf, Size, is_unit, map_leaves, quotient, size_of
from fxgrow.analysis.axes import Axes
from fxgrow.analysis.call import constant_value
from fxgrow.plan import AxisMap
from fxgrow.proof import recognise
from fxgrow.proof.call import GrowingCall
from fxgrow.proof.contents import Contents, Restart
from fxgrow.proof.meet import meet
from fxgrow.proof.scales import Scales
from fxgrow.proof.sums import Sums
from fxgrow.rules.annotation import Content, Info, annotate, infos


class ProofContext(GrowingCall):
    """One call of an op under the proof.

    Args:
        contents: what new entries hold, and whether an op may ask for something else.

    Attributes:
        sums: what reads the axis and what carries it.
        scales: where factors go.
    """

    def __init__(
        self, axes: Axes, axis: Axis, name: str, growth: AxisMap, contents: Contents, verb: str = "grow"
    ) -> None:
        super().__init__(axes, axis, name, growth, verb)
        self.contents = contents
        self.sums = Sums(self, contents)
        self.scales = Scales(self)

    def begin(self) -> None:
        super().begin()
        self.scales.begin()

    # what analysis has settled

    def unify(self, a: Expr, b: Expr) -> None:
        """Nothing to do: analysis has tied them."""

    def role(self, expr: Expr, role: str, weight: int = 1) -> None:
        """Nothing to do: analysis has named them."""

    def contracted(self, expr: Expr) -> None:
        """Nothing to do: names alone ask for it."""

    def from_input(self, value: Any) -> bool:
        return False  # asked for roles alone

    def freeze(self, expr: Expr, why: str) -> None:
        if self.grows(expr):
            raise self.refuse(why)

    def opaque(self, size: Size, why: str) -> Expr:
        return self.sized(size)

    def opaque_results(self, why: str) -> Any:
        raise self.refuse(why)

    # dims

    def units(self, dim: Expr) -> list[Expr] | None:
        return None if self.grows(dim) else super().units(dim)

    def constant_dim(self, i: int) -> Expr:
        return self.mark(self.result_dims[i], lambda _: Info(Content.CONST))

    def inner(self, i: int, size: int) -> Expr:
        return self.unifier.split_product(self.constant_dim(i), size)[1]

    def outer(self, i: int, size: Size) -> Expr:
        whole = self.constant_dim(i)
        inner = quotient(size_of(whole), size)
        if inner is None:
            raise Conflict(f"size {size_of(whole)} is no multiple of {size}")
        return self.unifier.split_product(whole, inner)[0]

    def constant_like(self, dim: Expr) -> Expr:
        return annotate(dim, lambda _: Info(Content.CONST))

    def merge(self, exprs: Sequence[Expr]) -> Expr:
        """Known is what all agree on."""
        total = exprs[0]
        for other in exprs[1:]:
            theirs = iter(infos(other))

            def join(x: Axis | Leaf, theirs: Iterator[Info] = theirs) -> Expr:
                return Leaf(x.axis, x.info.join(next(theirs))) if isinstance(x, Leaf) else x

            total = map_leaves(total, join)
        return total

    def combine(self, a: Expr, b: Expr, how: str) -> Expr:
        if (is_unit(a) and is_unit(b)) or not (self.grows(a) or self.grows(b)):
            return a if not is_unit(a) else b
        if not is_unit(a) and not is_unit(b):
            self.close(a)
            self.close(b)
        return meet(a, b, how)

    # sums

    def close(self, expr: Expr) -> Expr:
        return self.sums.close(expr)

    def contract(self, exprs: Sequence[Expr], owners: Sequence[str], zero: str | None = None) -> float:
        return self.sums.contract(exprs, owners, zero)

    def uniform_factor(self, exprs: Sequence[Expr]) -> int:
        return self.sums.uniform_factor(exprs)

    def statistic(self, over: Sequence[Expr], needed: Content, rank: int) -> float:
        return self.sums.statistic(over, needed, rank)

    # what new entries hold

    def demand(self, info: Info, content: Content, why: str) -> None:
        self.contents.demand(self, info, content, why)

    def pin(self, expr: Expr, content: Content) -> None:
        changed = False
        for info in infos(expr):
            if info.site is not None:
                changed |= self.contents.pin(self, info.site, content, "its new entries must not show in the result")
        if changed:
            raise Restart

    def newborn_constants(self, values: dict[str, float]) -> None:
        for operand, value in values.items():
            node = self.args.get(operand)
            if isinstance(node, fx.Node) and node.op == "get_attr":
                self.outcome.constants[str(node.target)] = value

    # numbers of the graph and factors

    def edit(self, argument: str, value: Any) -> None:
        self.outcome.graph.literals[self.node.name, argument] = value

    def scale_shared(self, operand: str, factor: float) -> bool:
        return self.scales.scale_shared(operand, factor)

    def rescale_output(self, factor: float) -> None:
        self.scales.rescale_output(factor)

    def rescale_product(self, factor: float, operand: str, biases: Iterable[str]) -> None:
        self.scales.rescale_product(factor, operand, biases)

    # gradients

    def selects_among(self, *, one: bool) -> None:
        self.outcome.statistics = True
        self.outcome.uneven_gradients |= one

    def multiplies(self, *, silenced: bool) -> None:
        self.outcome.multiplied = True
        self.outcome.silenced |= silenced

    # values

    def constant(self, value: Any) -> torch.Tensor | None:
        return constant_value(value, self.axes.program.constants)

    def is_zero(self, value: Any) -> bool:
        return recognise.is_zero(self.axes, value, self.node)

    def mean_of(self, value: Any) -> tuple[fx.Node, list[int]] | None:
        return recognise.mean_of(self.axes, value)

    def of_square(self) -> bool:
        return recognise.is_square(self.args.get("self"))


__all__ = ["ProofContext"]
