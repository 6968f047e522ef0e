"""What objects keep that their classes compute of what else they hold: where they are made, or once and for all."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Collection, Mapping, MutableMapping
from typing import Any

from torch import nn

from fxgrow.landing.living import Living, attributes_of, configs_of


class Following:
    """What the modules and configs of a model keep that their classes compute of what else they hold."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = {path: _held(m, _computed(m)) for path, m in model.named_modules(remove_duplicate=False)}
        configs = {id(c): c for m in model.modules() for c in configs_of(m)}
        self.configs = [(c, dict(attributes_of(c)), _held(c, _computed(c))) for c in configs.values()]

    def settle(self, living: Living, origin: Mapping[str, str]) -> bool:
        """Compute anew what holds its old number.

        Args:
            origin: module path now to the path that it had, or was copied from, where they differ.

        Returns:
            Whether anything has another.
        """
        mark = living.mark
        for config, before, cached in self.configs:
            now = attributes_of(config)
            if before != dict(now):  # else nothing is made: an object of the user's may do more than hold numbers
                held = _held(before, _made(type(config), before))
                _settle(living, config, held, _made(type(config), now))
            _settle(living, config, cached, _computed(config) if cached else {})
        for path, module in living.model.named_modules(remove_duplicate=False):
            cached = self.modules.get(origin.get(path, path), {})
            _settle(living, module, cached, _computed(module) if cached else {})
        return living.mark != mark


def _settle(living: Living, holder: Any, old: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for name in old.keys() & now.keys():
        if attributes_of(holder).get(name) == old[name] != now[name]:
            living.attribute(holder, name, now[name])


def followers(config: Any) -> list[str]:
    """Attributes that a config's class computes of the others."""
    return list(_held(config, {**_made(type(config), attributes_of(config)), **_computed(config)}))


def follow(config: Any, names: Collection[str]) -> None:
    """Let these attributes be what a config's class computes of the others as they are now."""
    table = attributes_of(config)
    table.update({n: v for n, v in _made(type(config), table).items() if n in names})
    table.update({n: v for n, v in _computed(config).items() if n in names})  # of those, too


def _held(holder: Any, made: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers that are made of the others and that it holds so."""
    known = attributes_of(holder)
    return {
        n: v for n, v in made.items() if type(v) in (int, float) and type(known.get(n)) is type(v) and known[n] == v
    }


def _computed(holder: Any) -> dict[str, Any]:
    """What was computed where it was first read, and kept, computed anew."""
    known, kind = attributes_of(holder), type(holder)
    kept = {n: v for n, v in known.items() if isinstance(n, str) and _is_cached(kind, n)}
    for name in kept:  # one may read another
        del known[name]
    try:
        return {n: getattr(holder, n) for n in kept}
    except Exception:  # the user's code
        return {}
    finally:
        known.update(kept)


def _made(kind: type, known: Mapping[str, Any]) -> dict[str, Any]:
    """What an object made anew of the arguments that one keeps has beside them."""
    names = [] if issubclass(kind, MutableMapping) else arguments_of(kind)
    if not names or any(n not in known for n in names):
        return {}
    try:
        made = attributes_of(kind(**{n: known[n] for n in names}))
        return {n: v for n, v in made.items() if isinstance(n, str) and n not in names}
    except Exception:  # settings that its class does not take
        return {}


def _is_cached(kind: type, name: str) -> bool:
    return isinstance(inspect.getattr_static(kind, name, None), functools.cached_property)


def arguments_of(kind: type) -> list[str]:
    """What a class takes by name; nothing where it takes more than has a name."""
    try:
        parameters = inspect.signature(kind).parameters.values()
    except (TypeError, ValueError):
        return []
    if any(p.kind in (p.POSITIONAL_ONLY, p.VAR_POSITIONAL) for p in parameters):
        return []
    return [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]


__all__ = ["Following", "follow", "followers"]
