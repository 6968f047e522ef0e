"""How a copy of a block is the identity: parameters that make its branches zero, and ops that leave its input as it is.

A block that returns ``f(s * x + a(x) + b(x))`` returns ``x`` where its branches are zero, the scale is one and
``f(x) = x``: where there is no ``f``, or one that undoes what the block did to the order of the entries, or a ReLU
whose input has gone through a ReLU before. A branch is zero where the last parameters that multiply it are: those of a
linear layer or a norm, a layer scale, or the weight ``w`` of a norm that multiplies by ``1 + w``, which then is -1.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fxgrow.algebra import Conflict, Unifier, axes_of, same_size
from fxgrow.analysis.context import AnalysisContext
from fxgrow.emit.blocks import Region
from fxgrow.ir.memory import Memory, viewed, writes
from fxgrow.ir.nodes import info_of
from fxgrow.ir.ops import bound_arguments, op_name
from fxgrow.ir.sizes import sizes_of
from fxgrow.rules.base import (
    casts,
    copies,
    detaches,
    factors,
    idempotent,
    keeps_zero,
    moves,
    not_negative,
    reads,
    rule_of,
    selects,
    weights,
)
from fxgrow.rules.forms import Pointwise, along_of

Values = dict[str, float]  # parameter -> what it has to hold in every entry


@dataclass
class Identity:
    """The search for an identity of one block of one call.

    Attributes:
        region: the block that is copied.
        source: its input that its output replaces.
        before: the value that the copy is given in its place, and the last op of the block that makes it.
        parameters: trained ones, by name.
        is_zero: whether a parameter is zero now.
        why: of no identity, the op that is in its way and its line.
        drops: ops that drop entries of the sum in train mode.
    """

    region: Region
    source: fx.Node
    before: tuple[fx.Node, fx.Node]
    memory: Memory
    parameters: Mapping[str, torch.Tensor]
    is_zero: Callable[[str], bool] = lambda _: False
    why: str = field(init=False, default="")
    drops: list[fx.Node] = field(init=False, default_factory=list)
    _inside: set[fx.Node] = field(init=False)
    _path: list[tuple[fx.Node, fx.Node]] = field(init=False, default_factory=list)
    _failed: list[tuple[fx.Node, str]] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self._inside = set(self.region.nodes)

    def find(self) -> Values | None:
        """The parameters to set, and to what; None where the copy is no identity whatever they are."""
        (out,) = stream_outputs(self.region)
        terms = self._terms(out)
        self._chain = {node for node, _ in self._path}
        if terms is None:
            return self._give_up(*self._first_failure(out))
        if not terms:
            return self._give_up(out, "it returns its input, whatever its parameters")
        if (write := self.write_into_input()) is not None:
            return self._give_up(write, "it writes into the block's input")
        if not self._keeps_order():
            return self._give_up(out, "the entries of the sum come out in another order than those of the input")
        if any(isinstance(t, int | float) and t != 0 for t in terms):
            return self._give_up(out, "a number is added to the block's input")
        found = [t if isinstance(t, dict) else self._zero(t) for t in terms]
        values = merged(found)
        if values is None and None in found:
            return self._give_up(*self._failed[-1])
        if values is None:
            return self._give_up(out, "one parameter would have to hold two numbers")
        return values or self._give_up(out, "no parameter of the block's own makes a difference to it")

    def _give_up(self, node: fx.Node, why: str) -> Values | None:
        self.why = f"{at(node)}: {why}"
        return None

    def _fail(self, node: fx.Node, why: str) -> Values | None:
        self._failed.append((node, why))
        return None

    def _first_failure(self, out: fx.Node) -> tuple[fx.Node, str]:
        """Where the way from the output back to the input ends: the last op on it that is no sum."""
        inside = [(node, why) for node, why in self._failed if node in self._inside]
        told = [f for f in inside if f[1]]
        return (told or [(max((n for n, _ in inside), key=lambda n: self.memory.place[n], default=out), _NO_SUM)])[0]

    def write_into_input(self) -> fx.Node | None:
        """An op that writes into the block's input, other than to add a branch to it."""
        for node in self.region.nodes:
            for target in writes(node):
                if node not in self._chain and self.source in self.memory.sharing(target):
                    return node
        return None

    def write_elsewhere(self) -> tuple[fx.Node, fx.Node] | None:
        """An op that writes into memory that other blocks see too, and that memory."""
        for node in self.region.nodes:
            for target in writes(node):
                sharing = self.memory.sharing(target)
                foreign = [v for v in sharing if v in self.region.inputs or self._is_foreign(v)]
                if foreign and self.source not in sharing:
                    return node, foreign[0]
        return None

    def _is_foreign(self, value: fx.Node) -> bool:
        return value.op == "get_attr" and not str(value.target).startswith(self.region.path + ".")

    # the sum ---------------------------------------------------------------------------------------------------------

    def _terms(self, out: fx.Node) -> list[Any] | None:
        """What has to be zero, or set, for ``out = source + f + ...`` to be its source; None where it is no sum."""
        out = same_value(out)
        if out is self.source:
            return []
        if out in self._inside:
            for carrier, terms in self._sums(out):
                rest = self._terms(carrier)
                if rest is not None:
                    self._path.append((out, carrier))
                    return [*rest, *terms]
            if not carriers(out):
                self._fail(out, "")
        return None

    def _sums(self, out: fx.Node) -> Iterator[tuple[fx.Node, list[Any]]]:
        """The operands that an op may pass on, and what that takes of its others: to be zero, or parameters to set."""
        name, args = _plain(out), bound_arguments(out)
        for carrier in carriers(out):
            if sizes_of(carrier) != sizes_of(out) and not _reorders(out):
                continue
            others = [a for n, a in args.items() if n in _TERMS and a is not carrier]
            if name in _SUMS:
                yield carrier, others
            elif name in _PRODUCTS:
                scale = [1.0 if o == 1 else self._solve(o, 1.0) for o in others]
                if None not in scale:
                    yield carrier, [v for v in scale if isinstance(v, dict)]
            elif name == "aten.addcmul.default":
                zero = (self._zero(o) for o in (args["tensor1"], args["tensor2"]))
                found = next((values for values in zero if values is not None), None)
                if found is not None:
                    yield carrier, [found]
            elif name == "aten.lerp.Tensor":
                weight = self._solve(args["weight"], 0.0 if carrier is args["self"] else 1.0)
                if weight is not None:
                    yield carrier, [weight]
            elif drops_of_stream(out):
                self.drops.append(out)
                yield carrier, []
            elif _reorders(out) or self._fixed(self.before[0], out):
                yield carrier, []
            else:
                self._fail(out, "it changes what it is given, as that has not gone through it before")

    def _keeps_order(self) -> bool:
        """Whether the ops that move the entries of the sum undo each other: followed dim by dim, by their rules."""
        if not any(_reorders(node) for node, _ in self._path):
            return True
        unifier = Unifier()
        start = [unifier.fresh(size) for size in sizes_of(self.source) or []]
        dims: dict[fx.Node, Any] = {self.source: start}
        ctx = AnalysisContext(unifier, dims)
        for node, carrier in self._path:
            given = dims[carrier]
            if _reorders(node):
                rule = rule_of(node)
                ctx.at(node)
                dims[node.all_input_nodes[0]] = given
                try:
                    given = rule.relate(ctx) if rule is not None else None
                except Conflict:
                    given = None
                if given is None or ctx.freezes:
                    return False
            dims[node] = given
        end = dims[self._path[-1][0]]
        return [[a.id for a in axes_of(d)] for d in end] == [[a.id for a in axes_of(d)] for d in start]

    def _fixed(self, value: fx.Node, f: fx.Node) -> bool:
        """Whether ``f(value) = value``: the value has gone through ``f``, or cannot be what ``f`` changes."""
        value = same_value(value)
        if value.op != "call_function" or self._written_after(value):
            return False
        name, mine = _plain(f), _plain(value)
        if mine == name and _literals(value) == _literals(f):
            return True
        relu, row = name == "aten.relu.default", along_of(value)
        if relu and not_negative(value):
            return True
        operands = value.all_input_nodes
        if mine in ("aten.cat.default", "aten.concat.default"):
            return all(self._fixed(o, f) for o in operands)
        # what is not negative stays so when it is averaged, or scaled up
        averages = mine == "aten.dropout.default" or (row is not None and row.kind == "mean")
        passes = viewed(value) == operands[:1] or copies(value) or selects(value) or (relu and averages)
        return passes and bool(operands) and self._fixed(operands[0], f)

    def _written_after(self, value: fx.Node) -> bool:
        """Whether an op may have changed the value by the time that the copy is given it."""
        place, end = self.memory.place, self.memory.place[self.before[1]]
        return any(place[value] < place[w] <= end for w in self.memory.writers(value))

    # what makes a branch zero ----------------------------------------------------------------------------------------

    def _zero(self, node: object) -> Values | None:
        """Parameters that make a value zero; the last ones that can."""
        if not isinstance(node, fx.Node):
            return {} if node == 0 else None
        if node not in self._inside:
            return self._solve(node, 0.0)
        if len([u for u in node.users if reads(u, node)]) > 1:
            return self._fail(node, "its value is also used elsewhere in the block")
        name, args = _plain(node), bound_arguments(node)
        if layer := weights(node):
            found = merged([self._solve(v, 0.0) for v in layer])
            return found if found is not None else self._fail(node, "its parameters are not the block's alone to set")
        if product := factors(node):
            return self._zero_factor(node, product)
        operands = [a for a in args.values() if isinstance(a, fx.Node) and isinstance(a.meta.get("val"), torch.Tensor)]
        if name in ("aten.add.Tensor", "aten.sub.Tensor") and len(operands) == 2:
            return merged([self._zero(o) for o in operands])
        if (len(operands) == 1 and keeps_zero(node)) or casts(node):
            return self._zero(operands[0])
        return self._fail(node, "no parameter behind it makes the branch zero")

    def _zero_factor(self, node: fx.Node, product: list[fx.Node]) -> Values | None:
        """The first factor that can be zero; one that is zero already before all others, as two would never learn."""
        inner = [o for o in product if o in self._inside]
        found = (self._zero(o) for o in inner), (self._solve(o, 0.0) for o in product)
        values = [v for v in itertools.chain(*found) if v]
        silent = [v for v in values if all(self.is_zero(name) for name in v)]
        if not values:
            return self._fail(node, "none of its factors is a parameter of the block's own, or a layer's result")
        return (silent or values)[0]

    def _solve(self, value: object, target: float) -> Values | None:
        """The one parameter of the block's own that a value is made of, and what makes the value ``target``."""
        if not isinstance(value, fx.Node) or len(self._readers(value)) > 1:
            return None
        if value.op == "get_attr":
            name = str(value.target)
            own = name.startswith(self.region.path + ".") and name in self.parameters and not self.memory.written(value)
            exact = own and float(torch.tensor(target, dtype=self.parameters[name].dtype)) == target
            return {name: target} if exact else None
        if value.op != "call_function":
            return None
        name, args = op_name(value.target), bound_arguments(value)
        other = args.get("other")
        if isinstance(other, int | float) and args.get("alpha", 1) == 1:
            if name in ("aten.add.Tensor", "aten.add.Scalar"):
                return self._solve(args["self"], target - other)
            if name in ("aten.sub.Tensor", "aten.sub.Scalar"):
                return self._solve(args["self"], target + other)
            if name in ("aten.rsub.Tensor", "aten.rsub.Scalar"):
                return self._solve(args["self"], other - target)
        if len(value.all_input_nodes) != 1:
            return None
        passes = viewed(value) == value.all_input_nodes or copies(value) or casts(value)
        return self._solve(value.args[0], target) if passes or (target == 0 and keeps_zero(value)) else None

    def _readers(self, value: fx.Node) -> set[fx.Node]:
        return {u for u in value.users if _same_call(u, self.region.call) and reads(u, value)}


