"""For whoever has a GPU: bits against the CPU, bandwidth against a device copy, speed against `cat` + `randn_like`.

Prints one row per case. `equal_bits` compares a small and a large tensor with the CPU backend's result. `ratio_copy` is
the time over that of `copy_` of the destination's bytes; `speedup_naive` is that of `cat` and `randn_like` over ours.
--tune times the tiles of the scatter form first.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import common
from benchmarks.materialise import DTYPES, SCALE, cases, naive
from fxgrow.kernels import DimMap, Noise, gpu, materialise


def seconds(call: Callable[[], Any], rounds: int, device: str | torch.device = "cuda") -> float:
    """Median seconds of a call: on the current GPU by events, on the CPU by the clock."""
    for _ in range(min(3, rounds)):
        call()
    times = []
    if torch.device(device).type != "cuda":
        for _ in range(rounds):
            began = time.perf_counter()
            call()
            times.append(time.perf_counter() - began)
        return statistics.median(times)
    for _ in range(rounds):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.cpu().view(width), b.cpu().view(width))


def measure(
    name: str,
    dims: list[DimMap | None],
    x: torch.Tensor,
    noise: str,
    rounds: int,
    device: str | torch.device = "cuda",
) -> dict[str, Any]:
    how = None if noise == "none" else Noise("antisymmetric", SCALE, distribution=noise)  # type: ignore[arg-type]
    here = x.to(device)
    out = materialise(here, dims, noise=how, backend="triton")
    equal = same_bits(out, materialise(x, dims, noise=how))
    lo = [n // 3 for n in out.shape]
    shard = materialise(here, dims, noise=how, backend="triton", offset=lo, local_shape=[n // 2 for n in out.shape])
    equal &= same_bits(shard, out[tuple(slice(a, a + n) for a, n in zip(lo, shard.shape, strict=True))].contiguous())
    other = torch.ones_like(out)
    copy = seconds(lambda: out.copy_(other), rounds, device)
    ours = seconds(lambda: materialise(here, dims, noise=how, backend="triton", out=out), rounds, device)
    slow = seconds(lambda: naive(here, dims, how is not None), rounds, device)
    moved = out.numel() * out.element_size() + here.numel() * here.element_size()
    return {
        "case": name,
        "dtype": str(x.dtype).removeprefix("torch."),
        "noise": noise,
        "equal_bits": equal,
        "gigabytes_per_second": moved / ours / 1e9,
        "ratio_copy": ours / copy,
        "speedup_naive": slow / ours,
    }


def run(argv: list[str]) -> int:
    """Entry of ``python -m benchmarks gpu_materialise``."""
    parser = common.parser("gpu_materialise", __doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--tune", action="store_true", help="time the tiles first and use the best")
    options = parser.parse_args(argv)
    missing = gpu.available()
    if missing is not None or not torch.cuda.is_available():
        print(f"skipped: {missing or 'no GPU'}")
        common.save(options.json, {"environment": common.environment(), "rows": [], "skipped": missing or "no GPU"})
        return 0
    rows, columns = (512, 256) if options.quick else (8192, 4096)
    tiles: dict[str, dict[str, float]] = {}
    if options.tune:
        for dtype in DTYPES[:2]:
            for noisy in (False, True):
                times = gpu.tune(dtype, noisy)
                tiles[f"{dtype} noise={noisy}"] = {str(k): v for k, v in times.items()}
                print(dtype, "noise" if noisy else "copy", times)
    results = []
    for dtype in DTYPES:
        x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(dtype)
        for name, dims in cases(rows, columns).items():
            for noise in ("none", "bytes", "normal"):
                results.append(measure(name, dims, x, noise, options.rounds))
    shown = list(results[0])
    common.table(
        torch.cuda.get_device_name(),
        shown,
        [[str(r[c]) if c == "equal_bits" else r[c] for c in shown] for r in results],
    )
    wrong = [r for r in results if not r["equal_bits"]]
    print(f"{len(results) - len(wrong)} of {len(results)} cases equal the CPU to the bit")
    device = torch.cuda.get_device_name()
    common.save(options.json, {"environment": common.environment() | {"gpu": device}, "rows": results, "tiles": tiles})
    return 1 if wrong else 0
