"""FSDP2 and tensor parallelism: a model grown in mid-run, each rank its shards, against one process."""

from __future__ import annotations

import functools
import gc
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import fxgrow
import fxgrow.optim
from fxgrow.ir.dtensors import Layout, Rectangle, local_of
from tests.models import small_gpt, tokens
from tests.processes import run_ranks, said

NOISE = {"noise": {"scale": 0.1, "relative": True}}
WIDE: list[dict[str, Any]] = [
    {"op": "widen", "axis": "transformer.h.*.mlp/hidden", "factor": 2, **NOISE},
    {"op": "widen", "axis": "./residual", "to": 48, **NOISE},
    {"op": "widen", "axis": "*/heads", "factor": 2},
]
DEEP: list[dict[str, Any]] = [{"op": "deepen", "stack": "transformer.h", "by": 1}]
GATE: list[dict[str, Any]] = [{**DEEP[0], "init": "gate"}]
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


def begun(layers: int = 2) -> nn.Module:
    return small_gpt(n_embd=36, n_head=3, n_layer=layers)


def trained(
    rank: int, world: int, way: str, growths: list[list[dict[str, Any]]], policy: str, found: Mapping[str, Any]
) -> dict[str, Any]:
    """Train and grow; after each growth, what differs from ``found``, or all there is where that is empty."""
    model = begun(1 if growths == [WIDE[:1], WIDE[:1]] else 2)  # tracing is most of what this test costs
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
        steps = 20 if number + 1 == len(growths) else 2
        out["losses"] += [step(model, optimizer, 50 * number + s, rank, world) for s in range(steps)]
    return out


def several(rank: int, world: int, runs: list[tuple[Any, ...]]) -> list[dict[str, Any]]:
    return [trained(rank, world, *run) for run in runs]


CASES: dict[str, tuple[list[list[dict[str, Any]]], str]] = {
    "width and depth": ([WIDE, DEEP], "asymmetric"),
    "twice": ([WIDE[:1], WIDE[:1]], "exact"),
    "vocabulary": ([VOCABULARY + DEEP], "copy"),
}


@functools.cache
def alone(case: str) -> dict[str, Any]:
    return trained(0, 1, "", *CASES[case], {})


@pytest.mark.parametrize(
    ("world", "runs"),
    [
        (2, [("blocks", "width and depth")]),
        (3, [("blocks", "twice"), ("blocks", "vocabulary")]),  # uneven shards
        (4, [("blocks", "width and depth"), ("hybrid", "twice"), ("hybrid", "vocabulary")]),
    ],
)
def test_growth_in_mid_run_is_that_of_one_process(world: int, runs: list[tuple[str, str]]) -> None:
    ranks = run_ranks(world, several, world, [(way, *CASES[case], alone(case)) for way, case in runs])
    for number, (_, case) in enumerate(runs):
        assert [r[number]["wrong"] for r in ranks] == [[]] * world, runs[number]
        mean = torch.tensor([r[number]["losses"] for r in ranks], dtype=torch.float64).mean(0)
        expected = torch.tensor(alone(case)["losses"], dtype=torch.float64)
        torch.testing.assert_close(mean, expected, rtol=0, atol=1e-6)


