"""A model that its class builds from a config: which settings make it have the grown sizes, found by building it.

On the meta device the class is instantiated with one setting changed at a time, and what follows is read off: sizes of
tensors and plain attributes of modules. That map, inverted, gives the settings of the grown model; an instance made
of them says what every attribute has to be. Nothing is known of any class beforehand; the graph is compared afterwards.
"""

from __future__ import annotations

import contextlib
import copy
import fractions
import inspect
import io
import itertools
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from fxgrow.ir.modules import named_tensors
from fxgrow.landing.beside import Unwritten, apart, tensors_beside
from fxgrow.landing.blocks import Restacked
from fxgrow.landing.living import Living, attributes_of, configs_of, is_config, is_sealed

Attributes = dict[tuple[str, str], Any]  # module path and name
Key = tuple[str, ...]  # names of nested bundles, and of the setting

#: instances that are built for one growth: most need under 40, a dozen settings in pairs some 200
_MOST_BUILT = 400
_MOST_TRIED = 48
#: parameters of a model up to which it is made with memory, to compare tensors that are not saved
_MOST_MADE = 2**28


@dataclass
class Instance:
    """What a class makes of a config: shapes of tensors by name, and plain attributes of modules."""

    shapes: dict[str, tuple[int, ...]]
    attributes: Attributes


@dataclass
class Settings:
    """New values of settings, and the instances before and after; ``in_part``: they make some of the grown shapes."""

    values: dict[Key, Any]
    before: Instance
    after: Instance
    in_part: bool = False


@dataclass
class Builder:
    """Builds a class from variants of a model's config.

    Attributes:
        config: the model's own.
        base: what the class makes of it.
        added, changed: names of tensors, and attributes, by which the model was another than that.
        asked: settings that its modules' classes may ask for, with a default.
        apart: places of what the model held otherwise, beside weights and plain attributes.
        fixed: settings that are not tried.
        left: how many more instances are built.
    """

    kind: type[nn.Module]
    config: Any
    base: Instance = field(init=False)
    added: set[str] = field(default_factory=set)
    asked: set[str] = field(default_factory=set)
    changed: set[tuple[str, str]] = field(default_factory=set)
    apart: set[str] = field(default_factory=set)
    fixed: set[Key] = field(default_factory=set)
    left: int = _MOST_BUILT

    @property
    def sealed(self) -> bool:
        """Whether no setting can be set."""
        return is_sealed(self.config)

    def build(self, values: Mapping[Key, Any]) -> Instance | None:
        """The class with other settings; None where it cannot be built so."""
        if not self.left:
            return None
        self.left -= 1
        made = self.instance(values)
        return None if made is None else instance_of(made)

    def instance(self, values: Mapping[Key, Any], device: str = "meta") -> nn.Module | None:
        """The class with other settings on a device, parameters without values; None where it cannot be built so."""
        config = self.config if self.sealed else copy.deepcopy(self.config)
        quiet = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
        empty = contextlib.nullcontext() if device == "meta" else Unwritten()
        try:
            with warnings.catch_warnings(), quiet[0], quiet[1], torch.random.fork_rng(devices=[]), torch.device(device):
                warnings.simplefilter("ignore")
                for key, value in values.items():
                    attributes_of(_inner(config, key))[key[-1]] = value  # a class with slots has no further ones
                with empty:
                    return self.kind(config)
        except Exception:
            return None

    def beside(self, model: nn.Module) -> dict[str, str]:
        """What the class made anew has otherwise than a model beside weights and plain attributes, by place."""
        small = sum(p.numel() for p in model.parameters()) <= _MOST_MADE
        made = self.instance({}, "cpu" if small and tensors_beside(model) else "meta")
        return {} if made is None else apart(model, made, self.config)

    def settings(self) -> Iterator[tuple[Key, Any]]:
        """Numbers of the config that may be another, and what they are."""
        return ((key, value) for key, value in _settings(self.config) if key not in self.fixed)

    def open_settings(self) -> list[str]:
        """Settings that follow from others: they are None, or are not there and the class asks for them."""
        known = attributes_of(self.config)
        return [*(n for n, v in known.items() if v is None and isinstance(n, str)), *sorted(self.asked - {*known})]

    def differs(self, living: nn.Module) -> str:
        """What is another in the class made anew from the config as it is now, in words; "" for nothing."""
        model = instance_of(living)
        instance = self.instance({})
        if instance is None:
            return "it cannot be built"
        made = instance_of(instance)
        for name, shape in made.shapes.items():
            if model.shapes.get(name, shape) != shape:
                return f"{name} has the shape {shape}, not {model.shapes[name]}"
        alone = set(made.shapes) ^ (set(model.shapes) - self.added)
        if alone:
            return f"{min(alone)} is there in one of them only"
        for (path, name), value in made.attributes.items():
            known = model.attributes.get((path, name), value)
            if known != value and (path, name) not in self.changed:
                return f"{f'{path}.' if path else ''}{name} is {value}, not {known}"
        return next((said for place, said in self.beside(living).items() if place not in self.apart), "")


