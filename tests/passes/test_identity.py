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


def reasons(growth: fxgrow.Growth) -> set[str | None]:
    return {c.why_gate for s in growth.plan.steps for c in s.changes if c.kind == "clone"}


def learns(growth: fxgrow.Growth, path: str, x: Tensor) -> None:
    """Two steps of descent give every parameter of a block a gradient that is not zero."""
    module = copy.deepcopy(growth.module)
    waiting = {n for n, _ in module.named_parameters() if n.startswith(path + ".")}
    for _ in range(2):
        module.zero_grad()
        (module(x) * r(*module(x).shape, seed=1)).sum().backward()
        waiting -= {n for n, p in module.named_parameters() if p.grad is not None and bool(p.grad.any())}
        with torch.no_grad():
            for p in module.parameters():
                if p.grad is not None:
                    p.sub_(0.01 * p.grad)
    read = {n for n, p in module.named_parameters() if p.grad is not None}  # a block may have more than it uses
    assert not waiting & read


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
    (why,) = reasons(growth)
    assert why is not None and why.startswith("aten.gelu.default at ") and "return self.f(out)" in why
    same(model, growth.module, [r(3, 3, 6, 6)], (False,))


def in_place(s: Any, x: Tensor) -> Tensor:
    y = s.a(torch.tanh(x))
    y += s.b(torch.sin(x))
    y *= 0.5
    return x + y


def drop_path(s: Any, x: Tensor) -> Tensor:
    """As timm writes it: the branch lends the mask its dtype."""
    y = s.a(torch.tanh(x))
    mask = y.new_empty((y.shape[0], 1)).fill_(1.0)
    return x + y * mask.div_(1.0)


A = {"a.weight": 0.0, "a.bias": 0.0}

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
    "a view of the sum": (lambda s, x: (x.view(-1, 2, 4) + s.a(x).view(-1, 2, 4)).view(x.shape), A),
    "a sum in another order": (
        lambda s, x: (
            (x.view(-1, 2, 4).transpose(1, 2) + s.a(x).view(-1, 2, 4).transpose(1, 2)).transpose(1, 2).reshape(-1, 8)
        ),
        A,
    ),
    "a sum of one more dim": (lambda s, x: (x.unsqueeze(1) + s.a(x).unsqueeze(1)).flatten(1), A),
    "shuffles that undo each other": (
        lambda s, x: (
            (x + s.a(x)).view(-1, 2, 4).transpose(1, 2).reshape(-1, 8).view(-1, 4, 2).transpose(1, 2).reshape(-1, 8)
        ),
        A,
    ),
    "a norm at the branch's end": (
        lambda s, x: x + F.layer_norm(torch.tanh(s.a(x)), (8,), s.w, s.b.bias),
        {"w": 0.0, "b.bias": 0.0},
    ),
    "a branch times a number": (lambda s, x: x + 0.5 * s.a(torch.tanh(x)), A),
    "a branch by alpha": (lambda s, x: torch.add(x, s.a(torch.tanh(x)), alpha=0.5), A),
    "a difference": (lambda s, x: x - s.a(torch.tanh(x)), A),
    "a scale of the stream": (lambda s, x: s.w * x + s.a(torch.tanh(x)), {"w": 1.0, **A}),
    "an interpolation": (lambda s, x: torch.lerp(x, torch.tanh(s.a(x)), s.w), {"w": 0.0}),
    "an interpolation the other way": (lambda s, x: torch.lerp(torch.tanh(s.a(x)), x, s.w), {"w": 1.0}),
    "a product that is added": (lambda s, x: torch.addcmul(x, s.w, torch.tanh(s.a(x))), {"w": 0.0}),
    "a branch summed in place": (in_place, {**A, "b.weight": 0.0, "b.bias": 0.0}),
    "a branch that lends its dtype": (drop_path, A),
    "dropout of the sum": (lambda s, x: F.dropout(x + s.a(torch.tanh(x)), 0.0, s.training), A),
    "Python's sum": (
        lambda s, x: sum([x, s.a(torch.tanh(x)), s.b(torch.sin(x))]),
        {**A, "b.weight": 0.0, "b.bias": 0.0},
    ),
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
    assert reasons(growth) == {None}
    learns(growth, "blocks.2", r(4, 5))


