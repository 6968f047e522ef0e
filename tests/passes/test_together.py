"""Operations combined in one spec: every ordered pair on three models, and what a plan keeps of each of them."""

from __future__ import annotations

import functools
import itertools
import json
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxgrow
from fxgrow.errors import FxgrowError, SpecError
from fxgrow.growth import plan_growth
from fxgrow.plan import AxisMap, DimPlan, GrowthPlan, NoisePlan, TensorPlan
from fxgrow.weights.materialise import materialise_all, materialise_tensor
from tests.models import trained


def r(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tokens(batch: int, length: int) -> Tensor:
    return torch.randint(11, (batch, length), generator=torch.Generator().manual_seed(batch))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(11, 8), nn.Embedding(6, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 11, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.wte(x) + self.wpe(torch.arange(x.shape[1]))
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))


def layers() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 12), nn.RMSNorm(12), nn.Linear(12, 3))


def images() -> nn.Module:
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        nn.Sequential(nn.Conv2d(8, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()),
        nn.Linear(24, 4),
    )


NOISE = {"scale": 0.1}


def widen(axis: str, **how: Any) -> dict[str, Any]:
    return {"op": "widen", "axis": axis, **how}


def insert(layer: str, after: str) -> dict[str, Any]:
    return {"op": "insert", "layer": layer, "after": after}


OPERATIONS: dict[str, list[dict[str, Any]]] = {
    "tokens": [
        widen("*/residual", by=4),
        widen("*/residual", factor=2, noise=NOISE, split="uneven"),
        widen("blocks.*/hidden", by=4, fill="add"),
        {"op": "deepen", "stack": "blocks", "by": 1},
        {"op": "deepen", "stack": "blocks", "by": 1, "init": "gate"},
        insert("linear", "blocks.0.up"),
        insert("linear", "blocks.1"),
        {"op": "extend", "axis": "*/vocab", "by": 3},
        {"op": "extend", "axis": "*/positions", "by": 3},
    ],
    "layers": [
        widen("0.weight:0", factor=2, noise=NOISE),
        widen("0.weight:0", by=5),
        widen("0.weight:0", by=3, fill="add"),
        widen("*/hidden*", by=6, fill="add", seed=3),
        insert("linear", "0"),
        insert("linear", "1"),
    ],
    "images": [
        widen("0.0.weight:0", factor=2, noise=NOISE),
        widen("0.0.weight:0", by=4, fill="add"),
        widen("1.0.weight:0", factor=2, noise=NOISE),
        insert("conv", "0.0"),
        insert("conv", "0.2"),
        insert("conv", "0"),
    ],
}
INPUTS: dict[str, list[Tensor]] = {
    "tokens": [tokens(3, 4), tokens(2, 6)],
    "layers": [r(4, 5), r(7, 5)],
    "images": [r(2, 3, 6, 6), r(5, 3, 8, 7)],
}


@functools.cache
def captured(name: str) -> tuple[nn.Module, fxgrow.Program]:
    torch.manual_seed(0)
    model = trained({"tokens": Tokens, "layers": layers, "images": images}[name]().double())
    return model.eval(), fxgrow.capture(model, (INPUTS[name][0],))


def error(old: nn.Module, new: nn.Module, inputs: list[Tensor]) -> float:
    worst = 0.0
    with torch.no_grad():
        for x in inputs:
            a, b = old(x), new(x)
            b = b[tuple(slice(0, n) for n in a.shape)]  # an extended vocabulary adds logits
            worst = max(worst, float((a - b).abs().max()))
    return worst


def grown(program: fxgrow.Program, spec: list[dict[str, Any]]) -> nn.Module | None:
    """The grown module; None where the first step renumbered what the second one names."""
    try:
        return fxgrow.grow(program, spec, verify=False).module.eval()
    except SpecError as error:
        if "no parameter matches" in str(error):
            return None
        raise


@pytest.mark.parametrize("name", list(OPERATIONS))
def test_every_ordered_pair_is_exact(name: str) -> None:
    model, program = captured(name)
    tried = 0
    for first, second in itertools.product(OPERATIONS[name], repeat=2):
        spec = [first, second]
        module = grown(program, spec)
        if module is not None:
            tried += 1
            assert error(model, module, INPUTS[name]) < 1e-12, spec
    assert tried >= 0.9 * len(OPERATIONS[name]) ** 2


@pytest.mark.parametrize(
    ("name", "which"), [("tokens", [5, 0, 3, 1, 7]), ("layers", [0, 2, 4, 0, 1]), ("images", [1, 3, 0, 1, 0])]
)
def test_five_in_a_row_are_exact_and_the_plan_round_trips(name: str, which: list[int]) -> None:
    model, program = captured(name)
    spec = fxgrow.GrowthSpec.parse([OPERATIONS[name][i] for i in which])
    growth = fxgrow.grow(program, spec)  # measured, gradients too
    assert error(model, growth.module.eval(), INPUTS[name]) < 1e-12
    plan, _ = plan_growth(program, spec)
    again = GrowthPlan.from_json(plan.to_json())
    own = dict(materialise_all(plan, program.tensor))
    for key, tensor in materialise_all(again, program.tensor):
        assert torch.equal(tensor, own[key]), key


