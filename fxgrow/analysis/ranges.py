"""What values the entries of an integer tensor can take: bounds, as numbers or as expressions of the input's sizes.

Used where a table is looked up: how many rows a call needs, and whether an index may count from the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from fxgrow.ir.ops import bound_arguments, op_name
from fxgrow.ir.sizes import sizes_of
from fxgrow.ir.traced import Traced
from fxgrow.weights.continuation import recognise

Bound = Any  # int, float or sympy.Expr; None: unknown


@dataclass(frozen=True)
class Range:
    """Smallest and largest value; None where that is not known."""

    low: Bound = None
    high: Bound = None

    @property
    def not_negative(self) -> bool:
        return self.low is not None and bool(sympy.sympify(self.low).is_nonnegative)


ANYTHING, FLAG = Range(), Range(0, 1)


def _each(f: Callable[[Any, Any], Any], a: Bound, b: Bound) -> Bound:
    return None if a is None or b is None else f(a, b)


def _least(a: Bound, b: Bound) -> Bound:
    return _each(lambda x, y: _plain(sympy.Min(x, y)), a, b)


def _most(a: Bound, b: Bound) -> Bound:
    return _each(lambda x, y: _plain(sympy.Max(x, y)), a, b)


def _plain(value: Any) -> Bound:
    value = sympy.sympify(value)
    if value.is_Integer:
        return int(value)
    return float(value) if value.is_number else value


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
            return Range(_plain(known.node.expr), _plain(known.node.expr))
        if isinstance(known, int | float) and not isinstance(known, bool):
            return self.of(known)
        if not isinstance(known, torch.Tensor):
            return ANYTHING
        if known.dtype == torch.bool:
            return FLAG
        if node.op == "get_attr":
            return self._stored(str(node.target))
        if node.op != "call_function":
            return ANYTHING
        name = op_name(node.target)
        args = bound_arguments(node)
        if name == "aten.slice.Tensor":
            return self._numbers_up_to(args) or self.of(args["self"])
        found = _OPS.get(name.split(".")[1] if name.startswith("aten.") else name)
        return found(self, args) if found is not None else ANYTHING

    def _stored(self, name: str) -> Range:
        if name in self.program.parameters:
            return ANYTHING
        tensor = self.program.tensor(name)
        if tensor.is_meta or tensor.numel() == 0 or tensor.is_complex() or not bool(torch.isfinite(tensor).all()):
            return ANYTHING
        return Range(_plain(tensor.min().item()), _plain(tensor.max().item()))

    def _numbers_up_to(self, args: dict[str, Any]) -> Range | None:
        """The first numbers of a buffer that counts: the slice's length bounds them."""
        source = args["self"]
        while isinstance(source, fx.Node) and op_name(source.target) in _SAME:
            source = source.args[0]
        sizes = sizes_of(args["self"]) or []
        if not isinstance(source, fx.Node) or source.op != "get_attr" or str(source.target) in self.program.parameters:
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
        return Range(low, _plain(most + step * (end - 1)))


_SAME = ("aten.slice.Tensor", "aten.expand.default", "aten.to.dtype", "aten.contiguous.default", "aten.clone.default")


def _operand(ranges: Ranges, args: dict[str, Any]) -> Range:
    return ranges.of(next(a for a in args.values() if isinstance(a, fx.Node)))


def _add(ranges: Ranges, args: dict[str, Any], sign: int = 1) -> Range:
    a, b = ranges.of(args["self"]), ranges.of(args["other"])
    if args.get("alpha") not in (None, 1):
        return ANYTHING
    if sign < 0:
        b = Range(_each(lambda x, _: _plain(-x), b.high, 0), _each(lambda x, _: _plain(-x), b.low, 0))
    return Range(_each(lambda x, y: _plain(x + y), a.low, b.low), _each(lambda x, y: _plain(x + y), a.high, b.high))


def _mul(ranges: Ranges, args: dict[str, Any]) -> Range:
    a, b = ranges.of(args["self"]), ranges.of(args["other"])
    if not (a.not_negative and b.not_negative):
        return ANYTHING
    return Range(_plain(a.low * b.low), _each(lambda x, y: _plain(x * y), a.high, b.high))


def _cumsum(ranges: Ranges, args: dict[str, Any]) -> Range:
    x = ranges.of(args["self"])
    sizes = sizes_of(args["self"]) or [1]
    if not x.not_negative:
        return ANYTHING
    return Range(x.low, _each(lambda a, b: _plain(a * b), x.high, sizes[int(args["dim"]) % len(sizes)]))


