"""When to grow, and what else to do in a run: a schedule, as one pydantic model.

:class:`fxgrow.GrowthScheduler` carries it out.

A schedule is a list of events; each has a trigger and operations: those of a :class:`~fxgrow.spec.GrowthSpec`, and what
else happens to a run (``actions.py``)::

    version: 2
    events:
      - name: wider MLP
        trigger: {step: 200}            # tokens, epoch, seconds, plateau: {metric: val_loss, patience: 3}, below: {...}
        operations:                     # several fields of a trigger must all hold
          - {op: widen, axis: "transformer.h.*.mlp/hidden", factor: 2, noise: {kind: antisymmetric}}
          - {op: learning_rate, rewarm: 50, from: 0.2}
          - {op: accumulation, factor: 2}
        optimizer: {policy: asymmetric, warmup: 100}
        on_error: stop                  # or skip
      - trigger: {step: 400}
        operations: [{op: stack_layers, value: 2}]
"""

from __future__ import annotations

from fxgrow.schedule.actions import (
    ACTIONS,
    Accumulation,
    Action,
    BatchSize,
    Checkpoint,
    Dropout,
    Evaluate,
    Freeze,
    LearningRate,
    LoraDecay,
    LoraMerge,
    LoraScale,
    SequenceLength,
    Unfreeze,
    WeightDecay,
)
from fxgrow.schedule.aliases import ALIASES
from fxgrow.schedule.base import Strict
from fxgrow.schedule.events import Event, Grow, OptimizerPolicy
from fxgrow.schedule.schedule import Schedule, explain, json_schema
from fxgrow.schedule.triggers import Below, Plateau, Trigger

__all__ = [
    "ACTIONS",
    "ALIASES",
    "Accumulation",
    "Action",
    "BatchSize",
    "Below",
    "Checkpoint",
    "Dropout",
    "Evaluate",
    "Event",
    "Freeze",
    "Grow",
    "LearningRate",
    "LoraDecay",
    "LoraMerge",
    "LoraScale",
    "OptimizerPolicy",
    "Plateau",
    "Schedule",
    "SequenceLength",
    "Strict",
    "Trigger",
    "Unfreeze",
    "WeightDecay",
    "explain",
    "json_schema",
]
