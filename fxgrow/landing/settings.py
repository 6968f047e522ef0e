"""Which settings of a config make a module have its grown sizes: found by building its class from other ones.

One setting is changed at a time, and what follows is read off: sizes of tensors and plain attributes of modules. That
map, inverted, gives the settings of the grown module; an instance made of them says what every attribute has to be.
The graph is compared afterwards.
"""

from __future__ import annotations

import copy
import fractions
import itertools
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from fxgrow.landing.blocks import Restacked
from fxgrow.landing.bundles import Key, inner, name_of, whole
from fxgrow.landing.config import Attributes, Builder, Instance, is_plain
from fxgrow.landing.living import Living, attributes_of, configs_of, is_config
from fxgrow.landing.wrapped import Wrapped, as_made, wrapped_in

#: choices of settings
_MOST_TRIED = 48
#: lists as long as a stack, of which some may be so by chance
_MOST_LISTS = 3


@dataclass(frozen=True)
class Goal:
    """What a growth makes of a model, or of a module in it.

    Attributes:
        shapes: of its tensors, by name.
        wanted: attributes that the graph asks for.
        steady: attributes that the graph reads and that stay what they are.
        stacks: those that have other blocks now.
    """

    shapes: Mapping[str, tuple[int, ...]]
    wanted: Attributes
    steady: Attributes
    stacks: list[Restacked]

    def missed(self, made: Instance) -> int:
        """How many attributes an instance has otherwise."""
        return sum(made.attributes.get(k, v) != v for k, v in {**self.steady, **self.wanted}.items())

    def within(self, path: str) -> Goal:
        """Of the module at a path, by the names that things have in it; "" is all."""
        if not path:
            return self
        shapes = {inside: s for n, s in self.shapes.items() if (inside := relative(n, path)) is not None}
        stacks = [replace(s, stack=inside) for s in self.stacks if (inside := relative(s.stack, path)) is not None]
        return Goal(shapes, _within(self.wanted, path), _within(self.steady, path), stacks)

    def as_made(self, wrapped: Wrapped) -> Goal:
        """By the names that things have where nothing was put around layers."""
        for stack in self.stacks if wrapped else ():  # a block's layers are inside what those of its origin are in
            prefix, old = (f"{stack.stack}." if stack.stack else ""), wrapped
            wrapped = {p: at for p, at in old.items() if not p.startswith(prefix)}
            for number, origin in stack.origins.items():
                was, now = f"{prefix}{origin}.", f"{prefix}{number}."
                moved = {p: at for p, at in old.items() if p.startswith(was) and at[0].startswith(was)}
                wrapped |= {now + p[len(was) :]: (now + at[len(was) :], n) for p, (at, n) in moved.items()}
        shapes = {name: s for n, s in self.shapes.items() if (name := as_made(n, wrapped))}

        def named(attributes: Attributes) -> Attributes:
            return {
                (path, n): v for (place, n), v in attributes.items() if (path := as_made(place, wrapped)) is not None
            }

        return replace(self, shapes=shapes, wanted=named(self.wanted), steady=named(self.steady))


def _within(attributes: Attributes, path: str) -> Attributes:
    inside = {(relative(place, path), name): v for (place, name), v in attributes.items()}
    return {(place, name): v for (place, name), v in inside.items() if place is not None}


def relative(name: str, path: str) -> str | None:
    """A dotted name as the module at a path has it; None for what is not in it."""
    if not path:
        return name
    return f".{name}"[len(path) + 2 :] if f"{name}.".startswith(f"{path}.") else None


@dataclass
class Settings:
    """New values of settings, and the instances before and after.

    Attributes:
        missed: so many attributes are not what the graph asks for.
        in_part: they make some of the grown shapes only.
    """

    values: dict[Key, Any]
    before: Instance
    after: Instance
    missed: int = 0
    in_part: bool = False