def instance_of(model: nn.Module) -> Instance:
    shapes = {n: tuple(t.shape) for n, t in named_tensors(model).items()}
    attributes = {
        (path, name): value
        for path, module in model.named_modules(remove_duplicate=False)
        for name, value in vars(module).items()
        if _plain(value) and name != "training"
    }
    return Instance(shapes, attributes)


def _plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return len(value) <= 16 and all(_plain(v) for v in value)
    return value is None or isinstance(value, bool | int | float | str)


def builder_of(model: nn.Module) -> Builder | None:
    """A builder for a model that its class makes from one config, and makes as the model is; None for any other."""
    try:
        inspect.signature(type(model)).bind(object())
    except (TypeError, ValueError):
        return None
    own = instance_of(model)
    for config in [v for v in vars(model).values() if is_config(v) or is_sealed(v)]:
        builder = Builder(type(model), config)
        made = builder.build({})
        if made is not None and {n: s for n, s in own.shapes.items() if n in made.shapes} == made.shapes:
            builder.base, builder.added = made, set(own.shapes) - set(made.shapes)
            builder.asked = {n for kind in {type(m) for m in model.modules()} for n in _asked_by(kind)}
            builder.changed = {k for k, v in own.attributes.items() if made.attributes.get(k, v) != v}
            builder.apart = set(builder.beside(model))
            return builder
    return None


def _asked_by(kind: type[nn.Module]) -> set[str]:
    """Names that a class may ask a config for, with a default: ``getattr(config, "head_dim", None)``."""
    makers = [getattr(vars(cls).get("__init__"), "__code__", None) for cls in kind.__mro__ if cls is not nn.Module]
    found = {s for code in makers if code is not None and "getattr" in code.co_names for s in code.co_consts}
    return {s for s in found if isinstance(s, str) and s.isidentifier() and not s.startswith("_")}


def _inner(config: Any, key: Key) -> Any:
    for name in key[:-1]:
        config = attributes_of(config)[name]
    return config


def _settings(config: Any, prefix: Key = ()) -> Iterator[tuple[Key, Any]]:
    for name, value in list(attributes_of(config).items()):
        if not isinstance(name, str) or name.startswith("_"):
            continue
        if type(value) is int and value > 0:
            yield (*prefix, name), value
        elif not prefix and is_config(value):
            yield from _settings(value, (name,))


# solving ------------------------------------------------------------------------------------------------------------


def solve(
    builder: Builder,
    shapes: Mapping[str, tuple[int, ...]],
    wanted: Attributes,
    steady: Attributes,
    stacks: list[Restacked],
) -> Settings | None:
    """Settings with which the class has the grown shapes, and the wanted attributes where some setting moves them.

    Args:
        shapes: of the grown model's tensors, by name.
        wanted: attributes that the graph asks for.
        steady: attributes that the graph reads and that stay what they are.
        stacks: those that have other blocks now.
    """
    base = builder.base
    goal = {n: s for n, s in shapes.items() if n in base.shapes or stacks}
    lists = {k: v for s in stacks for k, v in _restacked_lists(builder.config, s).items()}
    choices: dict[Key, list[Any]] = {}
    for key, value in builder.settings():
        if not _matters(value, base, goal, wanted, stacks):
            continue
        for probe in (2 * value, value + 1, 3 * value):
            moved = builder.build({key: probe, **_stretched(builder.config, value, probe)})
            if moved is not None:
                found = _values_for(key, value, probe, base, moved, goal, wanted, stacks)
                if found:
                    choices[key] = found
                break
    whole, nearest = _search(builder, goal, wanted, choices, lists)
    if whole is None:
        more = _unset(builder, goal, nearest)
        if more:
            whole, _ = _search(builder, goal, wanted, {**choices, **more}, lists)
    refined = _refined(builder, whole.values if whole is not None else nearest, goal, {**steady, **wanted})
    if refined is not None:
        return refined
    pinned = _pinned(builder, steady)
    if pinned is not None:
        other, fixed = pinned
        settings = solve(other, shapes, wanted, {}, stacks)
        if settings is not None and not settings.in_part:
            return replace(settings, values={**fixed, **settings.values})
    return _by_themselves(builder, goal, choices, lists)


