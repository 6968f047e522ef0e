"""Optimizers: state carried over to grown parameters, and rates per slice."""

from fxgrow.optim.carry import POLICIES, carry, check_optimizer, slice_rates
from fxgrow.weights.moments import (
    ELEMENTWISE,
    KINDS,
    MOMENTS,
    Moment,
    moment_of,
    register_elementwise,
    register_state,
    register_tiled,
)

__all__ = [
    "ELEMENTWISE",
    "KINDS",
    "MOMENTS",
    "POLICIES",
    "Moment",
    "carry",
    "check_optimizer",
    "moment_of",
    "register_elementwise",
    "register_state",
    "register_tiled",
    "slice_rates",
]
