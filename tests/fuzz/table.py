"""An op of the rule table, called in a model: a valid call's operands replaced by values that the model has."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fxgrow.testing.judge import Sample
from tests.fuzz import calls, supply
from tests.fuzz.compose import Composer, Dim, Rejected, Value

#: sizes that a sample's may be replaced by
_NEW = (2, 3, 4, 5, 6, 8)
#: ops that read out of bounds where sizes do not fit: their sizes stay those of the sample
_UNCHECKED = {"aten._weight_norm.default"}


def add(c: Composer, name: str, database: bool = True) -> list[Value]:
    """Call the op once in the model, in a way that runs.

    Raises:
        Rejected: none was found.
    """
    tried = 0
    for sample in calls.samples(name, c.rng, database)[:4]:
        for plan in _plans(c, sample) if name not in _UNCHECKED else [_Plan({}, [], False, True, None)]:
            tried += 1
            if tried > 10:
                break
            before = len(c.model.steps)
            try:
                return _call(c, name, sample, plan)
            except (Rejected, ValueError, IndexError):
                _drop(c, before)
    raise Rejected(f"no call of {name} fits")


def _drop(c: Composer, before: int) -> None:
    """Steps that were made for a call that does not run go unless they write."""
    if any(s.keep for s in c.model.steps[before:]):
        return
    gone = {o for s in c.model.steps[before:] for o in s.outs}
    del c.model.steps[before:]
    c.pool = [v for v in c.pool if v.name not in gone]


class _Plan:
    """How a sample's sizes become the model's: by number, with dims before all others, literals followed or shifted."""

    def __init__(self, sizes: dict[int, Dim], prefix: list[Dim], alone: bool, follow: bool, lead: Value | None) -> None:
        self.sizes, self.prefix, self.alone, self.follow, self.lead = sizes, prefix, alone, follow, lead

    def dims(self, shape: torch.Size, first: bool) -> list[Dim]:
        own: list[Dim] = [self.sizes.get(n, n) for n in shape]
        return [*self.prefix, *own] if first or not self.alone else own


def _plans(c: Composer, sample: Sample) -> Iterator[_Plan]:
    """Plans in the order in which to try them; the last changes nothing."""
    tensors = [x for x in pytree.tree_leaves((sample.args, sample.kwargs)) if isinstance(x, Tensor)]
    lead = next((x for x in tensors if x.is_floating_point() or x.is_complex()), None)
    sizes = sorted({n for x in tensors for n in x.shape if n > 1})
    for _ in range(5):
        roll, follow = c.rng.random(), c.rng.random() < 0.7
        if lead is not None and roll < 0.45:
            plan = _onto(c, lead, follow)
            if plan is not None:
                yield plan
        elif sizes and roll < 0.65:
            free: Dim = "B"
            size = c.rng.choice(sizes if c.rng.random() < 0.3 or lead is None or not lead.dim() else [lead.shape[0]])
            yield _Plan({**_resized(c.rng, sizes), size: free}, [], False, follow, None)
        elif sizes and roll < 0.8:
            yield _Plan(_resized(c.rng, sizes), [], False, follow, None)
        else:
            yield _Plan(_resized(c.rng, sizes), ["B"], c.rng.random() < 0.4, follow, None)
    yield _Plan({}, ["B"], False, True, None)
    yield _Plan({}, [], False, True, None)


def _resized(rng: random.Random, sizes: list[int]) -> dict[int, Dim]:
    return {n: rng.choice(_NEW) for n in sizes if rng.random() < 0.5}


def _onto(c: Composer, lead: Tensor, follow: bool) -> _Plan | None:
    """A sample laid onto a value of the model: its dims are the value's last ones."""
    fits = [v for v in c.pool if v.real and len(v.dims) >= lead.dim() and "?" not in v.dims and v.dims]
    if not fits:
        return None
    v = c.choose(fits)
    cut = len(v.dims) - lead.dim()
    sizes: dict[int, Dim] = {}
    for n, d in zip(lead.shape, v.dims[cut:], strict=True):
        if n == 1 or sizes.setdefault(n, d) != d:
            return None
    return _Plan(sizes, list(v.dims[:cut]), c.rng.random() < 0.4, follow, v)


