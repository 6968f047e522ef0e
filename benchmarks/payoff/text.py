"""The text that is learnt: the sources of Python's standard library, some 30 MB of code and English, as bytes."""

from __future__ import annotations

import functools
import hashlib
import sysconfig
from pathlib import Path

import torch
from torch import Tensor

#: of 256: the share of the files that are kept for validation
HELD_OUT = 12


@functools.cache
def corpus() -> tuple[dict[str, Tensor], str]:
    """The bytes of both splits, uint8, and a digest of them: figures of one digest are of one text.

    A file is in one split as a whole, by a hash of its name.

    Raises:
        SystemExit: this Python was packaged without its sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    splits = {"train": bytearray(), "val": bytearray()}
    for file in sorted(root.rglob("*.py")):
        name = file.relative_to(root).as_posix()
        if not name.startswith(("site-packages/", "dist-packages/")):
            held = hashlib.blake2b(name.encode()).digest()[0] < HELD_OUT
            splits["val" if held else "train"] += file.read_bytes()
    if len(splits["val"]) < 100_000:
        raise SystemExit(f"{root} holds too few sources to learn from: this Python was packaged without them")
    digest = hashlib.blake2b(splits["train"] + splits["val"], digest_size=6).hexdigest()
    return {k: torch.frombuffer(v, dtype=torch.uint8) for k, v in splits.items()}, digest


def batch(split: str, generator: torch.Generator, batch_size: int, block_size: int) -> tuple[Tensor, Tensor]:
    """Random blocks and the bytes that follow each of their bytes, int64 (batch_size, block_size) both."""
    tokens = corpus()[0][split]
    starts = torch.randint(len(tokens) - block_size, (batch_size, 1), generator=generator)
    places = starts + torch.arange(block_size)
    return tokens[places].long(), tokens[places + 1].long()
