"""Where the factor of a number in the graph can go: into parameters, so that every value that matters stays as it is.

A number that is written in the graph is to have another value, and what it multiplies makes up for it. So a value
takes a factor, and with it whatever it is made of, and whatever is made of it, up to where another factor takes it
back. Each op says how the factors of its operands and of its result go together (:class:`Law`); those of inputs and
outputs are 1, and only parameters have one by themselves. A search assigns factors to values until every law holds,
by propagation, and by trial where an op leaves a choice.

A factor is of a whole value, or of the part of it that comes from some rows of a parameter (the queries of a fused
projection, :mod:`fxgrow.proof.tagged`). All are positive.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import fx

from fxgrow.algebra import Conflict
from fxgrow.analysis.axes import Axes
from fxgrow.ir.nodes import info_of
from fxgrow.ir.ops import bound_arguments, nodes_among, op_name
from fxgrow.ir.sizes import result_sizes
from fxgrow.proof.tagged import TaggedCall, parts_of, possible, tagged
from fxgrow.rules.base import FAMILIES, casts, is_linear, jumping_operands, moves, reads, rule_of, value_of, weights
from fxgrow.rules.forms import Along, Pattern, Pointwise

#: how often a search may fail before it is given up, and all searches together before the rest get a few attempts each
_FAILURES, _IN_ALL, _FEW = 40, 200, 4

_ADDS = ("aten.add.Tensor", "aten.sub.Tensor", "aten.rsub.Tensor")
_PRODUCTS = ("aten.mul.Tensor", "aten.mul.Scalar")
_QUOTIENTS = ("aten.div.Tensor", "aten.div.Scalar")
_POWERS = {"aten.square.default": 2.0, "aten.sqrt.default": 0.5, "aten.rsqrt.default": -0.5}
_POWERS |= {"aten.reciprocal.default": -1.0}
#: f(c x) = c f(x) for positive c
_POSITIVE = ("aten.relu.default", "aten.leaky_relu.default", "aten.abs.default", "aten.alias.default")
_SCORES = "aten.scaled_dot_product_attention.default"


@dataclass(frozen=True)
class Part:
    """The factor of the entries of a value that come from some parts of a parameter; ``dims`` are tagged."""

    factor: float
    parts: frozenset[int]
    every: frozenset[int]
    dims: Any = field(compare=False)


@dataclass(frozen=True)
class About:
    """The factor of a weight's sum with a number: of 1 + w, where a norm multiplies by that."""

    factor: float
    about: float


Factor = float | Part | About


@dataclass(frozen=True)
class Law:
    """How the factors of an op's operands and of its result go together.

    Attributes:
        product: operands whose factors, each to its power, multiply to that of the result.
        same: operands that have the factor of the result: terms of a sum, biases.
        held: operands that have none.
        result: the result may have one.
        added: the number that is added to the one operand; their sum may have one.
    """

    product: tuple[tuple[fx.Node, float], ...] = ()
    same: tuple[fx.Node, ...] = ()
    held: tuple[fx.Node, ...] = ()
    result: bool = True
    added: float = 0.0


@dataclass(frozen=True)
class Site:
    """A number in the graph that is to have another value, which its op makes up for by a factor.

    Attributes:
        node: the op.
        factor: what the factors of the operands then multiply to.
        kind: ``product``: over the factor of the result; ``scores``: those of queries and keys; ``statistic``: that of
            the one operand, which is normalised.
    """

    node: fx.Node
    factor: float
    kind: Literal["product", "scores", "statistic"] = "product"


@dataclass(frozen=True)
class Found:
    """Factors of parameters that let numbers take other values: of a whole one, of its sum with a number, of a part."""

    sites: tuple[fx.Node, ...]
    whole: Mapping[str, float]
    sums: Mapping[str, tuple[float, float]]
    parts: Mapping[str, tuple[int, frozenset[int], float]]