def solve(builder: Builder, goal: Goal) -> Iterator[Settings]:
    """Settings with which the class has the grown shapes, and the wanted attributes where some setting moves them.

    Args:
        goal: of the builder's module.

    Returns:
        Several where shapes and attributes do not tell them apart, the likeliest first.
    """
    goal = goal.as_made(builder.wrapped)
    goal = replace(goal, shapes={n: s for n, s in goal.shapes.items() if n in builder.base.shapes or goal.stacks})
    lists = {k: v for s in goal.stacks for k, v in _restacked_lists(builder.config, s).items()}
    moving = _moving(builder, goal)
    exact, others = False, list[Settings]()
    for values in _starts(builder, goal, moving, lists):
        settings = _refined(builder, values, goal)
        if settings is not None and not settings.missed:
            exact = True
            yield settings
        elif settings is not None:
            others.append(settings)
    pinned = _pinned(builder, goal.steady) if not exact else None
    if pinned is not None:
        for settings in solve(pinned, replace(goal, steady={})):
            if not settings.in_part:
                exact = True
                yield replace(settings, values={**pinned.fixed, **settings.values})
    yield from sorted(others, key=lambda each: each.missed)
    apart = _by_themselves(builder, goal, moving, lists) if not exact and not others else None
    if apart is not None:
        yield apart


class _Moving(NamedTuple):
    """A setting that moves something, its value, and another that the class can be built with."""

    key: Key
    value: int
    probe: int

    def values(self, builder: Builder, goal: Goal, chosen: Mapping[Key, Any], lists: Mapping[Key, Any]) -> list[int]:
        """Values that may reach the goal, beside other settings that are chosen."""
        other = {**_stretched(builder.config, self.value, self.probe), self.key: self.probe}
        made = builder.build({**chosen, **lists}) or builder.build(chosen)
        moved = builder.build({**chosen, **lists, **other}) or builder.build({**chosen, **other})
        moved = moved or builder.build({**chosen, self.key: self.probe})  # lists as long as that by chance
        return _values_for(self.value, self.probe, made, moved, goal) if made and moved else []


def _moving(builder: Builder, goal: Goal) -> list[_Moving]:
    """Settings that may stand behind what has grown, those first that move the most: what they leave, others make."""
    out: list[tuple[int, _Moving]] = []
    for key, value in builder.settings():
        if not _matters(value, builder.base, goal):
            continue
        for probe in (2 * value, value + 1, 3 * value):
            made = builder.build({key: probe, **_stretched(builder.config, value, probe)}) or builder.build(
                {key: probe}
            )
            if made is not None:
                out.append((_apart(builder.base, made), _Moving(key, value, probe)))
                break
    return [moving for moves, moving in sorted(out, key=lambda each: -each[0]) if moves]


def _apart(one: Instance, other: Instance) -> int:
    """In how many tensors and attributes two instances differ."""
    shapes = sum(other.shapes.get(n) != s for n, s in one.shapes.items()) + len(other.shapes.keys() - one.shapes.keys())
    return shapes + sum(other.attributes.get(k, v) != v for k, v in one.attributes.items())


def _starts(
    builder: Builder, goal: Goal, moving: list[_Moving], lists: Mapping[Key, Any]
) -> Iterator[Mapping[Key, Any]]:
    """Choices that make the grown shapes, those first that make all the wanted attributes too; else the nearest one."""
    near = yield from _search(builder, goal, moving, lists, [])
    if near is not None:
        more = _unset(builder, goal, near)
        near = (yield from _search(builder, goal, moving, lists, more)) if more else near
    if near is not None:
        yield near


def _pinned(builder: Builder, steady: Attributes) -> Builder | None:
    """The same with open settings at what the modules hold by their names, where these stay: ``head_dim`` as it is."""
    held: dict[str, set[Any]] = {}
    for (_, name), value in steady.items():
        held.setdefault(name, set()).add(value)
    values: dict[Key, Any] = {(n,): held[n].pop() for n in builder.open_settings() if len(held.get(n, ())) == 1}
    made = builder.build(values) if values else None
    if made is None or made.shapes != builder.base.shapes:
        return None
    out = copy.copy(builder)
    out.fixed, out.known = values, {}
    out.base, out.config = made, copy.deepcopy(builder.config)
    attributes_of(out.config).update({name_of(k): v for k, v in values.items()})
    return out