_NO_SUM = "what it gives is no sum of the block's input and branches"

#: the operands of sums and products that may be what a block was given
_TERMS = ("self", "other", "input", "end")
_SUMS = ("aten.add.Tensor", "aten.add.Scalar", "aten.sub.Tensor", "aten.sub.Scalar")
_PRODUCTS = ("aten.mul.Tensor", "aten.mul.Scalar", "aten.div.Tensor", "aten.div.Scalar")


def carriers(node: fx.Node) -> list[fx.Node]:
    """The operands that a call passes on, unscaled, where its others are zero, or one where they multiply."""
    name, args = _plain(node), bound_arguments(node)
    first, second = args.get("self", args.get("input")), args.get("other")
    found: list[Any] = []
    if name in ("aten.add.Tensor", "aten.mul.Tensor"):
        found = [first, second] if args.get("alpha", 1) == 1 else [first]
    elif name in _SUMS or name in _PRODUCTS or name == "aten.addcmul.default" or drops_of_stream(node):
        found = [first]
    elif name == "aten.lerp.Tensor":
        found = [first, args["end"]]
    elif idempotent(node) or _reorders(node):
        found = [node.args[0]]
    return [n for n in found if isinstance(n, fx.Node)]


def drops_of_stream(node: fx.Node) -> bool:
    """Whether a call drops entries at random in train mode, and leaves their mean as it is."""
    rule = rule_of(node)
    return isinstance(rule, Pointwise) and bool(rule.drawn) and rule.mean is True


