"""From plan to tensors: every container of tensors is filled from the same tensor plans, through the kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch

from fxgrow import kernels
from fxgrow.errors import FxgrowError, GrowthRefused
from fxgrow.ir.dtensors import is_sharded, local_of, sharded_as
from fxgrow.ir.dtypes import is_fine, same_kind
from fxgrow.plan import GrowthPlan, Stage, TensorPlan
from fxgrow.weights.jobs import initial, keyed_stages, moment_job, shifted, stage_job
from fxgrow.weights.moments import KINDS, Moment
from fxgrow.weights.shards import materialise_moment_shard, materialise_shard


def materialise_tensor(
    plan: TensorPlan, source: torch.Tensor | None, *, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """One tensor of the grown model.

    Args:
        plan: what it is made of.
        source: the old tensor, or None where the plan has none. A ``DTensor`` grows shard by shard.
        dtype: of the result; the source's where None.

    Raises:
        GrowthRefused: the source has no values in memory, see :func:`check_readable`.
    """
    if source is not None and is_sharded(source):
        return sharded_as(source, materialise_shard(plan, source, source, dtype=dtype), plan.shape)
    if plan.init is not None:
        source = initial(plan, dtype or torch.get_default_dtype())
    assert source is not None
    check_readable({plan.source or "the source": source})
    source = source.detach().resolve_conj().resolve_neg()
    dtype = dtype or source.dtype
    if plan.zero:
        return torch.full(plan.shape, plan.level, dtype=dtype, device=source.device)
    held: list[int] = []
    if plan.continuation is not None:
        source, held = _continued(plan, source), plan.continuation.dims
    for stage, key in keyed_stages(plan):
        source = _materialise_stage(stage, source, held, key, dtype)
    return shifted(source, plan.shift)


def _materialise_stage(
    stage: Stage, source: torch.Tensor, held: list[int], key: int, dtype: torch.dtype
) -> torch.Tensor:
    """The result of one growth; ``held`` are the dims that have their size already."""
    if source.is_complex():  # real and imaginary parts grow alike
        stage = stage.model_copy(update={"dims": [*stage.dims, None] if stage.dims else []})
        return torch.view_as_complex(_materialise_stage(stage, torch.view_as_real(source), held, key, dtype.to_real()))
    job = stage_job(stage, key, source.dtype, source.shape, lambda: kernels.Sums.of(source), held)
    return kernels.materialise(source, job.dims, dtype=dtype, **job.options)


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
    kind = KINDS[kind] if isinstance(kind, str) else kind
    if is_sharded(moment):
        return materialise_moment_shard(plan, moment, kind, scale_gradients=scale_gradients, keep_copies=keep_copies)
    check_readable({f"optimizer state of {plan.source}": moment})
    job = moment_job(plan, kind, scale_gradients=scale_gradients, keep_copies=keep_copies)
    if moment.is_complex():
        parts = torch.view_as_real(moment.detach().resolve_conj())
        return torch.view_as_complex(kernels.materialise(parts, [*job.dims, None], dtype=parts.dtype, **job.options))
    return kernels.materialise(moment.detach(), job.dims, dtype=moment.dtype, **job.options)


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
    """Refuse to grow weights that hold NaN or infinities; of sharded ones, those that this rank holds.

    Raises:
        GrowthRefused: with the names and counts.
    """
    bad = []
    for name, t in tensors.items():
        if t.device.type == "meta" or not (t.is_floating_point() or t.is_complex()):
            continue
        local = local_of(t)
        values = local if is_fine(t.dtype) else local.float()  # nothing is summed in 8 bits
        if not bool(torch.isfinite(values.sum())):
            count = int((~torch.isfinite(values)).sum())
            if count:
                bad.append(f"{name} ({count} of {t.numel()} values)")
    if bad:
        raise GrowthRefused(
            "the model holds NaN or infinite values, so that no growth of it can be verified: " + ", ".join(bad[:5])
        )
