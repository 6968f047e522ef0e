"""A schedule in ``transformers.Trainer``: the trainer's model and optimizer grow in place, and it goes on with them.

::

    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[GrowthCallback("schedule.yaml")])
    trainer.train()
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.training_args import ParallelMode

from fxgrow.errors import CheckpointError, FxgrowError
from fxgrow.integrations.common import (
    check_made,
    check_sizes,
    example_of,
    finite,
    hold,
    numbers,
    record,
    replayed,
    warn_unseen,
)
from fxgrow.ir.adapters import adapters_of
from fxgrow.optim.wrappers import unwrapped
from fxgrow.reading import read_json
from fxgrow.schedule import Grow, LoraDecay, LoraMerge, LoraScale, Schedule
from fxgrow.scheduler import ActionResult, GrowthScheduler
from fxgrow.scheduler.progress import Partial

#: actions after which the same weights compute something else, or are none of the model's
_ANOTHER = (Grow, LoraDecay, LoraMerge, LoraScale)


class GrowthCallback(TrainerCallback, ExportableState):
    """Carries a schedule out in a ``Trainer``.

    Metrics of triggers are those that the trainer logs: ``loss``, ``eval_loss`` and whatever ``compute_metrics`` adds.
    Changes of the learning rate are made while the optimizer steps; the trainer's own scheduler, and what it logs, goes
    on as it was. ``evaluate`` and ``checkpoint`` are done by the trainer, after the step. The best model
    (``load_best_model_at_end``) is that since the last growth, or change of adapters.

    Args:
        schedule: anything :meth:`Schedule.parse` takes. What the trainer's loop fixes at its start, the size of batches
            and the accumulation, cannot be changed.
        example: keyword arguments that the model is captured with; the first two samples of the first batch if left
            out.
        log: a file that gets one JSON line for each action.
        how: further arguments of :class:`~fxgrow.GrowthScheduler`, such as ``calls`` or ``verify``.

    Raises:
        SpecError: the schedule is wrong, or changes what the trainer fixes.
    """

    def __init__(
        self,
        schedule: Schedule | Mapping[str, Any] | list[Any] | str | Path,
        example: Mapping[str, Any] | None = None,
        log: str | Path | None = None,
        **how: Any,
    ) -> None:
        self._example = None if example is None else dict(example)
        self._model: nn.Module | None = None
        how = {"newcomers": self._group, **how}
        self.scheduler = GrowthScheduler(schedule, lambda: ((), self._example or {}), **how)
        check_sizes(self.scheduler.schedule, "the Trainer")
        self._log = None if log is None else Path(log)
        self._metrics: dict[str, float] = {}
        self._names: set[str] = set()  # of all metrics so far
        self._still: list[nn.Parameter] = []
        self.done: list[ActionResult] = []

    # the trainer's checkpoints

    def state(self) -> dict[str, Any]:
        """What the trainer writes of this callback into a checkpoint."""
        return {"args": {}, "attributes": {"growth": self.scheduler.state_dict(), "metrics": finite(self._metrics)}}

    def resume(self, model: nn.Module, checkpoint: str | Path) -> nn.Module:
        """Grow a model, fresh from its small config, to what it was in a checkpoint of the trainer.

        Call it before ``Trainer(model, …)`` and ``trainer.train(resume_from_checkpoint=checkpoint)``, which loads the
        weights. A model that ``from_pretrained(checkpoint)`` made has the sizes already, and needs no call.

        Returns:
            The model.

        Raises:
            CheckpointError: it is no checkpoint of a trainer with this callback.
            SpecError: what was done there is not in this schedule.
        """
        if self._example is None:
            raise FxgrowError("to resume, give the callback an example=: there is no batch of the trainer yet")
        self._read(read_json(Path(checkpoint) / "trainer_state.json", finite=False), str(checkpoint))
        self._still = replayed(self.scheduler, model)
        return model

    def _read(self, state: Any, where: str) -> None:
        callbacks = state.get("stateful_callbacks") if isinstance(state, Mapping) else None
        own = callbacks.get(type(self).__name__) if isinstance(callbacks, Mapping) else None
        try:
            attributes = own["attributes"]  # type: ignore[index]
            growth = attributes["growth"]
        except (KeyError, TypeError):
            raise CheckpointError(f"{where} is no checkpoint of a trainer with a {type(self).__name__}") from None
        self.scheduler.load_state_dict(growth)
        self._metrics = numbers(attributes.get("metrics"))  # measured, and to be seen after the next step

    # the trainer's events

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the whole schedule before the first step."""
        if args.parallel_mode == ParallelMode.DISTRIBUTED or getattr(args, "fsdp", None) or args.deepspeed:
            raise FxgrowError("a Trainer over several processes holds its model in wrappers that would not follow")
        model, optimizer = kwargs["model"], unwrapped(kwargs["optimizer"])
        self._model = model if _grouped(model, optimizer) else None
        if state.global_step and not self.scheduler.done:
            self._read({"stateful_callbacks": state.stateful_callbacks}, "what the trainer resumes from")
            check_made(self.scheduler)
        hold(self._still)
        self._still = []
        if self._example is None:
            batch = next(iter(kwargs["train_dataloader"]))
            self._example = example_of(dict(batch), model.device)
        if self.scheduler.next is not None:
            with _bare(model):
                self.scheduler.check(model, optimizer)
        self.scheduler.steer(optimizer)

    def _group(self, name: str) -> int | None:
        """The group that the Trainer would give a new parameter, as it does when training is resumed."""
        return None if self._model is None else int(name not in _decaying(self._model))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Note what was measured, for the next step."""
        self._note(logs)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """Note what was measured, for the next step."""
        self._note(metrics)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say what was waited for in vain."""
        warn_unseen(self.scheduler, self._names)

    def _note(self, metrics: Any) -> None:
        found = numbers(metrics)
        self._metrics |= found
        self._names |= set(found)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Do what is due between this step and the next."""
        metrics, self._metrics = Partial(self._metrics), {}
        given = {"step": state.global_step, "epoch": state.epoch, "metrics": metrics}
        tokens = state.num_input_tokens_seen or None
        another = any(hook.fading for _, _, hook in adapters_of(kwargs["model"]))
        while done := self._step(kwargs["model"], kwargs["optimizer"], tokens=tokens, **given):
            record(done, self.done, self._log)
            another = another or (isinstance(done.action, _ANOTHER) and not done.error)
            if done.op == "evaluate" and not done.error:
                control.should_evaluate = True
            elif done.op == "checkpoint" and not done.error:
                control.should_save = True

        if another:  # the best weights so far are another model's, which load_best_model_at_end would put into this one
            state.best_metric = state.best_model_checkpoint = state.best_global_step = None

    def _step(self, model: nn.Module, optimizer: Any, **given: Any) -> ActionResult | None:
        with _bare(model):
            return self.scheduler.step(model, optimizer, **given)


def _decaying(model: nn.Module) -> set[str]:
    """The names of parameters whose weights decay, as a Trainer divides them."""
    rule: Any = Trainer.get_decay_parameter_names  # of the class: it looks at the model alone
    return set(rule(None, model))


def _grouped(model: nn.Module, optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer has a Trainer's two groups: what decays, and what does not."""
    decaying, groups = _decaying(model), [{id(p) for p in g["params"]} for g in optimizer.param_groups]
    if len(groups) != 2:
        return False
    held = {n: p for n, p in model.named_parameters() if any(id(p) in group for group in groups)}
    return all((id(p) in groups[0]) == (n in decaying) for n, p in held.items())


@contextlib.contextmanager
def _bare(model: nn.Module) -> Iterator[None]:
    """A model without the mixed precision that accelerate wraps its forward in, which is around it."""
    held = vars(model)
    if "_original_forward" not in held or "forward" not in held:
        yield
        return
    wrapped, original = held.pop("forward"), held.pop("_original_forward")
    if getattr(original, "__func__", None) is not type(model).forward:
        held["forward"] = original
    try:
        yield
    finally:
        held["forward"], held["_original_forward"] = wrapped, original


__all__ = ["GrowthCallback"]
