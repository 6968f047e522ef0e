"""A model that its class builds from a config: which settings make it have the grown sizes, found by building it.

On the meta device the class is instantiated with one setting changed at a time, and what follows is read off: sizes of
tensors and plain attributes of modules. That map, inverted, gives the settings of the grown model; an instance made
of them says what every attribute has to be. Nothing is known of any class beforehand; the graph is compared afterwards.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import itertools
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fxgrow.landing.blocks import Restacked
from fxgrow.landing.living import Living, attributes_of, configs_of, is_config

Attributes = dict[tuple[str, str], Any]  # module path and name
Key = tuple[str, ...]  # names of nested bundles, and of the setting

#: seconds that are spent on building instances
_PATIENCE = 20.0
_MOST_TRIED = 48


@dataclass
class Instance:
    """What a class makes of a config: shapes of tensors by name, and plain attributes of modules."""

    shapes: dict[str, tuple[int, ...]]
    attributes: Attributes


@dataclass
class Settings:
    """New values of settings, and the instances before and after."""

    values: dict[Key, Any]
    before: Instance
    after: Instance


@dataclass
class Builder:
    """Builds a class from variants of a model's config.

    Attributes:
        config: the model's own.
        base: what the class makes of it.
    """

    kind: type[nn.Module]
    config: Any
    base: Instance = field(init=False)
    deadline: float = field(default_factory=lambda: time.monotonic() + _PATIENCE)

    def build(self, values: Mapping[Key, Any]) -> Instance | None:
        """The class with other settings; None where it cannot be built so."""
        config = copy.deepcopy(self.config)
        for key, value in values.items():
            table = attributes_of(_inner(config, key))
            table[key[-1]] = value
        if time.monotonic() > self.deadline:
            return None
        quiet = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
        try:
            with warnings.catch_warnings(), quiet[0], quiet[1], torch.random.fork_rng(devices=[]), torch.device("meta"):
                warnings.simplefilter("ignore")
                return instance_of(self.kind(config))
        except Exception:
            return None


def instance_of(model: nn.Module) -> Instance:
    shapes = {
        n: tuple(t.shape)
        for kind in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
        for n, t in kind
    }
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
    for config in [v for v in vars(model).values() if is_config(v)]:
        builder = Builder(type(model), config)
        made = builder.build({})
        if made is not None and {n: s for n, s in own.shapes.items() if n in made.shapes} == made.shapes:
            builder.base = made
            return builder
    return None


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
    builder: Builder, shapes: Mapping[str, tuple[int, ...]], wanted: Attributes, stacks: list[Restacked]
) -> Settings | None:
    """Settings with which the class has the grown shapes, and the wanted attributes where some setting moves them.

    Args:
        shapes: of the grown model's tensors, by name.
        wanted: attributes that the graph asks for.
        stacks: those that have other blocks now.
    """
    base = builder.base
    goal = {n: s for n, s in shapes.items() if n in base.shapes or stacks}
    choices: dict[Key, list[Any]] = {}
    for key, value in _settings(builder.config):
        for probe in (2 * value, value + 1, 3 * value):
            lists = _stretched(builder.config, value, probe)
            moved = builder.build({key: probe, **lists})
            if moved is not None:
                found = _values_for(key, value, probe, base, moved, goal, wanted, stacks)
                if found:
                    choices[key] = found
                break
    lists = {k: v for s in stacks for k, v in _restacked_lists(builder.config, s).items()}
    best: tuple[int, Settings] | None = None
    keys = list(choices)
    tried = 0
    for picked in itertools.product(*([*choices[k], None] for k in keys)):
        values = {k: v for k, v in zip(keys, picked, strict=True) if v is not None}
        tried += 1
        if tried > _MOST_TRIED:
            break
        made = builder.build({**values, **lists})
        if made is None or any(made.shapes.get(n) != s for n, s in goal.items()):
            continue
        missed = sum(made.attributes.get(k, v) != v for k, v in wanted.items())
        if best is None or missed < best[0]:
            best = missed, Settings({**values, **lists}, base, made)
        if not missed:
            break
    return best[1] if best else _by_themselves(builder, goal, choices, lists, stacks)


def _by_themselves(
    builder: Builder,
    goal: Mapping[str, tuple[int, ...]],
    choices: Mapping[Key, list[Any]],
    lists: dict[Key, Any],
    stacks: list[Restacked],
) -> Settings | None:
    """Settings that move nothing but what has grown, each by itself, where no choice of all makes the grown shapes."""
    base, values = builder.base, {}
    for key, found in choices.items():
        for value in found:
            made = builder.build({key: value, **lists})
            if made is None:
                continue
            moved = {n for n, s in made.shapes.items() if base.shapes.get(n) != s}
            fits = set(made.shapes) <= set(goal) and all(
                there in (old, new)
                for n in moved & set(base.shapes)
                for old, there, new in zip(base.shapes[n], made.shapes[n], goal[n], strict=True)
            )
            if moved and fits:
                values[key] = value
                break
    if not values:
        return None
    made = builder.build({**values, **lists})
    return Settings({**values, **lists}, base, made) if made is not None else None


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
        old, there = base.attributes.get(place), moved.attributes.get(place)
        if isinstance(old, int | float) and isinstance(there, int | float) and old != there and type(new) is type(old):
            reach(old, there, new)
            if old and there and value * new % old == 0:
                found.setdefault(value * new // old)
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
    old = {k: attributes_of(_inner(builder.config, k))[k[-1]] for k in settings.values}
    seen: set[int] = set()
    for module in list(living.model.modules()):
        for config in [builder.config, *configs_of(module)]:
            if id(config) in seen:
                continue
            seen.add(id(config))
            for key, value in settings.values.items():
                mine = _inner(builder.config, key)
                alike = type(config) is type(mine) and attributes_of(config).get(key[-1]) == old[key]
                if config is mine or alike:
                    living.attribute(config, key[-1], value)
    for path, module in living.model.named_modules(remove_duplicate=False):
        for name, value in list(vars(module).items()):
            made = settings.after.attributes.get((path, name), value)
            was = settings.before.attributes.get((origin.get(path, path), name), made)
            if _plain(value) and made != value and value in (was, settings.before.attributes.get((path, name), was)):
                living.attribute(module, name, made)


__all__ = ["Builder", "Settings", "adopt", "builder_of", "solve"]
