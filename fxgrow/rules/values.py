"""What values the entries of a result can take, from those of the operands: bounds, as numbers or expressions of sizes.

The functions are what the column ``range`` of a row holds. A bound that is not known is None; claiming none is always
right.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import sympy
import torch
from torch import fx

from fxgrow.ir.ops import bound_arguments, op_name
from fxgrow.ir.sizes import sizes_of

Bound = Any  # int, float or sympy.Expr; None: unknown


@dataclass(frozen=True)
class Range:
    """Smallest and largest value; None where that is not known."""

    low: Bound = None
    high: Bound = None

    @property
    def not_negative(self) -> bool:
        return self.low is not None and bool(sympy.sympify(self.low).is_nonnegative)

    def holds(self, other: Range) -> bool:
        """Whether every number of another range is in this one, as far as numbers say."""
        return all(
            mine is None or (theirs is not None and bool(sign * theirs <= sign * mine))
            for mine, theirs, sign in ((self.low, other.low, -1), (self.high, other.high, 1))
        )


ANYTHING, FLAG = Range(), Range(0, 1)


class KnownRanges(Protocol):
    """Whoever knows the ranges of a call's operands."""

    def of(self, value: Any) -> Range:
        """Bounds of a node's entries, of a size, or of a number."""

    def size(self, value: Any) -> Bound:
        """A literal size, or the expression of a dynamic one; None where it is not known."""


class UnknownRanges:
    """Nothing is known of tensors and sizes."""

    def of(self, value: Any) -> Range:
        return Range(value, value) if isinstance(value, int | float) and math.isfinite(value) else ANYTHING

    def size(self, value: Any) -> Bound:
        return value if isinstance(value, int) else None


RangeOf = Callable[[KnownRanges, dict[str, Any]], Range]


def plain(value: Any) -> Bound:
    """A bound as a number where it is one."""
    value = sympy.sympify(value)
    if value.is_Integer:
        return int(value)
    return float(value) if value.is_number else value


def held(found: Range, dtype: torch.dtype) -> Range:
    """What is left of a range in a tensor of this dtype: numbers are rounded; whole ones that do not fit wrap around.

    Sizes are taken for numbers that 32 bits hold.
    """
    if dtype is torch.bool:
        return FLAG
    if dtype.is_complex:
        return ANYTHING
    if dtype.is_floating_point:
        exact = torch.finfo(dtype).bits >= 32

        def rounded(bound: Bound) -> Bound:
            if not isinstance(bound, int | float):
                return bound if exact else None
            return plain(torch.tensor(bound, dtype=torch.float64).to(dtype).item())

        return Range(rounded(found.low), rounded(found.high))
    low = math.floor(found.low) if isinstance(found.low, float) else found.low
    high = math.ceil(found.high) if isinstance(found.high, float) else found.high
    least, most, wide = torch.iinfo(dtype).min, torch.iinfo(dtype).max, dtype in (torch.int32, torch.int64)
    fits = all(least <= b <= most if isinstance(b, int) else wide for b in (low, high))
    return Range(low, high) if fits else ANYTHING


def _each(f: Callable[[Any, Any], Any], a: Bound, b: Bound) -> Bound:
    return None if a is None or b is None else plain(f(a, b))


def _least(a: Bound, b: Bound) -> Bound:
    return _each(sympy.Min, a, b)


def _most(a: Bound, b: Bound) -> Bound:
    return _each(sympy.Max, a, b)


def _sum(a: Bound, b: Bound) -> Bound:
    return _each(lambda x, y: x + y, a, b)


def _product(a: Bound, b: Bound) -> Bound:
    return _each(lambda x, y: x * y, a, b)


# what the column holds ----------------------------------------------------------------------------------------------


def of_operand(ranges: KnownRanges, args: dict[str, Any]) -> Range:
    """that of the first operand, or of all in a list together"""
    for value in args.values():
        nodes = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(node, fx.Node) for node in nodes):
            first, *rest = (ranges.of(node) for node in nodes)
            for other in rest:
                first = Range(_least(first.low, other.low), _most(first.high, other.high))
            return first
    return ANYTHING


def total(ranges: KnownRanges, args: dict[str, Any]) -> Range:
    """self + other"""
    a, b = ranges.of(args["self"]), ranges.of(args["other"])
    if args.get("alpha") not in (None, 1):
        return ANYTHING
    return Range(_sum(a.low, b.low), _sum(a.high, b.high))


