"""A rule written as a factor map, einsum-like."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

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
from fxgrow.ir.ops import bound_arguments
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
    the op treats as a block (``*x`` where it has a name), a final ``?`` an operand that may be missing.

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
                if letter not in known and not (_is_block(letter) and any(map(_is_block, known))):
                    raise ValueError(f"pattern {pattern!r}: output letter {letter!r} appears in no operand")
    return inputs, outputs


def _is_block(token: str) -> bool:
    return token.startswith("*")


#: calls of one op mostly have one notation
_parsed = functools.lru_cache(maxsize=1024)(parse_pattern)


def missing_in_result(pattern: str) -> str:
    """the letters that the result lacks, as in einsum"""
    given, kept = ({letter for o in side for t in o.tokens for letter in t} for side in _parsed(pattern))
    return " ".join(sorted(x for x in given - kept if x != "..." and not _is_block(x)))


@dataclass
class Letters:
    """A pattern matched against an op's dims: the expression of each letter, and each operand's share in it.

    Attributes:
        summed: the letters that are contracted.
        outputs: the results, as letters.
        exprs: by letter, one expression per operand that has it. The dims of ``...`` are letters of their own,
            ``...-1`` the last one, and so are those of a block, ``*x weight 0``.
        owners: by letter, the operands' names alongside.
    """

    summed: list[str]
    outputs: list[Operand]
    exprs: dict[str, list[Expr]] = field(default_factory=dict)
    owners: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Pattern(Row):
    """A sum of products, or a map that meets its operands dim by dim.

    Attributes:
        pattern: see :func:`parse_pattern`; operands in the order of ``operands``. Where it depends on the call, a
            function that gives it, from arguments and ranks; the first line of its docstring says it in words.
        operands: schema names of the tensor arguments. A list of tensors stands for all of them: ``tensors`` for
            operands called ``tensors0``, ``tensors1`` and so on.
        sum: letters contracted by a product of the operands that have them, or :func:`missing_in_result`.
        blocked: letters that cannot grow, and ``why``. Blocks of dims (``*``) never can.
        roles: what the axes of a letter or of a block are called, e.g. ``{"h": "heads", "*x": "spatial"}``; or a
            function that tells the context.
        bias: operands that are added to the result rather than multiplied; they may broadcast against it.
        newborn: fill of new entries of parameters where random makes no sense, e.g. ``{"running_var": 1.0}``.
        literals: argument name -> letter whose size it is.
    """

    noted: ClassVar[str] = "pattern"

    pattern: str | Callable[[Matches], str]
    operands: Sequence[str]
    sum: str | Callable[[str], str] = field(default="", kw_only=True)
    blocked: str = field(default="", kw_only=True)
    why: str = field(default="the op mixes the entries of this dim", kw_only=True)
    roles: Mapping[str, str] | Callable[[Context], None] = field(default_factory=dict, kw_only=True)
    bias: Sequence[str] = field(default=("bias",), kw_only=True)
    newborn: Mapping[str, float] = field(default_factory=dict, kw_only=True)
    literals: Mapping[str, str] = field(default_factory=dict, kw_only=True)

    def __post_init__(self) -> None:
        if isinstance(self.pattern, str):
            _parsed(self.pattern)  # a pattern that makes no sense is found where it is written

    @property
    def notation(self) -> str:
        if isinstance(self.pattern, str):
            return self.pattern
        return (inspect.getdoc(self.pattern) or self.pattern.__name__).partition("\n")[0]

    # analysis ----------------------------------------------------------------------------------------------------

    def relate(self, ctx: Context) -> Dims | list[Dims] | None:
        if callable(self.roles):
            self.roles(ctx)
        letters = self._match(ctx)
        for letter, exprs in letters.exprs.items():
            for other in exprs[1:]:
                ctx.unify(exprs[0], other)
            if letter in self.blocked.split() or _is_block(letter):
                ctx.freeze(exprs[0], self.why)
            self._name(ctx, letter, exprs[0])
            if letter in letters.summed:
                ctx.contracted(exprs[0])
        return self._emit(ctx, letters, {k: v[0] for k, v in letters.exprs.items()})

    def _name(self, ctx: Context, letter: str, expr: Expr) -> None:
        """Of a block nothing else says as much: its name counts for more than what its axes are elsewhere."""
        token = letter.partition(" ")[0]
        if not callable(self.roles) and token in self.roles:
            ctx.role(expr, self.roles[token], 100 if _is_block(token) else 1)

    def _match(self, ctx: Matches) -> Letters:
        text = self.pattern if isinstance(self.pattern, str) else self.pattern(ctx)
        inputs, outputs = _parsed(text)
        out = Letters((self.sum(text) if callable(self.sum) else self.sum).split(), outputs)
        known = self._known(ctx.args)
        for operand, (name, value) in zip(inputs, self._given(ctx.args), strict=True):
            dims = ctx.dims(value) if isinstance(value, fx.Node) else None
            if dims is None:
                if not operand.optional:
                    raise Conflict(f"operand {name} is missing")
                continue
            bias = name in self.bias
            for token, exprs in self._align(operand.tokens, dims, bias):
                if token[0] == "...":
                    for i, e in enumerate(exprs, -len(exprs)):
                        key = f"...{i}"
                        if not is_unit(e):
                            self._give(out, key, name, e)
                        elif key not in out.exprs:
                            out.exprs[key], out.owners[key] = [e], [name]
                elif _is_block(token[0]):
                    for i, e in enumerate(exprs):
                        self._give(out, f"{token[0]} {name} {i}", name, e)
                elif not (bias and is_unit(exprs[0])):  # it broadcasts
                    for letter, piece in zip(token, self._pieces(ctx, token, exprs[0], known, out), strict=True):
                        self._give(out, letter, name, piece)
        return out

    def _given(self, args: Mapping[str, Any]) -> list[tuple[str, Any]]:
        """The operands of a call by name; those of a list are numbered."""
        out: list[tuple[str, Any]] = []
        for name in self.operands:
            value = args.get(name)
            if isinstance(value, list | tuple):
                out += [(f"{name}{i}", v) for i, v in enumerate(value)]
            else:
                out.append((name, value))
        return out

    def _known(self, args: Mapping[str, Any]) -> dict[str, Size]:
        found = {letter: literal_size(args[name]) for name, letter in self.literals.items()}
        return {letter: size for letter, size in found.items() if size is not None}

    @staticmethod
    def _give(out: Letters, letter: str, name: str, expr: Expr) -> None:
        if letter.startswith("...") and letter in out.exprs and is_unit(out.exprs[letter][0]):
            out.exprs[letter], out.owners[letter] = [], []
        out.exprs.setdefault(letter, []).append(expr)
        out.owners.setdefault(letter, []).append(name)

    @staticmethod
    def _align(
        tokens: tuple[tuple[str, ...], ...], dims: Dims, broadcasts: bool
    ) -> Iterable[tuple[tuple[str, ...], list[Expr]]]:
        fixed = [t for t in tokens if t[0] != "..." and not _is_block(t[0])]
        extra = len(dims) - len(fixed)
        if broadcasts and extra < 0:
            tokens, extra = tokens[-extra:], 0
        if extra < 0 or (extra > 0 and len(fixed) == len(tokens)):
            raise Conflict(f"{len(dims)} dims do not fit the pattern's {len(fixed)}")
        i = 0
        for token in tokens:
            width = 1 if token in fixed else extra
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

    def _emit(self, ctx: Context, letters: Letters, exprs: Mapping[str, Expr]) -> Dims | list[Dims]:
        results = []
        for operand in letters.outputs:
            rank = len(ctx.shape) if len(letters.outputs) == 1 else None
            dims: Dims = []
            for token in operand.tokens:
                if token[0] == "...":
                    lead = sorted((int(k[3:]), v) for k, v in exprs.items() if k.startswith("..."))
                    dims.extend(v for _, v in lead)
                elif _is_block(token[0]):
                    for size in ctx.shape[len(dims) :]:
                        dims.append(ctx.opaque(size, self.why))
                        self._name(ctx, token[0], dims[-1])
                else:
                    dims.append(product([exprs[x] for x in token]))
            assert rank is None or rank == len(dims), (self.notation, rank, dims)
            results.append(dims)
        return results[0] if len(results) == 1 else results

    def factors(self, node: fx.Node) -> list[fx.Node]:
        given = [(name, value) for name, value in self._given(bound_arguments(node)) if isinstance(value, fx.Node)]
        return [value for _, value in given] if all(name not in self.bias for name, _ in given) else []

    # growth ------------------------------------------------------------------------------------------------------

    def grow(self, ctx: GrowthContext) -> Dims | list[Dims] | None:
        letters = self._match(ctx)
        ctx.newborn_constants(dict(self.newborn))
        result: dict[str, Expr] = {}
        factor = 1.0
        for letter, exprs in letters.exprs.items():
            owners = letters.owners[letter]
            if letter in letters.summed:
                if any(ctx.grows(e) for e in exprs):
                    factor *= ctx.contract(exprs, owners)
                result[letter] = exprs[0]
                continue
            if _is_block(letter):
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
            operand = next(name for name, _ in self._given(ctx.args) if name not in self.bias)
            ctx.rescale_product(1.0 / factor, operand, self.bias)
        return self._emit(ctx, letters, result)

    def resize(self, ctx: Resize) -> None:
        if all(ctx.args[name] == 1 for name in self.literals):
            return  # what has one entry does not grow
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

    def dims(self, name: str | fx.Node) -> Dims | None:
        value = self.args.get(name) if isinstance(name, str) else name
        return self._ctx.dims(value) if isinstance(value, fx.Node) else None

    def operand(self, name: str | fx.Node) -> Dims:
        found = self.dims(name)
        if found is None:
            raise Conflict(f"operand {name} is missing")
        return found

    def regroup(self, dims: Sequence[Expr], sizes: Sequence[Size]) -> list[Expr]:
        return self._unifier.regroup(dims, sizes)
