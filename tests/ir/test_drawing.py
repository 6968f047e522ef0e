"""What stands for chance while a graph runs."""

from __future__ import annotations

import torch

from fxgrow.ir.draws import same_draws


def test_draws_are_the_same_and_leave_no_trace() -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    draws = []
    for _ in range(2):
        with same_draws():
            draws.append(torch.rand(3))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(0)
    assert torch.equal(draws[0], draws[1]) and torch.equal(draws[0], torch.rand(3))