def _refined(builder: Builder, start: Mapping[Key, Any], goal: Goal) -> Settings | None:
    """Settings that no shape which has grown follows, such as the heads of a joint projection: by what does not stay.

    Returns:
        None where the class does not get the grown shapes.
    """

    wanted = {**goal.steady, **goal.wanted}

    def lacking(made: Instance) -> list[tuple[Any, Any]]:
        pairs = [(made.attributes.get(k), v) for k, v in wanted.items() if made.attributes.get(k, v) != v]
        for name, shape in goal.shapes.items():
            if len(made.shapes.get(name, ())) == len(shape):
                pairs += zip(made.shapes.get(name, ()), shape, strict=True)
        return [(a, b) for a, b in dict.fromkeys(pairs) if type(a) is type(b) is int and a != b and a and b]

    def score(made: Instance) -> tuple[int, int]:
        return _wrong(builder, made, goal), goal.missed(made)

    values, made = dict(start), builder.build(start)
    if made is None:
        return None
    best = score(made)
    free = {k: v for k, v in builder.settings() if k not in values}
    moving: set[Key] = set()
    pairs = (p for p in itertools.combinations(free, 2) if moving >= {*p})  # heads and those of keys at once
    for keys in itertools.chain(itertools.combinations(free, 1), pairs):
        if best == (0, 0) or values.keys() & {*keys}:
            continue
        ratios = dict.fromkeys(fractions.Fraction(x, y) for a, b in lacking(made) for x, y in ((a, b), (b, a)))
        for probe in ({k: free[k] * ratio for k in keys} for ratio in ratios):
            if any(v.denominator != 1 for v in probe.values()):
                continue
            chosen = {**values, **{k: int(v) for k, v in probe.items()}}
            other = builder.build(chosen)
            if other != made:
                moving |= {*keys}
            if other is not None and score(other) < best:
                values, made, best = chosen, other, score(other)
                break
    return Settings(values, builder.base, made, best[1]) if not best[0] else None


def _wrong(builder: Builder, made: Instance, goal: Goal) -> int:
    """How many shapes are not the grown ones, and how many tensors there are that nobody knows."""
    unknown = set(made.shapes) - set(goal.shapes) - set(builder.base.shapes)
    return sum(made.shapes.get(n) != s for n, s in goal.shapes.items()) + len(unknown)


def _matters(value: int, base: Instance, goal: Goal) -> bool:
    """Whether a setting may stand behind anything that has grown: whether it divides, or is, a number that changes."""
    old = {
        o
        for n, s in base.shapes.items()
        if len(goal.shapes.get(n, s)) == len(s)
        for o, g in zip(s, goal.shapes.get(n, s), strict=True)
        if o != g
    }
    old |= {v for k in goal.wanted if type(v := base.attributes.get(k)) is int}
    old |= {len(s.origins) - len(s.copied) for s in goal.stacks}
    return any(o % value == 0 or value % o == 0 for o in old if o)


def _search(
    builder: Builder,
    goal: Goal,
    moving: list[_Moving],
    lists: Mapping[Key, Any],
    more: list[dict[Key, Any]],
) -> Generator[dict[Key, Any], None, dict[Key, Any] | None]:
    """The choices that make the grown shapes.

    Args:
        more: what else may be chosen.

    Returns:
        The choice that comes nearest to being one, where none is.
    """
    tried: list[tuple[int, int, dict[Key, Any]]] = []  # by wrong shapes, and by attributes that are missed
    orders = [moving, sorted(moving, key=lambda each: not _wants(builder, each, goal))]

    def leaves(order: list[_Moving]) -> Iterator[dict[Key, Any]]:
        each = itertools.chain.from_iterable(_choices(builder, goal, order, lists, start) for start in more or [{}])
        return itertools.islice(each, _MOST_TRIED)

    for values in itertools.chain.from_iterable(map(leaves, orders if orders[0] != orders[1] else orders[:1])):
        if any(values == known for _, _, known in tried):
            continue
        made = builder.build(values)
        if made is None:
            continue
        tried.append((_wrong(builder, made, goal), goal.missed(made), values))
        if tried[-1][:2] == (0, 0):
            yield values
    tried.sort(key=lambda each: each[:2])
    yield from (values for wrong, missed, values in tried if not wrong and missed)
    return tried[0][2] if tried and tried[0][0] else None


