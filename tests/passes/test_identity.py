"""Copies of blocks that are the identity without a parameter that the user's class does not have."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxgrow
from fxgrow.errors import GrowthRefused
from tests.models import trained


def r(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Convolutions(nn.Module):
    """A residual block with a batch norm at the branch's end and an activation after the sum."""

    def __init__(self, activation: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.c1, self.b1 = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.c2, self.b2 = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.f = activation()

    def forward(self, x: Tensor) -> Tensor:
        out = self.b2(self.c2(self.f(self.b1(self.c1(x)))))
        out += x
        return self.f(out)


class Images(nn.Module):
    def __init__(self, blocks: int, activation: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 1)
        self.layer = nn.Sequential(*(Convolutions(activation) for _ in range(blocks)))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.stem(x)).mean((2, 3)))


class OnePlus(nn.Module):
    """An RMSNorm whose weight is used as ``1 + w``."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.double()
        out = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return (out * (1.0 + self.weight.double())).type_as(x)


class Tower(nn.Module):
    """Blocks of one function ``f(block, x)`` over ``a``, ``b``, ``norm``, ``w`` and a buffer ``m``."""

    def __init__(self, blocks: int, f: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.inputs, self.outputs = nn.Linear(5, 8), nn.Linear(8, 3)
        self.blocks = nn.ModuleList(Block(f) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inputs(x)
        for block in self.blocks:
            x = block(x)
        return self.outputs(x)


class Block(nn.Module):
    def __init__(self, f: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), OnePlus()
        self.w = nn.Parameter(torch.ones(8))
        self.register_buffer("m", torch.ones(8))
        self.drop = nn.AlphaDropout(0.5)
        self.f = f

    def forward(self, x: Tensor) -> Tensor:
        return self.f(self, x)


def deepened(model: nn.Module, stack: str, x: Tensor, **how: Any) -> fxgrow.Growth:
    return fxgrow.grow(model, [{"op": "deepen", "stack": stack, **how}], (x,), verify=False)


def kinds(growth: fxgrow.Growth) -> set[str]:
    return {c.init for s in growth.plan.steps for c in s.changes if c.kind == "clone"}


def same(old: nn.Module, new: nn.Module, inputs: list[Tensor], modes: tuple[bool, ...] = (True, False)) -> None:
    for training in modes:
        old.train(training)
        new.train(training)
        for x in inputs:
            assert float((old(x.clone()) - new(x.clone())).detach().abs().max()) < 1e-12


@pytest.mark.parametrize(
    ("activation", "how"),
    [
        (nn.ReLU, {"by": 1}),
        (lambda: nn.ReLU(inplace=True), {"factor": 2}),
        (nn.ReLU6, {"after": [0]}),
        (lambda: nn.Hardtanh(-1, 2), {"by": 1}),
    ],
    ids=["relu", "relu in place", "relu6", "hardtanh"],
)
def test_an_activation_after_the_sum_leaves_its_own_results(
    activation: Callable[[], nn.Module], how: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    model = trained(Images(2, activation).double())
    images = [r(3, 3, 6, 6), r(2, 3, 5, 7)]
    growth = deepened(model, "layer", images[0], **how)
    assert kinds(growth) == {"zero"}
    deeper = Images(len(growth.module.layer), activation).double()
    deeper.load_state_dict(growth.module.state_dict(), strict=True)
    for module in (growth.module, deeper):
        same(copy.deepcopy(model), module, images)


def test_a_gelu_after_the_sum_gets_a_gate() -> None:
    model = trained(Images(2, nn.GELU).double())
    growth = deepened(model, "layer", r(3, 3, 6, 6), by=1)
    assert kinds(growth) == {"gate"}
    same(model, growth.module, [r(3, 3, 6, 6)], (False,))


FOUND: dict[str, tuple[Callable[[Any, Tensor], Tensor], dict[str, float]]] = {
    "a norm that multiplies by 1 + w": (lambda s, x: x + s.norm(torch.sigmoid(s.a(x))), {"norm.weight": -1.0}),
    "w - 2": (lambda s, x: x + torch.sigmoid(s.a(x)) * (s.w - 2), {"w": 2.0}),
    "a layer scale": (lambda s, x: x + s.w * torch.sigmoid(s.a(x)), {"w": 0.0}),
    "a tanh gate": (lambda s, x: x + torch.tanh(s.w) * torch.sigmoid(s.a(x)), {"w": 0.0}),
    "parallel branches": (
        lambda s, x: x + (s.a(x) + torch.tanh(s.b(x))),
        {"a.weight": 0.0, "a.bias": 0.0, "b.weight": 0.0, "b.bias": 0.0},
    ),
    "an einsum with a weight": (
        lambda s, x: x + torch.einsum("bi,ji->bj", torch.sigmoid(s.a(x)), s.b.weight),
        {"b.weight": 0.0},
    ),
    "two sums with a ReLU each": (
        lambda s, x: F.relu(F.relu(x + s.a(x)) + s.b(x)),
        {"a.weight": 0.0, "a.bias": 0.0, "b.weight": 0.0, "b.bias": 0.0},
    ),
    "bounds": (lambda s, x: (x + s.a(x)).clamp(-1, 2), {"a.weight": 0.0, "a.bias": 0.0}),
}


@pytest.mark.parametrize("name", list(FOUND))
def test_the_last_parameters_that_multiply_a_branch_are_set(name: str) -> None:
    f, values = FOUND[name]
    model = trained(Tower(2, f).double())
    growth = deepened(model, "blocks", r(4, 5), by=1)
    assert kinds(growth) == {"zero"}
    set_to = {n.removeprefix("blocks.2."): t.level for n, t in growth.plan.tensors.items() if t.zero}
    assert set_to == values
    again = fxgrow.GrowthPlan.from_json(growth.plan.to_json())
    assert {n: t.level for n, t in again.tensors.items()} == {n: t.level for n, t in growth.plan.tensors.items()}
    deeper = Tower(3, f).double()
    deeper.load_state_dict(growth.module.state_dict(), strict=True)
    same(model, growth.module, [r(4, 5), r(7, 5)])
    same(model, deeper, [r(4, 5), r(7, 5)])


def average(s: Any, x: Tensor) -> Tensor:
    h = torch.sigmoid(s.a(x))
    s.m.mul_(0.9).add_(h.mean(0).detach(), alpha=0.1)
    return x + s.m * h


def lowered(s: Any, x: Tensor) -> Tensor:
    return F.relu(x + s.a(x)).sub_(0.5)


GATES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a buffer that the forward writes is no scale to set": average,
    "a ReLU whose input is negative in places": lambda s, x: F.relu(x + s.a(x)) - 0.5,
    "a ReLU whose result is changed in place": lowered,
    "an input whose gradient is cut": lambda s, x: x.detach() + s.a(x),
    "an inexact constant": lambda s, x: x + torch.sigmoid(s.a(x)).to(torch.float32) * (s.w.to(torch.float32) + 0.1),
}


@pytest.mark.parametrize("name", list(GATES))
def test_what_is_no_identity_gets_a_gate(name: str) -> None:
    model = trained(Tower(2, GATES[name]).double())
    if name == "an inexact constant":
        model = model.float().double()
        for block in model.blocks:  # type: ignore[union-attr]
            block.w.data = block.w.data.to(torch.bfloat16)  # type: ignore[union-attr]
    growth = deepened(model, "blocks", r(4, 5), by=1)
    assert kinds(growth) == {"gate"}
    for _ in range(2):
        same(model, growth.module, [r(4, 5), r(7, 5)])


def test_alpha_dropout_of_zeros_is_not_zero() -> None:
    model = trained(Tower(2, lambda s, x: x + s.drop(s.a(x))).double())
    growth = deepened(model, "blocks", r(4, 5), by=1)
    assert kinds(growth) == {"gate"}
    same(model, growth.module, [r(4, 5)], (False,))


def test_an_input_changed_in_place_is_refused() -> None:
    def halved(s: Any, x: Tensor) -> Tensor:
        y = s.a(x)
        x.mul_(0.5)
        return x + y

    with pytest.raises(GrowthRefused, match=r"changes its input in place \(aten.mul_.Tensor.*without the in-place op"):
        deepened(trained(Tower(2, halved).double()), "blocks", r(4, 5), by=1)


def test_minus_one_stays_where_the_block_is_widened_later() -> None:
    model = trained(Tower(2, FOUND["a norm that multiplies by 1 + w"][0]).double())
    spec = [
        {"op": "deepen", "stack": "blocks", "by": 1},
        {"op": "widen", "axis": "inputs.weight:0", "factor": 2},
    ]
    growth = fxgrow.grow(model, spec, (r(4, 5),), verify=False)
    same(model, growth.module, [r(4, 5), r(7, 5)])


# blocks that share modules, and layers among the blocks -------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Stacked(nn.Module):
    def __init__(self, blocks: nn.Sequential) -> None:
        super().__init__()
        self.blocks = blocks

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


def twice() -> nn.Sequential:
    """One block that stands at two places."""
    a, b = Residual(), Residual()
    return nn.Sequential(a, b, a)


def part() -> nn.Sequential:
    """Two blocks that share a layer."""
    blocks = nn.Sequential(Residual(), Residual(), Residual())
    blocks[1].down = blocks[0].down
    return blocks


@pytest.mark.parametrize("how", [{"after": [0]}, {"by": 1}, {"factor": 2}, {"by": 4, "order": "append"}])
@pytest.mark.parametrize("blocks", [twice, part])
def test_a_copy_of_a_block_shares_what_the_block_shares(
    blocks: Callable[[], nn.Sequential], how: dict[str, Any], tmp_path: Any
) -> None:
    model = trained(Stacked(blocks())).double()
    growth = deepened(model, "blocks", r(3, 8), **how)
    same(model, growth.module, [r(3, 8), r(5, 8, seed=1)])
    out = growth.module(r(3, 8)).sum()
    out.backward()
    assert not [n for n, p in growth.module.named_parameters() if p.grad is None]  # none that nothing reads
    fxgrow.save(growth, tmp_path / "big")
    loaded = fxgrow.load(tmp_path / "big").module
    same(model, deepened(loaded, "blocks", r(3, 8), by=1).module, [r(3, 8)])


@pytest.mark.parametrize("how", [{"by": 1}, {"factor": 2}, {"by": 3, "order": "append"}])
@pytest.mark.parametrize(
    "layers",
    [
        lambda: [Residual(), Residual(), nn.Linear(8, 8), nn.Linear(8, 3)],
        lambda: [nn.Linear(8, 8), Residual(), Residual(), nn.Linear(8, 8)],
        lambda: [Residual(), nn.Linear(8, 8), Residual(), nn.ReLU(), nn.Linear(8, 3)],
    ],
)
def test_layers_among_the_blocks_move_on_with_them(layers: Callable[[], list[nn.Module]], how: dict[str, Any]) -> None:
    model = trained(Stacked(nn.Sequential(*layers()))).double()
    growth = deepened(model, "blocks", r(3, 8), **how)
    same(model, growth.module, [r(3, 8), r(5, 8, seed=1)])
    kept = [type(m) for m in model.blocks if not isinstance(m, Residual)]
    numbers = {n.split(".")[1]: 0 for n in growth.module.state_dict()}
    names = [{n.split(".", 2)[2] for n in growth.module.state_dict() if n.split(".")[1] == k} for k in numbers]
    assert names.count({"weight", "bias"}) == kept.count(nn.Linear)
    assert all(n in ({"weight", "bias"}, set(Residual().state_dict())) for n in names)


@pytest.mark.parametrize("how", [{"by": 1}, {"factor": 2, "init": "gate"}, {"after": [2]}])
def test_the_model_itself_may_be_the_stack(how: dict[str, Any]) -> None:
    model = trained(nn.Sequential(nn.Linear(8, 8), Residual(), Residual(), nn.Linear(8, 3))).double()
    growth = deepened(model, ".", r(3, 8), **how)
    same(model, growth.module, [r(3, 8), r(5, 8, seed=1)])
    added = 2 if how.get("factor") else 1
    assert len({n.split(".")[0] for n in growth.module.state_dict()}) == 4 + added
    with pytest.raises(fxgrow.SpecError, match=r"the model has: \."):
        deepened(model, "blocks", r(3, 8), by=1)
