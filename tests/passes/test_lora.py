"""``lora``: adapters beside layers, in the graph and in the user's class; grown, scaled, faded and merged."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxgrow
from fxgrow.ir.adapters import LowRank, adapters_of, attach
from fxgrow.scheduler import GrowthScheduler
from tests.models import relative_error, small_gpt, tokens, trained

D = torch.float64


class Transposed(nn.Module):
    """A layer whose weight is (in, out), as GPT-2's of transformers."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(width, out)), nn.Parameter(torch.randn(out))

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return flat.view(*x.size()[:-1], self.weight.shape[1])


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.square = nn.Embedding(11, 6), Transposed(6, 6)
        self.up, self.down, self.head = nn.Linear(6, 8), Transposed(8, 6), nn.Linear(6, 11)

    def forward(self, i: Tensor) -> Tensor:
        x = self.square(self.emb(i))
        return self.head(x + self.down(self.up(x).tanh()))


ALL = ["emb", "square", "up", "down", "head"]


def net() -> tuple[Net, Tensor]:
    torch.manual_seed(0)
    model = Net().to(D)
    trained(model)
    return model, torch.randint(0, 11, (3, 5))


def lora(modules: str = "*", **how: Any) -> dict[str, Any]:
    return {"op": "lora", "modules": modules, "rank": 2, **how}


