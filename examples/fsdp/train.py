"""A training loop as torchtitan has it: FSDP2 and compilation block by block, distributed checkpoints; and it grows.

    torchrun --nproc-per-node 2 -m examples.fsdp.train --steps 60 --grow-at 20 --grow-at 40
    torchrun --nproc-per-node 4 -m examples.fsdp.train --steps 60 --grow-at 20 --grow-at 40     goes on, on 4 ranks

The growth is four lines of :func:`train`. What a checkpoint needs beside weights and moments is the class's config,
which the growth has set, and the per-slice learning rates, which ``torch.distributed.checkpoint`` does not bring back.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

import fxgrow
from examples.gpt.data import VOCAB_SIZE, Text
from examples.gpt.model import GPT, GPTConfig
from fxgrow.optim import load_rates_state, rates_state

#: what the model grows by, one after the other
GROWTHS: list[list[dict[str, Any]]] = [
    [{"op": "widen", "axis": "transformer.h.*.mlp/hidden", "factor": 2, "noise": {}}],
    [{"op": "deepen", "stack": "transformer.h", "factor": 2}],
]
BATCH = 16  #: sequences of a step, of all ranks together


def build(config: GPTConfig, mesh: DeviceMesh, compiled: bool) -> GPT:
    """The model, sharded; the same weights on any number of ranks."""
    torch.manual_seed(0)
    model = GPT(config)
    for block in model.transformer.h:
        if compiled:
            block.compile()
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def save(folder: Path, step: int, grown: int, model: GPT, optimizer: torch.optim.Optimizer) -> None:
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=folder / f"step{step}")
    if dist.get_rank() == 0:  # the last to be written: a run that is killed before goes on from the one before
        state = {"step": step, "grown": grown, "config": dataclasses.asdict(model.config)}
        new = folder / "latest.json.new"
        new.write_text(json.dumps({**state, "rates": rates_state(optimizer)}))
        new.replace(folder / "latest.json")
    dist.barrier()


def load(folder: Path, state: dict[str, Any], model: GPT, optimizer: torch.optim.Optimizer) -> None:
    weights, moments = get_state_dict(model, optimizer)
    together = {"model": weights, "optimizer": moments}
    dcp.load(together, checkpoint_id=folder / f"step{state['step']}")
    set_state_dict(model, optimizer, model_state_dict=together["model"], optim_state_dict=together["optimizer"])
    load_rates_state(optimizer, state["rates"], model)


def train(options: argparse.Namespace) -> list[float]:
    """Train, grow, save, or go on where a run has ended; the losses of this part of it."""
    rank, world = dist.get_rank(), dist.get_world_size()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(device, (world,))
    options.out.mkdir(parents=True, exist_ok=True)
    latest = options.out / "latest.json"
    state = json.loads(latest.read_text()) if latest.exists() else None
    config = GPTConfig(**state["config"]) if state else GPTConfig(vocab_size=VOCAB_SIZE, n_layer=2, n_embd=32)
    model = build(config, mesh, options.compile)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    if state:
        load(options.out, state, model, optimizer)
    step, grown = (state["step"], state["grown"]) if state else (0, 0)
    data, losses = Text(None, config.block_size, BATCH), list[float]()
    share = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    while step < options.steps:
        x, y = (t.to(device) for t in data.batch("train", torch.Generator().manual_seed(step)))
        if grown < len(GROWTHS) and step == options.grow_at[grown]:
            growth = fxgrow.grow(model, GROWTHS[grown], (x[:2], y[:2]), optimizer=optimizer)
            growth.apply_(model)
            growth.carry_(optimizer, warmup=20)
            grown += 1
            if rank == 0:
                print(f"step {step}: {growth.receipt.summary()}", flush=True)
        _, loss = model(x[share], y[share])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        mean = loss.detach()
        dist.all_reduce(mean)
        losses.append(float(mean) / world)
        if rank == 0 and step % 10 == 0:
            print(f"step {step}: loss {losses[-1]:.4f}", flush=True)
        if step % options.save_every == 0:
            save(options.out, step, grown, model, optimizer)
    return losses


def parsed(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--grow-at", type=int, action="append", help="before which step; twice (default: 20 and 40)")
    parser.add_argument("--save-every", type=int, default=10, help="steps")
    parser.add_argument("--out", type=Path, default=Path("out/fsdp"), help="folder of the checkpoints")
    parser.add_argument("--compile", action="store_true", help="compile the blocks")
    options = parser.parse_args(argv)
    options.grow_at = (options.grow_at or [20, 40]) + [-1] * len(GROWTHS)
    return options


def main() -> None:
    options = parsed()
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    train(options)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
