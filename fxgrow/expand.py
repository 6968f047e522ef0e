"""``expand``: grow a small model into the user's own larger instance of the same class, without a spec."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from fxgrow.errors import SpecError
from fxgrow.growth import Growth, Verify, grow
from fxgrow.ir.replicas import innermost
from fxgrow.landing.between import spec_between
from fxgrow.landing.compare import described, differences
from fxgrow.landing.into import into
from fxgrow.program import capture


def expand(
    small: nn.Module,
    big: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    calls: Mapping[str, Any] | None = None,
    verify: Verify = "auto",
    **how: Any,
) -> Growth:
    """Grow ``small`` into ``big``, the user's own larger instance of the same class.

    Sizes are read off ``big``. Each model is traced once; ``big``'s graph must be the grown one, op by op and number by
    number, and its modules then hold the grown parameters and buffers (:meth:`fxgrow.Growth.into`): there is no second
    copy of them. It may be on meta before.

    Args:
        small, big: modules of one class, ``big`` at least as large along every axis and stack.
        args, kwargs, calls: example inputs of both, see :func:`~fxgrow.program.capture`.
        how: further keys for every ``widen`` operation (``fill``, ``split``, ``noise`` ...).

    Returns:
        The growth; ``growth.carry`` gives an optimizer over ``big``'s parameters, which are the grown module's.

    Raises:
        SpecError, GrowthRefused: the sizes cannot be reached exactly, or ``big`` computes with other constants than the
            growth needs (a softmax scale, a norm's eps); ``big`` is as it was then.
    """
    start = time.perf_counter()
    before, theirs = (capture(m, args, kwargs, calls=calls) for m in (small, innermost(big)))
    seconds = time.perf_counter() - start
    operations = spec_between(before, theirs, **how)
    if not operations:
        found = [described(d, "the larger class") for d in differences(before, theirs)]
        rest = "\n  ".join(["; they compute something else, which no growth makes good:", *found[:6]]) if found else ""
        raise SpecError("the two models have the same sizes: there is nothing to grow" + rest)
    growth = grow(small, operations, args, kwargs, calls=calls, verify=verify, program=before, like=theirs)
    growth.receipt.seconds["capture"] = seconds
    growth.receipt.notes.extend(into(big, growth.module, growth.plan, growth.program, theirs))
    return growth
