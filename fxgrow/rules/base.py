"""What a rule is, and the table of rules: everything the compiler needs to know of one op.

A rule says (1) how the dims of an op's operands and results are the same axes (:meth:`Rule.relate`), (2) what becomes
of new entries and *copies* of a growing axis when they pass through (:meth:`Rule.grow`), and (3) which literal
arguments depend on sizes (:meth:`Rule.resize`). Nearly all rules are *rows*: data, in one of the forms of
:mod:`fxgrow.rules.forms`, from which the three are derived. What no form says is a class, and says why
(:attr:`Rule.special`). The table is :data:`RULES`; :func:`register_rule` adds to it.

Growth of one axis of size d to d' is described entry by entry. An entry is a *copy* of an old unit, or new. Copies hold
exactly the old unit's value everywhere; a new entry's value is known only as far as its :class:`Content` says.
Exactness of a growth is a proof by these two statements, op by op, from the parameters to the outputs.
"""

from __future__ import annotations

import dataclasses
import inspect
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from fxgrow.ir.ops import bound_arguments, nodes_among, op_name
from fxgrow.rules.annotation import Dims
from fxgrow.rules.context import Context, GrowthContext
from fxgrow.rules.resize import Resize
from fxgrow.rules.values import ANYTHING, KnownRanges, Range, RangeOf, UnknownRanges, held

Fact = bool | Callable[[fx.Node], bool]


@dataclass(frozen=True)
class Picked:
    """A dim of an operand from which a call picks entries by number.

    Attributes:
        numbers: those that are picked: a node, or a number.
        first: how many of the first ones are picked instead, a size or the node that gives one; None: not known.
    """

    operand: fx.Node
    dim: int
    numbers: Any = None
    first: Any = None


class Rule:
    """Base of all rules. Subclasses override what they need.

    A fact of an op is an attribute: a value that holds for every call, or a function of the call. A subclass may
    define the function as a method.
    """

    #: Why this rule is a class of its own and no row of a form, in a line.
    special: ClassVar[str] = ""

    #: True where the op only moves or copies elements, or mixes them along dims that do not grow.
    moves: bool = False

    #: Whether a call is linear in its operands of real or complex numbers, all of them taken together. Indices, masks
    #: and other operands that count are held fast. A parameter seen through ops that move elements and are linear is
    #: still the parameter, which may take shares; through any other op it is a value. A scale may be moved from one
    #: side of a linear op with one such operand to the other. None: where it moves elements.
    linear: Fact | None = None

    #: Whether every entry of the result is one of the operand's: an extremum, or the nearest pixel.
    selects: Fact = False

    #: The dims of operands from which a call picks entries by number, so that further ones may follow the old ones.
    picks: Callable[[fx.Node], list[Picked]] | None = None

    #: What every entry of the result is: a number, or the name of the argument that holds it.
    value: float | str | None = None

    #: What values the entries of the result can take, from those of the operands; see :mod:`fxgrow.rules.values`.
    range: RangeOf | None = None

    #: The operands in which the result jumps somewhere: comparisons, roundings, places of an extremum, poles. There,
    #: numbers that are equal up to rounding may give quite different results. True: all of them.
    jumps: bool | Callable[[fx.Node], list[fx.Node]] = False

    #: Arguments that the op chooses by the dtype of its first tensor where they are left at None: the value by dtype.
    implied: Mapping[str, Callable[[torch.dtype], float]] = {}

    #: Tensor arguments of which the op takes the dtype or the device alone.
    ignored: tuple[str, ...] = ()

    #: Operands that are a layer's parameters, its weight first. The result is linear in them, all that a call has of
    #: them taken together: scaled where they are scaled, and zero where they are zero.
    weights: tuple[str, ...] = ()

    #: Whether f(0) = 0: the result is zero where all operands of real or complex numbers are. A function is given the
    #: call's arguments.
    zero: bool | Callable[[dict[str, Any]], bool] = False

    #: Whether a call changes the dtype of its first operand's numbers, or where they are stored, and nothing else.
    casts: bool = False

    #: Whether the result holds the first operand's numbers as they are, in its dtype.
    copies: bool = False

    #: Whether no gradient passes through.
    detaches: bool = False

    #: Whether f(f(x)) = f(x), for a call with one tensor operand and its literals.
    idempotent: bool = False

    @property
    def depends_on_all(self) -> bool:
        """Whether results depend on all entries along some dims, so that no old one could be told from them."""
        return False

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

    def factors(self, node: fx.Node) -> list[fx.Node]:
        """The operands each of which makes the result zero where it is zero, whatever the others are."""
        return []


