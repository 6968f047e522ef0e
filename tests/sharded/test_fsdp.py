"""FSDP2 and tensor parallelism: a model grown in mid-run, each rank its shards, against one process."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

import fxgrow
from fxgrow.errors import FxgrowError
from fxgrow.ir.dtensors import Layout, Rectangle, local_of
from tests.models import small_gpt, tokens
from tests.processes import run_ranks

NOISE = {"noise": {"scale": 0.1, "relative": True}}
WIDE: list[dict[str, Any]] = [
    {"op": "widen", "axis": "transformer.h.*.mlp/hidden", "factor": 2, **NOISE},
    {"op": "widen", "axis": "./residual", "to": 48, **NOISE},
    {"op": "widen", "axis": "*/heads", "factor": 2},
]
DEEP: list[dict[str, Any]] = [{"op": "deepen", "stack": "transformer.h", "by": 1}]
VOCABULARY: list[dict[str, Any]] = [
    {"op": "extend", "axis": "./vocab", "to": 57, "init": "mean", "preserve": "approximate"}
]

Make = Callable[[nn.Module, int], Any]


def blocks_and_root(model: nn.Module, world: int) -> Any:
    mesh = init_device_mesh("cpu", (world,))
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh, reshard_after_forward=False)


def hybrid(model: nn.Module, world: int) -> Any:
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


WAYS: dict[str, Make] = {"blocks": blocks_and_root, "hybrid": hybrid}


def part(tensor: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """Of a whole tensor, what this rank holds where ``tensor`` lies."""
    if not isinstance(tensor, DTensor):
        return whole
    layout = Layout.of(tensor)
    return whole[layout.rectangles(whole.shape)[layout.me].within(Rectangle.whole(whole.shape))]


def drawn(name: str, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(name.encode()))
    return torch.randn(shape, generator=generator).to(dtype)


@torch.no_grad()
def settle(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """The same weights and moments on any number of ranks: what a step leaves differs in its last bits."""
    for name, p in model.named_parameters():
        local_of(p).copy_(part(p, 0.2 * drawn(name, p.shape, p.dtype)))
        for key, value in optimizer.state[p].items():
            if value.shape == p.shape:
                whole = drawn(f"{name} {key}", p.shape, value.dtype).abs()
                local_of(value).copy_(part(value, whole))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int, rank: int, world: int) -> float:
    """One step on this rank's part of a batch of 12; the mean loss of the ranks is that of the batch."""
    x, y = tokens(seed, batch=12)
    share = slice(rank * 12 // world, (rank + 1) * 12 // world)
    optimizer.zero_grad()
    _, loss = model(x[share], y[share])
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def begun(dtype: torch.dtype = torch.float64) -> nn.Module:
    return small_gpt(dtype, n_embd=36, n_head=3)


def trained(
    rank: int, world: int, way: str, growths: list[list[dict[str, Any]]], policy: str, found: Mapping[str, Any]
) -> dict[str, Any]:
    """Train and grow; after each growth, what differs from ``found``, or all there is where that is empty."""
    model = begun()
    if way:
        WAYS[way](model, world)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    out: dict[str, Any] = {"losses": [step(model, optimizer, 0, rank, world)], "wrong": [], "tensors": []}
    expected = iter(found.get("tensors", ()))
    for number, spec in enumerate(growths):
        settle(model, optimizer)
        checked: Any = "auto" if spec is VOCABULARY else False
        growth = fxgrow.grow(model, spec, tokens(), optimizer=optimizer, policy=policy, verify=checked)
        growth.apply_(model)
        assert growth.carry_(optimizer) is optimizer
        now: dict[str, Any] = dict(model.named_parameters())
        tensors = dict(now)
        for name, p in now.items():
            tensors |= {f"{name} {k}": v for k, v in optimizer.state[p].items() if v.shape == p.shape}
        if way:
            whole = next(expected)
            out["wrong"] += sorted(set(whole) ^ set(tensors))
            out["wrong"] += [n for n, t in tensors.items() if not torch.equal(local_of(t), part(t, whole[n]))]
            out["wrong"] += [n for n, p in now.items() if not isinstance(p, DTensor)]
            assert growth.traffic.measured == growth.traffic.sent.get(rank, 0)
        else:
            out["tensors"].append({n: t.detach().clone() for n, t in tensors.items()})
        out["losses"] += [step(model, optimizer, 10 * number + s, rank, world) for s in range(1, 5)]
    return out


def several(rank: int, world: int, runs: list[tuple[Any, ...]]) -> list[dict[str, Any]]:
    return [trained(rank, world, *run) for run in runs]


@pytest.mark.parametrize(("world", "ways"), [(2, ["blocks"]), (3, ["blocks"]), (4, ["blocks", "hybrid"])])
def test_growth_in_mid_run_is_that_of_one_process(world: int, ways: list[str]) -> None:
    cases = [([WIDE, DEEP], "asymmetric"), ([WIDE[:1], WIDE[:1]], "exact"), ([VOCABULARY + DEEP], "copy")]
    if world != 3:
        cases = cases[: 2 if world == 2 else 3]
    alone = [trained(0, 1, "", growths, policy, {}) for growths, policy in cases]
    runs = [(way, *case, one) for way in ways for case, one in zip(cases, alone, strict=True)]
    ranks = run_ranks(world, several, world, runs)
    for number, run in enumerate(runs):
        assert [r[number]["wrong"] for r in ranks] == [[]] * world, run[:3]
        mean = torch.tensor([r[number]["losses"] for r in ranks], dtype=torch.float64).mean(0)
        torch.testing.assert_close(mean, torch.tensor(run[3]["losses"], dtype=torch.float64), rtol=0, atol=1e-6)
