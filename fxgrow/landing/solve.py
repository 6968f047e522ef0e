"""Constants of a larger instance, solved for: weights make up for where its numbers differ from the growth's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fxgrow.ir.nodes import info_of
from fxgrow.ir.traced import Traced
from fxgrow.landing.compare import Difference, differences
from fxgrow.passes.constants import ARGUMENTS, fold
from fxgrow.passes.state import State
from fxgrow.plan import Step

#: a number that is folded can bring about another one
_ROUNDS = 4


def solve_constants(state: State, steps: Sequence[Step], theirs: Traced, grown: Callable[[], Traced]) -> None:
    """Give numbers of the graph the values that a larger instance computes, and fold what makes up for it into weights.

    Args:
        state: of the growth, after its last operation.
        steps: planned so far; what is folded is recorded in the last.
        theirs: the larger instance's trace.
        grown: the growth's program as it is now.
    """
    for _ in range(_ROUNDS if steps else 0):
        folded = [_fold(state, steps[-1], d) for d in differences(grown(), theirs)]
        if not any(folded):
            return


def _fold(state: State, step: Step, d: Difference) -> bool:
    node = next((n for n in state.graph.nodes if n.name == d.node), None)
    if node is None:
        return False
    if d.kind == "missing":  # a multiplication that growth inserted, else nothing is done
        return info_of(node).rescale and fold(state, step, node, "other", None)
    number = isinstance(d.theirs, int | float) and not isinstance(d.theirs, bool)
    return d.kind == "literal" and d.argument in ARGUMENTS and number and fold(state, step, node, d.argument, d.theirs)
