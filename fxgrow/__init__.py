"""fxgrow: a torch.fx growth compiler. Grow neural networks while they train, exactly.

program = fxgrow.capture(model, args)
growth = fxgrow.grow(model, spec, args)
optimizer = growth.carry(optimizer)
"""

from fxgrow import passes
from fxgrow.capture import Program, capture
from fxgrow.checkpoint import Loaded, load, save
from fxgrow.errors import (
    CaptureError,
    CheckpointError,
    ExactnessError,
    FxgrowError,
    GrowthRefused,
    InputError,
    SpecError,
)
from fxgrow.expand import expand
from fxgrow.growth import Growth, grow, plan_growth
from fxgrow.plan import GrowthPlan
from fxgrow.rules import register_rule
from fxgrow.schedule import GrowthScheduler, Schedule
from fxgrow.spec import Deepen, Extend, GrowthSpec, Insert, Noise, Widen, register_operation
from fxgrow.verify import Receipt

__version__ = "0.1.0"

__all__ = [
    "CaptureError",
    "CheckpointError",
    "Deepen",
    "Extend",
    "ExactnessError",
    "FxgrowError",
    "Growth",
    "GrowthPlan",
    "GrowthRefused",
    "GrowthScheduler",
    "GrowthSpec",
    "InputError",
    "Insert",
    "Loaded",
    "Noise",
    "Program",
    "Receipt",
    "Schedule",
    "SpecError",
    "Widen",
    "capture",
    "expand",
    "grow",
    "load",
    "passes",
    "plan_growth",
    "register_operation",
    "register_rule",
    "save",
]