def _pinned(builder: Builder, steady: Attributes) -> tuple[Builder, dict[Key, Any]] | None:
    """The same with open settings at what the modules hold by their names, where these stay: ``head_dim`` as it is."""
    held: dict[str, set[Any]] = {}
    for (_, name), value in steady.items():
        held.setdefault(name, set()).add(value)
    values: dict[Key, Any] = {(n,): held[n].pop() for n in builder.open_settings() if len(held.get(n, ())) == 1}
    made = builder.build(values) if values else None
    if made is None or made.shapes != builder.base.shapes:
        return None
    out = copy.copy(builder)
    out.fixed = {*values}
    out.base, out.config = made, copy.deepcopy(builder.config)
    attributes_of(out.config).update({n: v for (n,), v in values.items()})
    return out, values


def _refined(
    builder: Builder, start: Mapping[Key, Any], goal: Mapping[str, tuple[int, ...]], wanted: Attributes
) -> Settings | None:
    """Settings that no shape which has grown follows, such as the heads of a joint projection: by what does not stay.

    Returns:
        None where the class does not get the grown shapes.
    """

    def lacking(made: Instance) -> list[tuple[Any, Any]]:
        pairs = [(made.attributes.get(k), v) for k, v in wanted.items() if made.attributes.get(k, v) != v]
        for name, shape in goal.items():
            if len(made.shapes.get(name, ())) == len(shape):
                pairs += zip(made.shapes.get(name, ()), shape, strict=True)
        return [(a, b) for a, b in dict.fromkeys(pairs) if type(a) is type(b) is int and a != b and a and b]

    def score(made: Instance) -> tuple[int, int]:
        return _wrong(builder, made, goal), sum(made.attributes.get(k, v) != v for k, v in wanted.items())

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
    return Settings(values, builder.base, made) if not best[0] else None


def _wrong(builder: Builder, made: Instance, goal: Mapping[str, tuple[int, ...]]) -> int:
    """How many shapes are not the grown ones, and how many tensors there are that nobody knows."""
    unknown = set(made.shapes) - set(goal) - set(builder.base.shapes)
    return sum(made.shapes.get(n) != s for n, s in goal.items()) + len(unknown)


def _matters(
    value: int, base: Instance, goal: Mapping[str, tuple[int, ...]], wanted: Attributes, stacks: list[Restacked]
) -> bool:
    """Whether a setting may stand behind anything that has grown: whether it divides, or is, a number that changes."""
    old = {
        o
        for n, s in base.shapes.items()
        if len(goal.get(n, s)) == len(s)
        for o, g in zip(s, goal.get(n, s), strict=True)
        if o != g
    }
    old |= {v for k in wanted if type(v := base.attributes.get(k)) is int}
    old |= {len(s.origins) - len(s.copied) for s in stacks}
    return any(o % value == 0 or value % o == 0 for o in old if o)


def _search(
    builder: Builder,
    goal: Mapping[str, tuple[int, ...]],
    wanted: Attributes,
    choices: Mapping[Key, list[Any]],
    lists: dict[Key, Any],
) -> tuple[Settings | None, dict[Key, Any]]:
    """The choice that makes the grown shapes and the most of the wanted attributes; and the one that comes nearest."""
    best: tuple[int, Settings] | None = None
    nearest: tuple[int, dict[Key, Any]] | None = None
    for picked in itertools.islice(itertools.product(*([*found, None] for found in choices.values())), _MOST_TRIED):
        values = {**{k: v for k, v in zip(choices, picked, strict=True) if v is not None}, **lists}
        made = builder.build(values)
        if made is None:
            continue
        wrong = _wrong(builder, made, goal)
        if nearest is None or wrong < nearest[0]:
            nearest = wrong, values
        if wrong:
            continue
        missed = sum(made.attributes.get(k, v) != v for k, v in wanted.items())
        if best is None or missed < best[0]:
            best = missed, Settings(values, builder.base, made)
        if not missed:
            break
    return best[1] if best else None, nearest[1] if nearest else {}