def _call(c: Composer, name: str, sample: Sample, plan: _Plan) -> list[Value]:
    target = calls.operator(name)
    schema = target._schema
    writes = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    leaves, spec = pytree.tree_flatten((sample.args, sample.kwargs))
    seen = False
    shift = len(plan.prefix) if not plan.alone or c.rng.random() < 0.8 else 0
    made: list[Any] = []
    for x in leaves:
        if not isinstance(x, Tensor):
            made.append(x)
            continue
        lead = not seen and (x.is_floating_point() or x.is_complex())
        seen = seen or lead
        dims = plan.dims(x.shape, lead)
        if lead and plan.lead is not None and x.is_floating_point():
            made.append(_Code(supply.within(c, plan.lead.name, x)))
        else:
            made.append(_Code(supply.tensor(c, dims, x, grown=lead or c.rng.random() < 0.7)))
    args, kwargs = pytree.tree_unflatten(made, spec)
    texts = [_text(c, a, plan, shift) for a in args] + [f"{k}={_text(c, a, plan, shift)}" for k, a in kwargs.items()]
    if writes and texts:
        texts[0] = _target(c, texts[0])
    overload = f"torch.ops.{name}"
    count = len(schema.returns)
    call = f"{overload}({', '.join(texts)})"
    if name in calls.RANDOM:
        call = f"torch.zeros_like({call})"
    keep = bool(writes)
    first = c.tensors_of(call)
    if count == 1 and isinstance(first, Tensor):
        return [c.value(call, keep=keep)]
    if isinstance(first, list | tuple):
        names = [c.fresh() for _ in first]
        good = [n for n, t in zip(names, first, strict=True) if isinstance(t, Tensor) and t.numel()]
        return c.step(
            f"{', '.join(n if n in good else '_' for n in names)}{',' * (len(names) == 1)} = {call}", *good, keep=keep
        )
    raise Rejected("returns no tensor")


class _Code(str):
    """Code among plain arguments."""


def _text(c: Composer, value: Any, plan: _Plan, shift: int) -> str:
    """Code of one argument; numbers follow the sizes that the plan replaces."""
    if isinstance(value, _Code):
        return str(value)
    if isinstance(value, list | tuple) and any(isinstance(v, _Code) for v in value):
        inner = ", ".join(_text(c, v, plan, 0) for v in value)
        return f"[{inner}]"
    if isinstance(value, list | tuple) and value and all(type(v) is int for v in value):
        sizes = [plan.sizes.get(v, v) for v in value]
        if plan.follow and any(a != b for a, b in zip(sizes, value, strict=True)):
            before = plan.prefix if c.rng.random() < 0.6 else []
            return "[" + c.shape([*before, *sizes]) + "]"
        if shift and min(value) >= 0 and max(value) <= 3 and c.rng.random() < 0.6:
            return str([v + shift for v in value])
        if plan.prefix and c.rng.random() < 0.3:
            return "[" + c.shape([*plan.prefix, *value]) + "]"
    if type(value) is int and 0 <= value <= 3 and shift and c.rng.random() < 0.6:
        return str(value + shift)
    if type(value) is int and plan.follow and value > 2 and value in plan.sizes:
        return c.shape([plan.sizes[value]])
    return calls.literal(value)


def _target(c: Composer, name: str) -> str:
    """What an in-place op writes into: a copy, part of one, or the value itself."""
    roll = c.rng.random()
    if name.startswith("self.") or roll < 0.5:
        return c.value(f"{name}.clone()").name
    if roll < 0.6:
        return c.value(f"(1.0 * {name})[:]").name
    return name
