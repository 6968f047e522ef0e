"""A rule written as a factor map, einsum-like."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import fx

from fxgrow.algebra import (
    Conflict,
    Expr,
    Size,
    Unifier,
    is_unit,
    product,
    quotient,
    same_size,
    size_of,
)
from fxgrow.ir.sizes import literal_size
from fxgrow.rules.annotation import Content, Dims, add_contents, annotate
from fxgrow.rules.base import Row
from fxgrow.rules.context import Context, GrowthContext, Matches, Regroups
from fxgrow.rules.resize import Resize


@dataclass(frozen=True)
class Operand:
    """One comma-separated term of a pattern: tokens are letters, groups of letters, ``...`` or ``*``."""

    tokens: tuple[tuple[str, ...], ...]
    optional: bool = False


def parse_pattern(pattern: str) -> tuple[list[Operand], list[Operand]]:
    """Parse ``"... i, o i, o? -> ... o"``.

    Letters name factors, ``(g i)`` a dim that is their product, ``...`` any leading dims, ``*`` any trailing dims that
    the op treats as a block, a final ``?`` an operand that may be missing.

    Raises:
        ValueError: a bracket does not close or an output letter appears in no operand.
    """

    def side(text: str) -> list[Operand]:
        out = []
        for term in text.split(","):
            term = term.strip()
            optional = term.endswith("?")
            term = term.rstrip("?")
            tokens: list[tuple[str, ...]] = []
            group: list[str] | None = None
            for word in term.replace("(", " ( ").replace(")", " ) ").split():
                if word == "(":
                    if group is not None:
                        raise ValueError(f"pattern {pattern!r}: nested bracket")
                    group = []
                elif word == ")":
                    if group is None:
                        raise ValueError(f"pattern {pattern!r}: bracket closes but never opened")
                    tokens.append(tuple(group))
                    group = None
                elif group is not None:
                    group.append(word)
                else:
                    tokens.append((word,))
            if group is not None:
                raise ValueError(f"pattern {pattern!r}: bracket never closes")
            out.append(Operand(tuple(tokens), optional))
        return out

    left, arrow, right = pattern.partition("->")
    if not arrow:
        raise ValueError(f"pattern {pattern!r}: no '->'")
    inputs, outputs = side(left), side(right)
    known = {letter for o in inputs for t in o.tokens for letter in t}
    for o in outputs:
        for token in o.tokens:
            for letter in token:
                if letter not in known:
                    raise ValueError(f"pattern {pattern!r}: output letter {letter!r} appears in no operand")
    return inputs, outputs


@dataclass
class Letters:
    """A pattern matched against an op's dims: the expression of each letter, and each operand's share in it."""

    exprs: dict[str, list[Expr]] = field(default_factory=dict)  # letter -> one expr per operand that has it
    owners: dict[str, list[str]] = field(default_factory=dict)  # letter -> operand names, alongside


@dataclass(frozen=True, eq=False)
class Pattern(Row):
    """A sum of products, or a map that meets its operands dim by dim.

    Attributes:
        pattern: see :func:`parse_pattern`; operands in the order of ``operands``.
        operands: schema names of the tensor arguments.
        sum: letters contracted by a product of the operands that have them.
        blocked: letters that cannot grow, and ``why``.
        sizes: letters whose sizes are literals, computed from the arguments.
        roles: what a letter's axes are called, e.g. ``{"h": "heads"}``.
        bias: operands that are added to the result rather than multiplied.
        newborn: fill of new entries of parameters where random makes no sense, e.g. ``{"running_var": 1.0}``.
        literals: argument name -> letter whose new size it must take.
    """

    pattern: str
    operands: Sequence[str]
    sum: str = field(default="", kw_only=True)
    blocked: str = field(default="", kw_only=True)
    why: str = field(default="the op mixes the entries of this dim", kw_only=True)
    sizes: Callable[[dict[str, Any]], dict[str, Size]] | None = field(default=None, kw_only=True)
    roles: Mapping[str, str] = field(default_factory=dict, kw_only=True)
    bias: Sequence[str] = field(default=("bias",), kw_only=True)
    newborn: Mapping[str, float] = field(default_factory=dict, kw_only=True)
    literals: Mapping[str, str] = field(default_factory=dict, kw_only=True)

    def __post_init__(self) -> None:
        _ = self.terms  # a pattern that makes no sense is found where it is written

    @property
    def notation(self) -> str:
        return self.pattern

    @cached_property
    def terms(self) -> tuple[list[Operand], list[Operand]]:
        return parse_pattern(self.pattern)

    # analysis ----------------------------------------------------------------------------------------------------

    def relate(self, ctx: Context) -> Dims | list[Dims] | None:
        letters = self._match(ctx)
        for letter, exprs in letters.exprs.items():
            for other in exprs[1:]:
                ctx.unify(exprs[0], other)
            if letter in self.blocked.split():
                ctx.freeze(exprs[0], self.why)
            if letter in self.roles:
                ctx.role(exprs[0], self.roles[letter])
        return self._emit(ctx, {k: v[0] for k, v in letters.exprs.items()})

    def _match(self, ctx: Matches) -> Letters:
        out = Letters()
        known = self._known(ctx.args)
        for operand, name in zip(self.terms[0], self.operands, strict=True):
            dims = ctx.dims(name)
            if dims is None:
                if not operand.optional:
                    raise Conflict(f"operand {name} is missing")
                continue
            for token, exprs in self._align(operand.tokens, dims):
                if token[0] in ("...", "*"):
                    for i, e in enumerate(exprs):
                        index = i - len(exprs) if token[0] == "..." else i
                        key = f"...{index}" if token[0] == "..." else f"*{name}{i}"
                        if not (token[0] == "..." and is_unit(e)):
                            self._give(out, key, name, e)
                        elif key not in out.exprs:
                            out.exprs.setdefault(key, [e])
                            out.owners.setdefault(key, [name])
                    continue
                (expr,) = exprs
                for letter, piece in zip(token, self._pieces(ctx, token, expr, known, out), strict=True):
                    self._give(out, letter, name, piece)
        return out

    def _known(self, args: dict[str, Any]) -> dict[str, Size]:
        found = {k: literal_size(v) for k, v in self.sizes(args).items()} if self.sizes else {}
        return {k: v for k, v in found.items() if v is not None}

    @staticmethod
    def _give(out: Letters, letter: str, name: str, expr: Expr) -> None:
        if letter.startswith("...") and letter in out.exprs and is_unit(out.exprs[letter][0]):
            out.exprs[letter], out.owners[letter] = [], []
        out.exprs.setdefault(letter, []).append(expr)
        out.owners.setdefault(letter, []).append(name)

    @staticmethod
    def _align(tokens: tuple[tuple[str, ...], ...], dims: Dims) -> Iterable[tuple[tuple[str, ...], list[Expr]]]:
        fixed = [t for t in tokens if t[0] not in ("...", "*")]
        extra = len(dims) - len(fixed)
        if extra < 0 or (extra > 0 and len(fixed) == len(tokens)):
            raise Conflict(f"{len(dims)} dims do not fit the pattern's {len(fixed)}")
        i = 0
        for token in tokens:
            width = extra if token[0] in ("...", "*") else 1
            yield token, list(dims[i : i + width])
            i += width

    @staticmethod
    def _pieces(ctx: Regroups, token: tuple[str, ...], expr: Expr, known: dict[str, Size], out: Letters) -> list[Expr]:
        if len(token) == 1:
            return [expr]
        sizes: list[Size | None] = [known.get(x, size_of(out.exprs[x][0]) if x in out.exprs else None) for x in token]
        total: Size = size_of(expr)
        unknown = [i for i, s in enumerate(sizes) if s is None]
        if len(unknown) > 1:
            raise Conflict(f"sizes of {token} are not known")
        rest = total
        for s in sizes:
            if s is not None:
                rest = quotient(rest, s)
                if rest is None:
                    raise Conflict(f"size {total} is not a product of {token}")
        if unknown:
            sizes[unknown[0]] = rest
        elif not same_size(rest, 1):
            raise Conflict(f"size {total} is not a product of {token}")
        return list(ctx.regroup([expr], sizes))

    def _emit(self, ctx: Context, exprs: dict[str, Expr]) -> Dims | list[Dims]:
        results = []
        for operand in self.terms[1]:
            rank = len(ctx.shape) if len(self.terms[1]) == 1 else None
            dims: Dims = []
            for token in operand.tokens:
                if token[0] == "...":
                    lead = sorted((int(k[3:]), v) for k, v in exprs.items() if k.startswith("..."))
                    dims.extend(v for _, v in lead)
                elif token[0] == "*":
                    shape = ctx.shape
                    dims.extend(ctx.opaque(s, self.why) for s in shape[len(dims) :])
                else:
                    dims.append(product([exprs[x] for x in token]))
            assert rank is None or rank == len(dims), (self.pattern, rank, dims)
            results.append(dims)
        return results[0] if len(results) == 1 else results

    # growth ------------------------------------------------------------------------------------------------------

    def grow(self, ctx: GrowthContext) -> Dims | list[Dims] | None:
        letters = self._match(ctx)
        ctx.newborn_constants(dict(self.newborn))
        result: dict[str, Expr] = {}
        factor = 1.0
        for letter, exprs in letters.exprs.items():
            owners = letters.owners[letter]
            if letter in self.sum.split():
                if any(ctx.grows(e) for e in exprs):
                    factor *= ctx.contract(exprs, owners)
                result[letter] = exprs[0]
                continue
            if letter.startswith("*"):
                continue
            products = [e for e, o in zip(exprs, owners, strict=True) if o not in self.bias]
            biases = [e for e, o in zip(exprs, owners, strict=True) if o in self.bias]
            total = products[0] if products else biases.pop(0)
            for e in products[1:]:
                total = ctx.combine(total, e, "mul")
            for e in biases:
                total = ctx.combine(total, e, "add")
            total = ctx.close(total)
            if products and any(b not in owners and ctx.dims(b) is not None for b in self.bias if b in self.operands):
                total = annotate(
                    total, lambda info: info.becomes(add_contents(info.content, Content.CONST), zeroable=False)
                )
            result[letter] = total
        if factor != 1.0:
            operand = next(o for o in self.operands if o not in self.bias)
            ctx.rescale_product(1.0 / factor, operand, self.bias)
        return self._emit(ctx, result)

    def resize(self, ctx: Resize) -> None:
        if not self.literals:
            return
        letters = self._match(_Static(ctx))
        for name, letter in self.literals.items():
            exprs = letters.exprs[letter]
            if ctx.changed(exprs[0]):
                ctx.set(name, ctx.new_size(exprs[0]))


class _Static:
    """The part of a context that matching a pattern needs, over resolved dims (nothing is refined any more)."""

    def __init__(self, ctx: Resize) -> None:
        self._ctx, self._unifier = ctx, Unifier()
        self.args = ctx.args

    def dims(self, name: str) -> Dims | None:
        value = self.args.get(name)
        return self._ctx.dims(value) if isinstance(value, fx.Node) else None

    def regroup(self, dims: Sequence[Expr], sizes: Sequence[Size]) -> list[Expr]:
        return self._unifier.regroup(dims, sizes)
