"""Changes of a graph: made from what a proof found, and applied, in the same way for every pass."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from fxgrow.ir.nodes import info_of, meta_like, note
from fxgrow.ir.ops import operator_named, schema_of, set_argument
from fxgrow.plan import Change, Edit, Rescale, Unscale, resolve_references
from fxgrow.proof.outcome import Outcome

Named = Callable[[str], fx.Node]  # finds a node, or refuses

# made -------------------------------------------------------------------------------------------------------------


def changes_of(graph: fx.Graph, outcome: Outcome, sizes: Sequence[Edit]) -> list[Change]:
    """What has to change in a graph when an axis grows: sizes among arguments, and constants that keep the function."""
    by_node = {e.node: e for e in sizes}
    for (node, argument), value in outcome.graph.literals.items():
        edit = by_node.setdefault(node, Edit(node=node, why="constant"))
        edit.arguments[argument] = value
    changes: list[Change] = list(by_node.values())
    if not outcome.graph.results and not outcome.graph.operands:
        return changes
    nodes = {n.name: n for n in graph.nodes}
    taken = set(nodes)

    def free(name: str) -> str:
        while name in taken:
            name += "_"
        taken.add(name)
        return name

    changes += [rescale(nodes[n], f, free(f"{n}_scale")) for n, f in outcome.graph.results.items()]
    changes += [
        rescale(nodes[n], f, free(f"{n}_scale_{user}"), user) for (user, n), f in outcome.graph.operands.items()
    ]
    return changes


def rescale(node: fx.Node, factor: float, name: str, user: str | None = None) -> Rescale:
    """The change that multiplies a node's value; one of whole numbers is divided."""
    value = node.meta.get("val")
    whole = isinstance(value, torch.Tensor) and not (value.is_floating_point() or value.is_complex())
    divisor = round(1 / factor) if whole else None
    return Rescale(node=node.name, factor=factor, divisor=divisor, name=name, user=user, why="constant")


# applied ----------------------------------------------------------------------------------------------------------


def apply_edit(edit: Edit, named: Named) -> None:
    """Set arguments of a call, and its target where the plan changes it."""
    node = named(edit.node)
    times = functools.partial(_times, node)
    arguments = {k: resolve_references(v, named, times) for k, v in edit.arguments.items()}
    if edit.target is not None:
        node.target = operator_named(edit.target)
        node.args, node.kwargs = (), {}
        names = [a.name for a in schema_of(node.target).arguments]
        node.args = tuple(arguments[n] for n in names if n in arguments)
        return
    for name, value in arguments.items():
        set_argument(node, name, value)


def _times(before: fx.Node, size: fx.Node, factor: int) -> fx.Node:
    """A dynamic size times a number, as an op before a node."""
    with before.graph.inserting_before(before):
        out = before.graph.call_function(operator.mul, (size, factor))
    out.meta = {**meta_like(before, sizes=None, result_sizes=None), "val": size.meta["val"] * factor}
    return out


def apply_rescale(change: Rescale, named: Named) -> None:
    """Insert ``node * factor`` after a node and send its users, or the one that is named, there."""
    node = named(change.node)
    only = None if change.user is None else named(change.user)
    target: Any = torch.ops.aten.mul.Tensor
    args: tuple[Any, ...] = (node, change.factor)
    kwargs: dict[str, Any] = {}
    if change.divisor is not None:
        target, args, kwargs = torch.ops.aten.div.Tensor_mode, (node, change.divisor), {"rounding_mode": "floor"}
    with node.graph.inserting_after(node):
        new = node.graph.create_node("call_function", target, args, kwargs, name=change.name)
    new.meta = meta_like(node, rescale=True)
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new and only in (None, user))


def apply_unscale(change: Unscale, named: Named) -> None:
    """Send the users of a multiplication to what it multiplies."""
    node = named(change.node)
    node.replace_all_uses_with(node.all_input_nodes[0])
    node.graph.erase_node(node)


# module paths -----------------------------------------------------------------------------------------------------

#: marks the number of a new block until the old ones have moved out of its way
NEW = "+"


def rename_modules(graph: fx.Graph, prefixes: dict[str, str]) -> None:
    """Rename module paths in targets and metadata; temporary names of new blocks become their numbers."""
    known: dict[str, str] = {}  # most nodes share their module with others

    def renamed(path: str) -> str:
        if path not in known:
            known[path] = renamed_path(path, prefixes)
        return known[path]

    for node in graph.nodes:
        if node.op == "get_attr":
            node.target = renamed(str(node.target))
        path = info_of(node).module_path
        if renamed(path) != path:
            note(node, module_path=renamed(path))


def renamed_path(name: str, prefixes: dict[str, str]) -> str:
    """``name`` with the longest matching prefix replaced; ``stack.+7`` becomes ``stack.7``."""
    parts = name.split(".")
    for i in range(len(parts), 0, -1):
        head = ".".join(parts[:i])
        if head in prefixes:
            return ".".join([prefixes[head], *parts[i:]])
        if parts[i - 1].startswith(NEW):
            return ".".join([*parts[: i - 1], parts[i - 1].removeprefix(NEW), *parts[i:]])
    return name
