"""Modules that their classes build from a config: what a class makes of other settings, on the meta device.

Nothing is known of any class beforehand. Such a module is found by building it: the class, given a config that the
module holds and nothing else, makes tensors of the module's shapes.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fxgrow.ir.modules import named_tensors
from fxgrow.landing.beside import Unwritten, apart, tensors_beside
from fxgrow.landing.living import attributes_of, configs_of, is_config, is_sealed

Attributes = dict[tuple[str, str], Any]  # module path and name
Key = tuple[str, ...]  # names of nested bundles, and of the setting

#: instances that are built for one growth: most need under 40, a dozen settings in pairs some 200
_MOST_BUILT = 400
#: parameters of a model up to which it is made with memory, to compare tensors that are not saved
_MOST_MADE = 2**28


@dataclass
class Instance:
    """What a class makes of a config: shapes of tensors by name, and plain attributes of modules."""

    shapes: dict[str, tuple[int, ...]]
    attributes: Attributes


@dataclass
class Builder:
    """Builds a module's class from variants of its config.

    Attributes:
        path, module: the module, and where in the model it is; "" is the model.
        config: the module's own.
        shared: whether modules beside it hold the config as well, so that it cannot be set for this one alone.
        base: what the class makes of it.
        added, changed: names of tensors, and attributes, by which the module was another than that.
        asked: settings that its modules' classes may ask for, with a default.
        apart: places of what the module held otherwise, beside weights and plain attributes.
        fixed: settings that it is given, and that are not tried.
        known: what was built already.
    """

    path: str
    module: nn.Module
    config: Any
    shared: bool
    base: Instance = field(init=False)
    added: set[str] = field(default_factory=set)
    asked: set[str] = field(default_factory=set)
    changed: set[tuple[str, str]] = field(default_factory=set)
    apart: set[str] = field(default_factory=set)
    fixed: dict[Key, Any] = field(default_factory=dict)
    known: dict[str, Instance | None] = field(default_factory=dict)

    @property
    def sealed(self) -> bool:
        """Whether no setting can be set."""
        return self.shared or is_sealed(self.config)

    def build(self, values: Mapping[Key, Any]) -> Instance | None:
        """The class with other settings; None where it cannot be built so."""
        key = repr(sorted(values.items()))
        if key not in self.known and len(self.known) < _MOST_BUILT:
            made = self.instance(values)
            self.known[key] = None if made is None else instance_of(made)
        return self.known.get(key)

    def instance(self, values: Mapping[Key, Any], device: str = "meta") -> nn.Module | None:
        """The class with other settings on a device, parameters without values; None where it cannot be built so."""
        config = self.config if is_sealed(self.config) else copy.deepcopy(self.config)
        quiet = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
        empty = contextlib.nullcontext() if device == "meta" else Unwritten()
        try:
            with warnings.catch_warnings(), quiet[0], quiet[1], torch.random.fork_rng(devices=[]), torch.device(device):
                warnings.simplefilter("ignore")
                for key, value in values.items():
                    attributes_of(inner(config, key))[key[-1]] = value  # a class with slots has no further ones
                with empty:
                    return type(self.module)(config)
        except Exception:
            return None

    def beside(self) -> dict[str, str]:
        """What the class made anew has otherwise than the module beside weights and plain attributes, by place."""
        small = sum(p.numel() for p in self.module.parameters()) <= _MOST_MADE
        made = self.instance({}, "cpu" if small and tensors_beside(self.module) else "meta")
        return {} if made is None else apart(self.module, made, self.config)

    def settings(self) -> Iterator[tuple[Key, Any]]:
        """Numbers of the config that may be another, and what they are."""
        return ((key, value) for key, value in settings_of(self.config) if key not in self.fixed)

    def open_settings(self) -> list[str]:
        """Settings that follow from others: they are None, or are not there and the class asks for them."""
        known = attributes_of(self.config)
        return [*(n for n, v in known.items() if v is None and isinstance(n, str)), *sorted(self.asked - {*known})]

    def differs(self) -> str:
        """What is another in the class made anew from the config as it is now, in words; "" for nothing."""
        module = instance_of(self.module)
        instance = self.instance({})
        if instance is None:
            return "it cannot be built"
        made = instance_of(instance)
        for name, shape in made.shapes.items():
            if module.shapes.get(name, shape) != shape:
                return f"{name} has the shape {shape}, not {module.shapes[name]}"
        alone = set(made.shapes) ^ (set(module.shapes) - self.added)
        if alone:
            return f"{min(alone)} is there in one of them only"
        for (path, name), value in made.attributes.items():
            known = module.attributes.get((path, name), value)
            if known != value and (path, name) not in self.changed:
                return f"{f'{path}.' if path else ''}{name} is {value}, not {known}"
        return next((said for place, said in self.beside().items() if place not in self.apart), "")


def instance_of(model: nn.Module) -> Instance:
    shapes = {n: tuple(t.shape) for n, t in named_tensors(model).items()}
    attributes = {
        (path, name): value
        for path, module in model.named_modules(remove_duplicate=False)
        for name, value in vars(module).items()
        if is_plain(value) and name != "training"
    }
    return Instance(shapes, attributes)


def is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return len(value) <= 16 and all(is_plain(v) for v in value)
    return value is None or isinstance(value, bool | int | float | str)


def builders_of(model: nn.Module) -> list[Builder]:
    """Builders of the outermost modules that their classes make from a config, and make as they are."""
    holders: dict[int, set[int]] = {}
    for module in model.modules():
        for config in configs_of(module):
            holders.setdefault(id(config), set()).add(id(module))
    return list(_outermost(model, "", holders, ()))


def _outermost(
    module: nn.Module, path: str, holders: Mapping[int, set[int]], around: tuple[int, ...]
) -> Iterator[Builder]:
    builder = _builder_of(module, path)
    if builder is not None:
        own = {*around, *(id(m) for m in module.modules())}
        builder.shared = not holders.get(id(builder.config), set()) <= own
        yield builder
        return
    for name, child in module.named_children():
        yield from _outermost(child, f"{path}.{name}" if path else name, holders, (*around, id(module)))


def _builder_of(module: nn.Module, path: str) -> Builder | None:
    configs = [v for v in vars(module).values() if is_config(v) or is_sealed(v)]
    try:
        inspect.signature(type(module)).bind(object())
    except (TypeError, ValueError):
        return None
    own = instance_of(module)
    for config in configs:
        builder = Builder(path, module, config, shared=False)
        made = builder.build({})
        if made is None or not made.shapes:
            continue
        if {n: s for n, s in own.shapes.items() if n in made.shapes} == made.shapes:
            builder.base, builder.added = made, set(own.shapes) - set(made.shapes)
            builder.asked = {n for kind in {type(m) for m in module.modules()} for n in _asked_by(kind)}
            builder.changed = {k for k, v in own.attributes.items() if made.attributes.get(k, v) != v}
            builder.apart = set(builder.beside())
            return builder
    return None


def _asked_by(kind: type[nn.Module]) -> set[str]:
    """Names that a class may ask a config for, with a default: ``getattr(config, "head_dim", None)``."""
    makers = [getattr(vars(cls).get("__init__"), "__code__", None) for cls in kind.__mro__ if cls is not nn.Module]
    found = {s for code in makers if code is not None and "getattr" in code.co_names for s in code.co_consts}
    return {s for s in found if isinstance(s, str) and s.isidentifier() and not s.startswith("_")}


def inner(config: Any, key: Key) -> Any:
    """The bundle of settings in which the last name of a key stands."""
    for name in key[:-1]:
        config = attributes_of(config)[name]
    return config


def settings_of(config: Any, prefix: Key = ()) -> Iterator[tuple[Key, Any]]:
    """Positive whole numbers of a config and of the bundles in it."""
    for name, value in list(attributes_of(config).items()):
        if not isinstance(name, str) or name.startswith("_"):
            continue
        if type(value) is int and value > 0:
            yield (*prefix, name), value
        elif not prefix and is_config(value):
            yield from settings_of(value, (name,))


__all__ = ["Attributes", "Builder", "Instance", "Key", "builders_of", "inner", "is_plain", "settings_of"]
