"""Sizes of the values of a graph: numbers, or sympy expressions where a trace left them dynamic."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fxgrow.algebra import Size
from fxgrow.ir.nodes import info_of


def sizes_of(node: fx.Node) -> list[Size] | None:
    """Sizes of a node's tensor: ints, or sympy expressions where dynamic; None where the result is no tensor.

    What is known of the node goes before its example value: a growth changes sizes, and guards settle some.
    """
    known = info_of(node).sizes
    if known is not None:
        return list(known)
    value = node.meta.get("val")
    return shape_of(value) if isinstance(value, torch.Tensor) else None


#: sizes of the fake tensors of traces, by id: asked for again and again, and dynamic ones take time to read
_SIZES: dict[int, tuple[weakref.ref[torch.Tensor], tuple[Size, ...]]] = {}


def shape_of(value: torch.Tensor) -> list[Size]:
    """Sizes of a tensor as :func:`sizes_of` gives them."""
    key = id(value)
    found = _SIZES.get(key)
    if found is None or found[0]() is not value:
        alive = weakref.ref(value, lambda _: _SIZES.pop(key, None))
        found = _SIZES[key] = alive, tuple(map(_size, value.shape))
    return list(found[1])


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


#: what Python does with sizes, where the result is a polynomial
_ARITHMETIC: dict[Any, Callable[..., Any]] = {f: f for f in (operator.add, operator.sub, operator.mul, operator.neg)}


def computed_size(node: fx.Node) -> Size | None:
    """The size that a node computes, as its operands' sizes are now: a growth leaves example values as they were.

    None where the node computes no size, or one that cannot be told.
    """
    value = node.meta.get("val")
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        return None
    if node.target is torch.ops.aten.sym_size.int and isinstance(node.args[0], fx.Node):
        sizes, dim = sizes_of(node.args[0]), node.args[1]
        return sizes[dim] if sizes is not None and isinstance(dim, int) and -len(sizes) <= dim < len(sizes) else None
    if any(isinstance(n.meta.get("val"), torch.Tensor) for n in node.all_input_nodes):
        return None
    before = [literal_size(a) for a in node.args]
    now = [computed_size(a) if isinstance(a, fx.Node) else literal_size(a) for a in node.args]
    if node.target in _ARITHMETIC and None not in now:
        return _ARITHMETIC[node.target](*now)
    return literal_size(node) if now == before else None


def result_sizes(node: fx.Node) -> list[list[Size] | None] | None:
    """Sizes of each result of an op with several, None where it has one."""
    known = info_of(node).result_sizes
    if known is not None:
        return [None if sizes is None else list(sizes) for sizes in known]
    value = node.meta.get("val")
    if isinstance(value, list | tuple):
        return [shape_of(v) if isinstance(v, torch.Tensor) else None for v in value]
    return None