def _wants(builder: Builder, moving: _Moving, goal: Goal) -> bool:
    """Whether an attribute that the graph asks for follows a setting: then that says its value, and others make up."""
    made = builder.build({moving.key: moving.probe})
    known = builder.base.attributes
    return made is not None and any(made.attributes.get(k) != known.get(k) for k in goal.wanted)


def _choices(
    builder: Builder, goal: Goal, moving: list[_Moving], lists: Mapping[Key, Any], chosen: dict[Key, Any]
) -> Iterator[dict[Key, Any]]:
    """One value, or none, of every setting: what the next may be hangs on those before it."""
    if not moving:
        yield _with_lists(builder, chosen, lists)
        return
    for value in moving[0].values(builder, goal, chosen, lists):
        yield from _choices(builder, goal, moving[1:], lists, {**chosen, moving[0].key: value})
    yield from _choices(builder, goal, moving[1:], lists, chosen)


def _with_lists(builder: Builder, chosen: Mapping[Key, Any], lists: Mapping[Key, Any]) -> dict[Key, Any]:
    """A choice with the most lists, of those with an entry for every block, that the class can be built with."""
    for size in range(len(lists), 0, -1) if len(lists) <= _MOST_LISTS else ():
        for names in itertools.combinations(lists, size):
            values = {**chosen, **{n: lists[n] for n in names}}
            if builder.build(values) is not None:
                return values
    return {**chosen} if len(lists) <= _MOST_LISTS else {**chosen, **lists}


def _unset(builder: Builder, goal: Goal, nearest: Mapping[Key, Any]) -> list[dict[Key, Any]]:
    """Settings that are None, and so follow from others, with the sizes that still lack when the others are chosen."""
    made = builder.build(nearest)
    if made is None:
        return []
    lacking = {
        new
        for n, s in goal.shapes.items()
        if n in made.shapes and len(made.shapes[n]) == len(s)
        for there, new in zip(made.shapes[n], s, strict=True)
        if there != new
    }
    out: list[dict[Key, Any]] = []
    for name in builder.open_settings():
        for size in sorted(lacking)[:4]:
            tried = builder.build({**nearest, (name,): size})
            if tried is not None and tried.shapes != made.shapes:
                out.append({(name,): size})
            elif tried is not None:
                break  # it moves nothing
    return out


def _by_themselves(builder: Builder, goal: Goal, moving: list[_Moving], lists: Mapping[Key, Any]) -> Settings | None:
    """Settings that move nothing but what has grown, each by itself, where no choice of all makes the grown shapes."""
    base, values = builder.base, {}
    for each in moving:
        for value in each.values(builder, goal, {}, {}):
            made = builder.build({each.key: value, **lists})
            if made is None:
                continue
            moved = {n for n, s in made.shapes.items() if base.shapes.get(n) != s}
            known = {**base.shapes, **goal.shapes}
            fits = made.shapes.keys() <= known.keys() and all(
                _between(base.shapes[n], made.shapes[n], known[n]) for n in moved & set(base.shapes)
            )
            if moved and fits:
                values[each.key] = value
                break
    if not values:
        return None
    made = builder.build({**values, **lists})
    return Settings({**values, **lists}, base, made, in_part=True) if made is not None else None


def _between(old: tuple[int, ...], there: tuple[int, ...], new: tuple[int, ...]) -> bool:
    """Whether every size is the old or the new one."""
    return len(old) == len(there) == len(new) and all(s in (a, b) for a, s, b in zip(old, there, new, strict=True))