def _unset(builder: Builder, goal: Mapping[str, tuple[int, ...]], nearest: Mapping[Key, Any]) -> dict[Key, list[Any]]:
    """Settings that are None, and so follow from others, with the sizes that still lack when the others are chosen."""
    made = builder.build(nearest)
    if made is None:
        return {}
    lacking = {
        new
        for n, s in goal.items()
        if n in made.shapes and len(made.shapes[n]) == len(s)
        for there, new in zip(made.shapes[n], s, strict=True)
        if there != new
    }
    out: dict[Key, list[Any]] = {}
    for name in builder.open_settings():
        for size in sorted(lacking)[:4]:
            tried = builder.build({**nearest, (name,): size})
            if tried is not None and tried.shapes != made.shapes:
                out.setdefault((name,), []).append(size)
            elif tried is not None:
                break  # it moves nothing
    return out


def _by_themselves(
    builder: Builder,
    goal: Mapping[str, tuple[int, ...]],
    choices: Mapping[Key, list[Any]],
    lists: dict[Key, Any],
) -> Settings | None:
    """Settings that move nothing but what has grown, each by itself, where no choice of all makes the grown shapes."""
    base, values = builder.base, {}
    for key, found in choices.items():
        for value in found:
            made = builder.build({key: value, **lists})
            if made is None:
                continue
            moved = {n for n, s in made.shapes.items() if base.shapes.get(n) != s}
            fits = set(made.shapes) <= set(goal) | set(base.shapes) and all(
                _between(base.shapes[n], made.shapes[n], goal.get(n, base.shapes[n])) for n in moved & set(base.shapes)
            )
            if moved and fits:
                values[key] = value
                break
    if not values:
        return None
    made = builder.build({**values, **lists})
    return Settings({**values, **lists}, base, made, in_part=True) if made is not None else None


def _between(old: tuple[int, ...], there: tuple[int, ...], new: tuple[int, ...]) -> bool:
    """Whether every size is the old or the new one."""
    return len(old) == len(there) == len(new) and all(s in (a, b) for a, s, b in zip(old, there, new, strict=True))


def _values_for(
    key: Key,
    value: int,
    probe: int,
    base: Instance,
    moved: Instance,
    goal: Mapping[str, tuple[int, ...]],
    wanted: Attributes,
    stacks: list[Restacked],
) -> list[int]:
    """Values of a setting that may reach the goal: by every size and attribute that follows it."""
    found: dict[int, None] = {}

    def reach(old: Any, there: Any, target: Any) -> None:
        if type(old) not in (int, float) or type(there) not in (int, float) or old == there or target == old:
            return
        exact = value + (target - old) * (probe - value) / (there - old)
        if abs(exact - round(exact)) < 1e-9 and round(exact) > 0:
            found.setdefault(round(exact))

    for name, shape in base.shapes.items():
        other, target = moved.shapes.get(name), goal.get(name)
        if other is not None and target is not None and len(other) == len(shape) == len(target):
            for old, there, new in zip(shape, other, target, strict=True):
                reach(old, there, new)
    for place, new in wanted.items():
        was, now = base.attributes.get(place), moved.attributes.get(place)
        if type(was) in (int, float) and type(now) in (int, float) and was != now and type(new) is type(was):
            reach(was, now, new)
            if was and now and value * new % was == 0:
                found.setdefault(int(value * new // was))
    if set(moved.shapes) != set(base.shapes):
        for stack in stacks:
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


# adopting -----------------------------------------------------------------------------------------------------------


def adopt(living: Living, builder: Builder, settings: Settings, origin: Mapping[str, str]) -> None:
    """Set the config, and the attributes of modules that follow it, where the model has them as its class made them.

    Args:
        origin: of module paths that are new, the paths that they had or were copied from.
    """
    old = {k: attributes_of(_inner(builder.config, k)).get(k[-1], _ABSENT) for k in settings.values}
    seen: set[int] = set()
    for module in list(living.model.modules()):
        for config in [builder.config, *configs_of(module)]:
            if id(config) in seen:
                continue
            seen.add(id(config))
            for key, value in settings.values.items():
                mine = _inner(builder.config, key)
                alike = type(config) is type(mine) and attributes_of(config).get(key[-1], _ABSENT) == old[key]
                if config is mine or alike:
                    living.attribute(config, key[-1], value)
    for path, module in living.model.named_modules(remove_duplicate=False):
        for name, value in list(vars(module).items()):
            made = settings.after.attributes.get((path, name), value)
            was = settings.before.attributes.get((origin.get(path, path), name), made)
            if _plain(value) and made != value and value in (was, settings.before.attributes.get((path, name), was)):
                living.attribute(module, name, made)


#: a setting that a config does not have
_ABSENT = object()

__all__ = ["Builder", "Settings", "adopt", "builder_of", "solve"]
