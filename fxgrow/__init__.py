"""fxgrow: a torch.fx growth compiler. Grow neural networks while they train, exactly.

program = fxgrow.capture(model, args)
growth = fxgrow.grow(model, spec, args)
optimizer = growth.carry(optimizer)
"""

from pathlib import Path as _Path

# In a checkout, passes and kernels stand beside this folder and not in it. A wheel that is imported in the repository's
# root finds this folder first.
if not _Path(__file__).with_name("passes").is_dir():
    if not (_Path(__file__).parents[1] / "passes" / "base.py").is_file():
        raise ImportError(f"{_Path(__file__).parent} is fxgrow without its passes and kernels; install the whole of it")
    __path__.append(str(_Path(__file__).parents[1]))

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
