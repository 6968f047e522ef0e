"""The two models that are compared: their graphs in float64, and what is asked of them in several places."""

from __future__ import annotations

import functools

from fxgrow.emit.graphs import call_graphs, clean_graph
from fxgrow.ir.traced import Traced
from fxgrow.plan import GrowthPlan
from fxgrow.verify.execute import Runner, heeds_mode
from fxgrow.verify.outputs import output_numbers


class Pair:
    """A model before and after its growth.

    Args:
        program, grown: graphs and names before and after.
        plan: how one becomes the other.

    Attributes:
        numbers: by call, the numbers of its outputs in the plan.
        one_mode: nothing in the graphs hangs on the mode, so that train mode is eval mode.
    """

    def __init__(self, program: Traced, grown: Traced, plan: GrowthPlan) -> None:
        self.program, self.grown, self.plan = program, grown, plan
        self.numbers = [numbers for _, numbers in output_numbers(program)]
        self.one_mode = all(c.training is None for c in program.calls) and not any(
            heeds_mode(p.graph) for p in (program, grown)
        )

    @functools.cached_property
    def runners(self) -> tuple[list[Runner], list[Runner]]:
        """The graphs of both models in float64, by call."""
        return _runners(self.program), _runners(self.grown)

    @functools.cached_property
    def writes(self) -> tuple[set[str], set[str]]:
        """Names of what the forward of each model writes into."""
        small, large = (set[str]().union(*(r.written for r in runners)) for runners in self.runners)
        return small, large

    def changed_names(self) -> set[str]:
        """Names of the old model's tensors that do not stay as they are."""
        return {str(t.source) for t in self.plan.tensors.values() if not t.trivial}


def _runners(program: Traced) -> list[Runner]:
    return [Runner(g) for g in call_graphs(program, clean_graph(program.graph, True))]
