"""Modules that their classes build from a config: what a class makes of other settings, on the meta device.

Nothing is known of any class beforehand. Such a module is found by building it: the class, given a config that the
module holds and nothing else, or the config's entries by name, or arguments that the module keeps by their names, makes
tensors of the module's shapes.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import warnings
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from fxgrow.ir.modules import named_tensors
from fxgrow.landing.beside import Unwritten, apart, tensors_beside
from fxgrow.landing.bundles import Key, put, settings_of
from fxgrow.landing.following import follow, followers
from fxgrow.landing.living import attributes_of, configs_of, is_config, is_sealed
from fxgrow.landing.wrapped import Wrapped, as_made, wrapped_in

Attributes = dict[tuple[str, str], Any]  # module path and name

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
        together: whether those are all built from it as well, so that it can be set if they all want the same.
        by_name: whether the class takes the entries of the config, not the config.
        following: what the config's class computes of the other settings.
        base: what the class makes of it.
        wrapped: layers that something was put around since.
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
    together: bool = False
    by_name: bool = False
    following: list[str] = field(default_factory=list)
    base: Instance = field(init=False)
    wrapped: Wrapped = field(default_factory=dict)
    added: set[str] = field(default_factory=set)
    asked: set[str] = field(default_factory=set)
    changed: set[tuple[str, str]] = field(default_factory=set)
    apart: set[str] = field(default_factory=set)
    fixed: dict[Key, Any] = field(default_factory=dict)
    known: dict[str, Instance | None] = field(default_factory=dict)

    @property
    def kept(self) -> bool:
        """Whether it is a module within the model, built from arguments that it keeps: what holds it says them too."""
        return isinstance(self.config, Arguments) and bool(self.path)

    @property
    def sealed(self) -> bool:
        """Whether no setting can be set."""
        return (self.shared and not self.together) or is_sealed(self.config)

    def build(self, values: Mapping[Key, Any]) -> Instance | None:
        """The class with other settings; None where it cannot be built so."""
        key = self.key(values)
        if key not in self.known and len(self.known) < _MOST_BUILT:
            made = self.instance(values)
            self.known[key] = None if made is None else instance_of(made)
        return self.known.get(key)

    @staticmethod
    def key(values: Mapping[Key, Any]) -> str:
        """By what an instance is known."""
        return repr(sorted(values.items()))

    def instance(self, values: Mapping[Key, Any], device: str = "meta") -> nn.Module | None:
        """The class with other settings on a device, parameters without values; None where it cannot be built so."""
        config = self.config if is_sealed(self.config) else copy.deepcopy(self.config)
        quiet = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
        try:
            with warnings.catch_warnings(), quiet[0], quiet[1], torch.random.fork_rng(devices=[]), torch.device(device):
                warnings.simplefilter("ignore")
                put(config, values)
                others = [n for n in self.following if values and (n,) not in values]
                if others:
                    follow(config, others)
                with Unwritten():  # not on the meta device either, where initial values take most of the time
                    return type(self.module)(**config) if self.by_name else type(self.module)(config)
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
        instance = self.instance({})
        if instance is None:
            return "it cannot be built"
        module, made = instance_of(self.module, wrapped_in(self.module, instance)), instance_of(instance)
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


def instance_of(model: nn.Module, wrapped: Wrapped | None = None) -> Instance:
    """A model's shapes and attributes, by the names that its class has for them."""
    wrapped = wrapped or {}
    shapes = {n: tuple(t.shape) for place, t in named_tensors(model).items() if (n := as_made(place, wrapped))}
    attributes = {
        (path, name): value
        for place, module in model.named_modules(remove_duplicate=False)
        if (path := as_made(place, wrapped)) is not None
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
    found = list(_outermost(model, "", holders, ()))
    for builder in found:
        if builder.shared:
            alike = [b.module for b in found if b.config is builder.config]
            known = {id(m) for part in alike for m in part.modules()} | set(_around(model, alike))
            held = [builder.config, *configs_of(builder.config)]
            builder.together = len(alike) > 1 and all(holders.get(id(c), set()) <= known for c in held)
    return found


def _around(module: nn.Module, parts: list[nn.Module]) -> Iterator[int]:
    """The modules that hold some others: they may hold the config of these."""
    inside = {id(m) for m in module.modules()}
    if all(id(p) in inside for p in parts):
        yield id(module)
        for child in module.children():
            yield from _around(child, parts)


def _outermost(
    module: nn.Module, path: str, holders: Mapping[int, set[int]], around: tuple[int, ...]
) -> Iterator[Builder]:
    builder = _builder_of(module, path)
    if builder is not None:
        own = {*around, *(id(m) for m in module.modules())}
        held = [builder.config, *configs_of(builder.config)]
        builder.shared = not all(holders.get(id(c), set()) <= own for c in held)
        yield builder
        return
    for name, child in module.named_children():
        yield from _outermost(child, f"{path}.{name}" if path else name, holders, (*around, id(module)))


def _builder_of(module: nn.Module, path: str) -> Builder | None:
    if isinstance(module, fx.GraphModule):  # built from a graph
        return None
    for config, by_name in _configs(module):
        builder = Builder(path, module, config, shared=False, by_name=by_name)
        builder.following = [] if is_sealed(config) else followers(config)
        instance = builder.instance({})
        made = None if instance is None else instance_of(instance)
        builder.known[builder.key({})] = made
        if instance is None or made is None or not made.shapes:
            continue
        builder.wrapped = wrapped_in(module, instance)
        own = instance_of(module, builder.wrapped)
        if {n: s for n, s in own.shapes.items() if n in made.shapes} == made.shapes:
            builder.base, builder.added = made, set(own.shapes) - set(made.shapes)
            builder.asked = {n for kind in {type(m) for m in module.modules()} for n in _asked_by(kind)}
            builder.changed = {k for k, v in own.attributes.items() if made.attributes.get(k, v) != v}
            builder.apart = set(builder.beside())
            return builder
    return None


def _configs(module: nn.Module) -> Iterator[tuple[Any, bool]]:
    """What a module's class may have been given: by itself, or by the names of what is in it."""
    try:
        signature = inspect.signature(type(module))
    except (TypeError, ValueError):
        return
    configs = [v for v in vars(module).values() if is_config(v) or is_sealed(v)]
    if _takes(signature, object()):
        yield from ((c, False) for c in configs)
    for config in configs:
        named = isinstance(config, MutableMapping) and all(isinstance(n, str) for n in config)
        if named and _takes(signature, **config):
            yield config, True
    kept = arguments_kept(module, signature)
    if kept is not None:
        yield kept, True


def _takes(signature: inspect.Signature, *args: Any, **kwargs: Any) -> bool:
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        return False
    return True


class Arguments(MutableMapping[str, Any]):
    """Arguments of a module's class that the module keeps, as attributes of the same names.

    Attributes:
        complete: whether no others may be sizes.
    """

    def __init__(self, module: nn.Module, names: list[str], complete: bool) -> None:
        self._held, self._names, self.complete = vars(module), names, complete

    def __getitem__(self, name: str) -> Any:
        if name not in self._names:
            raise KeyError(name)
        return self._held[name]

    def __setitem__(self, name: str, value: Any) -> None:
        if name not in self._names:
            raise KeyError(name)
        self._held[name] = value

    def __delitem__(self, name: str) -> None:
        raise TypeError(f"{name} is an argument")

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        return {n: copy.deepcopy(self._held[n], memo) for n in self._names}


def arguments_kept(module: nn.Module, signature: inspect.Signature) -> Arguments | None:
    """The arguments of a class of the user's that the module keeps; None where it keeps no size, or lacks one."""
    if type(module).__module__.partition(".")[0] == "torch":
        return None
    named = [p for p in signature.parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    others = [p for p in signature.parameters.values() if p not in named and p.kind is not p.VAR_KEYWORD]
    kept = [p.name for p in named if p.name in vars(module)]
    lacking = [p.default for p in named if p.name not in kept]
    if others or not kept or any(d is inspect.Parameter.empty for d in lacking):
        return None
    if any(isinstance(vars(module)[n], torch.Tensor) for n in kept):
        return None
    out = Arguments(module, kept, not any(type(d) in (int, list, tuple) for d in lacking))
    return out if next(settings_of(out), None) is not None else None


def _asked_by(kind: type[nn.Module]) -> set[str]:
    """Names that a class may ask a config for, with a default: ``getattr(config, "head_dim", None)``."""
    makers = [getattr(vars(cls).get("__init__"), "__code__", None) for cls in kind.__mro__ if cls is not nn.Module]
    found = {s for code in makers if code is not None and "getattr" in code.co_names for s in code.co_consts}
    return {s for s in found if isinstance(s, str) and s.isidentifier() and not s.startswith("_")}


__all__ = ["Arguments", "Attributes", "Builder", "Instance", "builders_of", "is_plain"]
