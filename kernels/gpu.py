"""The Triton backend: tables and launches, for CUDA and ROCm tensors and, in Triton's interpreter, CPU tensors."""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxgrow.kernels.builder import cache_folder
from fxgrow.kernels.job import FLOATS, Job
from fxgrow.kernels.maps import FILL_MEAN, FILL_RANDOM, FILL_ZERO, OLD, Dim, DimMap, Noise, cuts_of
from fxgrow.kernels.native import Loop, loops, mean_layout
from fxgrow.kernels.philox import DISTRIBUTIONS, UNIT
from fxgrow.kernels.prepare import prepare
from fxgrow.publish import replacing

ROWS = 1 << 16  # rows per launch of the general form: bounds its tables to a few MiB
Tile = tuple[int, int]  # source columns per program, warps
TILE: Tile = (2048, 4)  # of the scatter form, unless TILES or a tuning says otherwise
TILES: dict[str, Tile] = {"woven float64 noise": (4096, 4)}  # by the name that `tile_name` gives
CANDIDATES: tuple[Tile, ...] = ((1024, 2), (1024, 4), (2048, 4), (2048, 8), (4096, 4), (4096, 8))
GATHER_TILE: Tile = (512, 4)
TUNE = "FXGROW_TUNE"  # environment variable: time the tiles of a kind of call when it first happens


class Unsupported(Exception):
    """A call this backend leaves to the torch backend."""


def interpreted() -> bool:
    """Whether Triton runs in its interpreter (read once, when Triton is imported)."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0", "false", "False")


@functools.cache
def available() -> str | None:
    """``None`` if the backend works here, otherwise why not."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return "triton is not installed"
    if not interpreted() and not torch.cuda.is_available():
        return "no GPU that torch can use (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly)"
    return None


def devices() -> str:
    """What the backend serves here, in words."""
    return "CPU, in the interpreter" if interpreted() else "CUDA and ROCm GPUs"


@functools.cache
def _kernels() -> Any:
    from fxgrow.kernels import triton_kernels

    return triton_kernels


def target_code() -> int:
    """0 in the interpreter, 1 on NVIDIA, 2 on AMD."""
    return 0 if interpreted() else 2 if torch.version.hip else 1


def run(job: Job, out: Tensor) -> None:
    """Fill `out` (shape ``job.local``) as `job` says.

    Raises:
        Unsupported: fills of integers, conversions between integers, rows of 2^30 columns, a rectangle for a source.
    """
    if out.numel() == 0:
        return
    if not interpreted() and out.device.type != "cuda":
        raise Unsupported(f"{out.device}")
    if job.trivial and job.source is not None:
        out.copy_(job.copied())
        return
    if job.partial:
        raise Unsupported("a source that is a rectangle of a larger tensor")
    bits = job.plain and job.source is not None and job.source.dtype == job.dtype
    if not bits and (job.dtype not in FLOATS or (job.source is not None and job.source.dtype not in FLOATS)):
        raise Unsupported("integers are only gathered")
    nest = loops(job, out)
    column = nest[-1]
    if column.target_stride != 1 and column.local > 1:
        raise Unsupported("a destination with a strided last dim")
    if max(column.local, column.dim.virtual) >= 1 << 30:
        raise Unsupported("rows of more than 2^30 columns")
    with torch.cuda.device(out.device) if out.device.type == "cuda" else torch.no_grad():
        plan = scatter_plan(job, nest)
        if plan is not None:
            _scatter(job, out, plan)
        else:
            _gather(job, out, nest, bits)


# ---- the scatter form ----


@dataclass(frozen=True)
class Scatter:
    """A job the scatter form can do: uniform copies of rows and columns."""

    rows: int
    columns: int
    source_start: int  # elements
    source_stride: int
    target_stride: int
    row_step: int
    row_offset: int
    row_copies: int
    row_base: int
    row_linear: int
    leaves: int
    interleaved: bool
    split: bool
    lean: tuple[float, ...]


