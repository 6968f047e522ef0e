"""A call of `materialise`, checked and normalised into a job."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fxgrow.kernels.job import FLOATS, Job, NoiseTooSmall
from fxgrow.kernels.maps import (
    FILL_MEAN,
    FILL_RANDOM,
    OLD,
    DimMap,
    Noise,
    prepare_dim,
)
from fxgrow.kernels.memory import unreadable
from fxgrow.kernels.philox import key_words
from fxgrow.kernels.reference import halving_sum, random_means
from fxgrow.warn import warn


def mean_tables(job: Job) -> dict[int, Tensor]:
    """Every table of means the fills can ask for, summed by halving: equal on every device and thread count."""
    dims = [d for d in job.births if (job.dims[d].fill == FILL_MEAN).any()]  # type: ignore[union-attr]
    tables = {}
    for n in range(1, len(dims) + 1):
        for over in itertools.combinations(dims, n):
            tables[sum(1 << d for d in over)] = _mean_table(job, over)
    return tables


def _mean_table(job: Job, over: tuple[int, ...]) -> Tensor:
    source = job.source
    count = math.prod(job.dims[d].source for d in over)
    if source is not None and any(source.shape[d] != job.dims[d].source for d in over):
        raise ValueError(f"fill mean along dims {list(over)} needs all of the source along them")
    if source is None or count == 0:
        raise ValueError("fill mean needs a source that is not empty")
    shape = [1 if d in over else dim.virtual for d, dim in enumerate(job.dims)]
    table = torch.zeros(shape, dtype=job.compute, device=job.device)
    held = zip(job.start or [0] * source.dim(), source.shape, strict=True)
    old = table[tuple(slice(0, 1) if d in over else slice(a, a + n) for d, (a, n) in enumerate(held))]
    kept = [d for d in range(source.dim()) if d not in over]
    axis = max(kept, key=lambda d: source.shape[d], default=None)
    step = source.shape[axis] if axis is not None else 1
    if axis is not None and source.numel() > 1 << 20:
        step = max(1, (1 << 20) * source.shape[axis] // source.numel())
    for lo in range(0, source.shape[axis] if axis is not None else 1, max(step, 1)):
        part = source if axis is None else source.narrow(axis, lo, min(step, source.shape[axis] - lo))
        total = halving_sum(part.to(torch.float64), over)
        (old if axis is None else old.narrow(axis, lo, part.shape[axis])).copy_(total / count)
    random_means(job, over, table)
    return table


class Sums(NamedTuple):
    """What averages are made of: the number of a tensor's entries, their sum, and that of their squares."""

    entries: float
    total: float
    squares: float

    @classmethod
    def of(cls, tensor: Tensor) -> Sums:
        """Those of a tensor of numbers, summed in float64."""
        total = squares = 0.0
        flat = tensor.detach().reshape(-1) if tensor.is_contiguous() else tensor.detach().flatten()
        for part in flat.split(1 << 20) if len(flat) else ():
            wide = part.to(torch.float64)
            total += float(wide.sum())
            squares += float(wide.dot(wide))
        return cls(float(tensor.numel()), total, squares)

    def plus(self, other: Sums) -> Sums:
        """Those of both tensors together."""
        return Sums(*(a + b for a, b in zip(self, other, strict=True)))

    @property
    def deviation(self) -> float:
        """Standard deviation, rounded to ten bits so that the order of summation cannot show."""
        if not self.entries:
            return 0.0
        variance = max(self.squares / self.entries - (self.total / self.entries) ** 2, 0.0)
        return _rounded(math.sqrt(variance), 10) if math.isfinite(variance) else 0.0

    @property
    def mean(self) -> float:
        """Rounded to sixteen bits, likewise."""
        return _rounded(self.total / self.entries, 16) if self.entries else 0.0


def _rounded(value: float, bits: int) -> float:
    mantissa, exponent = math.frexp(value)
    return math.ldexp(round(mantissa * (1 << bits)) / (1 << bits), exponent) if math.isfinite(value) else value


