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
        elif type(value) in (list, tuple) and len(value) <= _MOST_ENTRIES:
            if all(type(v) is int and v > 0 for v in value):
                yield from (((*prefix, name, i), v) for i, v in enumerate(value))
        elif not prefix and is_config(value):
            yield from settings_of(value, (name,))


def inner(config: Any, key: Key) -> Any:
    """The bundle of settings in which a setting stands."""
    for name in key[: -1 if isinstance(key[-1], str) else -2]:
        config = attributes_of(config)[name]  # type: ignore[index]
    return config


def name_of(key: Key) -> str:
    """What its bundle calls a setting."""
    return str(key[-1] if isinstance(key[-1], str) else key[-2])


def whole(held: Any, key: Key, value: Any) -> Any:
    """What is held under a setting's name, with the setting at a value."""
    if isinstance(key[-1], str):
        return value
    return type(held)(value if i == key[-1] else v for i, v in enumerate(held))


def put(config: Any, values: Mapping[Key, Any]) -> None:
    """Set settings, whole lists before their entries."""
    for key, value in sorted(values.items(), key=lambda each: isinstance(each[0][-1], int)):
        table = attributes_of(inner(config, key))  # a class with slots has no further ones
        table[name_of(key)] = whole(table.get(name_of(key)), key, value)


__all__ = ["Key", "inner", "name_of", "put", "settings_of", "whole"]
