"""From plan to tensors: tables are shared, and memory pages do not show in the values."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fxgrow.kernels import native
from fxgrow.plan import DimPlan, TensorPlan
from fxgrow.weights import jobs
from fxgrow.weights.jobs import _map
from fxgrow.weights.materialise import materialise_moment, materialise_tensor


def _twice(n: int, split: float | None = None) -> DimPlan:
    share = None if split is None else np.concatenate([np.full(n, split), np.full(n, 1 - split)])
    return DimPlan(index=np.arange(2 * n) % n, split=share)


def test_dims_that_grow_alike_share_their_tables() -> None:
    def of(dim: DimPlan) -> jobs._Map:
        return _map(dim.index, dim.split, dim.fill)

    assert of(_twice(6, 0.5)) is of(_twice(6, 0.5))
    assert of(_twice(6, 0.5)) is not of(_twice(6, 0.25))
    assert of(_twice(6, 0.5)) is not of(_twice(6))
    assert of(_twice(6, 0.5)).closes and not of(_twice(6)).closes


def test_moments_share_the_tables_of_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = TensorPlan(source="w", shape=[12], dims=[_twice(6)])
    materialise_tensor(plan, torch.ones(6))
    monkeypatch.setattr(jobs, "_Map", None)  # nothing is made anew
    grown = materialise_moment(plan, torch.arange(6.0), "gradient", scale_gradients=True)
    assert torch.equal(grown, torch.arange(6.0).repeat(2))


@pytest.mark.skipif(native.available() is not None, reason="no C++ compiler")
def test_huge_and_small_pages_give_the_same_values(monkeypatch: pytest.MonkeyPatch) -> None:
    source = torch.randn(700, 1000, generator=torch.Generator().manual_seed(0))
    plan = TensorPlan(source="w", shape=[1400, 2000], dims=[_twice(700), _twice(1000, 0.5)])
    expected = torch.cat([torch.cat([source, source], 1) * 0.5] * 2)
    assert expected.numel() * 4 > native.HUGE
    for dear in ((0.0, 1e9), (0.0, 0.0), (1e9, 0.0)):  # small after two huge pages, huge after all, huge
        monkeypatch.setattr(native, "DEAR", dear)
        monkeypatch.setattr(native, "huge_pages", native.HugePages())
        assert torch.equal(materialise_tensor(plan, source), expected)
