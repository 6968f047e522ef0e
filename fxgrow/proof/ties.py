"""Numbers that are equal by construction, and differ by rounding once units have copies.

"A copy holds exactly the old value" is true of real numbers. Matrix products give copies that differ in the last place,
and so an extremum over them equals one of them alone. Whatever jumps where two such numbers meet (``h == h.amax()``, a
floor of ``h / h.amax()``, pairs of units compared with each other) would tell copies apart.

Every value carries the places where that began: extrema over the axis, and ops that set its units against each other.
Element-wise ops and moves pass them on; sums and norms mix them into numbers that meet others by chance alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from fxgrow.ir.sizes import sizes_of
from fxgrow.rules.annotation import Content, flat_dims, infos
from fxgrow.rules.base import GetItem, Rule, is_linear, jumping_operands, moves, rule_of, selects
from fxgrow.rules.forms import Pointwise, Written

#: how far apart, relatively, values are that stand for numbers equal up to rounding
NUDGE = 1e-9


class Ties:
    """Follows, through one graph, values in which numbers of an axis with copies may be equal by construction.

    Args:
        dims: the annotated dims of a value.
    """

    def __init__(self, dims: Callable[[fx.Node], Any]) -> None:
        self.dims = dims
        self.began: dict[fx.Node, frozenset[fx.Node]] = {}  # value -> the ops where that began
        self.last: fx.Node | None = None  # the node up to which values have been followed

    def follow(self, node: fx.Node, rule: Rule, result: Any) -> bool:
        """Take the next op of the graph. False: it tells numbers apart that are equal by construction."""
        self._catch_up(node)
        if not self.began and not isinstance(rule, Pointwise) and not selects(node):
            return True  # nothing to pass on, and nothing begins here
        numbers = [n for n in node.all_input_nodes if _real(n)]
        here = {n: sum(1 for d in flat_dims(self.dims(n)) for _ in infos(d)) for n in numbers}
        after = sum(1 for d in flat_dims(result) for _ in infos(d))
        began = frozenset(x for n in numbers for x in self.began.get(n, ()))
        pairs = isinstance(rule, Pointwise) and after > max(here.values(), default=0)
        at = [n for n in jumping_operands(node) if n in numbers]
        meet = any(n in self.began for n in at) or (pairs and len(at) > 1)
        if meet and any(map(self._varies, at)) and not _meet_safely(node, at, began):
            return False
        if not _passes(rule, node) or not _real(node):
            return True
        if pairs or (selects(node) and after < max(here.values(), default=0)):
            began |= {node}
        if began:
            self.began[node] = began
        return True

    def _catch_up(self, node: fx.Node) -> None:
        """Follow the ops before this one that the axis does not go through."""
        while self.began and self.last is not None and self.last.next is not node:
            here = self.last = self.last.next
            rule = rule_of(here)
            if rule is not None and _passes(rule, here) and _real(here):
                began = frozenset(x for n in here.all_input_nodes for x in self.began.get(n, ()))
                if began:
                    self.began[here] = began
        self.last = node

    def _varies(self, node: fx.Node) -> bool:
        """Whether a value differs from unit to unit."""
        return any(i.content is not Content.CONST for d in flat_dims(self.dims(node)) for i in infos(d))


def equal_almost(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two results of almost equal operands are almost equal."""
    if a.is_complex():
        return equal_almost(torch.view_as_real(a.resolve_conj()), torch.view_as_real(b.resolve_conj()))
    if not a.is_floating_point():
        return torch.equal(a, b)
    return bool(torch.isclose(a.double(), b.double(), rtol=1e-3, atol=1e-3, equal_nan=True).all())


def _passes(rule: Rule, node: fx.Node) -> bool:
    """Whether the results of an op are numbers of its operands, entry by entry, as they are or changed alike."""
    return rule.moves or isinstance(rule, Pointwise | Written | GetItem) or selects(node) or is_linear(node)


def _real(node: fx.Node) -> bool:
    """Whether a value is a tensor of real or complex numbers, or several results."""
    value = node.meta.get("val")
    if isinstance(value, list | tuple):
        return True
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())


def _tensors(node: fx.Node) -> list[fx.Node]:
    return [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor | list | tuple)]


def _meet_safely(node: fx.Node, at: list[fx.Node], began: frozenset[fx.Node]) -> bool:
    """Whether an op that jumps somewhere does not do so where the numbers meet that are equal by construction.

    Its operands are traced back to the one value that all of them are made of, beyond the places where that ``began``,
    and the op is run on that value with all entries of one size, and nudged. False too where there is no such value.
    """
    order = {n: i for i, n in enumerate(node.graph.nodes)}
    frontier, between = set(_tensors(node)), set[fx.Node]()
    while len(frontier) != 1 or not began <= between:
        last = max(frontier, key=lambda n: order[n], default=None)
        rule = rule_of(last)
        if last is None or rule is None or not _passes(rule, last):
            return False
        frontier.remove(last)
        between.add(last)
        frontier |= set(_tensors(last))
    (root,) = frontier
    chain = [*sorted(between, key=lambda n: order[n]), node]
    generator = torch.Generator().manual_seed(0)
    try:
        shape = [_size(s, t) for s, t in zip(sizes_of(root) or [], root.meta["val"].shape, strict=True)]
        signs, nudges = (torch.randint(0, 2, shape, generator=generator).double() * 2 - 1 for _ in range(2))
        for value in (1.37 + 0 * signs, -0.61 + 0 * signs, 0.83 * signs):
            a, b = (_run(chain, {root: v}) for v in (value, value * (1 + NUDGE * nudges)))
            if not all(map(equal_almost, a, b)):
                return False
    except Exception:  # what cannot be run shows nothing
        return False
    return True


def _run(chain: list[fx.Node], values: Mapping[fx.Node, Any]) -> list[torch.Tensor]:
    """The results of the last op, computed in float64."""
    env = dict(values)
    for node in chain:
        source = node.all_input_nodes[0]
        if moves(node) and _real(node) and node.meta["val"].dtype != source.meta["val"].dtype:
            env[node] = env[source]  # a cast rounds the nudge away, and a difference in the last place it does not
            continue
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: env[n] if n in env else _known(n))
        env[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    last = env[chain[-1]]
    return [x for x in (last if isinstance(last, list | tuple) else [last]) if isinstance(x, torch.Tensor)]


def _size(size: Any, traced: Any) -> int:
    """A size as a number: that of the example where it is dynamic."""
    return size if isinstance(size, int) else int(traced.node.hint)


def _known(node: fx.Node) -> Any:
    value = node.meta.get("val")
    return int(value.node.hint) if isinstance(value, torch.SymInt) else value


__all__ = ["Ties", "equal_almost"]
