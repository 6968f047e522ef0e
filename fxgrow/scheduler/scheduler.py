"""The scheduler: carries a schedule out inside anybody's training loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.optim.swa_utils import AveragedModel

from fxgrow.ahead import compile_ahead
from fxgrow.errors import FxgrowError, RankError, SpecError
from fxgrow.growth import Growth, grow
from fxgrow.ir.fsdp import reshard
from fxgrow.ir.plain import is_distributed
from fxgrow.ir.replicas import around, check_replicas, following, innermost, rewrapped, within
from fxgrow.optim.members import Newcomers
from fxgrow.optim.newborn import Frozen, Part
from fxgrow.optim.wrappers import unwrapped
from fxgrow.program import capture
from fxgrow.ranks import agree, together
from fxgrow.schedule import (
    Action,
    Dropout,
    Event,
    Freeze,
    Grow,
    LearningRate,
    LoraDecay,
    LoraMerge,
    LoraScale,
    Schedule,
    Unfreeze,
    WeightDecay,
)
from fxgrow.scheduler import adapters
from fxgrow.scheduler.acting import (
    PARTS,
    Change,
    check_part,
    freeze,
    matching_parameters,
    set_dropout,
    set_weight_decay,
    unfreeze,
)
from fxgrow.scheduler.ahead import AheadOfSchedule
from fxgrow.scheduler.progress import Progress, Watch, amount, named, whole
from fxgrow.scheduler.standing import Done, Sizes, learning_rate, rate_factor, rate_of, sizes_after
from fxgrow.scheduler.state import read, written
from fxgrow.scheduler.steering import Steering
from fxgrow.scheduler.timeline import DryRun, Timeline
from fxgrow.sharded.sharding import Sharding, group_around

Optimizers = torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None


@dataclass(frozen=True)
class ActionResult:
    """An action of a schedule that has just been done, or was left out (``on_error: skip``).

    Attributes:
        event: which event of the schedule, from 0.
        name: the event's.
        trigger: the event's, in words.
        action: what was done; ``op`` names it, ``grow`` for growths.
        module, optimizer: those that were passed, grown; other objects only where the scheduler grows no model in
            place. The optimizer is None, one, or a list, as it was passed.
        growth: with its plan and receipt, where it was one.
        step: after so many steps.
        before, after: what has changed, by name; of a growth the number of parameters.
        seconds: how long it took.
        error: why it was left out; "" where it was done.
    """

    event: int
    name: str
    trigger: str
    action: Grow | Action
    module: torch.nn.Module
    optimizer: Any
    growth: Growth | None
    step: int
    before: dict[str, Any] = field(default_factory=dict)
    after: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    error: str = ""

    @property
    def op(self) -> str:
        """The name of what was done; ``grow`` for growth operations."""
        return self.action.op

    def to_dict(self) -> dict[str, Any]:
        """One line of a log, as plain data; ``took`` is in seconds."""
        line: dict[str, Any] = {
            "op": self.op,
            "index": self.event,
            "name": self.name,
            "trigger": self.trigger,
            "step": self.step,
            "what": _plain(self.action),
            "before": self.before,
            "after": self.after,
            "took": round(self.seconds, 3),
        }
        if self.growth is not None:
            receipt = self.growth.receipt
            line["receipt"] = {
                "exactness": receipt.exactness,
                "error_float64": receipt.error_float64,
                "error_native": receipt.error_native,
            }
        return {**line, "error": self.error} if self.error else line

    def apply_to_copy_(self, copy: torch.nn.Module) -> None:
        """Do the same to a copy of the model that has weights of its own, such as a running average of them.

        Right after the step that returned this, and before the copy takes anything from the model again. What holds
        gradients back, or is the optimizer's or the loop's, is nothing to a copy.

        Args:
            copy: as :meth:`fxgrow.Growth.apply_to_copy_` takes it.

        Raises:
            FxgrowError: it cannot be done to the copy, which is as it was; a fading adapter is one step after another.
        """
        inner = innermost(copy.module if isinstance(copy, AveragedModel) else copy)
        if self.error:
            return
        if self.growth is not None:
            self.growth.apply_to_copy_(copy)
        elif isinstance(self.action, LoraScale):
            adapters.scale(inner, self.action)
        elif isinstance(self.action, LoraMerge):
            adapters.merge(inner, [], self.action)
        elif isinstance(self.action, Dropout):
            set_dropout(inner, self.action)
        elif isinstance(self.action, LoraDecay):
            raise FxgrowError(
                "lora_decay: adapters of a copy do not fade with the model's: make the copy anew after it"
            )


def _plain(action: Grow | Action) -> dict[str, Any]:
    if isinstance(action, Grow):
        return {"operations": action.spec.to_dict()["operations"], "optimizer": action.optimizer.model_dump()}
    return {"op": action.op, **action.model_dump(exclude_defaults=True, by_alias=True)}


class GrowthScheduler:
    """Carries out a schedule inside a training loop.

    ::

        scheduler = GrowthScheduler("schedule.yaml", args=(idx[:2], targets[:2]), accumulation=4)
        for step in range(steps):
            while done := scheduler.step(model, optimizer, step=step, metrics={"val_loss": val_loss}):
                print(done.name, done.op, done.after)
            lr = scheduler.learning_rate(base_lr, step)
            for micro_step in range(scheduler.accumulation):
                ...

    Args:
        schedule: anything :meth:`Schedule.parse` takes.
        args, kwargs: example inputs for :func:`fxgrow.grow`, or a callable that returns ``(args, kwargs)`` anew
            at each growth. Use a batch of at least 2, on the model's device.
        calls: further ways of calling the model, by name, as :func:`fxgrow.grow` takes them, or a callable that returns
            them; a model that is sampled from, say, is also called without targets.
        in_place: grow the model and the optimizer that are passed (``growth.apply_``, ``growth.carry_``); False for
            classes that cannot compute what they grow to: each result holds a module and an optimizer in their place.
        accumulation, batch_size, sequence_length: what the loop starts with; see the properties of these names.
        before: called with an action that is about to be done; what it raises ends the step, with nothing done.
        verify, consume: passed to :func:`fxgrow.grow`; what grows in place is never consumed.
        compile_ahead: compile what the next growth makes in a background process while the model is trained, so that
            the step after the growth does not wait for the compiler; True, or options for ``torch.compile``, as
            ``growth.compile`` is given them. See :func:`fxgrow.compile_ahead`; the example inputs have to be of the
            sizes in which the model is trained. What cannot be compiled ahead is compiled when it is needed, with a
            warning.
        newcomers: passed to ``growth.carry_``: which of several optimizers, or of one's groups, takes parameters that
            were made of nothing, such as adapters.

    Raises:
        SpecError: the schedule is wrong, or multiplies a size that is not given here.
    """

    def __init__(
        self,
        schedule: Schedule | Mapping[str, Any] | list[Any] | str | Path | None,
        args: tuple[Any, ...] | Callable[[], tuple[tuple[Any, ...], dict[str, Any]]] = (),
        kwargs: dict[str, Any] | None = None,
        *,
        calls: Mapping[str, Any] | Callable[[], Mapping[str, Any]] | None = None,
        in_place: bool = True,
        accumulation: int = 1,
        batch_size: int | None = None,
        sequence_length: int | None = None,
        before: Callable[[Grow | Action], None] | None = None,
        verify: Any = "auto",
        consume: bool = False,
        newcomers: Newcomers = None,
        compile_ahead: bool | Mapping[str, Any] = False,
    ) -> None:
        self.schedule = Schedule.parse(schedule)
        self._args, self._kwargs, self._calls = args, kwargs, calls
        self._verify, self._consume, self._in_place = verify, consume and not in_place, in_place
        self._before, self._newcomers = before, newcomers
        given = {"accumulation": accumulation, "batch_size": batch_size, "sequence_length": sequence_length}
        for name, size in given.items():
            if (size is None and name != "accumulation") or (type(size) is int and size >= 1):
                continue
            raise SpecError(f"{name}={size!r} is no number of 1 or more")
        self._first = Sizes(accumulation, batch_size, sequence_length)
        self._done: list[Done] = []
        self._watch = Watch()
        self._growth: Growth | None = None
        self._frozen: Frozen | None = None
        self._steers = False
        self._now = 0
        self._started, self._seconds = time.monotonic(), 0.0
        self._ahead = AheadOfSchedule(compile_ahead)
        sizes = self._first
        for place, action in self.schedule.placed_actions():
            old, sizes = sizes, sizes.after(action, place)
            rate_of(action, old, sizes)

    # what is to come, and what has been

    @property
    def done(self) -> list[Done]:
        """The actions that have been done, in order, those too that were left out by an error."""
        return list(self._done)

    @property
    def next(self) -> Event | None:
        """The event that is waited for, or that is not done as a whole; None when all have happened."""
        number, _ = self._next()
        return self.schedule.events[number] if number < len(self.schedule.events) else None

    def _next(self) -> tuple[int, int]:
        """Event and action that come next."""
        if not self._done:
            return 0, 0
        last = self._done[-1]
        if last.number + 1 < len(self.schedule.events[last.event].actions):
            return last.event, last.number + 1
        return last.event + 1, 0

    # the loop's settings

    @property
    def accumulation(self) -> int:
        """Micro-batches per optimizer step, from here on."""
        return self._sizes.accumulation

    @property
    def batch_size(self) -> int | None:
        """Examples per micro-batch, from here on; None where neither the loop nor the schedule says."""
        return self._sizes.batch_size

    @property
    def sequence_length(self) -> int | None:
        """The length of the sequences that the loop draws, from here on; None as for :attr:`batch_size`."""
        return self._sizes.sequence_length

    @property
    def _sizes(self) -> Sizes:
        return sizes_after(self._first, self._done)

    def learning_rate(self, base: Callable[[int], float], step: int) -> float:
        """The learning rate of a step: the loop's own schedule, and what events have changed.

        Args:
            base: the loop's own, of a step counted from 0.
            step: completed so far.
        """
        return learning_rate(self._done, self._first, _called(base), whole(step, "step"))

    def lr_factor(self, step: int) -> float:
        """Factor on the loop's own learning rate at ``step``.

        Raises:
            SpecError: the schedule sets the rate or its position, which no factor can say; see :meth:`learning_rate`.
        """
        for place, action in self.schedule.placed_actions():
            if isinstance(action, LearningRate) and (action.set is not None or action.position is not None):
                raise SpecError(
                    f"{place} sets the learning rate or its position, which is no factor on the loop's own: use "
                    "scheduler.learning_rate(base, step)"
                )
        return self.learning_rate(lambda _: 1.0, step)

    def steer(self, optimizer: torch.optim.Optimizer) -> Steering:
        """Let the schedule change an optimizer's learning rates where others set them.

        In loops whose learning rate is a scheduler's of ``torch.optim``, or a trainer's: what :meth:`lr_factor` says of
        the step that was passed last is multiplied in while the optimizer steps, and nowhere else.

        Returns:
            What ``remove()`` ends it with.

        Raises:
            SpecError: the schedule moves the position of the loop's own learning rate, which is another's here.
            FxgrowError: it is no optimizer.
        """
        for place, action in self.schedule.placed_actions():
            if isinstance(action, LearningRate) and action.position is not None:
                raise SpecError(
                    f"{place} moves the learning rate's position in a schedule that is not this loop's own: use set, "
                    "scale or rewarm, or a loop with scheduler.learning_rate(base, step)"
                )
        for each in self._done:
            if _sets_rate(each.action) and each.rate is None and not each.error:
                raise SpecError(f"events.{each.event}: {_UNKNOWN_RATE}")
        plain = unwrapped(optimizer)
        self._steers = True
        return Steering(plain, lambda: rate_factor(self._done, self._first, self._now))

    # doing it

    def step(
        self,
        model: torch.nn.Module,
        optimizer: Optimizers = None,
        *,
        step: int,
        tokens: int | None = None,
        epoch: float | None = None,
        seconds: float | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> ActionResult | None:
        """Do the next action if its event is due: call it before each training step with the counts completed so far.

        Pass ``metrics`` at the steps where they were measured, and only then; over several ranks their mean decides.
        One call does one action at most: call again until it returns None (metrics count once per step). ``seconds``
        are those of training; the scheduler's own clock if left out.

        Returns:
            What was done, or None when nothing was.

        Raises:
            SpecError: the trigger needs a count or a metric that was not passed, or what was passed is none.
            FxgrowError: the action was refused or failed; model, optimizers and this scheduler are unchanged.
            RankError: on all ranks of a model in ``DistributedDataParallel``, where one of them would not do the same.
        """
        _check_passed(model, optimizer)
        group = group_around(innermost(model), within(model))
        step, now = whole(step, "step"), amount(seconds, "seconds")
        now = self._clock() if now is None else now
        progress = Progress(step, amount(tokens, "tokens"), amount(epoch, "epoch"), now, named(metrics))
        number, which = self._next()
        last, watch = self._now, replace(self._watch, latest=dict(self._watch.latest))
        if number < len(self.schedule.events) and which == 0:
            try:
                due = self._watch.due(self.schedule.events[number].trigger, progress, f"events.{number}", group)
            except BaseException:
                self._watch = watch
                raise
        else:
            due = number < len(self.schedule.events)
        self._now = step
        if any(isinstance(each.action, LoraDecay) for each in self._done):
            adapters.fade(innermost(model), step)
        if not due:
            self._prepare(innermost(model))
            return None
        event = self.schedule.events[number]
        action, began, error = event.actions[which], time.perf_counter(), ""
        result = ActionResult(
            number, event.name or f"event {number + 1}", str(event.trigger), action, model, optimizer, None, step
        )
        try:
            with together(f"events.{number} ({action.op})", group):
                agree("the schedule's action", _plain(action), group)
                if self._before is not None:
                    self._before(action)
                result = self._act(result)
        except BaseException as raised:
            if event.on_error == "stop" or not isinstance(raised, FxgrowError) or isinstance(raised, RankError):
                self._watch, self._now = watch, last
                raise
            error = str(raised)
        self._done.append(Done(number, which, action, step, error, _rate(action, optimizer)))
        if which + 1 == len(event.actions):
            self._watch = Watch(reported=step)
        return replace(result, seconds=time.perf_counter() - began, error=error)

    def _prepare(self, model: torch.nn.Module) -> None:
        """Compile the growth that comes next, if that is wanted and not begun."""
        place, action = self._ahead.coming(self.schedule, self._next())
        if action is not None:
            args, kwargs = self._inputs()
            options: dict[str, Any] = {**self._ways(), "in_place": self._in_place, **self._ahead.options}
            self._ahead.start(place, lambda: compile_ahead(model, action.spec, args, kwargs, **options))

    def _act(self, result: ActionResult) -> ActionResult:
        action, sizes = result.action, self._sizes
        if self._steers and _sets_rate(action) and _rate(action, result.optimizer) is None:
            raise SpecError(f"events.{result.event}: {_UNKNOWN_RATE}")
        model = innermost(result.module)
        reshard(model)  # an evaluation leaves parameters gathered, which are not those that train
        if isinstance(action, Grow):
            return self._grow(result, verify=self._verify, consume=self._consume)
        with following(list(model.parameters())):
            before, after = self._change(action, model, result.optimizer, result.step)
        changed = sizes.after(action, f"events.{result.event}")
        if changed != sizes:
            before = {action.op: getattr(sizes, action.op), **before}
            after = {action.op: getattr(changed, action.op), **after}
            if (factor := rate_of(action, sizes, changed)) != 1:
                after["learning_rate_factor"] = factor
        return replace(result, before=before, after=after)

    def _change(self, action: Action, model: torch.nn.Module, optimizer: Optimizers, step: int) -> Change:
        """What an action changes in the model and its optimizers; nothing for one that only the loop follows."""
        if isinstance(action, LoraScale):
            return adapters.scale(model, action)
        if isinstance(action, LoraDecay):
            return adapters.decay(model, action, step)
        if isinstance(action, LoraMerge):
            return adapters.merge(model, _several(optimizer), action)
        if isinstance(action, WeightDecay):
            return set_weight_decay(_several(optimizer), action)
        if isinstance(action, Dropout):
            return set_dropout(model, action)
        if isinstance(action, Freeze | Unfreeze) and action.what in PARTS:
            return self._part(model, PARTS[action.what], isinstance(action, Freeze))
        if isinstance(action, Freeze):
            return freeze(matching_parameters(model, action.what, frozen=False))
        if isinstance(action, Unfreeze):
            return self._unfreeze(model, action.what)
        return {}, {}

    def _part(self, model: torch.nn.Module, what: Part, freezing: bool) -> Change:
        """Hold what the last growth made, or did not make, or let it go."""
        check_part(what, freezing, self._growth is not None, "" if self._frozen is None else self._frozen.what)
        if freezing and self._growth is not None:
            try:
                self._frozen = self._growth.freeze_old(model) if what == "old" else self._growth.freeze_new(model)
            except SpecError as error:
                raise SpecError(f"freeze: {what}: {error}") from None
            return {}, {"learning" if what == "old" else "numbers": self._frozen.new.numel()}
        if self._frozen is not None:
            self._frozen.unfreeze()
            self._frozen = None
        return {}, {}

    def _unfreeze(self, model: torch.nn.Module, what: str) -> Change:
        """Let parameters go by name; entries that `freeze: old`, or `new`, holds go all together."""
        found = matching_parameters(model, what, frozen=True, also=self._frozen)
        held = [n for n, p in found.items() if self._frozen is not None and self._frozen.holds(p)]
        if held and self._frozen is not None:
            every = [n for n, p in model.named_parameters() if self._frozen.holds(p)]
            if len(held) < len(every):
                raise SpecError(
                    f"unfreeze {what!r}: `freeze: {self._frozen.what}` holds {held[0]}, and lets go all that it holds "
                    f"at once: unfreeze `{self._frozen.what}`"
                )
            self._frozen.unfreeze()
            self._frozen = None
        return unfreeze(found)

    def _grow(self, result: ActionResult, **how: Any) -> ActionResult:
        """Grow the model and its optimizers, in place or not; if anything is refused, they are as they were."""
        action, model = result.action, innermost(result.module)
        assert isinstance(action, Grow)
        args, kwargs = self._inputs()
        policy, optimizers = action.optimizer, _several(result.optimizer)
        carried: dict[str, Any] = {"optimizer": optimizers or None, "policy": policy.policy, "ramp": policy.ramp}
        before = sum(p.numel() for p in model.parameters())
        self._ahead.stop()
        grown = grow(result.module, action.spec, args, kwargs, **self._ways(), **carried, **how)
        options = {"warmup": policy.warmup, "peak": policy.peak, "ramp": policy.ramp, "newcomers": self._newcomers}
        given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
        module, optimizer = result.module, result.optimizer
        if self._in_place:
            with grown.applied(result.module):
                if optimizers:
                    grown.carry_(optimizers, policy.policy, **given)
        else:
            module = rewrapped(result.module, grown.module)
            made = [grown.carry(o, policy.policy, **given) for o in optimizers]
            optimizer = made if isinstance(optimizer, Sequence) else made[0] if made else None
        self._growth = grown
        after = sum(p.numel() for p in innermost(module).parameters())
        return replace(
            result,
            module=module,
            optimizer=optimizer,
            growth=grown,
            before={"parameters": before},
            after={"parameters": after},
        )

    def check(
        self,
        model: torch.nn.Module,
        optimizer: Optimizers = None,
        base: Callable[[int], float] | None = None,
    ) -> Timeline:
        """A dry run: whether all that is still to come can be done, and what the run is like then.

        Nothing is changed. A mistake shows before hours of training do; what would be left out (``on_error: skip``) is
        marked so.

        Args:
            model: as it is now.
            optimizer: that trains it, or several: whether they fit the growths and their policies is asked as well.
            base: the loop's own learning rate, of a step from 0.

        Returns:
            Parameters, floating-point operations, memory, learning rate, batch from each action on; printed, a table.

        Raises:
            CaptureError, SpecError, GrowthRefused, FxgrowError: of the first action that would fail, with its place.
        """
        _check_passed(model, optimizer)
        plain = innermost(model)
        reshard(plain)
        check_replicas(around(model))
        base = None if base is None else _called(base)
        program = capture(plain, *self._inputs(), **self._ways())
        sharding = Sharding.of(plain) if is_distributed(plain) else None
        run = DryRun(program, plain, _several(optimizer), base, self._first, self.done, self._in_place, sharding)
        if self._growth is not None:
            run.has_grown, made = True, self._growth.plan
            only = all(step.op == "lora" for step in made.steps)
            run.made = set(self._growth.new_parameters) if only else None
        run.held = "" if self._frozen is None else self._frozen.what
        return run.timeline(self.schedule.events, self._next())

    # stopping, and going on

    def replay(self, model: torch.nn.Module, optimizer: Optimizers = None) -> tuple[torch.nn.Module, Any]:
        """Rebuild what the actions so far make of the original model, so that a checkpoint's tensors can be loaded.

        Args:
            model: the model as it was before the first action; its values do not matter.
            optimizer: a fresh optimizer over it, several, or None.

        Returns:
            The grown module and the optimizer over it, with values and state to be overwritten by the checkpoint.
        """
        self._growth = self._frozen = None  # what was grown and is held before is another model's
        for each in self._done:
            if each.error:
                continue
            if isinstance(each.action, Grow):
                start = ActionResult(each.event, "", "", each.action, model, optimizer, None, each.step)
                made = self._grow(start, verify=False, consume=False)
                model, optimizer = made.module, made.optimizer
            else:
                inner = innermost(model)
                with following(list(inner.parameters())):
                    self._change(each.action, inner, optimizer, each.step)
        adapters.fade(innermost(model), self._now)
        return model, optimizer

    def state_dict(self) -> dict[str, Any]:
        """What has been done, with its events, and the metrics' counters; plain JSON-able data."""
        timed = any(event.trigger.seconds is not None for event in self.schedule.events)
        return written(self.schedule.events, self._done, self._watch, self._clock() if timed else 0.0, self._now)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`. What is still to come follows this scheduler's own schedule.

        Raises:
            SpecError: what has already been done is not in this schedule; nothing is changed.
        """
        self._done, self._watch, self._seconds, self._now = read(state, self.schedule.events)
        self._started = time.monotonic()

    def _clock(self) -> float:
        return self._seconds + time.monotonic() - self._started

    def _ways(self) -> dict[str, Any]:
        if self._calls is None:
            return {}
        return {"calls": self._calls() if callable(self._calls) else self._calls}

    def _inputs(self) -> tuple[tuple[Any, ...], dict[str, Any] | None]:
        if not callable(self._args):
            return self._args, self._kwargs
        made: Any = self._args()
        if not isinstance(made, tuple) or len(made) != 2:
            kind = f"tuple of {len(made)}" if isinstance(made, tuple) else type(made).__name__
            raise SpecError(f"args() returned {kind}, not the two (args, kwargs)")
        return made


def _check_passed(model: Any, optimizer: Any) -> None:
    """Whether a loop passes a model, and optimizers.

    Raises:
        SpecError, FxgrowError: it does not.
    """
    if not isinstance(model, torch.nn.Module):
        raise SpecError(f"the model is a {type(model).__name__}, and no torch.nn.Module")
    for each in [optimizer] if isinstance(optimizer, str) else _several(optimizer):
        unwrapped(each)


def _called(base: Callable[[int], float]) -> Callable[[int], float]:
    if not callable(base):
        raise SpecError(f"base={base!r:.80} is no function of a step")
    return base


def _several(optimizer: Optimizers) -> list[torch.optim.Optimizer]:
    if optimizer is None:
        return []
    return list(optimizer) if isinstance(optimizer, Sequence) else [optimizer]


_UNKNOWN_RATE = (
    "a learning rate is set by a factor on the optimizer's own, which is 0 here, or no optimizer is passed to step(): "
    "set it where it is not 0, or use scheduler.learning_rate(base, step)"
)


def _sets_rate(action: Grow | Action) -> bool:
    return isinstance(action, LearningRate) and action.set is not None


def _rate(action: Grow | Action, optimizer: Optimizers) -> float | None:
    """The learning rate of an optimizer, where an action sets it: what the factor on it is found by."""
    if not isinstance(action, LearningRate) or action.set is None:
        return None
    return next((float(g["lr"]) for o in _several(optimizer) for g in o.param_groups if g.get("lr")), None)


__all__ = ["ActionResult", "GrowthScheduler"]
