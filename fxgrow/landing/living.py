"""A living model under change: whatever is set is written down, and can be taken back in reverse order."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import nn

from fxgrow.ir.adapters import LowRank, attach, detach
from fxgrow.ir.modules import OWN_ATTRIBUTES, children_of, drop_hooks, set_children, set_tensor, share_hooks, tensor_of
from fxgrow.plan import Adapt

_MISSING = object()


class Living:
    """The user's model while it is grown in place."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        #: for every module that was moved or copied, the path that it, or what it is a copy of, had
        self.origins: dict[str, str] = {}
        self._undo: list[Callable[[], None]] = []

    def undo(self, mark: int = 0) -> None:
        """Take back every change since a mark, the last one first."""
        while len(self._undo) > mark:
            self._undo.pop()()

    @property
    def mark(self) -> int:
        """What :meth:`undo` goes back to."""
        return len(self._undo)

    def undone_by(self, back: Callable[[], None]) -> None:
        """Write down how a change is taken back that was made elsewhere."""
        self._undo.append(back)

    def module(self, path: str) -> nn.Module:
        """The module at a path; "" is the model."""
        return self.model.get_submodule(path)

    def attribute(self, holder: Any, name: str, value: Any) -> bool:
        """Set a plain attribute of a module or a config, or an entry of a mapping.

        Returns:
            Whether it is set: a mapping of the user's may be closed, or check what it is given.
        """
        table = attributes_of(holder)
        before = table.get(name, _MISSING)
        try:
            table[name] = value
        except Exception:  # the user's code: nobody knows what it raises
            return False

        def back() -> None:
            if before is _MISSING:
                table.pop(name, None)
            else:
                table[name] = before

        self._undo.append(back)
        return True

    def adapter(self, change: Adapt) -> None:
        """Give a layer a low-rank adapter; its weights are places for others."""
        module = self.module(change.path)
        places = [
            nn.Parameter(torch.empty(shape, device="meta"))
            for shape in ([change.rank, change.sizes[0]], [change.sizes[1], change.rank])
        ]
        hook = LowRank(change.alpha, change.dropout, change.embedding, change.transposed, change.padding)
        attach(module, hook, *places)
        self._undo.append(lambda: detach(module))

    def children(self, path: str, children: Mapping[str, nn.Module | None]) -> None:
        """Give a container other children."""
        container = self.module(path)
        before = children_of(container)
        self._undo.append(lambda: set_children(container, before))
        set_children(container, children)

    def references(self, exchanged: Mapping[int, tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Let plain attributes, and lists, tuples and dicts among them, hold new tensors in the place of old ones.

        Args:
            exchanged: by ``id`` of the old tensor, it and the new one.
        """

        def current(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return exchanged[id(value)][1] if id(value) in exchanged else value
            if type(value) in (list, tuple):
                return type(value)(current(v) for v in value)
            return {k: current(v) for k, v in value.items()} if type(value) is dict else value

        for module in self.model.modules():
            for name, value in list(vars(module).items()):
                if name not in OWN_ATTRIBUTES and any(id(t) in exchanged for t in _tensors_in(value)):
                    self.attribute(module, name, current(value))

    def tensor(self, name: str, new: torch.Tensor) -> torch.Tensor | None:
        """Put a parameter or buffer in the place of the one of that name, with its hooks and attributes.

        Returns:
            The old one; None where there was none, or it is the new one already.
        """
        path, _, leaf = name.rpartition(".")
        holder = self.module(path)
        old = tensor_of(holder, leaf)
        if old is new:
            return None
        hooked = isinstance(old, nn.Parameter) and old.shape is not None
        self._undo.append(lambda: set_tensor(holder, leaf, old))
        set_tensor(holder, leaf, new)
        if hooked and old is not None and (old.requires_grad or vars(old)):
            known = set(vars(new))
            share_hooks(old, new)
            added = set(vars(new)) - known

            def back() -> None:
                drop_hooks(new)
                for key in added:
                    vars(new).pop(key, None)

            self._undo.append(back)
        return old


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif type(value) in (list, tuple, dict):
        for v in value.values() if type(value) is dict else value:
            yield from _tensors_in(v)


def attributes_of(holder: Any) -> MutableMapping[str, Any]:
    """The table in which a module, a config or a mapping keeps its attributes: no property or check runs."""
    if isinstance(holder, MutableMapping):
        return holder
    return vars(holder) if hasattr(holder, "__dict__") else _Slots(holder)


class _Slots(MutableMapping[str, Any]):
    """The attributes of an object whose class has slots for them."""

    def __init__(self, holder: Any) -> None:
        self._holder = holder
        declared = [vars(kind).get("__slots__", ()) for kind in reversed(type(holder).__mro__)]
        self._names = [n for names in declared for n in ([names] if isinstance(names, str) else names)]

    def __getitem__(self, name: str) -> Any:
        if name not in self._names or not hasattr(self._holder, name):
            raise KeyError(name)
        return getattr(self._holder, name)

    def __setitem__(self, name: str, value: Any) -> None:
        object.__setattr__(self._holder, name, value)

    def __delitem__(self, name: str) -> None:
        object.__delattr__(self._holder, name)

    def __iter__(self) -> Iterator[str]:
        return (n for n in self._names if hasattr(self._holder, n))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def is_config(value: Any, depth: int = 2) -> bool:
    """Whether a value looks like a bundle of settings: an object or a mapping with plain numbers among its entries, or
    with a bundle that has some.
    """
    if isinstance(value, nn.Module | torch.Tensor | type) or callable(value):
        return False
    if not isinstance(value, MutableMapping) and not hasattr(value, "__dict__"):
        slots = any(vars(kind).get("__slots__") for kind in type(value).__mro__)
        if not slots or isinstance(value, Collection):
            return False
    table = attributes_of(value)
    if _has_numbers(table):
        return True
    return depth > 1 and any(isinstance(k, str) and is_config(v, depth - 1) for k, v in list(table.items()))


def is_sealed(value: Any) -> bool:
    """Whether it looks like a bundle of settings of which none can be set: a named tuple, a mapping for readers."""
    if isinstance(value, tuple):
        return _has_numbers(dict(zip(vars(type(value)).get("_fields", ()), value, strict=False)))
    return isinstance(value, Mapping) and not isinstance(value, MutableMapping) and _has_numbers(value)


def _has_numbers(table: Mapping[Any, Any]) -> bool:
    return any(isinstance(k, str) and type(v) in (int, float) for k, v in table.items())


def configs_of(holder: Any, depth: int = 2) -> Iterator[Any]:
    """Bundles of settings among an object's attributes, and those inside them."""
    table = attributes_of(holder)
    for value in list(table.values()):
        if is_config(value):
            yield value
            if depth > 1:
                yield from configs_of(value, depth - 1)
