"""Random growths of a captured model."""

from __future__ import annotations

import random
from typing import Any

from fxgrow import Program


def axes_of(program: Program) -> list[tuple[str, int, bool]]:
    """Names that a spec can use, their sizes and whether they can grow; tensor dims where they are unambiguous."""
    found: list[tuple[str, int, bool]] = []
    for info in program.axes:
        name = info.name
        for member in info.members:
            try:
                if [a.name for a in program.axes.find(str(member))] == [info.name]:
                    name = str(member)  # the same when lines are taken away
                    break
            except Exception:
                continue
        found.append((name, info.size, info.growable))
    return found


def draw(rng: random.Random, program: Program) -> list[dict[str, Any]] | None:
    """A spec of one operation or several; None where the model has nothing to grow."""
    axes = axes_of(program)
    growable = [a for a in axes if a[2]]
    frozen = [a for a, info in zip(axes, program.axes, strict=True) if not a[2] and "the input" not in str(info.reason)]
    stacks = sorted(p for p, kind in program.containers.items() if kind == "ModuleList")
    layers = sorted(p for p, kind in program.containers.items() if kind in ("Linear", "Conv1d", "Conv2d") and p)
    if not growable and not stacks:
        return None
    spec: list[dict[str, Any]] = []
    for _ in range(rng.choices((1, 2, 3), (70, 22, 8))[0]):
        roll = rng.random()
        if stacks and roll < 0.3:
            spec.append(_deepen(rng, rng.choice(stacks)))
        elif layers and roll < 0.05 + 0.3 * bool(stacks):
            spec.append(
                {"op": "insert", "layer": rng.choice(("linear", "linear", "batch_norm")), "after": rng.choice(layers)}
            )
        elif frozen and roll < 0.15 + 0.3 * bool(stacks):
            axis = rng.choice(frozen)
            spec.append(
                {
                    "op": "extend",
                    "axis": axis[0],
                    "by": rng.choice((1, 2, 3)),
                    **_maybe(rng, "init", ("mean", "zero", "random")),
                }
            )
        elif growable:
            spec.append(_widen(rng, *rng.choice(growable)[:2]))
        elif stacks:
            spec.append(_deepen(rng, rng.choice(stacks)))
    return spec


def _maybe(rng: random.Random, key: str, values: tuple[Any, ...]) -> dict[str, Any]:
    return {key: rng.choice(values)} if rng.random() < 0.5 else {}


def _deepen(rng: random.Random, stack: str) -> dict[str, Any]:
    much: dict[str, Any] = rng.choice(({"by": 1}, {"factor": 2}, {"after": [0]}))
    return {
        "op": "deepen",
        "stack": stack,
        **much,
        **_maybe(rng, "order", ("append", "interleave")),
        **_maybe(rng, "init", ("zero", "gate")),
    }


def _widen(rng: random.Random, axis: str, size: int) -> dict[str, Any]:
    much: dict[str, Any] = rng.choice(
        (
            {"factor": 2},
            {"factor": 2},
            {"factor": 3},
            {"by": 1},
            {"by": 2},
            {"by": 3},
            {"to": size + max(1, size // 2)},
            {"by": 5},
            {"to": size + 4},
        )
    )
    spec: dict[str, Any] = {"op": "widen", "axis": axis, **much}
    if rng.random() < 0.3:
        spec["fill"] = "add"
        fan = rng.choice(
            (
                ("auto", "auto"),
                ("random", "zero"),
                ("auto", "paired"),
                ("zero", "random"),
                ("random", "paired"),
                ("zero", "paired"),
            )
        )
        for key, value in zip(("fan_in", "fan_out"), fan, strict=True):
            if value != "auto":
                spec[key] = value
        if spec.get("fan_out") == "paired" and rng.random() < 0.9:
            spec = {k: v for k, v in spec.items() if k not in ("factor", "by", "to")} | {"by": rng.choice((2, 4))}
        if rng.random() < 0.3:
            spec["seed"] = rng.randrange(5)
        return spec
    if rng.random() < 0.3:
        spec["split"] = "uneven"
    if rng.random() < 0.3:
        spec["noise"] = {
            "kind": "antisymmetric",
            "scale": rng.choice((0.01, 0.3)),
            "seed": rng.randrange(5),
            **_maybe(rng, "relative", (True,)),
        }
    return spec