def _arange(ranges: Ranges, args: dict[str, Any]) -> Range:
    if args.get("step", 1) not in (1, None):
        return ANYTHING
    start = ranges.size(args.get("start", 0))
    end = ranges.size(args["end"])
    return Range(start, _each(lambda e, _: _plain(e - 1), end, 0))


def _clamp(ranges: Ranges, args: dict[str, Any]) -> Range:
    x = ranges.of(args["self"])
    low = args.get("min")
    high = args.get("max")
    out = x
    if low is not None:
        a = ranges.of(low)
        out = Range(a.low if out.low is None else _most(out.low, a.low), _most(out.high, a.high))
    if high is not None:
        b = ranges.of(high)
        out = Range(_least(out.low, b.low), b.high if out.high is None else _least(out.high, b.high))
    return out


def _minimum(ranges: Ranges, args: dict[str, Any]) -> Range:
    a, b = ranges.of(args["self"]), ranges.of(args["other"])
    high = _least(a.high, b.high) if None not in (a.high, b.high) else a.high if b.high is None else b.high
    return Range(_least(a.low, b.low), high)


def _maximum(ranges: Ranges, args: dict[str, Any]) -> Range:
    a, b = ranges.of(args["self"]), ranges.of(args["other"])
    low = _most(a.low, b.low) if None not in (a.low, b.low) else a.low if b.low is None else b.low
    return Range(low, _most(a.high, b.high))


def _where(ranges: Ranges, args: dict[str, Any]) -> Range:
    a, b = ranges.of(args["self"]), ranges.of(args["other"])
    test = args["condition"]
    if isinstance(test, fx.Node) and op_name(test.target) in ("aten.lt.Scalar", "aten.le.Scalar"):
        less = bound_arguments(test)  # where(x < c, x, ...)
        if less["self"] is args["self"] and isinstance(less["other"], int):
            limit = less["other"] - (op_name(test.target) == "aten.lt.Scalar")
            a = Range(a.low, limit if a.high is None else _least(a.high, limit))
    return Range(_least(a.low, b.low), _most(a.high, b.high))


def _absolute(ranges: Ranges, args: dict[str, Any]) -> Range:
    x = ranges.of(args["self"])
    return x if x.not_negative else Range(0, None)


def _filled(value: Any) -> Callable[[Ranges, dict[str, Any]], Range]:
    return lambda ranges, args: ranges.of(args["fill_value"] if value is None else value)


def _remainder(ranges: Ranges, args: dict[str, Any]) -> Range:
    n = args["other"]
    return Range(0, n - 1) if isinstance(n, int) and n > 0 else ANYTHING


_MOVES = [
    *("reshape", "view", "view_as", "flatten", "unsqueeze", "squeeze", "expand", "expand_as", "repeat", "alias"),
    *("transpose", "permute", "t", "flip", "roll", "to", "_to_copy", "type_as", "contiguous", "clone", "detach"),
    *("select", "index", "index_select", "gather", "repeat_interleave", "lift_fresh_copy"),
]
_OPS: dict[str, Callable[[Ranges, dict[str, Any]], Range]] = {
    **dict.fromkeys(_MOVES, _operand),
    **dict.fromkeys(("add", "add_"), _add),
    **dict.fromkeys(("sub", "sub_"), lambda r, a: _add(r, a, -1)),
    **dict.fromkeys(("mul", "mul_"), _mul),
    "cumsum": _cumsum,
    "arange": _arange,
    **dict.fromkeys(("clamp", "clamp_min", "clamp_max"), _clamp),
    **dict.fromkeys(("minimum", "min"), lambda r, a: _minimum(r, a) if "other" in a else _operand(r, a)),
    **dict.fromkeys(("maximum", "max"), lambda r, a: _maximum(r, a) if "other" in a else _operand(r, a)),
    "where": _where,
    **dict.fromkeys(("abs", "relu"), _absolute),
    **dict.fromkeys(("ones", "ones_like", "new_ones"), _filled(1)),
    **dict.fromkeys(("zeros", "zeros_like", "new_zeros"), _filled(0)),
    **dict.fromkeys(("full", "full_like", "new_full"), _filled(None)),
    "remainder": _remainder,
}
