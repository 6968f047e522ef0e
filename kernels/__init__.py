"""fxgrow.kernels: weights grown at the speed of memory, without temporaries; see docs/kernels.md."""

from fxgrow.kernels.dispatch import Backend, backends
from fxgrow.kernels.interface import materialise, materialise_many
from fxgrow.kernels.job import NoiseTooSmall
from fxgrow.kernels.maps import FILL_CONSTANT, FILL_MEAN, FILL_RANDOM, FILL_ZERO, DimMap, Noise
from fxgrow.kernels.memory import release, unreadable
from fxgrow.kernels.native import get_ready
from fxgrow.kernels.prepare import Sums
from fxgrow.kernels.tables import continue_band, continue_line, continue_waves

__all__ = [
    "FILL_CONSTANT",
    "FILL_MEAN",
    "FILL_RANDOM",
    "FILL_ZERO",
    "DimMap",
    "Noise",
    "NoiseTooSmall",
    "Sums",
    "Backend",
    "backends",
    "continue_band",
    "continue_line",
    "continue_waves",
    "get_ready",
    "materialise",
    "materialise_many",
    "release",
    "unreadable",
]
