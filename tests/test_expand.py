"""Growing into the user's own larger instance."""

from __future__ import annotations

import copy

import pytest
import torch

import fxgrow
from tests.models import relative_error, small_gpt, tokens


def test_small_becomes_the_larger_instance() -> None:
    small = small_gpt().eval()
    big = small_gpt(n_layer=4, n_head=8, n_embd=64, head_dim=8, n_hidden=200).eval()
    growth = fxgrow.expand(small, big, tokens(), noise={"scale": 1e-3})
    assert relative_error(small, big, tokens(3)) <= 1e-12
    assert {s.op for s in growth.plan.steps} == {"widen", "deepen"}
    assert all(v is dict(big.named_parameters())[k] for k, v in growth.module.named_parameters())
    assert big.lm_head.weight is big.transformer.wte.weight


def test_constants_of_the_larger_class_are_folded_into_weights() -> None:
    small = small_gpt().eval()
    big = small_gpt(head_dim=16, value_dim=8, attention_scale=0.3, norm_eps=1e-3).eval()
    growth = fxgrow.expand(small, big, tokens(), verify="float64")
    assert relative_error(small, big, tokens(3)) <= 1e-12
    assert growth.plan.constants == []


def test_other_constants_are_refused_and_nothing_is_changed() -> None:
    small, big = small_gpt(), small_gpt(n_hidden=200, dropout=0.1)
    before = copy.deepcopy(big.state_dict())
    with pytest.raises(fxgrow.GrowthRefused, match=r"larger class runs aten.dropout.default \(0.1\)"):
        fxgrow.expand(small, big, tokens())
    assert all(torch.equal(before[k], v) for k, v in big.state_dict().items())


def test_sizes_that_do_not_fit_are_named() -> None:
    with pytest.raises(fxgrow.SpecError, match="nothing to grow"):
        fxgrow.expand(small_gpt(), small_gpt(), tokens())
    with pytest.raises(
        fxgrow.SpecError, match=r"something else.*\n.*eps: the growth needs 1e-05, the larger class has 0.001"
    ):
        fxgrow.expand(small_gpt(), small_gpt(norm_eps=1e-3), tokens())
    with pytest.raises(fxgrow.SpecError, match=r"hidden has 128 units, the larger model 64"):
        fxgrow.expand(small_gpt(), small_gpt(n_hidden=64), tokens())
    with pytest.raises(fxgrow.GrowthRefused, match=r"vocab from 50 to 60.*the loss runs over it"):
        fxgrow.expand(small_gpt(), small_gpt(vocab_size=60), tokens())
