"""Everything fxgrow raises. Each message says what is wrong, where, and what to do."""

from __future__ import annotations


class FxgrowError(Exception):
    """Base of every error fxgrow raises on purpose."""


class CaptureError(FxgrowError):
    """The model could not be turned into a graph by ``torch.export``."""


class InputError(FxgrowError, ValueError):
    """A module was called with an input that its graph is not for; the message names the input, its size and why."""


class SpecError(FxgrowError, ValueError):
    """A spec, a schedule or a name in it is wrong."""


class GrowthRefused(FxgrowError):
    """The growth asked for cannot be proved exact; the message gives the op, the source line and the reason."""


class ExactnessError(FxgrowError):
    """A growth that the planner called exact measured inexact: a bug in a rule. Nothing was changed."""


class CheckpointError(FxgrowError):
    """A checkpoint does not fit the model or the plan it is used with."""


class DiskError(CheckpointError, OSError):
    """A checkpoint cannot be written: no space, no permission. What was there before is unchanged."""
