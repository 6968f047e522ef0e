"""When to grow: a schedule of growths, and the scheduler that carries it out inside anybody's training loop.

A schedule is a list of growths; each has a trigger, the operations of a :class:`~fxgrow.spec.GrowthSpec`, and what
happens to the optimizer, the learning rate and the gradient accumulation at that moment::

    version: 1
    growths:
      - name: wider MLP
        trigger: {step: 200}            # or {tokens: 1000000}, {epoch: 2}, {plateau: {metric: val_loss, patience: 3}}
        operations:
          - {op: widen, axis: "transformer.h.*.mlp/hidden", factor: 2, noise: {kind: antisymmetric}}
        optimizer: {policy: asymmetric, warmup: 100}
        learning_rate: {policy: rewarm, steps: 50, from: 0.2}
        accumulation: 2                           # multiply the micro-batches per step

In a loop of your own::

    scheduler = GrowthScheduler("schedule.yaml", args=(idx[:2], targets[:2]))
    for step in range(steps):
        while event := scheduler.step(model, optimizer, step=step, metrics={"val_loss": val_loss}):
            model, optimizer = event.module, event.optimizer
        lr = base_lr(step) * scheduler.lr_factor(step)
        ...
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

import fxgrow
from fxgrow.errors import FxgrowError, SpecError
from fxgrow.limits import OPERATIONS
from fxgrow.optimizer import check_optimizer
from fxgrow.reading import read_yaml
from fxgrow.spec import Count, GrowthSpec
from fxgrow.spec import json_schema as spec_schema


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False)


class Plateau(_Strict):
    """Fires when ``metric`` has not fallen by ``min_delta`` for ``patience`` reports in a row since the last growth."""

    metric: str = Field("val_loss", description="a key of the metrics that the training loop reports; lower is better")
    patience: Count = Field(3, ge=1, description="how many reports without improvement")
    min_delta: float = Field(0.0, ge=0, description="a smaller fall than this is no improvement")


class Trigger(_Strict):
    """When a growth happens: exactly one of the fields. Counts are those of *completed* steps, tokens and epochs."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        json_schema_extra={"minProperties": 1, "maxProperties": 1},
    )
    step: Count | None = Field(None, ge=0, description="after this many optimizer steps")
    tokens: Count | None = Field(None, ge=0, description="after this many training tokens")
    epoch: float | None = Field(None, ge=0, description="after this many passes over the data, fractions allowed")
    plateau: Plateau | None = Field(None, description="when a metric stops improving")

    @model_validator(mode="after")
    def _one(self) -> Trigger:
        if len(self.model_fields_set) != 1 or self.kind is None:
            raise ValueError("give exactly one of step, tokens, epoch, plateau")
        return self

    @property
    def kind(self) -> Literal["step", "tokens", "epoch", "plateau"] | None:
        """Which of the four it is."""
        for name in ("step", "tokens", "epoch", "plateau"):
            if getattr(self, name) is not None:
                return name
        return None

    def __str__(self) -> str:
        if self.plateau is not None:
            return f"plateau of {self.plateau.metric}"
        return f"{self.kind} {getattr(self, self.kind or 'step'):g}"


class OptimizerPolicy(_Strict):
    """What happens to the optimizer's state (RECIPES: SPARKLING 2026 for ``asymmetric``, Shen 2022 for ``exact``)."""

    policy: Literal["exact", "asymmetric", "copy", "reset"] = Field(
        "asymmetric",
        description="exact: the grown run follows the small one; asymmetric: old entries keep their state, newborn "
        "ones start fresh under a re-warmed learning rate; copy: state copied as it is; reset: none",
    )
    warmup: Count = Field(250, ge=0, description="asymmetric: steps of the newborn entries' own learning rate")
    peak: float | None = Field(None, gt=0, le=1e6, description="asymmetric: its top, as a factor on the common one")
    ramp: Count | None = Field(None, ge=1, description="exact: steps after which all entries learn alike; none: never")


class Unchanged(_Strict):
    """The learning-rate schedule goes on as if nothing had happened."""

    policy: Literal["none"] = "none"


class Rewarm(_Strict):
    """The learning rate restarts at ``from`` times the schedule's and returns to it linearly over ``steps``."""

    policy: Literal["rewarm"] = "rewarm"
    steps: Count = Field(gt=0)
    from_: float = Field(0.0, ge=0, le=1e6, alias="from", description="factor at the growth itself")


class Scale(_Strict):
    """The learning rate is multiplied by ``factor`` from the growth on."""

    policy: Literal["scale"] = "scale"
    factor: float = Field(gt=0, le=1e6)


