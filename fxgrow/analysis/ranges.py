"""What values the entries of an integer tensor can take: bounds, as numbers or as expressions of the input's sizes.

Used where a table is looked up: how many rows a call needs, and whether an index may count from the end.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import fx

from fxgrow.ir.memory import Memory
from fxgrow.ir.ops import bound_arguments, op_name
from fxgrow.ir.sizes import sizes_of
from fxgrow.ir.traced import Traced
from fxgrow.rules.base import casts, copies, range_of
from fxgrow.rules.values import ANYTHING, FLAG, Bound, Range, plain
from fxgrow.weights.continuation import recognise


class Ranges:
    """Bounds of the values of a program, found on demand."""

    def __init__(self, program: Traced) -> None:
        self.program = program
        self._known: dict[fx.Node, Range] = {}

    def of(self, value: Any) -> Range:
        """Bounds of a node's entries, of a size, or of a number."""
        if isinstance(value, bool | int | float):
            return Range(value, value) if math.isfinite(value) else ANYTHING
        if not isinstance(value, fx.Node):
            return ANYTHING
        if value not in self._known:
            self._known[value] = ANYTHING  # of a loop, which a graph has not
            self._known[value] = self._find(value)
        return self._known[value]

    def size(self, value: Any) -> Bound:
        """A literal size, or the expression of a dynamic one."""
        found = self.of(value)
        return found.low if found.low == found.high else None

    def _find(self, node: fx.Node) -> Range:
        known = node.meta.get("val")
        if isinstance(known, torch.SymInt):
            return Range(plain(known.node.expr), plain(known.node.expr))
        if isinstance(known, int | float) and not isinstance(known, bool):
            return self.of(known)
        if not isinstance(known, torch.Tensor):
            return ANYTHING
        if known.dtype == torch.bool:
            return FLAG
        if self._changes(node):
            return ANYTHING
        if node.op == "get_attr":
            return self._stored(str(node.target))
        if node.op != "call_function":
            return ANYTHING
        counted = self._numbers_up_to(bound_arguments(node)) if op_name(node.target) == "aten.slice.Tensor" else None
        return counted or range_of(node, self)

    def _changes(self, node: fx.Node) -> bool:
        """Whether anything that reads a value may see what was written into its memory after it was made."""
        memory = self.memory
        if node.op == "get_attr" and memory.written(node):
            return True  # by the call before
        last = max((memory.place[n] for n in node.users), default=0)
        return any(memory.place[node] < memory.place[writer] < last for writer in memory.writers(node))

    @functools.cached_property
    def memory(self) -> Memory:
        """Which values share memory."""
        return Memory(self.program.graph)

    def _stored(self, name: str) -> Range:
        if name in self.program.parameters:
            return ANYTHING
        tensor = self.program.tensor(name)
        if tensor.is_meta or tensor.numel() == 0 or tensor.is_complex() or not bool(torch.isfinite(tensor).all()):
            return ANYTHING
        return Range(plain(tensor.min().item()), plain(tensor.max().item()))

    def _numbers_up_to(self, args: dict[str, Any]) -> Range | None:
        """The first numbers of a buffer that counts: the slice's length bounds them."""
        source = args["self"]
        while copies(source) or casts(source) or (isinstance(source, fx.Node) and op_name(source.target) in _PARTS):
            source = source.args[0]
        sizes = sizes_of(args["self"]) or []
        if not isinstance(source, fx.Node) or source.op != "get_attr" or str(source.target) in self.program.parameters:
            return None
        if self._changes(source):
            return None
        buffer = self.program.tensor(str(source.target))
        dim = int(args["dim"]) % len(sizes)
        end = self.size(args["end"])
        if list(buffer.shape) != list(sizes) or buffer.is_meta or buffer.is_floating_point() or end is None:
            return None
        pattern = recognise(buffer, [dim]) if buffer.shape[dim] > 1 else None
        start = self.of(args["start"] if args["start"] is not None else 0)
        if pattern is None or pattern.kind != "line" or not start.not_negative or isinstance(end, int):
            return None
        first, second = buffer.select(dim, 0), buffer.select(dim, 1)
        if not bool((second >= first).all()):
            return None
        low, step, most = int(first.min()), int((second - first).max()), int(first.max())
        return Range(low, plain(most + step * (end - 1)))


#: ops whose result is the operand where it has the operand's sizes
_PARTS = ("aten.slice.Tensor", "aten.expand.default")
