"""Optimizers: state carried over to grown parameters, and rates per slice."""

from fxgrow.optim.carry import carry, carry_
from fxgrow.optim.clipping import clip_grad_norm_
from fxgrow.optim.policies import POLICIES, check_optimizer
from fxgrow.optim.rates import load_rates_state, rates_state, slice_rates
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
    "carry_",
    "clip_grad_norm_",
    "check_optimizer",
    "load_rates_state",
    "moment_of",
    "rates_state",
    "register_elementwise",
    "register_state",
    "register_tiled",
    "slice_rates",
]
