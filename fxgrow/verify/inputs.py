"""What the models are run on: the example of every call, and other inputs that the model is known to take."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch

from fxgrow.emit.graphs import call_graphs
from fxgrow.ir.nodes import info_of
from fxgrow.ir.traced import Call, Traced
from fxgrow.verify.trials import Round, Trial, Trials

#: kinds of other inputs: other values in smaller sizes, larger sizes
Slot = Literal["mixed", "longer"]
SLOTS: tuple[Slot, ...] = ("mixed", "longer")


class Inputs:
    """Inputs of a model, by call.

    Args:
        program: the model before its growth.

    Attributes:
        calls: the ways of calling it.
        words: what was found besides the examples, for people.
    """

    def __init__(self, program: Traced) -> None:
        self.program = program
        self.calls = program.calls or [Call("forward", program.args, program.kwargs)]
        self.examples = [Trial(c.args, c.kwargs, "example") for c in self.calls]
        self.words: list[str] = []
        self._found: dict[Slot, Round] = {slot: {} for slot in SLOTS}
        self._sought: set[tuple[Slot, int]] = set()

    def served(self, training: bool) -> list[int]:
        """Numbers of the calls that there are in a mode."""
        return [n for n, c in enumerate(self.calls) if c.serves(training)]

    def example(self, training: bool) -> Round:
        """The examples of all calls of a mode; empty where there are none."""
        return {n: self.examples[n] for n in self.served(training)}

    def rounds(self, training: bool, slots: Sequence[Slot] = SLOTS) -> list[Round]:
        """What was found for the calls of a mode."""
        served = self.served(training)
        rounds = [{n: t for n, t in self._found[s].items() if n in served} for s in slots]
        return [r for r in rounds if r]

    def found(self, slot: Slot, call: int) -> Trial | None:
        """What was found for a call."""
        return self._found[slot].get(call)

    def sought(self, slot: Slot, call: int) -> bool:
        """Whether it was looked for."""
        return (slot, call) in self._sought

    def look(self, slot: Slot, call: int, takes: Callable[[Trial], bool]) -> None:
        """Find the first candidate that the model takes, unless this was done before."""
        if self.sought(slot, call):
            return
        self._sought.add((slot, call))
        for trial in self._candidates(slot, call):
            if takes(trial):
                self._found[slot][call] = trial
                self.words.append(f"{self.calls[call].label}: {trial.words}" if len(self.calls) > 1 else trial.words)
                return

    def _candidates(self, slot: Slot, call: int) -> Iterator[Trial]:
        """Trials that the trace of the call allows."""
        graph = call_graphs(self.program, self.program.graph)[call]
        inputs = [n for n in graph.nodes if n.op == "placeholder"]
        trials, captured = Trials(self.examples[call], inputs, seed=call), self.calls[call]
        for trial in trials.mixed() if slot == "mixed" else trials.longer():
            leaves = dict(zip((info_of(n).input or str(n.target) for n in inputs), trial.leaves, strict=False))
            shapes = {n: tuple(t.shape) for n, t in leaves.items() if isinstance(t, torch.Tensor)}
            if not set(captured.sizes) <= set(shapes) or captured.fits(shapes):
                yield trial
