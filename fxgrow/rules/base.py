"""What a rule is: everything the compiler needs to know of one op.

A rule says (1) how the dims of an op's operands and results are the same axes (:meth:`Rule.relate`), (2) what becomes
of *newborn* entries and *copies* of a growing axis when they pass through (:meth:`Rule.grow`), and (3) which literal
arguments depend on sizes (:meth:`Rule.resize`). Most rules are one line of :class:`Pattern`, in a notation like
einsum's, or one :class:`Structural` function on dims. The table is :data:`RULES`; :func:`register_rule` adds to it.

Growth of one axis of size d to d' is described entry by entry. An entry is a *copy* of an old unit, or *newborn*.
Copies hold exactly the old unit's value everywhere; a newborn entry's value is known only as far as its
:class:`Content` says. Exactness of a growth is a proof by these two statements, op by op, from the parameters to the
outputs.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fxgrow.algebra import (
    UNIT,
    Conflict,
    Expr,
    Size,
    Unifier,
    is_unit,
    product,
    quotient,
    resolve,
    same_size,
    size_of,
)
from fxgrow.ir.ops import bound_arguments, op_name
from fxgrow.ir.sizes import literal_size
from fxgrow.rules.annotation import Content, Dims, Info, add_contents, annotate
from fxgrow.rules.context import Context, GrowthContext, Matches, Regroups
from fxgrow.rules.resize import Resize


class Rule:
    """Base of all rules. Subclasses override what they need."""

    #: True where the op only moves or copies elements, or mixes them along dims that do not grow.
    moves = False

    #: Arguments that the op chooses by the dtype of its first tensor where they are left at None: the value by dtype.
    implied: Mapping[str, Callable[[torch.dtype], float]] = {}

    #: Tensor arguments of which the op takes the dtype or the device alone.
    ignored: tuple[str, ...] = ()

    def linear(self, node: fx.Node) -> bool:
        """Whether this call is linear in its operands of real or complex numbers, all of them taken together.

        Indices, masks and other operands that count are held fast. A parameter seen through ops that move elements and
        are linear is still the parameter, which may take shares; through any other op it is a value. A scale may be
        moved from one side of a linear op with one such operand to the other.
        """
        return self.moves

    def relate(self, ctx: Context) -> Dims | list[Dims] | None:
        """Dims of the result(s), after unifying the dims of the operands. None: the result is not a tensor."""
        raise NotImplementedError

    def grow(self, ctx: GrowthContext) -> Dims | list[Dims] | None:
        """Annotated dims of the result(s) when ``ctx.axis`` grows.

        Raises:
            GrowthRefused: through ``ctx.refuse`` where the growth cannot be exact.
        """
        raise NotImplementedError

    def resize(self, ctx: Resize) -> None:
        """Re-emit the literal arguments that depend on sizes. The default changes nothing."""

    def selects(self, node: fx.Node) -> bool:
        """Whether every entry of the result is one of the operand's, chosen by size: an extremum."""
        return False

    def jumps(self, node: fx.Node) -> list[fx.Node]:
        """The operands in which the result jumps somewhere: comparisons, roundings, places of an extremum, poles.

        There, numbers that are equal up to rounding may give quite different results.
        """
        return []


RULES: dict[str, Rule] = {}


def register_rule(ops: str | Iterable[str], rule: Rule, *, override: bool = False) -> None:
    """Add a rule for one op or several.

    Args:
        ops: names as FX prints them, e.g. ``"aten.linear.default"`` or ``"mylib.myop.default"``.
        rule: shared by all of them.
        override: replace a rule that is there already.
    """
    for name in [ops] if isinstance(ops, str) else ops:
        if name in RULES and not override:
            raise ValueError(f"{name} has a rule already; pass override=True to replace it")
        RULES[name] = rule


