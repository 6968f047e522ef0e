"""From plan to tensors: every container of tensors is filled from the same tensor plans, through the kernels."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
import torch

from fxgrow import kernels
from fxgrow.errors import FxgrowError, GrowthRefused
from fxgrow.ir.dtypes import is_fine, same_kind
from fxgrow.plan import GrowthPlan, Stage, TensorPlan
from fxgrow.weights.moments import KINDS, Moment


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


def materialise_tensor(
    plan: TensorPlan, source: torch.Tensor | None, *, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """One tensor of the grown model.

    Args:
        plan: what it is made of.
        source: the old tensor, or None where the plan has none.
        dtype: of the result; the source's where None.

    Raises:
        GrowthRefused: the source has no values in memory, see :func:`check_readable`.
    """
    if plan.init is not None:
        source = _initial(plan, dtype or torch.get_default_dtype())
    assert source is not None
    check_readable({plan.source or "the source": source})
    source = source.detach().resolve_conj().resolve_neg()
    dtype = dtype or source.dtype
    if plan.zero:
        return torch.full(plan.shape, plan.level, dtype=dtype, device=source.device)
    held: list[int] = []
    if plan.continuation is not None:
        source, held = _continued(plan, source), plan.continuation.dims
    if not plan.stages:
        return _shifted(_materialise_stage(plan, source, held, plan.key, dtype), plan.shift)
    for number, stage in enumerate(plan.stages):
        key = (plan.key + number * 0x9E3779B9) % (1 << 32)  # draws of their own
        source = _materialise_stage(stage, source, held, key, dtype)
    return _shifted(source, plan.shift)


def _shifted(made: torch.Tensor, shift: float) -> torch.Tensor:
    """A tensor that was made just now, with a number added."""
    return made.add_(shift) if shift else made


def _materialise_stage(
    stage: Stage, source: torch.Tensor, held: list[int], key: int, dtype: torch.dtype
) -> torch.Tensor:
    """The result of one growth; ``held`` are the dims that have their size already."""
    if source.is_complex():  # real and imaginary parts grow alike
        stage = stage.model_copy(update={"dims": [*stage.dims, None] if stage.dims else []})
        return torch.view_as_complex(_materialise_stage(stage, torch.view_as_real(source), held, key, dtype.to_real()))
    dims = [None if i in held else d for i, d in enumerate(stage.dims)] or [None] * source.dim()
    maps = [None if d is None else _map(d.index, d.split, d.fill) for d in dims]
    # the dim whose copies must add up exactly: the last one with shares
    closing = next((i for i in reversed(range(len(maps))) if (m := maps[i]) is not None and m.closes), None)
    spread = 0.0
    needs_spread = stage.random_std is None and (
        stage.paired or any(d is not None and d.fill is not None for d in dims)
    )
    noise = stage.noise
    if (needs_spread or (noise is not None and noise.relative)) and source.numel() > 1 and is_fine(source.dtype):
        spread = float(source.float().std())
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
    if not is_fine(source.dtype):
        kernel_noise = None
    return kernels.materialise(
        source,
        [None if m is None else m.split if i == closing else m.scaled for i, m in enumerate(maps)],
        scale=stage.scale,
        random_std=random_std,
        random_seed=stage.random_seed,
        constant=stage.constant,
        noise=kernel_noise,
        key=key,
        dtype=dtype,
    )


def _continued(plan: TensorPlan, source: torch.Tensor) -> torch.Tensor:
    """The source with its pattern continued along the dims that the plan names; other dims are as they were."""
    pattern = plan.continuation
    assert pattern is not None
    sizes = {i: plan.shape[i] for i in pattern.dims}
    if source.is_meta:
        return source.new_empty([sizes.get(i, n) for i, n in enumerate(source.shape)])
    if pattern.kind == "line":
        return kernels.continue_line(source, sizes)
    if pattern.kind == "band" and pattern.rows is not None and pattern.columns is not None:
        return kernels.continue_band(source, sizes, pattern.rows, pattern.columns)
    if pattern.kind == "waves" and pattern.columns is not None:
        return kernels.continue_waves(
            source,
            sizes,
            pattern.columns,
            pattern.frequencies or [],
            pattern.sines or [],
            getattr(torch, pattern.dtype),
        )
    raise GrowthRefused(
        f"the plan was made without the values of {plan.source}, so that how it goes on is not known; plan again with "
        "the model's own tensors"
    )


def _initial(plan: TensorPlan, dtype: torch.dtype) -> torch.Tensor:
    out = torch.zeros(plan.shape if plan.initial is None else plan.initial, dtype=dtype, device=plan.device)
    if plan.init == "ones":
        out.fill_(1)
    elif plan.init == "identity":
        out.copy_(torch.eye(out.shape[0], dtype=dtype))
    elif plan.init == "dirac":
        torch.nn.init.dirac_(out)
    return out


def materialise_all(
    plan: GrowthPlan,
    source: Callable[[str], torch.Tensor],
    names: Iterable[str] | None = None,
    *,
    dtype: torch.dtype | None = None,
    done: Callable[[str], None] | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of the grown model, one after the other.

    Args:
        source: old tensor by old name.
        names: of the grown model's tensors; all of them where None.
        dtype: for tensors of real numbers, complex ones likewise; each source's own where None.
        done: called with a source's name after its last use, so that the caller can free it.
    """
    wanted = list(plan.tensors if names is None else names)
    left: dict[str, int] = {}
    for name in wanted:
        s = plan.tensors[name].source
        if s is not None:
            left[s] = left.get(s, 0) + 1
    for name in wanted:
        tensor_plan = plan.tensors[name]
        old = source(tensor_plan.source) if tensor_plan.source is not None else None
        own = old.dtype if old is not None else getattr(torch, tensor_plan.dtype or "float32")
        yield name, materialise_tensor(tensor_plan, old, dtype=same_kind(own, dtype) if dtype else own)
        if tensor_plan.source is not None:
            left[tensor_plan.source] -= 1
            if done is not None and left[tensor_plan.source] == 0:
                done(tensor_plan.source)