class Factors:
    """Searches for factors in a graph.

    Args:
        axes: of its program, as it is now.
        scalable: whether a parameter, or its sum with a number, may be multiplied.
        sites: all numbers that are to have other values; those that a search comes across are taken with it.
    """

    def __init__(self, axes: Axes, scalable: Callable[[str, float], bool], sites: Sequence[Site]) -> None:
        self.axes, self.scalable = axes, scalable
        self.sites = {s.node: s for s in sites}
        self.laws: dict[fx.Node, Law | None] = {}
        self.able: dict[tuple[fx.Node, float], bool] = {}
        self.why, self.failures = "", 0

    @functools.cached_property
    def readers(self) -> dict[str, list[fx.Node]]:
        """The nodes of every tensor."""
        out: dict[str, list[fx.Node]] = {}
        for node in self.axes.program.graph.nodes:
            if node.op == "get_attr":
                out.setdefault(str(node.target), []).append(node)
        return out

    def find(self, node: fx.Node) -> Found | None:
        """Factors that let the number of a site take its value; None where there are none, and ``why`` says so."""
        search = _Search(self, node, _FAILURES if self.failures < _IN_ALL else _FEW)
        found = search.run()
        self.failures += search.failures
        self.why = "" if found is not None else search.why
        return found

    def settle(self, node: fx.Node) -> None:
        """The number of a site has its value."""
        del self.sites[node]

    def may(self, node: fx.Node, about: float = 0.0) -> bool:
        """Whether a value, or its sum with a number, may have a factor at all."""
        if (node, about) not in self.able:
            if node.op == "get_attr":
                able = self.scalable(str(node.target), about) and node in self.axes.dims
            else:  # what is made of no numbers, such as an arange or a cast mask, is what it is
                able = node.op == "call_function" and self.law(node) is not None
            self.able[node, about] = able and real(node) and not self.axes.memory.written(node)
        return self.able[node, about]

    def law(self, node: fx.Node) -> Law | None:
        """The law of a node; None of what is no op on numbers, and asks nothing."""
        if node not in self.laws:
            self.laws[node] = law_of(node)
        return self.laws[node]


def real(node: Any) -> bool:
    """Whether a node's value is of real or complex numbers, or several of which one is."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    values = value if isinstance(value, list | tuple) else [value]
    return any(isinstance(v, torch.Tensor) and (v.is_floating_point() or v.is_complex()) for v in values)


def law_of(node: fx.Node) -> Law | None:
    """How factors of an op's operands and its result go together; None where there is nothing to go together."""
    operands = [n for n in node.all_input_nodes if real(n)]
    if node.op == "output":
        return Law(held=tuple(operands), result=False)
    if node.op != "call_function" or not operands:
        return None
    if not real(node):  # a number that is read out (``item``) is no size
        sizes = not any(reads(node, n) for n in operands)
        return None if sizes else Law(held=tuple(operands), result=False)
    name, rule, given = op_name(node.target), rule_of(node), bound_arguments(node)
    held = Law(held=tuple(operands), result=False)
    if rule is None:
        return held
    read = {n for a, n in nodes_among(given) if a not in rule.ignored}
    operands = [n for n in operands if n in read]
    if name == "getitem":
        return Law(same=tuple(operands))
    if (value := value_of(node)) is not None:
        return Law(held=(value,) if real(value) else (), result=False)
    if name in _PRODUCTS + _QUOTIENTS:
        other = given["other"]
        product = [(given["self"], 1.0)] if real(given["self"]) else []
        if real(other):
            product.append((other, 1.0 if name in _PRODUCTS else -1.0))
        return Law(product=tuple(product))
    if name in _POWERS:
        return Law(product=((operands[0], _POWERS[name]),))
    if name == "aten.pow.Tensor_Scalar":
        power = given["exponent"]
        fits = isinstance(power, int | float) and power != 0
        return Law(product=((operands[0], float(power)),)) if fits else held
    if name == _SCORES:
        return Law(same=(given["value"],), held=tuple(n for n in operands if n is given["attn_mask"]))
    if name in _ADDS:
        terms = [given["self"], given["other"]]
        plain = all(real(t) or (isinstance(t, int | float) and t == 0) for t in terms)
        if name == "aten.add.Tensor" and all(isinstance(v, int | float) for v in (terms[1], given["alpha"])):
            added = float(terms[1] * given["alpha"])
            plain |= added == 0.0
            if terms[0] in operands and not plain:
                return Law(added=added)
        return Law(same=tuple(operands)) if plain else held
    if isinstance(rule, Pattern) and FAMILIES.get(name) == "contraction":
        return _of_contraction(rule, given, operands)
    if layer := weights(node):
        rest = tuple(n for n in operands if n not in layer)
        return Law(same=tuple(layer), held=rest) if len(rest) + len(layer) == len(operands) else held
    if isinstance(rule, Pointwise) and rule.branches:
        return _of_branches(rule, given, operands) or held
    degree = _degree(node)
    if degree is not None and len(operands) == 1:
        return Law(same=tuple(operands)) if degree == 1 else Law(product=((operands[0], degree),))
    return Law(same=tuple(operands)) if is_linear(node) else held