@dataclass(frozen=True, kw_only=True, eq=False)
class Row(Rule):
    """A rule that is data: the columns are the fields, and a form derives what the compiler asks from them."""

    #: the column that the notation shows
    noted: ClassVar[str] = ""

    moves: bool = False
    linear: Fact | None = None
    selects: Fact = False
    picks: Callable[[fx.Node], list[Picked]] | None = None
    value: float | str | None = None
    range: RangeOf | None = None
    jumps: bool | Callable[[fx.Node], list[fx.Node]] = False
    implied: Mapping[str, Callable[[torch.dtype], float]] = dataclasses.field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()
    zero: bool | Callable[[dict[str, Any]], bool] = False
    casts: bool = False
    copies: bool = False
    detaches: bool = False
    idempotent: bool = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in ("linear", "selects", "jumps", "zero"):
            if inspect.isfunction(cls.__dict__.get(name)):
                raise TypeError(f"{cls.__name__}.{name} is a column: give it to the row, do not define it as a method")

    @property
    def notation(self) -> str:
        """The relation between operands and results, in the notation of :func:`fxgrow.rules.forms.parse_pattern`."""
        raise NotImplementedError

    def columns(self) -> dict[str, Any]:
        """What the row says beyond its notation, and what every row says unless told otherwise: values by column."""
        out: dict[str, Any] = {}
        for column in dataclasses.fields(self):
            if column.name == self.noted:
                continue
            value, default = getattr(self, column.name), column.default
            if default is dataclasses.MISSING and column.default_factory is not dataclasses.MISSING:
                default = column.default_factory()
            if value != default:
                out[column.name] = value
        return out


# the table ------------------------------------------------------------------------------------------------------------

RULES: dict[str, Rule] = {}

#: the family of every op that fxgrow has a rule for: the file of ``fxgrow/rules`` that its row stands in
FAMILIES: dict[str, str] = {}


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


def register_table(family: str, table: Mapping[str, Rule]) -> None:
    """Add the rows of a family: names as :func:`op_names` reads them, to the rule that they share.

    Args:
        family: the module's ``__name__``.
        table: the rows.
    """
    for names, rule in table.items():
        for name in op_names(names):
            register_rule(name, rule)
            FAMILIES[name] = family.rpartition(".")[2]


_NAME = re.compile(r"(?P<op>[\w:]+\.\w+?)(?P<both>\(_\))?(\.(?P<overload>\w+))?")


def op_names(text: str) -> Iterator[str]:
    """The names in a row's text: ``aten.relu`` is the overload ``default``, ``aten.add(_).Tensor`` in place, too.

    Raises:
        ValueError: a word that is no name.
    """
    for word in text.split():
        match = _NAME.fullmatch(word)
        if match is None:
            raise ValueError(f"{word!r} is not the name of an op, such as aten.relu, aten.relu(_) or aten.add.Tensor")
        for suffix in ("", "_") if match["both"] else ("",):
            yield f"{match['op']}{suffix}.{match['overload'] or 'default'}"


# what others ask ------------------------------------------------------------------------------------------------------


def rule_of(node: Any) -> Rule | None:
    """The rule of a call; None for what is no call, or of an op without a rule."""
    return RULES.get(op_name(node.target)) if isinstance(node, fx.Node) and node.op == "call_function" else None


def moves(node: Any) -> bool:
    """Whether a value is made by an op that only moves elements. See :attr:`Rule.moves`."""
    rule = rule_of(node)
    return rule is not None and rule.moves


def is_linear(node: fx.Node) -> bool:
    """Whether a call is linear in its operands. See :attr:`Rule.linear`."""
    rule = rule_of(node)
    return rule is not None and _holds(rule.moves if rule.linear is None else rule.linear, node)


def selects(node: fx.Node) -> bool:
    """Whether a call picks entries by their size. See :attr:`Rule.selects`."""
    rule = rule_of(node)
    return rule is not None and _holds(rule.selects, node)


def picks(node: fx.Node) -> list[Picked]:
    """The dims of its operands from which a call picks entries by number. See :attr:`Rule.picks`."""
    rule = rule_of(node)
    return rule.picks(node) if rule is not None and rule.picks is not None else []


def value_of(node: fx.Node) -> Any:
    """What every entry of a call's result is: a number, or the node that holds it; None where that is not known."""
    rule = rule_of(node)
    value = rule.value if rule is not None else None
    return bound_arguments(node)[value] if isinstance(value, str) else value


