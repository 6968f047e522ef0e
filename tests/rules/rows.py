"""Rows that say something else than the table does."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import pytest
from samples import SAMPLES

from fxgrow.rules import RULES
from fxgrow.rules.base import Row
from fxgrow.testing.judge import Report, Sample, check


def saying(op: str, **columns: Any) -> Row:
    """An op's row with other columns."""
    row = RULES[op]
    assert isinstance(row, Row)
    return dataclasses.replace(row, **columns)


def judging(form: type[Row]) -> Callable[..., Any]:
    """A fixture: the judge's report of an op of that form whose row has other columns."""

    @pytest.fixture
    def judged(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Report]:
        def judge(op: str, *samples: Sample, **columns: Any) -> Report:
            assert isinstance(RULES[op], form)
            monkeypatch.setitem(RULES, op, saying(op, **columns))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return check(op, samples or SAMPLES[op])

        return judge

    return judged
