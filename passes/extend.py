"""``extend``: append entries to vocabularies, positions and classes; old inputs keep their outputs.

``widen`` copies units and shares them out, which makes no sense where entries are picked by number: token 7 has to stay
token 7. ``extend`` appends, and proves (:mod:`fxgrow.proof.extension`) that old entries do not see new ones::

    - {op: extend, axis: "*/vocab", by: 64}                        # tokens: embedding and head, tied or not
    - {op: extend, axis: "*/positions", factor: 2}                 # longer inputs: tables, masks, position numbers
    - {op: extend, axis: "*/vocab", to: 50304, preserve: approximate}    # the loss is in the model, and changes

New rows of trained tables hold the mean of the old ones (Hewitt 2021), zeros, or random values. Buffers hold no trained
weights: they are continued by their own pattern (consecutive numbers, a triangle or band, cosines and sines), or the
growth is refused. Where an input's length is what a table limits, everything else that limits it follows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from fxgrow.algebra import Axis
from fxgrow.analysis.axes import Axes, Member, NamedAxis
from fxgrow.analysis.ranges import Ranges
from fxgrow.errors import GrowthRefused, Refusal, SpecError
from fxgrow.ir.guards import moved
from fxgrow.ir.nodes import info_of
from fxgrow.passes.base import GrowthPass, register_pass
from fxgrow.passes.changes import changes_of
from fxgrow.passes.state import State, new_size
from fxgrow.plan import FILL_MEAN, FILL_RANDOM, FILL_ZERO, AxisGrowth, DimPlan, OutputGrowth, Step, key_of
from fxgrow.proof.extension import ExtensionProof
from fxgrow.proof.lookups import longest, short_dims
from fxgrow.proof.maps import dim_plan
from fxgrow.proof.outcome import Outcome
from fxgrow.proof.resize import size_edits
from fxgrow.rules.annotation import Site
from fxgrow.spec import Extend
from fxgrow.weights.continuation import recognise


class ExtendPass(GrowthPass):
    """Re-emits the literals that depend on a grown size."""

    op = "extend"


@dataclass
class _Wanted:
    """An axis to extend; ``because`` of which other one it has to follow."""

    info: NamedAxis
    new: int
    because: str = ""


def plan_extend(state: State, op: Extend) -> list[Step]:
    """Decide how every axis that ``op.axis`` matches is extended, and apply it to the working graph.

    Raises:
        SpecError: no axis matches, or the size asked for is not one.
        GrowthRefused: old outputs would change, or a buffer follows no known pattern.
    """
    ranges = Ranges(state.program)
    step = Step(op="extend", request=op.model_dump(exclude_defaults=True, mode="json"))
    queue = []
    for info in _find(state, op.axis):
        if info.growable and not _only_buffers(state, info.members):
            why = "its entries are neither looked up by number nor returned; widen grows it"
            raise GrowthRefused(Refusal(info.name, why, "extend"))
        new = new_size(op, info)
        state.check_room(info, new)
        if new == info.size:
            step.notes.append(f"{info.name} has {new} entries already")
        else:
            queue.append(_Wanted(info, new))
    done: dict[int, int] = {}
    proofs: list[tuple[_Wanted, ExtensionProof, Outcome]] = []
    while queue:
        wanted = queue.pop(0)
        axis = wanted.info.axis
        if done.get(axis.id, 0) >= wanted.new:
            continue
        if axis.id in done:
            proofs = [p for p in proofs if p[0].info.axis is not axis]
        proof = ExtensionProof(state.axes, axis, wanted.info.name, wanted.new, ranges, tolerate=op.preserve != "exact")
        proofs.append((wanted, proof, proof.run()))
        done[axis.id] = wanted.new
        queue.extend(_followers(state, proof, wanted, ranges))
    before = state.axes
    for wanted, proof, outcome in proofs:
        _grow(state, op, wanted, proof, outcome, step)
    _continue_buffers(state, before, [w for w, _, _ in proofs], step)
    if step.changed_outputs:
        step.exactness = "approximate"
        listed = ", ".join(map(str, step.changed_outputs))
        step.notes.append(f"output {listed} is computed from old and new entries together, and changes")
    return [step]


def _find(state: State, pattern: str) -> list[NamedAxis]:
    """The axes that a spec names; a buffer's dim is an axis too, though it has no name of its own."""
    try:
        return state.axes.find(pattern)
    except SpecError:
        tensor, _, dim = pattern.rpartition(":")
        table = state.axes.tensor_dims()
        if tensor in table and dim.lstrip("-").isdigit() and -len(table[tensor]) <= int(dim) < len(table[tensor]):
            axis = table[tensor][int(dim)]
            if isinstance(axis, Axis) and _only_buffers(state, state.axes.members_of(axis)):
                return [_unnamed(state, axis)]
        raise


def _unnamed(state: State, axis: Axis) -> NamedAxis:
    """An axis of buffers, named after the first of them."""
    for info in state.axes:
        if info.axis is axis:
            return info
    found = tuple(state.axes.members_of(axis))
    if not found:
        raise GrowthRefused("an axis of no parameter or buffer")
    return NamedAxis(str(found[0]), int(axis.size), "positions", found, axis.frozen, axis)


def _only_buffers(state: State, members: Iterable[Member]) -> bool:
    return not any(state.is_parameter(m.tensor) for m in members)