def implied_arguments(node: fx.Node) -> dict[str, float]:
    """The arguments of a call that are left to the op, which chooses them by dtype, and what it chooses.

    Whatever changes such an argument, or the dtype that the call computes in, has to start from these values.
    """
    rule = RULES.get(op_name(node.target)) if node.op == "call_function" else None
    if rule is None or not rule.implied:
        return {}
    given, dtype = bound_arguments(node), node.all_input_nodes[0].meta["val"].dtype
    if not dtype.is_floating_point:
        return {}
    return {name: value(dtype) for name, value in rule.implied.items() if given.get(name) is None}


class Structural(Rule):
    """An op that only moves elements: one function from dims to dims serves analysis and growth alike.

    ``f(ctx, dims)`` gets the dims of the first tensor operand and returns those of the result(s).
    """

    moves = True

    def __init__(
        self,
        f: Callable[[Any, Dims], Dims | list[Dims]],
        resize: Callable[[Resize], None] | None = None,
        operand: str | None = None,
    ) -> None:
        self.f, self._resize, self.operand = f, resize, operand

    def relate(self, ctx: Context) -> Dims | list[Dims] | None:
        return self.f(ctx, ctx.dims(self.operand or ctx.first) or [])

    def grow(self, ctx: GrowthContext) -> Dims | list[Dims] | None:
        return self.f(ctx, ctx.dims(self.operand or ctx.first) or [])

    def resize(self, ctx: Resize) -> None:
        if self._resize is not None:
            self._resize(ctx)


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


class Pattern(Rule):
    """A rule written as a factor map, einsum-like.

    Args:
        pattern: see :func:`parse_pattern`; operands in the order of ``operands``.
        operands: schema names of the tensor arguments.
        sum: letters contracted by a product of the operands that have them.
        blocked: letters that cannot grow, and ``why``.
        sizes: letters whose sizes are literals, computed from the arguments.
        roles: what a letter's axes are called, e.g. ``{"h": "heads"}``.
        bias: operands that are added to the result rather than multiplied.
        newborn: fill of newborn entries of parameters where random makes no sense, e.g. ``{"running_var": 1.0}``.
        literals: argument name -> letter whose new size it must take.
    """

    def __init__(
        self,
        pattern: str,
        operands: Sequence[str],
        *,
        sum: str = "",
        blocked: str = "",
        why: str = "the op mixes the entries of this dim",
        sizes: Callable[[dict[str, Any]], dict[str, Size]] | None = None,
        roles: dict[str, str] | None = None,
        bias: Sequence[str] = ("bias",),
        newborn: dict[str, float] | None = None,
        literals: dict[str, str] | None = None,
    ) -> None:
        self.pattern = pattern
        self.inputs, self.outputs = parse_pattern(pattern)
        self.operands = list(operands)
        self.sum, self.blocked, self.why = set(sum.split()), set(blocked.split()), why
        self.letter_sizes = sizes
        self.roles, self.bias, self.newborn = roles or {}, set(bias), newborn or {}
        self.literals = literals or {}

    def __repr__(self) -> str:
        return f"Pattern({self.pattern!r}, sum={sorted(self.sum)})"

    # analysis ----------------------------------------------------------------------------------------------------

    def relate(self, ctx: Context) -> Dims | list[Dims] | None:
        letters = self._match(ctx)
        for letter, exprs in letters.exprs.items():
            for other in exprs[1:]:
                ctx.unify(exprs[0], other)
            if letter in self.blocked:
                ctx.freeze(exprs[0], self.why)
            if letter in self.roles:
                ctx.role(exprs[0], self.roles[letter])
        return self._emit(ctx, {k: v[0] for k, v in letters.exprs.items()})

    def _match(self, ctx: Matches) -> Letters:
        out = Letters()
        known = self._known(ctx.args)
        for operand, name in zip(self.inputs, self.operands, strict=True):
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
        found = {k: literal_size(v) for k, v in self.letter_sizes(args).items()} if self.letter_sizes else {}
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
        for operand in self.outputs:
            rank = len(ctx.shape) if len(self.outputs) == 1 else None
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
        ctx.newborn_constants(self.newborn)
        result: dict[str, Expr] = {}
        factor = 1.0
        for letter, exprs in letters.exprs.items():
            owners = letters.owners[letter]
            if letter in self.sum:
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
            if products and any(b not in owners and ctx.dims(b) is not None for b in self.bias & set(self.operands)):
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


