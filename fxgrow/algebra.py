"""Dims as expressions over axes, and their unification.

A dim is not a number. ``Expr = Axis | Product(Expr, ...) | Concat(Expr, ...)``: a fused QKV dim is
``Concat(heads*width, heads*width, heads*width)``, a flattened feature map is ``Product(channels, H, W)``. Axes are
logic variables: ``view``, ``split`` and ``cat`` *refine* an axis by binding it to a Product or a Concat of smaller
axes, every other op *unifies* the dims of its operands.

Canonical form (what :func:`resolve` returns): an expression is a :class:`Product` of unbound axes whose last factor may
be a :class:`Concat`; products over a Concat on the left are distributed into it. Two unified dims therefore list the
same axes in the same order. Sizes are Python ints, or sympy expressions where a dim is dynamic.

A *dim* belongs to one tensor and has a number; an *axis* runs through the dims of many tensors. An :class:`Axis` has no
name: :class:`fxgrow.analysis.axes.NamedAxis`, which ``program.axes`` iterates, is one with a name and a role. How much
an axis grows is no part of it and stands in :mod:`fxgrow.plan`. A :class:`Leaf` is an axis where it occurs in a dim;
the leaves of nested Python values are PyTorch's (:mod:`fxgrow.ir.trees`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy

from fxgrow.errors import placed

Size = Any  # int, or sympy.Expr for a dynamic dim


class Conflict(Exception):
    """Two dims cannot be made the same expression. The message says why, in words of sizes."""


@dataclass(frozen=True)
class Frozen:
    """Why an axis cannot grow: the op that pins it, the user's source line and the reason."""

    reason: str
    op: str = ""
    source: str = ""

    def __str__(self) -> str:
        return placed(self.reason, self.op, self.source)


@dataclass(frozen=True, eq=False)
class Axis:
    """One growable direction of the model, or a logic variable already bound to smaller ones.

    ``roles`` collects what the rules know about its use (``heads``, ``channels`` ...); ``frozen`` why it cannot grow.
    What is not known when it is made, analysis alone finds out: its binding, ``frozen`` and ``roles``. Its size never
    changes; an axis that has grown is another one of the same id.
    """

    id: int
    size: Size
    binding: Expr | None = None
    frozen: Frozen | None = None
    roles: dict[str, int] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"a{self.id}:{self.size}"


@dataclass(frozen=True, eq=False)
class Product:
    """Row-major product of factors, outermost first. No factors: size 1."""

    factors: tuple[Expr, ...]

    def __repr__(self) -> str:
        return "(" + " ".join(map(repr, self.factors)) + ")"


@dataclass(frozen=True, eq=False)
class Concat:
    """Parts laid end to end along one dim."""

    parts: tuple[Expr, ...]

    def __repr__(self) -> str:
        return "(" + " + ".join(map(repr, self.parts)) + ")"


@dataclass(frozen=True, eq=False)
class Leaf:
    """An occurrence of an axis in a dim with something known about it, while the axis grows."""

    axis: Axis
    info: Any

    @property
    def size(self) -> Size:
        return self.axis.size

    def __repr__(self) -> str:
        return f"{self.axis!r}[{self.info}]"


Expr = Axis | Product | Concat | Leaf
UNIT = Product(())


def size_of(expr: Expr) -> Size:
    """The number of elements along the dim."""
    if isinstance(expr, Axis | Leaf):
        return expr.size
    if isinstance(expr, Product):
        total: Size = 1
        for f in expr.factors:
            total = total * size_of(f)
        return total
    total = 0
    for part in expr.parts:
        total = total + size_of(part)
    return total


def same_size(a: Size, b: Size) -> bool:
    """Equality of sizes; of dynamic ones, as polynomials."""
    if isinstance(a, int) or isinstance(b, int):
        return bool(a == b)
    if a == b:
        return True
    return bool(sympy.expand(a - b) == 0)


