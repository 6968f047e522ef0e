"""What kernels are to do with a tensor of a plan: the one place that says so, for whole tensors and for shards."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from fxgrow import kernels
from fxgrow.ir.dtypes import is_fine
from fxgrow.plan import FILL_RANDOM, DimPlan, Stage, TensorPlan
from fxgrow.weights.moments import Moment


def _vector(values: np.ndarray | None, dtype: torch.dtype) -> torch.Tensor | None:
    return None if values is None else torch.from_numpy(np.ascontiguousarray(values)).to(dtype)


class _Map:
    """What kernels need of one dim. ``closes``: its shares add up to 1 for every unit, so that it may split."""

    def __init__(self, entries: np.ndarray, shares: np.ndarray | None, fills: np.ndarray | None) -> None:
        index = torch.from_numpy(np.ascontiguousarray(entries))
        fill, share = _vector(fills, torch.uint8), _vector(shares, torch.float64)
        self.closes = shares is not None and np.allclose(_group_sums(entries, shares), 1.0)
        self.scaled = kernels.DimMap(index=index, scale=share, fill=fill)
        self.split = kernels.DimMap(index=index, split=share, fill=fill)


_MAPS: OrderedDict[tuple[bytes | None, ...], _Map] = OrderedDict()


def _map(index: np.ndarray, shares: np.ndarray | None, fill: np.ndarray | None = None) -> _Map:
    """One object for dims that grow alike (those of repeated blocks do), as kernels prepare their tables per object."""
    key = tuple(None if a is None else a.tobytes() for a in (index, shares, fill))
    found = _MAPS.get(key)
    if found is None:
        found = _MAPS[key] = _Map(index, shares, fill)
        while len(_MAPS) > 64:
            _MAPS.popitem(last=False)
    else:
        _MAPS.move_to_end(key)
    return found


def _group_sums(index: np.ndarray, share: np.ndarray) -> np.ndarray:
    _, inverse = np.unique(index, return_inverse=True)
    return np.bincount(inverse, weights=share)


class TensorJob(NamedTuple):
    """What kernels are to do with a tensor: a map per dim, and the arguments by name."""

    dims: list[kernels.DimMap | None]
    options: dict[str, Any]


def stage_job(
    stage: Stage,
    key: int,
    source_dtype: torch.dtype,
    source_shape: Sequence[int],
    sums: Callable[[], kernels.Sums],
    held: Sequence[int] = (),
) -> TensorJob:
    """One growth of a tensor, for kernels.

    Args:
        key: of its draws.
        sums: of the whole source; called where something is relative to it.
        held: dims that have their size already.
    """
    dims = [None if i in held else d for i, d in enumerate(stage.dims)] or [None] * len(source_shape)
    maps = [None if d is None else _map(d.index, d.split, d.fill) for d in dims]
    # the dim whose copies must add up exactly: the last one with shares
    closing = next((i for i in reversed(range(len(maps))) if (m := maps[i]) is not None and m.closes), None)
    spread = 0.0
    noise = stage.noise
    fine = is_fine(source_dtype)
    if needs_sums(stage, dims) and math.prod(source_shape) > 1 and fine:
        spread = sums().deviation
    random_std = stage.random_std if stage.random_std is not None else spread
    kernel_noise = None
    if noise is not None or stage.paired:
        scale = 0.0 if noise is None else noise.scale * (spread if noise.relative else 1.0)
        kernel_noise = kernels.Noise(
            kind=noise.kind if noise is not None else "antisymmetric",
            scale=scale,
            newborn_scale=random_std if stage.paired else 0.0,
            distribution=noise.distribution if noise is not None else "bytes",
            seed=noise.seed if noise is not None else stage.random_seed,
        )
    if kernel_noise is not None and closing is None and kernel_noise.kind == "antisymmetric":
        kernel_noise = None
    options = {
        "scale": stage.scale,
        "random_std": random_std,
        "random_seed": stage.random_seed,
        "constant": stage.constant,
        "noise": kernel_noise if fine else None,
        "key": key,
    }
    return TensorJob(
        [None if m is None else m.split if i == closing else m.scaled for i, m in enumerate(maps)], options
    )


def needs_sums(stage: Stage, dims: Sequence[DimPlan | None]) -> bool:
    """Whether a growth is relative to the spread of the whole tensor that it begins with."""
    relative = stage.noise is not None and stage.noise.relative
    return relative or (stage.random_std is None and (stage.paired or bool(filled(dims, FILL_RANDOM))))


def filled(dims: Sequence[DimPlan | None], code: int) -> set[int]:
    """The dims that have newborn entries with a fill code."""
    return {i for i, d in enumerate(dims) if d is not None and d.fill is not None and code in d.fill[d.index < 0]}


def keyed_stages(plan: TensorPlan) -> list[tuple[Stage, int]]:
    """The growths of a tensor, in their order, each with the key of its draws."""
    return [(s, (plan.key + number * 0x9E3779B9) % (1 << 32)) for number, s in enumerate(plan.stages or [plan])]


def shifted(made: torch.Tensor, shift: float) -> torch.Tensor:
    """A tensor that was made just now, with a number added."""
    return made.add_(shift) if shift else made


def initial(plan: TensorPlan, dtype: torch.dtype) -> torch.Tensor:
    """What a tensor that is made of nothing begins as, before the maps of its dims."""
    out = torch.zeros(plan.shape if plan.initial is None else plan.initial, dtype=dtype, device=plan.device)
    if plan.init == "ones":
        out.fill_(1)
    elif plan.init == "identity":
        out.copy_(torch.eye(out.shape[0], dtype=dtype))
    elif plan.init == "dirac":
        torch.nn.init.dirac_(out)
    return out


def moment_job(plan: TensorPlan, kind: Moment, *, scale_gradients: bool, keep_copies: bool = True) -> TensorJob:
    """The growth of a moment, for kernels; the arguments are those of :func:`materialise_moment`."""
    of_gradient, of_value = (kind.gradient, kind.value) if scale_gradients else (0, 0)
    dims: list[kernels.DimMap | None] = []
    for d in plan.dims:
        if d is None:
            dims.append(None)
            continue
        index = d.index
        if not keep_copies:
            index = np.where(d.newborn, -1 - np.arange(len(index)), index)
        factor = None if d.gradient is None or not of_gradient else d.gradient**of_gradient
        if d.split is not None and of_value:
            factor = d.split**of_value * (1.0 if factor is None else factor)
        dims.append(_map(index, factor).scaled)
    return TensorJob(dims, {"scale": plan.gradient_scale**of_gradient * plan.scale**of_value})