WIDER = {"op": "widen", "axis": "inputs.weight:0", "factor": 2, "noise": {"scale": 0.1, "relative": True, "seed": 1}}


@pytest.mark.parametrize(
    "name", ["a norm at the branch's end", "a scale of the stream", "Python's sum", "a layer scale"]
)
def test_an_identity_stays_one_between_other_growths(name: str) -> None:
    f, _ = FOUND[name]
    model = trained(Tower(2, f).double())
    deeper = {"op": "deepen", "stack": "blocks", "factor": 2}
    growth = fxgrow.grow(model, [deeper, {**deeper, "factor": 1.5}], (r(4, 5),), verify=False)
    assert len(growth.module.blocks) == 6 and kinds(growth) == {"zero"}
    same(model, growth.module, [r(4, 5), r(7, 5)])
    if "norm" not in name:  # which has sizes of its own
        for spec in ([WIDER, deeper], [deeper, WIDER]):
            growth = fxgrow.grow(model, spec, (r(4, 5),), verify=False)
            assert kinds(growth) == {"zero"}
            same(model, growth.module, [r(4, 5), r(7, 5)])


def test_of_two_factors_the_one_that_is_zero_already_stays_so() -> None:
    """A scale that starts at zero, and a layer set to zero behind it, would never learn."""
    model = trained(Tower(2, lambda s, x: x + s.w * s.a(torch.tanh(x))).double())
    for block in model.blocks:  # type: ignore[union-attr]
        block.w.data.zero_()  # type: ignore[union-attr]
    growth = deepened(model, "blocks", r(4, 5), by=1)
    assert {n for n, t in growth.plan.tensors.items() if t.zero} == {"blocks.2.w"}
    learns(growth, "blocks.2", r(4, 5))


def test_dropout_of_the_sum_is_told() -> None:
    model = trained(Tower(2, lambda s, x: F.dropout(x + s.a(torch.tanh(x)), 0.5, s.training)).double())
    growth = deepened(model, "blocks", r(4, 5), by=1)
    (note,) = growth.plan.notes
    assert "aten.dropout.default at " in note and "once more" in note
    same(model, growth.module, [r(4, 5)], (False,))
    gated = deepened(model, "blocks", r(4, 5), by=1, init="gate")
    assert kinds(gated) == {"gate"} and reasons(gated) == {"the spec asks for one"}


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
    "a shuffle": lambda s, x: (x + s.a(x)).view(-1, 2, 4).transpose(1, 2).reshape(-1, 8),
    "two shuffles": lambda s, x: (
        (x + s.a(x)).view(-1, 2, 4).transpose(1, 2).reshape(-1, 2, 4).transpose(1, 2).reshape(-1, 8)
    ),
    "a flip": lambda s, x: (x + s.a(x)).flip(-1),
    "a number added": lambda s, x: x + s.a(x) + 0.5,
    "the stream by alpha": lambda s, x: torch.add(s.a(torch.tanh(x)), x, alpha=0.5),
    "the stream taken away": lambda s, x: s.a(torch.tanh(x)) - x,
    "a norm after the sum": lambda s, x: F.layer_norm(x + s.a(x), (8,), s.w, s.b.bias),
    "a scale of stream and branch": lambda s, x: (s.w * x + s.a(torch.tanh(x))) * s.w,
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
    (why,) = reasons(growth)
    assert why is not None and why.startswith("aten.") and "test_identity.py" in why
    again = fxgrow.GrowthPlan.from_json(growth.plan.to_json())
    assert [c.why_gate for c in again.steps[0].changes if c.kind == "clone"] == [why]
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


# what a block gives besides ------------------------------------------------------------------------------------------


class Biased(nn.Module):
    """Its first block makes a bias that all blocks share, as T5's do."""

    def __init__(self, blocks: int, own: bool = False) -> None:
        super().__init__()
        self.blocks, self.own = nn.ModuleList(Shares(first=own or i == 0) for i in range(blocks)), own

    def forward(self, x: Tensor) -> Tensor:
        bias = None
        for block in self.blocks:
            x, bias = block(x, bias)
        return x