def adapted(model: nn.Module, *args: Tensor, **how: Any) -> nn.Module:
    """The model with adapters in its class, which have learnt something."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fxgrow.grow(model, lora(**how), args).apply_(model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.normal_(std=0.3, generator=generator)
    return model


def test_adapters_change_nothing_and_can_learn() -> None:
    model, x = net()
    growth = fxgrow.grow(model, lora(alpha=4), (x,))
    assert growth.plan.exactness == "exact" and relative_error(model, growth.module, (x,)) == 0
    before = model(x)
    growth.apply_(model)
    assert torch.equal(model(x), before)
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters() if "lora" in n}
    assert shapes == {
        "emb.lora_A": (2, 11),
        "emb.lora_B": (6, 2),
        "square.lora_A": (2, 6),
        "square.lora_B": (6, 2),
        "up.lora_A": (2, 6),
        "up.lora_B": (8, 2),
        "down.lora_A": (2, 8),
        "down.lora_B": (6, 2),
        "head.lora_A": (2, 6),
        "head.lora_B": (11, 2),
    }
    zero = {n for n, p in model.named_parameters() if "lora" in n and not p.any()}
    assert zero == {"emb.lora_A", "square.lora_B", "up.lora_B", "down.lora_B", "head.lora_B"}
    spread = float(model.down.get_parameter("lora_A").detach().std()) * math.sqrt(3 * 8)
    assert 0.5 < spread < 2 and not torch.equal(model.up.lora_A, model.square.lora_A)
    model(x).square().mean().backward()
    moved = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert zero < moved


def test_what_adapters_compute() -> None:
    model, x = net()
    plain = copy.deepcopy(model)
    adapted(model, x, alpha=6)
    for name in ALL:
        module: Any = plain.get_submodule(name)
        down, up = (model.get_submodule(name).get_parameter(n).detach() for n in ("lora_A", "lora_B"))
        added = 3 * up @ down
        module.weight.data += added.t() if name in ("emb", "square", "down") else added
    torch.testing.assert_close(model(x), plain(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "spec",
    [
        {"op": "widen", "axis": "*/rank", "factor": 2, "fill": "add"},
        {"op": "widen", "axis": "*/rank", "factor": 2},
        {"op": "widen", "axis": "up/rank", "by": 3, "fill": "add"},
        {"op": "widen", "axis": "./hidden", "factor": 2},
        {"op": "widen", "axis": "./residual", "factor": 2},
    ],
    ids=["rank", "rank-copied", "rank-by", "hidden", "residual"],
)
def test_adapters_grow_with_their_base_and_in_rank(spec: dict[str, Any]) -> None:
    model, x = net()
    adapted(model, x, modules="[!s]*", alpha=4)
    before, other = copy.deepcopy(model), torch.randint(0, 11, (2, 7))
    growth = fxgrow.grow(model, spec, (x,))
    growth.apply_(model)
    assert relative_error(before, growth.module, (other,)) <= 1e-12
    assert relative_error(before, model, (other,)) <= 1e-12
    assert [hook.alpha for _, _, hook in adapters_of(model)] == [4.0] * 4


def test_blocks_with_adapters_are_copied() -> None:
    model, args = small_gpt(), tokens()
    adapted(model, *args, modules="transformer.h.*.c_attn", alpha=4)
    before = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fxgrow.grow(model, {"op": "deepen", "stack": "transformer.h", "by": 1}, args).apply_(model)
    assert relative_error(before, model, tokens(3)) <= 1e-12
    assert len(list(adapters_of(model))) == len(model.transformer.h)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert relative_error(model, other, tokens(4)) == 0


def test_dropout_is_the_adapters_own() -> None:
    model, x = net()
    adapted(model, x, modules="up", dropout=0.5)
    assert torch.equal(model.eval()(x), model(x))
    model.train()
    torch.manual_seed(1)
    first = model(x)
    assert not torch.equal(first, model(x))
    torch.manual_seed(1)
    assert torch.equal(first, model(x))


def scheduled(*operations: dict[str, Any]) -> GrowthScheduler:
    return GrowthScheduler([{"trigger": {"step": 3}, "operations": list(operations)}])


def test_merged_they_are_in_the_weights_and_gone() -> None:
    model, x = net()
    names = [n for n, _ in model.named_parameters()]
    adapted(model, x, alpha=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model(x).square().mean().backward()
    optimizer.step()
    kept, before = dict(model.named_parameters()), model(x)
    done = scheduled({"op": "lora_merge"}).step(model, optimizer, step=3)
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-12)
    assert [n for n, _ in model.named_parameters()] == names
    assert all(p is kept[n] for n, p in model.named_parameters())
    held = [p for g in optimizer.param_groups for p in g["params"]]
    assert {id(p) for p in held} == {id(p) for p in model.parameters()} == {id(p) for p in optimizer.state}
    assert done is not None and done.after["merged"] == 5
    assert done.before["parameters"] - done.after["parameters"] == 2 * (17 + 12 + 14 + 14 + 17)
    Net().to(D).load_state_dict(model.state_dict())
    optimizer.step()


def test_scaled_and_faded() -> None:
    model, x = net()
    plain = copy.deepcopy(model)
    adapted(model, x, alpha=2)
    events = [
        {"trigger": {"step": 1}, "operations": [{"op": "decrease_vocab_lora_scaling", "value": 0.25}]},
        {"trigger": {"step": 2}, "operations": [{"op": "lora_decay", "steps": 4, "modules": "up | down"}]},
        {"trigger": {"step": 9}, "operations": [{"op": "lora_decay", "steps": 1}, {"op": "merge_lora_weights"}]},
    ]
    scheduler, seen = GrowthScheduler(events), []
    for step in range(11):
        while scheduler.step(model, step=step):
            pass
        seen.append({p: hook.scale(2) for p, _, hook in adapters_of(model)})
    assert seen[0] == dict.fromkeys(ALL, 1.0)
    assert seen[1] == {"emb": 0.25, "square": 1.0, "up": 1.0, "down": 1.0, "head": 0.25}
    assert [s["up"] for s in seen[2:7]] == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert seen[8] == {"emb": 0.25, "square": 1.0, "up": 0.0, "down": 0.0, "head": 0.25}
    assert seen[9] == {}, "merged at what they were then"
    assert set(model.state_dict()) == set(plain.state_dict())
    assert torch.equal(model.up.weight, plain.up.weight) and not torch.equal(model.square.weight, plain.square.weight)


def test_what_is_resumed_fades_from_where_it_was() -> None:
    events = [
        {"trigger": {"step": 0}, "operations": [lora("up", alpha=2), {"op": "lora_scale", "factor": 0.5}]},
        {"trigger": {"step": 2}, "operations": [{"op": "lora_decay", "steps": 4, "to": 0.5}]},
    ]
    model, x = net()
    scheduler = GrowthScheduler(events, (x,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(4):
            while scheduler.step(model, step=step):
                pass
        fresh, _ = net()
        resumed = GrowthScheduler(events, (x,))
        resumed.load_state_dict(scheduler.state_dict())
        resumed.replay(fresh)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), model(x))
    (_, _, hook), (_, _, other) = next(adapters_of(model)), next(adapters_of(fresh))
    assert vars(hook) == vars(other) and hook.scale(2) == 0.5 * (1 - 0.5 / 4)


def test_what_cannot_be_adapted_or_merged_is_refused() -> None:
    model, x = net()
    with pytest.raises(fxgrow.SpecError, match=r"no linear layer or embedding matches 'upp'; did you mean up\?"):
        fxgrow.grow(model, lora("upp"), (x,))
    with pytest.raises(fxgrow.SpecError, match="up has an adapter already"):
        fxgrow.grow(model, [lora("up"), lora("u*")], (x,))
    with pytest.raises(fxgrow.SpecError, match="no adapted module matches"):
        scheduled({"op": "lora_merge"}).step(model, step=3)

    class Twice(Net):
        def forward(self, i: Tensor) -> Tensor:
            return self.up(self.up(self.emb(i))[..., :6])

    torch.manual_seed(0)
    with pytest.raises(fxgrow.GrowthRefused, match="cannot adapt up: it takes 2 tensors and hands on 2"):
        fxgrow.grow(Twice().to(D), lora("up"), (x,))

    gpt, args = small_gpt(), tokens()
    adapted(gpt, *args, modules="lm_head", alpha=2)
    state = {n: t.clone() for n, t in gpt.state_dict().items()}
    with pytest.raises(fxgrow.SpecError, match=r"lm_head.weight is transformer.wte.weight as well"):
        scheduled({"op": "lora_merge"}).step(gpt, step=3)
    assert all(torch.equal(t, state[n]) for n, t in gpt.state_dict().items())


def test_a_module_that_uses_its_weight_in_another_way_is_not_merged() -> None:
    """What the merge would make of it is measured before the adapter goes."""

    class Halved(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight / 2, self.bias)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), Halved(4, 2)).to(D)
    x = torch.randn(5, 3, dtype=D)
    attach(model[1], LowRank(2.0), nn.Parameter(torch.randn(2, 4, dtype=D)), nn.Parameter(torch.randn(2, 2, dtype=D)))
    before, weight = model(x), model[1].weight.clone()
    with pytest.raises(fxgrow.FxgrowError, match=r"1 \(Halved\) computes something else with the adapter"):
        scheduled({"op": "lora_merge"}).step(model, step=3)
    assert torch.equal(model(x), before) and torch.equal(model[1].weight, weight)


class Pair(nn.Linear):
    """Hands its bias on, for others to add."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return nn.functional.linear(x, self.weight), self.bias


