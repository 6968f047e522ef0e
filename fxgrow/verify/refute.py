"""One attempt to refute a growth in float64: both models on the same inputs in a row, in one mode."""

from __future__ import annotations

from collections.abc import Sequence

from fxgrow.ir import trees
from fxgrow.verify.differences import Differences
from fxgrow.verify.exercise import Exercise
from fxgrow.verify.failures import Failures, first_line
from fxgrow.verify.gradients import Weighed
from fxgrow.verify.inputs import Inputs
from fxgrow.verify.limits import GRADIENT_LIMIT, LIMIT, SUSPICIOUS
from fxgrow.verify.outputs import says_something
from fxgrow.verify.pair import Pair
from fxgrow.verify.receipt import Receipt, largest
from fxgrow.verify.rounding import Moved, Rerun, Tolerance
from fxgrow.verify.side import Results, Side
from fxgrow.verify.trials import Round

_TOLERANCE, _GRADIENTS = Tolerance(LIMIT), Tolerance(GRADIENT_LIMIT)


class Refutation:
    """Runs both models and puts down in the receipt how far they are apart.

    Args:
        inputs: the examples, to fall back on where the old model does not take what it is given.

    Attributes:
        watch: sees what the old model does.
    """

    def __init__(self, pair: Pair, inputs: Inputs, failures: Failures, receipt: Receipt) -> None:
        self.pair, self.inputs, self.failures, self.receipt = pair, inputs, failures, receipt
        self.watch = Exercise([r.graph for r in pair.runners[0]], pair.changed_names())
        self._differences = Differences(pair.plan, pair.numbers)

    def attempt(
        self,
        old: Side,
        new: Side,
        rounds: list[Round],
        training: bool,
        gradients: Weighed | None = None,
        then: Sequence[Round] = (),
    ) -> None:
        """Compare the models on all rounds in a row; on ``then`` as well where the rounds leave something behind.

        Raises:
            ExactnessError: the grown model cannot run, or returns something that cannot be compared.
        """
        label = "train" if training else "eval"
        try:
            small = old.run(rounds, training, after=self.watch.after, gradients=gradients)
            if then and old.changed(small):
                rounds = [*rounds, *then]
                small = old.run(rounds, training, after=self.watch.after, gradients=gradients)
        except Exception as error:
            if any(t.words != "example" for r in rounds for t in r.values()):
                return self.attempt(old, new, [self.inputs.example(training)], training, gradients)
            self.receipt.note(f"{label} mode not measured in float64: {first_line(error)}")
            return
        if not says_something(small.outputs) and len(rounds) > 1:
            return self.attempt(old, new, rounds[:-1], training, gradients)
        try:
            large = new.run(rounds, training, gradients=gradients)
        except Exception as error:
            raise self.failures.cannot_run(label, f"{_words(rounds)}, which the original takes", error) from error

        def again(moved: Moved) -> Results:
            return old.run(rounds, training, moved=moved, gradients=gradients)

        limit = _GRADIENTS if gradients is not None else None
        rerun = Rerun(again, _TOLERANCE.steps)
        errors = self._differences.between(small, large, _TOLERANCE, rerun, suspicious=SUSPICIOUS, gradient_limit=limit)
        receipt = self.receipt
        receipt.amplification = largest(receipt.amplification, errors.amplification)
        if training or self.pair.one_mode:
            receipt.error_float64_train = largest(receipt.error_float64_train, errors.worst)
        if not training:
            receipt.error_float64 = largest(receipt.error_float64, errors.worst)
            receipt.outputs = receipt.outputs or errors.outputs
        if gradients is not None:
            receipt.gradient_error = errors.gradient
        if not (training and self.pair.plan.eval_only):
            receipt.error_state = largest(receipt.error_state, errors.state)

    def weighed(self, old: Side, last: Round, training: bool) -> Weighed:
        """Which entries of which outputs are combined to take gradients of: those that stay as they were."""
        plan = self.pair.plan
        if not any(s.outputs or s.changed_outputs for s in plan.steps):
            return Weighed()
        found = old.run([last], training)
        shapes = [list(t.shape) for c in last for t in trees.tensors_in(found.outputs[0, c])]
        numbers = [n for c in last for n in self.pair.numbers[c]]
        return Weighed(
            {i: s for i, (n, s) in enumerate(zip(numbers, shapes, strict=True)) if n not in plan.changed_outputs}
        )


def _words(rounds: Sequence[Round]) -> str:
    return "; ".join(dict.fromkeys(t.words for r in rounds for t in r.values()))
