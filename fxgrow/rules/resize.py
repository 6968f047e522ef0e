"""What a rule sees when literal arguments follow a grown size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import fx

from fxgrow.algebra import (
    Expr,
    Size,
    is_static,
    same_size,
    size_of,
)
from fxgrow.ir.nodes import info_of
from fxgrow.ir.ops import bound_arguments, op_name
from fxgrow.plan import Edit
from fxgrow.rules.annotation import Dims


class Resize:
    """What :meth:`Rule.resize` sees: the node, and the dims of operands and results with their sizes before and after.

    Changes are recorded as an :class:`~fxgrow.plan.Edit`; the graph itself is left alone.
    """

    def __init__(
        self,
        node: fx.Node,
        dims: Callable[[Any], Any],
        new_size: Callable[[Expr], Size],
        refuse: Callable[[str], Exception],
    ) -> None:
        self.node, self.dims, self.new_size, self.refuse = node, dims, new_size, refuse
        self.args = bound_arguments(node)
        self.edit: Edit | None = None

    def changed(self, dim: Expr) -> bool:
        return not same_size(self.new_size(dim), size_of(dim))

    def set(self, name: str, value: Any) -> None:
        """Give an argument a new value: numbers, and ops of the graph; a dynamic size becomes the op that gives it.

        Raises:
            GrowthRefused: no op gives the size.
        """
        if self.edit is None:
            self.edit = Edit(node=self.node.name, why="size")
        self.edit.arguments[name] = _node_references(self._emitted(value))

    def _emitted(self, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [self._emitted(v) for v in value]
        if isinstance(value, fx.Node) or not isinstance(value, torch.SymInt | sympy.Basic):
            return value
        size = value.node.expr if isinstance(value, torch.SymInt) else value
        if size.is_Integer:
            return int(size)
        for node in reversed(self._before()):
            known = node.meta.get("val")
            if isinstance(known, torch.SymInt):
                times = sympy.cancel(size / known.node.expr)
                if times.is_Integer:
                    return node if times == 1 else {"$node": node.name, "$times": int(times)}
        raise self.refuse(f"a literal of it becomes {size}, a dynamic size that no op gives")

    def _before(self) -> list[fx.Node]:
        """The nodes of the same call that run before this one."""
        call, out = info_of(self.node).call, []
        for node in self.node.graph.nodes:
            if node is self.node:
                break
            if info_of(node).call == call:
                out.append(node)
        return out

    def retarget(self, target: str, arguments: dict[str, Any]) -> None:
        """Replace the op by another one, with all its arguments."""
        for name, value in arguments.items():
            self.set(name, value)
        assert self.edit is not None
        self.edit.target = target

    def _known_size(self, size: Size) -> Any:
        """The size as a number, or as the op before this one that reads it off a tensor."""
        if is_static(size):
            return int(size)
        for node in self._before():
            if op_name(node.target) == "aten.sym_size.int" and same_size(node.meta.get("val"), size):
                return node
        return None

    def set_shape(self, name: str, dims: Dims, infer: bool = True) -> None:
        """Re-emit a list of sizes: ints of grown dims change, -1 and dynamic entries stay.

        ``infer``: a -1 among the sizes stands for what is left over.
        """
        old = list(self.args[name])
        if len(old) != len(dims):
            if any(self.changed(d) for d in dims):
                raise self.refuse(f"cannot re-emit {name}={old}")
            return
        new = list(old)
        for i, dim in enumerate(dims):
            if self.changed(dim) and old[i] != -1:
                if isinstance(old[i], int):
                    new[i] = self.new_size(dim)
                    continue
                if not infer:
                    new[i] = self.new_size(dim)
                    continue
                if -1 in new:  # only one entry can be left open: spell the other out
                    j = new.index(-1)
                    known = self._known_size(size_of(dims[j]))
                    if known is None or self.changed(dims[j]):
                        raise self.refuse("a grown dim is computed from a dynamic size")
                    new[j] = known
                new[i] = -1
        if new != old:
            self.set(name, new)


def _node_references(value: Any) -> Any:
    """Graph nodes inside an argument as {"$node": name}, for JSON; :func:`fxgrow.plan.resolve_references` reads it."""
    if isinstance(value, fx.Node):
        return {"$node": value.name}
    if isinstance(value, list | tuple):
        return [_node_references(v) for v in value]
    return value
