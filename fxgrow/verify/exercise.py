"""What no input exercised: branches not taken, factors that were zero, activations that let nothing through.

A comparison says nothing about a branch that no input reached. These are found while the small model runs.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from fxgrow.ir.nodes import info_of
from fxgrow.ir.ops import schema_of
from fxgrow.ir.traits import Trait, traits_of
from fxgrow.verify.execute import op_of

#: what is watched of an op
_WATCHED = frozenset({Trait.CONDITION, Trait.CHOICE, Trait.GATE, Trait.PRODUCT})

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
                    traits = traits_of(node.target)
                    if traits & _WATCHED:
                        self._seen[node] = set()
                        operands = sum(isinstance(a, fx.Node) for a in node.args[:3])
                        self._enough[node] = 1 if Trait.GATE in traits else operands if Trait.PRODUCT in traits else 2

    def after(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
        """Look at an op that ran."""
        seen = self._seen.get(node)
        if seen is None or len(seen) == self._enough.get(node):
            return result
        traits = traits_of(node.target)
        if Trait.CONDITION in traits:
            condition = args[_place_of_condition(node.target)]
            if len(seen) < 2 and isinstance(condition, torch.Tensor) and condition.numel():
                seen |= {"True"} if bool(condition.any()) else set()
                seen |= {"False"} if not bool(condition.all()) else set()
        elif Trait.CHOICE in traits:
            if len(seen) < 2 and result.numel():
                seen |= {"first"} if bool((args[0] != args[1]).logical_and(result == args[0]).any()) else set()
                seen |= {"second"} if bool((args[0] != args[1]).logical_and(result == args[1]).any()) else set()
        elif Trait.GATE in traits:
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
                place = info_of(node).source or info_of(node).module_path or node.name
                out[f"{op_of(node)} at {place}: {said}"] = None
        named = list(out)
        return named[:_NAMED] + ([f"and {len(named) - _NAMED} more places"] if len(named) > _NAMED else [])

    def _say(self, node: fx.Node, seen: set[str]) -> str:
        traits = traits_of(node.target)
        if Trait.CONDITION in traits:
            return "" if len(seen) == 2 else f"the condition was {next(iter(seen), 'empty')} everywhere"
        if Trait.CHOICE in traits:
            return "" if len(seen) == 2 else f"only the {next(iter(seen))} operand was ever chosen" if seen else ""
        if Trait.GATE in traits:
            return "" if seen else "every result was zero"
        zero = [i for i, a in enumerate(node.args[:3]) if isinstance(a, fx.Node) and str(i) not in seen]
        tensors = [i for i in zero if isinstance(node.args[i].meta.get("val"), torch.Tensor)]  # type: ignore[union-attr]
        return f"operand {', '.join(str(i + 1) for i in tensors)} was zero everywhere" if tensors else ""


@functools.cache
def _place_of_condition(target: Any) -> int:
    return next(i for i, a in enumerate(schema_of(target).arguments) if a.name in ("condition", "mask"))


def _any(t: torch.Tensor) -> bool:
    if t.numel() == 0:
        return False
    first = t[(0,) * t.dim()]
    return bool(first != 0) or bool((t != 0).any())
