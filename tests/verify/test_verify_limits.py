"""What a comparison in the model's own dtype may measure."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxgrow
from fxgrow.verify.limits import LIMIT, native_tolerance


@pytest.mark.parametrize(
    ("dtype", "limit"),
    [(torch.float64, LIMIT), (torch.float32, 256 * torch.finfo(torch.float32).eps), (torch.bfloat16, 1 / 32)],
)
def test_the_coarsest_dtype_decides(dtype: torch.dtype, limit: float) -> None:
    program = fxgrow.capture(nn.Linear(3, 2).to(dtype), (torch.ones(4, 3, dtype=dtype),))
    assert native_tolerance(program).relative == limit


def test_a_cast_inside_is_seen() -> None:
    class Casts(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.half().float())

    assert native_tolerance(fxgrow.capture(Casts(3, 2), (torch.ones(4, 3),))).relative == 1 / 32
