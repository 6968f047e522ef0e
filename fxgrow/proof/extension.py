"""The proof for ``extend``: entries appended to an axis that is looked up by number or returned.

Like :mod:`fxgrow.proof.growth`, an abstract interpretation of the graph, with one statement at every op: the first
entries of the axis are the old ones, each with the value it had, whatever the new ones hold
(:mod:`fxgrow.proof.appending`). The axis may reach an output, where new entries then follow the old ones. An op that
breaks the statement is refused by name; under ``preserve: approximate`` what depends on it (a loss, say) may change, as
long as other outputs do not. New rows wait for inputs that use them, so that it is not asked whether they learn.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from fxgrow.algebra import Axis, Leaf, Product, is_static, leaves, size_of
from fxgrow.analysis.axes import Axes
from fxgrow.analysis.call import from_parameter
from fxgrow.analysis.ranges import Ranges
from fxgrow.errors import GrowthRefused
from fxgrow.ir import trees
from fxgrow.ir.memory import writes
from fxgrow.ir.nodes import info_of
from fxgrow.plan import AxisMap, OutputGrowth
from fxgrow.proof.appending import Append, starts_with_old
from fxgrow.proof.contents import GivenContents
from fxgrow.proof.context import ProofContext
from fxgrow.proof.interpreter import Interpreter
from fxgrow.proof.lookups import Lookup, largest
from fxgrow.proof.outcome import Outcome
from fxgrow.rules.annotation import flat_dims, infos


class ExtensionProof:
    """Appends entries to one axis.

    Attributes:
        context: what rules ask; after the run it has the dims of every value.
        outputs: those that get further entries.
        changed_outputs: numbers of the outputs that change.
    """

    def __init__(self, axes: Axes, axis: Axis, name: str, new: int, ranges: Ranges, tolerate: bool = False) -> None:
        growth = AxisMap.add(int(axis.size), new, paired=False)
        self.axes, self.axis, self.growth = axes, axis, growth
        self.blocked = axes.blockers.get(axis.id, {})
        self.context = ProofContext(axes, axis, name, growth, GivenContents(), verb="extend")
        self.step = Append(self.context, ranges, self.blocked, tolerate)
        self.outputs: list[OutputGrowth] = []
        self.changed_outputs: list[int] = []

    @property
    def lookups(self) -> list[Lookup]:
        """Where the axis is looked up."""
        return self.step.lookups

    def run(self) -> Outcome:
        """Prove it.

        Raises:
            GrowthRefused: naming the op, its source line and what to do.
        """
        self._check_inputs()
        outcome = Interpreter(self.context, self.step).run()
        self._look_at_outputs()
        self._check_used()
        return outcome

    def _check_inputs(self) -> None:
        for node in self.axes.uses.get(self.axis.id, []):
            own = self.axes.dims.get(node)
            if node.op != "placeholder" or not own:
                continue
            for dim, expr in enumerate(own):
                if self.axis in list(leaves(expr)):
                    name = info_of(node).input or node.name
                    raise self.context.refuse_all(
                        f"it is dim {dim} of the input {name!r}, of a fixed size, which callers would have to change"
                    )

    def _look_at_outputs(self) -> None:
        changed = _after(self.step.tainted)
        for node in changed:
            if writes(node):
                raise self.context.refuse_all(f"{node.target} writes what changes with it in place")
        exact = 0
        self.outputs, self.changed_outputs = [], []
        for number, out in enumerate(_tensor_outputs(self.axes.program.graph)):
            if out in changed:
                self.changed_outputs.append(number)
            else:
                exact += 1
            for i, dim in enumerate(self.context.env.get(out) or self.axes.dims.get(out) or []):
                if not any((x.axis if isinstance(x, Leaf) else x) is self.axis for x in leaves(dim)):
                    continue
                if not starts_with_old(dim, self.axis):
                    raise self.context.refuse_all(
                        f"in dim {i} of output {number} ({out.name}) new entries would lie between old ones"
                    )
                old = size_of(dim)
                if not is_static(old):
                    raise self.context.refuse_all(
                        f"in dim {i} of output {number} ({out.name}) it stands beside as many entries as an "
                        "input has, so that no plan can say which entries are new"
                    )
                new = (
                    old // self.growth.old * self.growth.new if isinstance(dim, Product) else old + self.growth.newborn
                )
                self.outputs.append(OutputGrowth(output=number, dim=i, old=old, new=new))
        if self.step.tainted and not exact:
            node, why = next(iter(self.step.tainted.items()))
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
            and any(infos(d) for d in flat_dims(self.context.env.get(n)))
            for n in self.axes.uses.get(self.axis.id, [])
        )
        if passes or not self.lookups:
            return
        needs = [largest(x.need) for x in self.lookups]
        if all(n is not None and n <= self.growth.old for n in needs):
            most, one = max(zip(needs, self.lookups, strict=True), key=lambda x: x[0] or 0)
            raise self.context.refuse_at(
                one.node,
                f"it never looks beyond entry {int(most or 0) - 1}, whatever the input, so that new entries would "
                "not be used. If it is the example that fixed this, and not the model, capture with another length",
            )


def _tensor_outputs(graph: fx.Graph) -> list[fx.Node]:
    """The tensors that the model returns, those of several calls one after the other."""
    (out,) = (n for n in graph.nodes if n.op == "output")
    return [
        x
        for x in trees.tree_leaves(out.args[0])
        if isinstance(x, fx.Node) and isinstance(x.meta.get("val"), torch.Tensor)
    ]


def _after(start: Iterable[fx.Node]) -> set[fx.Node]:
    """These nodes and all that is computed from them."""
    found, stack = set(start), list(start)
    while stack:
        for user in stack.pop().users:
            if user not in found and user.op == "call_function":
                found.add(user)
                stack.append(user)
    return found


__all__ = ["ExtensionProof"]
