"""The user's own module against the grown one, in the model's own dtype, several calls in a row."""

from __future__ import annotations

import contextlib
import functools
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from fxgrow.ir.draws import same_draws
from fxgrow.ir.running import attributes_kept, in_mode, plain_tensors
from fxgrow.verify.buffers import Before, state_of, values_of
from fxgrow.verify.differences import Differences
from fxgrow.verify.execute import draws
from fxgrow.verify.failures import Failures, first_line
from fxgrow.verify.inputs import SLOTS, Inputs, Slot
from fxgrow.verify.limits import native_tolerance
from fxgrow.verify.outputs import says_something
from fxgrow.verify.pair import Pair
from fxgrow.verify.receipt import Receipt, largest
from fxgrow.verify.rounding import Moved, Rerun
from fxgrow.verify.side import Results, Side
from fxgrow.verify.trials import Round, Trial


class Native:
    """The comparison in the model's own dtype."""

    def __init__(self, pair: Pair, inputs: Inputs, failures: Failures, receipt: Receipt) -> None:
        self.pair, self.plan, self.inputs, self.failures, self.receipt = pair, pair.plan, inputs, failures, receipt
        self._random = any(draws(n) for n in pair.program.graph.nodes)
        self._differences = Differences(pair.plan, pair.numbers)
        self._limit = native_tolerance(pair.program)

    def run(self, module: nn.Module, grown: fx.GraphModule) -> None:
        """Compare in eval mode, and in train mode where nothing is random.

        Raises:
            ExactnessError: the grown model cannot run, or returns something that cannot be compared.
        """
        self.receipt.limits["native"] = self._limit.relative
        one_mode = self._random or not self.plan.exact_elsewhere or self.pair.one_mode
        for training in (False, True):
            if not self.inputs.served(training) or (training and one_mode):
                continue
            with in_mode(module, training), in_mode(grown, training), attributes_kept(module):
                abreast = Abreast(module, grown, self.pair.writes, training, self.failures, self.receipt)
                with abreast.undone():
                    if not self._calls(abreast):
                        return
                    old, new = abreast.left_behind()
                self._compare(old, new, abreast.rounds, training)

    def _calls(self, abreast: Abreast) -> bool:
        """All calls of one mode. Returns whether the examples could be run."""
        training, inputs = abreast.training, self.inputs
        abreast.rounds.append({})
        for call in inputs.served(training):
            if training and inputs.found("mixed", call):
                continue  # the example has been run in eval mode
            if not abreast.takes(inputs.examples[call], call):
                return False
        slots: tuple[Slot, ...] = () if not self.plan.exact_elsewhere else ("mixed",) if training else SLOTS
        for slot in slots:
            abreast.rounds.append({})
            for call in inputs.served(training):
                if not inputs.sought(slot, call):
                    inputs.look(slot, call, functools.partial(abreast.takes, call=call))
                elif trial := inputs.found(slot, call):
                    abreast.takes(trial, call)
        return True

    def _compare(self, old: Results, new: Results, rounds: list[Round], training: bool) -> None:
        """Put down how far they are apart, and what of that is too far."""
        limit = self._limit

        def again(moved: Moved) -> Results:
            own = Side(self.pair.program, lambda n: self.pair.program.tensor(n).detach(), keep=True)
            return own.run(rounds, training, moved=moved)

        errors = self._differences.between(old, new, limit, Rerun(again, limit.steps), suspicious=limit.relative)
        receipt = self.receipt
        receipt.amplification = largest(receipt.amplification, errors.amplification)
        if training or (self.pair.one_mode and self.plan.exact_elsewhere and not self._random):
            receipt.error_native_train = errors.worst
        if not training:
            receipt.error_native, receipt.outputs = errors.worst, receipt.outputs or errors.outputs
        if training and self.plan.eval_only:
            return
        if not (errors.state or 0.0) <= limit.relative:
            self.failures.add(
                f"what it writes into its buffers differs by {errors.state:.1e} in its own dtype", limit.relative
            )
        if not errors.worst <= limit.relative:
            label = "train" if training else "eval"
            self.failures.add(f"its {label} outputs differ by {errors.worst:.2e} in its own dtype", limit.relative)


class Abreast:
    """Two modules that are called with the same inputs, one call after the other.

    Args:
        writes: names of what the forward of each writes into.
        training: the mode they are in.

    Attributes:
        rounds: what both were called with.
    """

    def __init__(
        self,
        module: nn.Module,
        grown: nn.Module,
        writes: tuple[set[str], set[str]],
        training: bool,
        failures: Failures,
        receipt: Receipt,
    ) -> None:
        self.module, self.grown, self.training = module, grown, training
        self.rounds: list[Round] = []
        self._old, self._new = Results(), Results()
        self._small, self._large = writes
        self._own = self._small | set(plain_tensors(module))  # a trace knows those by other names
        self._failures, self._receipt = failures, receipt

    @contextlib.contextmanager
    def undone(self) -> Iterator[None]:
        """Afterwards the modules are as they were."""
        buffers = {n for n, _ in self.module.named_buffers()}
        with state_of(self.module, buffers | self._own), state_of(self.grown, self._large):
            yield

    def takes(self, trial: Trial, call: int) -> bool:
        """Run both on a trial, as the next of the last round. Returns whether it is one that both are meant to take.

        Raises:
            ExactnessError: the grown module cannot run it.
        """
        before = Before(self.module, self._own), Before(self.grown, self._large)
        taken = False
        try:
            taken = self._both(trial, call)
        finally:
            if not taken:
                for state in before:
                    state.restore()
        if taken:
            self.rounds[-1][call] = trial
        return taken

    def _both(self, trial: Trial, call: int) -> bool:
        label = "train" if self.training else "eval"
        try:
            old = _call(self.module, trial)
        except Exception as error:
            if trial.words == "example":
                self._receipt.note(f"{label} mode not measured in the model's own dtype: {first_line(error)}")
            return False
        if trial.words != "example" and not says_something(old):
            return False
        try:
            new = _call(self.grown, trial)
        except Exception as error:
            if trial.words != "example" and _refusal(error):
                return False
            raise self._failures.cannot_run(label, f"what the original takes ({trial.words})", error) from error
        key = len(self.rounds) - 1, call
        self._old.outputs[key], self._new.outputs[key] = old, new
        return True

    def left_behind(self) -> tuple[Results, Results]:
        """What each gave, and what it has in its buffers now."""
        self._old.state, self._new.state = values_of(self.module, self._small), values_of(self.grown, self._large)
        return self._old, self._new


def _call(module: Callable[..., Any], trial: Trial) -> Any:
    """A module's outputs, on copies of its inputs; the same random numbers are drawn every time."""
    copy = trial.copy()
    with torch.no_grad(), same_draws():
        return module(*copy.args, **copy.kwargs)


def _refusal(error: Exception) -> bool:
    """Whether a grown module refuses an input itself, rather than an op in it failing."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and Path(frames[-1].filename).is_relative_to(Path(__file__).parents[1])