class Growth(_Strict):
    """One growth of a schedule."""

    name: str | None = Field(None, description="a label for logs and pictures")
    trigger: Trigger
    operations: list[Any] = Field(description="the operations of a growth spec, applied in order")
    optimizer: OptimizerPolicy = Field(default_factory=lambda: OptimizerPolicy.model_validate({}))
    learning_rate: Annotated[Unchanged | Rewarm | Scale, Field(discriminator="policy")] = Field(
        default_factory=Unchanged
    )
    accumulation: float = Field(
        1.0, gt=0, le=1e6, description="multiply the micro-batches per step; the product is rounded down, at least 1"
    )

    @field_validator("optimizer", "learning_rate", mode="before")
    @classmethod
    def _bare_policy(cls, value: Any) -> Any:
        return {"policy": value} if isinstance(value, str) else value

    @property
    def spec(self) -> GrowthSpec:
        """The operations as a spec that :func:`fxgrow.grow` takes."""
        return GrowthSpec.parse(self.operations)

    def lr_factor(self, steps_since: int) -> float:
        """Factor on the learning rate ``steps_since`` steps after this growth."""
        policy = self.learning_rate
        if isinstance(policy, Scale):
            return policy.factor
        if isinstance(policy, Rewarm):
            return policy.from_ + (1 - policy.from_) * min(1.0, steps_since / policy.steps)
        return 1.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data without defaults; ``Growth.model_validate`` reads it back."""
        data = self.model_dump(exclude_defaults=True, by_alias=True, exclude={"operations", "learning_rate"})
        data["operations"] = self.spec.to_dict()["operations"]
        if not isinstance(self.learning_rate, Unchanged):
            data["learning_rate"] = self.learning_rate.model_dump(by_alias=True)
        return data


class Schedule(_Strict):
    """A list of growths that fire once each, in order. See the module's docstring for the file form."""

    version: Literal[1] = 1
    growths: list[Growth] = Field(max_length=OPERATIONS)

    @model_validator(mode="after")
    def _in_order(self) -> Schedule:
        last: dict[str, tuple[int, float]] = {}
        for number, growth in enumerate(self.growths):
            kind = growth.trigger.kind
            if kind is None or kind == "plateau":
                continue
            value = getattr(growth.trigger, kind)
            if kind in last and value < last[kind][1]:
                before, at = last[kind]
                raise ValueError(
                    f"growths fire in order, but growths.{number} waits for {kind} {value:g} and stands after "
                    f"growths.{before} at {kind} {at:g}"
                )
            last[kind] = (number, value)
        return self

    @classmethod
    def parse(cls, schedule: Schedule | Mapping[str, Any] | list[Any] | str | Path | None) -> Schedule:
        """Make a schedule of a dict, a list of growths, YAML or JSON text, or the path of a file. None is empty.

        Raises:
            SpecError: with one line per mistake, each naming the field.
        """
        if isinstance(schedule, Schedule):
            return schedule
        where = "schedule"
        if schedule is None:
            schedule = []
        if isinstance(schedule, str | Path):
            schedule, where = read_yaml(schedule, "schedule")
            schedule = [] if schedule is None else schedule
        if isinstance(schedule, list | tuple):
            schedule = {"growths": list(schedule)}
        if not isinstance(schedule, Mapping):
            raise SpecError(f"{where}: expected a mapping with `growths`, got {type(schedule).__name__}")
        odd = [key for key in schedule if not isinstance(key, str)]
        if odd:
            raise SpecError(f"{where}: {str(odd[0])[:80]!r}: a key that is no text")
        try:
            parsed = cls.model_validate(dict(schedule))
        except ValidationError as error:
            raise SpecError(_explain(where, error)) from None
        growths, mistakes = [], []
        for number, growth in enumerate(parsed.growths):
            try:
                growths.append(growth.model_copy(update={"operations": growth.spec.operations}))
            except SpecError as error:
                # the spec names its own fields from its own top: put the place in the schedule before them
                mistakes += [
                    f"{where}: growths.{number}.{line.removeprefix('spec: ')}" for line in str(error).splitlines()
                ]
        if mistakes:
            raise SpecError("\n".join(mistakes))
        return parsed.model_copy(update={"growths": growths})

    def to_dict(self) -> dict[str, Any]:
        """Plain data without defaults; ``parse`` reads it back."""
        return {"version": self.version, "growths": [growth.to_dict() for growth in self.growths]}

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


