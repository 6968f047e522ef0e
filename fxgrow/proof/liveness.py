"""Whether new units can learn: what is zero on both of its sides never gets a gradient."""

from __future__ import annotations

from collections.abc import Container

from fxgrow.plan import FILL_ZERO
from fxgrow.proof.maps import reader_fill
from fxgrow.proof.outcome import Outcome
from fxgrow.rules.annotation import Content


def never_trained(outcome: Outcome, parameters: Container[str]) -> str:
    """Why no new unit would ever get a gradient; empty where they do.

    Args:
        parameters: names of the tensors that are trained; all others are buffers and constants.
    """
    if outcome.growth.newborn == 0:
        return ""
    if outcome.silenced and not outcome.readers:
        return (
            "two activations are multiplied or compared over it, and both would be zero in new units, which then never "
            "get a gradient"
        )
    written = [c for site, c in outcome.carriers.items() if site[0] in parameters]
    paired = outcome.growth.ids < outcome.growth.newborn and bool(outcome.readers)
    if not written or paired or not (outcome.readers or outcome.multiplied):
        return ""
    silent_in = all(c is Content.ZERO for c in written)
    fed = outcome.multiplied and not outcome.silenced  # by what they are multiplied with
    silent_out = not fed and all(reader_fill(c) == FILL_ZERO for c in outcome.readers.values())
    trained = [site for site in outcome.readers if site[0] in parameters]
    if silent_out and outcome.readers and not trained and not outcome.multiplied:
        return "only buffers multiply its new units, with zeros that no training changes"
    if silent_in and silent_out:
        return (
            "the weights into its new units and those out of them would both be zero, so that neither ever gets a "
            "gradient"
        )
    return ""


__all__ = ["never_trained"]
