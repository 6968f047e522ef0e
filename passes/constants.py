"""Constants that growth leaves in the graph, folded into weights, so that grown weights are a larger model's own.

To keep the function, growth changes numbers of the graph (the scale of attention, an eps) and inserts multiplications.
A larger model of the user's class computes numbers of its own there, from its sizes. So what an operation left is
brought to those, and weights take the rest, wherever the mathematics allows (:mod:`fxgrow.proof.factors`). What the
class computes is assumed: the number that stood there, or, where that is a size to some power, the same power of the
size after the growth. The grown module is exact either way; what cannot be folded is listed in the plan.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from fxgrow.algebra import axes_of, factors_of, is_static, size_of
from fxgrow.analysis.axes import Axes
from fxgrow.analysis.call import from_parameter
from fxgrow.ir.dtypes import is_fine
from fxgrow.ir.nodes import info_of, note
from fxgrow.ir.ops import bound_arguments, op_name
from fxgrow.passes.state import State
from fxgrow.plan import Change, Constant, DimPlan, Edit, Rescale, Step, Unscale
from fxgrow.proof.factors import Factors, Found, Site, is_parameter
from fxgrow.proof.tagged import rows_of
from fxgrow.rules.base import FAMILIES, casts, copies, implied_value, moves

#: arguments that are numbers of the mathematics, not sizes
ARGUMENTS = ("scale", "other", "eps", "alpha")
_PRODUCTS = ("aten.mul.Tensor", "aten.mul.Scalar")
_QUOTIENTS = ("aten.div.Tensor", "aten.div.Scalar")
_ATTENTION = "aten.scaled_dot_product_attention.default"
#: how finely a number may have been computed
_ROUNDED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
#: a number of elements is taken for a power of a size only from this one on, unless it is the width of heads
_LEAST = 16


@dataclass(frozen=True)
class Before:
    """The graph as it was before an operation: its axes, and the numbers among the arguments of every op."""

    axes: Axes
    numbers: Mapping[fx.Node, Mapping[str, Any]]

    @classmethod
    def of(cls, state: State) -> Before:
        return cls(state.axes, {n: _numbers(n) for n in state.graph.nodes if n.op == "call_function"})


def settle(state: State, step: Step, before: Before, constants: str) -> None:
    """After an operation: note what the class computes where numbers changed, and fold what can be.

    Args:
        constants: ``fold`` or ``keep``.
    """
    _note_numbers(state, before)
    if constants == "fold":
        _fold_all(state, step)
    else:
        state.kept |= {n.name: "constants: keep" for n in _others(state)}


def fold(state: State, step: Step, node: fx.Node | str, argument: str, value: float | None) -> bool:
    """Give a number of the graph another value, and fold what makes up for it into weights.

    Args:
        step: the change is recorded there.
        node: the op, or its name; a multiplication that growth inserted is taken out (``argument`` and ``value`` do
            not matter then).
        argument: by its name in the op's schema.
        value: what is to stand there; None: what the op implies.

    Returns:
        Whether it was done. If not, nothing has changed, but that the plan lists ``value`` as what the class computes.
    """
    node = node if isinstance(node, fx.Node) else next(n for n in state.graph.nodes if n.name == node)
    if not info_of(node).rescale:
        _set_own(node, argument, value)
    return node not in _others(state) or node in _fold_all(state, step, node)


def remaining(state: State) -> list[Constant]:
    """The numbers of the graph that the class would not compute, and tensors that weights do not bring along."""
    out = []
    for node, (argument, own, value) in _others(state).items():
        info = info_of(node)
        why = state.kept.get(node.name, "it was not tried")
        out.append(
            Constant(
                node=node.name,
                argument=argument,
                op=op_name(node.target),
                line=info.source,
                own=own,
                value=value,
                why=why,
            )
        )
    program = state.program
    for name, plan in state.tensors.items():
        saved = name in program.parameters or name in program.persistent
        copied = any(d is not None and i not in plan.appended for i, d in enumerate(plan.dims))
        if not saved and copied:
            why = "it is not saved with the weights, and has copies of its old entries"
            out.append(Constant(node=name, op="buffer" if name in program.buffers else "constant", why=why))
    return out


# what stands in the graph, and what the class computes ----------------------------------------------------------------


def _numbers(node: fx.Node) -> dict[str, Any]:
    """The numbers among an op's arguments; None where one is implied."""
    given = bound_arguments(node)
    return {a: v for a in ARGUMENTS if a in given and ((v := given[a]) is None or type(v) in (int, float))}


