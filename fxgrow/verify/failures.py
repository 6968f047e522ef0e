"""The words of a failure, and the judgement: whether an exact plan measured exact."""

from __future__ import annotations

from fxgrow.errors import ExactnessError
from fxgrow.plan import GrowthPlan
from fxgrow.verify.limits import GRADIENT_LIMIT, LIMIT
from fxgrow.verify.receipt import Receipt

_BUG = "This is a bug in fxgrow: the original model is untouched; please report the spec and the model."


class Failures:
    """What is wrong with a growth.

    Args:
        plan: what was promised; of a plan that is not exact, nothing is kept.
    """

    def __init__(self, plan: GrowthPlan) -> None:
        self.plan = plan
        self._found: list[str] = []

    def add(self, what: str, limit: float) -> None:
        """Keep what is wrong with an exact plan."""
        if self.plan.exact_elsewhere:
            self._found.append(f"{what} (limit {limit:g})")

    def cannot_run(self, label: str, inputs: str, error: Exception) -> ExactnessError:
        """The grown model raised an error on inputs that the original takes."""
        return self._error(f"the grown model cannot run in {label} mode on {inputs}: {first_line(error)}.")

    def judge(self, receipt: Receipt) -> None:
        """Compare what was measured with its limits.

        Raises:
            ExactnessError: the plan is exact, the measurement is not.
        """
        for what, value in (
            ("its eval outputs differ", receipt.error_float64),
            ("its train outputs differ", receipt.error_float64_train),
            ("what it writes into its buffers differs", receipt.error_state),
        ):
            if "train" in what and self.plan.eval_only:
                continue
            if value is not None and not value <= LIMIT:
                self.add(f"{what} by {value:.2e} in float64", LIMIT)
        if self._found:
            raise self._error(f"the growth was planned as exact but {'; '.join(self._found)}.")
        if receipt.gradient_error is not None and not receipt.gradient_error <= GRADIENT_LIMIT:
            raise self._error(
                f"the plan's map of gradients differs from the grown model's by {receipt.gradient_error:.2e} (limit "
                f"{GRADIENT_LIMIT:g}), so that optimizer state could not be carried exactly."
            )

    def _error(self, what: str) -> ExactnessError:
        return ExactnessError(f"{what} {_BUG} Steps: {[s.request for s in self.plan.steps]}")


def first_line(error: Exception) -> str:
    """What an error is, and the first line of what it says."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