def difference(ranges: KnownRanges, args: dict[str, Any]) -> Range:
    """self - other"""
    a, b = ranges.of(args["self"]), ranges.of(args["other"])
    if args.get("alpha") not in (None, 1):
        return ANYTHING
    return Range(_sum(a.low, _product(b.high, -1)), _sum(a.high, _product(b.low, -1)))


def times(ranges: KnownRanges, args: dict[str, Any]) -> Range:
    """self * other, of what is not negative"""
    a, b = ranges.of(args["self"]), ranges.of(args["other"])
    if not (a.not_negative and b.not_negative):
        return ANYTHING
    return Range(_product(a.low, b.low), _product(a.high, b.high))


def running_sum(ranges: KnownRanges, args: dict[str, Any]) -> Range:
    """up to as many times the largest entry as there are entries, of what is not negative"""
    x, sizes = ranges.of(args["self"]), sizes_of(args["self"]) or [1]
    return Range(x.low, _product(x.high, sizes[int(args["dim"]) % len(sizes)])) if x.not_negative else ANYTHING


def counted(ranges: KnownRanges, args: dict[str, Any]) -> Range:
    """from start to end, by one"""
    if args.get("step", 1) not in (1, None):
        return ANYTHING
    start, end = ranges.size(args.get("start", 0)), ranges.size(args["end"])
    whole = not isinstance(start, float) and not isinstance(end, float)
    return Range(start, _sum(end, -1) if whole else end)


def clamped(ranges: KnownRanges, args: dict[str, Any]) -> Range:
    """that of self, from min to max"""
    found = ranges.of(args["self"])
    if args.get("min") is not None:
        least = ranges.of(args["min"])
        found = Range(least.low if found.low is None else _most(found.low, least.low), _most(found.high, least.high))
    if args.get("max") is not None:
        most = ranges.of(args["max"])
        found = Range(_least(found.low, most.low), most.high if found.high is None else _least(found.high, most.high))
    return found


def smaller(ranges: KnownRanges, args: dict[str, Any]) -> Range:
    """up to the lesser of the largest"""
    a, b = ranges.of(args["self"]), ranges.of(args["other"])
    high = _least(a.high, b.high) if None not in (a.high, b.high) else a.high if b.high is None else b.high
    return Range(_least(a.low, b.low), high)


def larger(ranges: KnownRanges, args: dict[str, Any]) -> Range:
    """from the greater of the smallest on"""
    a, b = ranges.of(args["self"]), ranges.of(args["other"])
    low = _most(a.low, b.low) if None not in (a.low, b.low) else a.low if b.low is None else b.low
    return Range(low, _most(a.high, b.high))


def chosen(ranges: KnownRanges, args: dict[str, Any]) -> Range:
    """that of both together; of where(x < c, x, ...) x is below c"""
    a, b = ranges.of(args["self"]), ranges.of(args["other"])
    test = args["condition"]
    if isinstance(test, fx.Node) and op_name(test.target) in ("aten.lt.Scalar", "aten.le.Scalar"):
        less = bound_arguments(test)
        if less["self"] is args["self"] and isinstance(less["other"], int):
            limit = less["other"] - (op_name(test.target) == "aten.lt.Scalar" and _whole(less["self"]))
            a = Range(a.low, limit if a.high is None else _least(a.high, limit))
    return Range(_least(a.low, b.low), _most(a.high, b.high))


def from_zero(ranges: KnownRanges, args: dict[str, Any]) -> Range:
    """from 0 on"""
    return Range(0, None)


def ramp(ranges: KnownRanges, args: dict[str, Any]) -> Range:
    """from 0 on, where beta is positive"""
    beta = args["beta"]
    return Range(0, None) if isinstance(beta, int | float) and beta > 0 else ANYTHING


def fraction(ranges: KnownRanges, args: dict[str, Any]) -> Range:
    """from 0 to 1"""
    return Range(0, 1)


def absolute(ranges: KnownRanges, args: dict[str, Any]) -> Range:
    """that of self where it is not negative, else from 0 on"""
    x = ranges.of(args["self"])
    return x if x.not_negative else Range(0, None)


def remainder(ranges: KnownRanges, args: dict[str, Any]) -> Range:
    """from 0 to a divisor that is known, which integers do not reach"""
    n = args["other"]
    return Range(0, n - _whole(args["self"])) if isinstance(n, int) and n > 0 else ANYTHING


def _whole(value: Any) -> bool:
    """Whether a value is a tensor of integers."""
    known = value.meta.get("val") if isinstance(value, fx.Node) else None
    return isinstance(known, torch.Tensor) and not known.is_floating_point() and not known.is_complex()
