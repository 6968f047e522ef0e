"""The training loop: a model trains, grows by a schedule while it runs, and goes on training.

One loop, meant to be read from top to bottom: :func:`train` in ``loop.py``. What it trains is a :class:`Task`; how long
and how fast is a :class:`Hyper`. ``fxgrow train package.module:callable`` and the examples both end up here.

In the folder of a run::

    log.jsonl                     a JSON object a line: start, step, eval, growth, action, skipped, checkpoint, end
    checkpoints/latest            the name of the newest complete checkpoint
    checkpoints/step-00000100.0/  model.safetensors, optimizer.safetensors, state.json

A checkpoint holds no pickle. A run that has grown is resumed by replaying what its schedule has done on the original
model, which gives modules and optimizers of the right shapes, and then loading the tensors into them.

Caveat, also for loops of your own: clipping by the *global* gradient norm is not invariant under growth. The copies of
a unit share the gradient of the weights that lead into it, and each has the whole gradient of the weights that lead out
of it, so that the norm is another one although both models compute the same function. Clipping then scales the first
updates after a growth differently. It does not touch the exactness of the growth itself; turn it off (``clip=0``) to
compare trajectories.
"""

from __future__ import annotations

from fxgrow.ir.flops import flop_counter
from fxgrow.ir.packing import pack, unpack
from fxgrow.training.batches import seeded, to_device
from fxgrow.training.begin import begin, planned
from fxgrow.training.checkpoints import compare, load_model, newest, restore, save, untied
from fxgrow.training.copies import Copies
from fxgrow.training.counting import count_parameters
from fxgrow.training.display import describe, describe_action, describe_growth, human, progress_bar
from fxgrow.training.hyper import Hyper, base_rate, hyper_of
from fxgrow.training.log import Log, action_line, growth_line, read_log, standing
from fxgrow.training.loop import compiled, due, evaluate, train
from fxgrow.training.parallel import Parallel, launched
from fxgrow.training.run import Run, shapes
from fxgrow.training.task import Batch, Task, adamw, first_numel, model_loss, shard_blocks, whole_batch

__all__ = [
    "Batch",
    "Copies",
    "Hyper",
    "Log",
    "Parallel",
    "Run",
    "Task",
    "action_line",
    "adamw",
    "base_rate",
    "begin",
    "compare",
    "compiled",
    "count_parameters",
    "describe",
    "describe_action",
    "describe_growth",
    "due",
    "evaluate",
    "first_numel",
    "flop_counter",
    "growth_line",
    "human",
    "hyper_of",
    "launched",
    "load_model",
    "model_loss",
    "newest",
    "pack",
    "planned",
    "progress_bar",
    "read_log",
    "restore",
    "save",
    "seeded",
    "shapes",
    "shard_blocks",
    "standing",
    "to_device",
    "train",
    "unpack",
    "untied",
    "whole_batch",
]
