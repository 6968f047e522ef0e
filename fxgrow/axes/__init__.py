"""The algebra of axes: what every dim of every tensor is made of, and what ties it to the others."""

from fxgrow.axes.expr import Axis, Concat, Conflict, Expr, Frozen, Product, Unifier

__all__ = ["Axis", "Concat", "Conflict", "Expr", "Frozen", "Product", "Unifier"]
