"""The proof for ``extend``: entries appended to an axis that is looked up by number or returned.

Like :mod:`fxgrow.proof.growth`, an abstract interpretation of the graph, with one statement at every op: the first
entries of the axis are the old ones, each with the value it had, whatever the new ones hold. Look-ups keep it as long
as they count from the front, ops that act entry by entry keep it, and the axis may reach an output, where new entries
then follow the old ones. An op that sums, normalises or compares over the axis breaks it, and is refused by name; under
``preserve: approximate`` what depends on it (a loss, say) may change, as long as other outputs do not.

How far a look-up counts is an expression of the input's sizes (:mod:`fxgrow.analysis.ranges`). It tells which other
tables and masks have to follow so that longer inputs run, and whether new rows would ever be used.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from fxgrow.algebra import Axis, Expr, Leaf, Product, Size, is_static, leaves, resolve, same_size, size_of
from fxgrow.analysis.axes import Axes
from fxgrow.analysis.call import from_parameter
from fxgrow.analysis.ranges import Bound, Ranges
from fxgrow.errors import GrowthRefused
from fxgrow.ir import trees
from fxgrow.ir.memory import writes
from fxgrow.ir.ops import bound_arguments, op_name
from fxgrow.ir.sizes import sizes_of
from fxgrow.plan import AxisMap, OutputGrowth
from fxgrow.proof.growth import Grow, Outcome
from fxgrow.rules.annotation import Content, Dims, Info, Site, infos
from fxgrow.rules.base import Rule
from fxgrow.rules.forms.along import depends_on_all
from fxgrow.rules.indexing import indexed_dims

#: losses over classes, whose result depends on all of them
_LOSSES = (
    "aten.cross_entropy_loss.default",
    "aten.nll_loss.default",
    "aten.nll_loss_nd.default",
    "aten.kl_div.default",
)


@dataclass
class Lookup:
    """A place where entries of a dim are picked by number: ``need`` is how many there have to be, None if any number
    may come in with the input."""

    node: fx.Node
    operand: fx.Node
    dim: int
    need: Bound


class Extension(Grow):
    """Append entries to one axis.

    Attributes:
        tainted: ops whose result changes, with the reason (only with ``tolerate``).
        lookups: where the axis is looked up.
        outputs: those that get further entries.
        changed_outputs: numbers of the outputs that change.
    """

    verb = "extend"

    def __init__(self, axes: Axes, axis: Axis, name: str, new: int, ranges: Ranges, tolerate: bool = False) -> None:
        super().__init__(axes, axis, name, AxisMap.add(int(axis.size), new, paired=False), Content.FREE)
        self.ranges, self.tolerate = ranges, tolerate
        self.blocked = axes.blockers.get(axis.id, {})
        self.tainted: dict[fx.Node, str] = {}
        self.lookups: list[Lookup] = []
        self.outputs: list[OutputGrowth] = []
        self.changed_outputs: list[int] = []

    def run(self) -> Outcome:
        """Interpret the graph.

        Raises:
            GrowthRefused: naming the op, its source line and what to do.
        """
        for node in self.axes.uses.get(self.axis.id, []):
            own = self.axes.dims.get(node)
            if node.op == "placeholder" and own and any(self.axis in list(leaves(d)) for d in own):
                dim = next(i for i, d in enumerate(own) if self.axis in list(leaves(d)))
                self._refuse_input(node, dim)
        outcome = super().run()
        self._look_at_outputs()
        self._check_used()
        return outcome

    def _interpret(self) -> None:
        self.tainted, self.lookups = {}, []
        super()._interpret()

    def _check_alive(self) -> None:
        """New rows wait for inputs that use them."""

    # one op ----------------------------------------------------------------------------------------------------------

    def _grow(self, rule: Rule) -> Any:
        try:
            if self.node in self.blocked:
                return self._look_up(rule)
            return rule.grow(self)
        except GrowthRefused as refusal:
            after = any(n in self.tainted for n in self.node.all_input_nodes)
            reducing = op_name(self.node.target) in _LOSSES or depends_on_all(self.node)
            if self.tolerate and (reducing or after) and not self._has_fixed_operand():
                self.tainted[self.node] = str(refusal)
                return self._known(Content.FREE)
            if reducing and not self.tolerate:
                raise GrowthRefused(
                    f"{refusal}. Only what is computed from it changes: leave it out of the call (return the logits, "
                    "and compute the loss outside), or set preserve: approximate, which keeps all other outputs exact"
                ) from None
            raise

    def _has_fixed_operand(self) -> bool:
        """Class weights, or probabilities as targets: an entry per class, which analysis does not tie to them."""
        target = self.args.get("target")
        value = target.meta.get("val") if isinstance(target, fx.Node) else None
        soft = isinstance(value, torch.Tensor) and value.is_floating_point()
        return isinstance(self.args.get("weight"), fx.Node) or (soft and "cross_entropy" in self.op)

    def _known(self, content: Content) -> Any:
        """The result's dims as analysis has them; new entries of the axis hold ``content``."""

        def new(_: int) -> Info:
            return Info(content)

        def mark(dims: Any) -> Any:
            if dims is None:
                return None
            return [
                mark(d) if isinstance(d, list) or d is None else self._annotate(d, lambda _: Info(content))
                for d in dims
            ]

        return mark(self.axes.dims.get(self.node))

    def demand(self, info: Info, content: Content, why: str) -> None:
        """New entries hold what they are given; an op that needs them to be something else changes its result."""
        raise self.refuse(f"{why}, so that new entries would change its result")

    def _pin(self, site: Site, content: Content, why: str) -> bool:
        raise self.refuse(f"{why}, so that new entries would change its result")

    def _look_up(self, rule: Rule) -> Any:
        """An op whose rule froze the axis: fine where it picks entries by number, counted from the front."""
        if op_name(self.node.target) == "aten.one_hot.default":
            high = self.ranges.of(self.args["self"]).high
            self.lookups.append(Lookup(self.node, self.node, -1, None if high is None else high + 1))
            return rule.grow(self)
        found = list(lookups_of(self.node, self.ranges))
        picked = False
        for one in found:
            dims = self.dims(one.operand)
            if dims is None or not self.grows(dims[one.dim]):
                continue
            picked = True
            if not starts_with_old(dims[one.dim], self.axis):
                raise self.refuse("new entries would lie between old ones, which are looked up by number")
            self._check_front(one)
            self.lookups.append(one)
        if not picked:
            raise self.refuse(self.blocked[self.node])
        for operand in self.node.all_input_nodes:
            for i, dim in enumerate(self.dims(operand) or []):
                known = any(one.operand is operand and one.dim == i for one in found)
                if self.grows(dim) and not known and operand is not found[0].operand:
                    raise self.refuse("its index has entries for these units too")
        if op_name(self.node.target).startswith("aten.embedding"):
            return rule.grow(self)
        return self._known(Content.FREE)

    def _check_front(self, one: Lookup) -> None:
        name, args = op_name(self.node.target), self.args
        if name == "aten.slice.Tensor":
            start, end = args["start"], args["end"]
            begin = self.ranges.of(0 if start is None else start)
            if not begin.not_negative or (isinstance(end, int) and end < 0):
                raise self.refuse("it is sliced from its end, where new entries would be")
            length = self.ranges.size(end)
            size = (sizes_of(self.node) or [])[one.dim]
            step = args.get("step") or 1
            if length is None or (step == 1 and begin.low == 0 and not same_size(sympy.sympify(length), _sym(size))):
                raise self.refuse(f"it is sliced to {length} entries but gives {size}: what lies beyond is cut off")
            if step != 1 or begin.low != 0:
                raise self.refuse("it is sliced with a step, or not from its first entry on")
            return
        if name == "aten.select.int" and not self.ranges.of(args["index"]).not_negative:
            raise self.refuse("it takes an entry counted from the end, where new entries would be")
        if name == "aten.index.Tensor":
            index = next(node for node, covered in indexed_dims(args["indices"]) if one.dim in covered)
            value = index.meta.get("val")
            if not isinstance(value, torch.Tensor) or value.dtype in (torch.bool, torch.uint8):
                raise self.refuse("a mask picks its entries, and has none for new ones")
            constant = self.constant(index)
            low = constant.min() if constant is not None and constant.numel() else None
            if not (low is not None and low >= 0) and not self.ranges.of(index).not_negative:
                raise self.refuse(
                    "its numbers may be negative, which counts from the end. Use nn.functional.embedding, or clamp them"
                )

    # the whole -------------------------------------------------------------------------------------------------------

    def _refuse_input(self, node: fx.Node, dim: int) -> None:
        raise self.refuse_all(
            f"it is dim {dim} of the input {node.meta.get('input', node.name)!r}, of a fixed size, which callers would "
            "have to change"
        )

    def _look_at_outputs(self) -> None:
        changed = _after(self.tainted)
        for node in changed:
            if writes(node):
                raise self.refuse_all(f"{node.target} writes what changes with it in place")
        exact = 0
        self.outputs, self.changed_outputs = [], []
        for number, out in enumerate(tensor_outputs(self.axes.program.graph)):
            if out in changed:
                self.changed_outputs.append(number)
            else:
                exact += 1
            for i, dim in enumerate(self.env.get(out) or self.axes.dims.get(out) or []):
                if not any((x.axis if isinstance(x, Leaf) else x) is self.axis for x in leaves(dim)):
                    continue
                if not starts_with_old(dim, self.axis):
                    raise self.refuse_all(
                        f"in dim {i} of output {number} ({out.name}) new entries would lie between old ones"
                    )
                old = int(size_of(dim))
                new = old // self.growth.old * self.growth.new if _is_product(dim) else old + self.growth.newborn
                self.outputs.append(OutputGrowth(output=number, dim=i, old=old, new=new))
        if self.tainted and not exact:
            node, why = next(iter(self.tainted.items()))
            raise GrowthRefused(
                f"{why}; every output of the model depends on it, so that nothing would be left exact. Capture a call "
                "that returns the logits as well"
            )

    def _check_used(self) -> None:
        """Rows that no call can number would never be trained."""
        passes = any(
            n.op == "call_function"
            and not from_parameter(n)
            and n not in self.blocked
            and any(i for d in _flat(self.env.get(n)) for i in infos(d))
            for n in self.axes.uses.get(self.axis.id, [])
        )
        if passes or not self.lookups:
            return
        needs = [_largest(x.need) for x in self.lookups]
        if all(n is not None and n <= self.growth.old for n in needs):
            most, one = max(zip(needs, self.lookups, strict=True), key=lambda x: x[0] or 0)
            raise self.refuse_at(
                one.node,
                f"it never looks beyond entry {int(most or 0) - 1}, whatever the input, so that new entries would "
                "not be used. If it is the example that fixed this, and not the model, capture with another length",
            )