def _uniform(dim: Dim) -> tuple[int, bool] | None:
    """Copies per unit and whether they are interleaved, if every unit has the same number in one regular order."""
    if dim.index is None:
        return 1, False
    if dim.fill is not None or dim.source == 0 or dim.size % dim.source:
        return None
    n, units = dim.size // dim.source, np.arange(dim.source)
    if (dim.index == np.tile(units, n)).all():
        return n, False
    if (dim.index == np.repeat(units, n)).all():
        return n, True
    return None


def scatter_plan(job: Job, nest: list[Loop]) -> Scatter | None:
    """How the scatter form would do a job, or ``None`` where it cannot."""
    if job.source is None or job.births or job.scale != 1 or job.independent or job.pair_noise or len(nest) > 2:
        return None
    if any(loop.dim.scale is not None for loop in nest):
        return None
    column = nest[-1]
    uniform = _uniform(column.dim)
    if uniform is None or not column.whole or (column.source_stride != 1 and column.dim.source > 1):
        return None
    leaves, interleaved = uniform
    width = column.dim.source
    split = column.split and column.dim.tree is not None
    if leaves > 4 or (interleaved and leaves > 2) or (interleaved and not split and leaves != 2):
        return None
    lean: tuple[float, ...] = ()
    if split and column.dim.tree is not None:
        cuts = cuts_of(leaves)
        starts = np.arange(leaves) * (1 if interleaved else width)
        leans = column.dim.tree.lean[cuts.depth, starts[cuts.lo]]
        share = column.dim.tree.lean
        if not column.dim.tree.active[0].all():
            return None
        by_unit = share.reshape(share.shape[0], width, leaves) if interleaved else share.reshape(-1, leaves, width)
        if (by_unit != (by_unit[:, :1] if interleaved else by_unit[:, :, :1])).any():
            return None
        lean = tuple(leans.tolist())
    if job.tree_noise and (not split or width % 4):
        return None
    if len(nest) == 1:
        return Scatter(1, width, 0, width, column.local, 1, 0, 1, 0, 0, leaves, interleaved, split, lean)
    row = nest[0]
    if row.split or (job.tree_noise and row.linear[1] % 4):
        return None
    steps = (row.source_stride, row.target_stride)
    span = slice(row.offset, row.offset + row.local)
    here = np.arange(span.start, span.stop) if row.dim.index is None else row.dim.index[span]
    if row.dim.fill is None and (np.diff(here) == 1).all():  # a run of rows: an ungrown dim, or a shard inside one copy
        start = int(here[0]) * row.source_stride
        order, copies, count = (1, 0), 1, row.local
    else:
        rows = _uniform(row.dim)
        if rows is None or not row.whole:
            return None
        copies, woven = rows
        if copies > 4:
            return None
        start, count = 0, row.dim.source
        order = (copies, 1) if woven else (1, count)
    base = row.offset
    return Scatter(count, width, start, *steps, *order, copies, base, row.linear[1], leaves, interleaved, split, lean)


def cut_parameters(job: Job, plan: Scatter) -> list[float]:
    """Lean and spread of the up to three cuts of a group, as the scatter form reads them."""
    if not plan.split:
        return [0.0] * 6
    cuts = cuts_of(plan.leaves)
    amplitude = job.amplitude(job.noise.scale) if job.noise is not None and job.tree_noise else 0.0
    slots = {1: 0, 2: 1, 3: 2}
    values = [0.0] * 6
    for k, node in enumerate(cuts.node.tolist()):
        values[2 * slots[node]] = plan.lean[k]
        values[2 * slots[node] + 1] = float(cuts.spread[k]) * amplitude
    return values


def _signed(word: int) -> int:
    """A 32-bit word as a signed integer: Triton then gives every key the same type."""
    return word - (1 << 32) if word >> 31 else word


