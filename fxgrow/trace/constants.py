"""Values that depend on no input and no weight, computed once."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from fxgrow.ir.memory import Memory, writes
from fxgrow.ir.nodes import meta_like
from fxgrow.ir.ops import OpOverload

#: a computed constant of more entries than this stays computed
_FOLD_LIMIT = 1 << 16


def fold_constants(graph: fx.Graph, constants: dict[str, torch.Tensor]) -> None:
    """Compute what depends on no input and no weight, such as ALiBi's slopes, once: constants grow, ``arange`` cannot.

    Tensors of one value stay as they are; their sizes follow by themselves.
    """
    memory = Memory(graph)
    values: dict[fx.Node, torch.Tensor] = {}
    numbers: set[fx.Node] = set()  # consecutive ones
    computed: dict[fx.Node, None] = {}  # from them, in the graph's order
    for node in graph.nodes:
        if node.op == "get_attr" and node.target in constants and not memory.written(node):
            values[node] = constants[node.target]
        if node.op != "call_function" or memory.written(node) or not _computable(node, values):
            continue
        try:
            values[node] = _compute(node, values)
        except (RuntimeError, TypeError, ValueError):
            continue
        if str(node.target).startswith(("aten.arange", "aten.linspace")):
            numbers.add(node)
        elif any(i in numbers or i in computed for i in node.all_input_nodes):
            computed[node] = None
    for node in [n for n in computed if values[n].dim() and any(u not in values for u in n.users)]:
        name = f"constant_{node.name}"
        constants[name] = values[node].detach().clone()
        with graph.inserting_before(next(iter(graph.nodes))):
            attribute = graph.get_attr(name)
        attribute.meta = meta_like(node, module_path="", call=0)
        node.replace_all_uses_with(attribute)


def _computable(node: fx.Node, values: Mapping[fx.Node, torch.Tensor]) -> bool:
    """Whether an op needs nothing but known constants, and always gives the same small tensor."""
    value = node.meta.get("val")
    if not isinstance(node.target, OpOverload) or node.target.namespace != "aten":
        return False
    if writes(node) or torch.Tag.nondeterministic_seeded in node.target.tags:
        return False
    if not isinstance(value, torch.Tensor) or not all(isinstance(s, int) for s in value.shape):
        return False
    return value.numel() <= _FOLD_LIMIT and all(i in values for i in node.all_input_nodes) and "empty" not in node.name


def _compute(node: fx.Node, values: Mapping[fx.Node, torch.Tensor]) -> torch.Tensor:
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values[n])
    if str(kwargs.get("device", "")).startswith("meta"):
        kwargs = {**kwargs, "device": torch.device("cpu")}
    with torch.no_grad():
        return node.target(*args, **kwargs)  # type: ignore[operator]
