"""Kill processes while they save over a checkpoint, and look at what is there: ``python -m tests.kills --kills 200``.

Each process saves again and again, every save with weights that are all one number, and is killed (SIGKILL) at a random
moment. Meanwhile and afterwards the checkpoint is loaded. *missing*: there is none that loads; *torn*: its weights or
examples are of two saves; *left*: files or folders that a save after the last kill did not clean up. All must be 0.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

import fxgrow
from fxgrow.errors import CheckpointError

NAMES = ["examples.safetensors", "manifest.json", "model.safetensors"]


@dataclass
class Outcome:
    """What was found."""

    kills: int = 0
    loads: int = 0
    saves: int = 0
    missing: list[str] = field(default_factory=list)
    torn: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.kills} kills, {self.loads} loads, {self.saves} saves that finished: {len(self.missing)} missing, "
            f"{len(self.torn)} torn, {len(self.left)} left over"
        )


def growth() -> fxgrow.Growth:
    """A small growth whose weights are all one number."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4))
    return fxgrow.grow(model, {"op": "widen", "axis": "./hidden", "factor": 2}, (torch.randn(3, 6),), verify=False)


def fill(module: nn.Module, value: float) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(value)


def look(path: Path, found: Outcome) -> None:
    """Load the checkpoint and note what is wrong with it."""
    found.loads += 1
    try:
        loaded = fxgrow.load(path)
    except CheckpointError as error:
        found.missing.append(str(error))
        return
    values = {float(v) for p in loaded.module.parameters() for v in p.detach().flatten().unique()}
    if len(values) != 1:
        found.torn.append(f"weights of {sorted(values)}")
    elif loaded.replay_error() != 0.0:
        found.torn.append(f"examples of another save than the weights {values}")


def save_for_ever(made: fxgrow.Growth, path: Path, number: int, counter: int) -> None:
    """Of the process that is killed; says on a pipe when a save has finished."""
    while True:
        number += 1
        fill(made.module, (number % 1000) / 64 + 1)
        fxgrow.save(made, path)
        os.write(counter, b".")


def run(kills: int, seed: int, *, fresh: bool = False, verbose: bool = False) -> Outcome:
    """Kill so many processes.

    Args:
        fresh: remove the checkpoint before each, so that the first save makes the folder; "missing" is no fault then.
    """
    torch.set_num_threads(1)
    rng = random.Random(seed)
    found = Outcome()
    made = growth()
    folder = Path(tempfile.mkdtemp(prefix="fxgrow-kills-"))
    path = folder / "grown"
    try:
        fill(made.module, 1.0)
        start = time.perf_counter()
        fxgrow.save(made, path)
        fxgrow.save(made, path)
        usual = time.perf_counter() - start
        for number in range(kills):
            if fresh:
                shutil.rmtree(path)
            reading, writing = os.pipe()
            process = os.fork()
            if process == 0:
                try:
                    save_for_ever(made, path, number * 1000 + rng.randrange(1000), writing)
                finally:
                    os._exit(1)  # never back into the caller's stack
            os.close(writing)
            deadline = time.perf_counter() + rng.uniform(0, 1.5 * usual)
            if not fresh:
                look(path, found)  # while it saves
            time.sleep(max(0.0, deadline - time.perf_counter()))
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            found.kills += 1
            while chunk := os.read(reading, 4096):
                found.saves += len(chunk)
            os.close(reading)
            if not fresh or path.exists():
                look(path, found)
            if fresh and not path.exists():
                fxgrow.save(made, path)
            if verbose and found.kills % 20 == 0:
                print(found, flush=True)
        fxgrow.save(made, path)
        look(path, found)
        found.left = [str(p) for p in folder.iterdir() if p != path]
        found.left += [str(p) for p in path.iterdir() if p.name not in NAMES]
    finally:
        shutil.rmtree(folder)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fresh", action="store_true", help="kill saves to a path where nothing is")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    found = run(arguments.kills, arguments.seed, fresh=arguments.fresh, verbose=True)
    print(found)
    for problem in [*found.missing, *found.torn, *found.left][:20]:
        print(" ", problem)
    return 1 if found.missing or found.torn or found.left else 0


if __name__ == "__main__":
    sys.exit(main())