def _of_contraction(rule: Pattern, given: Mapping[str, Any], operands: Sequence[fx.Node]) -> Law:
    named = [(n, v) for n, v in nodes_among(given) if real(v)]
    biases = ("bias", *rule.bias)
    return Law(
        product=tuple((v, 1.0) for n, v in named if n not in biases),
        same=tuple(v for n, v in named if n in biases),
    )


def _of_branches(rule: Pointwise, given: Mapping[str, Any], operands: Sequence[fx.Node]) -> Law | None:
    """Each entry is one of several values, of which numbers have to be 0 or infinite to keep a factor."""
    values = [given[n] for n in rule.branches]
    if any(isinstance(v, int | float) and v != 0 and not math.isinf(v) for v in values):
        return None
    chosen = [v for v in values if isinstance(v, fx.Node)]
    return Law(same=tuple(chosen)) if all(map(real, chosen)) and set(chosen) == set(operands) else None


def _degree(node: fx.Node) -> float | None:
    """The power of a positive number that multiplies the result where it multiplies the one operand; None: no power."""
    rule = rule_of(node)
    if isinstance(rule, Along):
        if rule.kind in ("mean", "sum", "extremum", "interpolation"):
            return 1.0
        alone = result_sizes(node) is None and not jumping_operands(node)  # a norm of order 0 counts
        return {"norm": 1.0, "deviation": 1.0, "variance": 2.0}.get(rule.kind) if alone else None
    affine = isinstance(rule, Pointwise) and rule.combine == "any" and rule.zero is True and rule.mean is True
    return 1.0 if affine or op_name(node.target) in _POSITIVE else None


# the search -----------------------------------------------------------------------------------------------------------


@dataclass
class _Choice:
    """A way of making a law hold: factors of values, and a site whose number takes its value."""

    factors: dict[fx.Node, Factor]
    site: fx.Node | None = None


