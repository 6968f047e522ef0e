"""Constants folded into weights: a grown state dict, loaded into a larger instance of the class, computes the same."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxgrow
from fxgrow.errors import FxgrowError
from fxgrow.growth import plan_growth
from fxgrow.ir.nodes import info_of
from fxgrow.passes.constants import fold, remaining
from fxgrow.passes.state import State, run_operation
from fxgrow.spec import GrowthSpec, Widen
from fxgrow.weights.materialise import copy_gradient, materialise_all
from tests.models import trained

LIMIT = 1e-12


def widen(axis: str, factor: float = 2, **more: Any) -> dict[str, Any]:
    return {"op": "widen", "axis": axis, "factor": factor, **more}


class Rms(nn.Module):
    """RMS norm as Llama writes it out."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 0.1))


class Around(nn.Module):
    """RMS norm that multiplies by 1 + w, as Gemma writes it out."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        normed = x.double() * torch.rsqrt(x.double().pow(2).mean(-1, keepdim=True) + 0.1)
        return (normed * (1.0 + self.weight.double())).type_as(x)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


class Attending(nn.Module):
    """One block of attention; ``kind`` says how queries and keys come about, ``scale`` how scores are scaled."""

    def __init__(self, kind: str = "plain", scale: str = "implied", c: int = 8, d: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.kind, self.scale, self.d, self.heads = kind, scale, d, heads
        self.kv = 2 if kind == "grouped" else heads
        self.embed = nn.Embedding(11, c)
        if kind.startswith("fused"):
            self.qkv = nn.Linear(c, 3 * heads * d)
        else:
            self.q, self.k = nn.Linear(c, heads * d), nn.Linear(c, self.kv * d)
            self.v = nn.Linear(c, self.kv * d)
        if kind == "normed":
            self.q_norm, self.k_norm = nn.RMSNorm(d, eps=1e-6), nn.RMSNorm(d, eps=1e-6)
        if kind in ("rotary", "grouped"):
            angles = torch.arange(9)[:, None] * torch.linspace(1, 0.1, d // 2)
            self.register_buffer("cos", torch.cat([angles, angles], -1).cos())
            self.register_buffer("sin", torch.cat([angles, angles], -1).sin())
        self.out = nn.Linear(heads * d, c)
        self.head = nn.Linear(c, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        b, t, _ = x.shape
        if self.kind == "fused":
            q, k, v = (z.unflatten(-1, (self.heads, self.d)).transpose(1, 2) for z in self.qkv(x).chunk(3, -1))
        elif self.kind == "fused view":
            q, k, v = self.qkv(x).view(b, t, 3, self.heads, self.d).permute(2, 0, 3, 1, 4).unbind(0)
        elif self.kind == "fused by head":
            q, k, v = self.qkv(x).view(b, t, self.heads, 3 * self.d).transpose(1, 2).chunk(3, -1)
        else:
            q = self.q(x).unflatten(-1, (self.heads, self.d)).transpose(1, 2)
            k, v = (z(x).unflatten(-1, (self.kv, self.d)).transpose(1, 2) for z in (self.k, self.v))
        if self.kind == "normed":
            q, k = self.q_norm(q), self.k_norm(k)
        if self.kind in ("rotary", "grouped"):
            q, k = (rotated(z, self.cos[:t], self.sin[:t]) for z in (q, k))
        if self.kind == "grouped":
            k, v = (z.repeat_interleave(self.heads // self.kv, 1) for z in (k, v))
        return self.head(x + self.out(self.attend(q, k, v).transpose(1, 2).flatten(2)))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.scale == "implied":
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        if self.scale == "given":
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.d**-0.5)
        if self.scale == "fixed":
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)
        if self.scale == "queries":
            return (q * self.d**-0.5 @ k.mT).softmax(-1) @ v
        if self.scale == "threefold":
            return (q @ k.mT / math.sqrt(3 * self.d)).softmax(-1) @ v
        mask = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool, device=q.device).tril()
        return (q @ k.mT / math.sqrt(self.d)).masked_fill(~mask, -torch.inf).softmax(-1) @ v


TOKENS = torch.arange(14).view(2, 7) % 11
HEADS = [widen("./head_dim")]


class Unscaled(nn.Module):
    """A norm without weights, and no product after it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Linear(3, 8), nn.RMSNorm(8, eps=1e-5, elementwise_affine=False)
        self.b = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(torch.tanh(self.norm(self.a(x))))
        return out