def materialise_moment(
    plan: TensorPlan, moment: torch.Tensor, kind: Moment | str, *, scale_gradients: bool, keep_copies: bool = True
) -> torch.Tensor:
    """An optimizer moment, grown like its parameter. Newborn units start at zero.

    Args:
        plan: of the parameter.
        moment: same shape as the old parameter.
        kind: how it depends on gradients and values, or one of :data:`fxgrow.weights.moments.KINDS`.
        scale_gradients: multiply by the factors that copying puts on gradients and values.
        keep_copies: copies inherit their unit's moment; otherwise only the first copy keeps it.

    Raises:
        GrowthRefused: the moment has no values in memory, see :func:`check_readable`.
    """
    check_readable({f"optimizer state of {plan.source}": moment})
    kind = KINDS[kind] if isinstance(kind, str) else kind
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
    scale = plan.gradient_scale**of_gradient * plan.scale**of_value
    if moment.is_complex():
        parts = torch.view_as_real(moment.detach().resolve_conj())
        return torch.view_as_complex(kernels.materialise(parts, [*dims, None], scale=scale, dtype=parts.dtype))
    return kernels.materialise(moment.detach(), dims, scale=scale, dtype=moment.dtype)


def copy_gradient(plan: TensorPlan, gradient: torch.Tensor) -> torch.Tensor:
    """What the gradient of a grown parameter is, from the gradient of the old one, where the growth is a pure copy."""
    return materialise_moment(plan, gradient, "gradient", scale_gradients=True)


def check_readable(tensors: Mapping[str, torch.Tensor], error: type[FxgrowError] = GrowthRefused) -> None:
    """The gate by which tensors enter: each has its values in memory of its own, or is on the meta device.

    Freed memory, sharded tensors and other subclasses, and layouts that are not strided stop here, before anything
    reads a pointer.

    Raises:
        GrowthRefused: or ``error``; it names the tensor, and says why and what to do.
    """
    for name, tensor in tensors.items():
        if why := kernels.unreadable(tensor):
            raise error(f"cannot read {name}: {why}")


def check_finite(tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse to grow weights that hold NaN or infinities.

    Raises:
        GrowthRefused: with the names and counts.
    """
    bad = []
    for name, t in tensors.items():
        if t.device.type == "meta" or not (t.is_floating_point() or t.is_complex()):
            continue
        values = t.detach() if is_fine(t.dtype) else t.detach().float()  # nothing is summed in 8 bits
        if not bool(torch.isfinite(values.sum())):
            count = int((~torch.isfinite(values)).sum())
            if count:
                bad.append(f"{name} ({count} of {t.numel()} values)")
    if bad:
        raise GrowthRefused(
            "the model holds NaN or infinite values, so that no growth of it can be verified: " + ", ".join(bad[:5])
        )
