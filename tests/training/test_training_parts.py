"""The parts of the loop: learning rate, floating-point operations, copies, losses, hyper-parameters."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.nn import functional as F

from fxgrow import training
from fxgrow.errors import SpecError
from fxgrow.training import Copies, Hyper, base_rate, hyper_of
from tests.training.toy import Net, make, run


def test_cosine_values() -> None:
    hyper = Hyper(steps=110, warmup=10, learning_rate=1.0, min_learning_rate=0.1)
    assert base_rate(0, hyper) == pytest.approx(0.1)
    assert base_rate(9, hyper) == pytest.approx(1.0)
    assert base_rate(10, hyper) == pytest.approx(1.0)
    assert base_rate(60, hyper) == pytest.approx(0.55)  # halfway
    assert base_rate(35, hyper) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert base_rate(110, hyper) == base_rate(10**6, hyper) == pytest.approx(0.1)
    assert base_rate(60, replace(hyper, decay_steps=60)) == pytest.approx(0.1)
    assert base_rate(0, replace(hyper, warmup=0)) == pytest.approx(1.0)


def test_flops_are_counted_exactly(tmp_path: Path) -> None:
    final = run(make(), tmp_path)
    # (8 × 3) · (3 × 4) and (8 × 4) · (4 × 1), two operations per multiply-add; backward needs no gradient of the input
    forward = 2 * 8 * 3 * 4 + 2 * 8 * 4
    backward = 2 * 8 * 3 * 4 + 2 * (2 * 8 * 4)
    assert final.flops_per_batch == forward + backward
    assert final.flops == 12 * (forward + backward)


def test_fused_attention_is_counted_on_the_cpu() -> None:
    q = torch.randn(2, 3, 5, 7, requires_grad=True)
    with training.flop_counter() as counter:
        F.scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward()
    one = 2 * 2 * 3 * 5 * 5 * 7  # one matrix product of scores or values
    assert counter.get_total_flops() == 2 * one + 5 * one  # 2 forward; backward 4 and the scores again


def test_copies_are_found_by_value_and_their_parting_measured() -> None:
    net = Net(4)
    assert not Copies.of(net).pairs
    with torch.no_grad():
        net.up.weight[3] = net.up.weight[1]
        net.down.weight[0, 2] = net.down.weight[0, 0]
        found = Copies.of(net)
        assert found.measure(net) == {"copies": 2, "apart_max": 0.0, "apart_min": 0.0}
        net.up.weight[3, 0] += 0.5
        measured = found.measure(net)
        assert measured["apart_max"] == pytest.approx(0.5)
        assert measured["apart_min"] == 0.0
        net.down.weight.zero_()
        zeros = Copies.of(net)
        assert zeros.measure(net) == {"zero_max": 0.0}
        net.down.weight[0, 1] = -2
        assert zeros.measure(net) == {"zero_max": 2.0}


def test_losses_come_from_tuples_mappings_and_tensors() -> None:
    x = torch.tensor(2.0)

    class Returns(nn.Module):
        def __init__(self, value: Any) -> None:
            super().__init__()
            self.value = value

        def forward(self) -> Any:
            return self.value

    for value in (x, (None, x), {"loss": x, "logits": None}):
        assert training.model_loss(Returns(value), ()) is x


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"accumulation": 0}, "hyper-parameter accumulation: Input should be greater than or equal to 1, not 0"),
        ({"steps": "many"}, "hyper-parameter steps: Input should be a valid integer"),
        ({"steps": 2.5}, "hyper-parameter steps: Input should be a valid integer"),
        ({"learning_rate": math.nan}, "hyper-parameter learning_rate: Input should be a finite number"),
        ({"betas": [0.9]}, r"hyper-parameter betas\.1: Field required"),
        ({"eval_evry": 3}, r"hyper-parameter eval_evry: no such hyper-parameter; did you mean eval_every"),
        ({"clip": -1, "log_every": 0}, "hyper-parameter clip: .*\nhyper-parameter log_every: "),
    ],
)
def test_hyper_parameters_are_checked(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(SpecError, match=expected):
        hyper_of(settings)
    with pytest.raises((ValidationError, TypeError)):
        Hyper(**settings)


def test_hyper_parameters_are_changed_one_by_one() -> None:
    start = Hyper(steps=7, clip=0.5)
    assert hyper_of({"steps": 9, "learning_rate": 1}, start) == Hyper(steps=9, clip=0.5, learning_rate=1.0)
    assert isinstance(hyper_of({"learning_rate": 1}).learning_rate, float)