def quotient(a: Size, b: Size) -> Size | None:
    """a / b where b divides a, else None. Dynamic sizes divide only if the quotient is free of fractions."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b != 0 and a % b == 0 else None
    q = sympy.cancel(sympy.sympify(a) / sympy.sympify(b))
    numerator, denominator = q.as_numer_denom()
    if denominator != 1:
        return None
    return int(numerator) if numerator.is_Integer else numerator


def is_static(size: Size) -> bool:
    return isinstance(size, int)


def is_unit(expr: Expr) -> bool:
    return same_size(size_of(expr), 1)


def product(factors: Iterable[Expr]) -> Expr:
    """Canonical product: nested products flattened, size-1 factors dropped, distributed over a Concat."""
    flat: list[Expr] = []
    for f in factors:
        if isinstance(f, Product):
            flat.extend(f.factors)
        else:
            flat.append(f)
    for i, f in enumerate(flat):
        if isinstance(f, Concat) and i < len(flat) - 1:
            rest = flat[i + 1 :]
            return product([*flat[:i], concat([product([p, *rest]) for p in f.parts])])
    if len(flat) == 1:
        return flat[0]
    return Product(tuple(flat))


def concat(parts: Iterable[Expr]) -> Expr:
    """Canonical concatenation: nested ones flattened, empty parts dropped, one part alone."""
    flat: list[Expr] = []
    for p in parts:
        if isinstance(p, Concat):
            flat.extend(p.parts)
        else:
            flat.append(p)
    if len(flat) == 1:
        return flat[0]
    return Concat(tuple(flat))


def _bind(axis: Axis, expr: Expr) -> None:
    object.__setattr__(axis, "binding", expr)


def resolve(expr: Expr) -> Expr:
    """Follow bindings down to unbound axes and bring the expression into canonical form."""
    if isinstance(expr, Axis):
        if expr.binding is None:
            return expr
        out = resolve(expr.binding)
        _bind(expr, out)  # path compression
        return out
    if isinstance(expr, Leaf):
        return expr
    if isinstance(expr, Product):
        return product([resolve(f) for f in expr.factors])
    return concat([resolve(p) for p in expr.parts])


def leaves(expr: Expr) -> Iterator[Axis | Leaf]:
    """The axes of a resolved expression in memory order, with repetition."""
    if isinstance(expr, Axis | Leaf):
        yield expr
    elif isinstance(expr, Product):
        for f in expr.factors:
            yield from leaves(f)
    else:
        for p in expr.parts:
            yield from leaves(p)


def axes_of(expr: Expr) -> list[Axis]:
    """Distinct axes of an expression, resolved, in memory order."""
    if isinstance(expr, Axis) and expr.binding is None:
        return [expr]
    seen: dict[int, Axis] = {}
    for leaf in leaves(resolve(expr)):
        axis = leaf.axis if isinstance(leaf, Leaf) else leaf
        seen.setdefault(axis.id, axis)
    return list(seen.values())


def map_leaves(expr: Expr, f: Callable[[Axis | Leaf], Expr]) -> Expr:
    """Rebuild a resolved expression with every leaf replaced by ``f(leaf)``, left to right."""
    if isinstance(expr, Axis | Leaf):
        return f(expr)
    if isinstance(expr, Product):
        return Product(tuple(map_leaves(x, f) for x in expr.factors))
    return Concat(tuple(map_leaves(x, f) for x in expr.parts))


def replaced(expr: Expr, old: Axis, new: Axis) -> Expr:
    """A resolved expression with one axis in place of another; the expression itself where it does not hold that."""
    if all(leaf is not old for leaf in leaves(expr)):
        return expr
    return map_leaves(expr, lambda leaf: new if leaf is old else leaf)


def factors_of(expr: Expr) -> list[Expr]:
    """Top-level factors of a resolved expression; size 1 has none."""
    if isinstance(expr, Product):
        return list(expr.factors)
    return [expr]


class Unifier:
    """Owns the axes of one analysis: makes them, binds them, freezes them, and records what it did and why."""

    def __init__(self) -> None:
        self.axes: list[Axis] = []
        self.ties: list[tuple[int, int, str, str]] = []  # (kept id, merged id, op, source)

    def fresh(self, size: Size) -> Expr:
        """A new axis of the given size; a dim of size 1 carries no axis."""
        if same_size(size, 1):
            return UNIT
        axis = Axis(len(self.axes), size)
        self.axes.append(axis)
        return axis

    def freeze(self, expr: Expr, why: Frozen) -> None:
        """Pin every axis of the expression; the first reason is kept."""
        for axis in axes_of(expr):
            if axis.frozen is None:
                object.__setattr__(axis, "frozen", why)

    def role(self, expr: Expr, role: str, weight: int = 1) -> None:
        """Note a use of the expression's axes, for their names."""
        for axis in axes_of(expr):
            axis.roles[role] = axis.roles.get(role, 0) + weight

    def unify(self, a: Expr, b: Expr, op: str = "", source: str = "") -> None:
        """Make two dims one expression.

        Raises:
            Conflict: sizes differ, or factors that do not divide each other meet.
        """
        a, b = resolve(a), resolve(b)
        if a is b:
            return
        if not same_size(size_of(a), size_of(b)):
            raise Conflict(f"size {size_of(a)} meets size {size_of(b)}")
        if isinstance(a, Axis) or isinstance(b, Axis):
            self._bind(a, b, op, source)
            return
        if isinstance(a, Concat) and isinstance(b, Concat):
            self._unify_concat(list(a.parts), list(b.parts), op, source)
            return
        self._unify_factors(factors_of(a), factors_of(b), op, source)

    def _bind(self, a: Expr, b: Expr, op: str, source: str) -> None:
        if not isinstance(a, Axis) or (isinstance(b, Axis) and b.id > a.id):
            a, b = b, a
        assert isinstance(a, Axis)
        if any(leaf is a for leaf in leaves(b)):
            raise Conflict(f"an axis of size {a.size} would contain itself")
        for name, count in a.roles.items():
            self.role(b, name, count)
        if a.frozen is not None:
            self.freeze(b, a.frozen)
        if isinstance(b, Axis):
            self.ties.append((b.id, a.id, op, source))
        _bind(a, b)

    def _unify_factors(self, fa: list[Expr], fb: list[Expr], op: str, source: str) -> None:
        """Common refinement of two products, from the innermost factor outwards."""
        while fa and fb:
            x, y = resolve(fa.pop()), resolve(fb.pop())
            if isinstance(x, Product):
                fa.extend(x.factors)
                fb.append(y)
                continue
            if isinstance(y, Product):
                fb.extend(y.factors)
                fa.append(x)
                continue
            sx, sy = size_of(x), size_of(y)
            if same_size(sx, sy):
                self.unify(x, y, op, source)
            elif quotient(sy, sx) is not None:
                outer, inner = self.split_product(y, sx)
                fb.append(outer)
                self.unify(x, inner, op, source)
            elif quotient(sx, sy) is not None:
                outer, inner = self.split_product(x, sy)
                fa.append(outer)
                self.unify(inner, y, op, source)
            else:
                raise Conflict(f"factors of size {sx} and {sy} do not divide each other")
        rest = product([*fa, *fb])
        if not is_unit(resolve(rest)):
            raise Conflict(f"a factor of size {size_of(rest)} is left over")

    def _unify_concat(self, pa: list[Expr], pb: list[Expr], op: str, source: str) -> None:
        pa, pb = pa[::-1], pb[::-1]
        while pa and pb:
            x, y = pa.pop(), pb.pop()
            sx, sy = size_of(x), size_of(y)
            if same_size(sx, sy):
                self.unify(x, y, op, source)
                continue
            if not (is_static(sx) and is_static(sy)):
                raise Conflict(f"cannot align parts of dynamic sizes {sx} and {sy}")
            if sx < sy:
                head, tail = self.split_concat(y, sx)
                self.unify(x, head, op, source)
                pb.append(tail)
            else:
                head, tail = self.split_concat(x, sy)
                self.unify(head, y, op, source)
                pa.append(tail)
        if pa or pb:
            raise Conflict("one concatenation is longer than the other")

    def split_product(self, expr: Expr, inner: Size) -> tuple[Expr, Expr]:
        """Refine ``expr`` into (outer, inner) with ``size_of(inner)`` as given.

        Raises:
            Conflict: the size does not divide at this place.
        """
        expr = resolve(expr)
        total = size_of(expr)
        outer = quotient(total, inner)
        if outer is None:
            raise Conflict(f"size {total} does not split into (…, {inner})")
        if same_size(inner, 1):
            return expr, UNIT
        if same_size(outer, 1):
            return UNIT, expr
        if isinstance(expr, Leaf):
            raise Conflict(f"an axis of size {total} is not refined into (…, {inner})")
        if isinstance(expr, Axis):
            left, right = self._refine(expr, lambda: [self.fresh(outer), self.fresh(inner)], product)
            return left, right
        if isinstance(expr, Concat):
            outers, inners = zip(*self._split_parts(expr.parts, inner), strict=True)
            joined = resolve(inners[0])
            for other in inners[1:]:
                joined = self._join(joined, resolve(other))
            return concat([resolve(o) for o in outers]), resolve(joined)
        taken: list[Expr] = []
        need = inner
        rest = list(expr.factors)
        while not same_size(need, 1):
            last = resolve(rest.pop())
            if isinstance(last, Product):
                rest.extend(last.factors)
                continue
            remaining = quotient(need, size_of(last))
            if remaining is not None:
                taken.insert(0, last)
                need = remaining
            else:
                out, inn = self.split_product(last, need)
                rest.append(out)
                taken.insert(0, inn)
                need = 1
        return product(rest), product(taken)

    def _split_parts(self, parts: Sequence[Expr], inner: Size) -> Iterator[tuple[Expr, Expr]]:
        """Split the parts of a concatenation; a unit of ``inner`` may itself be a concatenation that was flattened."""
        group: list[Expr] = []
        for part in parts:
            group.append(part)
            if quotient(size_of(concat(group)), inner) is None:
                continue
            if len(group) > 1 and not same_size(size_of(concat(group)), inner):
                raise Conflict(f"size {size_of(concat(group))} does not split into (…, {inner})")
            yield self.split_product(concat(group), inner) if len(group) == 1 else (UNIT, concat(group))
            group = []
        if group:
            raise Conflict(f"size {size_of(concat(group))} does not split into (…, {inner})")

    def _join(self, a: Expr, b: Expr) -> Expr:
        """One inner dim for all parts of a concatenation: unified, or its annotations joined."""
        la, lb = list(leaves(a)), list(leaves(b))
        if not any(isinstance(x, Leaf) for x in la + lb):
            self.unify(a, b)
            return resolve(a)
        if [_axis(x).id for x in la] != [_axis(x).id for x in lb]:
            raise Conflict("the parts of a concatenation differ")
        others = iter(lb)

        def join(x: Axis | Leaf) -> Expr:
            y = next(others)
            if isinstance(x, Leaf) and isinstance(y, Leaf):
                return Leaf(x.axis, x.info.join(y.info))
            return x

        return map_leaves(a, join)

    def _refine(
        self, axis: Axis, make: Callable[[], Sequence[Expr]], join: Callable[[Iterable[Expr]], Expr]
    ) -> tuple[Expr, ...]:
        pieces = tuple(make())
        for piece in pieces:
            if axis.frozen is not None:
                self.freeze(piece, axis.frozen)
            for name, count in axis.roles.items():
                self.role(piece, name, count)
        _bind(axis, join(pieces))
        return pieces

    def split_concat(self, expr: Expr, head: int) -> tuple[Expr, Expr]:
        """Refine ``expr`` into two parts end to end, the first of size ``head``.

        Raises:
            Conflict: the cut does not fall between whole units of the outermost factor.
        """
        expr = resolve(expr)
        total = size_of(expr)
        if not is_static(total):
            raise Conflict(f"cannot cut a dim of dynamic size {total}")
        if not 0 < head < total:
            raise Conflict(f"cannot cut size {total} at {head}")
        if isinstance(expr, Leaf):
            raise Conflict(f"an axis of size {total} is not cut at {head}")
        if isinstance(expr, Axis):
            a, b = self._refine(expr, lambda: [self.fresh(head), self.fresh(total - head)], concat)
            return a, b
        if isinstance(expr, Concat):
            parts: list[Expr] = []
            rest = list(expr.parts)
            while head > 0:
                first = rest.pop(0)
                size = size_of(first)
                if size <= head:
                    parts.append(first)
                    head -= size
                else:
                    a, b = self.split_concat(first, head)
                    parts.append(a)
                    rest.insert(0, b)
                    head = 0
            return concat(parts), concat(rest)
        first, inner = expr.factors[0], product(expr.factors[1:])
        n = size_of(inner)
        if head % n:
            raise Conflict(f"a cut at {head} falls inside a unit of {n}")
        a, b = self.split_concat(first, head // n)
        return product([resolve(a), inner]), product([resolve(b), inner])

    def regroup(self, dims: Sequence[Expr], sizes: Sequence[Size]) -> list[Expr]:
        """The dims of a row-major reshape of ``dims`` to ``sizes``, refining axes where a dim is cut in two.

        Raises:
            Conflict: a dim of the result would start or end inside a unit that cannot be cut.
        """
        pool: list[Expr] = []
        for dim in dims:
            pool.extend(f for f in factors_of(resolve(dim)) if not is_unit(f))
        out: list[Expr] = []
        for size in reversed(sizes):
            taken: list[Expr] = []
            need = size
            while not same_size(need, 1):
                if not pool:
                    raise Conflict(f"no elements left for a dim of size {size}")
                last = resolve(pool.pop())
                if isinstance(last, Product):
                    pool.extend(last.factors)
                    continue
                remaining = quotient(need, size_of(last))
                if remaining is not None:
                    taken.insert(0, last)
                    need = remaining
                    continue
                outer, inner = self.split_product(last, need)
                pool.append(outer)
                taken.insert(0, inner)
                need = 1
            out.append(product([resolve(t) for t in taken]))
        if not is_unit(resolve(product(pool))):
            raise Conflict("elements are left over")
        return [resolve(e) for e in reversed(out)]

    def units(self, expr: Expr, limit: int = 64) -> list[Expr] | None:
        """Split the outermost factor of a dim into single units, or None where that makes no sense (large, dynamic)."""
        expr = resolve(expr)
        total = size_of(expr)
        if not is_static(total) or total > limit:
            return None
        if isinstance(expr, Axis):
            _bind(expr, Concat((UNIT,) * total))
            return [UNIT] * total
        if isinstance(expr, Concat) and all(is_unit(p) for p in expr.parts):
            return list(expr.parts)
        return None


def _axis(x: Axis | Leaf) -> Axis:
    return x.axis if isinstance(x, Leaf) else x


__all__ = [
    "UNIT",
    "Axis",
    "Concat",
    "Conflict",
    "Expr",
    "Frozen",
    "Leaf",
    "Product",
    "Size",
    "Unifier",
    "axes_of",
    "concat",
    "factors_of",
    "is_static",
    "is_unit",
    "leaves",
    "map_leaves",
    "product",
    "quotient",
    "replaced",
    "resolve",
    "same_size",
    "size_of",
]
