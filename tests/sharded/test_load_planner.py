"""A distributed checkpoint of a small model, read into a grown one at another number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fxgrow
from fxgrow.errors import CheckpointError
from fxgrow.ir.dtensors import local_of
from fxgrow.plan import GrowthPlan
from fxgrow.sharded.loading import GrowthLoadPlanner
from tests.models import small_gpt, tokens
from tests.processes import run_ranks
from tests.sharded.test_fsdp import part, settle

SPEC: list[dict[str, Any]] = [
    {"op": "widen", "axis": "transformer.h.*.mlp/hidden", "factor": 2, "noise": {"scale": 0.1, "relative": True}},
    {"op": "widen", "axis": "./residual", "to": 48},
    {"op": "widen", "axis": "transformer.h.*.mlp/hidden", "by": 32, "fill": "add"},
]


def trained(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters())
    _, loss = model(*tokens())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    settle(model, optimizer)
    return optimizer


def saved(rank: int, world: int, folder: str) -> None:
    model: Any = small_gpt()
    for block in model.transformer.h:
        fully_shard(block, mesh=init_device_mesh("cpu", (world,)))
    fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    optimizer = trained(model)
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optim": state, "step": 7}, checkpoint_id=folder)


def larger() -> Any:
    """The grown class, sharded; with an optimizer that has state to load into."""
    model: Any = small_gpt(n_embd=48, n_head=4, head_dim=8, n_hidden=256)
    for block in model.transformer.h:
        fully_shard(block)
    return fully_shard(model)


def loaded(rank: int, folder: Path, plan: GrowthPlan, expected: dict[str, torch.Tensor]) -> list[str]:
    """Names of what differs from the growth in memory."""
    model = larger()
    optimizer = trained(model)
    weights, state = get_state_dict(model, optimizer)
    together = {"model": weights, "optim": state, "step": 0}
    reader = dcp.FileSystemReader(str(folder / "ck"))
    planner = GrowthLoadPlanner(plan)
    planner.measure(reader)
    dcp.load(together, storage_reader=reader, planner=planner)
    wrong = [] if together["step"] == 7 else ["step"]
    for name, p in model.named_parameters():
        moments = {f"{name} {k}": v for k, v in optimizer.state[p].items() if v.shape == p.shape}
        for key, value in {name: p, **moments}.items():
            if not torch.equal(local_of(value), part(value, expected[key])):
                wrong.append(key)
    return wrong + (of_a_folder(folder, plan, expected) if torch.distributed.get_world_size() == 2 else [])


class Counting(GrowthLoadPlanner):
    """Counts the numbers that are read."""

    count = 0

    def commit_tensor(self, read_item: Any, tensor: torch.Tensor) -> None:
        self.count += tensor.numel()
        super().commit_tensor(read_item, tensor)


def of_a_folder(folder: Path, plan: GrowthPlan, expected: dict[str, torch.Tensor]) -> list[str]:
    """The same, of a folder as Hugging Face has them, and into another."""
    model = larger()
    state = get_model_state_dict(model)
    reader, planner = HuggingFaceStorageReader(str(folder / "small")), Counting(plan)
    planner.measure(reader)
    dcp.load(state, storage_reader=reader, planner=planner)
    wrong = [n for n, p in model.named_parameters() if not torch.equal(local_of(p), part(p, expected[n]))]
    if planner.count > sum(local_of(p).numel() for p in model.parameters()):
        wrong.append(f"{planner.count} numbers were read")
    del state["lm_head.weight"]  # tied, which safetensors does not take
    writer = HuggingFaceStorageWriter(str(folder / "large"), save_distributed=True, enable_consolidation=True)
    dcp.save(state, storage_writer=writer)
    return wrong


def test_each_rank_reads_what_its_shards_are_made_of(tmp_path: Path) -> None:
    model = small_gpt()
    optimizer = trained(model)
    spec = SPEC[:2]
    growth = fxgrow.grow(model, spec, tokens(), verify=False)
    grown = growth.carry(optimizer, "copy")
    expected: dict[str, torch.Tensor] = {}
    for name, p in growth.module.named_parameters():
        expected[name] = p.detach()
        expected |= {f"{name} {k}": v for k, v in grown.state[p].items() if v.shape == p.shape}
    (tmp_path / "small").mkdir()
    names = sorted(model.state_dict().keys() - {"lm_head.weight"})
    for number, some in enumerate((names[::2], names[1::2]), 1):
        held = {n: model.state_dict()[n] for n in some}
        save_file(held, tmp_path / "small" / f"model-0000{number}-of-00002.safetensors")
    run_ranks(3, saved, 3, str(tmp_path / "ck"))
    for world in (1, 2):
        assert run_ranks(world, loaded, tmp_path, growth.plan, expected) == [[]] * world
    (written,) = (tmp_path / "large").glob("*.safetensors")
    large = load_file(written)
    assert set(large) == set(expected) - {n for n in expected if " " in n} - {"lm_head.weight"}
    assert all(torch.equal(t, expected[n]) for n, t in large.items())


def test_what_cannot_be_read_so_is_refused(tmp_path: Path) -> None:
    model = small_gpt()
    dcp.save({"model": model.state_dict()}, checkpoint_id=str(tmp_path / "ck"), no_dist=True)
    reader = dcp.FileSystemReader(str(tmp_path / "ck"))
    growth = fxgrow.grow(model, SPEC[:1], tokens(), verify=False)
    state = {"model": growth.module.state_dict()}

    def load(planner: GrowthLoadPlanner, into: dict[str, Any]) -> str:
        with pytest.raises((CheckpointError, dcp.api.CheckpointException)) as caught:
            dcp.load(into, storage_reader=reader, planner=planner, no_dist=True)
        return str(caught.value)

    assert "planner.measure(reader)" in load(GrowthLoadPlanner(growth.plan), state)
    again = fxgrow.grow(model, [SPEC[0], SPEC[2], SPEC[0]], tokens(), verify=False)
    assert "in several steps" in load(GrowthLoadPlanner(again.plan), {"model": again.module.state_dict()})
    assert "in the state dict" in load(GrowthLoadPlanner(growth.plan), {"model": model.state_dict()})
