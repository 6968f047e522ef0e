"""Optimizers: state carried over to grown parameters, and rates per slice."""

from fxgrow.optim.carry import POLICIES, carry, check_optimizer, slice_rates
from fxgrow.weights.moments import ELEMENTWISE

__all__ = ["ELEMENTWISE", "POLICIES", "carry", "check_optimizer", "slice_rates"]
