"""Makes a finding small: fewer outputs, lines, members and operations, as long as it fails in the same way."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from tests.fuzz.text import Model, Step, replace_value
from tests.fuzz.trial import Case, Finding, check

Check = Callable[[Case], Finding | None]


def shrink(finding: Finding, seconds: float = 60.0, check: Check = check) -> Finding:
    """The smallest case found within a time that still gives a finding of the same key."""
    end = time.monotonic() + seconds
    best = finding
    named = re.match(r"output (\d+)", finding.detail)
    if named is not None and len(finding.case.model.outputs) > 1:
        model = finding.case.model
        model = model.copy(outputs=[model.outputs[int(named[1])]]).pruned()
        found = _checked(check, replace(finding.case, model=model))
        best = found if found is not None and found.key == finding.key else finding
    changed = True
    while changed and time.monotonic() < end:
        changed = False
        for candidate in _smaller(best.case):
            if time.monotonic() > end:
                break
            found = _checked(check, candidate)
            if found is not None and found.key == finding.key:
                best = replace(found, number=finding.number)
                changed = True
                break
    return replace(best, number=finding.number, shrunk=True)


def _checked(check: Check, case: Case) -> Finding | None:
    try:
        return check(case)
    except Exception:
        return None


def size(case: Case) -> int:
    """What shrinking makes smaller."""
    text = case.model.definition()
    return len(text) + sum(len(str(op)) for spec in case.growths + case.before for op in spec)


def _smaller(case: Case) -> Iterator[Case]:
    """Smaller cases, those that take most away first; what turns out no smaller is left out."""
    here = size(case)
    for candidate in _candidates(case):
        if size(candidate) < here:
            yield candidate


def _candidates(case: Case) -> Iterator[Case]:
    model = case.model
    for k in range(len(case.before)):
        yield replace(case, before=case.before[:k] + case.before[k + 1 :])
    for half in (slice(None, len(model.outputs) // 2), slice(len(model.outputs) // 2, None)):
        if len(model.outputs) > 3:
            yield replace(case, model=model.copy(outputs=model.outputs[half]).pruned())
    for output in model.outputs if len(model.outputs) > 1 else []:
        yield replace(case, model=model.copy(outputs=[output]).pruned())
    yield from _growths(case)
    if model.calls:
        yield replace(case, model=model.copy(calls={}))
    for n in reversed(range(len(model.steps))):
        yield from (replace(case, model=m) for m in _without(model, n))
    for n, output in enumerate(model.outputs):
        for step in model.steps:  # an earlier value in place of a result
            for name in step.outs:
                if name != output:
                    outputs = [*model.outputs[:n], name, *model.outputs[n + 1 :]]
                    yield replace(case, model=model.copy(outputs=outputs).pruned())
    yield from (replace(case, model=m) for m in _plainer(model))


def _growths(case: Case) -> Iterator[Case]:
    growths = case.growths
    if len(growths) > 1:
        yield replace(case, growths=growths[1:])
        yield replace(case, growths=growths[:-1])
        yield replace(case, growths=[[op for spec in growths for op in spec]])
    for n, spec in enumerate(growths):
        for k in range(len(spec) if len(spec) > 1 else 0):
            yield replace(case, growths=[*growths[:n], spec[:k] + spec[k + 1 :], *growths[n + 1 :]])
        for k, op in enumerate(spec):
            for smaller in _operation(op):
                yield replace(case, growths=[*growths[:n], [*spec[:k], smaller, *spec[k + 1 :]], *growths[n + 1 :]])


def _operation(op: dict[str, Any]) -> Iterator[dict[str, Any]]:
    needed = {"op", "axis", "stack", "layer", "after", "factor", "by", "to"}
    for key in op:
        if key not in needed:
            yield {k: v for k, v in op.items() if k != key}
    if op["op"] == "widen" and ("to" in op or ("factor" in op and op["factor"] != 2)):
        yield {k: v for k, v in op.items() if k not in ("to", "factor")} | {"by": 1}


def _without(model: Model, n: int) -> Iterator[Model]:
    """Without step ``n``: what it made is replaced by an earlier value of the same kind, or its users go as well."""
    step = model.steps[n]
    rest = [*model.steps[:n], *model.steps[n + 1 :]]
    if not step.outs:
        yield model.copy(steps=rest).pruned()
        return
    for earlier in reversed(model.steps[:n]):
        for name, kind in zip(earlier.outs, earlier.types, strict=True):
            if all(kind == other for other in step.types):
                yield _renamed(model, rest, step, name)
    for i in model.inputs:
        if step.types and all(tuple(i.dims) == other[0] and not i.high for other in step.types):
            yield _renamed(model, rest, step, i.name)
    gone = set(step.outs)
    kept: list[Step] = []
    for s in rest:
        if s.uses & gone:
            gone |= set(s.outs)
        else:
            kept.append(s)
    outputs = [o for o in model.outputs if o not in gone]
    if outputs:
        yield model.copy(steps=kept, outputs=outputs).pruned()


def _renamed(model: Model, steps: list[Step], gone: Step, name: str) -> Model:
    def swap(code: str) -> str:
        for old in gone.outs:
            code = replace_value(code, old, name)
        return code

    return model.copy(
        steps=[replace(s, code=swap(s.code)) for s in steps], outputs=[swap(o) for o in model.outputs]
    ).pruned()


def _plainer(model: Model) -> Iterator[Model]:
    """Lines in a plainer form: weights without biases, modules without options."""
    for n, step in enumerate(model.steps):
        for old, new in ((", self.w", ""),):
            if step.code.count(old) > 0 and "F.linear(" in step.code:
                head, _, tail = step.code.rpartition(old)
                code = head + new + tail.lstrip("0123456789")
                if head.count("self.") >= 1:
                    yield model.copy(steps=[*model.steps[:n], replace(step, code=code), *model.steps[n + 1 :]]).pruned()
    if len(model.outputs) > 1:
        for n in range(len(model.outputs)):
            yield model.copy(outputs=model.outputs[:n] + model.outputs[n + 1 :]).pruned()