class _Search:
    def __init__(self, factors: Factors, start: fx.Node, patience: int) -> None:
        self.factors, self.start, self.patience = factors, start, patience
        self.of: dict[fx.Node, Factor] = {}
        self.active: dict[fx.Node, None] = {}
        self.trail: list[tuple[dict[Any, Any], fx.Node]] = []
        self.failures = 0
        self.why, self._reached = "no weight takes part in it", -1

    def run(self) -> Found | None:
        self.active[self.start] = None
        dirty: dict[fx.Node, None] = {self.start: None}
        stack: list[tuple[Iterator[_Choice], int, dict[fx.Node, None]]] = []
        while True:
            choices = self._propagate(dirty)
            if choices is not None and not choices:
                return self._found()
            if choices is not None:
                stack.append((iter(choices), len(self.trail), dict(dirty)))
            else:
                self.failures += 1
            while stack:
                left, length, before = stack[-1]
                self._undo(length)
                choice = next(left, None)
                if choice is not None and self.failures <= self.patience:
                    dirty = dict(before)
                    if self._take(choice, dirty):
                        break
                    continue
                stack.pop()
            else:
                return None

    def _propagate(self, dirty: dict[fx.Node, None]) -> list[_Choice] | None:
        """Do what has to be done; then the choices of one op, none where all laws hold, or None: one cannot."""
        open_: dict[fx.Node, list[_Choice]] = {}
        while dirty:
            node = next(iter(dirty))
            del dirty[node]
            open_.pop(node, None)
            choices = self._choices(node)
            if choices is None:
                continue
            if not choices:
                self._note(node)
                return None
            if len(choices) > 1:
                open_[node] = choices
                continue
            touched: dict[fx.Node, None] = {}
            if not self._take(choices[0], touched):
                return None
            for other in touched:
                open_.pop(other, None)
            dirty |= touched
        if not open_:
            return []
        node = next(iter(open_))
        dirty |= dict.fromkeys(open_)
        return open_[node]

    def _note(self, node: fx.Node) -> None:
        """Remember where the search got farthest, for people."""
        if len(self.trail) > self._reached:
            self._reached = len(self.trail)
            at = info_of(node).source
            where = f"{op_name(node.target)}" + (f" at {at}" if at else "")
            where = "an output" if node.op == "output" else where
            self.why = f"weights that could take the factor change {where}, too"

    def _take(self, choice: _Choice, dirty: dict[fx.Node, None]) -> bool:
        if choice.site is not None and choice.site not in self.active:
            self.active[choice.site] = None
            self.trail.append((self.active, choice.site))
            dirty[choice.site] = None
        return all(self._assign(node, factor, dirty) for node, factor in choice.factors.items())

    def _assign(self, node: fx.Node, factor: Factor, dirty: dict[fx.Node, None]) -> bool:
        if node in self.of:
            return _equal(self.of[node], factor)
        if factor != 1.0 and not self.factors.may(node, factor.about if isinstance(factor, About) else 0.0):
            self._note(node)
            return False
        several = self.factors.readers[str(node.target)] if node.op == "get_attr" else [node]
        for each in several:
            if each in self.of:
                return False
            self.of[each] = factor
            self.trail.append((self.of, each))
            dirty[each] = None
            dirty |= each.users
        return True

    def _undo(self, length: int) -> None:
        while len(self.trail) > length:
            table, key = self.trail.pop()
            del table[key]

    def _found(self) -> Found:
        whole, sums, parts = {}, {}, {}
        for node, factor in self.of.items():
            if node.op == "get_attr" and factor != 1.0:
                if isinstance(factor, Part):
                    dim = next(i for i, d in enumerate(factor.dims) if len(parts_of(d)) > 1)
                    parts[str(node.target)] = (dim, factor.parts, factor.factor)
                elif isinstance(factor, About):
                    sums[str(node.target)] = (factor.factor, factor.about)
                else:
                    whole[str(node.target)] = factor
        return Found(tuple(self.active), whole, sums, parts)

    # laws

    def _get(self, node: fx.Node) -> float:
        factor = self.of.get(node, 1.0)
        assert not isinstance(factor, Part | About)
        return factor

    def _choices(self, node: fx.Node) -> list[_Choice] | None:
        """The ways of making a node's law hold; None where it does."""
        law = self.factors.law(node)
        site = self.factors.sites.get(node)
        if law is None:  # nothing could make up for a number: truth values times it
            return [] if node in self.active else None
        if any(isinstance(self.of.get(n), Part) for n in (node, *node.all_input_nodes)):
            return self._of_parts(node, law)
        if law.added or any(isinstance(self.of.get(n), About) for n in (node, *node.all_input_nodes)):
            return self._of_sum(node, law)
        if site is None:
            if op_name(node.target) == _SCORES:
                return self._of_site(node, law, Site(node, 1.0, "scores"))
            return self._of_law(node, law, 1.0)
        if node in self.active:
            return self._of_site(node, law, site)
        plain = self._of_site(node, law, Site(node, 1.0, site.kind))
        if plain is None:
            return None
        return [_Choice(c.factors, node) for c in self._of_site(node, law, site) or [_Choice({})]] + plain

    def _of_site(self, node: fx.Node, law: Law, site: Site) -> list[_Choice] | None:
        if site.kind == "product":
            return self._of_law(node, law, site.factor)
        given = bound_arguments(node)
        names = ("query", "key") if site.kind == "scores" else ("input",)
        operands = [(given[n], 1.0) for n in names]
        found = self._of_product(node, operands, site.factor, None)
        numbers = [n for n, _ in operands]
        rest = replace(law, held=tuple(n for n in law.held if n not in numbers))
        return found if found is not None else self._of_law(node, rest, 1.0)

    def _of_law(self, node: fx.Node, law: Law, factor: float) -> list[_Choice] | None:
        if any(self.of.get(n, 1.0) != 1.0 for n in law.held):
            return []
        if not law.result:
            return None if self.of.get(node, 1.0) == 1.0 else []
        tied = [node, *law.same]
        known = [n for n in tied if n in self.of]
        if known:
            value = self._get(known[0])
            if not all(_equal(self._get(n), value) for n in known):
                return []
            missing: dict[fx.Node, Factor] = {n: value for n in tied if n not in self.of}
            if value != 1.0 and missing:
                whole = [_Choice(missing)]
                if set(missing) <= set(law.same) and not law.product:
                    return self._parts_behind(node, value) + whole
                return whole
        return self._of_product(node, law.product, factor, node) if law.product else None

    def _of_product(
        self, node: fx.Node, operands: Sequence[tuple[fx.Node, float]], factor: float, result: fx.Node | None
    ) -> list[_Choice] | None:
        """The product of operands' factors is to be ``factor`` times that of the result."""
        powers: dict[fx.Node, float] = {}
        for operand, power in operands:
            powers[operand] = powers.get(operand, 0.0) + power
        total = math.prod(self._get(n) ** p for n, p in powers.items())
        wanted = factor * (1.0 if result is None else self._get(result))
        if _equal(total, wanted):
            return None
        choices = [
            (n, _Choice({n: self._get(n) * (wanted / total) ** (1 / p)}))
            for n, p in powers.items()
            if p != 0 and n not in self.of and self.factors.may(n)
        ]
        direct = [c for n, c in choices if is_parameter(n)]
        others = [c for n, c in choices if not is_parameter(n)]
        onward = []
        if result is not None and result not in self.of and self.factors.may(result):
            onward = [_Choice({result: total / factor})]
        together = []
        if len(choices) > 1:  # each takes its part: a table that is read twice
            power = sum(powers[n] for n, _ in choices)
            each = (wanted / total) ** (1 / power) if power else 1.0
            together = [_Choice({n: self._get(n) * each for n, _ in choices})] if power else []
        return direct + (others + onward if node is self.start else onward + others) + together

    # sums with numbers

    def _of_sum(self, node: fx.Node, law: Law) -> list[_Choice] | None:
        """A number is added to a value: their sum has a factor where the value is a weight, seen through casts."""
        operands = [n for n in node.all_input_nodes if real(n)]
        if node.op == "get_attr" or len(operands) != 1:
            return None if node.op == "get_attr" else []
        mine, own = self.of.get(operands[0]), self.of.get(node)
        if isinstance(mine, About):
            casting = not law.added and law.same == tuple(operands) and casts(node)
            if not casting and mine.about != law.added:
                return []
            result: Factor = mine if casting else mine.factor
            return [_Choice({node: result})] if own is None else None if _equal(own, result) else []
        if isinstance(own, About) or (mine is not None and mine != 1.0):
            return []
        if own is None or own == 1.0:
            return None
        chain = list(_down_to_parameter(operands[0])) if is_parameter(operands[0]) else []
        if mine is not None or not chain or not all(casts(n) for n in chain[:-1]) or isinstance(own, Part):
            return []
        return [_Choice(dict.fromkeys(chain, About(own, law.added)))]

    # parts

    def _of_parts(self, node: fx.Node, law: Law) -> list[_Choice] | None:
        """The result of an op on a value of which a part has a factor; all else that the op reads has none."""
        if node.op == "get_attr":
            return None
        parts = [(n, f) for n in node.all_input_nodes if isinstance(f := self.of.get(n), Part)]
        if not parts:
            return []  # it has a part's factor, and nothing says where it comes from
        first = parts[0][1]
        if any(f != first for _, f in parts) or (node in self.factors.sites and node in self.active):
            return []
        mine = {n for n, _ in parts}
        if any(self.of.get(n, 1.0) != 1.0 for n in node.all_input_nodes if n not in mine):
            return []
        factors = [n for n, _ in law.product if n in mine]
        if law.product:
            biased = all(n in mine for n in law.same)
            if len(factors) != 1 or not biased or dict(law.product)[factors[0]] != 1.0:
                return []
        elif not law.result or set(law.same) != mine or len(mine) != 1 or not _takes_apart(node):
            return []
        env = {n: f.dims for n, f in parts}
        try:
            dims = TaggedCall(self.factors.axes, env).follow(node)
        except (Conflict, NotImplementedError, AttributeError, TypeError, ValueError, AssertionError):
            return []
        result = _of_part(dims, first)
        if node in self.of:
            return None if _equal(self.of[node], result) else []
        return [_Choice({node: result})]

    def _parts_behind(self, node: fx.Node, factor: float) -> list[_Choice]:
        """Where a value is a part of a projection: the rows that it comes from."""
        chain, source = [node], node
        while _takes_apart(source) and len(operands := [n for n in source.all_input_nodes if real(n)]) == 1:
            (source,) = operands
            if source in self.of or not self.factors.may(source):
                return []
            chain.append(source)
        law = self.factors.law(source)
        if source is node or law is None or not law.product or not any(map(_cuts, chain)):
            return []
        given = [v for v, _ in law.product if is_parameter(v)]
        if len(given) != 1 or not all(map(is_parameter, law.same)):
            return []
        axes, env = self.factors.axes, dict[fx.Node, Any]()
        assigned: dict[fx.Node, Any] = {}
        every: frozenset[int] = frozenset()
        for value in (*given, *law.same):
            views = list(_down_to_parameter(value))
            tensor = views[-1]
            dims = [tagged(d) for d in axes.dims[tensor]]
            several = [d for d in dims if len(parts_of(d)) > 1]
            if len(several) != 1 or tensor in self.of:
                return []
            every = every | frozenset(range(len(parts_of(several[0]))))
            env[tensor] = assigned[tensor] = dims
            chain += views[:-1]
        # from the parameters to the value
        order = sorted(dict.fromkeys(chain), key=lambda n: axes.memory.place[n])
        try:
            for each in order:
                env[each] = TaggedCall(axes, env).follow(each)
        except (Conflict, NotImplementedError, AttributeError, TypeError, ValueError, AssertionError):
            return []
        parts = possible(env[node], every)
        if parts == every:
            return []
        part = Part(factor, parts, every, None)
        values = {**assigned, **{n: env[n] for n in order if n is not node}}
        return [_Choice({n: _of_part(dims, part) for n, dims in values.items()})]