def _warn_if_too_small(source: Tensor, noise: Noise, dtype: torch.dtype, shares: float) -> None:
    flat = source.detach()
    if flat.numel() > 4096:
        flat = flat.reshape(-1)[:: flat.numel() // 4096] if flat.is_contiguous() else flat[(slice(0, 64),) * flat.dim()]
    half = flat.abs().to("cpu", torch.float64).flatten() * shares
    half = half[(half > 0) & half.isfinite()]
    if not half.numel():
        return
    ulp = torch.finfo(dtype).eps * torch.exp2((torch.frexp(half).exponent - 1).to(torch.float64))
    same = float(torch.erf(ulp / 2 / (noise.scale * math.sqrt(2))).mean())
    if same > 0.25:
        warn(
            f"noise of standard deviation {noise.scale:.3g} is below the resolution of {dtype}: about {same:.0%} of "
            "the copies stay identical. Use a larger scale, or grow in float32 and convert afterwards.",
            NoiseTooSmall,
        )


def prepare(
    source: Tensor | None,
    dims: Sequence[DimMap | None],
    *,
    shape: Sequence[int] | None,
    scale: float,
    random_std: float,
    constant: float,
    noise: Noise | None,
    key: int,
    offset: Sequence[int] | None,
    local_shape: Sequence[int] | None,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    fill: int,
    random_seed: int,
    source_offset: Sequence[int] | None = None,
    source_shape: Sequence[int] | None = None,
) -> Job:
    """Check a call and normalise it; the destination is not made yet."""
    if source is not None:
        if why := unreadable(source):
            raise ValueError(f"the source cannot be read: {why}")
        # a conjugated or negated view holds the values of another: backends read memory
        source = source.detach().resolve_conj().resolve_neg()
        if len(dims) != source.dim():
            raise ValueError(f"{len(dims)} dim maps for a source of shape {tuple(source.shape)}")
        whole = list(source.shape) if source_shape is None else [int(n) for n in source_shape]
        first = [0] * len(dims) if source_offset is None else [int(a) for a in source_offset]
        if len(whole) != len(dims) or len(first) != len(dims):
            raise ValueError(f"source_offset {first} and source_shape {whole} must have {len(dims)} entries")
        if any(a < 0 or a + n > size for a, n, size in zip(first, source.shape, whole, strict=True)):
            raise ValueError(f"a source of shape {tuple(source.shape)} at {first} leaves the tensor of shape {whole}")
    elif shape is not None and len(shape) != len(dims):
        raise ValueError(f"{len(dims)} dim maps for shape {tuple(shape)}")
    ready = [
        prepare_dim(
            m,
            None if source is None else whole[d],
            None if shape is None else int(shape[d]),
            f"dim {d}",
        )
        for d, m in enumerate(dims)
    ]
    sizes = [dim.size for dim in ready]
    if shape is not None and list(shape) != sizes:
        raise ValueError(f"the maps make a tensor of shape {sizes}, but shape= says {list(shape)}")
    if sum(dim.has_split for dim in ready) > 1:
        split = [d for d, dim in enumerate(ready) if dim.tree is not None or dim.has_split]
        raise ValueError(f"at most one dim may have a split, but dims {split} do: make the other plain copies")
    start = [0] * len(sizes) if offset is None else [int(o) for o in offset]
    if local_shape is not None:
        local = [int(n) for n in local_shape]
    else:
        local = [n - o for n, o in zip(sizes, start, strict=True)]
    if len(start) != len(sizes) or len(local) != len(sizes):
        raise ValueError(f"offset {start} and local_shape {local} must have {len(sizes)} entries")
    if any(o < 0 or n < 0 or o + n > size for o, n, size in zip(start, local, sizes, strict=True)):
        raise ValueError(f"the shard at {start} of shape {local} leaves the tensor of shape {sizes}")
    dtype = dtype or (source.dtype if source is not None else torch.get_default_dtype())
    where = (
        torch.device(device) if device is not None else (source.device if source is not None else torch.device("cpu"))
    )
    if where.type == "cuda" and where.index is None:
        where = torch.device("cuda", torch.cuda.current_device())
    if source is not None and source.device != where:
        source = source.to(where)
    if noise is not None and noise.relative:
        if source is None or list(source.shape) != whole:
            raise ValueError("relative noise needs a source, the whole of it, to take the standard deviation of")
        std = Sums.of(source).deviation * abs(scale)
        noise = Noise(noise.kind, noise.scale * std, noise.newborn_scale * std, noise.distribution, noise.seed)
    floating = dtype in FLOATS and (source is None or source.dtype in FLOATS)
    job = Job(
        source,
        ready,
        dtype,
        where,
        start,
        local,
        float(scale),
        int(fill),
        float(random_std),
        float(constant),
        key_words(random_seed, key),
        noise,
        key_words(noise.seed if noise is not None else 0, key),
        first if source is not None else [],
    )
    if job.partial:
        _check_covers(job)
    if not floating:
        _check_exact_only(job)
    if source is None and not any((dim.fill is not None and (dim.fill != OLD).all()) for dim in ready):
        if job.fill == FILL_MEAN:
            raise ValueError("fill mean needs a source")
        if job.births:
            raise ValueError("without a source, one dim must be newborn throughout, or every dim None with fill=")
    if floating and dtype.itemsize == 2 and job.tree_noise and source is not None:
        assert noise is not None
        _warn_if_too_small(source, noise, dtype, abs(scale) / 2)
    if floating and job.births:
        job.means = mean_tables(job)
    return job


def _check_covers(job: Job) -> None:
    """A rectangle of a source has to hold whatever the rectangle of the destination is made of."""
    assert job.source is not None
    for d, (dim, first, held) in enumerate(zip(job.dims, job.start, job.source.shape, strict=True)):
        units = job.units(d, job.entries(d))
        needed = units[units < dim.source]
        if 0 not in job.local and len(needed) and (needed.min() < first or needed.max() >= first + held):
            raise ValueError(
                f"dim {d} needs entries {needed.min()} to {needed.max()} of the source, which holds {held} from {first}"
            )


def _check_exact_only(job: Job) -> None:
    """Integers, booleans and other types are gathered, never computed with."""
    kind = job.source.dtype if job.source is not None else job.dtype
    wrong = []
    if job.scale != 1 or any(dim.scale is not None for dim in job.dims):
        wrong.append("scale")
    if any(dim.tree is not None for dim in job.dims):
        wrong.append("split")
    if job.tree_noise or job.independent or job.pair_noise:
        wrong.append("noise")
    codes = {int(c) for d in job.births for c in np.unique(job.dims[d].fill)}  # type: ignore[arg-type]
    if codes & {FILL_RANDOM, FILL_MEAN} or (job.source is None and job.fill in (FILL_RANDOM, FILL_MEAN)):
        wrong.append("random or mean fill")
    if wrong:
        raise ValueError(
            f"{kind} is copied, not computed with: {', '.join(wrong)} needs float32, bfloat16, float16 or float64"
        )