def _scatter(job: Job, out: Tensor, plan: Scatter) -> None:
    import triton
    import triton.language as tl

    assert job.source is not None
    name = str(job.dtype).removeprefix("torch.")
    block, warps = tile_of(tile_name(name, job.tree_noise, plan.interleaved), out.device)
    block = max(16, min(block, triton.next_power_of_2(plan.columns)))
    blocks = triton.cdiv(plan.columns, block)
    last = blocks > 65535
    if (plan.rows if last else blocks) > 65535:
        raise Unsupported("too many blocks for one launch")
    values = cut_parameters(job, plan)
    source = job.source.as_strided((1,), (1,), job.source.storage_offset() + plan.source_start)
    _kernels().scatter[(blocks, plan.rows) if last else (plan.rows, blocks)](
        source,
        out,
        torch.tensor(values, dtype=torch.float64, device=out.device),
        plan.columns,
        plan.source_stride,
        plan.target_stride,
        plan.row_step,
        plan.row_offset,
        plan.row_base,
        plan.row_linear,
        *(_signed(word) for word in (job.noise_key if job.tree_noise else (0, 0))),
        LEAVES=plan.leaves,
        SPLIT=plan.split,
        NOISE=job.tree_noise,
        LEAN=sum(1 << k for k in range(3) if values[2 * k]),
        INTERLEAVED=plan.interleaved,
        ROW_COPIES=plan.row_copies,
        DIST=DISTRIBUTIONS[job.noise.distribution] if job.noise is not None else 0,
        BLOCK=block,
        C=tl.float64 if job.compute == torch.float64 else tl.float32,
        TARGET=target_code(),
        ROWS_LAST=last,
        num_warps=warps,
        enable_fp_fusion=False,
    )


# ---- the general form ----

