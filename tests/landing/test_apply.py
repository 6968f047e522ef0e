"""Growing the user's own model in place."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import fxgrow
from tests.models import relative_error, small_cnn, small_gpt, tokens, trained


def widen(axis: str, factor: float = 2) -> dict[str, Any]:
    return {"op": "widen", "axis": axis, "factor": factor}


@pytest.mark.parametrize(
    "spec",
    [
        [widen("*/hidden")],
        [widen("*/heads")],
        [widen("*/residual", 1.5), widen("*/heads")],
        [{"op": "deepen", "stack": "transformer.h", "by": 2}, widen("*/hidden")],
        [{"op": "extend", "axis": "*/positions", "by": 4}],
    ],
    ids=lambda s: "-".join(o["op"] for o in s),
)
def test_a_gpt_stays_the_class_it_is(spec: list[dict[str, Any]]) -> None:
    model = small_gpt()
    before = copy.deepcopy(model)
    growth = fxgrow.grow(model, spec, tokens())
    assert growth.apply_(model) is model
    assert relative_error(before, model, tokens(3)) <= 1e-12
    assert all(p is dict(growth.module.named_parameters())[n] for n, p in model.named_parameters())
    assert model.transformer.wte.weight is model.lm_head.weight
    config = model.config
    assert config.n_layer == len(model.transformer.h)
    assert (
        model.transformer.h[0].mlp.c_fc.out_features
        == config.n_hidden
        == model.transformer.h[0].mlp.c_fc.weight.shape[0]
    )
    assert model.transformer.h[0].attn.n_head == config.n_head
    rebuilt = type(model)(config).double()  # the config is that of the grown model
    rebuilt.load_state_dict(model.state_dict())
    if "residual" not in str(spec):  # there eps is kept in the modules
        assert relative_error(before, rebuilt, tokens(3)) <= 1e-12


def test_convolutions_and_a_chain() -> None:
    model = small_cnn()
    before, x = copy.deepcopy(model).eval(), (torch.randn(3, 3, 8, 8, dtype=torch.float64),)
    names = [a.name for a in fxgrow.capture(model, x).axes if a.growable]
    growth = fxgrow.grow(model, [widen(n) for n in names], x)
    growth.apply_(model)
    assert (model[0].out_channels, model[1].num_features, model[4].in_channels, model[9].in_features) == (
        16,
        16,
        16,
        96,
    )
    assert relative_error(before, model.eval(), x) <= 1e-12


def test_hooks_attributes_modes_and_frozen_parameters_stay() -> None:
    model = small_gpt()
    block = model.transformer.h[0]
    frozen, tagged = model.transformer.wpe.weight, block.mlp.c_fc.weight
    frozen.requires_grad_(False)
    tagged.tag = "mine"
    calls: list[str] = []
    handle = tagged.register_hook(lambda g: calls.append("tensor"))
    tagged.register_post_accumulate_grad_hook(lambda p: calls.append("accumulated"))
    block.mlp.eval()
    growth = fxgrow.grow(model, widen("*/hidden"), tokens())
    block.register_forward_hook(lambda m, a, out: calls.append("module"))
    growth.apply_(model)
    calls.clear()  # the second trace runs hooks of modules, as the first one does
    new = block.mlp.c_fc.weight
    assert new is not tagged
    assert new.tag == "mine"
    assert not model.transformer.wpe.weight.requires_grad
    assert not block.mlp.training
    assert block.training
    model(*tokens())[1].backward()
    assert calls == ["module", "tensor", "accumulated"]
    handle.remove()
    model(*tokens())[1].backward()
    assert calls[3:] == ["module", "accumulated"]


def test_parametrized_weights_grow() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(5, 8)),
        nn.Tanh(),
        nn.Linear(8, 3),
    )
    trained(model.double())
    before, x = copy.deepcopy(model), (torch.randn(3, 5, dtype=torch.float64),)
    growth = fxgrow.grow(model, widen("0.parametrizations.weight.original1:0"), x)
    growth.apply_(model)
    assert (model[0].out_features, model[2].in_features) == (16, 16)
    assert relative_error(before, model, x) <= 1e-12


@pytest.mark.parametrize("fill", ["add", "copy"])
def test_weights_that_write_buffers_where_they_are_read(fill: str) -> None:
    torch.manual_seed(0)
    normed = nn.utils.parametrizations.spectral_norm(nn.Linear(5, 8))
    model = trained(nn.Sequential(normed, nn.Tanh(), nn.Linear(8, 3)).double())
    before, x = copy.deepcopy(model), (torch.randn(3, 5, dtype=torch.float64),)
    growth = fxgrow.grow(model, {"op": "widen", "axis": "./hidden", "factor": 2, "fill": fill}, x, verify=False)
    if fill == "add":
        growth.apply_(model)
        assert (model[0].out_features, model[2].in_features) == (16, 16)
    else:
        with pytest.raises(fxgrow.GrowthRefused, match=r"multiplies by .*the class does not"):
            growth.apply_(model)
        assert all(torch.equal(t, before.state_dict()[n]) for n, t in model.state_dict().items())
    for mode in (False, True):
        assert relative_error(before.train(mode), model.train(mode), x) <= 1e-12


def test_blocks_know_their_numbers() -> None:
    class Block(nn.Module):
        def __init__(self, number: int, shared: nn.Module) -> None:
            super().__init__()
            self.layer_idx, self.up, self.down = number, nn.Linear(8, 16), nn.Linear(16, 8)
            self.shared = shared

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.down(self.shared(self.up(x)))

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            act = nn.Tanh()
            self.blocks = nn.ModuleList([Block(i, act) for i in range(3)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    torch.manual_seed(0)
    model = trained(Stack().double())
    before, x = copy.deepcopy(model), (torch.randn(3, 8, dtype=torch.float64),)
    growth = fxgrow.grow(model, {"op": "deepen", "stack": "blocks", "by": 2}, x)
    growth.apply_(model)
    assert [b.layer_idx for b in model.blocks] == [0, 1, 2, 3, 4]
    assert len({id(b.shared) for b in model.blocks}) == 1
    assert not any(p.is_meta for p in model.parameters())
    assert relative_error(before, model, x) <= 1e-12


def test_another_model_and_a_trained_one_are_refused() -> None:
    model, other = small_gpt(), small_gpt()
    growth = fxgrow.grow(model, widen("*/hidden"), tokens())
    with pytest.raises(fxgrow.FxgrowError, match="another tensor"):
        growth.apply_(other)
    optimizer = torch.optim.AdamW(model.parameters())
    model(*tokens())[1].backward()
    optimizer.step()
    with pytest.raises(fxgrow.FxgrowError, match=r"has changed since.*grow it again"):
        growth.apply_(model)


def test_growth_after_growth() -> None:
    model = small_gpt()
    before = copy.deepcopy(model)
    for spec in (
        widen("*/hidden"),
        {"op": "deepen", "stack": "transformer.h", "by": 1},
        widen("*/heads"),
        widen("*/hidden"),
    ):
        fxgrow.grow(model, spec, tokens()).apply_(model)
    assert relative_error(before, model, tokens(3)) <= 1e-12
    assert (model.config.n_hidden, model.config.n_layer, model.config.n_head) == (512, 3, 8)


@pytest.mark.compile
def test_a_compiled_model_runs_no_stale_code() -> None:
    torch.manual_seed(0)
    model = trained(nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double())
    model.compile()
    x = (torch.randn(3, 5, dtype=torch.float64),)
    before = model(*x)
    outside = torch.compile(model)
    outside(*x)
    growth = fxgrow.grow(model, {**widen("0.weight:0"), "noise": {"scale": 0.1}}, x)
    growth.apply_(outside)
    for run in (model, outside):
        torch.testing.assert_close(run(*x), before, rtol=0, atol=1e-12)
        run(*x).square().sum().backward()
    with torch.no_grad():
        model[2].weight.zero_()
        torch.testing.assert_close(model(*x), model[2].bias.expand(3, 3))


class Config:
    """Settings, some of which follow from others where they are not given."""

    def __init__(self, width: int = 8, inner: int | None = None, layers: int = 2) -> None:
        self.width, self.inner, self.layers = width, inner, layers
        self.kinds = ["even" if i % 2 == 0 else "odd" for i in range(layers)]


class Layer(nn.Module):
    def __init__(self, config: Config, number: int) -> None:
        super().__init__()
        self.inner = config.inner or 4 * config.width
        self.norm, self.up = nn.LayerNorm(config.width), nn.Linear(config.width, self.inner)
        self.down, self.kind = nn.Linear(self.inner, config.width), config.kinds[number]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(self.norm(x)).tanh())


class Configured(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.first, self.last = nn.Linear(5, config.width), nn.Linear(config.width, 3)
        self.layers = nn.ModuleList([Layer(config, i) for i in range(config.layers)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for layer in self.layers[: self.config.layers]:
            x = layer(x)
        return self.last(x)


@pytest.mark.parametrize(
    ("spec", "settings"),
    [
        (widen("*/residual"), {"width": 16, "inner": 32, "layers": 2}),
        (widen("*/hidden"), {"width": 8, "inner": 64, "layers": 2}),
        ({"op": "deepen", "stack": "layers", "by": 1}, {"width": 8, "inner": None, "layers": 3}),
    ],
    ids=["width", "inner", "layers"],
)
def test_the_config_says_what_the_model_is(spec: dict[str, Any], settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = trained(Configured(Config()).double())
    before, x = copy.deepcopy(model), (torch.randn(3, 5, dtype=torch.float64),)
    fxgrow.grow(model, spec, x).apply_(model)
    assert {k: v for k, v in vars(model.config).items() if k != "kinds"} == settings
    assert len(model.config.kinds) == model.config.layers
    rebuilt = Configured(model.config).double()
    rebuilt.load_state_dict(model.state_dict())
    for module in (model, rebuilt):
        assert relative_error(before, module, x) <= 1e-12


def test_a_config_that_cannot_say_it_is_told_of() -> None:
    torch.manual_seed(0)
    model = trained(Configured(Config(inner=16)).double())
    before, x = copy.deepcopy(model), (torch.randn(3, 5, dtype=torch.float64),)
    growth = fxgrow.grow(model, widen("layers.0/hidden"), x)
    with pytest.warns(UserWarning, match=r"its config cannot say so.*layers\.0\.up\.weight has the shape \(16, 8\)"):
        growth.apply_(model)
    assert relative_error(before, model, x) <= 1e-12


class Heads:
    def __init__(self, width: int = 8, heads: int = 2, table: bool = False) -> None:
        self.width, self.heads, self.table = width, heads, table


class Joint(nn.Module):
    """A joint projection, whose shape does not follow the heads; the forward reads their width, and in another line."""

    def __init__(self, config: Heads) -> None:
        super().__init__()
        self.config, self.heads = config, config.heads
        self.head_dim = config.width // config.heads
        self.register_buffer("table", torch.arange(1.0, self.head_dim + 1) if config.table else None, persistent=False)
        self.first, self.qkv = nn.Linear(5, config.width), nn.Linear(config.width, 3 * config.width)
        self.out, self.last = nn.Linear(config.width, config.width), nn.Linear(config.width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        joint = self.qkv(x).chunk(3, dim=-1)
        shape = (*x.shape[:-1], -1, self.head_dim)
        q, k, v = (part.view(shape).transpose(1, 2) for part in joint)
        q = q if self.table is None else q * self.table
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return self.last(x + self.out(y.transpose(1, 2).reshape(*x.shape[:-1], -1)))


@pytest.mark.parametrize("table", [False, True])
def test_settings_that_no_grown_shape_follows_are_found_by_what_stays(table: bool) -> None:
    """Twice the heads, as wide as they were: with the width alone the class would make them twice as wide."""
    torch.manual_seed(0)
    model = trained(Joint(Heads(table=table)).double())
    before, x = copy.deepcopy(model), (torch.randn(3, 4, 5, dtype=torch.float64),)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fxgrow.grow(model, [widen("*/residual"), widen("*/heads")], x).apply_(model)
    assert vars(model.config) == {"width": 16, "heads": 4, "table": table} and (model.heads, model.head_dim) == (4, 4)
    rebuilt = Joint(model.config).double()
    rebuilt.load_state_dict(model.state_dict())
    for module in (model, rebuilt):
        assert relative_error(before, module, x) <= 1e-12


class Grouped(nn.Module):
    """Asks its config for a setting that it may not have, as large libraries do."""

    def __init__(self, config: Heads) -> None:
        super().__init__()
        self.config = config
        self.head_dim = getattr(config, "head_dim", config.width // config.heads)
        self.first, self.last = nn.Linear(5, config.width), nn.Linear(config.width, 3)
        self.qkv = nn.Linear(config.width, 3 * config.heads * self.head_dim)
        self.out = nn.Linear(config.heads * self.head_dim, config.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        q, k, v = (p.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for p in self.qkv(x).chunk(3, dim=-1))
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return self.last(x + self.out(y.transpose(1, 2).flatten(2)))


def test_a_setting_that_the_config_lacks_is_added() -> None:
    torch.manual_seed(0)
    model = trained(Grouped(Heads()).double())
    before, x = copy.deepcopy(model), (torch.randn(3, 4, 5, dtype=torch.float64),)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fxgrow.grow(model, widen("*/heads"), x).apply_(model)
    assert vars(model.config) == {"width": 8, "heads": 4, "table": False, "head_dim": 4}
    rebuilt = Grouped(model.config).double()
    rebuilt.load_state_dict(model.state_dict())
    for module in (model, rebuilt):
        assert relative_error(before, module, x) <= 1e-12


class Shared:
    def __init__(self, width: int = 16, heads: int = 4, kv_heads: int = 2) -> None:
        self.width, self.heads, self.kv_heads = width, heads, kv_heads


class Fused(nn.Module):
    """Grouped queries in a joint projection, whose sizes follow both numbers of heads."""

    def __init__(self, config: Shared) -> None:
        super().__init__()
        self.config, self.head_dim = config, config.width // config.heads
        self.groups = config.heads // config.kv_heads
        self.register_buffer("table", torch.arange(1.0, self.head_dim + 1), persistent=False)
        self.first, self.last = nn.Linear(5, config.width), nn.Linear(config.width, 3)
        self.qkv = nn.Linear(config.width, (config.heads + 2 * config.kv_heads) * self.head_dim)
        self.out = nn.Linear(config.heads * self.head_dim, config.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        counts = (self.config.heads, self.config.kv_heads, self.config.kv_heads)
        parts = self.qkv(x).split([n * self.head_dim for n in counts], dim=-1)
        q, k, v = (p.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for p in parts)
        k, v = (p.repeat_interleave(self.groups, dim=1) for p in (k, v))
        y = torch.nn.functional.scaled_dot_product_attention(q * self.table, k, v)
        return self.last(x + self.out(y.transpose(1, 2).flatten(2)))


def test_two_settings_that_one_shape_follows_are_found_together() -> None:
    torch.manual_seed(0)
    model = trained(Fused(Shared()).double())
    before, x = copy.deepcopy(model), (torch.randn(3, 4, 5, dtype=torch.float64),)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fxgrow.grow(model, [widen("*/residual"), widen("*/kv_heads")], x).apply_(model)
    assert vars(model.config) == {"width": 32, "heads": 8, "kv_heads": 4}
    rebuilt = Fused(model.config).double()
    rebuilt.load_state_dict(model.state_dict())
    for module in (model, rebuilt):
        assert relative_error(before, module, x) <= 1e-12
