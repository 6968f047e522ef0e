"""Which part of a parameter each entry of a value comes from: the rows of the queries in a fused projection.

The parts of a parameter's dim are numbered, and its axes tagged with their part; the rules then carry the tags along,
as they carry what is known of new entries while an axis grows. Tags are possibilities: an entry is of one of the parts
that all tags on its way allow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from fxgrow.algebra import Axis, Concat, Conflict, Expr, Leaf, Product, Size, Unifier, map_leaves, product, size_of
from fxgrow.analysis.axes import Axes
from fxgrow.analysis.call import CallContext, constant_value
from fxgrow.rules.annotation import infos
from fxgrow.rules.base import rule_of


@dataclass(frozen=True)
class Tag:
    """The parts that an entry may be of."""

    parts: frozenset[int]

    def join(self, other: Tag) -> Tag:
        return Tag(self.parts | other.parts)


def parts_of(dim: Expr) -> Sequence[Expr]:
    """The parts that lie end to end in a dim, or in its last factor; one where there are none."""
    if isinstance(dim, Product) and dim.factors:
        return parts_of(dim.factors[-1])
    return dim.parts if isinstance(dim, Concat) else (dim,)


def tagged(dim: Expr) -> Expr:
    """A dim with the axes of each part tagged with its number."""
    if isinstance(dim, Product) and dim.factors:
        return product([*dim.factors[:-1], tagged(dim.factors[-1])])
    if not isinstance(dim, Concat):
        return dim

    def tag(part: Expr, number: int) -> Expr:
        return map_leaves(part, lambda x: Leaf(x, Tag(frozenset([number]))) if isinstance(x, Axis) else x)

    return Concat(tuple(tag(p, i) for i, p in enumerate(dim.parts)))


def rows_of(dim: Expr, parts: frozenset[int]) -> np.ndarray:
    """Boolean (size of the dim,): the entries of some of its parts, as :func:`parts_of` numbers them."""
    if isinstance(dim, Product) and dim.factors:
        outer = int(size_of(product(dim.factors[:-1])))
        return np.tile(rows_of(dim.factors[-1], parts), outer)
    assert isinstance(dim, Concat)
    return np.concatenate([np.full(int(size_of(p)), i in parts) for i, p in enumerate(dim.parts)])


def possible(dims: Any, every: frozenset[int]) -> frozenset[int]:
    """The parts that the entries of a value may be of."""
    if dims and any(isinstance(d, list) or d is None for d in dims):
        return frozenset().union(*(possible(d, every) for d in dims if d is not None))

    def along(dim: Expr) -> frozenset[int]:
        if isinstance(dim, Leaf):
            found: frozenset[int] = dim.info.parts & every
            return found
        if isinstance(dim, Product):
            return frozenset(every.intersection(*map(along, dim.factors)))
        if isinstance(dim, Concat):
            return frozenset().union(*map(along, dim.parts))
        return every

    return every.intersection(*map(along, dims))


class TaggedCall(CallContext):
    """One call of an op with tagged operands: a :class:`fxgrow.rules.context.GrowthContext` that carries the tags.

    Args:
        env: the dims of values with tags; all others have those of the analysis.
    """

    growth = None
    newborn = False
    in_eval = True

    def __init__(self, axes: Axes, env: Mapping[fx.Node, Any]) -> None:
        super().__init__(Unifier())
        self.axes, self.env = axes, env

    def follow(self, node: fx.Node) -> Any:
        """The result's dims, with tags.

        Raises:
            Conflict: they cannot be followed.
        """
        self.at(node)
        rule = rule_of(node)
        if rule is None:
            raise Conflict("no rule")
        found = rule.grow(self)  # type: ignore[arg-type]
        if self.unseen_operands(rule) and any(self.env.get(n) is not None for _, n in self.unseen_operands(rule)):
            raise Conflict("the rule does not follow an operand")
        return found

    def dims_of(self, node: fx.Node) -> Any:
        return self.env.get(node, self.axes.dims.get(node))

    @property
    def result_dims(self) -> Any:
        return self.axes.dims[self.node]

    # nothing is refined any more, and nothing grows

    def unify(self, a: Expr, b: Expr) -> None:
        """Analysis has tied them; tags of entries that meet have to agree.

        Raises:
            Conflict: they do not.
        """
        if self.grows(a) and self.grows(b) and _parts_along(a) != _parts_along(b):
            raise Conflict("different parts meet")

    def freeze(self, expr: Expr, why: str) -> None:
        if self.grows(expr):
            raise Conflict(why)

    def role(self, expr: Expr, role: str, weight: int = 1) -> None:
        """Analysis has named them."""

    def opaque(self, size: Size, why: str) -> Expr:
        return self.sized(size)

    def opaque_results(self, why: str) -> Any:
        raise Conflict(why)

    def grows(self, expr: Expr) -> bool:
        return bool(infos(expr))

    def is_zero(self, value: Any) -> bool:
        return False

    def constant(self, value: Any) -> torch.Tensor | None:
        return constant_value(value, self.axes.program.constants)

    def constant_dim(self, i: int) -> Expr:
        found: Expr = self.result_dims[i]
        return found

    def inner(self, i: int, size: int) -> Expr:
        return self.unifier.split_product(self.constant_dim(i), size)[1]

    def outer(self, i: int, size: Size) -> Expr:
        raise Conflict("a repetition")

    def constant_like(self, dim: Expr) -> Expr:
        return map_leaves(dim, lambda x: x.axis if isinstance(x, Leaf) else x)

    def close(self, expr: Expr) -> Expr:
        return expr

    def merge(self, exprs: Sequence[Expr]) -> Expr:
        for other in exprs[1:]:
            self.unify(exprs[0], other)
        return exprs[0]

    def combine(self, a: Expr, b: Expr, how: str) -> Expr:
        self.unify(a, b)
        return a if self.grows(a) else b

    def contract(self, exprs: Sequence[Expr], owners: Sequence[str], zero: str | None = None) -> float:
        raise Conflict("it sums over parts")

    def newborn_constants(self, values: dict[str, float]) -> None:
        """Nothing is new."""


def _parts_along(expr: Expr) -> list[frozenset[int]]:
    return [info.parts for info in infos(expr)]  # type: ignore[attr-defined]


__all__ = ["TaggedCall", "parts_of", "possible", "rows_of", "tagged"]
