"""Carrying a schedule out inside anybody's training loop: :class:`GrowthScheduler`."""

from __future__ import annotations

from fxgrow.scheduler.scheduler import ActionResult, GrowthScheduler
from fxgrow.scheduler.standing import Done, Sizes
from fxgrow.scheduler.timeline import Row, Timeline

__all__ = ["ActionResult", "Done", "GrowthScheduler", "Row", "Sizes", "Timeline"]
