"""A dry run of a schedule: what every event will make of the run, and whether it can, before the first step."""

from __future__ import annotations

import copy
import fnmatch
import inspect
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from fxgrow.emit.module import regenerate
from fxgrow.errors import FxgrowError, GrowthRefused, SpecError, did_you_mean, reworded
from fxgrow.growth import plan_growth
from fxgrow.ir import trees
from fxgrow.ir.adapters import DOWN, UP, all_adapters
from fxgrow.ir.flops import flop_counter
from fxgrow.optim.newborn import NOTHING_NEW
from fxgrow.optim.policies import check_optimizer, check_plan
from fxgrow.passes.lora import Unadapt, vocabulary
from fxgrow.plan import GrowthPlan
from fxgrow.program import Program
from fxgrow.schedule import (
    Action,
    Dropout,
    Event,
    Freeze,
    Grow,
    LoraDecay,
    LoraMerge,
    LoraScale,
    Unfreeze,
    WeightDecay,
)
from fxgrow.scheduler.acting import PARTS, check_part, set_dropout, set_weight_decay
from fxgrow.scheduler.adapters import VOCABULARY, in_vocabulary, matches
from fxgrow.scheduler.standing import Done, Sizes, learning_rate, sizes_after
from fxgrow.sharded.sharding import Sharding
from fxgrow.spec import GrowthSpec, Lora


@dataclass(frozen=True)
class Row:
    """What the run is like from an action on.

    Attributes:
        when: the event's trigger, in words; "start" before the first.
        name, op: of the event, and of the action.
        step: where the trigger says one.
        parameters: of the model.
        flops: of a micro-batch like the example, forward and backward; None where they cannot be counted.
        memory: bytes of parameters, gradients and the optimizer's state; activations come on top.
        learning_rate: at that step, or a factor where the loop's own is not known; None where no step is known.
        sizes: of the batch.
        left_out: why the action will be left out; "" for one that will be done.
    """

    when: str
    name: str
    op: str
    step: int | None
    parameters: int
    flops: int | None
    memory: int
    learning_rate: float | None
    sizes: Sizes
    left_out: str = ""


@dataclass(frozen=True)
class Timeline:
    """The rows of a dry run, from the start on; printed, a table."""

    rows: list[Row]

    @property
    def parameters(self) -> list[int]:
        """Of the model: now, and after each growth and merge."""
        done = [r for r in self.rows if r.op in ("start", "grow", "lora_merge") and not r.left_out]
        return [r.parameters for r in done]

    def __str__(self) -> str:
        head = ["when", "event", "op", "parameters", "FLOPs / micro-batch", "memory", "learning rate", "micro-batches"]
        cells = [head, *([*_cells(row)] for row in self.rows)]
        widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
        lines = [[c.ljust(w) for c, w in zip(line, widths, strict=True)] for line in cells]
        for number, row in enumerate(self.rows, 1):
            if row.left_out:
                lines[number][3:] = [f"left out: {row.left_out.splitlines()[0]}"]
        return "\n".join("  ".join(line).rstrip() for line in lines)


def _cells(row: Row) -> Iterator[str]:
    yield from (row.when, row.name, row.op)
    yield from (f"{row.parameters:,}", "?" if row.flops is None else f"{row.flops:.3g}")
    yield f"{row.memory / 2**20:,.1f} MiB"
    yield "" if row.learning_rate is None else f"{row.learning_rate:.3g}"
    yield str(row.sizes.accumulation) + (f" × {row.sizes.batch_size}" if row.sizes.batch_size else "")


