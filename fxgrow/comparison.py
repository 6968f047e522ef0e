"""How far a stored model and another one are apart: their outputs, in their own dtype and in float64."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fxgrow.checkpoint import Loaded
from fxgrow.emit.module import regenerate
from fxgrow.errors import CheckpointError, ExactnessError
from fxgrow.ir import trees
from fxgrow.ir.running import run_eval
from fxgrow.plan import GrowthPlan
from fxgrow.program import capture
from fxgrow.verify.outputs import output_numbers, relative_errors
from fxgrow.verify.weights import widen_float

#: largest relative error by dtype of the weights, when a stored model is compared with what it was grown from
TOLERANCE = {"float64": 1e-10, "float32": 1e-5, "float16": 1e-2, "bfloat16": 5e-2}


def stored_dtype(loaded: Loaded) -> str:
    """Dtype of a checkpoint's weights, which decides what counts as rounding."""
    return next((r.dtype for r in loaded.manifest.tensors.values() if "float" in r.dtype), "float32")


def errors_against(
    loaded: Loaded, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, stored: bool
) -> dict[str, float]:
    """Largest relative errors of a checkpoint's outputs against those of the model that it was grown from.

    Args:
        loaded: the checkpoint.
        module: the other model.
        args, kwargs: example inputs.
        stored: compare on the checkpoint's own examples, every way of calling it, where it has any.

    Returns:
        ``error_native``, in the models' dtype, and ``error_float64``, computed in float64 from the stored weights.

    Raises:
        CheckpointError: the two do not return the same tensors.
    """
    served = [(call, numbers) for call, numbers in output_numbers(loaded.program) if call is None or call.serves(False)]
    examples = [(args, kwargs, served[0][1])]
    if stored and loaded.outputs is not None:
        examples = [(call.args, call.kwargs, numbers) for call, numbers in served if call is not None]
    return {
        key: max(measure(module, loaded.module, a, k, loaded.plan, numbers) for a, k, numbers in examples)
        for key, measure in (("error_native", compare), ("error_float64", compare_float64))
    }


def compare(
    old: nn.Module,
    new: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    plan: GrowthPlan | None = None,
    numbers: Sequence[int] | None = None,
) -> float:
    """Largest relative error of an output, both in eval mode.

    Where the plan appends entries to an output, of the old ones; outputs that it changes are left out. ``numbers`` are
    those of the call's outputs among all calls'.
    """
    leaves = [trees.tensors_in(run_eval(module, args, kwargs)) for module in (old, new)]
    shapes = [[list(t.shape) for t in row] for row in leaves]
    differ = f"the models do not return the same: {shapes[0]} against {shapes[1]}"
    if len(leaves[0]) != len(leaves[1]):
        raise CheckpointError(differ)
    try:
        errors = relative_errors(leaves[0], leaves[1], plan, numbers if plan is not None else None)
    except ExactnessError:
        raise CheckpointError(differ) from None
    return max((e.relative_error for e in errors if not e.changed), default=0.0)


def compare_float64(
    old: nn.Module,
    new: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    plan: GrowthPlan | None = None,
    numbers: Sequence[int] | None = None,
) -> float:
    """The same with both graphs in float64, so that the arithmetic's rounding is out of the comparison."""
    args, kwargs = _floats_to(torch.float64, args, kwargs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        modules = []
        for module in (old, new):
            dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
            program = capture(module, *_floats_to(dtype, args, kwargs))
            modules.append(regenerate(program, {n: widen_float(t) for n, t in program.tensors.items()}, double=True))
    return compare(modules[0], modules[1], args, kwargs, plan, numbers)


def _floats_to(
    dtype: torch.dtype, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs with their floating-point tensors in another dtype."""
    made: tuple[tuple[Any, ...], dict[str, Any]] = trees.map_tensors(
        lambda x: x.to(dtype) if x.is_floating_point() else x, (args, kwargs)
    )
    return made
