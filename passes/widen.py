"""``widen``: grow axes by copying units (Net2WiderNet; LEMON where a norm meets a remainder) or by adding new ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from fxgrow.analysis.axes import NamedAxis
from fxgrow.errors import GrowthRefused, Refusal, SpecError
from fxgrow.ir.dtypes import is_fine
from fxgrow.ir.nodes import note
from fxgrow.ir.sizes import sizes_of
from fxgrow.passes.base import GrowthPass, register_pass
from fxgrow.passes.changes import changes_of
from fxgrow.passes.constants import Before, settle
from fxgrow.passes.groups import copied, cut, made_units, note_of, repeats_of
from fxgrow.passes.state import State, new_size
from fxgrow.plan import (
    FILL_CONSTANT,
    FILL_MEAN,
    FILL_RANDOM,
    FILL_ZERO,
    AxisGrowth,
    AxisMap,
    Edit,
    NoisePlan,
    Step,
    key_of,
)
from fxgrow.proof.growth import GrowthProof
from fxgrow.proof.maps import dim_plan
from fxgrow.proof.outcome import Outcome
from fxgrow.proof.resize import size_edits
from fxgrow.rules.annotation import Content, Site
from fxgrow.spec import Widen


class WidenPass(GrowthPass):
    """Re-emits the literals that depend on a grown size, and inserts constants that keep the function."""

    op = "widen"


def plan_widen(state: State, op: Widen) -> list[Step]:
    """Decide how every axis that ``op.axis`` matches grows, and apply it to the working graph.

    Raises:
        SpecError: no axis matches, or the size asked for is not one.
        GrowthRefused: an axis is frozen, or no way of growing it is exact.
    """
    infos = state.axes.find(op.axis)
    frozen = [i for i in infos if not i.growable]
    if frozen:
        able = [i.name for i in infos if i.growable]
        rest = f"\n({op.axis!r} also matches {_listed(able)}: name only those that can grow)" if able else ""
        raise GrowthRefused(_frozen(frozen) + rest)
    step = Step(
        op="widen",
        request=op.model_dump(exclude_defaults=True, mode="json"),
        exactness=op.preserve if _changes_function(op) else "exact",
    )
    if op.groups == "share":
        for info in infos:
            _share_groups(state, op, state.axes[info.name], step)  # found anew after each
        return [step]
    before = Before.of(state)
    for info in infos:
        new = new_size(op, info)
        state.check_room(info, new)
        if new == info.size:
            step.notes.append(f"{info.name} has {new} units already")
            continue
        _grow_axis(state, op, info, new, step)
    settle(state, step, before, op.constants)
    return [step]


def _frozen(infos: list[NamedAxis]) -> str:
    """A line for every reason, with all the axes that it freezes."""
    by_reason: dict[str, list[str]] = {}
    for info in infos:
        by_reason.setdefault(str(info.reason), []).append(info.name)
    return "\n".join(
        str(Refusal(_listed(names), f"{'it is' if len(names) == 1 else 'they are'} frozen by {reason}"))
        for reason, names in by_reason.items()
    )


def _listed(names: list[str], most: int = 4) -> str:
    shown = ", ".join(names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown


def _changes_function(op: Widen) -> bool:
    noisy = op.noise is not None and (op.noise.kind == "independent" or op.noise.on != "readers")
    return noisy or (op.fan_in == "random" and op.fan_out == "random")


def candidates(op: Widen, old: int, new: int) -> Iterator[tuple[str, AxisMap, Content]]:
    """Ways to grow an axis, best first: (in words, map, content of newborn entries where nothing demands another)."""
    content = Content.ZERO if op.fan_in == "zero" else Content.FREE
    if op.fill == "copy":
        if new % old == 0:
            yield f"{new // old} copies of every unit", AxisMap.copy(old, new, op.split), content
        else:
            yield "copies, some units one more than others", AxisMap.copy(old, new, op.split), content
            copies = "one copy" if new // old == 1 else f"{new // old} copies"
            yield (
                f"{copies} of every unit and {new % old} padded ones",
                AxisMap.copy(old, new, op.split, "newborn"),
                content,
            )
        return
    even = (new - old) % 2 == 0
    if op.fan_out == "paired" and not even:
        raise SpecError(f"fan_out: paired adds units two by two, and {new - old} is odd. Use to: {new + 1}")
    if op.fan_out == "paired" or (op.fan_out == "auto" and op.fan_in != "zero" and even):
        yield "new units in pairs that cancel", AxisMap.add(old, new, paired=True), content
    if op.fan_out != "paired":
        side = "incoming" if op.fan_in == "zero" else "outgoing"
        words = f"new units whose {side} weights are zero"
        yield words if op.fan_out != "random" else "new random units", AxisMap.add(old, new, paired=False), content


def _grow_axis(state: State, op: Widen, info: NamedAxis, new: int, step: Step) -> None:
    axes, axis = state.axes, info.axis
    refusals: dict[str, str] = {}  # the reason, and the way it rules out
    parts: list[Refusal | None] = []
    for words, growth, content in candidates(op, info.size, new):
        proof = GrowthProof(axes, axis, info.name, growth, content)
        try:
            outcome = proof.run()
            sizes = size_edits(axes, axis, new, proof.context.refuse_at)
            break
        except GrowthRefused as refusal:
            refusals.setdefault(refusal.refusal.reason if refusal.refusal else str(refusal), words)
            parts.append(refusal.refusal)
    else:
        (first, _), *others = refusals.items()
        lines = [str(Refusal(info.name, first, old=info.size, new=new))]
        lines += [f"nor as {words}: {reason}" for reason, words in others]
        ways = [f"`{w}`" for w in _exact_ways(state, op, info, new)]
        lines += [f"(exact for {info.name}: {' or '.join(ways)})"] if ways else []
        raise GrowthRefused("\n".join(lines), parts[0])
    changes = changes_of(state.graph, outcome, sizes)
    _plan_tensors(state, op, info, outcome)
    pinned = {c.value for c in proof.contents.pinned.values()}
    exact_gradients = not (outcome.statistics and (growth.newborn > 0 or op.split == "uneven"))
    exact_gradients &= not outcome.uneven_gradients
    step.axes.append(
        _axis_growth(
            op,
            info,
            new,
            copies=growth.copies,
            newborn=growth.newborn,
            newborn_content=("+".join(sorted(pinned)) or content.value) if growth.newborn else "",
            exact_gradients=exact_gradients,
            how=words,
        )
    )
    if op.fill == "copy" and op.split == "even" and op.noise is None and growth.newborn == 0:
        step.notes.append(
            "copies are equal and get equal gradients: add noise, or split: uneven, if they are to become different"
        )
    if op.noise is not None and not any(state.tensors[m.tensor].last.noise for m in info.members):
        step.notes.append(f"no weight multiplies {info.name} by itself, so that there is nowhere to put exact noise")
    state.apply(step, changes, {axis: new})


def _axis_growth(op: Widen, info: NamedAxis, new: int, **how: Any) -> AxisGrowth:
    return AxisGrowth(name=info.name, role=info.role, old=info.size, new=new, fill=op.fill, split=op.split, **how)


def _share_groups(state: State, op: Widen, info: NamedAxis, step: Step) -> None:
    """Give every unit copies that share out its group, see :mod:`fxgrow.passes.groups`.

    Raises:
        GrowthRefused: no groups, or none that can be shared out so; or the units are read one by one as well.
    """
    new = new_size(op, info)
    state.check_room(info, new)
    if new == info.size:
        step.notes.append(f"{info.name} has {new} units already")
        return
    repeats = repeats_of(state.axes, info)
    copies = new // info.size
    odd = [r.groups for r in repeats if new % info.size or r.groups % copies]
    if odd:
        why = f"{odd[0]} of each group cannot be shared out among {new / info.size:g} copies"
        raise GrowthRefused(Refusal(info.name, why, "widen", info.size, new))
    part = State(cut(state.program, repeats), state.tensors, counter=state.counter)
    made = Step(op=step.op, request=step.request)
    while units := next((u for u in made_units(part.axes, repeats, info) if u.size != new), None):
        if not units.growable:
            raise GrowthRefused(Refusal(info.name, f"its units are frozen by {units.reason}", "widen", info.size, new))
        proof = GrowthProof(part.axes, units.axis, info.name, copied(units.size, copies), Content.FREE)
        outcome = proof.run()
        sizes = size_edits(part.axes, units.axis, new, proof.context.refuse_at)
        changes = changes_of(part.graph, outcome, sizes)
        if outcome.scales or outcome.readers or any(not isinstance(c, Edit) or c.why == "constant" for c in changes):
            raise GrowthRefused(Refusal(info.name, "its units are summed over as well", "widen", info.size, new))
        _plan_tensors(part, op, units, outcome)
        part.apply(made, changes, {units.axis: new})
    state.counter = part.counter
    step.axes.append(
        _axis_growth(
            op,
            info,
            new,
            copies=copies,
            newborn=0,
            exact_gradients=False,  # each copy gets those of its part of the group
            how=f"{copies} copies of every unit, which share out its group",
        )
    )
    state.apply(step, [*made.changes, *(e for r in repeats if (e := r.edit(copies)) is not None)])
    known = {n.name: n for n in part.graph.nodes}
    for node in state.graph.nodes:
        if node.name in known:
            note(node, **note_of(known[node.name]))
    for repeat in repeats:
        before = sizes_of(repeat.node)
        if repeat.sizes and before is not None:
            note(repeat.node, sizes=repeat.scaled(before, copies))
    state.analyse_again()


def _exact_ways(state: State, op: Widen, info: NamedAxis, new: int) -> list[str]:
    """Growths near the one refused that are exact: whole copies around its size, or the other kind of fill."""
    even = new + (new - info.size) % 2
    whole = dict.fromkeys((new // info.size * info.size, -(-new // info.size) * info.size))
    tried = [(f"to: {n}", "copy", n) for n in whole]
    tried.append((f"to: {even}, fill: add", "add", even))
    found = []
    for words, fill, size in tried:
        if size == info.size:
            continue
        other = Widen.model_validate({"axis": op.axis, "fill": fill, "to": size})
        if (size, other.fill) == (new, op.fill):
            continue
        for _, growth, content in candidates(other, info.size, size):
            try:
                proof = GrowthProof(state.axes, info.axis, info.name, growth, content)
                proof.run()
                size_edits(state.axes, info.axis, size, proof.context.refuse_at)
            except GrowthRefused:
                continue
            found.append(words)
            break
    return found


def _plan_tensors(state: State, op: Widen, info: NamedAxis, outcome: Outcome) -> None:
    """Give every parameter and buffer that carries the axis its map."""
    growth = outcome.growth
    program = state.program

    def carrier_fill(site: Site) -> int:
        content = outcome.carriers.get(site, Content.FREE)
        name = site[0]
        if content is Content.ZERO:
            return FILL_ZERO
        if content is Content.MEAN:
            return FILL_MEAN
        if name in outcome.constants:
            return FILL_CONSTANT
        if not is_fine(program.tensor(name).dtype):
            return FILL_ZERO
        return FILL_RANDOM if len(state.tensors[name].shape) > 1 and state.is_parameter(name) else FILL_MEAN

    places = dict.fromkeys((m.tensor, m.dim) for m in info.members)
    draws = op.noise is not None or growth.ids < growth.newborn
    for name in dict.fromkeys([*(name for name, _ in places), *outcome.scales]):
        state.tensors[name].begin([i for n, i in places if n == name], draws or name in outcome.scales)
    for name, i in places:
        plan = state.tensors[name]
        node = next(n for n in state.axes.uses[info.axis.id] if n.op == "get_attr" and str(n.target) == name)
        dim = state.axes.dims[node][i]
        made = dim_plan(dim, name, i, info.axis, outcome, carrier_fill)
        contents = {c for site, c in outcome.carriers.items() if site[:2] == (name, i)}
        table = len(plan.shape) > 1 and not is_fine(program.tensor(name).dtype)
        if contents == {Content.FREE} and table:
            # a mask or numbers per unit: a row of zeros could be an impossible one (nothing to attend to), so new units
            # take an old one's row; by id, so that the two units of a pair take the same
            made.index = np.where(made.index < 0, (-made.index - 1) % plan.shape[i], made.index)
            made.fill = None
        reads = any(s[0] == name and s[1] == i and s not in outcome.carriers for s in outcome.readers)
        if plan.zero and plan.level and (reads or Content.ZERO in contents):
            why = (
                f"{name} belongs to a new block, which is the identity because it is {plan.level:g} everywhere; widen "
                "first, and deepen after it"
            )
            raise GrowthRefused(Refusal(info.name, why, "widen"))
        if op.fan_in == "random" and op.fan_out == "random" and reads and made.fill is not None:
            made.fill = np.where(made.index < 0, float(FILL_RANDOM), made.fill)
        state.compose(name, i, made)
        plan.key = key_of(name)
        stage = plan.last
        if growth.newborn:
            stage.random_seed = op.seed
        if name in outcome.constants:
            stage.constant = outcome.constants[name]
        if reads and growth.ids < growth.newborn and growth.ids > 0:
            stage.paired = True
        if op.noise is not None:
            on = {"readers": reads, "writers": not reads, "both": True}[op.noise.on]
            copies = growth.copies != 1
            if on and copies and (reads or op.noise.kind == "independent" or op.noise.on != "readers"):
                stage.noise = NoisePlan(
                    kind=op.noise.kind if reads else "independent",
                    scale=op.noise.scale,
                    relative=op.noise.relative,
                    distribution=op.noise.distribution,
                    seed=op.noise.seed,
                )
    for name, scale in outcome.scales.items():
        plan = state.tensors[name]
        plan.multiply(scale.factor)
        if scale.folded:
            plan.gradient_scale /= scale.factor


register_pass("widen", plan_widen, WidenPass)
