"""Every column of a row of a tensor made of numbers, with something wrong in it, is found."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from samples import SAMPLES
from torch import Tensor

from fxgrow.rules import RULES
from fxgrow.rules.forms import Made
from fxgrow.testing.judge import Report, Sample, check


def r(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The judge's report of an op, or of a function that it is part of, when its row has other columns."""

    def judge(op: str, function: Callable[..., Tensor] | None = None, **columns: Any) -> Report:
        row = RULES[op]
        assert isinstance(row, Made)
        monkeypatch.setitem(RULES, op, dataclasses.replace(row, **columns))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return check(function or op, [Sample(r(3, 4))] if function is not None else SAMPLES[op])

    return judge


def with_zeros(x: Tensor) -> Tensor:
    return x + torch.zeros(3, 4, dtype=torch.float64)


def with_new_zeros(x: Tensor) -> Tensor:
    return x + x.new_zeros([3, 4])


def with_noise(x: Tensor) -> Tensor:
    return x * torch.randn(3, 4, dtype=torch.float64)


@pytest.mark.parametrize(
    ("op", "function", "columns", "complaint"),
    [
        ("aten.new_zeros.default", with_new_zeros, {"sizes": "dtype"}, "literals fails"),
        ("aten.randn.default", with_noise, {"sizes": "size", "why": ""}, "copies do not hold"),
        ("aten.zeros.default", None, {"value": 1}, "said to be from 1.0 to 1.0"),
        ("aten.full.default", None, {"value": 0}, "said to be from 0.0 to 0.0"),
    ],
)
def test_a_wrong_column_is_found(
    op: str, function: Callable[..., Tensor] | None, columns: dict[str, Any], complaint: str, judged: Any
) -> None:
    report = judged(op, function, **columns)
    assert any(complaint in finding.detail for finding in report.wrong), report


def test_sizes_that_are_said_not_to_follow_are_stricter(judged: Any) -> None:
    assert check(with_zeros, [Sample(r(3, 4))]).accepted
    assert not judged("aten.zeros.default", with_zeros, sizes="", why="nobody looked").accepted


def test_a_tensor_that_is_not_ignored_freezes(judged: Any) -> None:
    report = judged("aten.new_zeros.default", ignored=())
    assert any("does not follow its operand self" in finding.detail for finding in report.strict), report


def test_a_row_has_sizes_or_a_reason() -> None:
    for columns in ({}, {"sizes": "size", "why": "counted"}):
        with pytest.raises(ValueError, match="either sizes"):
            Made(**columns)  # type: ignore[arg-type]