class Shares(nn.Module):
    def __init__(self, first: bool) -> None:
        super().__init__()
        self.layer, self.first = Residual(), first
        if first:
            self.table = nn.Parameter(torch.ones(1, 8))

    def forward(self, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        bias = torch.tanh(self.table) if bias is None else bias
        return x + self.layer.down(torch.tanh(self.layer.up(x) + bias.sum())), bias


@pytest.mark.parametrize("how", [{"factor": 2}, {"after": [0]}, {"by": 1}])
def test_a_block_that_gives_more_than_the_stream_is_passed_over(how: dict[str, Any]) -> None:
    model = trained(Biased(3)).double()
    growth = deepened(model, "blocks", r(3, 8), **how)
    copies = [c for s in growth.plan.steps for c in s.changes if c.kind == "clone"]
    if how != {"by": 1}:
        assert copies[0].source == 1 and copies[0].after == 0
        assert "a copy of blocks.1" in growth.plan.notes[0] and "blocks.0 computes" in growth.plan.notes[0]
    deeper = Biased(3 + len(copies)).double()
    deeper.load_state_dict(growth.module.state_dict(), strict=True)
    for module in (growth.module, deeper):
        same(model, module, [r(3, 8), r(5, 8, seed=1)])


def test_encoder_and_decoder_of_a_transformer_are_deepened() -> None:
    """Sizes that the first layer computes for all of them are no values that a copy would have to take up."""
    make = {"d_model": 8, "nhead": 2, "dim_feedforward": 12, "batch_first": True, "dropout": 0.0}
    spec = [{"op": "deepen", "stack": f"{part}.layers", "after": [0]} for part in ("encoder", "decoder")]
    args = r(3, 5, 8), r(3, 4, 8, seed=1)
    for first, kind in ((True, "zero"), (False, "gate")):
        model = trained(nn.Transformer(**make, num_encoder_layers=1, num_decoder_layers=1, norm_first=first).double())
        growth = fxgrow.grow(model, spec, args, verify=False)
        assert kinds(growth) == {kind}
        assert float((model(*args) - growth.module(*args)).detach().abs().max()) < 1e-12


class Mixture(nn.Module):
    """Experts side by side in blocks one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(8, 3), nn.ModuleList(Residual() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        weights = self.gate(x).softmax(-1)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            out = out + weights[..., i : i + 1] * expert(x)
        return x + out


def test_experts_are_no_stack() -> None:
    model = trained(Stacked(nn.Sequential(Mixture(), Mixture()))).double()
    with pytest.raises(GrowthRefused, match=r"blocks.0.experts: none of its blocks reads what another one computes"):
        deepened(model, "blocks.0.experts", r(3, 8), by=1)
    with pytest.raises(fxgrow.SpecError, match=r"the model has: blocks \("):
        deepened(model, "layers", r(3, 8), by=1)
    growth = deepened(model, "*", r(3, 8), by=1)
    assert {c.stack for s in growth.plan.steps for c in s.changes if c.kind == "clone"} == {"blocks"}


def test_blocks_of_a_dictionary_are_a_stack() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleDict({"0": Residual(), "1": Residual()})

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks.values():
                x = block(x)
            return x

    model = trained(Named()).double()
    growth = deepened(model, "blocks", r(3, 8), factor=2)
    assert kinds(growth) == {"zero"}
    same(model, growth.module, [r(3, 8), r(5, 8, seed=1)])


def test_a_stack_called_in_slices_is_deepened() -> None:
    class Sliced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks, self.between = nn.ModuleList(Residual() for _ in range(4)), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            kept = x
            for block in self.blocks[:2]:
                x = block(x)
            x = self.between(x) + kept
            for block in self.blocks[2:]:
                x = block(x)
            return x

    model = trained(Sliced()).double()
    growth = deepened(model, "blocks", r(3, 8), factor=1.5)
    assert kinds(growth) == {"zero"}
    same(model, growth.module, [r(3, 8), r(5, 8, seed=1)])