_INT_OF = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _on(values: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(device)


def _gather(job: Job, out: Tensor, nest: list[Loop], bits: bool) -> None:
    import triton
    import triton.language as tl

    device, column, outer = out.device, nest[-1], nest[:-1]
    source = job.source
    if bits and source is not None:
        if out.element_size() not in _INT_OF:
            raise Unsupported(f"{out.dtype}")
        source, out = source.view(_INT_OF[out.element_size()]), out.view(_INT_OF[out.element_size()])
    span = slice(column.offset, column.offset + column.local)
    default = OLD if job.source is not None or job.births else job.fill
    nothing = torch.zeros(8, dtype=torch.float64, device=device)
    births = bool(job.births) or default != OLD
    codes = np.full(column.local, default, np.uint8) if column.dim.fill is None else column.dim.fill[span]
    layout = mean_layout(job, nest)
    bases = np.cumsum([0] + [table.numel() for _, _, table in layout]).tolist()
    means = torch.cat([table.flatten() for _, _, table in layout]) if layout else nothing
    split = next((loop for loop in nest if loop.split), None)
    entries, levels = 1, 0
    nodes, numbers, pairs = nothing, nothing, nothing
    tree = split.dim.tree if split is not None else None
    if split is not None:
        part = slice(split.offset, split.offset + split.local)
        entries = split.local
        if tree is not None and not bits:
            amplitude = job.amplitude(job.noise.scale) if job.noise is not None and job.tree_noise else 0.0
            levels = tree.levels
            signed = np.where(tree.right, -tree.node, tree.node) * tree.active
            nodes = _on(signed[:, part].astype(np.int32), device)
            numbers = _on(np.stack([tree.lean[:, part], tree.spread[:, part] * amplitude], -1), device)
        if job.pair_noise and split.dim.pair is not None:
            pairs = _on(split.dim.pair[part], device)
    noise = job.noise
    parameters = torch.tensor(
        [
            job.random_std * UNIT["bytes"],
            job.amplitude(noise.newborn_scale) if noise is not None else 0.0,
            job.amplitude(noise.scale) if noise is not None else 0.0,
            job.constant,
        ],
        dtype=torch.float64,
        device=device,
    )
    block, warps = GATHER_TILE
    block = max(16, min(block, triton.next_power_of_2(column.local)))
    later = job.independent and column.dim.copy is not None
    total = int(np.prod([loop.local for loop in outer])) if outer else 1
    scales = column.dim.scale
    fixed: dict[str, Any] = {
        "units": nothing if column.dim.index is None else _on(column.dim.index[span], device),
        "codes": _on(codes, device),
        "scales": nothing if scales is None else _on(scales[span], device),
        "copies": _on(column.dim.copy[span].astype(np.uint8), device)
        if later and column.dim.copy is not None
        else nothing,
        "tree_nodes": nodes,
        "tree_numbers": numbers,
        "pairs": pairs,
        "parameters": parameters,
        "columns": column.local,
        "column_stride": column.source_stride,
        "column_offset": column.offset,
        "mean_stride0": 1,
        "mean_stride1": 0,
        "levels": levels,
        "entries": entries,
        "key0": _signed(job.noise_key[0]),
        "key1": _signed(job.noise_key[1]),
        "random0": _signed(job.random_key[0]),
        "random1": _signed(job.random_key[1]),
        "INDEXED": column.dim.index is not None,
        "HAS_SOURCE": source is not None and source.numel() > 0,
        "HAS_BIRTHS": births,
        "HAS_MEANS": bool(layout),
        "HAS_FACTOR": job.scale != 1 or any(loop.dim.scale is not None for loop in nest),
        "HAS_SCALES": scales is not None,
        "SPLIT": 0 if split is None else 1 if split is column else 2,
        "TREE": levels > 0,
        "TREE_NOISE": job.tree_noise,
        "PAIRS": job.pair_noise,
        "INDEPENDENT": job.independent,
        "COLUMN_COPIES": later,
        "BITS": bits,
        "DIST": DISTRIBUTIONS[noise.distribution] if noise is not None else 0,
        "BLOCK": block,
        "C": tl.float64 if job.compute == torch.float64 else tl.float32,
        "TARGET": target_code(),
        "num_warps": warps,
        "enable_fp_fusion": False,
    }
    blocks = triton.cdiv(column.local, block)
    step = max(1, min(ROWS, (1 << 30) // blocks))
    for lo in range(0, total, step):
        offsets, factors, flags = _row_tables(job, outer, lo, min(step, total - lo), layout, bases, default, device)
        count = factors.shape[0]
        _kernels().gather[(count * blocks,)](
            source if source is not None and source.numel() else nothing.to(job.dtype if not bits else torch.uint8),
            out,
            means,
            offsets,
            factors,
            flags,
            **fixed,
        )


def _row_tables(
    job: Job,
    outer: list[Loop],
    lo: int,
    count: int,
    layout: list[tuple[set[int], list[int], Tensor]],
    bases: list[int],
    default: int,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor]:
    """What the general form reads per row: offsets (count, 8), factors (count,), flags (count, 3)."""
    rest = torch.arange(lo, lo + count, device=device)
    offsets = torch.zeros(count, 8, dtype=torch.int64, device=device)
    factor = torch.full((count,), job.scale, dtype=torch.float64, device=device)
    code = torch.full((count,), default, dtype=torch.uint8, device=device)
    flags = torch.zeros(count, 3, dtype=torch.uint8, device=device)
    mean_set = torch.zeros(count, dtype=torch.int64, device=device)
    order = torch.zeros(256, dtype=torch.int64, device=device)
    order[torch.tensor([0, 3, 2, 1, OLD], device=device)] = torch.arange(5, device=device)
    units: list[Tensor] = []
    coordinates: list[Tensor] = []
    for loop in reversed(outer):
        coordinates.insert(0, rest % loop.local)
        rest = rest // loop.local
    for d, (loop, at) in enumerate(zip(outer, coordinates, strict=True)):
        place = at + loop.offset
        unit = place if loop.dim.index is None else _on(loop.dim.index, device)[place]
        units.append(unit)
        virtual, split, target = loop.linear
        offsets[:, 0] += unit * loop.source_stride
        offsets[:, 1] += at * loop.target_stride
        offsets[:, 2] += unit * virtual
        offsets[:, 3] += (unit if loop.split else place) * split
        offsets[:, 4] += place * target
        if loop.split:
            offsets[:, 7] = at
        if loop.dim.scale is not None:
            factor = factor * _on(loop.dim.scale, device)[place]
        if loop.dim.fill is not None:
            own = _on(loop.dim.fill, device)[place]
            code = torch.where(order[own.long()] < order[code.long()], own, code)
            flags[:, 1] |= own == FILL_RANDOM
            mean_set |= (own == FILL_MEAN).long() << d
        if loop.dim.copy is not None:
            flags[:, 2] |= _on(loop.dim.copy, device)[place]
    flags[:, 0] = code
    for (over, strides, _), base in zip(layout, bases, strict=False):
        rows = sum(1 << d for d in over if d < len(outer))
        where = torch.full_like(mean_set, base)
        for unit, stride in zip(units, strides, strict=False):
            where = where + unit * stride
        slot = 6 if len(outer) in over else 5
        offsets[:, slot] = torch.where(mean_set == rows, where, offsets[:, slot])
    return offsets, factor, flags


# ---- tiles ----

_tuned: dict[tuple[str, str], Tile] = {}  # (device, tile name) -> tile: what this process has timed or read


def tile_name(dtype: str, noise: bool, interleaved: bool) -> str:
    """The kind of call that shares a tile."""
    return f"{'woven' if interleaved else 'plain'} {dtype} {'noise' if noise else 'copy'}"


def tile_of(name: str, device: torch.device) -> Tile:
    """The tile of a kind of call: timed on this device if ``FXGROW_TUNE`` is set, else the checked-in one.

    Timings are kept in ``tiles.json`` in the cache folder, by device and version of Triton, and read back.
    """
    default = TILES.get(name, TILE)
    if os.environ.get(TUNE, "0") in ("", "0"):
        return _tuned.get((_device_name(device), name), default)
    here = _device_name(device)
    if (here, name) not in _tuned:
        kept = _read_tiles()
        _tuned[here, name] = default  # `tune` itself comes by here
        if f"{here}: {name}" in kept:
            block, warps = kept[f"{here}: {name}"]
            _tuned[here, name] = (int(block), int(warps))
        else:
            form, dtype, kind = name.split()
            tune(getattr(torch, dtype), kind == "noise", form == "woven", device=device)
    return _tuned[here, name]


def _device_name(device: torch.device) -> str:
    import triton

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
    return f"{name}, Triton {triton.__version__}"


def _tiles_file() -> Path:
    return cache_folder() / "tiles.json"


def _read_tiles() -> dict[str, list[int]]:
    """What earlier processes timed; nothing where the file is missing or not ours."""
    try:
        kept = json.loads(_tiles_file().read_text())
        return {str(k): v for k, v in kept.items() if len(v) == 2 and tuple(v) in CANDIDATES}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _keep_tile(key: str, tile: Tile) -> None:
    """Add a timing to the file; where it cannot be written, the process still has it."""
    with contextlib.suppress(OSError):
        path = _tiles_file()
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as made:
            made.write_text(json.dumps({**_read_tiles(), key: list(tile)}, indent=1, sort_keys=True))


def _milliseconds(call: Callable[[], Any]) -> float:
    import triton

    return float(triton.testing.do_bench(call))


def tune(
    dtype: torch.dtype = torch.bfloat16,
    noise: bool = True,
    interleaved: bool = False,
    size: int = 4096,
    device: torch.device | str = "cuda",
) -> dict[Tile, float]:
    """Time the tiles of a kind of call on a device (a size x size weight, doubled); keep the best. Microseconds."""
    device = torch.device(device)
    name, here = tile_name(str(dtype).removeprefix("torch."), noise, interleaved), _device_name(device)
    index = torch.arange(2 * size) // 2 if interleaved else torch.arange(2 * size) % size
    dims = [DimMap(index), DimMap(index, split=torch.full((2 * size,), 0.5, dtype=torch.float64))]
    x = torch.randn(size, size, device=device).to(dtype)
    out = torch.empty(2 * size, 2 * size, dtype=dtype, device=device)
    how = Noise("antisymmetric", 0.1) if noise else None
    job = prepare(
        x,
        dims,
        shape=None,
        scale=1.0,
        random_std=0.0,
        constant=0.0,
        noise=how,
        key=0,
        offset=None,
        local_shape=None,
        dtype=None,
        device=None,
        fill=FILL_ZERO,
        random_seed=0,
    )
    times = {}
    for tile in CANDIDATES:
        _tuned[here, name] = tile
        call = functools.partial(run, job, out)
        times[tile] = _milliseconds(call) * 1000
    best = min(times, key=lambda tile: times[tile])
    _tuned[here, name] = best
    _keep_tile(f"{here}: {name}", best)
    return times
