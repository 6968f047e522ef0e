"""What is new in a grown model, and training that alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxgrow
from tests.models import trained


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 4), nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))  # type: ignore[no-any-return]


class Model(nn.Module):
    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(3, 6), nn.Linear(6, 2)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)  # type: ignore[no-any-return]


X = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
WIDER = {"op": "widen", "axis": "blocks.0/hidden", "factor": 2}
DEEPER = {"op": "deepen", "stack": "blocks", "after": [0]}


def small() -> nn.Module:
    torch.manual_seed(0)
    return trained(Model().double())


def grown(*spec: dict[str, Any]) -> tuple[nn.Module, fxgrow.Growth]:
    model = small()
    return model, fxgrow.grow(model, list(spec), (X,), verify=False)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3, closure: bool = False) -> None:
    def loss() -> Tensor:
        optimizer.zero_grad()
        value = (model(X) - 1).square().sum()
        value.backward()
        return value

    for _ in range(steps):
        if closure:
            optimizer.step(loss)
        else:
            loss()
            optimizer.step()


def test_new_parameters_are_blocks_and_entries() -> None:
    _, growth = grown(WIDER, DEEPER)
    new = growth.new_parameters
    assert new.whole == [f"blocks.1.{n}" for n in dict(Block().named_parameters())]
    assert new.widened == ["blocks.0.up.weight", "blocks.0.up.bias", "blocks.0.down.weight"]
    assert list(new) == new.names and set(new.names) == {*new.whole, *new.widened} and len(new) == len(new.names)
    assert new.names == [n for n, _ in growth.module.named_parameters() if n in new]
    rows = new.entries("blocks.0.up.weight")
    assert rows.dtype is torch.bool and rows.shape == (8, 6)
    assert not rows[:4].any() and rows[4:].all() and new.entries("blocks.0.down.weight")[:, 4:].all()
    assert new.entries("blocks.1.up.weight").all() and not new.entries("head.weight").any()
    assert new.numel() == sum(int(new.entries(n).sum()) for n, _ in growth.module.named_parameters())
    assert repr(new) == f"<6 new parameters, and new entries of 3 widened ones: {new.numel()} numbers>"
    with pytest.raises(fxgrow.SpecError, match="did you mean"):
        new.entries("blocks.0.up.weigth")


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        ({**DEEPER, "init": "stack", "preserve": "lossy"}, {f"blocks.1.{n}" for n in dict(Block().named_parameters())}),
        ({**DEEPER, "init": "gate"}, {f"blocks.1.{n}" for n in [*dict(Block().named_parameters()), "alpha"]}),
        ({"op": "insert", "layer": "linear", "after": "embed"}, None),
        ({"op": "widen", "axis": "blocks.1/hidden", "by": 2, "fill": "add"}, set()),
    ],
)
def test_whatever_makes_it(operation: dict[str, Any], expected: set[str] | None) -> None:
    model, growth = grown(operation)
    new = growth.new_parameters
    if expected is None:
        expected = {n for n, _ in growth.module.named_parameters()} - {n for n, _ in model.named_parameters()}
    assert set(new.whole) == expected
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, growth.module))
    assert new.numel() == after - before


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=0.05, weight_decay=0.5),
    "adamw one by one": lambda ps: torch.optim.AdamW(ps, lr=0.05, weight_decay=0.5, foreach=False, amsgrad=True),
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9, weight_decay=0.5),
    "rmsprop": lambda ps: torch.optim.RMSprop(ps, lr=0.01, momentum=0.9, weight_decay=0.1),
    "adafactor": lambda ps: torch.optim.Adafactor(ps, lr=0.05, weight_decay=0.5),
}


@pytest.mark.parametrize("closure", [False, True], ids=["", "closure"])
@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_old_entries_stand_still_to_the_bit(name: str, closure: bool) -> None:
    model = small()
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer)
    growth = fxgrow.grow(model, [WIDER, DEEPER], (X,), verify=False)
    policy = "reset" if name == "adafactor" else "asymmetric"
    optimizer = growth.carry(optimizer, policy)
    new, module = growth.new_parameters, growth.module
    start = {n: p.detach().clone() for n, p in module.named_parameters()}
    moments = {
        (n, k): v.clone()
        for n, p in module.named_parameters()
        for k, v in optimizer.state.get(p, {}).items()
        if v.shape == p.shape
    }
    frozen = growth.freeze_old()
    train(module, optimizer, closure=closure)
    for n, p in module.named_parameters():
        entries = new.entries(n)
        assert torch.equal(p[~entries], start[n][~entries])
        assert n not in new or not torch.equal(p[entries], start[n][entries])
        for k, v in optimizer.state.get(p, {}).items():
            if (n, k) in moments:
                assert torch.equal(v[~entries], moments[n, k][~entries])
    frozen.unfreeze()
    assert all(p.requires_grad for p in module.parameters())
    train(module, optimizer, closure=closure)
    assert all(not torch.equal(p, start[n]) for n, p in module.named_parameters())


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_new_entries_stand_still_to_the_bit(name: str) -> None:
    """While new entries' rates warm up, too, under which an optimizer holds them in other units as it steps."""
    model = small()
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer)
    growth = fxgrow.grow(model, [WIDER, DEEPER, {"op": "lora", "modules": "head", "rank": 2}], (X,), verify=False)
    growth.apply_(model)
    growth.carry_(optimizer, "reset" if name == "adafactor" else "asymmetric")
    new, named = growth.new_parameters, dict(model.named_parameters())
    assert {"head.lora_A", "blocks.1.up.weight"} <= set(new.whole)
    train(model, optimizer)
    start = {n: p.detach().clone() for n, p in named.items()}
    with growth.freeze_new(model) as frozen:
        assert frozen.holds(named["head.lora_A"]) and not frozen.holds(named["head.weight"])
        train(model, optimizer)
        for n, p in named.items():
            entries = new.entries(n)
            assert torch.equal(p[entries], start[n][entries])
            assert n in new.whole or not torch.equal(p[~entries], start[n][~entries])
        with pytest.raises(fxgrow.FxgrowError, match="freeze_new of an earlier growth holds"):
            fxgrow.grow(model, DEEPER, (X,), verify=False)
    train(model, optimizer)
    assert all(not torch.equal(p, start[n]) for n, p in named.items())


