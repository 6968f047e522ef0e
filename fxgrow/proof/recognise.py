"""What a value of the graph is known to be: zeros, a mean, a square."""

from __future__ import annotations

from typing import Any

from torch import fx

from fxgrow.analysis.axes import Axes
from fxgrow.ir.nodes import info_of
from fxgrow.ir.ops import bound_arguments, op_name
from fxgrow.rules.base import is_linear, moves, value_of
from fxgrow.rules.forms import along_of


def is_zero(axes: Axes, value: Any, before: fx.Node) -> bool:
    """Whether a value is known to be zero in every entry when ``before`` reads it, whatever the sizes."""
    if not isinstance(value, fx.Node):
        return isinstance(value, int | float) and value == 0
    memory = axes.memory
    lasting = any(n.op in ("get_attr", "placeholder") for n in memory.sharing(value))
    return not memory.written(value, None if lasting else before) and _made_of_zeros(axes, value, before)


def _made_of_zeros(axes: Axes, node: fx.Node, before: fx.Node) -> bool:
    while node.op == "call_function" and len(node.all_input_nodes) == 1:
        if not moves(node) or not is_linear(node):
            break
        node = node.all_input_nodes[0]
    if node.op == "get_attr":
        constant = axes.program.constants.get(str(node.target))
        return constant is not None and not constant.is_meta and not bool(constant.count_nonzero())
    return is_zero(axes, value_of(node), before)


def mean_of(axes: Axes, value: Any) -> tuple[fx.Node, list[int]] | None:
    """(x, dims) where ``value`` is ``x.mean(dims, keepdim=True)``."""
    while isinstance(value, fx.Node) and op_name(value.target) == "aten.mul.Tensor" and info_of(value).rescale:
        value = value.args[0]
    row = along_of(value)
    if row is None or row.kind != "mean" or row.result != "reduced":
        return None
    args = bound_arguments(value)
    source = args["self"]
    dims = axes.dims.get(source)
    if not args.get("keepdim") or dims is None or axes.memory.written(source):
        return None
    return source, row.dims_over(args, len(dims))


def is_square(value: Any) -> bool:
    """Whether a value is a square, seen through ops that move entries."""
    while isinstance(value, fx.Node) and moves(value):
        value = value.all_input_nodes[0]
    if not isinstance(value, fx.Node):
        return False
    name = op_name(value.target)
    if name == "aten.pow.Tensor_Scalar":
        return bool(value.args[1] == 2)
    return name == "aten.square.default" or (name == "aten.mul.Tensor" and value.args[0] is value.args[1])


__all__ = ["is_square", "is_zero", "mean_of"]