@dataclass
class DryRun:
    """Walks through the events that are still to come.

    Attributes:
        program: the model as it is.
        model: the same.
        optimizers: that train it; none for a schedule that is looked at by itself.
        base: the loop's own learning rate.
        first, done: the batch at the start, and what has been done.
        sharding: of a model of which each rank holds shards.
    """

    program: Program
    model: nn.Module
    optimizers: Sequence[torch.optim.Optimizer]
    base: Callable[[int], float] | None
    first: Sizes
    done: list[Done]
    in_place: bool = True
    sharding: Sharding | None = None
    operations: list[Any] = field(default_factory=list)
    grown: Program | None = None  # so far
    plan: GrowthPlan | None = None  # of what has grown here so far
    has_grown: bool = False
    merged: set[str] = field(default_factory=set)  # parameters that a library's classes hold for adapters that are gone
    made: set[str] | None = None  # the adapters' weights that the last growth made, where it made nothing else
    held: str = ""  # which part stands still: old, new, or neither
    still: set[str] | None = None  # the names of all that stand still, where that is known
    groups: list[Any] = field(default_factory=list)  # copies of the optimizers' groups, which the walk changes

    def timeline(self, events: Sequence[Event], start: tuple[int, int]) -> Timeline:
        """All rows.

        Raises:
            SpecError, GrowthRefused, FxgrowError: of the first action that would fail, with its place.
        """
        self.grown = self.program
        self.groups = [SimpleNamespace(param_groups=[dict(g) for g in o.param_groups]) for o in self.optimizers]
        if not self.held:
            self.still = {n for n, p in self.model.named_parameters() if not p.requires_grad}
        sized = _sized(self.program)
        at = max((d.step for d in self.done), default=0)
        rows = [self._row("start", "", "start", at, sized)]
        number, which = start
        for place, event in enumerate(events[number:], number):
            for many, action in enumerate(event.actions):
                if place == number and many < which:
                    continue
                left_out, before = "", len(self.operations)
                try:
                    sized = self._look(action, sized)
                except FxgrowError as error:
                    where = f"events.{place} ({event.name or event.trigger}): {_within(error, before)}"
                    if event.on_error == "stop":
                        raise reworded(error, where) from error
                    left_out = _within(error, before)
                    del self.operations[before:]
                step = event.trigger.step
                at = max(at, step or 0)
                self.done.append(Done(place, many, action, at, left_out))
                name = event.name or f"event {place + 1}"
                rows.append(replace(self._row(str(event.trigger), name, action.op, step, sized), left_out=left_out))
        return Timeline(rows)

    def _row(self, when: str, name: str, op: str, step: int | None, sized: _Size) -> Row:
        rate = None
        if step is not None:
            rate = float(learning_rate(self.done, self.first, self.base or (lambda _: 1.0), step))
        memory = sized.bytes * (2 + max((_states(o) for o in self.optimizers), default=0))
        sizes = sizes_after(self.first, self.done)
        return Row(when, name, op, step, sized.parameters, sized.flops, memory, rate, sizes)

    def _look(self, action: Grow | Action, sized: _Size) -> _Size:
        """Whether an action can be done, and what the model is after it."""
        assert self.grown is not None
        if isinstance(action, Grow):
            return self._grow(action)
        if isinstance(action, WeightDecay) and self.optimizers:
            set_weight_decay(self.groups, action)
        elif isinstance(action, Dropout):
            if not self.in_place:
                raise SpecError("dropout stands in the code of a traced module; grow in place")
            set_dropout(copy.deepcopy(self.model).to("meta"), action)
        elif isinstance(action, LoraScale | LoraDecay | LoraMerge):
            return self._adapt(action, sized)
        elif isinstance(action, Freeze | Unfreeze) and action.what in PARTS:
            freezing = isinstance(action, Freeze)
            check_part(action.what, freezing, self.has_grown, self.held)
            if self.sharding is not None:
                raise SpecError(f"{action.op}: {action.what}: the model is sharded; freeze parameters by their names")
            if freezing and self.made is not None and not self.made & self.grown.parameters.keys():
                raise SpecError(f"freeze: {action.what}: {NOTHING_NEW}")
            self.held, self.still = action.what if freezing else "", None
        elif isinstance(action, Freeze | Unfreeze):
            self._name(action)
        return sized

    def _name(self, action: Freeze | Unfreeze) -> None:
        """Whether what a glob names is there, and learns or stands still as the action takes it to."""
        assert self.grown is not None
        names = list(self.grown.parameters)
        found = {n for n in names if fnmatch.fnmatchcase(n, action.what)}
        if not found:
            raise SpecError(f"no parameter matches {action.what!r}; {did_you_mean(action.what, names)}")
        if self.still is not None:
            freezing = isinstance(action, Freeze)
            if not (found - self.still if freezing else found & self.still):
                state = "learning" if freezing else "frozen"
                raise SpecError(f"no {state} parameter matches {action.what!r}")
            self.still = self.still | found if freezing else self.still - found
        if isinstance(action, Unfreeze) and len(found) == len(names):
            self.held, self.still = "", set()

    def _adapt(self, action: LoraScale | LoraDecay | LoraMerge, sized: _Size) -> _Size:
        assert self.grown is not None
        if not self.in_place:
            raise SpecError("adapters stand in the code of a traced module; grow in place")
        shapes = {n: t.shape for n, t in self.grown.parameters.items()}
        paths = [n.removesuffix(f".{DOWN}") for n in shapes if n.endswith(f".{DOWN}")]
        if action.modules == VOCABULARY:
            tables, entries = vocabulary(self.grown.graph)
            found = [p for p in paths if p in tables or shapes[f"{p}.{UP}"][0] in entries]
        else:
            found = [p for p in paths if matches(p, action.modules)]
        others = self._others(action.modules)
        if not found and not any(others.values()):
            known = [*dict.fromkeys([*paths, *others])]
            raise SpecError(f"no adapted module matches {action.modules!r}; {did_you_mean(action.modules, known)}")
        if not isinstance(action, LoraMerge):
            return sized
        self.merged |= {n for names in others.values() for n in names}
        if found:
            self.operations.append(Unadapt(paths=found))
        sized = self._planned()[1]
        self.still = self.still and self.still & self.grown.parameters.keys()
        return sized

    def _others(self, pattern: str) -> dict[str, list[str]]:
        """Of adapters that a library's classes hold, which stay in the graph, the parameters, by path; [] of others."""
        assert self.grown is not None
        found: dict[str, list[str]] = {}
        tables = in_vocabulary(self.model)
        for adapter in all_adapters(self.model):
            for leaf in adapter.parameters() if DOWN not in adapter.parameters() else ():
                end = f".{leaf}"
                for name in self.grown.parameters.keys() - self.merged:
                    if name.endswith(end):  # of blocks that are new, too
                        path = name.removesuffix(end)
                        fits = adapter.path in tables if pattern == VOCABULARY else matches(path, pattern)
                        found.setdefault(path, []).extend([name] if fits else [])
        return found

    def _planned(self) -> tuple[GrowthPlan, _Size]:
        """All so far as one: a plan has no tensors that the next could start from."""
        self.plan, self.grown = plan_growth(self.program, GrowthSpec.model_construct(operations=self.operations))
        return self.plan, _sized(self.grown, self.merged)

    def _grow(self, action: Grow) -> _Size:
        if self.held:
            raise SpecError(
                f"{self.held} parameters stand still (freeze: {self.held}): unfreeze `{self.held}` before "
                "the next growth"
            )
        self.operations += action.spec.operations
        if self.still:
            self.still = None  # a growth gives blocks other numbers
        policy = action.optimizer
        if self.optimizers:
            check_optimizer(self.optimizers, policy.policy, ramp=policy.ramp, parameters=list(self.model.parameters()))
        assert self.grown is not None
        start, last = self.grown, self.plan
        plan, sized = self._planned()
        if self.sharding is not None:
            self.sharding.check(plan, self.program)
        only = all(isinstance(o, Lora) for o in action.spec.operations)
        self.has_grown, self.made = True, set(self.grown.parameters) - start.parameters.keys() if only else None
        if self.optimizers:
            names = {id(p): n for n, p in self.program.parameters.items() if isinstance(p, nn.Parameter)}
            if last is not None and policy.policy == "exact":  # which asks for this growth alone
                became = {t.source: n for n, t in last.tensors.items() if t.source is not None}
                names = {i: became[n] for i, n in names.items() if n in became}
                try:
                    plan, _ = plan_growth(start, action.spec)
                except GrowthRefused:  # for values of buffers, which are not there; as a whole it was planned above
                    return sized
            check_plan(plan, policy.policy, list(self.optimizers), names)
        return sized