def _values_for(value: int, probe: int, base: Instance, moved: Instance, goal: Goal) -> list[int]:
    """Values of a setting that may reach the goal: by every size and attribute that follows it."""
    found: dict[int, None] = {}

    def reach(old: Any, there: Any, target: Any) -> None:
        if type(old) not in (int, float) or type(there) not in (int, float) or old == there or target == old:
            return
        exact = value + (target - old) * (probe - value) / (there - old)
        if abs(exact - round(exact)) < 1e-9 and round(exact) > 0:
            found.setdefault(round(exact))

    for name, shape in base.shapes.items():
        other, target = moved.shapes.get(name), goal.shapes.get(name)
        if other is not None and target is not None and len(other) == len(shape) == len(target):
            for old, there, new in zip(shape, other, target, strict=True):
                reach(old, there, new)
    for place, new in goal.wanted.items():
        was, now = base.attributes.get(place), moved.attributes.get(place)
        if type(was) in (int, float) and type(now) in (int, float) and was != now and type(new) is type(was):
            reach(was, now, new)
            if was and now and value * new % was == 0:
                found.setdefault(int(value * new // was))
    if set(moved.shapes) != set(base.shapes):
        for stack in goal.stacks:
            if len(stack.origins) - len(stack.copied) == value:
                found.setdefault(len(stack.origins))
    return [v for v in found if v != value][:4]


def _stretched(config: Any, old: int, new: int) -> dict[Key, Any]:
    """Lists with an entry for every block, for more blocks: the last entry repeated."""
    return {k: type(v)([*v, *[v[-1]] * (new - old)]) for k, v in _lists(config) if len(v) == old}


def _restacked_lists(config: Any, stack: Restacked) -> dict[Key, Any]:
    old = len(stack.origins) - len(stack.copied)
    first = min(stack.origins)
    entries = [stack.origins[n] - first for n in sorted(stack.origins)]
    if not all(0 <= e < old for e in entries):
        return {}
    return {k: type(v)(v[e] for e in entries) for k, v in _lists(config) if len(v) == old}


def _lists(config: Any, prefix: Key = ()) -> Iterator[tuple[Key, Any]]:
    for name, value in list(attributes_of(config).items()):
        if isinstance(name, str) and type(value) in (list, tuple) and len(value) > 0:
            yield (*prefix, name), value
        elif isinstance(name, str) and not prefix and is_config(value):
            yield from _lists(value, (name,))


def adopt(living: Living, builder: Builder, settings: Settings, origin: Mapping[str, str]) -> None:
    """Set the config, and the attributes of modules that follow it, where the model has them as its class made them.

    Args:
        origin: of module paths that are new, the paths that they had or were copied from.
    """
    old = {k: attributes_of(inner(builder.config, k)).get(name_of(k), _ABSENT) for k in settings.values}
    ordered = sorted(settings.values.items(), key=lambda each: isinstance(each[0][-1], int))
    seen: set[int] = set()
    for module in list(builder.module.modules()):
        for config in [builder.config, *configs_of(module)]:
            if id(config) in seen:
                continue
            seen.add(id(config))
            had = {k: attributes_of(config).get(name_of(k), _ABSENT) for k, _ in ordered}
            for key, value in ordered:
                mine, name = inner(builder.config, key), name_of(key)
                alike = type(config) is type(mine) and had[key] == old[key]
                if config is mine or alike:
                    living.attribute(config, name, whole(attributes_of(config).get(name), key, value))
    within = {relative(n, builder.path): relative(o, builder.path) for n, o in origin.items()}
    made_anew = builder.instance(settings.values) if builder.wrapped else None
    wrapped = wrapped_in(builder.module, made_anew) if made_anew is not None else {}
    for place, module in builder.module.named_modules(remove_duplicate=False):
        path, before = as_made(place, wrapped), as_made(within.get(place) or place, builder.wrapped)
        if path is None:
            continue
        for name, value in list(vars(module).items()):
            made = settings.after.attributes.get((path, name), value)
            was = settings.before.attributes.get((before or path, name), made)
            if is_plain(value) and made != value and value in (was, settings.before.attributes.get((path, name), was)):
                living.attribute(module, name, made)


#: a setting that a config does not have
_ABSENT = object()

__all__ = ["Goal", "Settings", "adopt", "relative", "solve"]