def test_planning_leaves_the_program_as_it_was() -> None:
    _, program = captured("tokens")
    before = {n: t.shape for n, t in program.tensors.items()}
    for i in (3, 4, 5):
        plan_growth(program, fxgrow.GrowthSpec.parse([OPERATIONS["tokens"][i]]))
    assert {n: t.shape for n, t in program.tensors.items()} == before
    assert set(program.requires_grad) <= {*before, *program.aliases}


def test_the_noise_of_both_steps_is_there() -> None:
    _, program = captured("layers")
    quiet, loud = {"scale": 1e-9}, {"scale": 0.1}

    def weight(first: Any, second: Any) -> Tensor:
        spec = [widen("0.weight:0", factor=2, noise=first), widen("0.weight:0", factor=2, noise=second)]
        plan, _ = plan_growth(program, fxgrow.GrowthSpec.parse(spec))
        return dict(materialise_all(plan, program.tensor))["2.weight"]

    plain = weight(quiet, quiet)
    first, second = weight(loud, quiet) - plain, weight(quiet, loud) - plain
    # copies 0 and 2 of a unit were one after the first step: its noise is the same in both
    assert float((first[:, :8] - first[:, 16:24]).abs().max()) < 1e-7
    assert float(first.std()) > 0.01
    assert float((second[:, :8] - second[:, 16:24]).abs().max()) > 0.01
    both = weight(loud, loud) - plain
    assert float((both - first).std()) > 0.01
    assert float((both - second).std()) > 0.01


def test_stages_close_exactly_in_half_precision() -> None:
    plan = TensorPlan(source="w", shape=[3, 4], dims=[None, None])
    for seed in range(2):
        growth = AxisMap.copy(plan.shape[1], 2 * plan.shape[1], "even")
        plan.begin([1], draws=True)
        plan.grow(1, DimPlan(index=growth.index, split=growth.share), 1 << 40)
        plan.last.noise = NoisePlan(kind="antisymmetric", scale=0.3, seed=seed)
    assert len(plan.stages) == 2
    source = r(3, 4).to(torch.bfloat16)
    made = materialise_tensor(plan, source)
    pairs = made[:, :8].double() + made[:, 8:].double()
    assert torch.equal(pairs[:, :4] + pairs[:, 4:], source.double())
    assert not torch.equal(made[:, :4], made[:, 4:8])


def test_optimizer_state_follows_a_layer_that_was_inserted_and_widened() -> None:
    torch.manual_seed(0)
    model = trained(layers().double())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(r(4, 5)).sum().backward()
    optimizer.step()
    growth = fxgrow.grow(
        model, [insert("linear", "0"), widen("0.weight:0", factor=2), widen("0.weight:0", by=3)], (r(4, 5),)
    )
    carried = growth.carry(optimizer)
    growth.module(r(4, 5)).sum().backward()
    carried.step()
    assert all(bool(p.isfinite().all()) for p in growth.module.parameters())
    assert dict(growth.module.named_parameters())["1.weight"].shape == (8, 19)


def test_a_plan_of_one_noise_as_it_was_written_before_is_read() -> None:
    _, program = captured("layers")
    plan, _ = plan_growth(program, fxgrow.GrowthSpec.parse([widen("0.weight:0", factor=2, noise=NOISE)]))
    data = json.loads(plan.to_json())
    for tensor in data["tensors"].values():
        assert tensor.pop("stages") == []
        tensor.pop("initial", None)
    assert data["tensors"]["2.weight"]["noise"]["scale"] == 0.1
    old = GrowthPlan.from_json(json.dumps(data))
    a, b = (dict(materialise_all(p, program.tensor)) for p in (plan, old))
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_an_inserted_layer_of_a_plan_as_it_was_written_before_is_read() -> None:
    old = TensorPlan.model_validate({"shape": [4, 4], "init": "identity", "dtype": "float64"})
    assert torch.equal(materialise_tensor(old, None, dtype=torch.float64), torch.eye(4, dtype=torch.float64))
    scaled = TensorPlan.model_validate({"shape": [4], "init": "ones", "scale": 1.5})
    assert np.allclose(materialise_tensor(scaled, None).numpy(), 1.5)


def test_stages_that_do_not_fit_are_no_plan() -> None:
    _, program = captured("layers")
    spec = [widen("0.weight:0", factor=2, noise=NOISE), widen("0.weight:0", factor=2, noise=NOISE)]
    data = json.loads(plan_growth(program, fxgrow.GrowthSpec.parse(spec))[0].to_json())
    stages = data["tensors"]["2.weight"]["stages"]
    assert len(stages) == 2
    for dims, words in (([None], "1 dims"), ([None, {"index": [[0, 3]]}], "3 entries for the size 32")):
        stages[1]["dims"] = dims
        with pytest.raises(FxgrowError, match=words):
            GrowthPlan.from_json(json.dumps(data))
