"""What growing one axis does: to the tensors that carry it, and to the graph."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fxgrow.plan import AxisMap
from fxgrow.rules.annotation import Content, Site


@dataclass(frozen=True)
class Scale:
    """What a tensor is multiplied by; ``folded``: a share of copies, which its gradients take the other way."""

    factor: float
    folded: bool


@dataclass
class GraphChanges:
    """Numbers of the graph that change, besides sizes.

    Attributes:
        literals: new values of arguments, by node and argument.
        results: factors of results, by node.
        operands: factors of operands for one user alone, by user and operand.
    """

    literals: dict[tuple[str, str], Any] = field(default_factory=dict)
    results: dict[str, float] = field(default_factory=dict)
    operands: dict[tuple[str, str], float] = field(default_factory=dict)

    def scale_result(self, node: str, factor: float) -> None:
        self.results[node] = self.results.get(node, 1.0) * factor

    def scale_operand(self, user: str, operand: str, factor: float) -> None:
        self.operands[user, operand] = self.operands.get((user, operand), 1.0) * factor


@dataclass
class Outcome:
    """What growing one axis does.

    Attributes:
        growth: of the axis: which entries are copies, and of what.
        carriers: sites whose entries appear in the result of the op that uses them, with what new ones hold.
        readers: sites that are contracted, with the contents they meet.
        constants: values of new entries of tensors where random ones make no sense.
        scales: of whole tensors.
        graph: what changes in the graph.
        statistics: an op takes statistics over the axis, or sums over it without weights.
        uneven_gradients: an op gives one of several equal copies all the gradient.
        multiplied: two activations are multiplied and summed over the axis.
        silenced: both of them are zero in new units, so that neither gets a gradient through the other.
    """

    growth: AxisMap
    carriers: dict[Site, Content] = field(default_factory=dict)
    readers: dict[Site, set[Content]] = field(default_factory=dict)
    constants: dict[str, float] = field(default_factory=dict)
    scales: dict[str, Scale] = field(default_factory=dict)
    graph: GraphChanges = field(default_factory=GraphChanges)
    statistics: bool = False
    uneven_gradients: bool = False
    multiplied: bool = False
    silenced: bool = False


__all__ = ["GraphChanges", "Outcome", "Scale"]
