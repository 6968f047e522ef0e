"""How far results may differ by rounding: slice by slice, and what the model amplifies."""

from __future__ import annotations

import pytest
import torch

from fxgrow.verify.rounding import RUNS, Moved, Rerun, Tolerance, slice_error


def test_slices() -> None:
    """Errors are relative to each row and column, in every dim."""
    old = torch.ones(3, 4, dtype=torch.float64) * torch.tensor([1, 1e3, 1e-6, 1e-12], dtype=torch.float64)
    new = old.clone()
    assert slice_error(old, new, Tolerance(1e-10)) == 0.0
    new[1, 3] *= 1.25
    assert slice_error(old, new, Tolerance(1e-10)) == pytest.approx(0.25)
    moved = old.clone()
    moved[:, 3] += 1e-12
    assert slice_error(old, new, Tolerance(1e-10), [moved]) <= 1e-11
    new[0, 0] = float("nan")
    assert slice_error(old, new, Tolerance(1e-10), [moved]) == float("inf")
    assert slice_error(torch.tensor([1, 2]), torch.tensor([1, 3]), Tolerance(1e-10)) == 1.0


def test_a_model_runs_again_once_for_all_its_errors() -> None:
    """The difference of two large numbers is mostly rounding: what moving them does to it as well is no error."""
    large = torch.full((3,), 1e12, dtype=torch.float64)
    seen: list[Moved] = []

    def again(moved: Moved) -> torch.Tensor:
        seen.append(moved)
        return moved.tensor(large) - (large - 1)

    rerun, limit, old = Rerun(again, steps=4), Tolerance(1e-10), torch.ones(3, dtype=torch.float64)
    assert rerun.amplification is None and not seen
    assert rerun.explain(1e-3, old, old + 1e-3, limit, lambda found: found) == 0.0
    assert rerun.explain(0.5, old, old + 0.5, limit, lambda found: found) == 0.5
    assert len(seen) == 1 + RUNS and rerun.amplification == pytest.approx(1e12, rel=0.1)
    assert rerun.explain(0.5, old, old, limit, lambda found: None) == 0.5, "nothing to explain it with"
