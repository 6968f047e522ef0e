"""Bundles of settings: what is in them, and how one is set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fxgrow.landing.living import attributes_of, is_config

Key = tuple[str | int, ...]  # names of nested bundles, that of the setting, and of a list of sizes the entry

_MOST_ENTRIES = 8


def settings_of(config: Any, prefix: Key = ()) -> Iterator[tuple[Key, Any]]:
    """Positive whole numbers of a config, of lists in it, and of the bundles in it."""
    for name, value in list(attributes_of(config).items()):
        if not isinstance(name, str) or name.startswith("_"):
            continue
        if type(value) is int and value > 0:
            yield (*prefix, name), value
        elif type(value) in (list, tuple):
            yield from entries_of(value, (*prefix, name))
        elif not prefix and is_config(value):
            yield from settings_of(value, (name,))


def entries_of(value: Any, prefix: Key) -> Iterator[tuple[Key, int]]:
    """Sizes in a list of them, or of lists of them."""
    if len(value) > _MOST_ENTRIES:
        return
    if all(type(v) is int and v > 0 for v in value):
        yield from (((*prefix, i), v) for i, v in enumerate(value))
    elif all(type(v) in (list, tuple) for v in value):
        for i, v in enumerate(value):
            yield from entries_of(v, (*prefix, i))


def inner(config: Any, key: Key) -> Any:
    """The bundle of settings in which a setting stands."""
    for name in [n for n in key if isinstance(n, str)][:-1]:
        config = attributes_of(config)[name]
    return config


def name_of(key: Key) -> str:
    """What its bundle calls a setting."""
    return [n for n in key if isinstance(n, str)][-1]


def whole(held: Any, key: Key, value: Any) -> Any:
    """What is held under a setting's name, with the setting at a value."""
    places = [i for i in key if isinstance(i, int)]
    if not places:
        return value
    rest = tuple(places[1:])
    return type(held)(whole(v, rest, value) if i == places[0] else v for i, v in enumerate(held))


def put(config: Any, values: Mapping[Key, Any]) -> None:
    """Set settings, whole lists before their entries."""
    for key, value in sorted(values.items(), key=lambda each: isinstance(each[0][-1], int)):
        table = attributes_of(inner(config, key))  # a class with slots has no further ones
        table[name_of(key)] = whole(table.get(name_of(key)), key, value)


__all__ = ["Key", "inner", "name_of", "put", "settings_of", "whole"]
