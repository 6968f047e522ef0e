"""Whether new weights learn: measured, by two steps of gradient descent."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fxgrow.plan import GrowthPlan, TensorPlan
from fxgrow.verify.gradients import Weighed, has_newborn
from fxgrow.verify.side import Side
from fxgrow.verify.trials import Round


def dead_parameters(new: Side, plan: GrowthPlan, examples: Callable[[bool], Round]) -> list[str]:
    """Names of those whose newborn entries get no gradient within two steps, where old entries get one at all.

    (Softmax lets none through to a key's bias, nor a norm to the bias before it.)

    Args:
        new: the grown model.
        examples: by whether it is train mode; empty where the model has no such mode.
    """
    newborn = {n: p for n, p in plan.tensors.items() if p.source is None or p.zero or has_newborn(p)}
    waiting = {n for n in newborn if n in new.program.parameters and new.program.requires_grad.get(n, True)}
    silent = {n for n in waiting if newborn[n].source is not None and not newborn[n].zero}
    if not waiting:
        return []
    values = {n: new.whole(n).clone() for n in new.program.parameters}
    model = new.with_tensors(lambda n: values[n] if n in values else new.whole(n).clone())
    # a bias before a batch norm has a gradient in eval mode only
    for training in (True, True, False, False):
        if not waiting:
            break
        example = examples(training)
        if not example:
            continue
        gradients = model.run([example], training, gradients=Weighed()).gradients
        size = max((float(g.abs().max()) for g in gradients.values() if g is not None), default=1.0)
        for name in list(waiting):
            g = gradients.get(name)
            if g is not None and float(g.abs().max()) > 1e-11 * size:  # less may be rounding
                silent.discard(name)
            if g is not None and _newborn_part(newborn[name], g) > 1e-14 * size:
                waiting.discard(name)
        for name, value in values.items():
            g = gradients.get(name)
            if g is not None:
                values[name] = value.detach() - g * (0.01 / max(size, 1e-12))
        model = new.with_tensors(lambda n: values[n] if n in values else new.whole(n).clone())
    return sorted(waiting - silent)


def _newborn_part(plan: TensorPlan, gradient: torch.Tensor) -> float:
    """Largest gradient among the newborn entries; of all entries where the tensor is new as a whole."""
    if plan.source is None or plan.zero:
        return float(gradient.abs().max())
    worst = 0.0
    for i, d in enumerate(plan.dims):
        if d is not None and i not in plan.appended and bool((d.index < 0).any()):
            rows = torch.from_numpy((d.index < 0).nonzero()[0]).to(gradient.device)
            worst = max(worst, float(gradient.index_select(i, rows).abs().max()))
    return worst
