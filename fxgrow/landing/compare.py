"""Do two graphs compute the same function, and where do they first part?

Used after a growth has been put into a class of the user's: the class is traced again, and its graph compared with the
grown one. Outputs alone cannot tell: a constant that matters little on the example is missed, an error says not where.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fxgrow.ir.guards import Guard, bound_of, broken, inputs_of
from fxgrow.ir.nodes import info_of
from fxgrow.ir.ops import bound_arguments
from fxgrow.ir.traced import Call, Traced
from fxgrow.landing.terms import CONSTANT, INPUT, SLICE, STATE, CallForm, Form, Literal, Numbers, Operand, Term


@dataclass(frozen=True)
class Difference:
    """A place where two graphs part though they agree on everything before it.

    Attributes:
        kind: "literal" (a number or other plain argument), "op" (another op), "operand" (another value is read),
            "missing" (a call that only the first graph has), "extra" (only the second), "tensor" (another parameter or
            buffer, or one of another shape or dtype), "constant" (a tensor that is neither, with other contents),
            "write" (another order of writes into memory), "structure" (calls, inputs and results), "guard" (the second
            graph is for fewer inputs).
        node: the node of the first graph; empty where only the second has one.
        module_path: the module that the op ran in.
        argument: the argument by the name in the op's schema, with its place in a list: ``size[2]``.
        ours, theirs: what the two graphs have there.
        source, their_source: the user's lines.
    """

    kind: str
    node: str = ""
    module_path: str = ""
    argument: str = ""
    ours: Any = None
    theirs: Any = None
    source: str = ""
    their_source: str = ""


def differences(ours: Traced, theirs: Traced) -> list[Difference]:
    """Where two programs compute something else.

    An empty list is a proof, by op and literal, that both compute the same function of their inputs and of the
    parameters and buffers of the same names: in every call and mode of the first, its writes into buffers included, for
    every input that the first one's guards admit. Floats are taken as equal up to
    :data:`~fxgrow.landing.terms.TOLERANCE`. What a number may be written as does not matter: ``-1`` in a view, a
    default that is spelled out, ``split`` or ``split_with_sizes``, an ``eps`` that the op implies.

    Args:
        ours: the grown program.
        theirs: a trace of a class that is to compute the same, with the same example.

    Returns:
        The roots: places whose operands agree and which differ themselves. What follows from them is left out.
    """
    numbers = Numbers()
    forms = Form(ours, numbers), Form(theirs, numbers)
    found: list[Difference] = []
    for here, there, training in _pairs(ours, theirs, found):
        mine, other = ours.calls[here], theirs.calls[there]
        found.extend(_inputs(mine, other))
        fixed = {
            name: [a if b is None else b for a, b in zip(sizes, other.sizes.get(name, sizes), strict=False)]
            for name, sizes in mine.sizes.items()
        }
        one, two = forms[0].call(here, training, fixed), forms[1].call(there, training, fixed)
        if not _same(one, two):
            found.extend(_Roots(one, two).find())
    unique = {(d.kind, d.node, d.module_path, d.argument, str(d.ours), str(d.theirs)): d for d in found}
    return list(unique.values())


def _same(one: CallForm, two: CallForm) -> bool:
    def keys(values: Mapping[str, Literal | Operand]) -> dict[str, Any]:
        return {n: v.form if isinstance(v, Literal) else ("value", v.key) for n, v in values.items()}

    writes = ({n: t.number for n, t in form.writes.items()} for form in (one, two))
    return keys(one.outputs) == keys(two.outputs) and next(writes) == next(writes)


# calls and inputs -----------------------------------------------------------------------------------------------------


def _pairs(ours: Traced, theirs: Traced, found: list[Difference]) -> Iterator[tuple[int, int, bool | None]]:
    """Calls of the two programs that answer each other, in a mode or in any."""
    for here, call in enumerate(ours.calls):
        same = {c.training: n for n, c in enumerate(theirs.calls) if c.name == call.name}
        modes = [None] if None in same and call.training is None else [True, False]
        for training in modes if call.training is None else [call.training]:
            there = same.get(training, same.get(None))
            if there is not None:
                yield here, there, training
                continue
            mode = {True: "train", False: "eval", None: "any"}[training]
            found.append(
                Difference("structure", argument=f"call {call.name}, {mode} mode", ours="captured", theirs=None)
            )


def _inputs(ours: Call, theirs: Call) -> Iterator[Difference]:
    """What the second call does not take that the first does."""
    for what in ("inputs", "constants", "nested", "treespec"):
        mine, other = getattr(ours, what), getattr(theirs, what)
        if mine != other:
            yield Difference("structure", argument=f"{what} of call {ours.name}", ours=mine, theirs=other)
    for name, sizes in theirs.sizes.items():
        for i, (a, b) in enumerate(zip(ours.sizes.get(name, ()), sizes, strict=False)):
            if b is not None and a != b:
                yield Difference("guard", argument=f"{name}.shape[{i}]", ours="any" if a is None else a, theirs=b)
    for guard in theirs.guards:
        if not any(_implies(mine, guard) for mine in ours.guards) and not _fixed(ours, guard):
            yield Difference(
                "guard",
                argument=guard.condition,
                ours=_nearest(ours.guards, guard),
                theirs=guard.condition,
                their_source=guard.source,
            )


def _implies(mine: Guard, other: Guard) -> bool:
    if mine.condition == other.condition:
        return True
    a, b = bound_of(mine), bound_of(other)
    return a is not None and b is not None and a[0] == b[0] and a[1] <= b[1]


def _fixed(call: Call, guard: Guard) -> bool:
    """Whether every size that the guard is about is fixed, and holds there."""
    names = inputs_of(guard.condition)
    shapes = {n: call.sizes.get(n, [None]) for n in names}
    return all(s is not None for n in names for s in shapes[n]) and broken([guard], shapes) is None  # type: ignore[arg-type]


def _nearest(guards: Sequence[Guard], other: Guard) -> str | None:
    """The bound of the same size, where there is one."""
    bound = bound_of(other)
    return next((g.condition for g in guards if bound and (own := bound_of(g)) and own[0] == bound[0]), None)


# roots ----------------------------------------------------------------------------------------------------------------


class _Roots:
    """The differences of two calls that differ somewhere.

    The calls of ops are set side by side, module by module in order. Two that stand side by side are taken for one
    value from there on, whatever they differ in, so that what follows from a difference is none.
    """

    def __init__(self, one: CallForm, two: CallForm) -> None:
        self.one, self.two = one, two
        self.mine, self.theirs = one.reached(), two.reached()
        self.partner: dict[Term, Term] = {}
        self.back: dict[Term, Term] = {}
        self._align([t for t in self.mine if not t.is_leaf], [t for t in self.theirs if not t.is_leaf])

    def find(self) -> list[Difference]:
        found: list[Difference] = []
        for term in self.mine:
            if term in self.partner:
                found.extend(self._call(term, self.partner[term]))
            elif not term.is_leaf:
                found.append(_difference("missing", term, None, argument=term.op, ours=_factor(term)))
        for term in self.theirs:
            if not term.is_leaf and term not in self.back:
                found.append(_difference("extra", None, term, argument=term.op, theirs=_factor(term)))
        found.extend(self._results())
        return found or [Difference("structure", argument="order of ops", ours="another", theirs="another")]

    def _align(self, mine: Sequence[Term], theirs: Sequence[Term]) -> None:
        groups: dict[str, tuple[list[Term], list[Term]]] = {}
        for i, terms in enumerate((mine, theirs)):
            for term in terms:
                groups.setdefault(info_of(term.node).module_path, ([], []))[i].append(term)
        for here, there in groups.values():
            matcher = difflib.SequenceMatcher(None, [t.op for t in here], [t.op for t in there], autojunk=False)
            for tag, a, b, c, d in matcher.get_opcodes():
                if tag == "equal" or (tag == "replace" and b - a == d - c):
                    for x, y in zip(here[a:b], there[c:d], strict=True):
                        self.partner[x], self.back[y] = y, x

    def _call(self, a: Term, b: Term) -> Iterator[Difference]:
        if a.number == b.number:
            return
        if a.op != b.op:
            yield _difference("op", a, b, ours=a.op, theirs=b.op)
            return
        if a.op == SLICE and a.argument and b.argument:
            if any(a.literals[n].form != b.literals[n].form for n in a.literals):
                yield _split(a, b)
        else:
            for name in dict.fromkeys([*a.literals, *b.literals]):
                x, y = a.literals.get(name), b.literals.get(name)
                if x is not None and y is not None:
                    if x.form != y.form:
                        yield _literal(a, b, name, x, y)
                elif name not in (b.operands if y is None else a.operands):
                    yield _literal(a, b, name, x, y)
        for name in dict.fromkeys([*a.operands, *b.operands]):
            p, q = a.operands.get(name), b.operands.get(name)
            if p is not None and q is not None:
                yield from self._operand(a, b, name, p, q)
            else:
                yield _difference(
                    "operand", a, b, name, _shown(p or a.literals.get(name)), _shown(q or b.literals.get(name))
                )

    def _operand(self, a: Term | None, b: Term | None, name: str, p: Operand, q: Operand) -> Iterator[Difference]:
        if p.key == q.key:
            return
        yield from self._value(a, b, name, p.term, q.term)
        if p.write is None and q.write is None:
            return
        if p.write is None or q.write is None or not self._one(p.write, q.write):
            yield _difference("write", a, b, name, _written(p.write), _written(q.write))

    def _value(self, a: Term | None, b: Term | None, name: str, x: Term, y: Term) -> Iterator[Difference]:
        if self._one(x, y):
            return
        x, y = self._through(x, self.partner), self._through(y, self.back)
        if self._one(x, y):
            return
        if x.op == y.op == STATE:
            if x.literals["name"].form != y.literals["name"].form:
                yield _difference("tensor", a, b, name, _shown(Operand(x)), _shown(Operand(y)))
                return
            for what in ("shape", "dtype"):
                if x.literals[what].form != y.literals[what].form:
                    yield _difference("tensor", x, y, what, x.literals[what].written, y.literals[what].written)
        elif x.op == y.op == CONSTANT:
            yield _difference(
                "constant", x, y, "contents", x.literals["contents"].written, y.literals["contents"].written
            )
        else:
            yield _difference("operand", a, b, name, _shown(Operand(x)), _shown(Operand(y)))

    def _one(self, x: Term, y: Term) -> bool:
        """Whether two values are the same, or stand side by side."""
        return x.number == y.number or self.partner.get(x) is y

    def _through(self, term: Term, known: Mapping[Term, Term]) -> Term:
        """What a call that stands alone was given: that it stands alone has been said."""
        while term not in known and not term.is_leaf and term.operands:
            term = next(iter(term.operands.values())).term
        return term

    def _results(self) -> Iterator[Difference]:
        for name in dict.fromkeys([*self.one.outputs, *self.two.outputs]):
            p, q = self.one.outputs.get(name), self.two.outputs.get(name)
            if isinstance(p, Operand) and isinstance(q, Operand):
                yield from self._operand(None, None, f"output{name}", p, q)
            elif not (isinstance(p, Literal) and isinstance(q, Literal) and p.form == q.form):
                yield Difference("structure", argument=f"output{name}", ours=_shown(p), theirs=_shown(q))
        for names in dict.fromkeys([*self.one.writes, *self.two.writes]):
            x, y = self.one.writes.get(names), self.two.writes.get(names)
            if x is None or y is None or not self._one(x, y):
                yield _difference("write", x, y, ", ".join(names), _written(x), _written(y))


def _difference(
    kind: str, a: Term | None, b: Term | None, argument: str = "", ours: Any = None, theirs: Any = None
) -> Difference:
    here, there = (None if t is None else info_of(t.named) for t in (a, b))
    return Difference(
        kind,
        node="" if a is None else a.named.name,
        module_path=next((x.module_path for x in (here, there) if x is not None), ""),
        argument=argument,
        ours=ours,
        theirs=theirs,
        source="" if here is None else here.source,
        their_source="" if there is None else there.source,
    )


def _literal(a: Term, b: Term, name: str, x: Literal | None, y: Literal | None) -> Difference:
    return _difference("literal", a, b, name, None if x is None else x.written, None if y is None else y.written)


def _split(a: Term, b: Term) -> Difference:
    """Two splits into other parts, by the argument that says it; equal parts by the size of one."""
    assert a.origin is not None and b.origin is not None
    mine, other = bound_arguments(a.origin)[a.argument], bound_arguments(b.origin)[b.argument]

    def plain(value: Any, argument: str) -> Any:
        same = argument == "split_sizes" and len(set(map(str, value))) == 1 and isinstance(value[0], int)
        return value[0] if same and a.argument != b.argument else value

    return _difference("literal", a, b, b.argument, plain(mine, a.argument), plain(other, b.argument))


def _factor(term: Term) -> Any:
    """The number of a call that has one, such as a product with a constant."""
    numbers = [x.written for x in term.literals.values() if isinstance(x.written, float)]
    return numbers[0] if len(numbers) == 1 else None


def _shown(value: Operand | Literal | None) -> Any:
    if isinstance(value, Operand):
        leaf = value.term.op in (INPUT, STATE)
        return value.term.literals["name"].written if leaf else value.term.node.name
    return None if value is None else value.written


def _written(term: Term | None) -> str | None:
    return None if term is None else f"written by {term.node.name}"


# words ---------------------------------------------------------------------------------------------------------------


def described(d: Difference, who: str = "the class") -> str:
    """A difference for people, between the growth and ``who``."""
    where = f"{d.node or 'the graph'} in {d.module_path or 'the model'}"
    lines = " and ".join(dict.fromkeys(x for x in (d.source, d.their_source) if x))
    at = f" ({lines})" if lines else ""
    if d.kind == "missing":
        by = f" by {d.ours:g}" if isinstance(d.ours, float) else ""
        what = "multiplies" if "mul" in d.argument else f"runs {d.argument}"
        return f"{where}: the growth {what}{by}, {who} does not{at}"
    if d.kind == "extra":
        by = f" ({d.theirs:g})" if isinstance(d.theirs, float) else ""
        return f"{where}: {who} runs {d.argument}{by}, the growth does not{at}"
    ours, theirs = (f"{v:.10g}" if isinstance(v, float) else _short(v) for v in (d.ours, d.theirs))
    return f"{where}, {d.kind} {d.argument}: the growth needs {ours}, {who} has {theirs}{at}"


def _short(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        first = "" if value.is_meta else f" that begins with {value.flatten()[:3].tolist()}"
        return f"a tensor of shape {tuple(value.shape)}{first}"
    return str(value)
