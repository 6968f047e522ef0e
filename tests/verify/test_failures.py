"""The words of a failure, and when there is one."""

from __future__ import annotations

from typing import Any

import pytest

from fxgrow.errors import ExactnessError
from fxgrow.plan import GrowthPlan, Step
from fxgrow.verify.failures import Failures, first_line
from fxgrow.verify.receipt import Receipt

WORDS = r"This is a bug in fxgrow: the original model is untouched; .* Steps: \[\{'op': 'widen'\}\]"


def failures(**step: Any) -> Failures:
    return Failures(GrowthPlan(model="M", steps=[Step(op="widen", request={"op": "widen"}, **step)]))


def receipt(**measured: float) -> Receipt:
    return Receipt(exactness="exact", **measured)  # type: ignore[arg-type]


def test_all_that_is_wrong_is_said_at_once() -> None:
    found = failures()
    found.add("its eval outputs differ by 2.00e+00 in its own dtype", 1e-5)
    with pytest.raises(ExactnessError) as error:
        found.judge(receipt(error_float64=0.5, error_float64_train=1e-11, error_state=float("inf")))
    assert str(error.value).startswith(
        "the growth was planned as exact but its eval outputs differ by 2.00e+00 in its own dtype (limit 1e-05); "
        "its eval outputs differ by 5.00e-01 in float64 (limit 1e-10); "
        "what it writes into its buffers differs by inf in float64 (limit 1e-10). This is a bug"
    )


def test_what_is_within_its_limits_or_was_not_measured_passes() -> None:
    failures().judge(receipt())
    failures().judge(receipt(error_float64=1e-10, error_float64_train=0.0, error_state=1e-16, gradient_error=1e-7))


def test_a_number_that_is_none_is_no_success() -> None:
    with pytest.raises(ExactnessError, match="its eval outputs differ by nan"):
        failures().judge(receipt(error_float64=float("nan")))


def test_nothing_is_held_against_a_plan_that_is_not_exact() -> None:
    failures(exactness="approximate").judge(receipt(error_float64=1.0))
    with pytest.raises(ExactnessError, match="its eval outputs differ"):
        failures(exactness="approximate", changed_outputs=[1]).judge(receipt(error_float64=1.0))


def test_train_mode_counts_where_the_plan_promises_it() -> None:
    with pytest.raises(ExactnessError, match="its train outputs differ"):
        failures().judge(receipt(error_float64_train=1.0))
    failures(eval_only=True).judge(receipt(error_float64_train=1.0))


def test_gradients_have_a_limit_and_words_of_their_own() -> None:
    with pytest.raises(ExactnessError, match=r"map of gradients differs .* by 1.00e-01 \(limit 1e-07\).*" + WORDS):
        failures().judge(receipt(gradient_error=0.1))


def test_an_error_of_the_grown_model_is_named_by_its_first_line() -> None:
    error = failures().cannot_run("eval", "what the original takes (example)", ValueError("shapes\ndo not fit"))
    assert str(error).startswith(
        "the grown model cannot run in eval mode on what the original takes (example): ValueError: shapes. This is"
    )
    assert first_line(KeyError()) == "KeyError: "