def made(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return trained(make()).double()


def grown(model: nn.Module, operations: list[dict[str, Any]], x: Tensor = TOKENS) -> fxgrow.growth.Growth:
    return fxgrow.grow(model, operations, (x,), verify=False)


def compare(model: nn.Module, growth: fxgrow.growth.Growth, larger: nn.Module, x: Tensor = TOKENS) -> None:
    """The grown module, and the class itself with the grown weights, compute what the small model does."""
    wanted = model(x)
    torch.testing.assert_close(growth.module(x), wanted, rtol=LIMIT, atol=LIMIT)
    larger.double().load_state_dict(growth.module.state_dict())
    torch.testing.assert_close(larger(x), wanted, rtol=LIMIT, atol=LIMIT)
    check_gradients(model, growth, larger, x)


def check_gradients(model: nn.Module, growth: fxgrow.growth.Growth, larger: nn.Module, x: Tensor) -> None:
    """Gradients are the small model's, mapped by the plan."""
    if not growth.plan.exact_gradients:
        return
    for each in (model, larger):
        each.zero_grad()
        each(x).square().sum().backward()
    small = dict(model.named_parameters())
    for name, p in larger.named_parameters():
        plan = growth.plan.tensors[name]
        assert p.grad is not None and plan.source is not None
        torch.testing.assert_close(p.grad, copy_gradient(plan, small[plan.source].grad), rtol=1e-9, atol=1e-9)


# attention ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "fused", "fused view", "fused by head", "normed", "rotary", "grouped"])
def test_the_scale_of_attention_goes_into_queries(kind: str) -> None:
    model = made(lambda: Attending(kind))
    growth = grown(model, [widen("./head_dim"), *([] if kind == "fused view" else [widen("./value_dim")])])
    assert growth.plan.constants == []
    compare(model, growth, Attending(kind, d=8))


@pytest.mark.parametrize(
    ("kind", "scale"),
    [("fused", "given"), ("plain", "fixed"), ("fused", "queries"), ("plain", "written"), ("plain", "threefold")],
)
def test_however_it_is_written(kind: str, scale: str) -> None:
    model = made(lambda: Attending(kind, scale))
    growth = grown(model, [widen("./head_dim"), widen("./value_dim")])
    assert growth.plan.constants == []
    compare(model, growth, Attending(kind, scale, d=8))


def test_only_the_rows_of_the_queries_are_scaled() -> None:
    growth = grown(made(lambda: Attending("fused")), HEADS)
    plan = growth.plan.tensors["qkv.weight"]
    assert plan.dims[0] is not None and plan.dims[0].split is not None
    split = plan.dims[0].split
    assert plan.scale == 1.0
    torch.testing.assert_close(torch.from_numpy(split[:32]), torch.full((32,), 2**-0.5, dtype=torch.float64))
    assert set(split[32:]) == {1.0}


def test_what_is_kept_is_listed() -> None:
    model = made(Attending)
    growth = grown(model, [widen("./head_dim", constants="keep")])
    (left,) = growth.plan.constants
    assert (left.argument, left.own, left.value) == ("scale", None, 0.25) and "constants: keep" in str(left)
    assert (
        "scaled_dot_product_attention" in left.op
        and "test_constants.py" in left.line
        and str(left) in growth.receipt.constants
    )
    assert "1 constants stay in the graph" in growth.receipt.summary()
    torch.testing.assert_close(growth.module(TOKENS), model(TOKENS), rtol=LIMIT, atol=LIMIT)


# norms and streams ----------------------------------------------------------------------------------------------------


class Stream(nn.Module):
    """A residual stream with norms; ``tied`` reads it with its own table."""

    def __init__(self, norm: str = "rms", tied: bool = False, c: int = 8, hidden: int = 12) -> None:
        super().__init__()
        make: dict[str, Callable[[], nn.Module]] = {
            "rms": lambda: nn.RMSNorm(c, eps=0.1),
            "implied": lambda: nn.RMSNorm(c),
            "written": lambda: Rms(c),
            "around": lambda: Around(c),
            "layer": lambda: nn.LayerNorm(c, eps=0.1),
            "bare": lambda: nn.LayerNorm(c, eps=0.1, elementwise_affine=False),
        }
        self.embed = nn.Embedding(11, c)
        self.norms = nn.ModuleList([make[norm]() for _ in range(2)])
        self.up, self.down = nn.Linear(c, hidden), nn.Linear(hidden, c)
        self.last = make[norm]()
        self.head = nn.Linear(c, 11, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for norm in self.norms:
            x = x + self.down(F.gelu(self.up(norm(x))))
        return self.head(self.last(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("norm", "factor", "tied"),
    [
        ("rms", 1.5, False),
        ("implied", 1.5, True),
        ("written", 1.5, True),
        ("written", 2, True),
        ("around", 1.5, True),
        ("around", 2, True),
        ("layer", 1.5, True),
        ("layer", 2, False),
        ("bare", 1.5, False),
        ("bare", 1.5, True),
    ],
)
def test_norms_of_a_grown_stream_are_the_classes_own(norm: str, factor: float, tied: bool) -> None:
    model = made(lambda: Stream(norm, tied))
    growth = grown(model, [widen("./residual", factor)])
    if norm == "bare" and tied:  # the tie's factor has nowhere to go, nor has that of a norm without a weight
        assert growth.plan.constants
        torch.testing.assert_close(growth.module(TOKENS), model(TOKENS), rtol=LIMIT, atol=LIMIT)
        return
    assert growth.plan.constants == []
    compare(model, growth, Stream(norm, tied, c=int(8 * factor)))


class Plain(nn.Module):
    """A tie without a norm: what a factor of the table does to the stream, other weights take back."""

    def __init__(self, c: int = 8) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(11, c))
        self.up, self.down = nn.Linear(c, 6), nn.Linear(6, c)

    def forward(self, tokens: Tensor) -> Tensor:
        x = F.embedding(tokens, self.table)
        return (x + self.down(torch.relu(self.up(x)))) @ self.table.T


def test_a_tie_without_a_norm_takes_the_root() -> None:
    model = made(Plain)
    growth = grown(model, [widen("./residual")])
    assert growth.plan.constants == []
    assert growth.plan.tensors["table"].scale == pytest.approx(2**-0.5)
    compare(model, growth, Plain(16))


class Scaled(nn.Module):
    """An embedding that is multiplied by the root of its width: a literal, or a buffer that is not saved."""

    def __init__(self, buffer: bool, c: int = 16) -> None:
        super().__init__()
        self.buffer, self.c = buffer, c
        self.embed, self.norm, self.head = nn.Embedding(11, c), nn.LayerNorm(c), nn.Linear(c, 5)
        self.register_buffer("scale", torch.tensor(c**0.5), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) * (self.scale.to(self.embed.weight.dtype) if self.buffer else self.c**0.5)
        return self.head(self.norm(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize(("buffer", "factor"), [(False, 1.5), (True, 2)])
def test_multipliers_of_embeddings_follow_the_width(buffer: bool, factor: float) -> None:
    model = made(lambda: Scaled(buffer))
    growth = grown(model, [widen("embed.weight:1", factor)])
    assert growth.plan.constants == []
    compare(model, growth, Scaled(buffer, int(16 * factor)))


class Adapted(nn.Module):
    """A low-rank adapter, whose scale is alpha over the rank."""

    def __init__(self, rank: int = 2) -> None:
        super().__init__()
        self.rank, self.embed, self.base = rank, nn.Embedding(11, 8), nn.Linear(8, 6)
        self.a, self.b = nn.Linear(8, rank, bias=False), nn.Linear(rank, 6, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return self.base(x) + self.b(self.a(x)) * (3.0 / self.rank)  # type: ignore[no-any-return]


def test_the_scale_of_an_adapter_follows_its_rank() -> None:
    model = made(Adapted)
    growth = grown(model, [widen("a.weight:0")])
    assert growth.plan.constants == []
    compare(model, growth, Adapted(4))


class Product(nn.Module):
    """Two branches multiplied and summed over their units, of which copies count twice."""

    def __init__(self, hidden: int = 6) -> None:
        super().__init__()
        self.embed, self.a, self.b = nn.Embedding(11, 4), nn.Linear(4, hidden), nn.Linear(4, hidden)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return torch.einsum("bti,bti->bt", torch.tanh(self.a(x)), self.b(x))


def test_products_of_activations_go_into_the_side_that_is_linear() -> None:
    model = made(Product)
    growth = grown(model, [widen("a.weight:0")])
    assert growth.plan.constants == [] and growth.plan.tensors["b.bias"].scale == 0.5
    compare(model, growth, Product(12))


# what cannot be -------------------------------------------------------------------------------------------------------


class Shared(nn.Module):
    """Queries that are returned, too."""

    def __init__(self, d: int = 4) -> None:
        super().__init__()
        self.embed, self.q, self.k, self.v = nn.Embedding(11, 8), nn.Linear(8, d), nn.Linear(8, d), nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(tokens)
        q, k = torch.tanh(self.q(x)), torch.tanh(self.k(x))
        return F.scaled_dot_product_attention(q, k, self.v(x)), q.sum(-1)


def test_what_has_no_place_stays_in_the_graph_and_says_why() -> None:
    model = made(Shared)
    growth = grown(model, [widen("./head_dim")])
    assert {c.argument for c in growth.plan.constants} == {"scale", "other"}
    assert all("tanh" in c.why or "output" in c.why or "weight" in c.why for c in growth.plan.constants)
    for mine, theirs in zip(growth.module(TOKENS), model(TOKENS), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=LIMIT, atol=LIMIT)


ADDED: dict[str, Callable[[Tensor], Tensor]] = {
    "arange": lambda y: torch.arange(y.shape[0], dtype=y.dtype)[:, None],
    "linspace": lambda y: torch.linspace(1.0, 2.0, 3, dtype=y.dtype)[:, None],
    "ones": lambda y: torch.ones_like(y),
    "full": lambda y: y.new_full((1,), 2.0),
    "tensor": lambda y: torch.tensor(2.0, dtype=y.dtype),
    "eye": lambda y: torch.eye(3, dtype=y.dtype).sum(-1, keepdim=True),
    "mask": lambda y: (y > 0).to(y.dtype),
    "numbers": lambda y: torch.arange(3)[:, None].to(y.dtype),
    "signs": lambda y: y.detach().sign(),
    "range": lambda y: torch.zeros_like(y).exp(),
}


class Added(nn.Module):
    """A normed value and another one that no weight makes, summed with copies."""

    def __init__(self, what: str, size: int = 8) -> None:
        super().__init__()
        self.up, self.norm, self.out, self.what = nn.Linear(5, size), Rms(size), nn.Linear(size, 3), what

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.norm(self.up(x))
        y = y + ADDED[self.what](y)
        return self.out(y), y.sum(-1)


@pytest.mark.parametrize("what", ADDED)
def test_values_that_no_weight_makes_stay_what_they_are(what: str) -> None:
    torch.manual_seed(0)
    model, x = trained(Added(what).double()), torch.randn(3, 5, dtype=torch.float64)
    growth = fxgrow.grow(model, widen("up.weight:0"), (x,), verify=False)
    for mine, theirs in zip(growth.module(x), model(x), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=LIMIT, atol=LIMIT)


# what reads a value otherwise than by entries -------------------------------------------------------------------------

READ: dict[str, Callable[[Tensor], Tensor]] = {
    "no multiple of a number": lambda y: torch.add(y, 3.0, alpha=0),
    "read out": lambda y: y * y.mean().item(),
    "filled": lambda y: torch.zeros_like(y).fill_(y.mean()),
    "truth values times a size": lambda y: y * (1 + (y > 0) * 4.0),
    "whole numbers times a size": lambda y: y + torch.arange(y.shape[-1]) * 16,
}


class Read(nn.Module):
    """A product summed over its units, of which copies count twice; one side and the sum are read in some way."""

    def __init__(self, what: str, hidden: int = 16) -> None:
        super().__init__()
        self.a, self.b, self.out, self.what = nn.Linear(5, hidden), nn.Linear(5, hidden), nn.Linear(1, 3), what

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.a(x)) * READ[self.what](self.b(x))
        return self.out(READ[self.what](y.sum(-1, keepdim=True)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("what", READ)
def test_values_that_are_read_otherwise_keep_their_factor(what: str) -> None:
    torch.manual_seed(0)
    model, x = trained(Read(what).double()), torch.randn(3, 5, dtype=torch.float64)
    try:
        growth = fxgrow.grow(model, widen("a.weight:0"), (x,), verify=False)
    except FxgrowError:  # the analysis does not follow the units through it
        return
    for scale in (1.0, 100.0, -0.01):
        torch.testing.assert_close(growth.module(scale * x), model(scale * x), rtol=LIMIT, atol=LIMIT)


class Counted(nn.Module):
    """A number that a buffer holds, read as a whole one."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.out = nn.Linear(5, 16), nn.Linear(16, 3)
        self.register_buffer("k", torch.tensor(16.0, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.up(x)) * self.k.to(torch.int64))


def test_whole_numbers_out_of_a_buffer_are_no_constants_of_a_size() -> None:
    torch.manual_seed(0)
    model, x = trained(Counted().double()), torch.randn(3, 5, dtype=torch.float64)
    growth = fxgrow.grow(model, widen("up.weight:0"), (x,), verify=False)
    torch.testing.assert_close(growth.module(x), model(x), rtol=LIMIT, atol=LIMIT)


# afterwards -----------------------------------------------------------------------------------------------------------


def test_growths_on_top_of_each_other() -> None:
    model = made(lambda: Attending("fused"))
    growth = grown(model, [widen("./head_dim"), widen("./value_dim"), widen("./residual"), widen("./head_dim", 1.5)])
    assert growth.plan.constants == []
    wanted = model(TOKENS)
    torch.testing.assert_close(growth.module(TOKENS), wanted, rtol=LIMIT, atol=LIMIT)
    again = fxgrow.grow(growth.module, [widen("./heads")], (TOKENS,), verify=False)
    assert again.plan.constants == []
    torch.testing.assert_close(again.module(TOKENS), wanted, rtol=LIMIT, atol=LIMIT)


def test_a_constant_that_was_kept_is_folded_by_a_later_growth() -> None:
    model = made(Attending)
    first = grown(model, [widen("./head_dim", constants="keep")])
    second = fxgrow.grow(first.module, [widen("./value_dim")], (TOKENS,), verify=False)
    assert second.plan.constants == []
    larger = Attending(d=8).double()
    larger.load_state_dict(second.module.state_dict())
    torch.testing.assert_close(larger(TOKENS), model(TOKENS), rtol=LIMIT, atol=LIMIT)


def test_the_receipt_verifies_what_was_folded() -> None:
    model = made(lambda: Stream("written", True))
    operations = [widen("./residual", 1.5), widen("./hidden")]
    receipt = fxgrow.grow(model, operations, (TOKENS,), verify="float64").receipt
    assert receipt.error_float64 is not None and receipt.error_float64 < LIMIT and receipt.constants == []


def test_norms_around_one_grow_again_and_deepen() -> None:
    model = made(lambda: Stream("around", True))
    growth = grown(model, [widen("./residual"), widen("./residual", 1.5), widen("./hidden")])
    assert growth.plan.constants == [] and growth.plan.tensors["last.weight"].shift != 0.0
    compare(model, growth, Stream("around", True, c=24, hidden=24))
    kept = grown(model, [widen("./residual", constants="keep")])
    optimizer = torch.optim.AdamW(model.parameters())
    assert kept.carry(optimizer, policy="exact")
    with pytest.raises(FxgrowError, match="constants: keep"):
        growth.carry(optimizer, policy="exact")


@pytest.mark.parametrize("kind", ["fused", "grouped"])
def test_exact_steps_go_on_with_folded_weights(kind: str) -> None:
    model = made(lambda: Attending(kind))
    small = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    target = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def steps(module: nn.Module, optimizer: torch.optim.Optimizer, n: int) -> list[float]:
        losses = []
        for _ in range(n):
            optimizer.zero_grad()
            loss = (module(TOKENS) - target).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(float(loss))
        return losses

    steps(model, small, 3)
    growth = fxgrow.grow(model, [widen("./head_dim"), widen("./value_dim")], (TOKENS,), verify=False)
    carried = growth.carry(small, policy="exact")
    wanted = steps(model, small, 20)
    assert steps(growth.module, carried, 20) == pytest.approx(wanted, rel=1e-9)


def test_a_wanted_number_is_reached_by_folding() -> None:
    model = made(lambda: Attending("rotary", "given"))
    program = fxgrow.capture(model, (TOKENS,))
    state = State.start(program)
    (step,) = run_operation(state, Widen(axis="./heads", factor=2))
    node = next(n for n in state.graph.nodes if "attention" in n.name)
    assert fold(state, step, node, "scale", 0.123) and node.kwargs["scale"] == 0.123
    assert remaining(state) == []
    assert state.tensors["q.weight"].scale == pytest.approx(0.5 / 0.123)
    assert state.tensors["q.weight"].gradient_scale == pytest.approx(0.123 / 0.5)


def test_what_cannot_be_reached_leaves_all_as_it_was() -> None:
    program = fxgrow.capture(made(Shared), (TOKENS,))
    state = State.start(program)
    (step,) = run_operation(state, Widen(axis="./rank", factor=2))
    before = {n: t.model_dump_json() for n, t in state.tensors.items()}
    node = next(n for n in state.graph.nodes if "attention" in n.name)
    assert not fold(state, step, node, "scale", 0.123)
    assert {n: t.model_dump_json() for n, t in state.tensors.items()} == before and "scale" not in node.kwargs
    (left,) = remaining(state)
    assert left.own == 0.123 and left.value is None


def test_plans_round_trip_with_their_constants() -> None:
    program = fxgrow.capture(made(Shared), (TOKENS,))
    plan, _ = plan_growth(program, GrowthSpec.parse([widen("./head_dim")]))
    again = type(plan).from_json(plan.to_json())
    assert again.constants == plan.constants and len(plan.constants) == 2
    tensors = dict(materialise_all(again, program.tensor))
    assert tensors["q.weight"].shape == (8, 8)


@pytest.mark.parametrize(
    "later",
    [
        widen("a.weight:0", 1.5),
        {"op": "insert", "after": "norm", "layer": "linear"},
        {"op": "lora", "modules": "*", "rank": 2},
    ],
)
def test_what_was_left_at_one_op_is_not_taken_for_others(later: dict[str, Any]) -> None:
    model = made(Unscaled)
    x = torch.randn(3, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    first = fxgrow.grow(model, {"op": "widen", "axis": "a.weight:0", "by": 2}, (x,))
    assert [c.argument for c in first.plan.constants] == ["other"]
    second = fxgrow.grow(first.program, [later, {"op": "widen", "axis": "a.weight:0", "by": 3}])
    assert torch.allclose(second.module(x), model(x), rtol=0, atol=1e-12)
    scaled = [n for n in second.program.graph.nodes if info_of(n).rescale]
    assert all("mul" in str(n.target) and type(n.args[1]) is float for n in scaled)