def _reorders(node: fx.Node) -> bool:
    """Whether a call gives all entries of its operand under other sizes, or in another order of dims."""
    views = viewed(node)
    if not moves(node) or detaches(node) or writes(node) or len(views) != 1 or views != node.all_input_nodes[:1]:
        return False
    before, after = (n.meta.get("val") for n in (views[0], node))
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return False
    if before.dtype != after.dtype or after.is_complex():  # it may be conjugated
        return False
    return same_size(*(math.prod(sizes_of(n) or [0]) for n in (views[0], node)))


def stream_outputs(region: Region) -> list[fx.Node]:
    """The tensors of a block that are used outside it; its sizes are the same wherever they are computed."""
    return [n for n in region.outputs if isinstance(n.meta.get("val"), torch.Tensor | list | tuple)]


def at(node: fx.Node) -> str:
    """An op, and the user's line where it is known."""
    source = info_of(node).source
    return f"{node.target} at {source}" if source else str(node.target)


def merged(found: Iterable[Values | None]) -> Values | None:
    """One assignment for all; None where one is missing, or two contradict each other."""
    out: Values = {}
    for values in found:
        if values is None or any(out.get(n, v) != v for n, v in values.items()):
            return None
        out |= values
    return out


def same_value(node: fx.Node) -> fx.Node:
    """Through casts to the dtype the value has already (``x.float()`` in a float32 model) and copies of it."""
    while (copies(node) and not detaches(node)) or casts(node):
        source = node.all_input_nodes[0]
        before, after = source.meta.get("val"), node.meta.get("val")
        if any(getattr(before, fact, None) != getattr(after, fact, None) for fact in ("dtype", "device")):
            break
        node = source
    return node


def _same_call(node: fx.Node, call: int) -> bool:
    return bool(info_of(node).call == call)


def _plain(node: fx.Node) -> str:
    """The op's name, without the mark of one that writes in place."""
    return op_name(node.target).replace("_.", ".")


def _literals(node: fx.Node) -> dict[str, object]:
    return {n: a for n, a in bound_arguments(node).items() if n not in ("self", "input")}


__all__ = ["Identity", "Values", "at", "carriers", "merged", "same_value", "stream_outputs"]
