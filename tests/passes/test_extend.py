"""``extend``: old inputs keep their outputs to 1e-12 in float64, new entries follow, and longer inputs run."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxgrow
from fxgrow.plan import GrowthPlan
from tests.models import assert_same, small_gpt, tokens, trained

V, N, D = 11, 12, 8


def ids(batch: int = 3, length: int = 7, seed: int = 0, high: int = V) -> Tensor:
    return torch.randint(high, (batch, length), generator=torch.Generator().manual_seed(seed))


def old_part(new: Tensor, old: Tensor) -> Tensor:
    return new[tuple(slice(0, n) for n in old.shape)]


def check(
    model: nn.Module, spec: dict[str, Any], args: tuple[Any, ...], others: tuple[tuple[Any, ...], ...] = ()
) -> fxgrow.Growth:
    """Grow, and compare the old part of every output on the example and on inputs of other sizes."""
    growth = fxgrow.grow(model, {"op": "extend", **spec}, args)
    assert growth.receipt.exactness == "exact"
    assert growth.receipt.error_float64 is not None and growth.receipt.error_float64 <= 1e-12
    assert growth.receipt.gradient_error is not None and growth.receipt.gradient_error <= 1e-12
    assert growth.receipt.dead_parameters == []
    model.eval()
    growth.module.eval()
    for given in (args, *others):
        with torch.no_grad():
            old, new = model(*given), growth.module(*given)
        for a, b in zip(*([x] if isinstance(x, Tensor) else x for x in (old, new)), strict=True):
            if a is None:
                continue
            assert float((old_part(b, a) - a).abs().max()) <= 1e-12
            assert bool(torch.isfinite(b).all())
    return growth


def refused(model: nn.Module, spec: dict[str, Any], args: tuple[Any, ...], why: str) -> None:
    with pytest.raises(fxgrow.GrowthRefused, match=why):
        fxgrow.grow(model, {"op": "extend", **spec}, args)


def build(model: nn.Module) -> nn.Module:
    return trained(model.double()).eval()


# vocabularies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["mean", "zero", "random"])
def test_tied_vocabulary(init: str) -> None:
    model, (x, _) = small_gpt(), tokens()
    growth = check(model, {"axis": "*/vocab", "by": 7, "init": init, "seed": 3}, (x,), ((tokens(4, 2, 9)[0],),))
    old, new = model.state_dict()["transformer.wte.weight"], growth.module.state_dict()["transformer.wte.weight"]
    assert new.shape == (57, 32)
    assert torch.equal(new[:50], old)
    if init == "mean":
        assert float((new[50:] - old.mean(0)).abs().max()) <= 1e-12
    elif init == "zero":
        assert not new[50:].any()
    else:
        assert 0.5 < float(new[50:].std() / old.std()) < 1.5 and new[50:].unique().numel() > 100
    assert growth.module(torch.full((2, 3), 56))[0].shape == (2, 1, 57)
    assert growth.module.lm_head.weight is growth.module.transformer.wte.weight  # type: ignore[union-attr]


class Untied(nn.Module):
    """Embedding with a padding row, head with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(V, D, padding_idx=V - 1), nn.Linear(D, V)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(x)))


