"""From plan to shards: each rank makes its part of a grown tensor, of what it holds and what others send it.

The maps, factors and draws are those of :mod:`fxgrow.weights.jobs`, so that all parts together are to the bit what one
process makes. No rank ever has a whole tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from fxgrow import kernels
from fxgrow.errors import GrowthRefused
from fxgrow.ir.dtensors import Layout, Rectangle, Rows, local_of, sharded_as
from fxgrow.plan import FILL_MEAN, DimPlan, Stage, TensorPlan
from fxgrow.weights.exchange import Index, Piece, Traffic, fetched, pieces
from fxgrow.weights.jobs import TensorJob, filled, initial, keyed_stages, moment_job, shifted, stage_job
from fxgrow.weights.moments import Moment


def sums_of(tensor: torch.Tensor) -> kernels.Sums:
    """The sums of a sharded tensor, the same on every rank; a collective operation."""
    layout, local = Layout.of(tensor), local_of(tensor)
    values = torch.tensor(list(kernels.Sums.of(local)), dtype=torch.float64, device=layout.device)
    return kernels.Sums(*layout.summed(values).tolist())


def materialise_shard(
    plan: TensorPlan,
    source: torch.Tensor | None,
    like: torch.Tensor,
    *,
    dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
    traffic: Traffic | None = None,
) -> torch.Tensor:
    """This rank's shard of a grown tensor; a collective operation.

    Args:
        plan: what the tensor is made of.
        source: the old one, a ``DTensor``; None where the plan has none.
        like: a ``DTensor`` that lies as the result is to, of any shape.
        dtype: of the result; the source's where None.
        out: written to and returned, if given; of that dtype, on any device.

    Returns:
        A plain tensor, on the device of the source's shard where ``out`` is not given.

    Raises:
        GrowthRefused: numbers that are complex, or a layout that is neither shards nor copies.
    """
    layout = Layout.of(like)
    mine = layout.own(plan.shape)
    dtype = dtype or (like.dtype if source is None else source.dtype)
    device = local_of(like if source is None else source).device if out is None else out.device
    check_layout(plan.source or "the new tensor", layout if source is None else Layout.of(source), dtype)
    if plan.zero:
        return _put(torch.full(mine.shape, plan.level, dtype=dtype, device=device), out)
    if plan.continuation is not None:
        raise GrowthRefused(
            f"{plan.source} is sharded, and goes on in a pattern that is made of the whole of it: leave it out of what "
            "is sharded (ignored_params), or make it a buffer"
        )
    if plan.init is not None:
        return _put(shifted(_begun(plan, mine, dtype, device), plan.shift), out)
    assert source is not None
    stages = keyed_stages(plan)
    local = local_of(source)
    for number, (stage, key) in enumerate(stages):
        given, last = source, number == len(stages) - 1
        job = stage_job(stage, key, given.dtype, given.shape, lambda given=given: sums_of(given))  # type: ignore[misc]
        shape = [n if d is None else d.size for n, d in zip(given.shape, _maps(stage, given), strict=True)]
        there = out if last and out is not None and out.device == local.device else None
        local = _made(job, _maps(stage, given), given, layout, shape, dtype, traffic, there)
        if not last:
            source = sharded_as(like, local, shape)
    return _put(shifted(local, plan.shift), out)


def _put(made: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    return made if out is None or made is out else out.copy_(made)


def materialise_moment_shard(
    plan: TensorPlan,
    moment: torch.Tensor,
    kind: Moment,
    *,
    scale_gradients: bool,
    keep_copies: bool = True,
    traffic: Traffic | None = None,
) -> torch.Tensor:
    """The same of an optimizer's moment; the result is a ``DTensor`` that lies as the moment does."""
    layout = Layout.of(moment)
    check_layout(f"optimizer state of {plan.source}", layout, moment.dtype)
    job = moment_job(plan, kind, scale_gradients=scale_gradients, keep_copies=keep_copies)
    local = _made(job, plan.dims, moment, layout, plan.shape, moment.dtype, traffic)
    return sharded_as(moment, local, plan.shape)


def check_layout(name: str, layout: Layout, dtype: torch.dtype) -> None:
    """Refuse what cannot be grown shard by shard.

    Raises:
        GrowthRefused: with the reason.
    """
    why = layout.problem() or ("it holds complex numbers" if dtype.is_complex else "")
    if why:
        raise GrowthRefused(f"cannot grow {name} where it is, shard by shard: {why}")


