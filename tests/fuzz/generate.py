"""Random models: some ops of the table, some features, results projected and returned."""

from __future__ import annotations

import random

import torch

from tests.fuzz import table
from tests.fuzz.calls import OPS
from tests.fuzz.compose import Composer, Rejected, Value
from tests.fuzz.features import FEATURES
from tests.fuzz.text import Input, Model

#: ops of the table in one model; with this many, every op has its turn once in len(OPS) / OPS_EACH models
OPS_EACH = 5

#: features that have been where faults were, and how often they are drawn beside others
OFTEN = {
    "casts.computed_coarse": 4,
    "casts.counts": 2,
    "casts.weights": 3,
    "indexing.equality": 3,
    "indexing.neighbours": 2,
    "modes.literal": 4,
    "sharing.head": 4,
    "sizes.guard": 2,
    "state.average": 2,
    "state.fast_weight": 3,
}


def generate(seed: int, number: int, database: bool = True, focus: str = "") -> Model:
    """Model ``number`` of a seed; the same wherever it is asked for. ``focus``: a feature or an op that it must have.

    Raises:
        Rejected: nothing came of it.
    """
    rng = random.Random(f"{seed}/{number}")
    dtype = rng.choices((torch.float64, torch.float32, torch.bfloat16), (92, 5, 3))[0]
    c = Composer(rng, _inputs(rng), dtype)
    _try(c, FEATURES["layers.linear"])
    if focus:
        jobs = [focus, *rng.choices(sorted(FEATURES), k=rng.choice((0, 1)))]
    else:
        names = sorted(FEATURES)
        jobs = [*_turn(seed, number), *rng.choices(names, [OFTEN.get(n, 1) for n in names], k=rng.choice((2, 3, 4)))]
    rng.shuffle(jobs)
    for job in jobs:
        if job in FEATURES:
            _try(c, FEATURES[job])
        else:
            for _ in range(2):
                if _try(c, lambda c, job=job: table.add(c, job, database)):  # type: ignore[misc]
                    break
    outputs = _finish(c)
    if not outputs:
        raise Rejected("nothing is returned")
    c.model.outputs = outputs
    wide = sum(isinstance(d, str) for d in c.model.inputs[0].dims)
    if rng.random() < (0.0, 0.0, 0.5, 0.8)[wide]:  # which traces in half the time
        c.model.dynamic = "batch"
    return c.model.pruned()


def _turn(seed: int, number: int) -> list[str]:
    """The ops whose turn it is: every op in turn, each round in another order."""
    found = []
    for place in range(number * OPS_EACH, (number + 1) * OPS_EACH):
        turn, at = divmod(place, len(OPS))
        order = list(OPS)
        random.Random(f"{seed}/turn {turn}").shuffle(order)
        found.append(order[at])
    return found


def _inputs(rng: random.Random) -> list[Input]:
    d = rng.choice((2, 3, 4, 5, 6))
    roll = rng.random()
    if roll < 0.45:
        out = [Input("x", ("B", "T", d))]
        if rng.random() < 0.4:
            out.append(Input("ids", ("B", "T"), high=rng.choice((7, 11))))
    elif roll < 0.8:
        out = [Input("x", ("B", d))]
        if rng.random() < 0.2:
            out.append(Input("ids", ("B", "T"), high=7))
    elif roll < 0.87:  # each free dim makes a trace much slower
        out = [Input("x", ("B", "T", "U", d))] if rng.random() < 0.3 else [Input("x", ("B", d, "T", "U"))]
    else:
        out = [Input("ids", ("B", "T"), high=rng.choice((7, 11))), Input("x", ("B", d))]
    if rng.random() < 0.1:
        out.append(Input("z", out[0].dims[:1] + (rng.choice((3, 4)),)))
    return out


def _try(c: Composer, f: object) -> bool:
    before = len(c.model.steps)
    try:
        f(c)  # type: ignore[operator]
        return True
    except (Rejected, ValueError, IndexError, TypeError, KeyError):
        if not any(s.keep for s in c.model.steps[before:]):
            table._drop(c, before)
        return False


def _finish(c: Composer) -> list[str]:
    """What the model returns: projections of what nothing has read yet."""
    inputs = {i.name for i in c.model.inputs}
    unread = [v for v in c.pool if v.name not in c.used and v.name not in inputs]
    outputs: list[str] = []
    for v in unread[-6:]:
        for _ in range(3):
            try:
                outputs.append(_projected(c, v))
                break
            except Rejected:
                continue
    if not outputs:
        v = c.choose(c.reals())
        outputs.append(v.name)
    return outputs


def _projected(c: Composer, v: Value) -> str:
    rng = c.rng
    if v.dtype is torch.bool or not (v.dtype.is_floating_point or v.dtype.is_complex):
        roll = rng.random()
        if roll < 0.3 and v.dims:
            return c.value(f"{v.name}.sum({rng.randrange(len(v.dims))})").name
        if roll < 0.4:
            return v.name
        if roll < 0.5 and v.dims and v.dtype is not torch.bool:
            return c.value(f"{v.name}.amax({rng.randrange(len(v.dims))})").name
        v = c.value(f"{v.name}.to({c.model.dtype})")
    if v.dtype.is_complex:
        v = c.value(rng.choice((f"torch.view_as_real({v.name})", f"{v.name}.abs()", f"{v.name}.real + {v.name}.imag")))
    if v.dtype is not c.model.dtype and rng.random() < 0.8:
        v = c.value(f"{v.name}.to({c.model.dtype})")
    if not v.dims or rng.random() < 0.06:
        return v.name
    places = v.known or list(range(len(v.dims)))
    at = rng.choice(places)
    n = v.dims[at]
    if isinstance(n, int) and v.dtype is c.model.dtype:
        roll = rng.random()
        if roll < 0.3:
            return c.value(
                f"torch.tensordot({v.name}, {c.parameter(n, rng.choice((1, 2, 3)))}, dims=([{at}], [0]))"
            ).name
        if roll < 0.55:
            if at != len(v.dims) - 1:
                v = c.value(f"{v.name}.movedim({at}, -1)")
            return c.value(f"F.linear({v.name}, {c.parameter(rng.choice((2, 3)), n)})").name
        if roll < 0.7:
            shape = [n] + [1] * (len(v.dims) - 1 - at)
            return c.value(f"({v.name} * {c.parameter(*shape)}).sum({at})").name
    known = [p for p in v.known if p != at]
    how = rng.choice(("sum", "mean", "sum", "amax", "mean", "norm"))
    if known and rng.random() < 0.4:
        return c.value(f"{v.name}.{how if how != 'norm' else 'sum'}(({at}, {known[0]}))").name
    return c.value(f"{v.name}.{how}({'dim=' * (how == 'norm')}{at})").name