def test_untied_vocabulary() -> None:
    growth = check(build(Untied()), {"axis": "*/vocab", "to": 16}, (ids(),))
    state = growth.module.state_dict()
    assert [list(state[n].shape) for n in state] == [[16, D], [16, D], [16]]
    assert torch.allclose(state["head.bias"][V:], state["head.bias"][:V].mean())
    x = torch.full((2, 3), V - 1)
    growth.module(x).sum().backward()
    assert growth.module.embed.weight.grad.abs().sum() == 0, "the padding row is still the padding row"  # type: ignore[union-attr]


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_the_padding_row_of_a_bag_is_still_the_same_where_it_is_counted_from_the_end(mode: str) -> None:
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.out = nn.Parameter(torch.randn(V, D)), nn.Linear(D, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(F.embedding_bag(x, self.table, mode=mode, padding_idx=-2))

    rows = torch.tensor([[V - 2, 1, V - 1], [V - 2, V - 2, 0], [3, 4, 5]])
    check(build(Bag()), {"axis": "table:0", "by": 3}, (rows,), ((ids(),),))


def test_only_what_is_named_grows() -> None:
    growth = check(build(Untied()), {"axis": "head/*", "factor": 2}, (ids(),))
    assert list(growth.module.state_dict()["embed.weight"].shape) == [V, D]
    assert growth.module(ids()).shape == (3, 7, 2 * V)


def test_one_hot_is_a_table() -> None:
    class OneHot(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(V, D, dtype=torch.float64), nn.Linear(D, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.up(F.one_hot(x, V).to(torch.float64)).relu())

    growth = check(build(OneHot()), {"axis": "up.weight:1", "by": 3}, (ids(),))
    assert bool(torch.isfinite(growth.module(ids(high=V + 3))).all())


def test_classes_of_a_head() -> None:
    model = build(nn.Sequential(nn.Linear(4, D), nn.ReLU(), nn.Linear(D, 5)))
    growth = check(model, {"axis": "2.weight:0", "by": 2}, (torch.randn(3, 4).double(),))
    assert growth.plan.steps[0].outputs[0].model_dump() == {"output": 0, "dim": 1, "old": 5, "new": 7}


def test_classes_beside_as_many_entries_as_an_input_has() -> None:
    """How many old entries there are hangs on the input, which no plan can say."""

    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(3, 5))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x.t(), self.table.tanh()], 1)

    x = torch.randn(4, 3).double()
    refused(build(Beside()), {"axis": "table:1", "by": 1}, (x,), "output 0 .* as many entries as an input has")


def test_codebooks_that_share_one_projection() -> None:
    """The vocabulary is the inner factor of the projection's rows: new rows lie between old ones there."""

    class Codebooks(nn.Module):
        def __init__(self, flat: bool = False) -> None:
            super().__init__()
            self.up, self.head, self.flat = nn.Linear(4, D), nn.Linear(D, 3 * V), flat

        def forward(self, x: Tensor) -> Any:
            y = self.head(self.up(x).relu())
            books = y.view(x.shape[0], 3, V)
            return (books, books.transpose(1, 2).reshape(x.shape[0], V * 3), y) if self.flat else books

    x = torch.randn(2, 4).double()
    model = build(Codebooks())
    axis = next(a.name for a in fxgrow.capture(model, (x,)).axes if a.size == V)
    growth = check(model, {"axis": axis, "by": 2}, (x,))
    assert growth.module(x).shape == (2, 3, V + 2)
    refused(build(Codebooks(flat=True)), {"axis": axis, "by": 2}, (x,), "output 2 .* between old ones")


# losses and other ops over the vocabulary -----------------------------------------------------------------------------


class Over(nn.Module):
    """Logits, and something computed of them."""

    def __init__(self, f: Callable[..., Any]) -> None:
        super().__init__()
        self.embed, self.head, self.f = nn.Embedding(V, D), nn.Linear(D, V), f

    def forward(self, x: Tensor) -> Any:
        logits = self.head(self.embed(x))
        return logits, self.f(logits, x, self)


OVER: dict[str, tuple[Callable[..., Any], str]] = {
    "cross entropy": (lambda y, x, m: F.cross_entropy(y.flatten(0, 1), x.flatten()), "cross_entropy_loss"),
    "softmax": (lambda y, x, m: y.softmax(-1), "softmax"),
    "log softmax": (lambda y, x, m: y.log_softmax(-1).gather(-1, x[..., None]), "log_softmax"),
    "argmax": (lambda y, x, m: y.argmax(-1), "argmax"),
    "topk": (lambda y, x, m: y.topk(2, -1)[0], "topk"),
    "logsumexp": (lambda y, x, m: y.logsumexp(-1), "logsumexp"),
    "sum": (lambda y, x, m: y.sum(-1), "sum"),
    "mean of squares": (lambda y, x, m: y.square().mean(), "mean"),
    "extremum": (lambda y, x, m: y.amax(-1), "amax"),
}


