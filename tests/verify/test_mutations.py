"""A planner that is wrong in one place: the receipt alone notices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxgrow
import fxgrow.growth
from fxgrow.plan import FILL_RANDOM, GrowthPlan, NoisePlan
from fxgrow.program import Program
from tests.models import trained

aten = torch.ops.aten


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.out = nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(F.gelu(self.norm(self.up(x))))


class Stream(nn.Module):
    """A residual stream with norms whose statistics padding changes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.weight, self.last = nn.Linear(5, 8), nn.Parameter(torch.ones(8)), nn.Parameter(torch.ones(8))
        self.up, self.down, self.head = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        x = x + self.down(F.gelu(self.up(F.rms_norm(x, (8,), self.weight, 0.1))))
        return self.head(F.rms_norm(x, (8,), self.last, 0.1))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(6, 24), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.reshape(x.shape[0], x.shape[1], 2, 4).transpose(1, 2) for t in self.qkv(x).split(8, -1))
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(x.shape[0], x.shape[1], 8))


class Total(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(5, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.up(x)).sum(-1)


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def widen(axis: str = "up.weight:0", **how: Any) -> dict[str, Any]:
    return {"op": "widen", "axis": axis, **(how or {"factor": 2})}


Mutation = Callable[[GrowthPlan, Program], None]


def a_dim(plan: GrowthPlan, name: str, i: int, **update: Any) -> None:
    """Change the map of one dim."""
    tensor = plan.tensors[name]
    before = tensor.dims[i]
    assert before is not None
    new = before.model_copy(update={k: f(getattr(before, k)) for k, f in update.items()})
    tensor.dims[i] = new
    for stage in tensor.stages:
        stage.dims = [new if d is before else d for d in stage.dims]


def factor_dropped(plan: GrowthPlan, grown: Program) -> None:
    a_dim(plan, "out.weight", 1, split=lambda s: None)


def share_misplaced(plan: GrowthPlan, grown: Program) -> None:
    a_dim(plan, "out.weight", 1, split=lambda s: np.roll(s, 1))


def wrong_count(plan: GrowthPlan, grown: Program) -> None:
    a_dim(plan, "out.weight", 1, split=lambda s: s * 2 / 3)


def wrong_index(plan: GrowthPlan, grown: Program) -> None:
    a_dim(plan, "out.weight", 1, index=lambda index: np.concatenate([index[1:], index[:1]]))


def writer_with_noise(plan: GrowthPlan, grown: Program) -> None:
    plan.tensors["up.weight"] = plan.tensors["up.weight"].model_copy(
        update={"noise": NoisePlan(kind="independent", scale=1e-3)}
    )


def random_instead_of_zero(plan: GrowthPlan, grown: Program) -> None:
    tensor = plan.tensors["out.weight"]
    tensor.paired = False
    tensor.random_std = 0.1
    a_dim(plan, "out.weight", 1, fill=lambda f: np.full(12, float(FILL_RANDOM)))
    for stage in tensor.stages:
        stage.paired, stage.random_std = False, 0.1


def gradient_factor(plan: GrowthPlan, grown: Program) -> None:
    a_dim(plan, "up.weight", 0, gradient=lambda g: np.ones(16) if g is None else g * 2)


def statistics_of_others(plan: GrowthPlan, grown: Program) -> None:
    a_dim(plan, "norm.running_var", 0, index=lambda index: np.roll(index, 1))


def buffer_not_grown(plan: GrowthPlan, grown: Program) -> None:
    tensor = plan.tensors["norm.running_mean"]
    tensor.dims, tensor.shape = [None], [8]


def eps_left_alone(plan: GrowthPlan, grown: Program) -> None:
    node = next(n for n in grown.graph.nodes if n.target == aten.rms_norm.default)
    node.args = (*node.args[:3], 0.1)


def norm_without_its_factor(plan: GrowthPlan, grown: Program) -> None:
    tensor = plan.tensors["weight"]
    assert tensor.scale != 1.0 or any(s.scale != 1.0 for s in tensor.stages)
    tensor.scale = 1.0
    for stage in tensor.stages:
        stage.scale = 1.0


def writer_not_zero(plan: GrowthPlan, grown: Program) -> None:
    """A stream's new entries hold something."""
    a_dim(plan, "down.weight", 0, fill=lambda f: np.full(12, float(FILL_RANDOM)))
    plan.tensors["down.weight"].random_std = 0.1


def scale_forgotten(plan: GrowthPlan, grown: Program) -> None:
    node = next(n for n in grown.graph.nodes if n.target == aten.scaled_dot_product_attention.default)
    node.kwargs = {k: v for k, v in node.kwargs.items() if k != "scale"}


def rescale_forgotten(plan: GrowthPlan, grown: Program) -> None:
    node = next(n for n in grown.graph.nodes if str(n.target).startswith("aten.mul"))
    node.replace_all_uses_with(node.args[0])
    grown.graph.erase_node(node)


def size_edit_missed(plan: GrowthPlan, grown: Program) -> None:
    node = next(n for n in grown.graph.nodes if n.target == aten.reshape.default)
    node.args = (node.args[0], [*node.args[1][:-1], 4])


def queries_for_keys(plan: GrowthPlan, grown: Program) -> None:
    """The thirds of a fused projection change places."""
    for name in ("qkv.weight", "qkv.bias"):
        a_dim(plan, name, 0, index=lambda index: np.roll(index, len(index) // 3))


def clone_not_zeroed(plan: GrowthPlan, grown: Program) -> None:
    for tensor in plan.tensors.values():
        tensor.zero = False
        tensor.init = "ones" if tensor.init == "zeros" else tensor.init


def clone_in_another_place(plan: GrowthPlan, grown: Program) -> None:
    """Two blocks read each other's weights."""
    one, other = plan.tensors["blocks.0.0.weight"], plan.tensors["blocks.2.0.weight"]
    one.source, other.source = other.source, one.source


def read_twice(plan: GrowthPlan, grown: Program) -> None:
    """A bias that every copy of a sum adds whole."""
    a_dim(plan, "up.bias", 0, index=lambda index: np.roll(index, 3))


def doubled_units(index: np.ndarray) -> np.ndarray:
    return np.repeat(index[: len(index) // 2], 2)


def interleaved_in_one_place(plan: GrowthPlan, grown: Program) -> None:
    """Copies lie side by side in the writer, end to end in the reader."""
    for name in ("up.weight", "up.bias"):
        a_dim(plan, name, 0, index=doubled_units)


HEADS = {"op": "widen", "axis": "./head_dim", "factor": 2}
CASES: list[tuple[Callable[[], nn.Module], Any, Mutation]] = [
    (Dense, widen(), factor_dropped),
    (Dense, widen(factor=1.5, split="uneven"), share_misplaced),
    (Dense, widen(), wrong_count),
    (Dense, widen(), wrong_index),
    (Dense, widen(), writer_with_noise),
    (Dense, widen(by=4, fill="add"), random_instead_of_zero),
    (Dense, widen(), gradient_factor),
    (Dense, widen(), statistics_of_others),
    (Dense, widen(), buffer_not_grown),
    (Dense, widen(), read_twice),
    (Dense, widen(), interleaved_in_one_place),
    (Stream, widen("embed.weight:0", to=12, constants="keep"), eps_left_alone),
    (Stream, widen("embed.weight:0", to=12), norm_without_its_factor),
    (Stream, widen("embed.weight:0", to=12), writer_not_zero),
    (Attention, {**HEADS, "constants": "keep"}, scale_forgotten),
    (Attention, HEADS, size_edit_missed),
    (Attention, HEADS, queries_for_keys),
    (Total, widen(), rescale_forgotten),
    (Tower, {"op": "deepen", "stack": "blocks", "by": 1}, clone_not_zeroed),
    (Tower, {"op": "deepen", "stack": "blocks", "by": 1}, clone_in_another_place),
]


def example(model: nn.Module) -> torch.Tensor:
    shape = {"Attention": (3, 5, 6), "Tower": (4, 4)}.get(type(model).__name__, (4, 5))
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


PROGRAMS: dict[Any, Program] = {}


@pytest.mark.parametrize(("kind", "spec", "mutation"), CASES, ids=[f.__name__ for *_, f in CASES])
def test_the_receipt_notices(
    kind: Callable[[], nn.Module], spec: Any, mutation: Mutation, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind not in PROGRAMS:
        torch.manual_seed(0)
        model = trained(kind()).double()
        PROGRAMS[kind] = fxgrow.capture(model, (example(model),))
    program = PROGRAMS[kind]
    found = fxgrow.grow(program, spec).receipt
    assert found.error_float64 is not None and found.error_float64 <= 1e-12, "without the mutation it is exact"
    plan_growth = fxgrow.growth.plan_growth

    def wrong(*args: Any) -> tuple[GrowthPlan, Program]:
        plan, grown = plan_growth(*args)
        plan = plan.model_copy(deep=True)
        mutation(plan, grown)
        return plan, grown

    monkeypatch.setattr(fxgrow.growth, "plan_growth", wrong)
    with pytest.raises(fxgrow.ExactnessError, match="bug in fxgrow"):
        fxgrow.grow(program, spec)
