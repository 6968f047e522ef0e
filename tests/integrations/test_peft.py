"""Models that PEFT has wrapped: adapters grow with their base and in rank, merge, load into PEFT's larger model."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxgrow
from fxgrow.scheduler import GrowthScheduler

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*", "ignore::UserWarning:peft.*"),
]

D = torch.float64
IDS = torch.randint(0, 40, (2, 6), generator=torch.Generator().manual_seed(1))
TARGETS = ["c_attn", "c_proj"]


def config(**sizes: int) -> Any:
    """A GPT-2: its norms compute in float64, as Llama's do not."""
    given = {"n_embd": 12, "n_head": 3, "n_layer": 2, "n_inner": 20, "vocab_size": 40, "n_positions": 16, **sizes}
    off = {f"{name}_pdrop": 0.0 for name in ("resid", "embd", "attn")}
    return transformers.GPT2Config(**given, **off, tie_word_embeddings=False, use_cache=False)


def base(**sizes: int) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(config(**sizes))
    return model.to(D)


def lora(model: nn.Module | None = None, **how: Any) -> Any:
    """What a user has in the middle of training: nothing is zero."""
    settings = {"r": 3, "lora_alpha": 6, "target_modules": TARGETS, "fan_in_fan_out": True, **how}
    model = peft.get_peft_model(base() if model is None else model, peft.LoraConfig(**settings)).to(D)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator, dtype=D))
    return model.eval()


def logits(model: Any) -> Tensor:
    out: Tensor = model(input_ids=IDS).logits.detach()[..., :40]
    return out


def apart(model: Any, before: Tensor) -> float:
    return float((logits(model) - before).abs().max() / before.abs().max())


def grown(model: Any, *spec: dict[str, Any], **how: Any) -> fxgrow.Growth:
    growth = fxgrow.grow(model, list(spec), kwargs={"input_ids": IDS}, **how)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(is grown|says|stay as they were).*")
        growth.apply_(model)
    return growth


def saved_and_loaded(model: Any, folder: Path) -> Any:
    """The adapter as PEFT saves it, on the grown base in an instance that its config makes."""
    model.save_pretrained(folder)
    larger = type(model.get_base_model())(copy.deepcopy(model.config)).to(D)
    larger.load_state_dict(copy.deepcopy(model).unload().state_dict())
    return peft.PeftModel.from_pretrained(larger, folder).to(D).eval()


WIDTHS = [{"op": "widen", "axis": "*/heads", "factor": 2}, {"op": "widen", "axis": "*/residual", "factor": 2}]
SPECS: dict[str, list[dict[str, Any]]] = {
    "hidden": [{"op": "widen", "axis": "*/hidden", "factor": 2, "noise": {"scale": 1e-3}}],
    "widths": WIDTHS,
    "depth": [{"op": "deepen", "stack": "*.h", "by": 1}],
    "words": [{"op": "extend", "axis": "*/vocab", "by": 8}],
    "rank": [{"op": "widen", "axis": "*/rank", "factor": 2, "fill": "add"}],
    "one rank": [{"op": "widen", "axis": "*c_attn/rank", "by": 2, "fill": "add"}],
}


@pytest.mark.parametrize("name", SPECS)
def test_a_wrapped_model_grows_and_stays_peft_s(name: str, tmp_path: Path) -> None:
    model = lora()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model(input_ids=IDS).logits.square().mean().backward()
    optimizer.step()
    before, kind = logits(model), type(model)
    with model.disable_adapter():
        plain = logits(model)
    growth = grown(model, *SPECS[name])
    growth.carry_(optimizer, "asymmetric")
    assert type(model) is kind and apart(model, before) <= 1e-10
    held = {id(p) for g in optimizer.param_groups for p in g["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}
    with model.disable_adapter():
        assert apart(model, plain) <= 1e-10
    assert apart(saved_and_loaded(model, tmp_path), before) <= 1e-10
    layer = model.get_base_model().transformer.h[-1].attn.c_attn
    assert (layer.in_features, layer.out_features) == tuple(layer.base_layer.weight.shape)
    assert layer.lora_A["default"].weight.shape == (layer.r["default"], layer.in_features)
    model.merge_adapter()
    assert apart(model, before) <= 1e-10
    model.unmerge_adapter()
    assert apart(model, before) <= 1e-10
    assert apart(model.merge_and_unload(), before) <= 1e-10


def test_configs_say_ranks_alphas_and_layers() -> None:
    model = lora(use_rslora=True, target_modules="all-linear")
    said = model.peft_config["default"]
    grown(model, {"op": "widen", "axis": "*c_attn/rank", "by": 2, "fill": "add"})
    assert (said.r, said.rank_pattern) == (3, {"c_attn": 5})
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "lora_alpha")}
    for name, layer in layers.items():
        expected = layer.lora_alpha["default"] / layer.r["default"] ** 0.5
        assert layer.scaling["default"] == pytest.approx(expected, rel=1e-12), name
    grown(model, {"op": "deepen", "stack": "*.h", "by": 1})
    assert said.target_modules == {
        n.removeprefix("base_model.model.") for n, m in model.named_modules() if hasattr(m, "lora_alpha")
    }
    assert model.config.n_layer == 3


