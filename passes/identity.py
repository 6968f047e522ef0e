"""How a copy of a block is the identity: parameters that make its branches zero, and ops that leave its input as it is.

A block that returns ``f(x + a(x) + b(x))`` returns ``x`` where its branches are zero and ``f(x) = x``: where there is
no ``f``, or a ReLU whose input has gone through a ReLU before. A branch is zero where the last parameters that multiply
it are: those of a linear layer or a norm, a layer scale, or the weight ``w`` of a norm that multiplies by ``1 + w``,
which then is -1.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import fx

from fxgrow.emit.blocks import Region
from fxgrow.ir.memory import Memory, viewed, writes
from fxgrow.ir.nodes import info_of
from fxgrow.ir.ops import bound_arguments, op_name
from fxgrow.rules.base import casts, copies, detaches, factors, idempotent, keeps_zero, not_negative, selects, weights
from fxgrow.rules.forms import along_of

Values = dict[str, float]  # parameter -> what it has to hold in every entry


@dataclass
class Identity:
    """The search for an identity of one block of one call.

    Attributes:
        region: the block that is copied.
        source: its input that its output replaces.
        before: the value that the copy is given in its place, and the last op of the block that makes it.
        parameters: trained ones, by name.
    """

    region: Region
    source: fx.Node
    before: tuple[fx.Node, fx.Node]
    memory: Memory
    parameters: Mapping[str, torch.Tensor]
    _inside: set[fx.Node] = field(init=False)
    _chain: set[fx.Node] = field(init=False, default_factory=set)

    def __post_init__(self) -> None:
        self._inside = set(self.region.nodes)

    def find(self) -> Values | None:
        """The parameters to set, and to what; None where the copy is no identity whatever they are."""
        terms = self._terms(self.region.outputs[0])
        if not terms or self.write_into_input() is not None:
            return None
        return merged([self._zero(t) for t in terms])

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

    def _terms(self, out: fx.Node) -> list[fx.Node] | None:
        """The branches f, g ... of ``out = source + f + g ...``; None where it is no such sum."""
        out = same_value(out)
        if out is self.source:
            return []
        if out not in self._inside:
            return None
        name, args = op_name(out.target), bound_arguments(out)
        if idempotent(out) and isinstance(out.args[0], fx.Node):
            rest = self._terms(out.args[0])
            if rest is None or not self._fixed(self.before[0], out):
                return None
            self._chain.add(out)
            return rest
        if name not in ("aten.add.Tensor", "aten.add_.Tensor") or args.get("alpha", 1) != 1:
            return None
        a, b = args["self"], args["other"]
        for carrier, branch in ((a, b), (b, a)):
            if isinstance(carrier, fx.Node) and isinstance(branch, fx.Node):
                rest = self._terms(carrier)
                if rest is not None:
                    self._chain.add(out)
                    return [*rest, branch]
        return None

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

    def _zero(self, node: fx.Node) -> Values | None:
        """Parameters that make a value zero; the last ones that can."""
        if node not in self._inside:
            return self._solve(node, 0.0)
        if len(node.users) > 1:
            return None  # its value is also used elsewhere in the block
        name, args = op_name(node.target), bound_arguments(node)
        if layer := weights(node):
            return merged([self._solve(v, 0.0) for v in layer])
        if product := factors(node):
            inner = [o for o in product if o in self._inside]
            found = (self._zero(o) for o in inner), (self._solve(o, 0.0) for o in product)
            return next((values for values in itertools.chain(*found) if values), None)
        operands = [a for a in args.values() if isinstance(a, fx.Node) and isinstance(a.meta.get("val"), torch.Tensor)]
        if name in ("aten.add.Tensor", "aten.sub.Tensor") and len(operands) == 2:
            return merged([self._zero(o) for o in operands])
        alone = len(operands) == 1 and keeps_zero(node)
        return self._zero(operands[0]) if alone or casts(node) else None

    def _solve(self, value: object, target: float) -> Values | None:
        """The one parameter of the block's own that a value is made of, and what makes the value ``target``."""
        if not isinstance(value, fx.Node) or len({u for u in value.users if _same_call(u, self.region.call)}) > 1:
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
        if len(value.all_input_nodes) != 1:
            return None
        passes = viewed(value) == value.all_input_nodes or copies(value) or casts(value)
        return self._solve(value.args[0], target) if passes or (target == 0 and keeps_zero(value)) else None


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


__all__ = ["Identity", "Values", "merged", "same_value"]
