"""What is compared in float64, and in which order: so that the algebra is tested and not the rounding."""

from __future__ import annotations

from fxgrow.verify.failures import Failures
from fxgrow.verify.inputs import SLOTS, Inputs
from fxgrow.verify.limits import GRADIENT_LIMIT, LIMIT
from fxgrow.verify.liveness import dead_parameters
from fxgrow.verify.outputs import says_something
from fxgrow.verify.pair import Pair
from fxgrow.verify.receipt import Receipt
from fxgrow.verify.refute import Refutation
from fxgrow.verify.side import Side
from fxgrow.verify.trials import Trial
from fxgrow.verify.weights import Weights


class Float64:
    """Both graphs, node by node, with float64 in place of every float dtype."""

    def __init__(self, pair: Pair, inputs: Inputs, failures: Failures, receipt: Receipt) -> None:
        self.pair, self.plan, self.inputs, self.receipt = pair, pair.plan, inputs, receipt
        self._weights = Weights(pair.program, pair.plan, pair.writes[0])
        self._refutation = Refutation(pair, inputs, failures, receipt)

    def whole(self) -> None:
        """Outputs, state and gradients: the weights as they are on the example, others on the rest."""
        weights = self._weights
        old = Side(self.pair.program, weights.old, runners=self.pair.runners[0], keep=True)
        new = Side(self.pair.grown, weights.grown(weights.own), runners=self.pair.runners[1], keep=True)
        self.receipt.limits |= {"float64": LIMIT, "gradients": GRADIENT_LIMIT}
        self._search(old)
        for training in (False, True):
            if not self.inputs.served(training) or (training and (self.plan.exact_elsewhere or self.pair.one_mode)):
                continue  # train mode is run with other weights, below
            then = self.inputs.rounds(training, ("mixed",)) if self.plan.exact_elsewhere and old.written else []
            self._refutation.attempt(old, new, [self.inputs.example(training)], training, then=then)
        self.receipt.dead_parameters = dead_parameters(new, self.plan, self.inputs.example)
        if self.plan.exact_elsewhere:
            old = old.with_tensors(weights.shaken)
            new = new.with_tensors(weights.grown(weights.once(old.whole), noise=False))
            self._other_weights(old, new)
        self.receipt.unexercised = self._refutation.watch.lines()

    def streamed(self) -> None:
        """Outputs of models whose weights do not fit in float64: one op's weights at a time."""
        weights = self._weights
        old = Side(self.pair.program, weights.shaken, runners=self.pair.runners[0], keep=False)
        new = Side(self.pair.grown, weights.grown(weights.once(old.whole)), runners=self.pair.runners[1], keep=False)
        self.receipt.limits["float64"] = LIMIT
        self._search(old)
        for training in (False, True):
            if self.inputs.served(training):
                rounds = self.inputs.rounds(training, ("mixed",)) if self.plan.exact_elsewhere else []
                self._refutation.attempt(old, new, rounds or [self.inputs.example(training)], training)
        self.receipt.unexercised = self._refutation.watch.lines()

    def _other_weights(self, old: Side, new: Side) -> None:
        """On all inputs; gradients are taken where the receipt has room for them, in train mode if there is one."""
        gradient_mode = bool(self.inputs.served(True)) and not self.plan.eval_only
        for training in (False, True):
            if not self.inputs.served(training) or (training and self.pair.one_mode):
                continue  # the model was captured in the other mode only, or they are one
            rounds = self.inputs.rounds(training)
            if training or not rounds:
                rounds = rounds[:1] or [self.inputs.example(training)]
            if self.pair.one_mode and not old.written:
                rounds = rounds[::-1]  # gradients are taken of the last, and the first is the smaller
            weighed = training == gradient_mode or self.pair.one_mode
            gradients = self._refutation.weighed(old, rounds[-1], training) if weighed else None
            self._refutation.attempt(old, new, rounds, training, gradients)

    def _search(self, old: Side) -> None:
        """Inputs that the old model takes, where its own module has not found them."""
        if not self.plan.exact_elsewhere:
            return
        for slot in SLOTS:
            for call, captured in enumerate(self.inputs.calls):

                def takes(trial: Trial, call: int = call, training: bool = bool(captured.training)) -> bool:
                    try:
                        found = old.run([{call: trial}], training)
                    except Exception:  # whatever the model raises for what it does not take
                        return False
                    return says_something(found.outputs)

                self.inputs.look(slot, call, takes)