@pytest.mark.parametrize(
    "how",
    [
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["wte", "lm_head", "c_attn"], "fan_in_fan_out": False},
        {"bias": "lora_only"},
        {"lora_bias": True},
        {"lora_dropout": 0.3},
    ],
    ids=["saved", "tables", "bias", "lora bias", "dropout"],
)
def test_what_else_a_config_asks_for(how: dict[str, Any]) -> None:
    model = lora(**how)
    before = logits(model)
    with model.disable_adapter():
        plain = logits(model)
    grown(model, *WIDTHS)
    assert apart(model, before) <= 1e-10
    with model.disable_adapter():
        assert apart(model, plain) <= 1e-10
    assert apart(model.merge_and_unload(), before) <= 1e-10


def test_ia3_grows() -> None:
    how = {"target_modules": ["c_attn", "mlp.c_proj"], "feedforward_modules": ["mlp.c_proj"], "fan_in_fan_out": True}
    model = peft.get_peft_model(base(), peft.IA3Config(**how)).to(D).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, dtype=D))
    before = logits(model)
    grown(model, *WIDTHS)
    assert apart(model, before) <= 1e-10


def test_what_no_call_reads_is_refused() -> None:
    model = lora()
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    model.to(D)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    refusals = []
    for prepare in (lambda: None, lambda: model.merge_adapter()):
        prepare()
        with pytest.raises(fxgrow.GrowthRefused) as refusal:
            grown(model, *SPECS["depth"])
        refusals.append(str(refusal.value))
    assert "its adapter other is not active" in refusals[0] and "set_adapter(['default', 'other'])" in refusals[0]
    assert "default is merged into its weight" in refusals[1] and "unmerge_adapter()" in refusals[1]
    model.unmerge_adapter()
    assert all(torch.allclose(t, state[n], rtol=0, atol=1e-12) for n, t in model.state_dict().items())
    model.base_model.set_adapter(["default", "other"])
    before = logits(model)
    grown(model, *WIDTHS)
    assert apart(model, before) <= 1e-10
    model.set_adapter("other")
    logits(model)


def test_dora_grows_where_nothing_reads_its_widths_and_is_refused_elsewhere() -> None:
    model = lora(use_dora=True, target_modules=["c_attn"])
    before = logits(model)
    with pytest.raises(fxgrow.GrowthRefused, match=r"frozen by aten\.linalg_norm"):
        grown(model, *WIDTHS)
    grown(model, *SPECS["hidden"])
    assert apart(model, before) <= 1e-10
    for op in ({"op": "lora_scale", "factor": 0.5}, {"op": "lora_decay", "steps": 2}):
        with pytest.raises(fxgrow.SpecError, match="no plain LoRA"):
            GrowthScheduler([{"trigger": {"step": 0}, "operations": [op]}]).step(model, step=0)
    assert apart(model, before) <= 1e-10
    GrowthScheduler([{"trigger": {"step": 0}, "operations": [{"op": "lora_merge"}]}]).step(model, step=0)
    assert apart(model, before) <= 1e-10


EVENTS: list[dict[str, Any]] = [
    {"trigger": {"step": 1}, "operations": [{"op": "lora_scale", "factor": 0.5, "modules": "*attn*"}]},
    {"trigger": {"step": 2}, "operations": [{"op": "lora_decay", "steps": 4, "modules": "*mlp*"}]},
    {"trigger": {"step": 4}, "operations": [SPECS["rank"][0], {"op": "deepen", "stack": "*.h", "by": 1}]},
    {"trigger": {"step": 7}, "operations": [{"op": "lora_merge", "modules": "*.h.0.*"}]},
    {"trigger": {"step": 8}, "operations": [{"op": "lora_merge"}]},
]


