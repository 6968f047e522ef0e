"""Weight duplication against a plain copy, against the usual `torch.cat` + `randn_like`, and its peak memory.

ratio_memcpy: seconds into a touched destination over those of `copy_` of as many bytes, best of rounds taken in turns.
speedup_naive: seconds of `torch.cat` and `randn_like`, over those of `materialise`, both into fresh memory.
peak_over_destination: resident memory above the source at its highest, over the bytes of the destination.
The JSON has these per row and, under `details`, the size and the same ratios in processor seconds, all threads together
(`_cpu`): for machines busy with other things.
--isa takes the kernels of another level than the processor's best: AVX2 can be measured where there is AVX-512.
The weight is 4096 x 1024, unless --quick; an eighth of its rows for the torch backend, which is slow.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import common
from fxgrow.kernels import DimMap, Noise, backends, builder, materialise

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SCALE = 0.05
COLUMNS = ("case", "dtype", "noise", "backend", "ratio_memcpy", "speedup_naive", "peak_over_destination")
MIB = 1 << 20


def _split(index: torch.Tensor) -> DimMap:
    count = torch.bincount(index)
    return DimMap(index, split=1.0 / count[index].double())


def cases(rows: int, columns: int) -> dict[str, list[DimMap | None]]:
    """Name -> maps, of a rows x columns weight; the columns are the split dim but in `split rows`."""
    twice, wide = torch.arange(2 * rows) % rows, torch.arange(2 * columns) % columns
    return {
        "double": [DimMap(twice), _split(wide)],
        "interleaved": [DimMap(twice.sort().values), _split(wide.sort().values)],
        "split rows": [_split(twice), DimMap(wide)],
        "triple": [None, _split(torch.arange(3 * columns) % columns)],
        "uneven": [None, _split(torch.arange(columns * 3 // 2 - 36) % columns)],
    }


def naive(x: torch.Tensor, dims: list[DimMap | None], noise: bool) -> torch.Tensor:
    """What scripts do: concatenate whole copies, divide, add `randn_like`. Not exact."""
    for d, m in enumerate(dims):
        if m is None:
            continue
        whole, rest = divmod(len(m.index), x.shape[d])
        x = torch.cat([x] * whole + ([x.narrow(d, 0, rest)] if rest else []), d)
        if m.split is not None:
            shape = [-1 if e == d else 1 for e in range(x.dim())]
            x = x * m.split.to(x.dtype).view(shape)
    return x + SCALE * torch.randn_like(x) if noise else x


def peak_of(make: Callable[[], torch.Tensor]) -> float:
    """Resident memory above what there was, over the bytes of the result."""
    first = make()  # what is made once (tables, the native library) is not a temporary; kept, so as not to be recycled
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # nor what glibc keeps of earlier tensors
    with common.Meter() as meter:
        y = make()
    del first
    return (meter.peak - meter.before) / (y.numel() * y.element_size())


def measure(
    name: str, dims: list[DimMap | None], x: torch.Tensor, noise: bool, backend: str, rounds: int
) -> dict[str, Any]:
    how = Noise("antisymmetric", SCALE) if noise else None
    out = materialise(x, dims, noise=how, backend=backend)
    other = torch.ones_like(out)
    touched = common.side_by_side(
        {"copy": lambda: out.copy_(other), "ours": lambda: materialise(x, dims, noise=how, backend=backend, out=out)},
        rounds,
    )
    best = {k: {clock: min(v[clock]) for clock in ("wall", "cpu")} for k, v in touched.items()}
    fresh = common.side_by_side(
        {
            "naive": lambda: naive(x, dims, noise),
            "ours": lambda: materialise(x, dims, noise=how, backend=backend),
        },
        max(2, rounds // 3),
    )
    return {
        "case": name,
        "dtype": str(x.dtype).removeprefix("torch."),
        "noise": "antisymmetric" if noise else "none",
        "backend": backend,
        "mib": round(out.numel() * out.element_size() / MIB, 1),
        "milliseconds": best["ours"]["wall"] * 1e3,
        "ratio_memcpy": best["ours"]["wall"] / best["copy"]["wall"],
        "ratio_memcpy_cpu": best["ours"]["cpu"] / best["copy"]["cpu"],
        "speedup_naive": min(fresh["naive"]["wall"]) / min(fresh["ours"]["wall"]),
        "speedup_naive_cpu": min(fresh["naive"]["cpu"]) / min(fresh["ours"]["cpu"]),
        "peak_over_destination": peak_of(lambda: materialise(x, dims, noise=how, backend=backend)),
    }


def run(argv: list[str]) -> int:
    """Entry of ``python -m benchmarks materialise``."""
    parser = common.parser("materialise", __doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--case", action="append", help="only these cases; may be repeated")
    parser.add_argument("--dtype", action="append", help="only these dtypes; may be repeated")
    parser.add_argument("--backend", action="append", help="only these backends; may be repeated")
    parser.add_argument("--isa", choices=list(builder.LEVELS), help="the CPU kernels of this level, not the best")
    options = parser.parse_args(argv)
    if options.isa:
        os.environ[builder.VARIABLE] = options.isa
    count = common.threads(options)
    torch.set_num_threads(count)
    rows, columns = (512, 256) if options.quick else (4096, 1024)
    rounds = 3 if options.quick else options.rounds
    served = [b.name for b in backends() if b.available and b.name in ("cpu", "torch")]
    for b in backends():
        if not b.available:
            print(b)
    results = []
    for dtype in DTYPES:
        if options.dtype and str(dtype).removeprefix("torch.") not in options.dtype:
            continue
        x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(dtype)
        for name, dims in cases(rows, columns).items():
            for noise in (False, True):
                for backend in served:
                    if (options.case and name not in options.case) or (
                        options.backend and backend not in options.backend
                    ):
                        continue
                    if backend == "torch" and (name != "double" or dtype not in DTYPES[:2]):
                        continue  # the reference is slow: one case tells
                    if backend == "cpu":
                        results.append(measure(name, dims, x, noise, backend, rounds))
                    else:
                        part = x[: rows // 8]
                        results.append(measure(name, cases(*part.shape)[name], part, noise, backend, 2))
                    print({c: v if isinstance(v, str) else round(v, 2) for c, v in results[-1].items()}, flush=True)
    columns_shown = ["case", "dtype", "noise", "backend", "ratio_memcpy", "ratio_memcpy_cpu", "speedup_naive"]
    columns_shown += ["speedup_naive_cpu", "peak_over_destination"]
    common.table("materialise", columns_shown, [[r[c] for c in columns_shown] for r in results])
    verdicts = []
    ours = [r for r in results if r["backend"] == "cpu" and r["case"] in ("double", "interleaved", "split rows")]
    for dtype, noise, bound in (
        ("float32", "none", 1.0),
        ("bfloat16", "none", 1.0),
        ("float32", "antisymmetric", 1.25),
        ("bfloat16", "antisymmetric", 2.5),
    ):
        worst = max((r["ratio_memcpy"] for r in ours if (r["dtype"], r["noise"]) == (dtype, noise)), default=None)
        if worst is not None and not options.quick:
            verdicts.append(common.verdict(f"{dtype}, {noise} noise, over copy_", worst, bound))
    if ours and not options.quick:
        for r in ours:
            if (r["case"], r["dtype"], r["noise"]) == ("double", "float32", "antisymmetric"):
                verdicts.append(common.verdict("ours over naive, end to end, float32", 1 / r["speedup_naive"], 1 / 12))
        verdicts.append(common.verdict("peak over destination", max(r["peak_over_destination"] for r in ours), 1.05))
    rows_out = [{c: r[c] for c in COLUMNS} for r in results]
    details = [{c: v for c, v in r.items() if c not in COLUMNS[4:]} for r in results]
    environment = common.environment(count) | {"isa": builder.level()}
    common.save(options.json, {"environment": environment, "rows": rows_out, "details": details, "verdicts": verdicts})
    return 0
