"""Optimizers whose step looks at whole tensors, under policy ``exact``.

In the small model's units a tensor of whole copies is the small one, repeated. Averages over it are the small tensor's
own (Adafactor; LAMB's ratio of norms). Muon's steps are orthogonal: a matrix that is repeated r times along rows and c
times along columns has singular values larger by the root of n = r * c, so that what Newton and Schulz's iteration
makes of it is the small one's result, repeated and divided by that root. Its learning rate makes up for that, and for
its own adjustment to the shape; its weight decay stays.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from fxgrow.errors import FxgrowError
from fxgrow.optim.slices import Slice
from fxgrow.plan import TensorPlan
from fxgrow.warn import warn
from fxgrow.weights.moments import is_elementwise, is_tiled, steps_like


def is_muon(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it takes the steps of ``torch.optim.Muon``."""
    return steps_like(optimizer, {torch.optim.Muon})


def why_not_exact(optimizer: torch.optim.Optimizer) -> str:
    """Why no growth of an optimizer's parameters can take the small model's steps; "" where some can."""
    if is_elementwise(optimizer) or is_tiled(optimizer) or is_muon(optimizer):
        return ""
    kind = type(optimizer).__name__
    return (
        f"policy 'exact' needs an optimizer whose step of an entry depends on that entry alone, and {kind} is not "
        "known to be one. Use policy 'asymmetric' or 'copy'; if it does work entry by entry, say so: "
        f"fxgrow.optim.register_elementwise({kind}); if it looks at tensors through averages and ratios of norms: "
        f"fxgrow.optim.register_tiled({kind})"
    )


def check_whole(optimizer: torch.optim.Optimizer, plans: Mapping[str, TensorPlan], names: Iterable[str]) -> None:
    """Refuse growths under which an optimizer of whole tensors cannot take the small model's steps.

    Args:
        names: of the grown parameters that it holds.

    Raises:
        FxgrowError: a tensor that does not grow by whole copies, as many of each entry.
    """
    if is_elementwise(optimizer):
        return
    kind = type(optimizer).__name__
    for name in names:
        plan = plans[name]
        if plan.source is None or plan.init is not None or plan.zero or plan.fresh:
            continue
        for i, d in enumerate(plan.dims):
            if (
                d is not None
                and len(counts := np.bincount(d.index[d.index >= 0]))
                and (bool((d.index < 0).any()) or counts.min() != counts.max())
            ):
                raise FxgrowError(
                    f"policy 'exact' with {kind}, whose step looks at whole tensors, needs a growth by whole copies, "
                    f"as many of each entry, and dim {i} of {name} grows from {len(counts)} to {d.size} otherwise. Use "
                    "policy 'asymmetric' or 'copy', or grow by a whole factor"
                )


def warn_of_muon(optimizer: torch.optim.Optimizer) -> None:
    """Say how exact ``exact`` is."""
    if is_muon(optimizer):
        warn(
            "Muon follows under policy 'exact' to the accuracy of its own bfloat16 iteration: up to some percent of a "
            "step (7.4 % of one matrix's was measured), and not to that of the weights"
        )


def muon_group(group: Mapping[str, Any], shape: Sequence[int], of: Sequence[tuple[Slice, float]]) -> dict[str, Any]:
    """The options under which Muon steps one tensor of copies as it stepped the small one.

    Args:
        group: the options of its parameter group.
        shape: of the tensor.
        of: factors of each growth, and the share of them that is in force (less than 1 in a ramp).
    """
    factor, floor = 1.0, 1.0
    rows, columns = float(shape[0]), float(shape[1])
    for s, share in reversed(of):  # the last growth first
        copies = [1.0 if v is None else float(v[0]) for v in s.copies] or [1.0, 1.0]
        small = rows / copies[0], columns / copies[1]
        root = math.sqrt(copies[0] * copies[1])
        floor *= root**share
        factor *= (root * _adjusted(group, *small) / _adjusted(group, rows, columns)) ** share
        rows, columns = small
    if factor == 1.0 and floor == 1.0:
        return dict(group)
    return {
        **group,
        "lr": group["lr"] * factor,
        "weight_decay": group["weight_decay"] / factor,
        "eps": group["eps"] * floor,
    }


def _adjusted(group: Mapping[str, Any], rows: float, columns: float) -> float:
    """What Muon multiplies its learning rate by, by shape (torch.optim.Muon, ``adjust_lr_fn``)."""
    if group["adjust_lr_fn"] in (None, "original"):
        return math.sqrt(max(1.0, rows / columns))
    return 0.2 * math.sqrt(max(rows, columns)) if group["adjust_lr_fn"] == "match_rms_adamw" else 1.0
