"""``growth.into``: a growth in a larger instance of the user's class, proved by the graph of that instance.

The target is traced once, as it is, and its graph compared with the grown one: nothing is changed before both are known
to compute the same. Then its modules take the grown tensors as they are, so that there is one set of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from fxgrow.errors import CaptureError, ExactnessError, GrowthRefused
from fxgrow.ir.modules import named_tensors, tensor_of
from fxgrow.ir.replicas import around, check_replicas, follow, innermost, plainly
from fxgrow.ir.running import in_mode, run_eval, run_with
from fxgrow.ir.traced import Traced
from fxgrow.landing.compare import Difference, described, differences
from fxgrow.landing.living import Living
from fxgrow.landing.retrace import retrace
from fxgrow.plan import CloneBlock, GrowthPlan
from fxgrow.program import Program
from fxgrow.verify.outputs import relative_errors
from fxgrow.warn import warn

#: what a run may differ by, relatively, though the graphs are equal: rounding in the model's own dtype
ROUNDING = {torch.float64: 1e-10, torch.float32: 1e-4}


def into(
    target: nn.Module, module: nn.Module, plan: GrowthPlan, grown: Traced, traced: Traced | None = None
) -> list[str]:
    """Put a growth into a larger instance.

    Args:
        target: of the class that was grown, in any mode, compiled or not, on any device or on meta.
        module: the grown module; it and the target hold the same tensors afterwards.
        traced: the target's trace, where it is at hand.

    Returns:
        What to know: tensors that no captured call reads and that stay the target's own; buffers that are not saved and
        have other values than the class computes.

    Raises:
        GrowthRefused: the target computes something else, or cannot be traced; it is as it was.
    """
    model, replicas = innermost(target), around(target)
    check_replicas(replicas)
    theirs = traced if traced is not None else trace_like(model, grown)
    found = differences(grown, theirs)
    if found:
        raise GrowthRefused(refusal(type(model).__name__, found, plan, theirs))
    tensors, kept = _matched(model, module, grown, theirs)
    with plainly(model):
        _check_run(model, module, grown, tensors)
    name = type(model).__name__
    notes = [f"no captured call reads {', '.join(kept)}: the larger {name} keeps its own"] if kept else []
    if unsaved := _unsaved(model, theirs, tensors):
        notes.append(
            f"the buffer {unsaved[0]} of the larger {name} is not in its state dict, and holds other values now than "
            "the class computes: save it with the weights, else a model that loads them computes something else"
        )
        warn(notes[-1])
    _exchange(model, tensors)
    for ddp in replicas:
        follow(ddp)
    return notes


def trace_like(model: nn.Module, program: Traced) -> Program:
    """A trace of a model by the calls that another program was traced by.

    Raises:
        GrowthRefused: it cannot be traced so.
    """
    try:
        return retrace(model, program)
    except CaptureError as error:
        name = type(model).__name__
        raise GrowthRefused(f"the larger {name} cannot be traced with the growth's examples: {error}") from error


# tensors --------------------------------------------------------------------------------------------------------------


def _matched(
    model: nn.Module, module: nn.Module, grown: Traced, theirs: Traced
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The grown tensor for every name of the target's, and the names that keep what they hold."""
    own = named_tensors(module)
    read = {str(n.target) for n in theirs.graph.nodes if n.op == "get_attr"}
    groups: dict[int, list[str]] = {}
    held = named_tensors(model)
    for name, tensor in held.items():
        groups.setdefault(id(tensor), []).append(name)
    out: dict[str, torch.Tensor] = {}
    kept: list[str] = []
    for names in groups.values():
        first = sorted(names, key=lambda n: n not in read)  # what is read decides for its ties
        old = held[names[0]]
        new = next((own[n] for n in first if n in own), None)
        if new is None or new.shape != old.shape or new.dtype != old.dtype:
            kept.append(names[0])
            continue
        out.update(dict.fromkeys(names, new))
    return out, kept


def _unsaved(model: nn.Module, theirs: Traced, tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Buffers that are not saved and that the class, as it built the target, has other values for."""
    read = {str(n.target) for n in theirs.graph.nodes if n.op == "get_attr"}

    def differs(old: torch.Tensor, new: torch.Tensor) -> bool:
        return not (old.is_meta or new.is_meta) and not torch.equal(old, new.to(old.device))

    own = dict(model.named_buffers())
    return [n for n, b in own.items() if n in read - theirs.persistent and n in tensors and differs(b, tensors[n])]


def _exchange(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Let the target's modules hold the grown tensors, on their devices and trained as theirs are."""
    living = Living(model)
    try:
        for name, new in tensors.items():
            path, _, leaf = name.rpartition(".")
            old = tensor_of(living.module(path), leaf)
            assert old is not None
            if old is not new and not old.is_meta and old.device != new.device:
                new.data = new.data.to(old.device)  # the grown module's, too: they are one tensor
            if isinstance(new, nn.Parameter):
                new.requires_grad_(old.requires_grad)
            living.tensor(name, new)
    except BaseException:
        living.undo()
        raise


def _check_run(model: nn.Module, module: nn.Module, grown: Traced, tensors: Mapping[str, torch.Tensor]) -> None:
    """Run both on the example, the target with the grown tensors in the place of its own: a second look.

    Raises:
        ExactnessError: they differ, though their graphs are equal.
    """
    places = [t.device for t in (*named_tensors(model).values(), *tensors.values())]
    if len(set(places)) > 1 or any(d.type == "meta" for d in places):
        return
    given = {n: t if isinstance(t, nn.Parameter) else t.clone() for n, t in tensors.items()}
    with in_mode(model, False), torch.no_grad():
        new = run_with(model, given, grown.args, grown.kwargs)
    old = run_eval(module, grown.args, grown.kwargs)
    error = max((e.relative_error for e in relative_errors(old, new)), default=0.0)
    dtype = next((t.dtype for t in tensors.values() if t.is_floating_point()), torch.float32)
    if not error <= ROUNDING.get(dtype, 1e-2):
        raise ExactnessError(
            f"the larger {type(model).__name__} has the growth's graph, but its outputs differ by {error:.1e}: a bug "
            "in fxgrow. It is as it was; please report it"
        )


# words ----------------------------------------------------------------------------------------------------------------

_MOST = 6


def refusal(name: str, found: Iterable[Difference], plan: GrowthPlan, theirs: Traced) -> str:
    """What the larger class computes otherwise, both numbers and both lines, and what to do."""
    listed = list(found)
    lines = [f"the larger {name} does not compute what the growth does; it is as it was:"]
    lines += [f"  {described(d, 'the larger class')}" for d in listed[:_MOST]]
    if len(listed) > _MOST:
        lines.append(f"  and {len(listed) - _MOST} more")
    gates = [c.gate for s in plan.steps for c in s.changes if isinstance(c, CloneBlock) and c.gate]
    missing = [g for g in gates if g not in theirs.parameters and g not in theirs.aliases]
    if missing:
        lines.append(
            f"The new blocks are exact by a gate of their own, a parameter that {name} does not have ({missing[0]}): "
            "nothing else makes them exact there. Use growth.module, or give the class such a parameter"
        )
    elif any(d.kind in ("literal", "missing", "extra") for d in listed):
        lines.append(
            "Give the larger instance these numbers (in its config, or as attributes that its forward reads), grow "
            "with fxgrow.expand, which folds constants into weights where that is exact, or use growth.module"
        )
    else:
        lines.append("Build the larger instance with the growth's sizes and ties, or use growth.module")
    return "\n".join(lines)