def _of_part(dims: Any, part: Part) -> Factor:
    """The factor of a value with tagged dims, where the entries of a part have one."""
    left = possible(dims, part.every)
    if left <= part.parts:
        return part.factor
    return replace(part, dims=dims) if left & part.parts else 1.0


def _equal(a: Factor, b: Factor) -> bool:
    if isinstance(a, Part | About) or isinstance(b, Part | About):
        return a == b
    return abs(a - b) <= 1e-12 * abs(b)


def _down_to_parameter(value: fx.Node) -> Iterator[fx.Node]:
    yield value
    while value.op != "get_attr":
        value = value.all_input_nodes[0]
        yield value


def is_parameter(value: fx.Node) -> bool:
    """Whether a value is a tensor of the model, seen through ops that move entries."""
    while value.op == "call_function" and moves(value) and len(value.all_input_nodes) == 1:
        value = value.all_input_nodes[0]
    return value.op == "get_attr"


def _takes_apart(node: fx.Node) -> bool:
    """Whether an op moves entries of its operand, or some of them."""
    return moves(node) or is_linear(node) or op_name(node.target) == "getitem"


def _cuts(node: fx.Node) -> bool:
    """Whether an op takes a part of its operand."""
    return result_sizes(node) is not None or op_name(node.target) in ("getitem", "aten.slice.Tensor", "aten.select.int")


__all__ = ["Factors", "Found", "Law", "Site", "is_parameter", "law_of"]