def _largest(need: Bound) -> float | None:
    """A number that an expression of sizes never exceeds, where there is one."""
    if need is None:
        return None
    need = sympy.sympify(need)
    if need.is_number:
        return float(need)
    parts = [_largest(a) for a in need.args]
    if isinstance(need, sympy.Min):
        return min((p for p in parts if p is not None), default=None)
    if isinstance(need, sympy.Add | sympy.Max) and None not in parts:
        known = [p for p in parts if p is not None]
        return sum(known) if isinstance(need, sympy.Add) else max(known)
    return None


def _sym(size: Size) -> Any:
    return sympy.sympify(size)


def _flat(dims: Any) -> Iterator[Expr]:
    for d in dims or []:
        if isinstance(d, list):
            yield from d
        elif d is not None:
            yield d


def _is_product(dim: Expr) -> bool:
    return isinstance(dim, Product)


def starts_with_old(dim: Expr, axis: Axis) -> bool:
    """Whether new entries of the axis come after all old entries of the dim."""

    def has(e: Expr) -> bool:
        return any((x.axis if isinstance(x, Leaf) else x) is axis for x in leaves(e))

    if isinstance(dim, Axis | Leaf):
        return has(dim)
    parts = dim.factors if isinstance(dim, Product) else dim.parts[::-1]
    return bool(parts) and starts_with_old(parts[0], axis) and not any(map(has, parts[1:]))


