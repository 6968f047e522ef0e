"""Plans: round trips through JSON, composition of maps, meta tensors."""

from __future__ import annotations

import json

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fxgrow
from fxgrow.growth import plan_growth
from fxgrow.plan import AxisMap, DimPlan, GrowthPlan, _decode_index, _encode_index, decode_values, encode_values, key_of
from fxgrow.weights.materialise import materialise_all
from tests.models import small_gpt, tokens
from tests.test_growth import ALL


@given(st.lists(st.integers(-20, 20), max_size=40))
def test_index_runs_round_trip(values: list[int]) -> None:
    index = np.array(values, dtype=np.int64)
    assert np.array_equal(_decode_index(json.loads(json.dumps(_encode_index(index)))), index)


@given(st.lists(st.sampled_from([0.5, 1.0, 1 / 3, 0.0]), max_size=40))
def test_value_runs_round_trip(values: list[float]) -> None:
    assert np.array_equal(decode_values(json.loads(json.dumps(encode_values(np.array(values))))), np.array(values))


@settings(max_examples=60)
@given(st.integers(2, 7), st.integers(0, 9), st.integers(0, 9), st.sampled_from(["even", "uneven"]))
def test_two_growths_compose_to_one_map(old: int, first: int, second: int, split: str) -> None:
    a = AxisMap.copy(old, old + first, split, "newborn" if first % 2 else "copy")
    b = AxisMap.copy(old + first, old + first + second, split)
    one = DimPlan(index=a.index, split=a.share, gradient=a.share, fill=np.where(a.index < 0, 1.0, 0.0))
    two = DimPlan(index=b.index, split=b.share, gradient=b.share)
    both = two.after(one, 1 << 32)
    values = np.arange(1.0, old + 1)

    def apply(d: DimPlan, source: np.ndarray) -> np.ndarray:
        assert d.split is not None
        return np.where(d.index >= 0, source[np.maximum(d.index, 0)], 0.0) * d.split

    assert np.allclose(apply(both, values), apply(two, apply(one, values)))
    old_entries = both.index >= 0
    totals = np.bincount(both.index[old_entries], weights=both.split[old_entries], minlength=old)  # type: ignore[index]
    assert np.allclose(totals, 1.0)


def test_plan_round_trips_and_still_makes_the_same_tensors() -> None:
    model = small_gpt()
    growth = fxgrow.grow(model, ALL, tokens(), verify=False)
    text = growth.plan.to_json()
    plan = GrowthPlan.from_json(text)
    assert plan.to_json() == text
    source = dict(model.named_parameters())
    made = dict(materialise_all(plan, lambda name: source[name]))
    for name, p in growth.module.named_parameters():
        assert torch.equal(made[name], p), name


def test_planning_needs_shapes_only() -> None:
    with torch.device("meta"):
        model = small_gpt_on_meta()
    program = fxgrow.capture(model, tuple(t.to("meta") for t in tokens()))
    plan, _ = plan_growth(program, fxgrow.GrowthSpec.parse(ALL))
    real, _ = plan_growth(fxgrow.capture(small_gpt(), tokens()), fxgrow.GrowthSpec.parse(ALL))
    assert plan.parameters_after == real.parameters_after
    assert {n: t.shape for n, t in plan.tensors.items()} == {n: t.shape for n, t in real.tensors.items()}


def small_gpt_on_meta() -> torch.nn.Module:
    from examples.gpt.model import GPT, GPTConfig

    return GPT(GPTConfig(vocab_size=50, block_size=12, n_layer=2, n_head=4, n_embd=32))


def test_the_plan_says_what_it_did() -> None:
    plan = fxgrow.grow(small_gpt(), ALL, tokens(), verify=False).plan
    axes = {a.name: a for a in plan.axes}
    hidden = axes["transformer.h.0.mlp/hidden"]
    assert (hidden.old, hidden.new, hidden.copies, hidden.newborn) == (128, 256, 2, 0)
    stream = axes["./residual"]
    assert (stream.old, stream.new, stream.copies, stream.newborn, stream.newborn_content) == (
        32,
        48,
        1,
        16,
        "mean+zero",
    )
    assert not stream.exact_gradients
    assert [s.op for s in plan.steps] == ["widen"] * 5 + ["deepen"]
    equal = fxgrow.grow(small_gpt(), [{"op": "widen", "axis": "*/hidden", "factor": 2}], tokens(), verify=False).plan
    assert any("add noise" in n for n in equal.notes)


def test_plans_chain_without_weights() -> None:
    program = fxgrow.capture(small_gpt(), tokens())
    first, grown = plan_growth(program, fxgrow.GrowthSpec.parse(ALL))
    again = fxgrow.GrowthSpec.parse([{"op": "widen", "axis": "*/residual", "factor": 2}])
    second, _ = plan_growth(grown, again)
    assert second.parameters_before == first.parameters_after
    real = fxgrow.grow(fxgrow.grow(program, ALL, verify=False).module, again, tokens(), verify=False)
    assert second.parameters_after == real.plan.parameters_after
    assert {n: t.shape for n, t in second.tensors.items()} == {n: t.shape for n, t in real.plan.tensors.items()}


def test_draws_do_not_depend_on_what_pytorch_wraps_around_a_block() -> None:
    inside = "h.0._checkpoint_wrapped_module.mlp._orig_mod.weight"
    assert key_of(inside) == key_of("h.0.mlp.weight") != key_of("model.h.0.mlp.weight")