@pytest.mark.parametrize("name", OVER)
def test_what_runs_over_the_vocabulary(name: str) -> None:
    f, op = OVER[name]
    model = build(Over(f))
    with pytest.raises(fxgrow.GrowthRefused, match=rf"{op}.*test_extend.py.*preserve: approximate"):
        fxgrow.grow(model, {"op": "extend", "axis": "head.weight:0", "by": 3}, (ids(),))
    growth = fxgrow.grow(model, {"op": "extend", "axis": "head.weight:0", "by": 3, "preserve": "approximate"}, (ids(),))
    assert growth.receipt.exactness == growth.plan.exactness == "approximate"
    assert growth.receipt.error_float64 is not None and growth.receipt.error_float64 <= 1e-12
    assert growth.receipt.gradient_error is not None and growth.receipt.gradient_error <= 1e-12
    first, second = growth.receipt.outputs
    assert (first.changed, second.changed) == (False, True)
    assert growth.plan.steps[0].changed_outputs == [1]
    assert torch.allclose(growth.module(ids())[0][..., :V], model(ids())[0], atol=1e-12, rtol=0)


def test_nothing_is_left_exact_where_probabilities_feed_the_model() -> None:
    class Fed(Untied):
        def forward(self, x: Tensor) -> Tensor:
            mixed = super().forward(x).softmax(-1) @ self.embed.weight
            return self.head(mixed)

    refused(build(Fed()), {"axis": "*/vocab", "by": 3}, (ids(),), "softmax")
    refused(build(Fed()), {"axis": "*/vocab", "by": 3, "preserve": "approximate"}, (ids(),), "every output")