def tensor_outputs(graph: fx.Graph) -> list[fx.Node]:
    """The tensors that the model returns, those of several calls one after the other."""
    (out,) = (n for n in graph.nodes if n.op == "output")
    return [
        x
        for x in trees.tree_leaves(out.args[0])
        if isinstance(x, fx.Node) and isinstance(x.meta.get("val"), torch.Tensor)
    ]


def _after(start: Any) -> set[fx.Node]:
    """These nodes and all that is computed from them."""
    found, stack = set(start), list(start)
    while stack:
        for user in stack.pop().users:
            if user not in found and user.op == "call_function":
                found.add(user)
                stack.append(user)
    return found


def lookups_of(node: fx.Node, ranges: Ranges) -> Iterator[Lookup]:
    """The dims of its operands from which an op picks entries by number, and how many entries it needs there."""
    if node.op != "call_function":
        return
    name, args = op_name(node.target), bound_arguments(node)

    def need(index: Any) -> Bound:
        high = ranges.of(index).high
        return None if high is None else high + 1

    if name in ("aten.embedding.default", "aten.embedding_bag.default", "aten.embedding_bag.padding_idx"):
        yield Lookup(node, args["weight"], 0, need(args["indices"]))
    elif name == "aten.embedding_renorm_.default":
        yield Lookup(node, args["self"], 0, need(args["indices"]))
    elif name == "aten.slice.Tensor":
        rank = len(sizes_of(args["self"]) or [])
        end = args["end"]
        literal = isinstance(end, int) or end is None
        yield Lookup(node, args["self"], int(args["dim"]) % rank, None if literal else ranges.size(end))
    elif name == "aten.select.int":
        rank = len(sizes_of(args["self"]) or [])
        yield Lookup(node, args["self"], int(args["dim"]) % rank, need(args["index"]))
    elif name in ("aten.index_select.default", "aten.gather.default"):
        sizes, index = sizes_of(args["self"]) or [], sizes_of(args["index"]) or []
        at = int(args["dim"]) % max(1, len(sizes))
        yield Lookup(node, args["self"], at, need(args["index"]))
        if name == "aten.gather.default":
            for i, (mine, theirs) in enumerate(zip(sizes, index, strict=False)):
                if i != at and not same_size(mine, theirs):
                    yield Lookup(node, args["self"], i, theirs)
    elif name == "aten.index.Tensor":
        for numbers, covered in indexed_dims(args["indices"]):
            for i in covered:
                yield Lookup(node, args["self"], i, need(numbers))