@dataclass(frozen=True)
class _Size:
    parameters: int
    bytes: int
    flops: int | None


def _sized(program: Program, gone: Collection[str] = ()) -> _Size:
    own = [p for n, p in program.parameters.items() if n not in gone]
    total = sum(p.numel() * p.element_size() for p in own)
    return _Size(sum(p.numel() for p in own), total, _flops(program))


def _flops(program: Program) -> int | None:
    """Of one call with the example, forward and backward, counted without memory."""
    tensors = {n: torch.empty_like(t, device="meta") for n, t in program.tensors.items()}
    args, kwargs = trees.map_tensors(lambda t: t.to("meta"), (program.args, program.kwargs))
    try:
        with warnings.catch_warnings(), flop_counter() as counter:
            warnings.simplefilter("ignore")
            out = regenerate(program, tensors)(*args, **kwargs)
            results = [t.sum() for t in trees.tree_leaves(out) if isinstance(t, torch.Tensor) and t.requires_grad]
            if results:
                torch.stack([r.float() for r in results]).sum().backward()
    except Exception:  # what the example's values decide cannot be run without them
        return None
    return int(counter.get_total_flops())


def _states(optimizer: torch.optim.Optimizer) -> int:
    """How many numbers an optimizer keeps for each of a parameter's; before its first step, as one like it does."""
    state, own = optimizer.state, [p for g in optimizer.param_groups for p in g["params"]]
    held = next((p for p in own if p in state), None)
    if held is None:
        held = nn.Parameter(torch.ones(4, 4))
        held.grad = torch.ones(4, 4)
        try:
            taken = inspect.signature(type(optimizer)).parameters
            other = type(optimizer)([held], **{k: v for k, v in optimizer.defaults.items() if k in taken})
            other.step()
        except Exception:  # a class that is made, or steps, in another way
            return 0
        state = other.state
    return sum(isinstance(v, torch.Tensor) and v.shape == held.shape for v in state[held].values())


def _within(error: FxgrowError, before: int) -> str:
    """An error's words, with the number that the operation has within its event."""
    found = re.fullmatch(r"operations\.(\d+) (\(.*)", str(error), re.DOTALL)
    return f"operations.{int(found[1]) - before} {found[2]}" if found else str(error)


__all__ = ["DryRun", "Row", "Timeline"]
