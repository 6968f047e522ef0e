"""Shards grown where they are: to the bit what one process makes, in every layout, for as few bytes as are said."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import fxgrow
from fxgrow.ir.dtensors import Layout, Rectangle, local_of
from fxgrow.plan import GrowthPlan
from fxgrow.weights.exchange import Traffic, holders, pieces
from fxgrow.weights.materialise import materialise_moment, materialise_tensor
from fxgrow.weights.shards import count_traffic, materialise_shard
from tests.models import small_gpt, tokens
from tests.processes import run_ranks

NOISE = {"noise": {"scale": 0.1, "relative": True}}
SPEC: list[dict[str, Any]] = [
    {"op": "widen", "axis": "transformer.h.*.mlp/hidden", "factor": 2, **NOISE},
    {"op": "widen", "axis": "./residual", "to": 48, **NOISE},
    {"op": "widen", "axis": "*/heads", "factor": 2, "fill": "add"},
    {"op": "deepen", "stack": "transformer.h", "by": 1},
    {"op": "extend", "axis": "*/vocab", "to": 61, "init": "mean", "preserve": "approximate"},
]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def grow_shards(rank: int, plan: GrowthPlan, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What differs from one process's result, by layout and name."""
    flat, grid = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    layouts: dict[str, tuple[Any, list[Any]]] = {
        "rows": (flat, [Shard(0)]),
        "columns": (flat, [Shard(1)]),
        "hybrid": (grid, [Replicate(), Shard(0)]),
        "both": (grid, [Shard(0), Shard(1)]),
        "twice": (grid, [Shard(0), Shard(0)]),
    }
    wrong, bytes_sent = [], {}
    for kind, (mesh, placements) in layouts.items():
        said, seen, largest = Traffic(), Traffic(), 0
        for name, t in plan.tensors.items():
            old = tensors[t.source] if t.source is not None else None
            if old is not None and old.dim() == 1 and kind in ("columns", "both"):
                continue
            one = materialise_tensor(t, old, dtype=torch.float32)
            there = one if old is None else old
            source = distribute_tensor(there, mesh, placements)
            if old is not None:
                count_traffic(t, old.shape, Layout.of(source), old.element_size(), said)
            shard = materialise_shard(t, None if old is None else source, source, traffic=seen)
            mine = Layout.of(source).rectangles(one.shape)[rank]
            if not torch.equal(shard, one[mine.within(Rectangle.whole(one.shape))]):
                wrong.append(f"{kind}: {name}")
            largest = max(largest, shard.nbytes)
            if old is not None:
                again = materialise_tensor(t, source)
                if not torch.equal(whole(again), one):
                    wrong.append(f"{kind}: {name} as a DTensor")
                grown = materialise_moment(t, source, "square", scale_gradients=True)
                if not torch.equal(whole(grown), materialise_moment(t, old, "square", scale_gradients=True)):
                    wrong.append(f"{kind}: moments of {name}")
        bytes_sent[kind] = [said.sent.get(rank, 0), seen.measured]
    return {"wrong": wrong, "bytes": bytes_sent}


@pytest.fixture(scope="module")
def grown() -> tuple[GrowthPlan, dict[str, torch.Tensor]]:
    model = small_gpt(torch.float32, n_embd=36, n_head=3)
    growth = fxgrow.grow(model, SPEC, tokens(), verify=False)
    again = fxgrow.grow(model, [*SPEC, SPEC[0]], tokens(), verify=False)  # in two stages
    plan = growth.plan.model_copy(
        update={"tensors": {**growth.plan.tensors, **{f"{n} (twice)": t for n, t in again.plan.tensors.items()}}}
    )
    names = {t.source for t in plan.tensors.values()}
    tensors = {n: t.detach() for n, t in (*model.named_parameters(), *model.named_buffers()) if n in names}
    sharded = {n for n, t in tensors.items() if t.is_floating_point()}
    kept = {n: t for n, t in plan.tensors.items() if t.source in sharded or t.source is None}
    return plan.model_copy(update={"tensors": kept}), tensors


