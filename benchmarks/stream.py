"""A checkpoint larger than the memory that it may take, grown tensor by tensor: speed against ``cp``, and peak memory.

A folder of so many gigabytes (a GPT in bfloat16, in shards) is grown by ``fxgrow.folders.grow_checkpoint``, its MLPs
twice as wide, in a process of its own that is killed some times on the way and goes on. Then the result is copied by
``cp``. Both begin with nothing of what they read in the page cache, and end when the files are on the disk. The digest
must be that of a run which nobody killed (``--whole``: that takes the time of another growth).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks import common
from examples.gpt.model import GPT, GPTConfig
from fxgrow.folders import grow_checkpoint
from fxgrow.folders.tensorfile import header_of, write_tensor

SHARD = 2 * 10**9
SPEC = [{"op": "widen", "axis": "*/hidden", "factor": 2}]
#: bounds: bytes of memory, and the part of the speed of cp
MEMORY, SPEED = 3e9, 0.7


def synthetic(folder: Path, gigabytes: float, width: int) -> int:
    """Write a folder of some size; returns its bytes."""
    layers = max(2, round(gigabytes * 1e9 / (24 * width**2)))
    config = GPTConfig(
        vocab_size=1024,
        block_size=64,
        n_layer=layers,
        n_head=width // 64,
        n_embd=width,
        n_hidden=4 * width,
        head_dim=64,
    )
    with torch.device("meta"):
        model = GPT(config)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    tensors = [(n, torch.bfloat16, tuple(t.shape)) for n, t in model.state_dict().items() if ".wte." not in n]
    shards: list[list[Any]] = [[]]
    for tensor in tensors:
        size = sum(2 * torch.Size(shape).numel() for _, _, shape in [*shards[-1], tensor])
        if shards[-1] and size > SHARD:
            shards.append([])
        shards[-1].append(tensor)
    pool = torch.randn(2**22, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    places = {}
    for i, shard in enumerate(shards, 1):
        name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        with (folder / name).open("wb") as file:
            file.write(header_of(shard, {"format": "pt"}))
            for tensor, _, shape in shard:
                count = torch.Size(shape).numel()
                write_tensor(file, pool.repeat(-(-count // len(pool)))[:count].reshape(shape))
                places[tensor] = name
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return size_of(folder)


def size_of(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


def forgotten(folder: Path) -> None:
    """Have the system bring a folder's files to the disk, and drop them from its cache."""
    for file in folder.iterdir():
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def digest(folder: Path) -> str:
    """Of the weights."""
    found = hashlib.blake2b(digest_size=16)
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as opened:
            while data := opened.read(1 << 24):
                found.update(data)
    return found.hexdigest()


def grow(source: str, out: str, threads: int) -> dict[str, Any]:
    """Grow the folder in this process."""
    torch.set_num_threads(threads)
    forgotten(Path(source))
    with common.Meter() as meter:
        done = grow_checkpoint(source, SPEC, out, model_class=GPT, verify=False, shard_bytes=SHARD)
    return {"seconds": meter.wall, "peak": meter.peak, "parts": done.seconds}


def killed(source: Path, out: Path, threads: int, kills: int, seconds: float) -> int:
    """Begin the growth and kill it so many times while it writes; returns how many bytes were kept in the end."""
    rng = random.Random(0)
    code = "import sys; from pathlib import Path; from benchmarks.stream import grow; grow(sys.argv[1], sys.argv[2], 2)"
    part = out.with_name(f".{out.name}.growing")
    for _ in range(kills):
        process = subprocess.Popen([sys.executable, "-c", code, str(source), str(out)], cwd=common.ROOT)
        while process.poll() is None and not list(part.glob("*.part")):
            time.sleep(0.05)
        time.sleep(rng.uniform(0.1, 1) * seconds / (kills + 1))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.wait()
    return size_of(part) if part.exists() else 0


def copied(folder: Path, target: Path) -> float:
    """Seconds that ``cp`` takes, until the copies are on the disk. What was copied goes: disks are small."""
    target.mkdir()
    forgotten(folder)
    seconds = 0.0
    for file in sorted(folder.iterdir()):
        start = time.perf_counter()
        subprocess.run(["cp", str(file), str(target / file.name)], check=True)
        handle = os.open(target / file.name, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
        seconds += time.perf_counter() - start
        file.unlink()
    return seconds


def run(argv: list[str]) -> int:
    """Measure; 1 where a bound is missed."""
    parser = common.parser("stream", __doc__)
    parser.add_argument("--gigabytes", type=float, default=20.0, help="of the folder that is grown")
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--whole", action="store_true", help="compare with a run that nobody kills")
    parser.add_argument(
        "--folder", type=Path, help="where there is room for it three times; a temporary folder if none"
    )
    options = parser.parse_args(argv)
    gigabytes, width = (0.02, 256) if options.quick else (options.gigabytes, 4096)
    threads = common.threads(options)
    with working_folder(options.folder) as folder:
        source, out, copy = folder / "small", folder / "large", folder / "copy"
        size = synthetic(source, gigabytes, width)
        figures: dict[str, Any] = {"environment": common.environment(threads), "source": size}
        expected = ""
        if options.whole:
            grow(str(source), str(out), threads)
            expected = digest(out)
            shutil.rmtree(out)
        if options.kills:
            figures["kept"] = killed(source, out, threads, options.kills, gigabytes * 5)
            common.isolated("benchmarks.stream:grow", {"source": str(source), "out": str(out), "threads": threads})
            figures["digest"] = digest(out)
            shutil.rmtree(out)
        arguments = {"source": str(source), "out": str(out), "threads": threads}
        figures["grow"] = common.isolated("benchmarks.stream:grow", arguments)
        figures["bytes"] = size_of(out)
        last = digest(out)
        same = {last, expected or last, figures.get("digest", last)}
        shutil.rmtree(source)
        figures["copy"] = copied(out, copy)
    grown, ratio = figures["grow"], figures["copy"] / figures["grow"]["seconds"]
    rows = [
        ["read", f"{size / 1e9:.2f} GB"],
        ["written", f"{figures['bytes'] / 1e9:.2f} GB"],
        ["grown in", f"{grown['seconds']:.1f} s ({', '.join(f'{k} {v:.1f}' for k, v in grown['parts'].items())})"],
        ["copied by cp in", f"{figures['copy']:.1f} s"],
        ["peak memory", f"{grown['peak'] / 1e9:.2f} GB"],
    ]
    if options.kills or options.whole:
        rows.append(["other runs end in the same bytes", "yes" if len(same) == 1 else "NO"])
    common.table("A checkpoint, streamed", ["", ""], rows)
    verdicts = [common.verdict("peak memory", grown["peak"] / 1e9, MEMORY / 1e9, " GB")]
    verdicts += [common.verdict("seconds, of cp's", 1 / ratio, 1 / SPEED)]
    common.save(options.json, figures | {"verdicts": verdicts})
    return int(len(same) > 1 or not (options.quick or all(v["met"] for v in verdicts)))


@contextmanager
def working_folder(given: Path | None) -> Iterator[Path]:
    """A folder that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="fxgrow-stream-", dir=given) as folder:
        yield Path(folder)