def _followers(state: State, proof: ExtensionProof, wanted: _Wanted, ranges: Ranges) -> Iterator[_Wanted]:
    """Other tables and masks that limit the length of the input that the extended one is for."""
    reach: dict[Any, int] = {}  # the longest input that every look-up of the table allows
    for one in proof.lookups:
        found = longest(one.need, wanted.new)
        if found is not None:
            reach[found[0]] = min(found[1], reach.get(found[0], found[1]))
    for symbol, most in reach.items():
        for short in short_dims(state.axes, ranges, symbol, most):
            if short.dim is wanted.info.axis:
                continue
            where = info_of(short.lookup.node).source
            at = f"{short.lookup.node.target}" + (f" at {where}" if where else "")
            if not isinstance(short.dim, Axis) or not state.axes.members_of(short.dim):
                why = (
                    f"{at} takes {short.size} entries of {short.lookup.operand.name} then, which is computed with "
                    "a size of its own and cannot follow. Make it a buffer, or compute it from the input's length"
                )
                raise GrowthRefused(Refusal(wanted.info.name, why, "extend", wanted.info.size, wanted.new))
            yield _Wanted(_unnamed(state, short.dim), short.size, wanted.info.name)


def _grow(state: State, op: Extend, wanted: _Wanted, proof: ExtensionProof, outcome: Outcome, step: Step) -> None:
    axes, info, new = state.axes, wanted.info, wanted.new
    old = info.size

    changes = changes_of(state.graph, outcome, size_edits(axes, info.axis, new, proof.context.refuse_at))
    for member in axes.members_of(info.axis):
        if state.is_parameter(member.tensor):
            _plan_rows(state, op, member, info.axis, outcome)
    how = f"appended, {op.init}" if not _only_buffers(state, info.members) else "continued"
    step.axes.append(
        AxisGrowth(
            name=info.name,
            role=info.role,
            old=old,
            new=new,
            fill="append",
            split="even",
            copies=1,
            newborn=new - old,
            newborn_content=op.init,
            how=how + (f", as {wanted.because} needs" if wanted.because else ""),
        )
    )
    _note_outputs(step, proof.outputs)
    step.changed_outputs = sorted({*step.changed_outputs, *proof.changed_outputs})
    for call in state.program.calls:
        call.guards = moved(call.guards, old, new)
    state.apply(step, changes, {info.axis: new})


def _note_outputs(step: Step, grown: list[OutputGrowth]) -> None:
    """Several axes may lie along one dim of an output: each adds its entries to what the others made of it."""
    for one in grown:
        for before in step.outputs:
            if (before.output, before.dim) == (one.output, one.dim):
                before.new = one.new
                break
        else:
            step.outputs.append(one)


def _plan_rows(state: State, op: Extend, member: Member, axis: Axis, outcome: Outcome) -> None:
    """New entries of a trained tensor."""
    name, i = member.tensor, member.dim
    plan = state.tensors[name]
    code = {"mean": FILL_MEAN, "zero": FILL_ZERO, "random": FILL_RANDOM}[op.init]
    if code == FILL_RANDOM and len(plan.shape) < 2:
        code = FILL_MEAN  # a bias has no spread of its own that would make sense of a random one

    def carrier_fill(site: Site) -> int:
        return code

    node = next(n for n in state.axes.uses[axis.id] if n.op == "get_attr" and str(n.target) == name)
    made = dim_plan(state.axes.dims[node][i], name, i, axis, outcome, carrier_fill)
    if made.fill is not None:
        # a reader that only meets zeros is as free as a table
        made.fill = np.where((made.index < 0) & (made.fill == FILL_RANDOM), float(code), made.fill)
    plan.begin([i], draws=False)
    state.compose(name, i, made)
    plan.key = key_of(name)
    plan.last.random_seed = op.seed
    if i not in plan.appended:
        plan.appended.append(i)


def _continue_buffers(state: State, axes: Axes, extended: list[_Wanted], step: Step) -> None:
    """Buffers go on by their pattern, all their extended dims at once. ``axes`` are those before."""
    grown: dict[str, dict[int, _Wanted]] = {}
    for wanted in extended:
        for member in axes.members_of(wanted.info.axis):
            if not state.is_parameter(member.tensor):
                grown.setdefault(member.tensor, {})[member.dim] = wanted
    words: dict[str, list[str]] = {}
    for name, dims in grown.items():
        plan = state.tensors[name]
        assert plan.source is not None
        node = next(n for n in state.graph.nodes if n.op == "get_attr" and str(n.target) == name)
        along = sorted({*dims, *(plan.continuation.dims if plan.continuation is not None else ())})
        whole = all(axes.dims[node][i] is w.info.axis for i, w in dims.items())
        # copies of a pattern's entries are no pattern
        whole &= all(plan.dims[i] is None or i in plan.appended for i in along)
        pattern = recognise(state.program.tensor(name), along) if whole and not plan.zero else None
        others = {i for i, d in enumerate(plan.dims) if d is not None and i not in along}
        if pattern is None or others & {pattern.rows, pattern.columns}:
            wanted = next(iter(dims.values()))
            why = (
                f"the buffer {name} has to grow along dim {', '.join(map(str, dims))}, and its values follow no "
                "pattern that fxgrow could continue (a constant, evenly spaced numbers, a triangle or band, cosines "
                "and sines of the position)"
            )
            raise GrowthRefused(Refusal(wanted.info.name, why, "extend"))
        plan.continuation = pattern
        for i, wanted in dims.items():
            old = plan.shape[i]
            appended = -1 - np.arange(wanted.new - old)
            state.compose(name, i, DimPlan(index=np.concatenate([np.arange(old), appended])))
            if i not in plan.appended:
                plan.appended.append(i)
        words.setdefault(pattern.words, []).append(name)
    for what, names in words.items():
        listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        step.notes.append(f"continued as {what}: {listed}")


register_pass("extend", plan_extend, ExtendPass)