def longest(need: Bound, size: int) -> tuple[sympy.Symbol, int] | None:
    """The input size at which a look-up needs ``size`` entries: (symbol, its largest value), None if there is none."""
    symbols = list(getattr(need, "free_symbols", ()))
    if len(symbols) != 1:
        return None
    (symbol,) = symbols
    line = sympy.Poly(need, symbol) if sympy.sympify(need).is_polynomial(symbol) else None
    if line is None or line.degree() != 1:
        return None
    slope, offset = line.all_coeffs()
    return (symbol, int((size - offset) // slope)) if slope > 0 else None


@dataclass
class ShortDim:
    """A dim of fixed size that is too small for longer inputs."""

    lookup: Lookup
    dim: Expr
    size: int


def short_dims(axes: Axes, ranges: Ranges, symbol: sympy.Symbol, most: int) -> Iterator[ShortDim]:
    """The dims of tables and masks that have to grow before the input's size ``symbol`` can be ``most``."""
    for node in axes.program.graph.nodes:
        for one in lookups_of(node, ranges):
            if one.need is None or symbol not in getattr(one.need, "free_symbols", ()):
                continue
            dims: Dims | None = axes.dims.get(one.operand)
            if not dims or not is_static(size_of(dims[one.dim])):
                continue
            size = one.need.subs(symbol, most)
            if not size.is_number:
                continue  # depends on other sizes of the input too
            if int(size) > size_of(dims[one.dim]):
                yield ShortDim(one, resolve(dims[one.dim]), int(size))


def members(axes: Axes, axis: Axis) -> list[tuple[str, int]]:
    """Tensors and dims in which the axis appears."""
    found: dict[tuple[str, int], None] = {}
    for node in axes.uses.get(axis.id, []):
        if node.op == "get_attr":
            for i, dim in enumerate(axes.dims[node]):
                if axis in list(leaves(dim)):
                    found[str(node.target), i] = None
    return list(found)


__all__ = [
    "Extension",
    "ShortDim",
    "Lookup",
    "short_dims",
    "longest",
    "lookups_of",
    "members",
    "starts_with_old",
    "tensor_outputs",
]