def test_nothing_would_be_frozen_or_trained() -> None:
    _, growth = grown(DEEPER)
    named = dict(growth.module.named_parameters())
    for n, p in named.items():
        p.requires_grad_(n in growth.new_parameters)
    with pytest.raises(fxgrow.SpecError, match="nothing that is old learns; nothing was frozen"):
        growth.freeze_new()
    for n, p in named.items():
        p.requires_grad_(n not in growth.new_parameters)
    with pytest.raises(fxgrow.SpecError, match=r"^requires_grad is False in all that is new; nothing was frozen"):
        growth.freeze_new()
    assert [n for n, p in named.items() if p.requires_grad] == [n for n in named if n not in growth.new_parameters]


@pytest.mark.parametrize("ramp", [None, 2])
def test_together_with_rates_per_slice(ramp: int | None) -> None:
    """Which hold weights in the small model's units while an optimizer steps, and moments until the ramp ends."""
    model = small()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    train(model, optimizer)
    growth = fxgrow.grow(model, [WIDER], (X,), verify=False)
    optimizer = growth.carry(optimizer, "exact", ramp=ramp)
    start = {n: p.detach().clone() for n, p in growth.module.named_parameters()}
    with growth.freeze_old():
        train(growth.module, optimizer, steps=4)
    for n, p in growth.module.named_parameters():
        entries = growth.new_parameters.entries(n)
        assert torch.equal(p[~entries], start[n][~entries])
        assert n not in growth.new_parameters or not torch.equal(p[entries], start[n][entries])