def test_every_layout_grows_to_the_same_bits(grown: tuple[GrowthPlan, dict[str, torch.Tensor]]) -> None:
    plan, tensors = grown
    assert any(t.stages for t in plan.tensors.values())
    results = run_ranks(4, grow_shards, plan, tensors)
    assert [r["wrong"] for r in results] == [[]] * 4
    for r in results:
        for kind, (said, measured) in r["bytes"].items():
            assert said == measured, kind
    assert any(r["bytes"]["rows"][1] for r in results)


def cover(found: list[Any], target: Rectangle) -> bool:
    counts = torch.zeros(target.shape, dtype=torch.int64)
    for piece in found:
        counts[piece.target.within(target)] += 1
    return bool((counts == 1).all())


@pytest.mark.parametrize("kind", ["tiled", "interleaved", "random", "newborn", "none"])
@pytest.mark.parametrize("most", [1 << 20, 64])
def test_pieces_cover_a_part_once_and_name_what_they_need(
    kind: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fxgrow.weights.exchange.MOST", most)
    old, generator = 13, torch.Generator().manual_seed(0)
    index = {
        "tiled": (torch.arange(31) % old).numpy(),
        "interleaved": torch.arange(old).repeat_interleave(2).numpy(),
        "random": torch.randint(old, (31,), generator=generator).numpy(),
        "newborn": torch.cat([-torch.arange(1, 4), torch.arange(old), -torch.arange(4, 9)]).numpy(),
        "none": None,
    }[kind]
    size = old if index is None else len(index)
    for start in range(0, size, 5):
        target = Rectangle((start, 0), (min(7, size - start), 3))
        found = pieces([index, None], [old, 3], target, split={0}, whole=set(), itemsize=4)
        assert cover(found, target)
        for piece in found:
            rows = range(piece.target.start[0], piece.target.start[0] + piece.target.shape[0])
            needed = {int(index[r]) if index is not None else r for r in rows} - set(range(-99, 0))
            first, count = piece.source.start[0], piece.source.shape[0]
            assert needed <= set(range(first, first + count))
            assert count * 3 * 4 <= most or count <= 2 * max(1, most // 12)


def test_even_rows_of_interleaved_copies_stay_where_they_are() -> None:
    """As DESIGN has it: a row shard of the grown tensor is made of the same rank's row shard of the old one."""
    index = torch.arange(16).repeat_interleave(2).numpy()
    held = {r: Rectangle((4 * r, 0), (4, 8)) for r in range(4)}
    targets = {r: Rectangle((8 * r, 0), (8, 8)) for r in range(4)}
    traffic = Traffic()
    wanted = {r: pieces([index, None], [16, 8], t, split={0}, whole=set(), itemsize=4) for r, t in targets.items()}
    traffic.count(held, wanted, 4)
    assert traffic.total == 0
    tiled = (torch.arange(32) % 16).numpy()
    wanted = {r: pieces([tiled, None], [16, 8], t, split={0}, whole=set(), itemsize=4) for r, t in targets.items()}
    traffic.count(held, wanted, 4)
    assert traffic.total == (32 - 8) * 8 * 4  # rank 0 and 2 have the first half of theirs; 8 rows of 32 are at home


def test_copies_of_a_shard_serve_their_own_row_of_the_mesh() -> None:
    held = {0: Rectangle((0,), (4,)), 1: Rectangle((4,), (4,)), 2: Rectangle((0,), (4,)), 3: Rectangle((4,), (4,))}
    assert [p.rank for p in holders(held, Rectangle((0,), (8,)), 2)] == [2, 3]
    assert [p.rank for p in holders(held, Rectangle((0,), (8,)), 0)] == [0, 1]
    assert local_of(torch.ones(2)).sum() == 2
