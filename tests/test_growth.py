"""What a growth must keep: the function, exactly; ties; the original."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import fxgrow
from tests.models import relative_error, small_cnn, small_gpt, tokens


def widen(axis: str, **how: Any) -> dict[str, Any]:
    return {"op": "widen", "axis": axis, **how}


DEEPER = {"op": "deepen", "stack": "transformer.h", "factor": 2}
ALL = [
    widen("*/hidden", factor=2, noise={"scale": 1e-2}),
    widen("*/heads", factor=2),
    widen("*/head_dim", factor=2),
    widen("*/value_dim", factor=2),
    widen("*/residual", to=48, noise={"scale": 1e-2}),
    DEEPER,
]
GROWTHS: dict[str, list[dict[str, Any]]] = {
    "hidden x2": [widen("*/hidden", factor=2)],
    "hidden x1.5": [widen("*/hidden", factor=1.5)],
    "hidden +1": [widen("*/hidden", by=1)],
    "hidden x2 uneven": [widen("*/hidden", factor=2, split="uneven")],
    "hidden x2 noise": [widen("*/hidden", factor=2, noise={"scale": 1e-2})],
    "hidden x3 noise": [widen("*/hidden", factor=3, noise={"scale": 0.5, "relative": True})],
    "hidden add 6": [widen("*/hidden", by=6, fill="add")],
    "hidden add 5": [widen("*/hidden", by=5, fill="add")],
    "hidden add, zero fan-in": [widen("*/hidden", by=6, fill="add", fan_in="zero")],
    "heads x2": [widen("*/heads", factor=2)],
    "heads +1": [widen("*/heads", by=1)],
    "heads add 2": [widen("*/heads", by=2, fill="add")],
    "head width x2": [widen("*/head_dim", factor=2), widen("*/value_dim", factor=2)],
    "head width add 3": [widen("*/head_dim", by=3, fill="add"), widen("*/value_dim", by=3, fill="add")],
    "stream x2": [widen("*/residual", factor=2)],
    "stream x2 noise": [widen("*/residual", factor=2, noise={"scale": 1e-2})],
    "stream 32 -> 48": [widen("*/residual", to=48)],
    "stream 32 -> 40": [widen("*/residual", to=40)],
    "stream 32 -> 72": [widen("*/residual", to=72)],
    "stream add 8": [widen("*/residual", by=8, fill="add")],
    "depth x2": [DEEPER],
    "depth append": [{**DEEPER, "order": "append"}],
    "depth gate": [{**DEEPER, "init": "gate"}],
    "depth after 0": [{"op": "deepen", "stack": "transformer.h", "after": [0]}],
    "all": ALL,
}


@pytest.fixture(scope="module")
def gpt() -> Any:
    model = small_gpt().eval()
    return model, fxgrow.capture(model, tokens())


@pytest.mark.parametrize("name", GROWTHS)
def test_function_is_kept_in_float64(gpt: Any, name: str) -> None:
    model, program = gpt
    growth = fxgrow.grow(program, GROWTHS[name])
    assert growth.receipt.error_float64 is not None
    assert growth.receipt.error_float64 <= 1e-12
    assert growth.receipt.error_float64_train is not None
    assert growth.receipt.error_float64_train <= 1e-12
    assert growth.receipt.dead_parameters == []
    assert growth.receipt.params_after > growth.receipt.params_before
    assert growth.receipt.params_after == sum(p.numel() for p in growth.module.parameters())
    # not on the receipt's word alone, and on other inputs than those of the capture
    assert relative_error(model, growth.module.eval(), tokens(seed=7, batch=2, length=11)) <= 1e-12


@pytest.mark.parametrize("variant", [{"flash": False}, {"bias": False}, {"dropout": 0.2}], ids=str)
@pytest.mark.parametrize("name", ["all", "stream 32 -> 40", "heads add 2"])
def test_function_is_kept_in_other_variants(variant: dict[str, Any], name: str) -> None:
    model = small_gpt(**variant).eval()
    growth = fxgrow.grow(model, GROWTHS[name], tokens())
    assert growth.receipt.error_native is not None
    assert growth.receipt.error_native <= 1e-12
    assert growth.receipt.error_float64_train is not None
    assert growth.receipt.error_float64_train <= 1e-12


@pytest.mark.parametrize("name", ["all", "stream x2 noise", "hidden x3 noise", "depth x2"])
def test_function_is_kept_in_float32(name: str) -> None:
    model = small_gpt(torch.float32).eval()
    growth = fxgrow.grow(model, GROWTHS[name], tokens())
    assert growth.receipt.error_native is not None
    assert growth.receipt.error_native <= 1e-5
    assert {p.dtype for p in growth.module.parameters()} == {torch.float32}


def test_two_growths_in_a_row() -> None:
    model = small_gpt().eval()
    first = fxgrow.grow(model, ALL, tokens())
    second = fxgrow.grow(first.module, [widen("*/hidden", factor=1.5), widen("*/residual", factor=2), DEEPER], tokens())
    names = [a.name for a in first.program.axes]
    assert "transformer.h.3.attn/heads" in names
    assert relative_error(model, second.module.eval(), tokens(seed=3)) <= 1e-12
    assert second.receipt.error_float64 is not None
    assert second.receipt.error_float64 <= 1e-12


def test_noise_parts_the_copies_and_only_the_copies() -> None:
    model = small_gpt()
    plain = fxgrow.grow(model, [widen("*/hidden", factor=2)], tokens(), verify=False).module
    noisy = fxgrow.grow(
        model, [widen("*/hidden", factor=2, noise={"scale": 1e-2, "seed": 3})], tokens(), verify=False
    ).module
    again = fxgrow.grow(
        model, [widen("*/hidden", factor=2, noise={"scale": 1e-2, "seed": 3})], tokens(), verify=False
    ).module
    other = fxgrow.grow(
        model, [widen("*/hidden", factor=2, noise={"scale": 1e-2, "seed": 4})], tokens(), verify=False
    ).module
    for name, weight in noisy.named_parameters():
        same = torch.equal(weight, dict(plain.named_parameters())[name])
        assert same == (not name.endswith("mlp.c_proj.weight")), name
        assert torch.equal(weight, dict(again.named_parameters())[name])
    name = "transformer.h.0.mlp.c_proj.weight"
    assert not torch.equal(dict(noisy.named_parameters())[name], dict(other.named_parameters())[name])
    left, right = dict(noisy.named_parameters())[name].chunk(2, dim=1)
    assert torch.equal(left + right, dict(model.named_parameters())[name])
    assert 0 < float((left - right).detach().abs().median()) < 0.1


def test_seed_of_new_units() -> None:
    model = small_gpt()
    name = "transformer.h.0.mlp.c_fc.weight"

    def grown(seed: int) -> torch.Tensor:
        spec = [widen("*/hidden", by=6, fill="add", seed=seed)]
        return fxgrow.grow(model, spec, tokens(), verify=False).module.get_parameter(name).detach()

    assert torch.equal(grown(1), grown(1))
    assert not torch.equal(grown(1)[128:], grown(2)[128:])
    assert torch.equal(grown(1)[:128], grown(2)[:128])
    assert torch.equal(grown(1)[128:131], grown(1)[131:]), "pairs of equal units"
    assert 0.3 < float(grown(1)[128:].std() / model.get_parameter(name).detach().std()) < 3


def test_ties_are_one_tensor_before_and_after() -> None:
    model = small_gpt()
    growth = fxgrow.grow(model, ALL, tokens())
    assert growth.module.transformer.wte.weight is growth.module.lm_head.weight
    assert set(growth.module.state_dict()) >= {"transformer.wte.weight", "lm_head.weight"}
    names = [n for n, _ in growth.module.named_parameters()]
    assert len(names) == len(set(names))


def test_grown_state_dict_loads_into_the_larger_class() -> None:
    from examples.gpt.model import GPT, GPTConfig

    model = small_gpt().eval()
    spec = [widen("*/hidden", to=160), widen("*/heads", factor=2), widen("*/residual", factor=2), DEEPER]
    growth = fxgrow.grow(model, spec, tokens())
    config = GPTConfig(
        vocab_size=50, block_size=12, n_layer=4, n_head=8, n_embd=64, n_hidden=160, head_dim=8, value_dim=8
    )
    larger = GPT(config).double().eval()
    larger.load_state_dict(growth.module.state_dict(), strict=True)
    assert relative_error(model, larger, tokens(seed=5)) <= 1e-12
    assert larger.transformer.wte.weight is larger.lm_head.weight


def test_original_is_untouched() -> None:
    model = small_gpt(dropout=0.1).train()
    model.transformer.h[0].eval()
    before = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    identity = {n: id(p) for n, p in model.named_parameters()}
    growth = fxgrow.grow(model, ALL, tokens())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert modes == [m.training for m in model.modules()]
    assert identity == {n: id(p) for n, p in model.named_parameters()}
    with torch.no_grad():
        for p in growth.module.parameters():
            p.zero_()
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_consume_frees_the_original() -> None:
    model = small_gpt()
    expected = small_gpt().eval()
    growth = fxgrow.grow(model, ALL, tokens(), consume=True)
    assert all(p.untyped_storage().size() == 0 for p in model.parameters())
    assert any("not measured" in n for n in growth.receipt.notes)
    assert relative_error(expected, growth.module.eval(), tokens()) <= 1e-12


def test_cnn_every_axis() -> None:
    model = small_cnn().eval()
    args = (torch.randn(4, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),)
    program = fxgrow.capture(model, args)
    grown = 0
    for info in program.axes:
        if info.growable:
            for how in ({"factor": 2}, {"by": 3}, {"by": 2, "fill": "add"}):
                growth = fxgrow.grow(program, [widen(info.name, **how)])
                assert growth.receipt.error_float64 <= 1e-12  # type: ignore[operator]
                assert growth.receipt.error_float64_train <= 1e-12  # type: ignore[operator]
                assert relative_error(model, growth.module.eval(), args) <= 1e-12
                grown += 1
    assert grown == 9


@pytest.mark.parametrize(
    ("operation", "keys"),
    [
        ({"layer": "conv", "after": "2"}, {"3.weight": (8, 8, 3, 3), "6.weight": (12, 8, 3, 3)}),
        ({"layer": "conv", "after": "0", "kernel_size": 5}, {"1.weight": (8, 8, 5, 5), "2.weight": (8,)}),
        ({"layer": "linear", "after": "10"}, {"11.weight": (20, 20), "13.weight": (5, 20)}),
        ({"layer": "linear", "after": "9", "bias": False}, {"10.weight": (20, 20), "12.weight": (5, 20)}),
        ({"layer": "batch_norm", "after": "4"}, {"5.running_var": (12,), "6.running_var": (12,)}),
    ],
)
def test_insert_identity_layers(operation: dict[str, Any], keys: dict[str, tuple[int, ...]]) -> None:
    model = small_cnn().eval()
    args = (torch.randn(4, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),)
    growth = fxgrow.grow(model, [{"op": "insert", **operation}], args)
    assert relative_error(model, growth.module.eval(), args) <= 1e-12
    state = growth.module.state_dict()
    for key, shape in keys.items():
        assert tuple(state[key].shape) == shape
    assert growth.receipt.dead_parameters == []


def test_post_norm_blocks_get_a_gate() -> None:
    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.proj, self.norm = torch.nn.Linear(8, 16), torch.nn.Linear(16, 8), torch.nn.LayerNorm(8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(x + self.proj(torch.relu(self.fc(x))))

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = torch.nn.ModuleList([Block(), Block()])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for b in self.blocks:
                x = b(x)
            return x

    from tests.models import trained

    model = trained(Net().double()).eval()
    args = (torch.randn(5, 8, dtype=torch.float64),)
    growth = fxgrow.grow(model, [{"op": "deepen", "stack": "blocks", "factor": 2}], args)
    assert relative_error(model, growth.module.eval(), args) <= 1e-12
    assert {n for n, _ in growth.module.named_parameters() if n.endswith("alpha")} == {
        "blocks.1.alpha",
        "blocks.3.alpha",
    }
    assert growth.receipt.dead_parameters == [] or all("alpha" not in n for n in growth.receipt.dead_parameters)
    with pytest.raises(fxgrow.GrowthRefused, match="init: gate"):
        fxgrow.grow(model, [{"op": "deepen", "stack": "blocks", "factor": 2, "init": "zero"}], args)


def test_stacks_inside_stages_deepen() -> None:
    class Block(torch.nn.Module):
        def __init__(self, n: int) -> None:
            super().__init__()
            self.norm, self.fc, self.proj = torch.nn.BatchNorm2d(n), torch.nn.Conv2d(n, 6, 1), torch.nn.Conv2d(6, n, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.proj(torch.relu(self.fc(self.norm(x))))

    class Stage(torch.nn.Module):
        def __init__(self, i: int, o: int) -> None:
            super().__init__()
            self.down, self.blocks = torch.nn.Conv2d(i, o, 1), torch.nn.Sequential(Block(o), Block(o))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.blocks(self.down(x))

    from tests.models import trained

    model = trained(torch.nn.Sequential(Stage(3, 4), Stage(4, 8)).double()).eval()
    args = (torch.randn(2, 3, 5, 5, dtype=torch.float64),)
    growth = fxgrow.grow(model, [{"op": "deepen", "stack": "*.blocks", "factor": 2}], args)
    assert relative_error(model, growth.module.eval(), args) <= 1e-12
    assert {n for n in growth.module.state_dict() if n.endswith("proj.weight")} == {
        f"{s}.blocks.{b}.proj.weight" for s in range(2) for b in range(4)
    }


def test_new_heads_under_a_mask_of_their_own() -> None:
    class Attention(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = torch.nn.Linear(6, 24), torch.nn.Linear(8, 6)
            near = (torch.arange(5)[:, None] - torch.arange(5)[None, :]).abs() < 2
            self.register_buffer("mask", torch.stack([near, ~near | torch.eye(5, dtype=torch.bool)]))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
            scores = (q @ k.transpose(-2, -1) / 2).masked_fill(~self.mask, float("-inf"))
            return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))

    from tests.models import trained

    model = trained(Attention().double()).eval()
    args = (torch.randn(3, 5, 6, dtype=torch.float64),)
    growth = fxgrow.grow(model, [widen("*/heads", by=2, fill="add")], args)
    assert growth.module.state_dict()["mask"].shape == (4, 5, 5)
    assert relative_error(model, growth.module.eval(), args) <= 1e-12
    assert growth.receipt.dead_parameters == []


def test_stacked_copies_are_lossy_and_say_so() -> None:
    model = small_gpt().eval()
    operation = {"op": "deepen", "stack": "transformer.h", "factor": 2, "init": "stack"}
    with pytest.raises(fxgrow.SpecError, match="lossy"):
        fxgrow.grow(model, [operation], tokens())
    growth = fxgrow.grow(model, [{**operation, "preserve": "lossy"}], tokens())
    assert growth.plan.exactness == "lossy"
    assert growth.receipt.error_float64 is not None
    assert growth.receipt.error_float64 > 1e-3
    blocks = growth.module.transformer.h
    assert torch.equal(blocks[0].attn.c_attn.weight, blocks[1].attn.c_attn.weight)


def test_independent_noise_is_approximate_and_says_so() -> None:
    model = small_gpt().eval()
    noise = {"kind": "independent", "scale": 1e-3, "on": "both"}
    growth = fxgrow.grow(model, [widen("*/hidden", factor=2, noise=noise, preserve="approximate")], tokens())
    assert growth.plan.exactness == "approximate"
    assert growth.receipt.error_float64 is not None
    assert 1e-8 < growth.receipt.error_float64 < 1e-1
