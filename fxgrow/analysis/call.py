"""One call of an op as analysis and proof see it alike: its arguments, its operands' dims and its results' sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from fxgrow.algebra import Conflict, Expr, Size, Unifier, resolve
from fxgrow.ir.nodes import info_of
from fxgrow.ir.ops import bound_arguments, nodes_among
from fxgrow.ir.sizes import result_sizes, sizes_of
from fxgrow.rules.annotation import Dims
from fxgrow.rules.base import Rule, casts, copies, moves


class CallContext:
    """What :class:`fxgrow.rules.context.Context` asks and both interpreters answer alike.

    Args:
        unifier: makes and cuts the axes that a rule asks for.

    Attributes:
        node: the call at hand.
        args: its arguments by the names of the op's schema, defaults filled in.
        seen: the operands whose dims the rule asked for.
    """

    def __init__(self, unifier: Unifier) -> None:
        self.unifier = unifier
        self.node: fx.Node
        self.args: dict[str, Any] = {}
        self.seen: set[fx.Node] = set()

    def at(self, node: fx.Node) -> None:
        """Go to another call."""
        self.node, self.args, self.seen = node, bound_arguments(node), set()

    def dims_of(self, node: fx.Node) -> Any:
        """Dims of a value, or of each of several results; None where it is no tensor."""
        raise NotImplementedError

    # what is called

    @property
    def op(self) -> str:
        return str(self.node.target)

    @property
    def source(self) -> str:
        """The user's line, where it is known."""
        return str(info_of(self.node).source)

    @property
    def shape(self) -> list[Size]:
        several = result_sizes(self.node)
        return (several[0] if several else sizes_of(self.node)) or []

    @property
    def result_count(self) -> int | None:
        several = result_sizes(self.node)
        return len(several) if several is not None else None

    # its operands

    @property
    def first(self) -> str:
        return next(n for n, a in self.args.items() if isinstance(a, fx.Node) and self.dims_of(a) is not None)

    def results(self, node: fx.Node) -> Any:
        self.seen.add(node)
        return self.dims_of(node)

    def dims(self, name: str | fx.Node) -> Dims | None:
        value = self.args.get(name) if isinstance(name, str) else name
        found = self.results(value) if isinstance(value, fx.Node) else None
        return list(found) if found is not None else None

    def operand(self, name: str | fx.Node) -> Dims:
        found = self.dims(name)
        if found is None:
            raise Conflict(f"operand {name} is missing")
        return found

    def tensor_operands(self) -> list[tuple[str, Dims]]:
        out: list[tuple[str, Dims]] = []
        for name, operand in nodes_among(self.args):
            dims = self.dims_of(operand)
            if dims is not None and not any(isinstance(d, list) for d in dims):
                self.seen.add(operand)
                out.append((name, list(dims)))
        return out

    def unseen_operands(self, rule: Rule) -> list[tuple[str, fx.Node]]:
        """Operands that the rule never asked for: nothing says what growth of them would do."""
        return [(n, x) for n, x in nodes_among(self.args) if x not in self.seen and n not in rule.ignored]

    def from_parameter(self, value: Any) -> bool:
        return from_parameter(value)

    # dims

    def regroup(self, dims: Sequence[Expr], sizes: Sequence[Size]) -> list[Expr]:
        return self.unifier.regroup(dims, sizes)

    def split(self, dim: Expr, sizes: Sequence[Size]) -> list[Expr]:
        out: list[Expr] = []
        for size in sizes[:-1]:
            head, dim = self.unifier.split_concat(dim, size)
            out.append(resolve(head))
        return [*out, resolve(dim)]

    def units(self, dim: Expr) -> list[Expr] | None:
        return self.unifier.units(dim)

    def sized(self, size: Size) -> Expr:
        return self.unifier.fresh(size)


def from_parameter(value: Any) -> bool:
    """Whether a value is a parameter, seen through views and casts only."""
    while isinstance(value, fx.Node):
        if value.op == "get_attr":
            return True
        if not moves(value) or not value.all_input_nodes:
            return False
        value = value.all_input_nodes[0]
    return False


def constant_value(value: Any, constants: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """The value of a constant tensor, seen through copies; None where it is none, or on the meta device."""
    dtypes = []
    while copies(value) or casts(value):
        dtypes.append(value.meta["val"].dtype)
        value = value.args[0]
    if not isinstance(value, fx.Node) or value.op != "get_attr":
        return None
    found = constants.get(str(value.target))
    if found is None or found.is_meta:
        return None
    for dtype in reversed(dtypes):
        found = found.to(dtype)
    return found


__all__ = ["CallContext", "constant_value", "from_parameter"]
