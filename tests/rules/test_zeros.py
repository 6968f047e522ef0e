"""What adds nothing keeps what is known of new entries: ``sum([...])`` begins with ``0 + x``."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxgrow
from fxgrow.errors import GrowthRefused
from fxgrow.testing.judge import Sample, check
from tests.models import trained


def r(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


Branches = Callable[[list[Tensor]], Tensor]


class Stream(nn.Module):
    """Three branches added up in some way, and a norm over the sum, which needs zeros in padded units."""

    def __init__(self, add_up: Branches) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.branches = nn.ModuleList(nn.Linear(5, 16) for _ in range(3))
        self.norm, self.out = nn.RMSNorm(16, eps=1e-6), nn.Linear(16, 3)
        self.add_up = add_up

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.add_up([f(x) for f in self.branches])))


def in_place(terms: list[Tensor]) -> Tensor:
    total = torch.zeros_like(terms[0])
    for term in terms:
        total += term
    return total


def row_by_row(terms: list[Tensor]) -> Tensor:
    rows = terms[0].new_zeros(len(terms), *terms[0].shape)
    for i, term in enumerate(terms):
        rows[i] = term
    return rows.sum(0)


SUMS: dict[str, Branches] = {
    "sum": lambda t: sum(t),  # type: ignore[dict-item, return-value]
    "0.0 + x - 0": lambda t: 0.0 + t[0] - 0 + t[1] + t[2],
    "0 - x": lambda t: (0 - t[0]) - t[1] + t[2],
    "x * 1 / 1": lambda t: t[0] * 1 / 1 + t[1] + t[2],
    "alpha": lambda t: torch.add(t[0], t[1], alpha=2) + torch.add(t[2], 7, alpha=0),
    "zeros": lambda t: torch.zeros((), dtype=torch.float64) + t[0] + t[1] + t[2],
    "zeros_like": lambda t: torch.zeros_like(t[0]) + t[0] + t[1] + t[2],
    "a constant of zeros": lambda t: torch.tensor([0.0], dtype=torch.float64) + t[0] + t[1] - t[2],
    "in place": in_place,
    "row by row": row_by_row,
    "masked": lambda t: sum(t).masked_fill(t[0] > 0, 0.0),  # type: ignore[union-attr]
    "chosen": lambda t: torch.where(t[0] > 0, t[1], 0.0) + torch.where(t[1] > 0, t[0], torch.zeros_like(t[2])),
}


def grow(model: nn.Module, **how: object) -> fxgrow.Growth:
    spec = [{"op": "widen", "axis": "norm.weight:0", **how}]
    return fxgrow.grow(model, spec, (r(4, 5),), verify=False)


@pytest.mark.parametrize("how", [{"to": 20}, {"by": 4, "fill": "add"}], ids=str)
@pytest.mark.parametrize("name", list(SUMS))
def test_a_stream_summed_from_zero_takes_padded_units(name: str, how: dict[str, object]) -> None:
    model = trained(Stream(SUMS[name]).double()).eval()
    module = grow(model, **how).module
    for batch in (4, 7):
        x = r(batch, 5, seed=batch)
        assert float((model(x) - module(x)).detach().abs().max()) < 1e-12


@pytest.mark.parametrize(
    "add_up",
    [
        lambda t: 1 + sum(t),
        lambda t: torch.ones_like(t[0]) + sum(t),
        lambda t: torch.where(t[0] > 0, sum(t), 1.0),
        lambda t: in_place([t[0], torch.ones_like(t[0]), t[1]]),
    ],
)
def test_what_does_add_something_is_refused(add_up: Branches) -> None:
    with pytest.raises(GrowthRefused, match="zero"):
        grow(trained(Stream(add_up).double()).eval(), to=20)


@pytest.mark.parametrize("literal", [0, 0.0, 2.5])
@pytest.mark.parametrize("op", ["add.Tensor", "sub.Tensor", "add.Scalar", "sub.Scalar", "rsub.Scalar"])
def test_literals_by_brute_force(op: str, literal: float) -> None:
    report = check(f"aten.{op}", [Sample(r(3, 4), literal)])
    assert not report.wrong
    assert report.accepted
