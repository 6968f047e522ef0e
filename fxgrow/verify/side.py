"""One of the two models: run on several inputs in a row, what it gave, and how its tensors are made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fxgrow.emit.graphs import call_graphs, clean_graph
from fxgrow.ir import trees
from fxgrow.ir.draws import same_draws
from fxgrow.ir.traced import Traced
from fxgrow.verify.execute import Runner, Tensors
from fxgrow.verify.gradients import Weighed
from fxgrow.verify.rounding import Moved
from fxgrow.verify.trials import Round, Trial, bound


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
            tensor = self.whole(name)
            if name in self.written:  # moved ones, too: whole numbers are not moved, and would be written into
                tensor = tensor.clone()
            return tensor if moved is None else moved.tensor(tensor)

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
                    found = [t for c in trials for t in trees.tensors_in(out.outputs[number, c])]
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
