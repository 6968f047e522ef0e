"""What two models differ in: outputs, what they left in their buffers, gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fxgrow.errors import ExactnessError
from fxgrow.ir import trees
from fxgrow.plan import GrowthPlan, TensorPlan
from fxgrow.verify.gradients import GradientMap
from fxgrow.verify.outputs import old_part, plain_values
from fxgrow.verify.receipt import OutputError, largest
from fxgrow.verify.rounding import Rerun, Tolerance, difference, slice_error
from fxgrow.verify.side import Results
from fxgrow.weights.materialise import materialise_tensor

#: gradients that differ by no more than this part of the largest one are zero but for rounding
_NOTHING = 1024 * torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class Errors:
    """How far two models are apart.

    Attributes:
        worst: the largest error of an output that may not change.
        outputs: those of the first round one by one.
        state: of what they left in their buffers; None where they left nothing.
        gradient: None where it was not measured, or the plan says nothing of gradients.
        amplification: of rounding, by the model; None where it was not looked into.
    """

    worst: float
    outputs: list[OutputError]
    state: float | None
    gradient: float | None
    amplification: float | None


class Differences:
    """Compares what the two models gave.

    Args:
        plan: what must be equal to what.
        numbers: by call, the numbers of its outputs in the plan.
    """

    def __init__(self, plan: GrowthPlan, numbers: Sequence[Sequence[int]]) -> None:
        self.plan, self.numbers = plan, numbers
        self.gradients = GradientMap(plan)

    def between(
        self,
        old: Results,
        new: Results,
        limit: Tolerance,
        rerun: Rerun[Results],
        *,
        suspicious: float,
        gradient_limit: Tolerance | None = None,
    ) -> Errors:
        """All errors.

        Args:
            limit: of outputs and state.
            rerun: the old model with its values moved.
            suspicious: beyond this, rounding is looked into.
            gradient_limit: of gradients; they are left out where None.

        Raises:
            ExactnessError: the grown model returns something that cannot be compared.
        """
        worst, listed = self._outputs(old, new, limit, rerun, suspicious)
        state = self._state(old, new, limit, rerun, suspicious)
        gradient = None if gradient_limit is None else self._gradients(old, new, gradient_limit, rerun)
        return Errors(worst, listed, state, gradient, rerun.amplification)

    def _outputs(
        self, old: Results, new: Results, limit: Tolerance, rerun: Rerun[Results], suspicious: float
    ) -> tuple[float, list[OutputError]]:
        worst, listed, first = 0.0, [], min((r for r, _ in old.outputs), default=0)
        for (number, call), value in old.outputs.items():
            if (number, call) not in new.outputs:
                continue
            before, grown = self._returned(value, new.outputs[number, call])
            for place, (i, a, b) in enumerate(zip(self.numbers[call], before, grown, strict=True)):
                b = old_part(i, a, b, self.plan)
                changed = i in self.plan.changed_outputs
                error = slice_error(a, b, limit)
                if not changed:
                    if error > suspicious:
                        error = rerun.explain(error, a, b, limit, _output((number, call), place))
                    worst = max(worst, error)
                if number == first:
                    listed.append(
                        OutputError(output=str(i), shape=list(a.shape), relative_error=error, changed=changed)
                    )
        return worst, listed

    def _returned(self, value: object, after: object) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The tensors of what both returned from one call."""
        before, grown = trees.tensors_in(value), trees.tensors_in(after)
        if len(before) != len(grown):
            raise ExactnessError(f"the grown model returns {len(grown)} tensors instead of {len(before)}")
        if not any(s.outputs for s in self.plan.steps) and plain_values(value) != plain_values(after):
            raise ExactnessError(f"the grown model returns {plain_values(after)} instead of {plain_values(value)}")
        return before, grown

    def _state(
        self, old: Results, new: Results, limit: Tolerance, rerun: Rerun[Results], suspicious: float
    ) -> float | None:
        worst = None
        for name, plan in self.plan.tensors.items():
            if name in new.state and plan.source in old.state and not plan.fresh and not plan.zero:
                a, b = _mapped(plan, old.state[plan.source], new.state[name])
                error = slice_error(a, b, limit)
                if error > suspicious:
                    error = rerun.explain(error, a, b, limit, _mapped_state(plan, new.state[name]))
                worst = largest(worst, error)
        return worst

    def _gradients(self, old: Results, new: Results, limit: Tolerance, rerun: Rerun[Results]) -> float | None:
        worst = None
        size = max((float(g.abs().max()) for g in old.gradients.values() if g is not None), default=0.0)
        for name, found in new.gradients.items():
            pair = self.gradients.pair(name, old.gradients, found)
            if pair is None:
                continue
            a, b = pair
            gap = difference(a, b)
            error = float(gap.max()) / (size or 1.0)
            if not error <= _NOTHING:  # key biases, biases before a batch norm have no gradient but rounding
                error = slice_error(a, b, limit, gap=gap)
                if error > limit.relative / 1000:
                    error = rerun.explain(error, a, b, limit, self._expected_gradient(name, found))
            worst = largest(worst, error)
        return worst

    def _expected_gradient(self, name: str, found: torch.Tensor | None) -> Callable[[Results], torch.Tensor | None]:
        """What the plan makes of a parameter's gradient, picked from results."""

        def expected(results: Results) -> torch.Tensor | None:
            pair = self.gradients.pair(name, results.gradients, found)
            return None if pair is None else pair[0]

        return expected


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
    return lambda results: trees.tensors_in(results.outputs[key])[place] if key in results.outputs else None


def _mapped_state(plan: TensorPlan, new: torch.Tensor) -> Callable[[Results], torch.Tensor]:
    """What the plan makes of a buffer after the calls, picked from results."""
    return lambda results: _mapped(plan, results.state[str(plan.source)], new)[0]
