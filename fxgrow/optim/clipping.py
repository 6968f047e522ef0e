"""Clipping by the norm that the small model's gradient would have."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from fxgrow.errors import FxgrowError
from fxgrow.ir.eager import eager
from fxgrow.optim.rates import norm_factors


@eager
@torch.no_grad()
def clip_grad_norm_(
    optimizers: torch.optim.Optimizer | Iterable[torch.optim.Optimizer],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    parameters: Tensor | Iterable[Tensor] = (),
) -> Tensor:
    """``torch.nn.utils.clip_grad_norm_`` in the units in which the optimizers step.

    Where policy ``exact`` left factors, the norm is that of the small model's gradient: each of its entries counts
    once, however many copies it has, and in its own units. Everything else counts as it is: parameters without factors
    (before any growth, after a ramp, under the other policies), and entries that no growth copied. So one line serves a
    loop from before the first growth to the end.

    Args:
        optimizers: all that train the model, or the one; their parameters' gradients are clipped together.
        max_norm, norm_type, error_if_nonfinite, foreach: as in ``torch.nn.utils.clip_grad_norm_``.
        parameters: further ones, which no optimizer holds.

    Returns:
        The norm, before clipping. Shape ``()``.

    Raises:
        FxgrowError: parameters in place of optimizers.
        RuntimeError: ``error_if_nonfinite``, and the norm is not finite.
    """
    given = [optimizers] if isinstance(optimizers, torch.optim.Optimizer) else list(optimizers)
    others = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    for one in given:
        if not isinstance(one, torch.optim.Optimizer):
            raise FxgrowError(
                f"clip_grad_norm_ takes the optimizers, which hold the factors of earlier growths, and was given a "
                f"{type(one).__name__}: clip_grad_norm_(optimizer, {max_norm})"
            )
    factors: dict[Tensor, list[Tensor | float]] = {p: [] for p in others}
    for one in given:
        factors.update({p: [] for group in one.param_groups for p in group["params"]})
    for one in given:
        factors.update({p: list(f) for p, f in norm_factors(one, norm_type).items()})
    held = [p for p in factors if p.grad is not None]
    norms = [_in_units(p, factors[p], norm_type) for p in held]
    total = get_total_norm(norms, norm_type, error_if_nonfinite, foreach)
    clip_grads_with_norm_(held, max_norm, total, foreach)
    return total


def _in_units(p: Tensor, factors: Sequence[Tensor | float], norm_type: float) -> Tensor:
    """A gradient, or a number with the norm that it would have."""
    assert p.grad is not None
    if not factors:
        return p.grad
    plain = [f for f in factors if isinstance(f, float)]
    along = [f for f in factors if isinstance(f, Tensor)]
    grad = p.grad
    if grad.is_sparse:
        grad = grad.coalesce() if not along else grad.to_dense()
    for f in along:
        grad = grad * f
    norm = get_total_norm([grad.values() if grad.is_sparse else grad], norm_type)
    for number in plain:
        norm = norm * number
    return norm