class Scaled(nn.Linear):
    def forward(self, factor: float, rows: list[Tensor]) -> Tensor:  # type: ignore[override]
        return nn.functional.linear(rows[0], self.weight, self.bias) * factor


class Calling(nn.Module):
    """Calls its layers in other ways than with one tensor, and one of them stands at two paths."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.pair, self.scaled = nn.Linear(6, 8), Pair(8, 8), Scaled(8, 6)
        self.again = self.up

    def forward(self, x: Tensor) -> Tensor:
        y, bias = self.pair(self.up(input=x).tanh())
        return self.scaled(2.0, rows=[y + bias])


def test_layers_are_called_in_any_way() -> None:
    torch.manual_seed(0)
    model, x = Calling().to(D), torch.randn(3, 6, dtype=D)
    trained(model)
    plain = copy.deepcopy(model)
    adapted(model, x, modules="*", alpha=4)
    for name, factor in (("up", 2.0), ("pair", 2.0), ("scaled", 1.0)):  # the adapter of `scaled` is beside the factor
        down, up = (model.get_submodule(name).get_parameter(n).detach() for n in ("lora_A", "lora_B"))
        plain.get_submodule(name).get_parameter("weight").data += factor * up @ down
    torch.testing.assert_close(model(x), plain(x), rtol=0, atol=1e-12)
    before = copy.deepcopy(model)
    fxgrow.grow(model, {"op": "widen", "axis": "*/rank", "factor": 2}, (x,)).apply_(model)
    assert relative_error(before, model, (x,)) <= 1e-12
    assert model.again.lora_A is model.up.lora_A
    scheduled({"op": "lora_merge", "modules": "up | pair"}).step(model, step=3)
    assert relative_error(before, model, (x,)) <= 1e-12
    with pytest.raises(fxgrow.FxgrowError, match=r"scaled \(Scaled\) cannot be tried on its own"):
        scheduled({"op": "lora_merge"}).step(model, step=3)
    assert relative_error(before, model, (x,)) <= 1e-12


@pytest.mark.parametrize("tied", [True, False])
def test_a_new_token_is_in_the_adapter_of_its_table(tied: bool) -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb, self.head = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
            if tied:
                self.head.weight = self.emb.weight

        def forward(self, i: Tensor) -> Tensor:
            return self.head(self.emb(i).tanh())

    torch.manual_seed(0)
    model, i = Words().to(D), torch.randint(0, 11, (3, 5))
    adapted(model, i, modules="emb")
    before = model(i)
    fxgrow.grow(model, {"op": "extend", "axis": ("." if tied else "emb") + "/vocab", "by": 3}, (i,)).apply_(model)
    torch.testing.assert_close(model(i)[..., :11], before, rtol=0, atol=1e-12)
    assert model.emb.get_parameter("lora_A").shape == (2, 14) and model(torch.tensor([[13]])).isfinite().all()


def test_what_pads_does_not_learn() -> None:
    torch.manual_seed(0)
    model, i = nn.Sequential(nn.Embedding(7, 4, padding_idx=2), nn.Linear(4, 3)).to(D), torch.randint(0, 7, (3, 9))
    growth = fxgrow.grow(model, lora("0"), (i,))
    growth.apply_(model)
    for each in (model, growth.module):
        each(i).square().sum().backward()
        grads = {n: p.grad for n, p in each.named_parameters()}
        columns = grads["0.lora_A"]
        assert columns is not None and columns.any(0).tolist() == [n != 2 for n in range(7)]


def test_modules_with_several_weights_are_no_layers() -> None:
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.attn(x, x, x, need_weights=False)[0])

    torch.manual_seed(0)
    model, x = Attending().to(D), torch.randn(2, 3, 8, dtype=D)
    with pytest.raises(fxgrow.GrowthRefused, match=r"cannot adapt attn: it has several weights \(attn.in_proj_weight"):
        fxgrow.grow(model, lora("attn"), (x,))
    adapted(model, x, modules="*")
    assert [path for path, _, _ in adapters_of(model)] == ["head"]


def test_a_weight_that_is_computed_is_not_merged() -> None:
    model, x = net()
    adapted(model, x, modules="up")
    nn.utils.parametrizations.weight_norm(model.up)
    before = model(x)
    with pytest.raises(fxgrow.SpecError, match="up has no parameter `weight`"):
        scheduled({"op": "lora_merge"}).step(model, step=3)
    assert torch.equal(model(x), before)


def test_a_model_that_is_called_in_several_ways_is_adapted_in_all_of_them() -> None:
    """In a table, too, whose adapter is an op between the weight and the look-up."""

    class Scored(Net):
        def forward(self, i: Tensor, wanted: Tensor | None = None) -> Tensor:
            scores = super().forward(i)
            return scores if wanted is None else nn.functional.cross_entropy(scores.flatten(0, 1), wanted.flatten())

    torch.manual_seed(0)
    model, x = trained(Scored().to(D)), torch.randint(0, 11, (3, 5))
    calls = {"train": (x, x), "generate": (x,)}
    growth = fxgrow.grow(model, lora(), calls=calls)
    assert growth.receipt.error_float64 < 1e-12
    growth.apply_(model)
    trained(model)
    growth.module.load_state_dict(model.state_dict())
    for call in calls.values():
        assert relative_error(growth.module, model, call) < 1e-12