def test_only_new_blocks_are_trained_as_by_llama_pro() -> None:
    model, growth = grown({"op": "deepen", "stack": "blocks", "factor": 2})
    with torch.no_grad():
        torch.testing.assert_close(growth.module(X), model(X), rtol=0, atol=1e-12)
    growth.freeze_old()
    assert {n for n, p in growth.module.named_parameters() if p.requires_grad} == set(growth.new_parameters)
    optimizer = torch.optim.AdamW(growth.module.parameters(), lr=0.05, weight_decay=0.1)
    train(growth.module, optimizer, steps=20)
    old = [b for i, b in enumerate(growth.module.blocks) if i % 2 == 0]
    for mine, theirs in zip(old, model.blocks, strict=True):  # type: ignore[arg-type]
        for (n, p), (_, q) in zip(mine.named_parameters(), theirs.named_parameters(), strict=True):
            assert torch.equal(p, q), n
    with torch.no_grad():
        before, after = ((m(X) - 1).square().sum() for m in (model, growth.module))
    assert float(after) < 0.5 * float(before)


def test_in_the_users_own_model_and_optimizer() -> None:
    model = small()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    train(model, optimizer)
    growth = fxgrow.grow(model, [DEEPER], (X,), verify=False)
    growth.apply_(model)
    growth.carry_(optimizer)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    with growth.freeze_old():
        train(model, optimizer)
    assert {n for n, p in model.named_parameters() if not torch.equal(p, start[n])} == set(growth.new_parameters)


def test_another_module_with_the_grown_parameters() -> None:
    _, growth = grown(DEEPER)
    deeper = Model(3).double()
    deeper.load_state_dict(growth.module.state_dict(), strict=True)
    frozen = growth.freeze_old(deeper)
    assert {n for n, p in deeper.named_parameters() if p.requires_grad} == set(growth.new_parameters)
    assert all(p.requires_grad for p in growth.module.parameters())
    frozen.unfreeze()
    assert all(p.requires_grad for p in deeper.parameters())
    with pytest.raises(fxgrow.SpecError, match=r"is not the grown one: blocks.1.up.weight|no such parameter"):
        growth.freeze_old(nn.Linear(2, 2))
    with pytest.raises(fxgrow.SpecError, match="no such parameter"):
        growth.freeze_old(Model(1).double())


def test_what_was_frozen_before_stays_so_and_nothing_new_is_refused() -> None:
    model = small()
    for p in model.blocks[1].parameters():  # type: ignore[index,union-attr]
        p.requires_grad_(False)
    growth = fxgrow.grow(model, [DEEPER], (X,), verify=False)
    with growth.freeze_old():
        pass
    assert [n for n, p in growth.module.named_parameters() if not p.requires_grad] == [
        f"blocks.2.{n}" for n in dict(Block().named_parameters())
    ]
    for p in model.parameters():
        p.requires_grad_(False)
    growth = fxgrow.grow(model, [DEEPER], (X,), verify=False)
    with pytest.raises(fxgrow.SpecError, match="requires_grad is False in all that is new; nothing was frozen"):
        growth.freeze_old()


def test_waiting_gradients_copies_and_a_step_that_raises() -> None:
    _, growth = grown(WIDER)
    module, new = growth.module, growth.new_parameters
    module(X).sum().backward()
    frozen = growth.freeze_old()
    assert module.head.weight.grad is None  # type: ignore[union-attr]
    for n in new:
        p = dict(module.named_parameters())[n]
        assert p.grad is not None and not p.grad[~new.entries(n)].any() and p.grad[new.entries(n)].any()
    start = {n: p.detach().clone() for n, p in module.named_parameters()}
    other = copy.deepcopy(module)  # is not held
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, weight_decay=0.5)

    def fails() -> float:
        raise RuntimeError("no data")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="no data"):
            optimizer.step(fails)
    train(module, optimizer)
    for n, p in module.named_parameters():
        assert torch.equal(p[~new.entries(n)], start[n][~new.entries(n)])
    train(other, torch.optim.SGD(other.parameters(), lr=0.1, weight_decay=0.5))
    assert not torch.equal(other.blocks[0].up.weight[:4], start["blocks.0.up.weight"][:4])  # type: ignore[index,union-attr]
    frozen.unfreeze()
    frozen.unfreeze()