def scales(model: Any, leaf: str) -> list[float]:
    return [m.scaling["default"] for n, m in model.named_modules() if n.endswith(leaf) and hasattr(m, "scaling")]


def test_a_schedule_scales_fades_and_merges(tmp_path: Path) -> None:
    model = lora()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = GrowthScheduler(EVENTS, kwargs={"input_ids": IDS})
    rows = scheduler.check(model, optimizer).rows
    seen, last = [], logits(model)
    for step in range(9):
        while done := scheduler.step(model, optimizer, step=step):
            if done.op in ("grow", "lora_merge"):
                assert done.after["parameters"] == next(r.parameters for r in rows if r.step == step)
        seen.append((scales(model, "c_attn"), scales(model, "mlp.c_proj")))
        if step in (1, 3, 5):
            assert apart(saved_and_loaded(model, tmp_path / str(step)), logits(model)) <= 1e-10, step
        if step in (7, 8):
            assert apart(model, last) <= 1e-12
        last = logits(model)
    assert seen[0] == ([2.0] * 2, [2.0] * 2) and seen[2] == ([1.0] * 2, [2.0] * 2)
    assert seen[3] == ([1.0] * 2, [1.5] * 2) and seen[4] == ([0.5] * 3, [0.5] * 3)
    assert seen[5] == ([0.5] * 3, [0.25] * 3) and seen[6] == ([0.5] * 3, [0.0] * 3)
    assert len(seen[7][0]) == 2 and seen[8] == ([], [])
    plain = type(model.get_base_model())(copy.deepcopy(model.config)).to(D)
    plain.load_state_dict(model.get_base_model().state_dict())
    assert apart(plain.eval(), last) == 0
    held = {id(p) for g in optimizer.param_groups for p in g["params"]}
    assert held == {id(p) for p in model.parameters()}


def test_a_schedule_goes_on_where_it_was() -> None:
    model, fresh = lora(), lora()
    scheduler, resumed = (GrowthScheduler(EVENTS[:3], kwargs={"input_ids": IDS}) for _ in range(2))
    for step in range(6):
        while scheduler.step(model, step=step):
            pass
    resumed.load_state_dict(scheduler.state_dict())
    resumed.replay(fresh)
    fresh.load_state_dict(model.state_dict())
    assert apart(fresh, logits(model)) == 0 and scales(fresh, "mlp.c_proj") == [0.25] * 3
    assert vars(fresh.peft_config["default"]) == vars(model.peft_config["default"])


def test_what_is_merged_is_not_scaled_and_a_merge_that_fails_changes_nothing() -> None:
    model = lora()
    before = logits(model)
    model.merge_adapter()
    with pytest.raises(fxgrow.SpecError, match=r"unmerge_adapter\(\) first"):
        GrowthScheduler([{"trigger": {"step": 0}, "operations": [{"op": "lora_scale", "factor": 2}]}]).step(
            model, step=0
        )
    merging = [{"trigger": {"step": 0}, "operations": [{"op": "lora_merge"}]}]
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["c_proj"], fan_in_fan_out=True))
    with pytest.raises(fxgrow.FxgrowError, match=r"the adapter other beside those that are active"):
        GrowthScheduler(merging).step(model, step=0)
    assert apart(model, before) <= 1e-12
    model.unmerge_adapter()
    model.delete_adapter("other")
    with torch.no_grad():
        model.get_base_model().transformer.h[1].mlp.c_proj.lora_B["default"].weight.fill_(torch.nan)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(fxgrow.FxgrowError, match="cannot be merged: NaNs"):
        GrowthScheduler(merging).step(model, step=0)
    assert all(torch.equal(t, state[n]) or t.isnan().any() for n, t in model.state_dict().items())


def test_adapters_of_fxgrow_s_own_are_not_put_beside_peft_s() -> None:
    model = lora(target_modules=["c_attn"])
    kwargs = {"input_ids": IDS}
    for modules in ("*", "*c_attn"):
        with pytest.raises(fxgrow.SpecError, match=r"c_attn\S* has an adapter already"):
            fxgrow.grow(model, {"op": "lora", "modules": modules, "rank": 2}, kwargs=kwargs)


def test_into_peft_s_own_larger_model() -> None:
    model = lora()
    before = logits(model)
    larger = lora(base(n_embd=24, n_head=6, n_inner=40, n_layer=3), r=6)
    fxgrow.expand(model, larger, kwargs={"input_ids": IDS})
    assert apart(larger, before) <= 1e-10
