# What fxgrow offers. Type checkers read this file in place of __init__.py, and so does fxgrow.lazy at run time.
from fxgrow import passes as passes
from fxgrow.ahead import compile_ahead as compile_ahead
from fxgrow.checkpoint import Loaded as Loaded
from fxgrow.checkpoint import load as load
from fxgrow.checkpoint import save as save
from fxgrow.compile import compile_regions as compile_regions
from fxgrow.errors import CaptureError as CaptureError
from fxgrow.errors import CheckpointError as CheckpointError
from fxgrow.errors import ExactnessError as ExactnessError
from fxgrow.errors import FxgrowError as FxgrowError
from fxgrow.errors import GrowthRefused as GrowthRefused
from fxgrow.errors import InputError as InputError
from fxgrow.errors import RankError as RankError
from fxgrow.errors import SpecError as SpecError
from fxgrow.expand import expand as expand
from fxgrow.explanation import explain as explain
from fxgrow.folders import compare_folders as compare_folders
from fxgrow.folders import grow_checkpoint as grow_checkpoint
from fxgrow.growth import Growth as Growth
from fxgrow.growth import grow as grow
from fxgrow.growth import plan_growth as plan_growth
from fxgrow.plan import GrowthPlan as GrowthPlan
from fxgrow.program import Program as Program
from fxgrow.program import capture as capture
from fxgrow.rules import register_rule as register_rule
from fxgrow.schedule import Schedule as Schedule
from fxgrow.scheduler import GrowthScheduler as GrowthScheduler
from fxgrow.spec import Deepen as Deepen
from fxgrow.spec import Extend as Extend
from fxgrow.spec import GrowthSpec as GrowthSpec
from fxgrow.spec import Insert as Insert
from fxgrow.spec import Lora as Lora
from fxgrow.spec import Noise as Noise
from fxgrow.spec import Widen as Widen
from fxgrow.spec import register_operation as register_operation
from fxgrow.verify.receipt import Receipt as Receipt

__version__: str
__all__: list[str]