def _others(state: State) -> dict[fx.Node, tuple[str, float | None, float | None]]:
    """Nodes with a number that is not the class's own: the argument, what the class computes, what stands there."""
    out: dict[fx.Node, tuple[str, float | None, float | None]] = {}
    for node in state.graph.nodes:
        info = info_of(node)
        if info.rescale:
            factor = node.args[1]
            divides = op_name(node.target) == "aten.div.Tensor_mode"
            out[node] = ("other", None, 1 / factor if divides else factor)
            continue
        for argument, own in info.numbers:
            value = _value(state, node, argument)
            if value != own:
                out[node] = (argument, own, value)
    return out


def _value(state: State, node: fx.Node, argument: str) -> float | None:
    """A number of the graph: a literal, or a tensor with one element."""
    value = bound_arguments(node)[argument]
    return _element(state, value) if isinstance(value, fx.Node) else value


def _element(state: State, value: fx.Node) -> float | None:
    """The one element of a tensor of the model that is no parameter, as it is by now; seen through casts."""
    held = _held(value)
    name = str(held.target)
    if held.op != "get_attr" or state.is_parameter(name):
        return None
    plan = state.tensors[name]
    tensor = state.program.tensor(plan.source or name)
    fine = is_fine(tensor.dtype) and is_fine(value.meta["val"].dtype)
    if tensor.is_meta or tensor.numel() != 1 or not fine or plan.zero:
        return None
    found = (tensor.double() * plan.scale).to(tensor.dtype)
    return float(found.to(value.meta["val"].dtype))


def _held(value: fx.Node) -> fx.Node:
    """What a value is a copy or a cast of."""
    while (copies(value) or casts(value)) and isinstance(value.args[0], fx.Node):
        value = value.args[0]
    return value


def _readers(state: State, held: fx.Node) -> list[fx.Node]:
    """The ops that read a tensor of the model, seen through copies and casts."""
    queue = [n for n in state.graph.nodes if n.op == "get_attr" and n.target == held.target]
    out: list[fx.Node] = []
    while queue:
        for user in queue.pop().users:
            (queue if copies(user) or casts(user) else out).append(user)
    return out


def _set_own(node: fx.Node, argument: str, value: float | None) -> None:
    rest = [(a, v) for a, v in info_of(node).numbers if a != argument]
    note(node, numbers=(*rest, (argument, value)))


def _note_numbers(state: State, before: Before) -> None:
    """Note what the class computes at numbers that an operation changed, and at those that follow a grown size."""
    sizes = _Sizes(before.axes, state.axes)
    for node in state.graph.nodes:
        if node.op != "call_function" or info_of(node).rescale or node not in before.numbers:
            continue
        known, old, now = dict(info_of(node).numbers), before.numbers[node], _numbers(node)
        for argument in now:
            was: float | None = known.get(argument, old.get(argument))
            if was is None:
                if old.get(argument) != now[argument] and argument not in known:
                    _set_own(node, argument, None)
            elif argument in ("scale", "other"):
                own = sizes.follow(node, argument, was)
                if own != was or now[argument] != old.get(argument):
                    _set_own(node, argument, own)
            elif now[argument] != old.get(argument) and argument not in known:
                _set_own(node, argument, was)
        other = bound_arguments(node).get("other")
        if isinstance(other, fx.Node) and op_name(node.target) in _PRODUCTS + _QUOTIENTS:
            element = _element(state, other)
            if element is None:
                continue
            dtype = other.meta["val"].dtype
            was = known.get("other")
            was = element if was is None else was
            own = sizes.follow(node, "other", was, torch.finfo(dtype).eps)
            if own != was:
                _set_own(node, "other", float(torch.tensor(own, dtype=dtype)))