class Hidden(nn.Module):
    """Two layers, to be split by columns and by rows."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down(torch.relu(self.up(x)))
        return out


def outputs(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model.eval()(x)[0]
    model.train()
    return out


def grown_apart(
    model: nn.Module, spec: list[dict[str, Any]], optimizer: Any, policy: str = "asymmetric", verify: Any = False
) -> float:
    """By how much a growth changes what a model computes."""
    x, y = tokens()
    before = outputs(model, x)
    growth = fxgrow.grow(model, spec, (x, y), verify=verify)
    growth.apply_(model)
    growth.carry_(optimizer, policy)
    return float((outputs(model, x) - before).abs().max())


def with_options(mesh: Any) -> dict[str, Any]:
    """Everything that ``fully_shard`` takes, and what is set afterwards, stays through a growth."""
    model: Any = small_gpt(torch.float32)
    ignored = {model.transformer.ln_f.weight}
    for block in model.transformer.h:
        columns = {p: Shard(p.dim() - 1) for p in block.parameters()}
        half = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float32)
        fully_shard(block, mesh=mesh, mp_policy=half, shard_placement_fn=columns.get)
    fully_shard(model, mesh=mesh, offload_policy=CPUOffloadPolicy(pin_memory=False), ignored_params=ignored)
    model.set_requires_all_reduce(False)
    first, second = model.transformer.h[0], model.transformer.h[1]
    first.set_modules_to_forward_prefetch([second])
    optimizer = torch.optim.AdamW(model.parameters())
    step(model, optimizer, 0, 0, 1)
    error = grown_apart(model, WIDE + DEEP, optimizer)
    loss = step(model, optimizer, 1, 0, 1)
    block = model.transformer.h[-1]
    state = block._get_fsdp_state()
    group = state._fsdp_param_group
    return {
        "error": error,
        "learns": step(model, optimizer, 1, 0, 1) < loss,
        "half": state._mp_policy.param_dtype is torch.bfloat16,
        "columns": block.mlp.c_fc.weight.placements == (Shard(1),),
        "ignored": type(model.transformer.ln_f.weight) is nn.Parameter,
        "offloaded": isinstance(model._get_fsdp_state()._fsdp_param_group.offload_policy, CPUOffloadPolicy),
        "settings": group.all_reduce_grads is False and model.transformer.h[1] is second,
        "prefetch": [s._modules[0] for s in first._get_fsdp_state()._states_to_forward_prefetch] == [second],
        "class": type(block).__name__ == type(first).__name__ and isinstance(model, FSDPModule),
    }


def refused_and_undone(mesh: Any) -> dict[str, Any]:
    """What is refused, or taken back, leaves a model that trains on as if nothing had been."""
    x, y = tokens()
    losses, found = [], {}
    for kind in ("untouched", "refused before its first step", "taken back", "a gate"):
        model: Any = small_gpt()
        for block in model.transformer.h:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        if kind.startswith("refused"):
            found[kind] = said(lambda m=model: fxgrow.grow(m, [{"op": "widen", "axis": "*/no", "factor": 2}], (x, y)))  # type: ignore[misc]
        optimizer = torch.optim.AdamW(model.parameters())
        if kind == "taken back":
            growth, before = fxgrow.grow(model, WIDE + DEEP, (x, y), verify=False), list(model.parameters())
            with pytest.raises(KeyError), growth.applied(model):
                raise KeyError
            found["same objects"] = str(all(a is b for a, b in zip(before, model.parameters(), strict=True)))
        if kind == "a gate":
            found[kind] = said(lambda m=model: fxgrow.grow(m, GATE, (x, y), verify=False))  # type: ignore[misc]
            growth = fxgrow.grow(model, WIDE, (x, y), verify=False)
            found["module"] = said(lambda g=growth: g.module)  # type: ignore[misc]
            found["too early"] = said(lambda g=growth, o=optimizer: g.carry_(o))  # type: ignore[misc]
        losses.append([step(model, optimizer, s, 0, 1) for s in range(2)])
    return {"alike": all(each == losses[0] for each in losses), **found}


def waiting(mesh: Any) -> dict[str, Any]:
    """Gradients that wait for their step grow, and are clipped by the small model's norm."""
    found: dict[str, list[float]] = {}
    for kind in ("alone", "sharded"):
        model: Any = small_gpt()
        if kind == "sharded":
            fully_shard(model, mesh=mesh)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        step(model, optimizer, 0, 0, 1)
        _, loss = model(*tokens())
        loss.backward()
        error = grown_apart(model, WIDE[:1], optimizer, "exact")
        _, loss = model(*tokens())
        loss.backward()
        norm: Any = fxgrow.optim.clip_grad_norm_(optimizer, 0.5)
        optimizer.step()
        found[kind] = [error, float(norm.full_tensor() if kind == "sharded" else norm), step(model, optimizer, 3, 0, 1)]
    return {"apart": max(abs(a - b) for a, b in zip(*found.values(), strict=True))}


