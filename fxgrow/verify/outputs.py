"""What a model returns: which outputs there are, what of them is old, and how far two are apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fxgrow.errors import ExactnessError
from fxgrow.ir import trees
from fxgrow.ir.traced import Call, Traced
from fxgrow.plan import GrowthPlan
from fxgrow.verify.receipt import OutputError
from fxgrow.verify.rounding import difference


def output_numbers(program: Traced) -> list[tuple[Call | None, range]]:
    """By call, the numbers of the tensors it returns: those of all calls are counted on."""
    value = program.graph.output_node().args[0]
    calls: list[tuple[Call | None, Any]] = [(next(iter(program.calls), None), value)]
    if len(program.calls) > 1:
        assert isinstance(value, tuple)
        calls = list(zip(program.calls, value, strict=True))
    out, first = [], 0
    for call, returned in calls:
        count = sum(
            isinstance(x, fx.Node) and isinstance(x.meta.get("val"), torch.Tensor) for x in trees.tree_leaves(returned)
        )
        out.append((call, range(first, first + count)))
        first += count
    return out


def relative_errors(
    old: Any, new: Any, plan: GrowthPlan | None = None, numbers: Sequence[int] | None = None
) -> list[OutputError]:
    """Per output tensor, relative to its largest value; integer outputs count as different or not.

    Args:
        plan: where it appends entries to an output, the old ones are compared, and it must have grown by just so many.
        numbers: of these outputs in the plan, which counts those of all calls; 0, 1, 2 ... where None.

    Raises:
        ExactnessError: an output has another shape than the plan says, or another dtype.
    """
    out = []
    changed = plan.changed_outputs if plan is not None else set()
    before, after = trees.tensors_in(old), trees.tensors_in(new)
    for i, a, b in zip(range(len(before)) if numbers is None else numbers, before, after, strict=True):
        b = old_part(i, a, b, plan)
        gap = difference(a, b)
        if not a.is_floating_point() and not a.is_complex():
            error = 1.0 if bool(gap.any()) else 0.0
        elif a.numel() == 0:
            error = 0.0
        else:
            finite = a.detach().abs().double().nan_to_num(0, 0, 0)
            scale = float(finite.max()) if bool(finite.any()) else (1e-300 if bool(a.isfinite().any()) else 1.0)
            error = float(gap.max()) / scale
        out.append(OutputError(output=str(i), shape=list(a.shape), relative_error=error, changed=i in changed))
    return out


def old_part(number: int, a: torch.Tensor, b: torch.Tensor, plan: GrowthPlan | None) -> torch.Tensor:
    """The entries of a grown output that the old one has.

    Raises:
        ExactnessError: it has another shape than the plan says, or another dtype.
    """
    for growth in (o for s in plan.steps for o in s.outputs if o.output == number) if plan is not None else ():
        if b.shape[growth.dim] == a.shape[growth.dim] + _appended(plan, number, growth.dim):
            b = b.narrow(growth.dim, 0, a.shape[growth.dim])
    if a.shape != b.shape:
        raise ExactnessError(f"output {number} changed its shape from {tuple(a.shape)} to {tuple(b.shape)}")
    if a.dtype != b.dtype:
        raise ExactnessError(f"output {number} changed its dtype from {a.dtype} to {b.dtype}")
    return b


def _appended(plan: GrowthPlan | None, output: int, dim: int) -> int:
    """How many entries the plan appends to a dim of an output, over all its steps."""
    steps = plan.steps if plan is not None else []
    return sum(o.new - o.old for s in steps for o in s.outputs if (o.output, o.dim) == (output, dim))


def plain_values(value: Any) -> list[Any]:
    """The numbers and texts among what a model returns, which are no tensors."""
    return [x for x in trees.tree_leaves(value) if isinstance(x, bool | int | float | str)]


def says_something(outputs: Any) -> bool:
    """Whether there is a finite number among the outputs, or a value that is no float."""
    found = trees.tensors_in(outputs)
    floats = [t for t in found if t.is_floating_point()]
    return len(floats) < len(found) or not floats or any(bool(t.isfinite().any()) for t in floats)
