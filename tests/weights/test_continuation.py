"""Patterns of buffers: recognised where they are there, and only there."""

from __future__ import annotations

import math

import pytest
import torch

from fxgrow.kernels import continue_band, continue_line, continue_waves
from fxgrow.weights.continuation import recognise

N = 9
FOUND = {
    "numbers": (torch.arange(N), [0], "line"),
    "numbers from seven by threes": (torch.arange(N)[None] * 3 + 7, [1], "line"),
    "slopes by distance": (torch.tensor([0.5, 0.25])[:, None] * -torch.arange(N), [1], "line"),
    "a constant": (torch.full((2, N), 0.3), [1], "line"),
    "flags all alike": (torch.ones(N, dtype=torch.bool), [0], "line"),
    "a triangle": (torch.ones(1, 1, N, N).tril(), [2, 3], "band"),
    "a window, of minus infinity": (torch.full((N, N), -math.inf).triu(2), [0, 1], "band"),
    "rows of a triangle": (torch.ones(N, N).triu(), [0], "band"),
    "one matrix per head": (torch.stack([torch.ones(N, N).tril(-k) for k in range(3)]), [1, 2], "band"),
}
NOT = {
    "squares": (torch.arange(N) ** 2, [0]),
    "numbers with one changed": (torch.arange(N).index_fill(0, torch.tensor([5]), 0), [0]),
    "two numbers": (torch.arange(2), [0]),
    "a triangle of two": (torch.ones(2, 2).tril(), [0, 1]),
    "a triangle with one changed": (
        torch.ones(N, N).tril().index_put((torch.tensor(7), torch.tensor(1)), torch.zeros(())),
        [0, 1],
    ),
    "distances": ((torch.arange(N)[:, None] - torch.arange(N)).float(), [0, 1]),
    "every second diagonal": (((torch.arange(N)[:, None] - torch.arange(N)) % 2).float(), [0, 1]),
    "noise": (torch.rand(N, 6, generator=torch.Generator().manual_seed(0)), [0]),
    "complex": (torch.polar(torch.ones(N, 2), torch.rand(N, 2)), [0]),
    "not a number": (torch.full((N,), math.nan), [0]),
    "cosines with a scaled frequency": ((torch.arange(N)[:, None] * torch.tensor([0.7, 0.003])).cos(), [0]),
}


@pytest.mark.parametrize("name", FOUND)
def test_found(name: str) -> None:
    values, dims, kind = FOUND[name]
    found = recognise(values, dims)
    assert found is not None and found.kind == kind and found.dims == dims


@pytest.mark.parametrize("name", NOT)
def test_not_found(name: str) -> None:
    assert recognise(*NOT[name]) is None


def test_lines_and_bands_go_on() -> None:
    assert torch.equal(continue_line(torch.arange(4) * 2 + 1, {0: 7}), torch.arange(7) * 2 + 1)
    for mask in (lambda n, m: torch.ones(n, m).tril(1).triu(-2), lambda n, m: torch.full((n, m), -math.inf).triu(1)):
        made = continue_band(mask(5, 6)[None], {1: 9, 2: 8}, 1, 2)
        assert torch.equal(made[0], mask(9, 8))
    assert torch.equal(continue_band(torch.ones(4, 4).tril(), {0: 6}, 0, 1), torch.ones(6, 4).tril())


def test_old_entries_stay_to_the_bit() -> None:
    """Another library's cosines differ in the last place; the old ones are the model's."""
    table = torch.outer(torch.arange(6.0), torch.tensor([1.0, 0.01])).cos()
    odd = torch.nextafter(table, torch.tensor(2.0))
    made = continue_waves(odd, {0: 10}, 1, [1.0, 0.01], [False, False])
    assert torch.equal(made[:6], odd)
    assert torch.allclose(made[6:], torch.outer(torch.arange(6.0, 10), torch.tensor([1.0, 0.01])).cos(), atol=1e-6)


@pytest.mark.parametrize("layout", ["halves", "interleaved", "single"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base", [10000.0, 1000000.0])
def test_rotary_layouts(layout: str, dtype: torch.dtype, base: float) -> None:
    def table(length: int) -> torch.Tensor:
        angles = torch.outer(torch.arange(length).float(), base ** -(torch.arange(0, 16, 2).float() / 16))
        if layout == "halves":
            angles = torch.cat([angles, angles], -1)
        elif layout == "interleaved":
            angles = angles.repeat_interleave(2, -1)
        return angles.cos()

    found = recognise(table(64).to(dtype), [0])
    if found is None:  # in half precision a base may be out of reach; a wrong one is what must not come out
        assert dtype is torch.bfloat16
        return
    assert found.kind == "waves" and found.columns == 1
    made = continue_waves(table(64).to(dtype), {0: 128}, 1, found.frequencies or [], found.sines or [])
    assert float((made.float() - table(128)).abs().max()) <= 4 * torch.finfo(dtype).eps + 1e-5
