"""Layers that something was put around since their model's class made them, as libraries do with adapters.

A class made anew has the layer itself at that path. Nothing is known of what was put around it: it is another class
than the layer's, and has the layer for a child.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

from fxgrow.ir.modules import child_of

#: by the path at which a class makes a layer, the one of what was put around it, and where in that the layer is
Wrapped = Mapping[str, tuple[str, str]]


def wrapped_in(model: nn.Module, made: nn.Module) -> dict[str, tuple[str, str]]:
    """The layers of a model that are inside others than its class put them into.

    Args:
        made: an instance of the class as it makes one.
    """
    return dict(_wrapped(model, made, "", ""))


def _wrapped(model: nn.Module, made: nn.Module, here: str, there: str) -> Iterator[tuple[str, tuple[str, str]]]:
    for name, child in made.named_children():
        found, place, path = child_of(model, name), f"{here}{name}", f"{there}{name}"
        if found is None:
            continue
        inside = "" if type(found) is type(child) else _inside(found, type(child))
        if inside:
            yield path, (place, inside)
            found, place = found.get_submodule(inside), f"{place}.{inside}"
        yield from _wrapped(found, child, f"{place}.", f"{path}.")


def _inside(module: nn.Module, kind: type[nn.Module], depth: int = 2) -> str:
    """Where in a module the one of a class is; "" where there is none, or more than one."""
    children = list(module.named_children())
    found = [n for n, m in children if type(m) is kind]
    if not found and depth > 1:
        found = [f"{n}.{inside}" for n, m in children if (inside := _inside(m, kind, depth - 1))]
    return found[0] if len(found) == 1 else ""


def as_made(name: str, wrapped: Wrapped) -> str | None:
    """A dotted name in a model as its class has it; None for what belongs to what was put around a layer."""
    if not wrapped:
        return name
    layers = {f"{place}.{inside}": path for path, (place, inside) in wrapped.items()}
    around = {place for place, _ in wrapped.values()}
    parts = name.split(".")
    for size in range(len(parts), 0, -1):
        path = ".".join(parts[:size])
        if path in layers:
            return ".".join((layers[path], *parts[size:]))
        if path in around:
            return None
    return name


__all__ = ["Wrapped", "as_made", "wrapped_in"]