def tensor_parallel(mesh: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    model, x = Hidden().double(), torch.randn(4, 8, dtype=torch.float64)
    parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    optimizer = torch.optim.AdamW(model.parameters())
    model(x).sum().backward()
    optimizer.step()
    before = model(x).detach()
    growth = fxgrow.grow(model, [{"op": "widen", "axis": "*/hidden", "factor": 2}], (x,))
    growth.apply_(model)
    growth.carry_(optimizer)
    error = float((model(x) - before).abs().max())
    model(x).sum().backward()
    optimizer.step()
    shapes = [tuple(local_of(p).shape) for p in (model.up.weight, model.down.weight)]
    return {"error": error, "measured": growth.receipt.error_float64, "shapes": shapes}


def adapters(mesh: Any) -> dict[str, Any]:
    model: Any = fully_shard(small_gpt(), mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    step(model, optimizer, 0, 0, 1)
    model.unshard()  # gathered, as an evaluation may leave it
    adapt = [{"op": "lora", "modules": "*.c_attn", "rank": 2}]
    error = grown_apart(model, adapt, optimizer, verify="auto")
    step(model, optimizer, 1, 0, 1)
    named = {n: type(p) for n, p in model.named_parameters() if "lora" in n}
    return {"error": error, "sharded": bool(named) and set(named.values()) == {DTensor}}


def by_schedule(mesh: Any) -> dict[str, Any]:
    """A plateau that one rank alone would see: the ranks' mean decides, and all grow at the same step."""
    model: Any = fully_shard(small_gpt(), mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    event = {"trigger": {"below": {"metric": "loss", "value": 2.0}}, "operations": WIDE[:1]}
    scheduler = fxgrow.GrowthScheduler({"events": [event]}, args=tokens())
    grown = []
    for number in range(3):
        step(model, optimizer, number, 0, 1)
        mine = 1.5 if mesh.get_rank() == 0 or number == 2 else 3.0  # the mean is 2.25, and 1.5 in the end
        result = scheduler.step(model, optimizer, step=number, metrics={"loss": mine})
        grown.append(result is not None)
    step(model, optimizer, 4, 0, 1)
    return {"grown": grown, "hidden": model.transformer.h[0].mlp.c_fc.weight.shape[0]}


class _Turned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return -gradients[0]


class Reversed(Hidden):
    """Its backward is not that of its forward, which no weights of zero show."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = _Turned.apply(super().forward(x))
        return out


def disagreeing(rank: int) -> dict[str, Any]:
    model: Any = small_gpt()
    fully_shard(model)
    other = [{**WIDE[0], "factor": 2 + rank}]
    found = {"spec": said(lambda: fxgrow.grow(model, other, tokens(), verify=False))}
    reversed_: Any = fully_shard(Reversed())
    widened = {"op": "widen", "axis": "*/hidden", "factor": 2}
    found["backward"] = said(lambda: fxgrow.grow(reversed_, widened, (torch.randn(3, 8),), verify=False))
    if rank == 1:
        with torch.no_grad():
            local_of(model.lm_head.weight)[0, 0] = float("nan")
    return {**found, "one refuses": said(lambda: fxgrow.grow(model, WIDE, tokens(), verify=False))}


def ways(rank: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2,))
    return {
        f.__name__: f(mesh) for f in (with_options, refused_and_undone, waiting, tensor_parallel, adapters, by_schedule)
    } | {"disagreeing": disagreeing(rank)}


def test_what_a_model_is_sharded_with_goes_on_and_what_is_refused_leaves_it_alone() -> None:
    for found in run_ranks(2, ways):
        options = found["with_options"]
        assert options.pop("error") < 0.05  # bfloat16
        assert all(options.values()), options
        refused = found["refused_and_undone"]
        assert refused["alike"], refused
        assert refused["same objects"] == "True"
        assert "no axis matches" in refused["refused before its first step"]
        assert "a single number (a gate), and FSDP cannot shard what has no dims" in refused["a gate"]
        assert "no process holds a grown module" in refused["module"]
        assert "apply_(model) first" in refused["too early"]
        assert found["waiting"]["apart"] < 1e-9
        assert found["tensor_parallel"]["error"] < 1e-12
        assert found["tensor_parallel"]["measured"] < 1e-12
        assert found["tensor_parallel"]["shapes"] == [(16, 8), (8, 16)]
        assert found["adapters"] == {"error": 0.0, "sharded": True}
        assert found["by_schedule"] == {"grown": [False, False, True], "hidden": 256}
        assert found["disagreeing"]["spec"].startswith("RankError: the spec is not the same on all ranks")
        assert "rank 1 of 2 failed: the model holds NaN" in found["disagreeing"]["one refuses"]
        assert "custom autograd function" in found["disagreeing"]["backward"]


def dying(rank: int) -> str:
    """The second rank is killed while shards are sent."""
    model: Any = small_gpt()
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters())
    step(model, optimizer, 0, 0, 1)
    growth, before = fxgrow.grow(model, WIDE, tokens(), verify=False), list(model.parameters())
    sent = torch.distributed.batch_isend_irecv
    left = [4]

    def sending(operations: Any) -> Any:
        left[0] -= 1
        if rank == 1 and not left[0]:
            os._exit(9)
        return sent(operations)

    torch.distributed.batch_isend_irecv = sending
    found = said(lambda: growth.apply_(model))
    same = all(a is b for a, b in zip(before, model.parameters(), strict=True))
    return f"{found} {same}"


def test_a_rank_that_dies_in_a_growth_is_one_error_and_leaves_the_model_as_it_was() -> None:
    first, second = run_ranks(2, dying)
    assert second is None
    assert first.startswith("RankError: another of the 2 ranks has ended, or does not answer")
    assert first.endswith(" True")


def peak() -> int:
    """Bytes that this process held at most since the last call."""
    status = Path("/proc/self/status").read_text()
    Path("/proc/self/clear_refs").write_text("5")
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def measured(rank: int) -> dict[str, int]:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(2048, 4096, bias=False), nn.Linear(4096, 2048, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.down(torch.relu(self.up(x)))
            return out

    model: Any = Wide()
    fully_shard(model)
    x = torch.randn(2, 2048)
    growth = fxgrow.grow(model, [{"op": "widen", "axis": "*/hidden", "factor": 2, **NOISE}], (x,), verify=False)
    gc.collect()
    peak()
    before = peak()
    growth.apply_(model)
    new = sum(local_of(p).nbytes for p in model.parameters())
    return {"more": peak() - before, "new": new, "largest": growth.traffic.largest, "whole": model.up.weight.nbytes}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_a_rank_holds_its_old_and_new_shards_and_one_slice_and_never_a_whole_parameter() -> None:
    for found in run_ranks(2, measured):
        assert found["whole"] == 64 << 20
        assert found["new"] == 64 << 20  # of two such parameters, half each
        assert found["more"] < found["new"] + found["largest"] + (24 << 20), found