# Where each model stands in a schedule, list indices left out; needed to name the nearest valid field.
_PLACES: dict[tuple[str, ...], type[BaseModel]] = {
    (): Schedule,
    ("growths",): Growth,
    ("growths", "trigger"): Trigger,
    ("growths", "trigger", "plateau"): Plateau,
    ("growths", "optimizer"): OptimizerPolicy,
    ("growths", "learning_rate", "none"): Unchanged,
    ("growths", "learning_rate", "rewarm"): Rewarm,
    ("growths", "learning_rate", "scale"): Scale,
}
_LR_POLICIES = ["none", "rewarm", "scale"]


def _explain(where: str, error: ValidationError) -> str:
    """One line per mistake: the field, what is wrong, and the nearest valid names."""
    lines = []
    for item in error.errors():
        place = [str(part) for part in item["loc"]]
        names = tuple(str(part) for part in item["loc"] if not isinstance(part, int))
        if names[:2] == ("growths", "learning_rate") and len(place) > 3:
            del place[3]  # the union's tag is not a field of the file
        message = item["msg"].removeprefix("Value error, ")
        known: list[str] = []
        if item["type"] == "extra_forbidden":
            model = _PLACES.get(names[:-1])
            known = [] if model is None else [f.alias or name for name, f in model.model_fields.items()]
            message, wrong = "no such field", names[-1]
        elif item["type"] in ("union_tag_invalid", "union_tag_not_found"):
            known = _LR_POLICIES
            value = item["input"].get("policy") if isinstance(item["input"], Mapping) else item["input"]
            message, wrong = f"no such learning-rate policy {value!r}", str(value)
        elif item["type"] == "literal_error" and names[-1:] == ("policy",):
            known = ["exact", "asymmetric", "copy", "reset"]
            message, wrong = f"no such optimizer policy {item['input']!r}", str(item["input"])
        if known:
            near = difflib.get_close_matches(wrong, known, n=3)
            message += f"; did you mean {' or '.join(near)}?" if near else f"; known: {', '.join(known)}"
        lines.append(f"{where}: {'.'.join(place) or '(top)'}: {' '.join(message.split())}")
    return "\n".join(lines)


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a schedule file, plug-in operations included (draft 2020-12)."""
    schema = Schedule.model_json_schema()
    spec = spec_schema()
    schema["$defs"] |= spec["$defs"]
    schema["$defs"]["Growth"]["properties"]["operations"] = spec["properties"]["operations"]
    for name in ("optimizer", "learning_rate"):  # a bare policy name is enough
        field = schema["$defs"]["Growth"]["properties"][name]
        field.setdefault("anyOf", []).append({"type": "string"})
        for form in ("$ref", "oneOf"):
            if form in field:
                field["anyOf"].insert(0, {form: field.pop(form)})
        field.pop("discriminator", None)  # OpenAPI only
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return schema


def dumps_schema() -> str:
    return json.dumps(json_schema(), indent=2)


@dataclass(frozen=True)
class GrowthEvent:
    """A growth that has just happened; ``module`` and ``optimizer`` replace the ones that were passed to ``step``."""

    index: int
    """Which growth of the schedule, from 0."""
    name: str
    module: torch.nn.Module
    optimizer: torch.optim.Optimizer | None
    growth: Any
    """The :class:`fxgrow.Growth`, with its plan and receipt."""
    step: int
    lr_factor: float
    """The scheduler's factor on the learning rate from here, all growths so far included."""
    accumulation: float
    """Multiply the micro-batches per step by this."""


class _Fired(_Strict):
    growth: dict[str, Any]
    step: Count = Field(ge=0)


class _State(_Strict):
    """What :meth:`GrowthScheduler.state_dict` returns."""

    version: Literal[1]
    fired: list[_Fired] = Field(max_length=OPERATIONS)
    best: float | None
    bad: Count = Field(ge=0)
    reported: Count | None