def count_traffic(
    plan: TensorPlan, shape: Sequence[int], layout: Layout | Rows, itemsize: int, traffic: Traffic
) -> None:
    """Add the bytes that a tensor's growth sends between ranks, without sending any.

    Args:
        shape: of the old tensor.
    """
    if plan.source is None or plan.zero or not len(shape):
        return
    for stage in plan.stages or [plan]:
        dims = stage.dims or [None] * len(shape)
        after = [n if d is None else d.size for n, d in zip(shape, dims, strict=True)]
        indices, whole = _indices(dims)
        wanted = _wanted(indices, whole, shape, layout.rectangles(after), layout, itemsize)
        traffic.count(layout.rectangles(shape), wanted, itemsize)
        shape = after


def _maps(stage: Stage, source: torch.Tensor) -> Sequence[DimPlan | None]:
    return stage.dims or [None] * source.dim()


def _indices(dims: Sequence[DimPlan | None]) -> tuple[list[Index], set[int]]:
    """Per dim the old entry of each new one; and the dims along which averages are taken."""
    return [None if d is None else d.index for d in dims], filled(dims, FILL_MEAN)


def _wanted(
    indices: Sequence[Index],
    whole: set[int],
    shape: Sequence[int],
    targets: Mapping[int, Rectangle],
    layout: Layout | Rows,
    itemsize: int,
) -> dict[int, list[Piece]]:
    split = layout.sharded_dims(shape)
    return {
        rank: pieces(indices, shape, target, split=split, whole=whole, itemsize=itemsize)
        for rank, target in targets.items()
    }


def _made(
    job: TensorJob,
    dims: Sequence[DimPlan | None],
    source: torch.Tensor,
    layout: Layout,
    shape: Sequence[int],
    dtype: torch.dtype,
    traffic: Traffic | None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """This rank's part of one growth of a sharded tensor."""
    indices, whole = _indices(dims)
    old, local = Layout.of(source), local_of(source)
    targets = layout.rectangles(shape)
    wanted = _wanted(indices, whole, source.shape, targets, old, local.element_size())
    mine = targets[layout.me]
    if out is None:
        out = torch.empty(mine.shape, dtype=dtype, device=local.device)
    for piece, part in fetched(local, old, old.rectangles(source.shape), wanted, traffic):
        kernels.materialise(
            part,
            job.dims,
            offset=piece.target.start,
            local_shape=piece.target.shape,
            source_offset=piece.source.start,
            source_shape=list(source.shape),
            dtype=dtype,
            out=out[piece.target.within(mine)],
            **job.options,
        )
    return out


def _begun(plan: TensorPlan, mine: Rectangle, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """This rank's part of a tensor that is made of nothing: every rank knows all of what it begins as."""
    plain = not plan.stages and all(d is None for d in plan.dims) and plan.noise is None and plan.scale == 1.0
    if plain and plan.init in ("zeros", "ones"):
        return torch.full(mine.shape, float(plan.init == "ones"), dtype=dtype, device=device)
    made = initial(plan.model_copy(update={"device": str(device)}), dtype)
    stages = keyed_stages(plan)
    for number, (stage, key) in enumerate(stages):
        job = stage_job(stage, key, dtype, made.shape, lambda given=made: kernels.Sums.of(given))  # type: ignore[misc]
        last: dict[str, Any] = {"offset": mine.start, "local_shape": mine.shape} if number + 1 == len(stages) else {}
        made = kernels.materialise(made, job.dims, dtype=dtype, **last, **job.options)
    return made


def local_entries(index: np.ndarray, tensor: torch.Tensor, dim: int) -> np.ndarray:
    """Those of some entries of one dim that this rank's shard holds, counted from its own first."""
    mine = Layout.of(tensor).own(tensor.shape)
    first, size = mine.start[dim], mine.shape[dim]
    inside: np.ndarray = index[(index >= first) & (index < first + size)] - first
    return inside


__all__ = [
    "check_layout",
    "count_traffic",
    "local_entries",
    "materialise_moment_shard",
    "materialise_shard",
    "sums_of",
]
