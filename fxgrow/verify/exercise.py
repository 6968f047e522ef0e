"""What no input exercised: branches not taken, factors that were zero, activations that let nothing through.

A comparison says nothing about a branch that no input reached. These are found while the small model runs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from fxgrow.verify.execute import op_of

_CONDITIONS = {"where": 0, "masked_fill": 1, "masked_fill_": 1, "masked_scatter": 1, "masked_select": 1}
_CHOICES = ("maximum", "minimum")
_GATES = ("relu", "relu_", "relu6", "relu6_", "clamp", "clamp_", "clamp_min", "clamp_min_", "hardtanh", "hardtanh_")
_PRODUCTS = (
    "mul",
    "mul_",
    "matmul",
    "mm",
    "bmm",
    "linear",
    "addcmul",
    "baddbmm",
    "addmm",
    "conv1d",
    "conv2d",
    "conv3d",
)
#: so many lines are named
_NAMED = 6


class Exercise:
    """Watches runs of a model.

    Args:
        graphs: whose nodes are watched.
        relevant: names of the tensors that grow; what does not depend on them is not watched. All of it where empty.
    """

    def __init__(self, graphs: Iterable[fx.Graph], relevant: set[str]) -> None:
        #: by node, what has been seen of it
        self._seen: dict[fx.Node, set[str]] = {}
        #: by node, how much there is to see
        self._enough: dict[fx.Node, int] = {}
        for graph in graphs:
            touched: set[fx.Node] = set()
            for node in graph.nodes:
                own = node.op == "get_attr" and (not relevant or node.target in relevant)
                if own or any(i in touched for i in node.all_input_nodes):
                    touched.add(node)
                    name = op_of(node)
                    if name in _CONDITIONS or name in _CHOICES or name in _GATES or name in _PRODUCTS:
                        self._seen[node] = set()
                        operands = sum(isinstance(a, fx.Node) for a in node.args[:3])
                        self._enough[node] = 1 if name in _GATES else operands if name in _PRODUCTS else 2

    def after(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
        """Look at an op that ran."""
        seen = self._seen.get(node)
        if seen is None or len(seen) == self._enough.get(node):
            return result
        name = op_of(node)
        if name in _CONDITIONS:
            condition = args[_CONDITIONS[name]]
            if len(seen) < 2 and isinstance(condition, torch.Tensor) and condition.numel():
                seen |= {"True"} if bool(condition.any()) else set()
                seen |= {"False"} if not bool(condition.all()) else set()
        elif name in _CHOICES:
            if len(seen) < 2 and result.numel():
                seen |= {"first"} if bool((args[0] != args[1]).logical_and(result == args[0]).any()) else set()
                seen |= {"second"} if bool((args[0] != args[1]).logical_and(result == args[1]).any()) else set()
        elif name in _GATES:
            if "open" not in seen and bool((result != 0).any()):
                seen.add("open")
        else:
            for i, operand in enumerate(args[:3]):
                if str(i) not in seen and isinstance(operand, torch.Tensor) and _any(operand):
                    seen.add(str(i))
        return result

    def lines(self) -> list[str]:
        """One line for each place, by the user's source line; the first few, and how many more there are."""
        out: dict[str, None] = {}
        for node, seen in self._seen.items():
            said = self._say(node, seen)
            if said:
                place = node.meta.get("source") or node.meta.get("module_path") or node.name
                out[f"{op_of(node)} at {place}: {said}"] = None
        named = list(out)
        return named[:_NAMED] + ([f"and {len(named) - _NAMED} more places"] if len(named) > _NAMED else [])

    def _say(self, node: fx.Node, seen: set[str]) -> str:
        name = op_of(node)
        if name in _CONDITIONS:
            return "" if len(seen) == 2 else f"the condition was {next(iter(seen), 'empty')} everywhere"
        if name in _CHOICES:
            return "" if len(seen) == 2 else f"only the {next(iter(seen))} operand was ever chosen" if seen else ""
        if name in _GATES:
            return "" if seen else "every result was zero"
        zero = [i for i, a in enumerate(node.args[:3]) if isinstance(a, fx.Node) and str(i) not in seen]
        tensors = [i for i in zero if isinstance(node.args[i].meta.get("val"), torch.Tensor)]  # type: ignore[union-attr]
        return f"operand {', '.join(str(i + 1) for i in tensors)} was zero everywhere" if tensors else ""


def _any(t: torch.Tensor) -> bool:
    if t.numel() == 0:
        return False
    first = t[(0,) * t.dim()]
    return bool(first != 0) or bool((t != 0).any())