class GrowthScheduler:
    """Carries out a schedule inside a training loop.

    Args:
        schedule: anything :meth:`Schedule.parse` takes.
        args, kwargs: example inputs for :func:`fxgrow.grow`, or a callable that returns ``(args, kwargs)`` anew
            at each growth. Use a batch of at least 2, on the model's device.
        calls: further ways of calling the model, by name, as :func:`fxgrow.grow` takes them, or a callable that returns
            them; a model that is sampled from, say, is also called without targets.
        verify, consume: passed to :func:`fxgrow.grow`.
    """

    def __init__(
        self,
        schedule: Schedule | Mapping[str, Any] | list[Any] | str | Path | None,
        args: tuple[Any, ...] | Callable[[], tuple[tuple[Any, ...], dict[str, Any]]] = (),
        kwargs: dict[str, Any] | None = None,
        *,
        calls: Mapping[str, Any] | Callable[[], Mapping[str, Any]] | None = None,
        verify: Any = "auto",
        consume: bool = False,
    ) -> None:
        self.schedule = Schedule.parse(schedule)
        self._args, self._kwargs, self._calls = args, kwargs, calls
        self._verify, self._consume = verify, consume
        self._fired: list[tuple[Growth, int]] = []
        self._best = math.inf
        self._bad = 0
        self._reported: int | None = None

    @property
    def fired(self) -> list[Growth]:
        """The growths that have happened, in order."""
        return [growth for growth, _ in self._fired]

    @property
    def next(self) -> Growth | None:
        """The growth that is waited for; None when all have happened."""
        return self.schedule.growths[len(self._fired)] if len(self._fired) < len(self.schedule.growths) else None

    def step(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        step: int,
        tokens: int | None = None,
        epoch: float | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> GrowthEvent | None:
        """Grow if the next growth is due: call it before each training step with the counts completed so far.

        Pass ``metrics`` at the steps where they were measured, and only then. One call makes at most one growth; call
        again until it returns None where several may fall due together (metrics count once per step). A model wrapped
        by ``torch.compile`` is unwrapped; the grown module comes back uncompiled.

        Returns:
            The event, or None when nothing happened.

        Raises:
            SpecError: the trigger needs a count or a metric that was not passed.
            FxgrowError: the growth was refused or failed; ``model``, ``optimizer`` and this scheduler are unchanged.
        """
        growth = self.next
        counters = (self._best, self._bad, self._reported)
        if growth is None or not self._due(growth.trigger, step, tokens, epoch, metrics):
            return None
        index = len(self._fired)
        try:
            grown, new_optimizer = self._apply(growth, model, optimizer, verify=self._verify, consume=self._consume)
        except BaseException:
            self._best, self._bad, self._reported = counters
            raise
        self._fired.append((growth, step))
        self._best, self._bad, self._reported = math.inf, 0, step
        return GrowthEvent(
            index=index,
            name=growth.name or f"growth {index + 1}",
            module=grown.module,
            optimizer=new_optimizer,
            growth=grown,
            step=step,
            lr_factor=self.lr_factor(step),
            accumulation=growth.accumulation,
        )

    def check(self, model: torch.nn.Module) -> list[int]:
        """Plan every growth that is still to come, without making any: a mistake shows before hours of training do.

        Returns:
            The numbers of parameters: now, and after each growth.

        Raises:
            CaptureError, SpecError, GrowthRefused: of the first growth that would fail, with its place.
        """
        program = fxgrow.capture(getattr(model, "_orig_mod", model), *self._inputs(), **self._ways())
        sizes = [sum(p.numel() for p in program.parameters.values())]
        operations: list[Any] = []
        for number, growth in enumerate(self.schedule.growths[len(self._fired) :], len(self._fired)):
            first = len(operations)
            operations += growth.spec.operations
            try:  # all growths so far as one: a plan has no tensors that the next could start from
                plan, _ = fxgrow.plan_growth(program, GrowthSpec(operations=operations))
            except FxgrowError as error:
                found = re.fullmatch(r"operations\.(\d+) (\(.*)", str(error), re.DOTALL)
                where = f"operations.{int(found[1]) - first} {found[2]}" if found else str(error)
                raise type(error)(f"growths.{number} ({growth.name or growth.trigger}): {where}") from error
            sizes.append(plan.parameters_after)
        return sizes

    def lr_factor(self, step: int) -> float:
        """Factor on the base learning rate at ``step``: the product over the growths that have happened."""
        return math.prod(growth.lr_factor(step - at) for growth, at in self._fired)

    def accumulation(self, initial: int) -> int:
        """Micro-batches per step after the growths so far, from ``initial``; never below 1."""
        value = initial
        for growth, _ in self._fired:
            value = max(1, int(value * growth.accumulation))
        return value

    def replay(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None = None
    ) -> tuple[torch.nn.Module, torch.optim.Optimizer | None]:
        """Rebuild what the growths so far make of the original model, so that a checkpoint's tensors can be loaded.

        Args:
            model: the model as it was before the first growth; its values do not matter.
            optimizer: a fresh optimizer over it, or None.

        Returns:
            The grown module and the optimizer over it, with values and state to be overwritten by the checkpoint.
        """
        for growth, _ in self._fired:
            grown, optimizer = self._apply(growth, model, optimizer, verify=False, consume=False)
            model = grown.module
        return model, optimizer

    def state_dict(self) -> dict[str, Any]:
        """Which growths have fired, with their specs, and the plateau's counters; plain JSON-able data."""
        return {
            "version": 1,
            "fired": [{"growth": growth.to_dict(), "step": step} for growth, step in self._fired],
            "best": None if math.isinf(self._best) else self._best,
            "bad": self._bad,
            "reported": self._reported,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`. What is still to come follows this scheduler's own schedule.

        Raises:
            SpecError: the growths that have already happened are not those of this schedule; nothing is changed.
        """
        version = state.get("version") if isinstance(state, Mapping) else None
        if version != 1:
            raise SpecError(f"scheduler state: version {repr(version)[:40]} is not known here; expected 1")
        try:
            read = _State.model_validate(dict(state))
        except ValidationError as error:
            raise SpecError(_explain("scheduler state", error)) from None
        past = Schedule.parse([item.growth for item in read.fired]).growths
        for number, growth in enumerate(past):
            ours = self.schedule.growths[number].to_dict() if number < len(self.schedule.growths) else None
            if ours != growth.to_dict():
                raise SpecError(
                    f"growths.{number} of the schedule is not the one that this run has already made: "
                    f"it was {json.dumps(growth.to_dict())}; growths that have happened must stay as they were"
                )
        self._fired = [(growth, item.step) for growth, item in zip(past, read.fired, strict=True)]
        self._best = math.inf if read.best is None else read.best
        self._bad, self._reported = read.bad, read.reported

    def _apply(
        self, growth: Growth, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None, **how: Any
    ) -> tuple[Any, torch.optim.Optimizer | None]:
        """Grow, and carry the optimizer over; neither the model nor the optimizer passed in is changed."""
        if optimizer is not None:
            check_optimizer(optimizer, growth.optimizer.policy)  # before hours of work, not after
        model = getattr(model, "_orig_mod", model)
        args, kwargs = self._inputs()
        grown = fxgrow.grow(model, growth.spec, args, kwargs, **self._ways(), **how)
        if optimizer is None:
            return grown, None
        policy = growth.optimizer
        options = {"warmup": policy.warmup, "peak": policy.peak, "ramp": policy.ramp}
        given = {name: value for name, value in options.items() if value is not None}
        return grown, grown.carry(optimizer, policy.policy, **given)

    def _ways(self) -> dict[str, Any]:
        if self._calls is None:
            return {}
        return {"calls": self._calls() if callable(self._calls) else self._calls}

    def _inputs(self) -> tuple[tuple[Any, ...], dict[str, Any] | None]:
        return self._args() if callable(self._args) else (self._args, self._kwargs)

    def _due(
        self,
        trigger: Trigger,
        step: int,
        tokens: int | None,
        epoch: float | None,
        metrics: Mapping[str, float] | None,
    ) -> bool:
        kind, number = trigger.kind, len(self._fired)
        if trigger.plateau is not None:
            return self._plateaued(trigger.plateau, step, metrics)
        value = {"step": step, "tokens": tokens, "epoch": epoch}[str(kind)]
        if value is None:
            raise SpecError(f"growths.{number} waits for {kind}, but the training loop passes no {kind}= to step()")
        return value >= getattr(trigger, str(kind))

    def _plateaued(self, plateau: Plateau, step: int, metrics: Mapping[str, float] | None) -> bool:
        _agree(None if not metrics or step == self._reported else metrics.get(plateau.metric), plateau.metric)
        if not metrics or step == self._reported:
            return False
        if plateau.metric not in metrics:
            near = difflib.get_close_matches(plateau.metric, list(metrics), n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"reported are {', '.join(sorted(metrics))}"
            raise SpecError(
                f"growths.{len(self._fired)} watches the metric {plateau.metric!r}, which is not reported; {hint}"
            )
        self._reported = step
        value = float(metrics[plateau.metric])
        if value < self._best - plateau.min_delta:
            self._best, self._bad = value, 0
        else:  # NaN compares false and counts as no improvement
            self._bad += 1
        return self._bad >= plateau.patience


def _agree(value: float | None, metric: str) -> None:
    """Ranks that train one model together must grow it together.

    Raises:
        SpecError: on all of them, where they report different values.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    values: list[float | None] = [None] * dist.get_world_size()
    dist.all_gather_object(values, None if value is None else float(value))
    if len({repr(v) for v in values}) > 1:
        raise SpecError(
            f"the ranks report different values of the metric {metric!r} ({', '.join(map(str, values[:4]))}): some "
            "would grow and others not. Average it over the ranks first, and report it on each of them"
        )
