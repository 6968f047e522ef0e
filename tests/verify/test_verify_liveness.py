"""Whether new weights learn, measured."""

from __future__ import annotations

import torch
from torch import nn

import fxgrow
from fxgrow.growth import plan_growth
from fxgrow.spec import GrowthSpec
from fxgrow.verify.liveness import dead_parameters
from fxgrow.verify.side import Side
from fxgrow.verify.trials import Round, Trial

EXAMPLE = Trial((torch.randn(4, 2, generator=torch.Generator().manual_seed(0)),), {}, "example")


def measured(silent: tuple[str, ...], whole: bool = False) -> list[str]:
    """Of a grown model with two new units in its middle.

    Args:
        silent: tensors that hold zeros in the new units; ones elsewhere.
        whole: in all units.
    """
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))
    program = fxgrow.capture(model, EXAMPLE.args)
    spec = GrowthSpec.parse([{"op": "widen", "axis": "0.weight:0", "by": 2, "fill": "add"}])
    plan, grown = plan_growth(program, spec)

    def make(name: str) -> torch.Tensor:
        tensor = torch.ones(grown.tensors[name].shape)
        for i, dim in enumerate(plan.tensors[name].dims):
            if name in silent and dim is not None:
                tensor.index_fill_(i, torch.from_numpy((dim.index < 0).nonzero()[0]), 0.0)
        return torch.zeros_like(tensor) if whole and name in silent else tensor

    def examples(training: bool) -> Round:
        return {} if training else {0: EXAMPLE}

    return dead_parameters(Side(grown, make, keep=True), plan, examples)


INTO, OUT_OF = ("0.weight", "0.bias"), ("2.weight",)


def test_what_is_zero_on_one_side_learns_from_the_other() -> None:
    assert measured(()) == measured(INTO) == measured(OUT_OF) == []


def test_what_is_zero_on_both_sides_never_learns() -> None:
    assert measured(INTO + OUT_OF) == ["0.bias", "0.weight", "2.weight"]


def test_new_units_are_not_blamed_where_old_ones_get_no_gradient_either() -> None:
    assert measured(INTO + OUT_OF, whole=True) == []
