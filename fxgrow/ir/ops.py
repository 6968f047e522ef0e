"""Calls of ops: names, and arguments by the names of their schemas."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch._ops import HigherOrderOperator as HigherOrderOperator
from torch._ops import OpOverload as OpOverload

from fxgrow.errors import GrowthRefused


@functools.cache
def op_name(target: Any) -> str:
    """``aten.add.Tensor`` for an op overload, the plain name for a Python builtin."""
    if isinstance(target, OpOverload):
        return str(target)
    return getattr(target, "__name__", str(target))


@functools.cache
def _signature(target: Any) -> tuple[tuple[str, bool, Any], ...] | None:
    """An op's arguments: name, whether by keyword only, default. Reading them off a schema takes time."""
    schema = getattr(target, "_schema", None)
    if schema is None:
        return None
    return tuple((a.name, a.kwarg_only, a.default_value if a.has_default_value() else None) for a in schema.arguments)


def used(node: fx.Node, result: int) -> bool:
    """Whether anything uses one result of an op with several."""
    return any(op_name(u.target) == "getitem" and u.args[1] == result and u.users for u in node.users)


def bound_arguments(node: fx.Node) -> dict[str, Any]:
    """The node's arguments by the names of the op's schema, defaults filled in."""
    signature, args, kwargs = _signature(node.target), node.args, node.kwargs
    if signature is None:
        return {str(i): a for i, a in enumerate(args)} | dict(kwargs)
    out: dict[str, Any] = {}
    for i, (name, by_keyword, default) in enumerate(signature):
        out[name] = args[i] if i < len(args) and not by_keyword else kwargs.get(name, default)
    return out


def nodes_among(arguments: Mapping[str, Any]) -> list[tuple[str, fx.Node]]:
    """The nodes among a call's arguments by name, those inside lists included."""
    out: list[tuple[str, fx.Node]] = []
    for name, value in arguments.items():
        if isinstance(value, fx.Node):
            out.append((name, value))
        elif isinstance(value, list | tuple):
            out += [(name, item) for item in value if isinstance(item, fx.Node)]
    return out


def schema_of(target: Any) -> Any:
    """An op's schema: names, kinds and defaults of its arguments, and which of them it writes; None without one."""
    return getattr(target, "_schema", None)


def set_argument(node: fx.Node, name: str, value: Any) -> None:
    """Set one argument of an op by its schema name, in place."""
    schema = node.target._schema  # type: ignore[union-attr]
    names = [a.name for a in schema.arguments if not a.kwarg_only]
    if name in names:
        i = names.index(name)
        args = list(node.args)
        if i < len(args):
            args[i] = value
            node.args = tuple(args)
            return
        if all(schema.arguments[j].has_default_value() for j in range(len(args), i)):
            if i == len(args):
                node.args = (*args, value)
            else:
                node.kwargs = {**node.kwargs, name: value}
            return
    node.kwargs = {**node.kwargs, name: value}


def operator_named(name: str) -> Any:
    """``aten.split_with_sizes.default`` to the op overload."""
    target: Any = torch.ops
    try:
        for part in name.split("."):
            target = getattr(target, part)
    except (AttributeError, RuntimeError):
        target = None
    if not isinstance(target, OpOverload):
        raise GrowthRefused(f"there is no operator {name!r} here; the plan was made elsewhere")
    return target
