"""Try to refute a growth: outputs, state and gradients of both models on many inputs, and newborn parameters alive.

Three comparisons, each with a limit:

* *own dtype*: the user's own module against the grown one, several calls in a row, eval and train mode;
* *float64*: both graphs, node by node, with float64 in place of every float dtype, so that the algebra is tested and
  not the rounding;
* *float64, other weights*: every parameter drawn around its value and those that are zero opened, since the plan is
  linear in them: gates and projections at zero hide what lies behind them.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, Field
from torch import fx, nn

from fxgrow.emit.graphs import call_graphs, clean_graph
from fxgrow.emit.module import regenerate
from fxgrow.errors import ExactnessError
from fxgrow.ir import trees
from fxgrow.ir.dtypes import same_kind
from fxgrow.ir.nodes import info_of
from fxgrow.ir.running import in_mode
from fxgrow.ir.traced import Call, Traced
from fxgrow.plan import GrowthPlan, TensorPlan
from fxgrow.verify.execute import Runner, Tensors, draws, heeds_mode, same_draws
from fxgrow.verify.exercise import Exercise
from fxgrow.verify.rounding import RUNS, Moved, Tolerance, amplification, difference, slice_error
from fxgrow.verify.trials import Trial, Trials, bound
from fxgrow.weights.materialise import copy_gradient, materialise_all, materialise_tensor

#: an exact growth that measures more than this in float64 is a bug
LIMIT = 1e-10
GRADIENT_LIMIT = 1e-7
#: beyond this, rounding is looked into: the model runs again with its values moved
SUSPICIOUS = 1e-12

Level = Literal["float64", "streamed", "native"]


class OutputError(BaseModel):
    """Difference of one output: the largest |new - old| of a slice over its largest |old|."""

    output: str
    shape: list[int]
    relative_error: float
    changed: bool = Field(False, description="an approximate growth was allowed to change this output")


class Receipt(BaseModel):
    """What was measured after a growth. None means not measured, and ``notes`` says why."""

    exactness: Literal["exact", "approximate", "lossy"]
    measured: Literal["float64", "streamed", "native", "nothing"] = Field(
        "nothing", description="float64 whole, float64 one op's weights at a time, own dtype alone, or nothing"
    )
    error_float64: float | None = Field(None, description="largest relative error of an output, float64, eval mode")
    error_float64_train: float | None = Field(None, description="the same in train mode with dropout off")
    error_native: float | None = Field(None, description="the same in the model's own dtype, eval mode")
    error_native_train: float | None = Field(None, description="the same in train mode, where nothing is random")
    error_state: float | None = Field(None, description="of what the forward writes into buffers, after several calls")
    outputs: list[OutputError] = Field(default_factory=list)
    gradient_error: float | None = Field(
        None, description="largest relative difference between the grown gradients and the plan's map of the old ones"
    )
    dead_parameters: list[str] = Field(
        default_factory=list, description="new entries that get no gradient within 2 steps"
    )
    inputs: list[str] = Field(default_factory=list, description="what the models were compared on, besides the example")
    unexercised: list[str] = Field(
        default_factory=list, description="branches and factors that no input reached: nothing is known about them"
    )
    limits: dict[str, float] = Field(default_factory=dict, description="what each error may reach")
    amplification: float | None = Field(
        None,
        description="how much the model amplifies rounding: by how many units in the last place an output moves "
        "where every value moves by one; only where it was measured",
    )
    params_before: int = 0
    params_after: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    seconds: dict[str, float] = Field(default_factory=dict)
    notes: list[str] = Field(default_factory=list)

    def summary(self) -> str:
        def show(x: float | None) -> str:
            return "not measured" if x is None else f"{x:.1e}"

        return (
            f"{self.params_before:,} -> {self.params_after:,} parameters ({self.exactness}); relative error "
            f"{show(self.error_float64)} in float64, {show(self.error_native)} native; "
            f"gradients {show(self.gradient_error)}; "
            + (f"{len(self.unexercised)} places not exercised; " if self.unexercised else "")
            + f"{sum(self.seconds.values()):.1f} s"
        )


def output_numbers(program: Traced) -> list[tuple[Call | None, range]]:
    """By call, the numbers of the tensors it returns: those of all calls are counted on."""
    value = program.graph.output_node().args[0]
    calls: list[tuple[Call | None, Any]] = [(next(iter(program.calls), None), value)]
    if len(program.calls) > 1:
        assert isinstance(value, tuple)
        calls = list(zip(program.calls, value, strict=True))
    out, first = [], 0
    for call, returned in calls:
        count = sum(
            isinstance(x, fx.Node) and isinstance(x.meta.get("val"), torch.Tensor) for x in trees.tree_leaves(returned)
        )
        out.append((call, range(first, first + count)))
        first += count
    return out


def relative_errors(
    old: Any, new: Any, plan: GrowthPlan | None = None, numbers: Sequence[int] | None = None
) -> list[OutputError]:
    """Per output tensor, relative to its largest value; integer outputs count as different or not.

    Args:
        plan: where it appends entries to an output, the old ones are compared, and it must have grown by just so many.
        numbers: of these outputs in the plan, which counts those of all calls; 0, 1, 2 ... where None.

    Raises:
        ExactnessError: an output has another shape than the plan says, or another dtype.
    """
    out = []
    changed = plan.changed_outputs if plan is not None else set()
    before, after = _tensors(old), _tensors(new)
    for i, a, b in zip(range(len(before)) if numbers is None else numbers, before, after, strict=True):
        b = _old_part(i, a, b, plan)
        gap = difference(a, b)
        if not a.is_floating_point() and not a.is_complex():
            error = 1.0 if bool(gap.any()) else 0.0
        elif a.numel() == 0:
            error = 0.0
        else:
            finite = a.detach().abs().double().nan_to_num(0, 0, 0)
            scale = float(finite.max()) if bool(finite.any()) else (1e-300 if bool(a.isfinite().any()) else 1.0)
            error = float(gap.max()) / scale
        out.append(OutputError(output=str(i), shape=list(a.shape), relative_error=error, changed=i in changed))
    return out


def _old_part(number: int, a: torch.Tensor, b: torch.Tensor, plan: GrowthPlan | None) -> torch.Tensor:
    """The entries of a grown output that the old one has.

    Raises:
        ExactnessError: it has another shape than the plan says, or another dtype.
    """
    for growth in (o for s in plan.steps for o in s.outputs if o.output == number) if plan is not None else ():
        if b.shape[growth.dim] == a.shape[growth.dim] + _appended(plan, number, growth.dim):
            b = b.narrow(growth.dim, 0, a.shape[growth.dim])
    if a.shape != b.shape:
        raise ExactnessError(f"output {number} changed its shape from {tuple(a.shape)} to {tuple(b.shape)}")
    if a.dtype != b.dtype:
        raise ExactnessError(f"output {number} changed its dtype from {a.dtype} to {b.dtype}")
    return b


def _appended(plan: GrowthPlan | None, output: int, dim: int) -> int:
    """How many entries the plan appends to a dim of an output, over all its steps."""
    steps = plan.steps if plan is not None else []
    return sum(o.new - o.old for s in steps for o in s.outputs if (o.output, o.dim) == (output, dim))


def _tensors(value: Any) -> list[torch.Tensor]:
    return [x for x in trees.tree_leaves(value) if isinstance(x, torch.Tensor)]


def _numbers(value: Any) -> list[Any]:
    return [x for x in trees.tree_leaves(value) if isinstance(x, bool | int | float | str)]


def widen_float(t: torch.Tensor) -> torch.Tensor:
    """A copy in float64, complex numbers likewise; of integers as they are."""
    return t.detach().to(same_kind(t.dtype, torch.float64), copy=True)


# what is run ----------------------------------------------------------------------------------------------------------

#: one trial for each call that takes part, by the call's number
Round = dict[int, Trial]


@dataclass
class Results:
    """What a model gave: by round and call its outputs, what it left in its buffers, gradients by name."""

    outputs: dict[tuple[int, int], Any] = field(default_factory=dict)
    state: dict[str, torch.Tensor] = field(default_factory=dict)
    gradients: dict[str, torch.Tensor | None] = field(default_factory=dict)


class Side:
    """One of the two models: its graphs, and how its tensors are made.

    Args:
        make: a fresh tensor by name.
        keep: hold the tensors; else they are made anew whenever an op reads them.
        runners: its graphs in float64; those of its own dtypes where None.
    """

    def __init__(
        self,
        program: Traced,
        make: Callable[[str], torch.Tensor],
        *,
        keep: bool,
        runners: list[Runner] | None = None,
    ) -> None:
        self.program, self.make, self.keep = program, make, keep
        self.dtype = None if runners is None else torch.float64
        own = call_graphs(program, clean_graph(program.graph, False)) if runners is None else []
        self.runners = [Runner(g) for g in own] if runners is None else runners
        self.written: set[str] = set().union(*(r.written for r in self.runners))
        self._kept: dict[str, torch.Tensor] = {}

    def with_tensors(self, make: Callable[[str], torch.Tensor]) -> Side:
        """The same graphs over other tensors."""
        out = object.__new__(Side)
        out.__dict__ |= {**self.__dict__, "make": make, "_kept": {}}
        return out

    def tensors(self, moved: Moved | None = None) -> Tensors:
        """Tensors for some calls in a row, with the state that the model has before them."""

        def make(name: str) -> torch.Tensor:
            if moved is not None:
                return moved.tensor(self.whole(name))
            return self.whole(name).clone() if name in self.written else self.whole(name)

        return Tensors(make, self.written, keep=moved is None and self.keep)

    def changed(self, results: Results) -> bool:
        """Whether a run left anything else in the buffers than it found there."""
        return any(not torch.equal(t, self.whole(n)) for n, t in results.state.items())

    def whole(self, name: str) -> torch.Tensor:
        """A tensor as it is made, which nothing may write into."""
        if not self.keep:
            return self.make(name)
        if name not in self._kept:
            self._kept[name] = self.make(name)
        return self._kept[name]

    def run(
        self,
        rounds: Sequence[Round],
        training: bool,
        *,
        after: Callable[..., Any] | None = None,
        moved: Moved | None = None,
        gradients: Weighed | None = None,
    ) -> Results:
        """All rounds in a row.

        Args:
            moved: move every value by rounding.
            gradients: of the last round, of which combination of outputs.
        """
        out, tensors = Results(), self.tensors(moved)
        for number, trials in enumerate(rounds):
            last = gradients is not None and number == len(rounds) - 1
            with torch.enable_grad() if last else torch.no_grad():
                trained = self._trained(tensors) if last else {}
                inputs: dict[str, torch.Tensor] = {}
                for call, trial in trials.items():
                    out.outputs[number, call] = self._call(
                        call, trial.copy(self.dtype), tensors, training, moved or after, inputs if last else None
                    )
                if last:
                    assert gradients is not None
                    found = [t for c in trials for t in _tensors(out.outputs[number, c])]
                    out.gradients = gradients.of(found, {**trained, **inputs})
                    for c in trials:
                        out.outputs[number, c] = trees.tree_map_only(
                            torch.Tensor, torch.Tensor.detach, out.outputs[number, c]
                        )
        out.state = {n: t.clone() for n, t in tensors.state().items()}
        return out

    def _trained(self, tensors: Tensors) -> dict[str, torch.Tensor]:
        """The parameters, as leaves that gradients are taken of."""
        out = {}
        for name in self.program.parameters:
            if self.program.requires_grad.get(name) and any(name in r.reads for r in self.runners):
                t = tensors(name).detach()
                if t.is_floating_point():
                    out[name] = tensors.held[name] = t.requires_grad_()
        return out

    def _call(
        self,
        call: int,
        trial: Trial,
        tensors: Tensors,
        training: bool,
        hook: Moved | Callable[..., Any] | None,
        inputs: dict[str, torch.Tensor] | None,
    ) -> Any:
        runner, values = self.runners[call], bound(trial, self.runners[call].inputs)
        for i, (node, value) in enumerate(zip(runner.inputs, values, strict=True)):
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                if isinstance(hook, Moved):
                    value = hook.tensor(value)
                if inputs is not None:  # a forward may write into what it is given, but not into a leaf
                    inputs[f"input {node.target} of call {call}"] = leaf = value.requires_grad_()
                    value = leaf.clone()
                values[i] = value
        after = hook.after if isinstance(hook, Moved) else hook
        with same_draws():
            return runner.run(values, tensors, training=training, after=after)


@dataclass
class Weighed:
    """A fixed random combination of outputs, whose gradients are compared.

    Attributes:
        shapes: of these outputs alone, by place, and of so many entries of them, the first ones along every dim; all
            of all where None.
    """

    shapes: dict[int, list[int]] | None = None

    def of(self, found: Sequence[torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor | None]:
        """Gradients by name."""
        if self.shapes is not None:
            found = [found[i][tuple(slice(0, n) for n in shape)] for i, shape in self.shapes.items()]
        total: Any = 0.0
        for i, t in enumerate(t for t in found if t.is_floating_point()):
            generator = torch.Generator().manual_seed(i)
            weight = (
                torch.randn(t.shape, generator=generator, dtype=t.dtype).to(t.device) if t.dim() else t.new_ones(())
            )
            total = total + (t * weight).sum()
        if not wanted or not isinstance(total, torch.Tensor) or not total.requires_grad:
            return {}
        gradients = torch.autograd.grad(total, list(wanted.values()), allow_unused=True)
        return {n: g if g is not None and g.numel() else None for n, g in zip(wanted, gradients, strict=True)}


# the checks -----------------------------------------------------------------------------------------------------------


class Verification:
    """The checks of one growth.

    Args:
        program, grown: graphs and names before and after.
        receipt: filled in.
    """

    def __init__(self, program: Traced, grown: Traced, plan: GrowthPlan, receipt: Receipt) -> None:
        self.program, self.grown, self.plan, self.receipt = program, grown, plan, receipt
        self._calls = program.calls or [Call("forward", program.args, program.kwargs)]
        self._numbers = [numbers for _, numbers in output_numbers(program)]
        self._examples = [Trial(c.args, c.kwargs, "example") for c in self._calls]
        #: by call: what it is compared on besides the example, once it is known that the model takes it
        self._found: dict[str, Round] = {"mixed": {}, "longer": {}}
        self._sought: set[tuple[str, int]] = set()
        self._failures: list[str] = []
        trivial = all(t.trivial for t in plan.tensors.values())
        self._grown_names = {str(t.source) for t in plan.tensors.values() if not t.trivial and not trivial}
        self._watch: Exercise | None = None
        #: where nothing in the graph hangs on the mode, train mode is eval mode
        self._one_mode = all(c.training is None for c in self._calls) and not any(
            heeds_mode(p.graph) for p in (program, grown)
        )

    @functools.cached_property
    def _graphs(self) -> tuple[list[Runner], list[Runner]]:
        """The graphs of both models in float64, by call."""
        return tuple(  # type: ignore[return-value]
            [Runner(g) for g in call_graphs(p, clean_graph(p.graph, True))] for p in (self.program, self.grown)
        )

    @functools.cached_property
    def _writes(self) -> tuple[set[str], set[str]]:
        """Names of what the forward of each model writes into."""
        small, large = (set[str]().union(*(r.written for r in runners)) for runners in self._graphs)
        return small, large

    # rounds

    def _served(self, training: bool) -> list[int]:
        return [n for n, c in enumerate(self._calls) if c.serves(training)]

    def _example(self, training: bool) -> Round:
        return {n: self._examples[n] for n in self._served(training)}

    def _candidates(self, slot: str, call: int) -> Iterator[Trial]:
        graph = call_graphs(self.program, self.program.graph)[call]
        inputs = [n for n in graph.nodes if n.op == "placeholder"]
        trials, captured = Trials(self._examples[call], inputs, seed=call), self._calls[call]
        for trial in trials.mixed() if slot == "mixed" else trials.longer():
            leaves = dict(zip((info_of(n).input or str(n.target) for n in inputs), trial.leaves, strict=False))
            shapes = {n: tuple(t.shape) for n, t in leaves.items() if isinstance(t, torch.Tensor)}
            if not set(captured.sizes) <= set(shapes) or captured.fits(shapes):
                yield trial

    def _rounds(self, training: bool, slots: Sequence[str] = ("mixed", "longer")) -> list[Round]:
        served = self._served(training)
        rounds = [{n: t for n, t in self._found[s].items() if n in served} for s in slots]
        return [r for r in rounds if r]

    def _look(self, slot: str, call: int, takes: Callable[[Trial], bool]) -> None:
        """Find the first candidate that the model takes."""
        if (slot, call) in self._sought:
            return
        self._sought.add((slot, call))
        for trial in self._candidates(slot, call):
            if takes(trial):
                self._found[slot][call] = trial
                self.receipt.inputs.append(
                    f"{self._calls[call].label}: {trial.words}" if len(self._calls) > 1 else trial.words
                )
                return

    # comparing

    def _compare(
        self,
        old: Results,
        new: Results,
        limit: Tolerance,
        again: Callable[[Moved], Results],
        *,
        suspicious: float,
        gradient_limit: Tolerance | None = None,
    ) -> tuple[float, list[OutputError], float | None, float | None]:
        """Errors of the outputs (the worst, and the first round's one by one), of the state and of the gradients."""
        moved: list[Results] = []
        plain: list[Results] = []

        def judged(
            error: float, least: float, pick: Callable[[Results], torch.Tensor | None], how: Callable[..., float]
        ) -> float:
            """An error, without the rounding that the model amplifies; looked into where the error is suspicious."""
            if not error > least:
                return error
            if not moved:
                plain.append(again(Moved(0, 0)))
                moved.extend(again(Moved(k + 1, limit.steps)) for k in range(RUNS))
            base, others = pick(plain[0]), [pick(m) for m in moved]
            found = [o for o in others if o is not None]
            if base is None or not found:
                return error
            self._amplified(amplification(base, found, limit))
            return how(found, base)

        worst, listed, first = 0.0, [], min((r for r, _ in old.outputs), default=0)
        for (number, call), value in old.outputs.items():
            if (number, call) not in new.outputs:
                continue
            after = new.outputs[number, call]
            before, grown = _tensors(value), _tensors(after)
            if len(before) != len(grown):
                raise ExactnessError(f"the grown model returns {len(grown)} tensors instead of {len(before)}")
            if not any(s.outputs for s in self.plan.steps) and _numbers(value) != _numbers(after):
                raise ExactnessError(f"the grown model returns {_numbers(after)} instead of {_numbers(value)}")
            for place, (i, a, b) in enumerate(zip(self._numbers[call], before, grown, strict=True)):
                b = _old_part(i, a, b, self.plan)
                changed = i in self.plan.changed_outputs
                error = slice_error(a, b, limit)
                if not changed:
                    error = judged(
                        error,
                        suspicious,
                        _output((number, call), place),
                        lambda found, base, a=a, b=b: slice_error(a, b, limit, found, base),
                    )
                    worst = max(worst, error)
                if number == first:
                    listed.append(
                        OutputError(output=str(i), shape=list(a.shape), relative_error=error, changed=changed)
                    )
        state = None
        for name, plan in self.plan.tensors.items():
            if name in new.state and plan.source in old.state and not plan.fresh and not plan.zero:
                a, b = _mapped(plan, old.state[plan.source], new.state[name])
                error = judged(
                    slice_error(a, b, limit),
                    suspicious,
                    _mapped_state(plan, new.state[name]),
                    lambda found, base, a=a, b=b: slice_error(a, b, limit, found, base),
                )
                state = max(state or 0.0, error)
        gradient = None
        if gradient_limit is not None:
            largest = max((float(g.abs().max()) for g in old.gradients.values() if g is not None), default=0.0)
            for name, found in new.gradients.items():
                pair = self._gradient_pair(name, old.gradients, found)
                if pair is None:
                    continue
                a, b = pair
                gap = difference(a, b)
                small = float(gap.max()) / (largest or 1.0)
                if small <= 1024 * torch.finfo(torch.float64).eps:
                    gradient = max(gradient or 0.0, small)
                    continue  # zero but for rounding: key biases, biases before a batch norm
                error = judged(
                    slice_error(a, b, gradient_limit, gap=gap),
                    gradient_limit.relative / 1000,
                    self._expected_gradient(name, found),
                    lambda moves, base, a=a, b=b: slice_error(a, b, gradient_limit, moves, base),
                )
                gradient = max(gradient or 0.0, error)
        return worst, listed, state, gradient

    def _amplified(self, value: float) -> None:
        self.receipt.amplification = max(self.receipt.amplification or 0.0, value)

    def _expected_gradient(self, name: str, found: torch.Tensor | None) -> Callable[[Results], torch.Tensor | None]:
        """What the plan makes of a parameter's gradient, picked from results."""

        def expected(results: Results) -> torch.Tensor | None:
            pair = self._gradient_pair(name, results.gradients, found)
            return None if pair is None else pair[0]

        return expected

    def _gradient_pair(
        self, name: str, small: Mapping[str, torch.Tensor | None], gradient: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """What the plan says of a gradient of the grown model, and the gradient; None where it says nothing."""
        if name.startswith("input "):
            old = small.get(name)
            if old is None or gradient is None:
                return None if old is None and gradient is None else (_full(old, gradient), _full(gradient, old))
            return old, gradient
        plan = self.plan.tensors[name]
        old = small.get(plan.source) if plan.source is not None else None
        if plan.source is None or plan.zero or gradient is None or old is None:
            return None
        if not self.plan.exact_gradients or _has_newborn(plan) or self._new_blocks():
            return None  # old entries only are mapped; the output check covers them
        expected = copy_gradient(plan, old)
        for i in plan.appended:  # new rows that old entries are read with may have one of their own
            dim = plan.dims[i]
            if dim is not None:
                rows = torch.from_numpy(np.flatnonzero(dim.index >= 0)).to(gradient.device)
                gradient, expected = gradient.index_select(i, rows), expected.index_select(i, rows)
        return expected, gradient

    def _new_blocks(self) -> bool:
        sources = [p.source for p in self.plan.tensors.values()]
        return None in sources or len(set(sources)) != len(sources)

    # float64

    def _as_it_is(self, name: str) -> torch.Tensor:
        return self.program.tensor(name).detach()

    def _stays(self, name: str) -> bool:
        """Whether a tensor has the same values everywhere: integers, and patterns that the plan continues."""
        return not self._as_it_is(name).is_floating_point() or name in self._continued

    @functools.cached_property
    def _continued(self) -> set[str | None]:
        return {p.source for p in self.plan.tensors.values() if p.continuation is not None}

    def _shaken(self, name: str) -> torch.Tensor:
        """A copy in float64, with other values where it may have others."""
        tensor = self._as_it_is(name)
        if self._stays(name):
            return widen_float(tensor)
        trained, written = name in self.program.parameters, name in self._written
        opens = trained or (name in self.program.buffers and not written)
        return shake(name, tensor, opens=opens, moves=trained or written)

    def _shaken_once(self, old: Side) -> Callable[[str], torch.Tensor]:
        """What the grown model's tensors are made of where the old one's are shaken."""
        return lambda name: self._as_it_is(name) if self._stays(name) else old.whole(name)

    def _makes(self, source: Callable[[str], torch.Tensor], *, noise: bool = True) -> Callable[[str], torch.Tensor]:
        plan = self.plan if noise else _noiseless(self.plan)

        def make(name: str) -> torch.Tensor:
            ((_, tensor),) = materialise_all(plan, source, [name], dtype=torch.float64)
            return tensor

        return make

    def float64(self) -> None:
        """Outputs, state and gradients in float64: the weights as they are on the example, others on the rest."""
        old = Side(self.program, lambda n: widen_float(self._as_it_is(n)), runners=self._graphs[0], keep=True)
        new = Side(self.grown, self._makes(self._as_it_is), runners=self._graphs[1], keep=True)
        self._written = old.written
        self._watch = Exercise([r.graph for r in old.runners], self._grown_names)
        limit = Tolerance(LIMIT)
        self.receipt.limits |= {"float64": LIMIT, "gradients": GRADIENT_LIMIT}
        self._search(old)
        for training in (False, True):
            if not self._served(training) or (training and (self.plan.exact_elsewhere or self._one_mode)):
                continue  # train mode is run with other weights, below
            then = self._rounds(training, ("mixed",)) if self.plan.exact_elsewhere and old.written else []
            self._refute(old, new, [self._example(training)], training, limit, then=then)
        self._alive(new)
        if self.plan.exact_elsewhere:
            old = old.with_tensors(self._shaken)
            new = new.with_tensors(self._makes(self._shaken_once(old), noise=False))
            self._other_weights(old, new, limit)

    def _other_weights(self, old: Side, new: Side, limit: Tolerance) -> None:
        gradient_mode = bool(self._served(True)) and not any(s.eval_only for s in self.plan.steps)
        for training in (False, True):
            if not self._served(training) or (training and self._one_mode):
                continue  # the model was captured in the other mode only, or they are one
            rounds = self._rounds(training)
            if training or not rounds:
                rounds = rounds[:1] or [self._example(training)]
            if self._one_mode and not old.written:
                rounds = rounds[::-1]  # gradients are taken of the last, and the first is the smaller
            weighed = training == gradient_mode or self._one_mode
            gradients = self._weighed(old, rounds[-1], training) if weighed else None
            self._refute(old, new, rounds, training, limit, gradients)

    def streamed(self) -> None:
        """Outputs in float64, of models whose weights do not fit in it: one op's weights at a time."""
        old = Side(self.program, self._shaken, runners=self._graphs[0], keep=False)
        new = Side(self.grown, self._makes(self._shaken_once(old)), runners=self._graphs[1], keep=False)
        self._written = old.written
        self._watch = Exercise([r.graph for r in old.runners], self._grown_names)
        self.receipt.limits["float64"] = LIMIT
        self._search(old)
        for training in (False, True):
            if self._served(training):
                rounds = self._rounds(training, ("mixed",)) if self.plan.exact_elsewhere else []
                self._refute(old, new, rounds or [self._example(training)], training, Tolerance(LIMIT))

    def _search(self, old: Side) -> None:
        """Trials that the small model takes, where its own module has not found them."""
        if not self.plan.exact_elsewhere:
            return
        for slot in ("mixed", "longer"):
            for call in range(len(self._calls)):

                def takes(trial: Trial, call: int = call) -> bool:
                    try:
                        found = old.run([{call: trial}], bool(self._calls[call].training))
                    except Exception:  # whatever the model raises for what it does not take
                        return False
                    return _says_something(found.outputs)

                self._look(slot, call, takes)

    def _refute(
        self,
        old: Side,
        new: Side,
        rounds: list[Round],
        training: bool,
        limit: Tolerance,
        gradients: Weighed | None = None,
        then: Sequence[Round] = (),
    ) -> None:
        """Compare the models on all rounds in a row; on ``then`` as well where the rounds leave something behind."""
        assert self._watch is not None
        label = "train" if training else "eval"
        try:
            small = old.run(rounds, training, after=self._watch.after, gradients=gradients)
            if then and old.changed(small):
                rounds = [*rounds, *then]
                small = old.run(rounds, training, after=self._watch.after, gradients=gradients)
        except Exception as error:
            if any(t.words != "example" for r in rounds for t in r.values()):
                return self._refute(old, new, [self._example(training)], training, limit, gradients)
            self._note(f"{label} mode not measured in float64: {_first_line(error)}")
            return
        if not _says_something(small.outputs) and len(rounds) > 1:
            return self._refute(old, new, rounds[:-1], training, limit, gradients)
        try:
            large = new.run(rounds, training, gradients=gradients)
        except Exception as error:
            raise ExactnessError(
                f"the grown model cannot run in {label} mode on {_words(rounds)}, which the original takes: "
                f"{_first_line(error)}. {_BUG} Steps: {[s.request for s in self.plan.steps]}"
            ) from error

        def again(moved: Moved) -> Results:
            return old.run(rounds, training, moved=moved, gradients=gradients)

        worst, listed, state, gradient = self._compare(
            small,
            large,
            limit,
            again,
            suspicious=SUSPICIOUS,
            gradient_limit=Tolerance(GRADIENT_LIMIT) if gradients is not None else None,
        )
        receipt = self.receipt
        if training or self._one_mode:
            receipt.error_float64_train = max(receipt.error_float64_train or 0.0, worst)
        if not training:
            receipt.error_float64 = max(receipt.error_float64 or 0.0, worst)
            receipt.outputs = receipt.outputs or listed
        if gradients is not None:
            receipt.gradient_error = gradient
        skipped = training and any(s.eval_only for s in self.plan.steps)
        if state is not None and not skipped:
            receipt.error_state = max(receipt.error_state or 0.0, state)

    def _weighed(self, old: Side, last: Round, training: bool) -> Weighed:
        """Which entries of which outputs are combined: those that stay as they were."""
        if not any(s.outputs or s.changed_outputs for s in self.plan.steps):
            return Weighed()
        found = old.run([last], training)
        shapes = [list(t.shape) for c in last for t in _tensors(found.outputs[0, c])]
        numbers = [n for c in last for n in self._numbers[c]]
        return Weighed(
            {i: s for i, (n, s) in enumerate(zip(numbers, shapes, strict=True)) if n not in self.plan.changed_outputs}
        )

    def _alive(self, new: Side) -> None:
        """Every newborn entry gets a gradient within two steps of gradient descent, where old entries get one at all.

        (Softmax lets none through to a key's bias, nor a norm to the bias before it.)
        """
        newborn = {n: p for n, p in self.plan.tensors.items() if p.source is None or p.zero or _has_newborn(p)}
        waiting = {n for n in newborn if n in self.grown.parameters and self.grown.requires_grad.get(n, True)}
        silent = {n for n in waiting if newborn[n].source is not None and not newborn[n].zero}
        if not waiting:
            return
        values = {n: new.whole(n).clone() for n in self.grown.parameters}
        model = new.with_tensors(lambda n: values[n] if n in values else new.whole(n).clone())
        # a bias before a batch norm has a gradient in eval mode only
        for training in (True, True, False, False):
            if not waiting:
                break
            if not self._served(training):
                continue
            gradients = model.run([self._example(training)], training, gradients=Weighed()).gradients
            size = max((float(g.abs().max()) for g in gradients.values() if g is not None), default=1.0)
            for name in list(waiting):
                g = gradients.get(name)
                if g is not None and float(g.abs().max()) > 1e-11 * size:  # less may be rounding
                    silent.discard(name)
                if g is not None and _newborn_part(newborn[name], g) > 1e-14 * size:
                    waiting.discard(name)
            for name, value in values.items():
                g = gradients.get(name)
                if g is not None:
                    values[name] = value.detach() - g * (0.01 / max(size, 1e-12))
            model = new.with_tensors(lambda n: values[n] if n in values else new.whole(n).clone())
        self.receipt.dead_parameters = sorted(waiting - silent)

    # own dtype

    def native(self, module: nn.Module, grown: fx.GraphModule) -> None:
        """The user's own module against the grown one in the model's own dtype, several calls in a row."""
        limit = native_tolerance(self.program)
        self.receipt.limits["native"] = limit.relative
        random = any(draws(n) for n in self.program.graph.nodes)
        for training in (False, True):
            if not self._served(training) or (training and (random or not self.plan.exact_elsewhere or self._one_mode)):
                continue
            with in_mode(module, training), in_mode(grown, training):
                if not self._native(module, grown, training, limit):
                    return

    def _native(self, module: nn.Module, grown: fx.GraphModule, training: bool, limit: Tolerance) -> bool:
        """One mode. Returns whether the example could be run."""
        old, new, label = Results(), Results(), "train" if training else "eval"
        rounds: list[Round] = []
        small, large = self._writes

        def both(trial: Trial, call: int) -> bool:
            """Run both models. Returns whether the trial is one that both are meant to take."""
            with contextlib.ExitStack() as undo:
                undo.enter_context(_state_of(module, small))
                undo.enter_context(_state_of(grown, large))
                try:
                    a = _call(module, trial)
                except Exception as error:
                    if trial.words == "example":
                        self._note(f"{label} mode not measured in the model's own dtype: {_first_line(error)}")
                    return False
                if trial.words != "example" and not _says_something(a):
                    return False
                try:
                    b = _call(grown, trial)
                except Exception as error:
                    if trial.words != "example" and _refusal(error):
                        return False
                    raise ExactnessError(
                        f"the grown model cannot run in {label} mode on what the original takes ({trial.words}): "
                        f"{_first_line(error)}. {_BUG} Steps: {[s.request for s in self.plan.steps]}"
                    ) from error
                undo.pop_all()
            key = len(rounds) - 1, call
            old.outputs[key], new.outputs[key] = a, b
            rounds[-1][call] = trial
            return True

        with _state_of(module, {n for n, _ in module.named_buffers()} | small), _state_of(grown, large):
            for call in self._served(training):
                rounds += [{}] if not rounds else []
                if training and ("mixed" in self._found and call in self._found["mixed"]):
                    continue  # the example has been run in eval mode
                if not both(self._examples[call], call):
                    return False
            for slot in () if not self.plan.exact_elsewhere else ("mixed",) if training else ("mixed", "longer"):
                rounds.append({})
                for call in self._served(training):
                    if (slot, call) not in self._sought:
                        self._look(slot, call, functools.partial(both, call=call))
                    elif call in self._found[slot]:
                        both(self._found[slot][call], call)
            old.state, new.state = _values(module, small), _values(grown, large)

        def again(moved: Moved) -> Results:
            own = Side(self.program, lambda n: self.program.tensor(n).detach(), keep=True)
            return own.run(rounds, training, moved=moved)

        worst, listed, state, _ = self._compare(old, new, limit, again, suspicious=limit.relative)
        receipt = self.receipt
        if training or (self._one_mode and self.plan.exact_elsewhere and not any(map(draws, self.program.graph.nodes))):
            receipt.error_native_train = worst
        if not training:
            receipt.error_native, receipt.outputs = worst, receipt.outputs or listed
        if training and any(s.eval_only for s in self.plan.steps):
            return True
        if not (state or 0.0) <= limit.relative:
            self.fail(f"what it writes into its buffers differs by {state:.1e} in its own dtype", limit.relative)
        if not worst <= limit.relative:
            self.fail(f"its {label} outputs differ by {worst:.2e} in its own dtype", limit.relative)
        return True

    def _note(self, text: str) -> None:
        if text not in self.receipt.notes:
            self.receipt.notes.append(text)

    def fail(self, what: str, limit: float) -> None:
        """Keep what is wrong with an exact plan."""
        if self.plan.exact_elsewhere:
            self._failures.append(f"{what} (limit {limit:g})")

    def judge(self) -> None:
        """Compare what was measured with its limits.

        Raises:
            ExactnessError: the plan is exact, the measurement is not.
        """
        receipt = self.receipt
        if self._watch is not None:
            receipt.unexercised = self._watch.lines()
        for what, value in (
            ("its eval outputs differ", receipt.error_float64),
            ("its train outputs differ", receipt.error_float64_train),
            ("what it writes into its buffers differs", receipt.error_state),
        ):
            if "train" in what and any(s.eval_only for s in self.plan.steps):
                continue
            if value is not None and not value <= LIMIT:
                self.fail(f"{what} by {value:.2e} in float64", LIMIT)
        if self._failures:
            raise ExactnessError(
                f"the growth was planned as exact but {'; '.join(self._failures)}. {_BUG} "
                f"Steps: {[s.request for s in self.plan.steps]}"
            )
        if receipt.gradient_error is not None and not receipt.gradient_error <= GRADIENT_LIMIT:
            raise ExactnessError(
                f"the plan's map of gradients differs from the grown model's by {receipt.gradient_error:.2e} (limit "
                f"{GRADIENT_LIMIT:g}), so that optimizer state could not be carried exactly. {_BUG} "
                f"Steps: {[s.request for s in self.plan.steps]}"
            )


_BUG = "This is a bug in fxgrow: the original model is untouched; please report the spec and the model."


def native_tolerance(program: Traced) -> Tolerance:
    """Of a comparison in the model's own dtype: that of the coarsest dtype that it computes in.

    256 units in the last place (3e-5 in float32), and no more than 1/32; beyond that, 16 times what one unit in every
    value moves the output by.
    """
    values = [t.dtype for t in program.tensors.values()]
    values += [v.dtype for n in program.graph.nodes if isinstance(v := n.meta.get("val"), torch.Tensor)]
    eps = max((torch.finfo(d).eps for d in values if d.is_floating_point), default=0.0)
    return Tolerance(max(LIMIT, min(256 * eps, 1 / 32)), steps=1, amplified=16)


@functools.cache
def _drawn() -> torch.Tensor:
    """Numbers between -1 and 1, a prime number of them, so that they do not line up with any dim; twice over."""
    return (torch.rand(65537, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1).repeat(2)


#: a parameter is moved by up to this part of itself, and opened by up to this
_MOVED = 0.2


def shake(name: str, tensor: torch.Tensor, *, opens: bool, moves: bool) -> torch.Tensor:
    """Other values for a weight, as training might leave it; the same for the same name. A copy, in float64.

    Args:
        opens: a tensor of zeros becomes small random numbers.
        moves: others are multiplied entry by entry with numbers around 1, so that signs and zeros stay.
    """
    t = tensor.to(torch.float64, copy=True)
    if not t.numel():
        return t
    start = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "little")
    period = len(_drawn()) // 2
    drawn = _drawn()[-start % period :][:period] * _MOVED
    if t.numel() > period:
        drawn = drawn.repeat(-(-t.numel() // period))
    drawn = drawn[: t.numel()].reshape(t.shape).to(t.device)
    if not bool(t.any()):
        return drawn if opens else t
    return t.mul_(drawn.add_(1)) if moves else t


def _casts(program: Traced) -> str:
    """The dtypes narrower than float32 that the graph names itself."""
    found: set[str] = set()
    for node in program.graph.nodes:
        for value in (*node.args, *node.kwargs.values()):
            if value in (torch.float16, torch.bfloat16):
                found.add(str(value).removeprefix("torch."))
    return " and ".join(sorted(found))


def _mapped(plan: TensorPlan, old: torch.Tensor, new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the plan makes of a value, and the grown model's own: the entries that copy old ones."""
    if not plan.trivial:
        old = materialise_tensor(plan.noiseless(), old)
    for i, dim in enumerate(plan.dims):
        if dim is not None and bool((dim.index < 0).any()):
            rows = torch.from_numpy(np.flatnonzero(dim.index >= 0)).to(new.device)
            old, new = old.index_select(i, rows), new.index_select(i, rows)
    return old, new


def _output(key: tuple[int, int], place: int) -> Callable[[Results], torch.Tensor | None]:
    """One tensor that a model returned, picked from its results."""
    return lambda results: _tensors(results.outputs[key])[place] if key in results.outputs else None


def _mapped_state(plan: TensorPlan, new: torch.Tensor) -> Callable[[Results], torch.Tensor]:
    """What the plan makes of a buffer after the calls, picked from results."""
    return lambda results: _mapped(plan, results.state[str(plan.source)], new)[0]


def _full(t: torch.Tensor | None, other: torch.Tensor | None) -> torch.Tensor:
    """A gradient that is missing is zero."""
    if t is not None:
        return t
    assert other is not None
    return torch.zeros_like(other)


def _says_something(outputs: Any) -> bool:
    """Whether there is a finite number among the outputs, or a value that is no float."""
    found = _tensors(outputs)
    floats = [t for t in found if t.is_floating_point()]
    return len(floats) < len(found) or not floats or any(bool(t.isfinite().any()) for t in floats)


def _call(module: Callable[..., Any], trial: Trial) -> Any:
    """A module's outputs, on copies of its inputs; the same random numbers are drawn every time."""
    copy = trial.copy()
    with torch.no_grad(), same_draws():
        return module(*copy.args, **copy.kwargs)


def _owners(module: nn.Module, names: set[str]) -> Iterator[tuple[str, nn.Module, str]]:
    modules = dict(module.named_modules())
    for name in sorted(names):
        path, _, leaf = name.rpartition(".")
        if path in modules and isinstance(getattr(modules[path], leaf, None), torch.Tensor):
            yield name, modules[path], leaf


def _values(module: nn.Module, names: set[str]) -> dict[str, torch.Tensor]:
    return {n: getattr(owner, leaf).detach().clone() for n, owner, leaf in _owners(module, names)}


@contextlib.contextmanager
def _state_of(module: nn.Module, names: set[str]) -> Iterator[None]:
    """Put back what a forward writes."""
    before = [(owner, leaf, getattr(owner, leaf)) for _, owner, leaf in _owners(module, names)]
    copies = [t.detach().clone() for _, _, t in before]
    try:
        yield
    finally:
        with torch.no_grad():
            for (owner, leaf, tensor), copy in zip(before, copies, strict=True):
                if getattr(owner, leaf) is not tensor:
                    setattr(owner, leaf, tensor)
                tensor.copy_(copy)


def _refusal(error: Exception) -> bool:
    """Whether a grown module refuses an input itself, rather than an op in it failing."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and Path(frames[-1].filename).is_relative_to(Path(__file__).parents[1])


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def _words(rounds: Sequence[Round]) -> str:
    return "; ".join(dict.fromkeys(t.words for r in rounds for t in r.values()))


def _noiseless(plan: GrowthPlan) -> GrowthPlan:
    return plan.model_copy(update={"tensors": {n: t.noiseless() for n, t in plan.tensors.items()}})


def _has_newborn(plan: TensorPlan) -> bool:
    """Whether the tensor has newborn entries, other than rows that wait for inputs that use them."""
    return any(d is not None and i not in plan.appended and bool((d.index < 0).any()) for i, d in enumerate(plan.dims))


def _newborn_part(plan: TensorPlan, gradient: torch.Tensor) -> float:
    """Largest gradient among the newborn entries; of all entries where the tensor is new as a whole."""
    if plan.source is None or plan.zero:
        return float(gradient.abs().max())
    worst = 0.0
    for i, d in enumerate(plan.dims):
        if d is not None and i not in plan.appended and bool((d.index < 0).any()):
            rows = torch.from_numpy((d.index < 0).nonzero()[0]).to(gradient.device)
            worst = max(worst, float(gradient.index_select(i, rows).abs().max()))
    return worst


def verify(
    program: Traced,
    grown_program: Traced,
    plan: GrowthPlan,
    original: nn.Module | None,
    grown: fx.GraphModule,
    level: Level,
) -> Receipt:
    """Measure a growth.

    Args:
        original: the user's own module; where None, one is made of the program.
        level: ``float64`` whole, ``streamed`` (one op's weights at a time), or the model's own dtype alone.

    Raises:
        ExactnessError: the plan is exact, the measurement is not.
    """
    receipt = Receipt(exactness=plan.exactness, measured=level)
    check = Verification(program, grown_program, plan, receipt)
    start = time.perf_counter()
    if original is None:
        original = regenerate(program, program.tensors, hierarchical=False)
    check.native(original, grown)
    receipt.seconds["verify native"] = time.perf_counter() - start
    start = time.perf_counter()
    if level == "float64":
        check.float64()
    elif level == "streamed":
        check.streamed()
        receipt.notes.append("gradients not measured: the model is too large for float64 as a whole")
    else:
        receipt.notes.append("float64 not measured: verify='native'")
    if level != "native":
        receipt.seconds["verify float64"] = time.perf_counter() - start
    check.judge()
    if level != "native" and (casts := _casts(program)):
        receipt.notes.append(
            f"the model casts to {casts} inside: float64 widens these casts, so that what they do is measured "
            "in the model's own dtype alone"
        )
    return receipt
