"""Growths put into larger instances of the user's class: exact there, or refused with both numbers and as it was."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxgrow
from fxgrow.trace import tracer
from tests.landing.test_compare import Convolutions, Net, Recurrent, ids, image, rows, series
from tests.models import relative_error, trained


def double(model: nn.Module, seed: int = 0) -> nn.Module:
    return trained(model.double(), seed).eval()


def floats(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.double() if x.is_floating_point() else x for x in inputs)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in model.state_dict().items()}


def assert_as_it_was(model: nn.Module, before: dict[str, Tensor]) -> None:
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


class Llama(nn.Module):
    """Grouped queries, rotary embeddings from a buffer that is not saved, RMS norms, a gated MLP."""

    inverse: Tensor
    unused: Tensor

    def __init__(
        self,
        width: int = 8,
        heads: int = 4,
        kv: int = 2,
        hidden: int = 6,
        layers: int = 1,
        vocab: int = 11,
        each: int = 4,
    ) -> None:
        super().__init__()
        each = 4
        self.embed, self.head = nn.Embedding(vocab, width), nn.Linear(width, vocab, bias=False)
        self.layers = nn.ModuleList(LlamaBlock(width, heads, kv, hidden, each) for _ in range(layers))
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.spare = nn.Parameter(torch.zeros(width))  # no forward reads it
        self.register_buffer("inverse", 100.0 ** (-torch.arange(0, each, 2) / each), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[1], device=x.device)[:, None] * self.inverse
        angles = torch.cat([angles, angles], -1)
        h = self.embed(x)
        for layer in self.layers:
            h = layer(h, angles.cos(), angles.sin())
        return self.head(self.norm(h))


class LlamaBlock(nn.Module):
    def __init__(self, width: int, heads: int, kv: int, hidden: int, each: int) -> None:
        super().__init__()
        self.heads, self.kv, self.each = heads, kv, each
        self.norm1, self.norm2 = nn.RMSNorm(width, eps=1e-6), nn.RMSNorm(width, eps=1e-6)
        self.q, self.k = nn.Linear(width, heads * each, bias=False), nn.Linear(width, kv * each, bias=False)
        self.v, self.o = nn.Linear(width, kv * each, bias=False), nn.Linear(heads * each, width, bias=False)
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, time, _ = x.shape
        h = self.norm1(x)
        q, k, v = (
            w(h).view(batch, time, n, self.each).transpose(1, 2)
            for w, n in ((self.q, self.heads), (self.k, self.kv), (self.v, self.kv))
        )
        q, k = (a * cos + torch.cat([-a[..., self.each // 2 :], a[..., : self.each // 2]], -1) * sin for a in (q, k))
        k, v = (self.repeated(a, self.heads // self.kv) for a in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        x = x + self.o(y.reshape(batch, time, self.heads * self.each))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))

    @staticmethod
    def repeated(x: Tensor, times: int) -> Tensor:
        batch, heads, time, each = x.shape
        return x[:, :, None].expand(batch, heads, times, time, each).reshape(batch, heads * times, time, each)


def widen(axis: str, factor: float = 2) -> dict[str, Any]:
    return {"op": "widen", "axis": axis, "factor": factor}


LANDED: dict[str, tuple[Any, Any, Any]] = {
    "attention": (lambda: Net(), lambda: Net(hidden=12), ids),
    "convolutions": (lambda: Convolutions(), lambda: Convolutions(8), image),
    "recurrent": (lambda: Recurrent(), lambda: Recurrent(6), series),
    "heads, hidden and depth": (
        lambda: Llama(),
        lambda: Llama(heads=8, kv=4, hidden=9, layers=2),
        ids,
    ),
    "tokens": (lambda: Llama(), lambda: Llama(vocab=13), ids),
}


@pytest.mark.parametrize("name", LANDED)
def test_the_larger_instance_computes_what_the_small_one_did(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small, big, inputs = LANDED[name]
    small, big, args = double(small()), double(big(), 1), floats(inputs())
    traced: list[nn.Module] = []
    trace = tracer.export_calls
    monkeypatch.setattr(tracer, "export_calls", lambda model, *a: (traced.append(model), trace(model, *a))[1])
    growth = fxgrow.expand(small, big, args)
    assert [m is small for m in traced] == [True, False]
    with torch.no_grad():
        old, new = small(*args), big(*args)
    assert float((new[..., : old.shape[-1]] - old).abs().max()) <= 1e-12 * float(old.abs().max())
    own = dict(growth.module.named_parameters())
    assert all(own[n] is p for n, p in big.named_parameters() if n != "spare")
    before = torch.optim.AdamW(small.parameters())
    carried = {id(p) for g in growth.carry(before).param_groups for p in g["params"]}
    assert carried >= {id(p) for n, p in big.named_parameters() if n != "spare"}


# refused ------------------------------------------------------------------------------------------------------------


class Scaled(nn.Module):
    """Attention whose factor is a number that the class computes from its width, and another that it does not."""

    def __init__(self, width: int = 4, factor: float = 1.5, eps: float = 1e-3) -> None:
        super().__init__()
        self.q, self.k, self.width, self.factor = nn.Linear(4, width), nn.Linear(4, width), width, factor
        self.norm = nn.LayerNorm(4, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.q(x) @ self.k(x).transpose(-1, -2) / self.width**0.5
        return self.norm(torch.softmax(scores, -1) @ x * self.factor)


def test_every_number_that_differs_is_named_with_both_values_and_lines() -> None:
    small = double(Scaled())
    for big, words in (
        (Scaled(8, factor=1.6), r"mul.*literal other: the growth needs 1.5, the larger class has 1.6 .*self.factor\)"),
        (
            Scaled(8, eps=1e-4),
            r"layer_norm.* in norm, literal eps: the growth needs 0.001, the larger class has 0.0001",
        ),
    ):
        big = double(big, 1)
        before = state(big)
        with pytest.raises(fxgrow.GrowthRefused, match=words):
            fxgrow.expand(small, big, floats(series()))
        assert_as_it_was(big, before)


class Branches(nn.Module):
    """Blocks without a projection at their end that could be zero."""

    def __init__(self, layers: int = 1) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x * 0.5 + torch.cos(layer(x))
        return x


def test_a_gate_that_the_class_lacks_is_named() -> None:
    small = double(Branches())
    spec = {"op": "deepen", "stack": "layers", "by": 1, "init": "gate"}
    growth = fxgrow.grow(small, spec, floats(rows()), verify=False)
    big = double(Branches(2), 1)
    before = state(big)
    with pytest.raises(
        fxgrow.GrowthRefused, match=r"by a gate of their own.*Branches does not have \(layers.1.alpha\)"
    ):
        growth.into(big)
    assert_as_it_was(big, before)


def test_other_sizes_and_classes_are_refused() -> None:
    growth = fxgrow.grow(double(Net()), widen("*/hidden"), ids(), verify=False)
    for big, words in (
        (Net(hidden=18), r"tensor shape.*needs \(12, 8\), the larger class has \(18, 8\)"),
        (Llama(), "does not compute what the growth does"),
        (nn.Linear(3, 3), "cannot be traced with the growth's examples"),
    ):
        big = double(big, 1)
        before = state(big)
        with pytest.raises(fxgrow.GrowthRefused, match=words):
            growth.into(big)
        assert_as_it_was(big, before)


# what stays the target's ----------------------------------------------------------------------------------------------


def grown_net() -> tuple[nn.Module, fxgrow.Growth]:
    small = double(Net())
    return small, fxgrow.grow(small, widen("*/hidden"), ids(), verify=False)


def test_mode_hooks_flags_and_attributes_are_the_targets() -> None:
    small, growth = grown_net()
    big = double(Net(hidden=12), 1).train()
    big.block.norm.eval()
    big.embed.weight.requires_grad_(False)
    big.block.fc1.weight.decay = 0.1
    seen: list[str] = []
    big.block.register_forward_hook(lambda *_: seen.append("forward"))
    big.block.fc1.weight.register_hook(lambda g: seen.append("gradient"))
    modes = {n: m.training for n, m in big.named_modules()}
    assert growth.into(big) is big
    assert {n: m.training for n, m in big.named_modules()} == modes
    assert not big.embed.weight.requires_grad and big.head.weight is big.embed.weight
    assert big.block.fc1.weight.decay == 0.1
    seen.clear()
    big(*ids()).sum().backward()
    assert seen == ["forward", "gradient"]
    assert relative_error(small, big.eval(), ids()) <= 1e-12


def test_there_is_one_set_of_weights_afterwards() -> None:
    _, growth = grown_net()
    big = double(Net(hidden=12), 1)
    old = [weakref.ref(p) for p in big.parameters()]
    growth.into(big)
    gc.collect()
    assert all(ref() is None for ref in old)
    assert {id(p) for p in big.parameters()} == {id(p) for p in growth.module.parameters()}


def test_a_target_on_meta_gets_values() -> None:
    small, growth = grown_net()
    with torch.device("meta"):
        big = Net(hidden=12).double().eval()
    growth.into(big)
    assert not any(t.is_meta for t in big.state_dict().values())
    assert relative_error(small, big, ids()) <= 1e-12


def test_a_compiled_target_is_the_module_in_it() -> None:
    small, growth = grown_net()
    big = double(Net(hidden=12), 1)
    growth.into(torch.compile(big, backend="eager"))
    assert relative_error(small, big, ids()) <= 1e-12


def test_tensors_that_no_call_reads_stay_the_targets_where_they_have_another_size() -> None:
    small, big = double(Llama()), double(Llama(width=16), 1)
    spare, growth = big.spare, fxgrow.expand(small, big, ids())
    assert big.spare is spare
    assert any("no captured call reads spare" in n for n in growth.receipt.notes)


def test_the_optimizer_goes_on_over_the_targets_parameters() -> None:
    small, growth = grown_net()
    big = double(Net(hidden=12), 1)
    optimizer = torch.optim.AdamW(small.parameters(), lr=1e-2)
    small(*ids()).pow(2).mean().backward()
    optimizer.step()
    growth = fxgrow.grow(small, widen("*/hidden"), ids(), verify=False)
    growth.into(big)
    same = copy.deepcopy((small, optimizer))
    growth.carry_(optimizer, "exact")
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in big.parameters()}
    for model, o in (same, (big, optimizer)):
        for _ in range(5):
            o.zero_grad()
            model(*ids()).pow(2).mean().backward()
            o.step()
    small = same[0]
    assert relative_error(small, big, ids()) <= 1e-9


def test_buffers_that_are_not_saved_and_that_the_class_computes_otherwise_are_named() -> None:
    small, big = double(Llama()), double(Llama(hidden=12), 1)
    small.inverse.mul_(0.5)
    with pytest.warns(UserWarning, match="buffer inverse of the larger Llama is not in its state dict"):
        growth = fxgrow.expand(small, big, ids(), verify=False)
    assert any("buffer inverse" in n for n in growth.receipt.notes)
    assert relative_error(small, big, ids()) <= 1e-12
