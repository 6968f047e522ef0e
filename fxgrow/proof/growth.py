"""The proof: grow one axis through the whole graph, op by op, and decide what each parameter does about it.

Every tensor's occurrence of the axis carries a :class:`~fxgrow.rules.annotation.Content`, what is known of its new
entries. Parameters that *carry* the axis start out free; an op that needs more (a norm needs the mean, a score needs
zero keys) demands it of those that reach it, and the proof starts over with that pinned. Parameters that *read* the
axis are then given what makes the sum come out: shares for copies, zeros where new entries are not zero already. If
every op agrees, the growth is exact; else it is refused with the op, the source line and the reason.

The parts, each of which can be read alone: :mod:`~fxgrow.proof.interpreter` runs the ops,
:mod:`~fxgrow.proof.context` answers what their rules ask, :mod:`~fxgrow.proof.contents` knows what new entries hold,
:mod:`~fxgrow.proof.sums` which tensors read, :mod:`~fxgrow.proof.scales` where factors go and
:mod:`~fxgrow.proof.liveness` whether new units learn. :mod:`~fxgrow.proof.outcome` is the result, of which
:mod:`~fxgrow.proof.maps` makes the maps of tensors; :mod:`~fxgrow.proof.resize` lets literals follow.
"""

from __future__ import annotations

from fxgrow.algebra import Axis
from fxgrow.analysis.axes import Axes
from fxgrow.plan import AxisMap
from fxgrow.proof.contents import AskedContents
from fxgrow.proof.context import ProofContext
from fxgrow.proof.interpreter import FollowRule, Interpreter
from fxgrow.proof.liveness import never_trained
from fxgrow.proof.outcome import Outcome
from fxgrow.rules.annotation import Content, Site


class GrowthProof:
    """Grows one axis by copies of its units, by new ones, or both.

    Args:
        name: of the axis, in refusals.
        growth: which new units are copies of which old ones.
        default: what new entries hold where no op needs anything else.

    Attributes:
        context: what rules ask; after the run it has the dims of every value.
        contents: what was asked of new entries.
    """

    def __init__(self, axes: Axes, axis: Axis, name: str, growth: AxisMap, default: Content = Content.FREE) -> None:
        self.contents = AskedContents(default)
        self.context = ProofContext(axes, axis, name, growth, self.contents)

    def impose(self, site: Site, content: Content, reason: str) -> None:
        """Take a tensor for a value that was computed elsewhere, with new entries that hold this."""
        self.contents.pinned[site], self.contents.reasons[site] = content, reason
        self.context.sums.forced.add(site)

    def run(self) -> Outcome:
        """Prove it.

        Raises:
            GrowthRefused: it is not exact, or new units would never learn.
        """
        outcome = Interpreter(self.context, FollowRule(self.context)).run()
        why = never_trained(outcome, self.context.axes.program.parameters)
        if why:
            raise self.context.refuse_all(why)
        return outcome


__all__ = ["GrowthProof"]
