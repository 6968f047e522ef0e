"""`materialise`: one tensor, or one rectangular shard of it, of a growth plan."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fxgrow.kernels import dispatch
from fxgrow.kernels.job import Job
from fxgrow.kernels.maps import FILL_ZERO, DimMap, Noise
from fxgrow.kernels.memory import unreadable
from fxgrow.kernels.prepare import prepare


@torch.no_grad()
def materialise(
    source: Tensor | None,
    dims: Sequence[DimMap | None],
    *,
    shape: Sequence[int] | None = None,
    scale: float = 1.0,
    random_std: float = 0.02,
    constant: float = 0.0,
    noise: Noise | None = None,
    key: int = 0,
    offset: Sequence[int] | None = None,
    local_shape: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
    fill: int = FILL_ZERO,
    random_seed: int = 0,
    source_offset: Sequence[int] | None = None,
    source_shape: Sequence[int] | None = None,
) -> Tensor:
    """Make one grown tensor: gather per dim, scale, fill, split, add noise, round once, store.

    ``out[i] = scale · Π scale_d[i_d] · share[i_s] · source[index_0[i_0], …]``, computed in float64 for a float64
    destination and in float32 otherwise. Fills define what stands at newborn coordinates (zero wins over constant,
    constant over mean, mean over random): constants and random draws are taken as they are, means are scaled like the
    source they average, and the split applies to all of them. The copies of a split group sum to exactly
    the value rounded to the destination dtype; values that are not finite are copied.

    Args:
        source: the old tensor, any strides, or ``None`` for a tensor with no predecessor.
        dims: one map per dim; ``None`` is the identity.
        shape: the new shape; needed without a source where a map is ``None``, otherwise checked.
        scale: factor of every source value.
        random_std: standard deviation of randomly filled entries.
        constant: value of constant entries.
        noise: see `Noise`.
        key: number of this tensor; tensors with different keys get independent noise and fills.
        offset, local_shape: a rectangle of the new tensor to make instead of the whole, in elements per dim.
        dtype, device: of the result; the source's if ``None``.
        out: written to and returned, if given. Must not overlap `source`.
        backend: ``torch``, ``cpu`` or ``triton``; ``None`` chooses by device, see `backends`.
        fill: without a source and with every map ``None``: the fill of all entries.
        random_seed: seed of random fills, independent of the noise.
        source_offset, source_shape: `source` is the rectangle at that offset of an old tensor of that shape: whatever
            the result is made of. The same bits come of it as of the whole.

    Returns:
        The new tensor (or shard), without gradient history.

    Raises:
        ValueError: maps, shares, shard or dtype that do not fit together; a source or destination that is not plain
            memory, see `unreadable`.
    """
    job = prepare(
        source,
        dims,
        shape=shape,
        scale=scale,
        random_std=random_std,
        constant=constant,
        noise=noise,
        key=key,
        offset=offset,
        local_shape=local_shape,
        dtype=dtype if dtype is not None or out is None else out.dtype,
        device=device if device is not None or out is None else out.device,
        fill=fill,
        random_seed=random_seed,
        source_offset=source_offset,
        source_shape=source_shape,
    )
    result = _destination(job, out)
    dispatch.run(job, result, backend, fresh=out is None)
    return result


def _destination(job: Job, out: Tensor | None) -> Tensor:
    if out is None:
        return torch.empty(job.local, dtype=job.dtype, device=job.device)
    if why := unreadable(out):
        raise ValueError(f"out cannot be written: {why}")
    if list(out.shape) != job.local or out.dtype != job.dtype or out.device != job.device:
        raise ValueError(
            f"out is {out.dtype} of shape {tuple(out.shape)} on {out.device}, "
            f"but the result is {job.dtype} of shape {tuple(job.local)} on {job.device}"
        )
    return out.detach()


@torch.no_grad()
def materialise_many(calls: Iterable[Mapping[str, Any]], *, backend: str | None = None) -> list[Tensor]:
    """`materialise` for many tensors: each call is a mapping of its arguments by name (``source``, ``dims``, …).

    Small tensors of the CPU backend share one native call, so they fill all threads.

    Raises:
        ValueError: as `materialise`, before anything is written.
    """
    jobs: list[tuple[Job, Tensor]] = []
    fresh: list[bool] = []
    for call in calls:
        arguments = {**_DEFAULTS, **call}
        out = arguments.pop("out")
        if arguments.pop("backend") is not None:
            raise ValueError("materialise_many takes one backend for all calls")
        if out is not None:
            arguments["dtype"] = arguments["dtype"] or out.dtype
            arguments["device"] = arguments["device"] or out.device
        job = prepare(arguments.pop("source"), arguments.pop("dims"), **arguments)
        jobs.append((job, _destination(job, out)))
        fresh.append(out is None)
    dispatch.run_many(jobs, backend, fresh)
    return [out for _, out in jobs]


_DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(materialise).parameters.items()
    if parameter.default is not inspect.Parameter.empty
}