class Pointwise(Rule):
    """An element-wise op with broadcasting.

    Args:
        combine: how two operands' newborn contents meet: ``add``, ``mul``, ``zero`` (zero where all are zero) or
            ``any`` (nothing is kept).
        zero: f(0) = 0 for the op with one tensor operand and its literals.
        mean: the op is affine, so that the mean of the results is the result of the mean.
        jumps: see :meth:`Rule.jumps`.
    """

    def __init__(
        self,
        combine: str = "any",
        *,
        zero: bool | Callable[[dict[str, Any]], bool] = False,
        mean: bool | Callable[[dict[str, Any]], bool] = False,
        cast: bool = False,
        in_place: bool = False,
        jumps: bool = False,
    ) -> None:
        self.combine, self.zero, self.mean, self.moves = combine, zero, mean, cast
        self.in_place, self._jumps = in_place, jumps

    def jumps(self, node: fx.Node) -> list[fx.Node]:
        return node.all_input_nodes if self._jumps else []

    def relate(self, ctx: Context) -> Dims | list[Dims] | None:
        shape = ctx.shape
        out: Dims = []
        operands = ctx.tensor_operands()
        for i in range(-len(shape), 0):
            exprs = [d[i] for _, d in operands if -i <= len(d) and not is_unit(d[i])]
            for other in exprs[1:]:
                ctx.unify(exprs[0], other)
            out.append(resolve(exprs[0]) if exprs else ctx.sized(shape[i]))
        return out

    def grow(self, ctx: GrowthContext) -> Dims | list[Dims] | None:
        operands = ctx.tensor_operands()
        out: Dims = []
        rank = max((len(d) for _, d in operands), default=0)
        for i in range(-rank, 0):
            exprs = [d[i] if -i <= len(d) else UNIT for _, d in operands]
            present = [e for e in exprs if not is_unit(e)]
            if not present:
                out.append(UNIT)
                continue
            if not any(ctx.grows(e) for e in present):
                out.append(present[0])
                continue
            if len(operands) == 1:
                out.append(self._unary(ctx, present[0]))
                continue
            total = exprs[0]
            for e in exprs[1:]:
                total = ctx.combine(total, e, self.combine)
            out.append(ctx.close(total))
        return out

    def _unary(self, ctx: GrowthContext, expr: Expr) -> Expr:
        if self.moves:
            return expr
        zero = self.zero(ctx.args) if callable(self.zero) else self.zero
        mean = self.mean(ctx.args) if callable(self.mean) else self.mean

        def one(info: Info) -> Info:
            keep = (
                info.content is Content.CONST
                or (info.content is Content.ZERO and zero)
                or (info.content is Content.MEAN and mean)
            )
            return info.becomes(info.content if keep else Content.FREE, zeroable=zero)

        return annotate(expr, one)

    def resize(self, ctx: Resize) -> None:
        """Nothing to re-emit: no literal of a point-wise op is a size."""


class Opaque(Rule):
    """An op nothing is known of: its operands' axes are frozen, its results have axes of their own, frozen too."""

    def __init__(self, why: str) -> None:
        self.why = why

    def relate(self, ctx: Context) -> Dims | list[Dims] | None:
        for _, dims in ctx.tensor_operands():
            for dim in dims:
                ctx.freeze(dim, self.why)
        return ctx.opaque_results(self.why)

    def grow(self, ctx: GrowthContext) -> Dims | list[Dims] | None:
        raise ctx.refuse(self.why)


class GetItem(Rule):
    """``operator.getitem`` on an op with several results."""

    def relate(self, ctx: Context) -> Dims | list[Dims] | None:
        return self._pick(ctx)

    def grow(self, ctx: GrowthContext) -> Dims | list[Dims] | None:
        return self._pick(ctx)

    def _pick(self, ctx: Context) -> Dims | None:
        source, index = ctx.node.args
        assert isinstance(source, fx.Node)
        value = ctx.results(source)
        return value[index] if value is not None else None


register_rule(op_name(operator.getitem), GetItem())
