"""Checkpoints of other people's classes: a folder in, a larger folder out.

``grow_checkpoint`` in ``growing.py`` reads from top to bottom. Its parts: :mod:`~fxgrow.folders.tensorfile` reads and
writes the safetensors format a tensor at a time, :mod:`~fxgrow.folders.source` says what a folder holds,
:mod:`~fxgrow.folders.building` makes the class from its config without memory for weights,
:mod:`~fxgrow.folders.configs` finds and proves the grown config, and :mod:`~fxgrow.folders.writing` streams the grown
weights. ``compare_folders`` holds two against each other.
"""

from __future__ import annotations

from fxgrow.folders.comparing import Comparison, compare_folders
from fxgrow.folders.growing import Grown, grow_checkpoint
from fxgrow.folders.opened import Opened, opened

__all__ = ["Comparison", "Grown", "Opened", "compare_folders", "grow_checkpoint", "opened"]
