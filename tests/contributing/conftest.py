"""What a test registers is gone after it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import fxgrow
from fxgrow import passes, plugins, spec
from fxgrow.rules import RULES
from fxgrow.weights import moments


@pytest.fixture(autouse=True)
def registered_for_one_test(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    tables = (RULES, passes.PASSES, spec._OPERATIONS, moments.MOMENTS)
    before = [dict(table) for table in tables]
    monkeypatch.setattr(moments, "ELEMENTWISE", moments.ELEMENTWISE)
    elementwise = set(moments.ELEMENTWISE)
    monkeypatch.setattr(plugins, "_loaded", set())
    fxgrow.GrowthSpec._adapter = None
    yield
    for table, entries in zip(tables, before, strict=True):
        table.clear()  # type: ignore[attr-defined]
        table.update(entries)  # type: ignore[attr-defined]
    moments.ELEMENTWISE.intersection_update(elementwise)
    fxgrow.GrowthSpec._adapter = None
