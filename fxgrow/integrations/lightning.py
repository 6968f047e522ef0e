"""A schedule in a Lightning ``Trainer``: a net of the module, and the optimizers, grow in place.

::

    callback = GrowthCallback("schedule.yaml", net="net", example=(x[:2],))
    pl.Trainer(callbacks=[callback]).fit(module, data)
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

try:
    from lightning.pytorch import Callback
except ImportError:
    from pytorch_lightning import Callback

from fxgrow.errors import CheckpointError, FxgrowError, SpecError
from fxgrow.integrations.common import (
    check_made,
    check_sizes,
    finite,
    hold,
    numbers,
    record,
    replayed,
    warn_unseen,
)
from fxgrow.optim.wrappers import unwrapped
from fxgrow.schedule import Schedule
from fxgrow.scheduler import ActionResult, GrowthScheduler
from fxgrow.scheduler.progress import Partial


class GrowthCallback(Callback):
    """Carries a schedule out in a Lightning ``Trainer``.

    Metrics of triggers are those that the module logs (``trainer.callback_metrics``). Changes of the learning rate are
    made while the optimizers step; their own schedulers, and what is logged of them, go on as they were. ``checkpoint``
    saves ``growth-<step>.ckpt`` in the trainer's folder.

    Args:
        schedule: anything :meth:`Schedule.parse` takes, without changes of the batch, and without ``evaluate``.
        net: the path of the net within the module that grows, such as ``"net"``; "" for the module itself, whose
            ``forward`` is then captured.
        example: the positional arguments, or a mapping of the keyword arguments, that the net is captured with; a batch
            of at least two.
        log: a file that gets one JSON line for each action.
        how: further arguments of :class:`~fxgrow.GrowthScheduler`, such as ``calls`` or ``verify``.

    Raises:
        SpecError: the schedule is wrong, or changes what the trainer fixes.
    """

    def __init__(
        self,
        schedule: Schedule | Mapping[str, Any] | list[Any] | str | Path,
        net: str,
        example: tuple[Any, ...] | Mapping[str, Any],
        log: str | Path | None = None,
        **how: Any,
    ) -> None:
        args, kwargs = ((), dict(example)) if isinstance(example, Mapping) else (tuple(example), None)
        self.scheduler = GrowthScheduler(schedule, args, kwargs, **how)
        check_sizes(self.scheduler.schedule, "Lightning")
        for place, action in self.scheduler.schedule.placed_actions():
            if action.op == "evaluate":
                raise SpecError(f"{place}: Lightning validates when its Trainer says: leave out evaluate")
        self.net = net
        self._log = None if log is None else Path(log)
        self._seen: dict[str, float] = {}
        self._new: dict[str, float] = {}  # measured since the last step
        self._validated: set[str] = set()  # the names of what validation measures
        self._before: dict[str, float] = {}
        self._still: list[nn.Parameter] = []
        self.done: list[ActionResult] = []

    # Lightning's checkpoints

    def state_dict(self) -> dict[str, Any]:
        """What Lightning saves of this callback."""
        growth = self.scheduler.state_dict()
        return {"growth": growth, "metrics": finite(self._new), "seen": finite(self._seen)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What Lightning loads; the module has the sizes already, by :meth:`resume` or as it was made."""
        self._new, self._seen = numbers(state_dict.get("metrics")), numbers(state_dict.get("seen"))
        if not self.scheduler.done:
            self.scheduler.load_state_dict(state_dict["growth"])
            check_made(self.scheduler)

    def resume(self, module: nn.Module, checkpoint: str | Path) -> nn.Module:
        """Grow a module, fresh from its small sizes, to what it was in a checkpoint of Lightning.

        Call it before ``trainer.fit(module, …, ckpt_path=checkpoint)``, which loads the weights. A module that is made
        in the larger sizes needs no call.

        Returns:
            The module.

        Raises:
            CheckpointError: it is no checkpoint with this callback.
            SpecError: what was done there is not in this schedule.
        """
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
        states = saved.get("callbacks") if isinstance(saved, dict) else None
        own = states.get(self.state_key) if isinstance(states, dict) else None
        if own is None:
            raise CheckpointError(f"{checkpoint} is no checkpoint with a {self.state_key}")
        self.scheduler.load_state_dict(own["growth"])
        self._still = replayed(self.scheduler, module.get_submodule(self.net))
        return module

    # Lightning's events

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Look at the whole schedule before the first step."""
        if trainer.world_size > 1:
            raise FxgrowError("Lightning over several processes holds its module in wrappers that would not follow")
        if not pl_module.automatic_optimization:
            raise FxgrowError("with manual optimization the loop is yours: use fxgrow.GrowthScheduler in training_step")
        hold(self._still)
        self._still = []
        optimizers = [unwrapped(o) for o in trainer.optimizers]
        if self.scheduler.next is not None:
            self.scheduler.check(pl_module.get_submodule(self.net), optimizers)
        for optimizer in optimizers:
            self.scheduler.steer(optimizer)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Note what there is, to see what a validation measures."""
        self._before = numbers(trainer.callback_metrics)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Note what was measured, for the next step: a report each time, whether it has changed or not."""
        now = numbers(trainer.callback_metrics)
        self._validated |= {name for name, value in now.items() if self._before.get(name) != value}
        if not trainer.sanity_checking:
            self._new |= {name: now[name] for name in self._validated if name in now}

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Say what was waited for in vain."""
        warn_unseen(self.scheduler, {*self._seen, *self._validated})

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Do what is due between the last step and this one."""
        if batch_idx % trainer.accumulate_grad_batches:
            return  # gradients wait for a step
        now = numbers(trainer.callback_metrics)
        changed = {n: value for n, value in now.items() if n not in self._validated and self._seen.get(n) != value}
        metrics, self._new, self._seen = Partial({**changed, **self._new}), {}, now
        net, optimizers = pl_module.get_submodule(self.net), list(trainer.optimizers)
        given: dict[str, Any] = {"step": trainer.global_step, "epoch": trainer.current_epoch, "metrics": metrics}
        while done := self.scheduler.step(net, optimizers, **given):
            record(done, self.done, self._log)
            if done.op == "checkpoint" and not done.error:
                folder = Path(trainer.default_root_dir)
                trainer.save_checkpoint(folder / f"growth-{trainer.global_step}.ckpt")


__all__ = ["GrowthCallback"]
