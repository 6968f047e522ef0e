"""The growth passes, one file each. Importing this package registers them."""

from fxgrow.passes import deepen, extend, insert, lora, widen
from fxgrow.passes.base import PASSES, GrowthPass, register_pass
from fxgrow.passes.state import State, run_operation

__all__ = ["PASSES", "GrowthPass", "State", "register_pass", "run_operation"]
_ = (deepen, extend, insert, lora, widen)