class _Sizes:
    """What numbers become that follow sizes."""

    def __init__(self, old: Axes, new: Axes) -> None:
        self.old, self.new = old, new
        self.grown = {
            i.axis.id: (i.size, new.by_name[n].size, i.role)
            for n, i in old.by_name.items()
            if n in new.by_name and new.by_name[n].size != i.size
        }

    def follow(self, node: fx.Node, argument: str, value: float, tolerance: float = 0.0) -> float:
        """The number in place of ``value`` at the sizes after the growth; the same where it follows none."""
        if not self.grown or value <= 0 or not node.args or not isinstance(node.args[0], fx.Node):
            return value
        name = op_name(node.target)
        if name == _ATTENTION:
            return _power(value, self._last(node.args[0], any_size=True), (1, 2, 3), tolerance)
        if name not in _PRODUCTS + _QUOTIENTS:
            return value
        summed, by_weight = self._summed(node.args[0])
        if summed and not by_weight:
            return _power(value, [(a, b) for a, b, _ in summed], (1, 2, 3), tolerance)
        for old, new, role in summed:
            if role == "rank" and self._low_rank(node.args[0]):
                return value * (old / new if name in _PRODUCTS else new / old)
        mine = self._last(node.args[0]) + [(a, b) for a, b, _ in summed if a >= _LEAST]
        return _power(value, mine, (1,), tolerance)

    def _last(self, node: fx.Node, any_size: bool = False) -> list[tuple[int, int]]:
        """The last dim of a value, and the axes in it, before and after, where they are sizes that numbers follow."""
        old, new = self.old.dims.get(node), self.new.dims.get(node)
        if not old or not new or isinstance(old[-1], list) or isinstance(new[-1], list):
            return []
        found = [
            (self.grown[f.id][0], self.grown[f.id][1])
            for d in factors_of(old[-1])
            for f in axes_of(d)
            if f.id in self.grown and (any_size or self.grown[f.id][2] == "head_dim" or self.grown[f.id][0] >= _LEAST)
        ]
        a, b = size_of(old[-1]), size_of(new[-1])
        if is_static(a) and is_static(b) and a != b and (any_size or a >= _LEAST):
            found.append((int(a), int(b)))
        return found

    def _low_rank(self, node: fx.Node) -> bool:
        """Whether a value is a product with one weight after another, or what was looked up: as an adapter's is."""
        for step in range(2):
            found = self._product(node)
            if found is None:
                return step == 1 and _looked_up(node)
            values = [n for n in found.all_input_nodes if isinstance(self.old.dims.get(n), list)]
            if not any(map(is_parameter, values)) or not isinstance(found.args[0], fx.Node):
                return False
            node = found.args[0]
        return True

    @staticmethod
    def _product(node: fx.Node) -> fx.Node | None:
        """The sum of products that a value is, seen through what moves, scales or drops its entries."""
        while node.op == "call_function" and node.all_input_nodes:
            name = op_name(node.target)
            if FAMILIES.get(name) == "contraction":
                return node
            scaled = name in _PRODUCTS + _QUOTIENTS and not isinstance(node.args[1], fx.Node)
            if not (moves(node) or scaled or "dropout" in name) or not isinstance(node.args[0], fx.Node):
                return None
            node = node.args[0]
        return None

    def _summed(self, node: fx.Node) -> tuple[list[tuple[int, int, str]], bool]:
        """The grown axes that the product behind a value sums over, and whether by a weight."""
        found = self._product(node)
        if found is None:
            return [], False
        operands = [n for n in found.all_input_nodes if isinstance(self.old.dims.get(n), list)]
        left = {a.id for d in self.old.dims.get(found) or [] for a in axes_of(d)}
        axes = {a.id for n in operands for d in self.old.dims[n] for a in axes_of(d)} - left
        return [self.grown[a] for a in sorted(axes) if a in self.grown], any(map(is_parameter, operands))


def _power(value: float, sizes: Iterable[tuple[int, int]], multiples: Iterable[int], tolerance: float) -> float:
    """The power of a size's multiple that a number is, at the new size."""
    for old, new in sizes:
        for k in multiples:
            for power in (-0.5, 0.5, -1.0, 1.0):
                was, now = float((k * old) ** power), float((k * new) ** power)
                if old > 1 and abs(value - was) <= max(1e-6, tolerance) * value:
                    rounded = (d for d in _ROUNDED if float(torch.tensor(was, dtype=d)) == value)
                    return float(torch.tensor(now, dtype=next(rounded, torch.float64)))  # as it was, when it was made
    return value


# folding --------------------------------------------------------------------------------------------------------------


def _fold_all(state: State, step: Step, only: fx.Node | None = None) -> set[fx.Node]:
    """Fold what can be, and say of the rest why not; the nodes whose numbers are the class's own now."""
    others = _others(state)
    sites = {n: s for n, o in others.items() if (s := _site(state, n, *o)) is not None}
    for node in others:
        if node not in sites:
            state.kept[node.name] = "no weight could make up for it"
    factors = Factors(state.axes, _scalable(state), list(sites.values()))
    done: set[fx.Node] = set()
    changes: list[Change] = []
    for node in [only] if only is not None else list(sites):
        if node not in factors.sites:
            continue
        found = factors.find(node)
        shifted = found is not None and any(state.tensors[n].shift for n in found.parts)
        if found is None or shifted or not _buffers_agree(state, found, others):
            state.kept[node.name] = factors.why
            continue
        for name, factor in found.whole.items():
            _multiply(state, name, factor)
        for name, (factor, about) in found.sums.items():
            _multiply(state, name, factor, about)
        for name, (dim, parts, factor) in found.parts.items():
            _multiply_rows(state, name, dim, parts, factor)
        for each in found.sites:
            changes += _restored(state, each, *others[each])
            state.kept.pop(each.name, None)
            factors.settle(each)
        done |= set(found.sites)
    if changes:
        _record(state, step, changes)
    return done


