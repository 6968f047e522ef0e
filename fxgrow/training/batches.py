"""Micro-batches: each drawn by a generator of its own, so that a resumed run draws what it would have drawn."""

from __future__ import annotations

import hashlib

import torch

from fxgrow.ir import draws, trees
from fxgrow.training.task import Batch


def seeded(seed: int, split: str, number: int) -> torch.Generator:
    """The generator of one micro-batch: a function of the run's seed, the split and the micro-batch's number."""
    digest = hashlib.blake2b(f"{seed}/{split}/{number}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def sow(seed: int, number: int) -> None:
    """Seed what a training micro-batch draws besides its data (dropout), whichever rank computes it, and when."""
    draws.seed(seeded(seed, "step", number).initial_seed())


def to_device(batch: Batch, device: torch.device) -> Batch:
    """A micro-batch with its tensors on a device, nested ones too."""
    moved: Batch = trees.map_tensors(lambda x: x.to(device), batch)
    return moved