def test_entries_read_one_by_one_are_exact() -> None:
    """A sum of gates times weights: new weights that are read start at zero, whatever the init."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head, self.back = nn.Embedding(V, D), nn.Linear(D, V), nn.Linear(V, D)

        def forward(self, x: Tensor) -> Any:
            y = self.head(self.embed(x))
            return y, self.back(y.sigmoid())

    growth = check(build(Gated()), {"axis": "*/vocab*", "by": 3}, (ids(),))
    assert not growth.module.state_dict()["back.weight"][:, V:].any()


def test_class_weights_cannot_follow() -> None:
    class Weighted(Untied):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("weights", torch.rand(V))

        def forward(self, x: Tensor) -> Any:
            y = super().forward(x)
            return y, F.cross_entropy(y.flatten(0, 1), x.flatten(), weight=self.weights)

    refused(build(Weighted()), {"axis": "*/vocab", "by": 3, "preserve": "approximate"}, (ids(),), "cross_entropy_loss")


def test_several_calls() -> None:
    model, (x, y) = small_gpt(), tokens()
    spec = {"op": "extend", "axis": "*/vocab", "by": 5, "preserve": "approximate"}
    growth = fxgrow.grow(model, spec, calls={"train": (x, y), "generate": (x,)})
    assert growth.plan.steps[0].changed_outputs == [1]
    assert [o.output for o in growth.plan.steps[0].outputs] == [0, 2]
    assert float((growth.module(x)[0][..., :50] - model(x)[0]).detach().abs().max()) <= 1e-12
    assert growth.module(x, y + 5)[1].isfinite()


def test_a_norm_over_the_vocabulary_is_refused_even_as_approximate() -> None:
    class Normed(Untied):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(V)

        def forward(self, x: Tensor) -> Any:
            return self.norm(super().forward(x))

    for preserve in ("exact", "approximate"):
        spec = {"axis": "head.weight:0", "by": 3, "preserve": preserve}
        refused(build(Normed()), spec, (ids(),), "layer_norm.*normalises over these units")


# positions ------------------------------------------------------------------------------------------------------------


def longer(growth: fxgrow.Growth, *args: Any) -> None:
    """More positions than the old model has; every new row gets a gradient."""
    with torch.enable_grad():
        out = growth.module(*args)
        total = sum((t.square().sum() for t in ([out] if isinstance(out, Tensor) else out)), torch.zeros(()))
        assert bool(torch.isfinite(total))
        total.backward()
    for name, p in growth.module.named_parameters():
        if growth.plan.tensors[name].appended == [0]:
            new = torch.from_numpy(growth.plan.tensors[name].dims[0].index < 0)  # type: ignore[union-attr]
            assert p.grad is not None and bool((p.grad[new] != 0).flatten(1).any(1).all()), name


@pytest.mark.parametrize("flash", [True, False])
def test_positions_of_a_gpt(flash: bool) -> None:
    model, args = small_gpt(flash=flash), tokens()
    growth = check(model, {"axis": "*/positions", "factor": 2}, args, (tokens(3, 2, 11),))
    longer(growth, *tokens(5, 2, 24))
    larger = small_gpt(flash=flash, block_size=24)
    larger.load_state_dict(growth.module.state_dict(), strict=True)
    x = tokens(6, 2, 24)
    assert float((larger.eval()(*x)[0] - growth.module.eval()(*x)[0]).detach().abs().max()) <= 1e-12


class Positions(nn.Module):
    """A table, position numbers and a mask in buffers, and how they are used."""

    def __init__(self, use: Callable[[Any, Tensor], Tensor], rows: int = N, mask: Tensor | None = None) -> None:
        super().__init__()
        self.embed, self.table, self.mix = nn.Embedding(V, D), nn.Embedding(rows, D), nn.Linear(D, D)
        self.register_buffer("numbers", torch.arange(N)[None])
        self.register_buffer("mask", torch.ones(N, N).tril()[None] if mask is None else mask, persistent=False)
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x) + self.use(self, x)
        t = x.shape[1]
        scores = (h @ h.transpose(-1, -2)).masked_fill(self.mask[:, :t, :t] == 0, -1e9)
        return self.mix(scores.softmax(-1) @ h)


USES: dict[str, tuple[Callable[[Any, Tensor], Tensor], int]] = {
    "arange": (lambda m, x: m.table(torch.arange(x.shape[1])), N),
    "numbers in a buffer": (lambda m, x: m.table(m.numbers[:, : x.shape[1]]), N),
    "offset by two": (lambda m, x: m.table(torch.arange(x.shape[1]) + 2), N + 2),
    "counted by a cumulative sum": (lambda m, x: m.table((x >= 0).long().cumsum(1) - 1), N),
    "padding, then counted": (lambda m, x: m.table(x.ne(0).long().cumsum(1) * x.ne(0) + 1), N + 2),
    "sliced": (lambda m, x: m.table.weight[: x.shape[1]], N),
    "indexed": (lambda m, x: m.table.weight[torch.arange(x.shape[1])], N),
    "selected": (lambda m, x: m.table.weight.index_select(0, torch.arange(x.shape[1])), N),
}


@pytest.mark.parametrize("name", USES)
def test_ways_of_looking_positions_up(name: str) -> None:
    use, rows = USES[name]
    growth = check(build(Positions(use, rows)), {"axis": "table.weight:0", "by": 5}, (ids(),), ((ids(2, N),),))
    state = dict(growth.module.named_buffers())
    assert torch.equal(state["mask"][0], torch.ones(N + 5, N + 5, dtype=torch.float64).tril())
    longer(growth, ids(2, N + 5, high=V - 1) + 1)
    if name == "numbers in a buffer":
        assert torch.equal(state["numbers"], torch.arange(N + 5)[None])


MASKS = {
    "triangle": torch.ones(N, N).tril(),
    "booleans": torch.ones(N, N).tril().bool(),
    "window": torch.ones(N, N).tril().triu(-3),
    "band": torch.ones(N, N).tril(2).triu(-3),
    "all": torch.ones(N, N),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_go_on(name: str) -> None:
    mask = MASKS[name][None]
    growth = check(build(Positions(USES["arange"][0], N, mask)), {"axis": "table.weight:0", "by": 9}, (ids(),))
    made = dict(growth.module.named_buffers())["mask"][0]
    big = torch.ones(N + 9, N + 9)
    wanted = {
        "triangle": big.tril(),
        "booleans": big.tril().bool(),
        "window": big.tril().triu(-3),
        "band": big.tril(2).triu(-3),
        "all": big,
    }[name]
    assert torch.equal(made, wanted.to(made.dtype))
    longer(growth, ids(2, N + 9))


def test_an_example_of_the_full_length_fixes_nothing() -> None:
    growth = check(build(Positions(USES["arange"][0])), {"axis": "*/positions", "by": 3}, (ids(3, N),), ((ids(2, 5),),))
    longer(growth, ids(2, N + 3))


def test_a_length_that_the_model_fixes() -> None:
    model = build(Positions(lambda m, x: m.table(torch.arange(N))))
    refused(model, {"axis": "*/positions", "by": 3}, (ids(3, N),), "capture with another length")


def test_a_buffer_without_a_pattern_is_refused_by_name() -> None:
    mask = torch.rand(1, N, N).round()
    refused(build(Positions(USES["arange"][0], N, mask)), {"axis": "*/positions", "by": 3}, (ids(),), "buffer mask")


@pytest.mark.parametrize(
    ("use", "why"),
    [
        (lambda m, x: m.table.weight[-x.shape[1] :], "from its end|from the end|dynamic"),
        (lambda m, x: m.table(torch.arange(x.shape[1]).clamp(max=4)), "never looks beyond entry 4"),
        (lambda m, x: m.table.weight[torch.arange(x.shape[1]) - 3], "may be negative"),
        (lambda m, x: m.table.weight.flip(0)[: x.shape[1]], "reversed"),
        (lambda m, x: m.table.weight.softmax(0)[: x.shape[1]], "softmax"),
        (lambda m, x: m.table(torch.arange(x.shape[1])) + m.table.weight.mean(0), "mean"),
        (
            lambda m, x: m.table(torch.arange(x.shape[1])) + torch.ones(N, D).cumsum(0)[: x.shape[1]],
            "a size of its own",
        ),
    ],
)
def test_positions_that_cannot_be_appended(use: Callable[[Any, Tensor], Tensor], why: str) -> None:
    refused(build(Positions(use)), {"axis": "table.weight:0", "by": 3}, (ids(),), why)


@pytest.mark.parametrize("at", [3, -1])
def test_an_entry_that_is_picked_by_itself(at: int) -> None:
    rows = 70
    model = build(Positions(lambda m, x: m.table(torch.arange(x.shape[1])) + m.table.weight[at], rows))
    if at < 0:
        refused(model, {"axis": "table.weight:0", "by": 3}, (ids(),), "from the end")
    else:
        check(model, {"axis": "table.weight:0", "by": 3}, (ids(),))
    few = build(Positions(lambda m, x: m.table(torch.arange(x.shape[1])) + m.table.weight[at]))
    with pytest.raises(fxgrow.SpecError, match="used one by one"):
        fxgrow.grow(few, {"op": "extend", "axis": "table.weight:0", "by": 3}, (ids(),))


def test_a_table_added_whole_is_refused() -> None:
    class Patches(nn.Module):
        """A fixed number of tokens, as in a vision transformer."""

        def __init__(self) -> None:
            super().__init__()
            self.patch, self.table = nn.Conv2d(3, D, 2, 2), nn.Parameter(torch.zeros(1, 4, D))
            self.head = nn.Linear(D, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.patch(x).flatten(2).transpose(1, 2) + self.table
            return self.head(F.scaled_dot_product_attention(h, h, h).mean(1))

    x = torch.randn(2, 3, 4, 4).double()
    refused(build(Patches()), {"axis": "table:1", "by": 3}, (x,), "cannot extend")


def test_a_relative_index_with_fixed_numbers_is_refused() -> None:
    class Relative(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.zeros(2 * N - 1, 2))
            at = torch.arange(N)
            self.register_buffer("index", at[:, None] - at[None] + N - 1)

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.table[self.index].sum(-1)

    refused(build(Relative()), {"axis": "table:0", "by": 3}, (torch.randn(2, N).double(),), "never looks beyond")


# rotary and sinusoidal tables -----------------------------------------------------------------------------------------


def rotary(width: int, length: int, base: float, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    frequencies = 1.0 / (base ** (torch.arange(0, width, 2, dtype=dtype) / width))
    angles = torch.outer(torch.arange(length, dtype=dtype), frequencies)
    return torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()


class Rotary(nn.Module):
    def __init__(self, base: float = 10000.0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(V, D), nn.Linear(D, V)
        cos, sin = rotary(D, N, base, dtype)
        self.register_buffer("cos", cos[None], persistent=False)
        self.register_buffer("sin", sin[None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        t = x.shape[1]
        turned = torch.cat([-h[..., D // 2 :], h[..., : D // 2]], -1)
        q = h * self.cos[:, :t] + turned * self.sin[:, :t]
        return self.head(F.scaled_dot_product_attention(q, q, h, is_causal=True))


@pytest.mark.parametrize("base", [10000.0, 500000.0, 777.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rotary_tables_go_on(base: float, dtype: torch.dtype) -> None:
    growth = check(build(Rotary(base, dtype)), {"axis": "cos:1", "to": 20}, (ids(),), ((ids(2, N),),))
    assert {a.name for a in growth.plan.axes} == {"cos:1", "sin:1"}
    cos, sin = rotary(D, 20, base, dtype)
    made = dict(growth.module.named_buffers())
    tolerance = 4 * torch.finfo(dtype).eps * 20
    assert float((made["cos"][0] - cos).abs().max()) <= tolerance
    assert float((made["sin"][0] - sin).abs().max()) <= tolerance
    longer(growth, ids(2, 20))


def test_sinusoidal_positions_go_on() -> None:
    def table(length: int) -> Tensor:
        position = torch.arange(length)[:, None].float()
        rate = torch.exp(torch.arange(0, D, 2).float() * (-math.log(10000.0) / D))
        out = torch.zeros(length, D)
        out[:, 0::2], out[:, 1::2] = torch.sin(position * rate), torch.cos(position * rate)
        return out[None]

    class Sinusoidal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(V, D), nn.Linear(D, V)
            self.register_buffer("table", table(N))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.embed(x) + self.table[:, : x.shape[1]])

    growth = check(build(Sinusoidal()), {"axis": "table:1", "to": 40}, (ids(),))
    assert float((growth.module.state_dict()["table"] - table(40)).abs().max()) <= 1e-5
    longer(growth, ids(2, 40))


# with everything else -------------------------------------------------------------------------------------------------

ALL = [
    {"op": "extend", "axis": "*/vocab", "by": 3},
    {"op": "widen", "axis": "*/residual", "to": 48},
    {"op": "extend", "axis": "*/positions", "by": 4},
    {"op": "deepen", "stack": "transformer.h", "by": 1},
    {"op": "widen", "axis": "*/heads", "factor": 2},
    {"op": "extend", "axis": "*/positions", "by": 5},
    {"op": "extend", "axis": "*/vocab", "to": 60, "init": "zero"},
]


def test_with_the_other_operations_through_json_and_a_checkpoint(tmp_path: Any) -> None:
    model, (x, _) = small_gpt(flash=False), tokens()
    growth = fxgrow.grow(model, ALL, (x,))
    assert growth.receipt.error_float64 is not None and growth.receipt.error_float64 <= 1e-11
    assert growth.receipt.outputs[0].shape == [3, 1, 50]
    longer = tokens(7, 2, 21)[0]
    with torch.no_grad():
        out = growth.module.eval()(longer)[0]
        assert out.shape == (2, 1, 60)
    plan = GrowthPlan.from_json(growth.plan.to_json())
    assert plan.to_json() == growth.plan.to_json()
    fxgrow.save(growth, tmp_path / "big")
    loaded = fxgrow.load(tmp_path / "big")
    with torch.no_grad():
        assert_same(loaded.module.eval()(longer)[0], out)
    again = fxgrow.grow(loaded.module, {"op": "extend", "axis": "*/positions", "by": 2}, (x,))
    assert again.receipt.error_float64 is not None and again.receipt.error_float64 <= 1e-12
    assert again.module(tokens(7, 2, 23)[0])[0].shape == (2, 1, 60)


@pytest.mark.parametrize("policy", ["asymmetric", "copy", "exact", "reset"])
def test_the_optimizer_comes_along(policy: str) -> None:
    model, (x, y) = small_gpt(), tokens()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(x, y)[1].backward()
        optimizer.step()
    growth = fxgrow.grow(model, [ALL[0], ALL[2]], (x,))
    carried = growth.carry(optimizer, policy=policy)
    name = "transformer.wte.weight"
    before, after = optimizer.state[model.get_parameter(name)], carried.state[growth.module.get_parameter(name)]
    if policy != "reset":
        assert torch.equal(after["exp_avg"][:50], before["exp_avg"])
        assert torch.equal(after["exp_avg_sq"][:50], before["exp_avg_sq"])
        assert not after["exp_avg"][50:].any()
    # a loss over the old tokens alone: the small model's trajectory goes on, with every policy that keeps it
    for _ in range(3):
        for module, one in ((model, optimizer), (growth.module, carried)):
            one.zero_grad()
            F.cross_entropy(module(x)[0][:, -1, :50], y[:, -1]).backward()
            one.step()
    error = float((growth.module.get_parameter(name)[:50] - model.get_parameter(name)).detach().abs().max())
    assert (error <= 1e-12) == (policy != "reset")


def test_a_schedule_extends() -> None:
    model, (x, y) = small_gpt(), tokens()
    schedule = {
        "version": 1,
        "growths": [
            {
                "trigger": {"step": 1},
                "operations": [
                    {"op": "extend", "axis": "*/vocab", "by": 6, "preserve": "approximate"},
                    {"op": "extend", "axis": "*/positions", "factor": 2},
                ],
            }
        ],
    }
    scheduler = fxgrow.GrowthScheduler(schedule, args=(x, y))
    module: nn.Module = model
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(4):
        while event := scheduler.step(module, optimizer, step=step):
            module, optimizer = event.module, event.optimizer
        data = tokens(step, 2, 7) if step < 2 else tokens(step, 2, 20, vocab=56)
        loss = module(*data)[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert bool(torch.isfinite(loss))
    assert list(module.state_dict()["transformer.wte.weight"].shape) == [56, 32]


def test_a_plan_without_values_does_not_guess() -> None:
    with torch.device("meta"):
        model = small_gpt_on_meta()
    x = torch.zeros(2, 7, dtype=torch.long, device="meta")
    plan, _ = fxgrow.plan_growth(
        fxgrow.capture(model, (x,)), fxgrow.GrowthSpec.parse({"op": "extend", "axis": "*/positions", "by": 4})
    )
    mask = plan.tensors["transformer.h.0.attn.mask"]
    assert mask.shape == [1, 1, 16, 16]
    from fxgrow.weights.materialise import materialise_tensor

    with pytest.raises(fxgrow.GrowthRefused, match="plan again"):
        materialise_tensor(mask, torch.ones(1, 1, 12, 12))


def small_gpt_on_meta() -> nn.Module:
    from examples.gpt.model import GPT, GPTConfig

    return GPT(GPTConfig(vocab_size=50, block_size=12, n_layer=1, n_head=2, n_embd=16, flash=False))


# what is refused otherwise --------------------------------------------------------------------------------------------


def test_axes_that_widen_is_for() -> None:
    model, (x, _) = small_gpt(), tokens()
    refused(model, {"axis": "*/hidden", "factor": 2}, (x,), "widen grows it")
    with pytest.raises(fxgrow.SpecError, match="exactly one of"):
        fxgrow.grow(model, {"op": "extend", "axis": "*/vocab"}, (x,))
    with pytest.raises(fxgrow.SpecError, match="shrink"):
        fxgrow.grow(model, {"op": "extend", "axis": "*/vocab", "to": 3}, (x,))
    with pytest.raises(fxgrow.SpecError, match="no such field"):
        fxgrow.grow(model, {"op": "extend", "axis": "*/vocab", "by": 3, "fill": "copy"}, (x,))


def test_inputs_are_refused() -> None:
    model = build(nn.Sequential(nn.Linear(4, D), nn.ReLU(), nn.Linear(D, 5)))
    refused(model, {"axis": "0.weight:1", "by": 2}, (torch.randn(3, 4).double(),), "dim 1 of the input")


def test_inspect_says_that_extend_can() -> None:
    model, (x, y) = small_gpt(), tokens()
    assert "widen cannot grow it; extend can:" in fxgrow.explain(fxgrow.capture(model, (x,)), "*/vocab")
    said = fxgrow.explain(fxgrow.capture(model, (x, y)), "*/vocab")
    assert "extend can with preserve: approximate" in said and "cross_entropy_loss" in said
    linear = build(nn.Sequential(nn.Linear(4, D), nn.ReLU(), nn.Linear(D, 5)))
    program = fxgrow.capture(linear, (torch.randn(3, 4).double(),))
    assert "extend cannot grow it either" in fxgrow.explain(program, "0/inputs")


def test_probabilities_as_targets_cannot_follow() -> None:
    class Soft(Untied):
        def forward(self, x: Tensor, target: Tensor) -> Any:  # type: ignore[override]
            y = super().forward(x)
            return y, F.cross_entropy(y.flatten(0, 1), target)

    target = torch.rand(21, V).double()
    spec = {"axis": "head.weight:0", "by": 3, "preserve": "approximate"}
    refused(build(Soft()), spec, (ids(), target), "cross_entropy_loss")


def test_the_tightest_of_several_look_ups_decides() -> None:
    def use(m: Any, x: Tensor) -> Tensor:
        at = torch.arange(x.shape[1])
        return m.table(at) + m.table(at + 2)

    growth = check(build(Positions(use, N + 2)), {"axis": "table.weight:0", "by": 5}, (ids(),), ((ids(2, N),),))
    assert {a.new for a in growth.plan.axes} == {N + 5, N + 7}
    longer(growth, ids(2, N + 5))