def _site(state: State, node: fx.Node, argument: str, own: float | None, value: float | None) -> Site | None:
    """What a number asks of the factors of its op's operands."""
    name = op_name(node.target)
    if info_of(node).rescale:
        return Site(node, float(value)) if name in _PRODUCTS and value and value > 0 else None
    if argument == "scale" and name == _ATTENTION:
        implied = size_of(state.axes.dims[bound_arguments(node)["query"]][-1]) ** -0.5
        return Site(node, (implied if value is None else value) / (implied if own is None else own), "scores")
    if argument == "eps":
        own = own if own is not None else implied_value(node, "eps")
        return Site(node, math.sqrt(own / value), "statistic") if own and value and _one_input(node) else None
    if own is None or value is None or own * value <= 0:
        return None
    if argument == "other" and name in _PRODUCTS + _QUOTIENTS:
        return Site(node, value / own if name in _PRODUCTS else own / value)
    if argument == "alpha" and FAMILIES.get(name) == "contraction":
        return Site(node, value / own)
    return None


def _one_input(node: fx.Node) -> bool:
    return op_name(node.target) in ("aten.layer_norm.default", "aten.rms_norm.default", "aten.group_norm.default")


def _scalable(state: State) -> Callable[[str, float], bool]:
    def scalable(name: str, about: float) -> bool:
        plan = state.tensors.get(name)
        if plan is None or not state.is_parameter(name) or (plan.zero and plan.level != -about):
            return False
        return is_fine(state.program.tensor(name).dtype)

    return scalable


def _buffers_agree(state: State, found: Found, others: Mapping[fx.Node, Any]) -> bool:
    """Whether all that reads a number in a tensor is to have its new value."""
    for node in found.sites:
        value = bound_arguments(node).get(others[node][0])
        if isinstance(value, fx.Node):
            readers = _readers(state, _held(value))
            if any(u not in found.sites or others[u] != others[node] for u in readers):
                return False
    return True


def _multiply(state: State, name: str, factor: float, about: float = 0.0) -> None:
    """Scale a tensor, or its sum with a number, and its gradient the other way."""
    plan = state.tensors[name]
    if plan.last.noise is None and not plan.last.paired:  # else in one rounding with the shares, which have to add up
        plan.begin([], draws=True)
    plan.multiply(factor, about)
    plan.gradient_scale /= factor


def _multiply_rows(state: State, name: str, dim: int, parts: frozenset[int], factor: float) -> None:
    """The same for parts of one dim."""
    plan = state.tensors[name]
    rows = rows_of(state.axes.tensor_dims()[name][dim], parts)
    if plan.last.noise is None and not plan.last.paired:
        plan.begin([dim], draws=True)
    split = np.where(rows, factor, 1.0)
    state.compose(name, dim, DimPlan(index=np.arange(len(rows)), split=split, gradient=1 / split))


def _restored(state: State, node: fx.Node, argument: str, own: float | None, value: float | None) -> list[Change]:
    """The change that gives a number the value that the class computes."""
    if info_of(node).rescale:
        return [Unscale(node=node.name)]
    held = bound_arguments(node)[argument]
    if isinstance(held, fx.Node):
        plan = state.tensors[str(_held(held).target)]
        if own is not None and value is not None and _element(state, held) != own:
            plan.multiply(own / value)
        return []
    return [Edit(node=node.name, arguments={argument: own}, why="constant")]


def _record(state: State, step: Step, changes: list[Change]) -> None:
    """Make changes, and keep in the step what they amount to together with those before them."""
    state.apply(step, changes)
    inserted = {c.name for c in step.changes if isinstance(c, Rescale)}
    inserted &= {c.node for c in changes if isinstance(c, Unscale)}
    inserted -= {n for c in step.changes if isinstance(c, Rescale) for n in (c.node, c.user)}
    kept: list[Change] = []
    edits: dict[str, Edit] = {}
    for change in step.changes:
        if isinstance(change, Rescale | Unscale):
            if (change.name if isinstance(change, Rescale) else change.node) not in inserted:
                kept.append(change)
        elif isinstance(change, Edit) and change.why == "constant" and change.node in edits:
            edits[change.node].arguments |= change.arguments
        else:
            if isinstance(change, Edit) and change.target is None:
                edits[change.node] = change
            kept.append(change)
    step.changes[:] = kept


def _looked_up(node: fx.Node) -> bool:
    """Whether a value is entries of a weight, seen through what moves or drops them."""
    while node.op == "call_function" and (moves(node) or "dropout" in op_name(node.target)):
        if not node.all_input_nodes:
            return False
        node = node.all_input_nodes[0]
    return op_name(node.target) == "aten.embedding.default" and from_parameter(node.args[0])