def range_of(node: fx.Node, ranges: KnownRanges) -> Range:
    """What values the entries of a call's one result can take. See :attr:`Rule.range`."""
    rule, result = rule_of(node), node.meta.get("val")
    if rule is None or not isinstance(result, torch.Tensor):
        return ANYTHING
    if rule.value is not None:
        return held(ranges.of(value_of(node)), result.dtype)
    return held(rule.range(ranges, bound_arguments(node)), result.dtype) if rule.range is not None else ANYTHING


def jumping_operands(node: fx.Node) -> list[fx.Node]:
    """The operands in which a call's result jumps somewhere. See :attr:`Rule.jumps`."""
    rule = rule_of(node)
    found = rule.jumps if rule is not None else False
    if isinstance(found, bool):
        return node.all_input_nodes if found else []
    return found(node)


def weights(node: fx.Node) -> list[fx.Node]:
    """The operands of a call that are a layer's weight and bias; none without a weight. See :attr:`Rule.weights`."""
    rule = rule_of(node)
    if rule is None or not rule.weights:
        return []
    given = bound_arguments(node)
    first, *rest = (given.get(name) for name in rule.weights)
    return [v for v in (first, *rest) if isinstance(v, fx.Node)] if isinstance(first, fx.Node) else []


def factors(node: fx.Node) -> list[fx.Node]:
    """The operands of a call each of which makes its result zero where it is zero. See :meth:`Rule.factors`."""
    rule = rule_of(node)
    return rule.factors(node) if rule is not None else []


def keeps_zero(node: Any) -> bool:
    """Whether a call's result is zero where its operands of real or complex numbers are. See :attr:`Rule.zero`."""
    rule = rule_of(node)
    if rule is None:
        return False
    if is_linear(node) or rule.casts:
        return True
    return rule.zero(bound_arguments(node)) if callable(rule.zero) else rule.zero


def casts(node: Any) -> bool:
    """Whether a call only changes a dtype or a place. See :attr:`Rule.casts`."""
    rule = rule_of(node)
    return rule is not None and rule.casts


def copies(node: Any) -> bool:
    """Whether a call gives the numbers that it was given. See :attr:`Rule.copies`."""
    rule = rule_of(node)
    return rule is not None and rule.copies


def detaches(node: Any) -> bool:
    """Whether a call passes no gradient on. See :attr:`Rule.detaches`."""
    rule = rule_of(node)
    return rule is not None and rule.detaches


def idempotent(node: Any) -> bool:
    """Whether a call repeated changes nothing. See :attr:`Rule.idempotent`."""
    rule = rule_of(node)
    return rule is not None and rule.idempotent


def not_negative(node: Any) -> bool:
    """Whether a call's result has no negative entry, whatever its operands hold. See :attr:`Rule.range`."""
    return isinstance(node, fx.Node) and range_of(node, UnknownRanges()).not_negative


def reads(node: fx.Node, operand: fx.Node) -> bool:
    """Whether a call's result depends on the numbers that an operand holds, and not on its shape and dtype alone."""
    if op_name(node.target).startswith("aten.sym_"):
        return False
    rule = rule_of(node)
    ignored = rule.ignored if rule is not None else ()
    return any(value is operand and name not in ignored for name, value in nodes_among(bound_arguments(node)))


def _holds(fact: Fact, node: fx.Node) -> bool:
    return fact if isinstance(fact, bool) else fact(node)


def implied_arguments(node: fx.Node) -> dict[str, float]:
    """The arguments of a call that are left to the op, which chooses them by dtype, and what it chooses.

    Whatever changes such an argument, or the dtype that the call computes in, has to start from these values.
    """
    rule = rule_of(node)
    if rule is None or not rule.implied:
        return {}
    given, dtype = bound_arguments(node), node.all_input_nodes[0].meta["val"].dtype
    if not dtype.is_floating_point:
        return {}
    return {name: value(dtype) for name, value in rule.implied.items() if given.get(name) is None}


def implied_value(node: fx.Node, name: str) -> float | None:
    """What a call's op chooses for an argument where it is left out, whatever the call says; None where it does not."""
    rule = rule_of(node)
    if rule is None or name not in rule.implied:
        return None
    return rule.implied[name](node.all_input_nodes[0].meta["val"].dtype)


class GetItem(Rule):
    """``operator.getitem`` on an op with several results."""

    special = "a Python function, which no form is made for"

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
FAMILIES[op_name(operator.getitem)] = "base"
