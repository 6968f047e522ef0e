"""What needs a GPU: the kernels there against the CPU, growths of models that live there. `gpu_check` runs these."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from kernel_oracle import random_case, same_bits
from torch import nn

import fxgrow
from fxgrow.kernels import materialise

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.filterwarnings("ignore::fxgrow.kernels.NoiseTooSmall"),
]
WIDER = [{"op": "widen", "axis": "./hidden", "factor": 2, "noise": {"kind": "antisymmetric"}}]


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 8)).double().cuda()


def example() -> torch.Tensor:
    return torch.randn(4, 16, dtype=torch.float64, device="cuda", generator=torch.Generator("cuda").manual_seed(1))


def test_random_calls_equal_the_cpu_to_the_bit() -> None:
    for seed in range(40):
        x, dims, arguments = random_case(seed)
        got = materialise(x.cuda(), dims, backend="triton", **arguments)
        assert same_bits(got.cpu(), materialise(x, dims, **arguments)), seed


def test_a_second_stream_and_a_source_that_is_elsewhere() -> None:
    x, dims, arguments = random_case(3)
    want = materialise(x, dims, **arguments)
    with torch.cuda.stream(torch.cuda.Stream()):
        got = materialise(x, dims, device="cuda", **arguments)
    torch.cuda.synchronize()
    assert same_bits(got.cpu(), want)


def test_a_model_and_its_optimizer_grow_where_they_are(tmp_path: Path) -> None:
    small, x = model(), example()
    optimizer = torch.optim.AdamW(small.parameters())
    small(x).square().mean().backward()
    optimizer.step()
    growth = fxgrow.grow(small, WIDER, (x,))
    assert growth.receipt.error_float64 < 1e-12
    assert all(p.is_cuda for p in growth.module.parameters())
    carried = growth.carry(optimizer)
    assert all(v.is_cuda for s in carried.state.values() for k, v in s.items() if k != "step")
    fxgrow.save(growth, tmp_path / "saved")
    loaded = fxgrow.load(tmp_path / "saved").to("cuda")
    assert torch.equal(loaded(x), growth.module(x))
    want = small(x)
    growth.apply_(small)
    growth.carry_(optimizer)
    assert torch.allclose(small(x), want, atol=1e-12, rtol=0)
    small(x).square().mean().backward()
    optimizer.step()


def test_the_cpu_and_the_gpu_grow_to_the_same_bits() -> None:
    small, x = model(), example()
    here = fxgrow.grow(small, WIDER, (x,), verify=False).module.state_dict()
    there = fxgrow.grow(small.cpu(), WIDER, (x.cpu(),), verify=False).module.state_dict()
    assert all(same_bits(here[name].cpu(), there[name]) for name in there)
