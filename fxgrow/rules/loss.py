"""Losses of two tensors, entry by entry, then averaged, summed or left alone."""

from __future__ import annotations

from typing import Any

from fxgrow.rules import values
from fxgrow.rules.base import Rule, register_table
from fxgrow.rules.forms import ElementLoss


def table() -> dict[str, Rule]:
    """Losses of two tensors."""
    return {
        "aten.mse_loss aten.l1_loss aten.smooth_l1_loss aten.huber_loss": ElementLoss(
            zero=True, range=values.from_zero
        ),
        "aten.kl_div": ElementLoss(domain=logarithm_of_target, jumps=True),
        "aten.poisson_nll_loss": ElementLoss(domain=logarithm_of_input, jumps=True),
        "aten.soft_margin_loss aten.hinge_embedding_loss": ElementLoss(jumps=True),
        "aten.binary_cross_entropy_with_logits": ElementLoss(jumps=True),
        "aten.binary_cross_entropy": ElementLoss(
            domain=("self", "target"),
            why="new units may lie outside of 0 to 1, where the loss is not defined",
            jumps=True,
        ),
    }


def logarithm_of_target(args: dict[str, Any]) -> tuple[str, ...]:
    """``target``, unless it is a logarithm already"""
    return () if args["log_target"] is True else ("target",)


def logarithm_of_input(args: dict[str, Any]) -> tuple[str, ...]:
    """``input``, unless it is a logarithm already"""
    return () if args["log_input"] is True else ("input",)


register_table(__name__, table())
