"""Run a captured graph node by node, reading each tensor when it is first needed and dropping it after its last use.

Nothing is compiled, and no more tensors are alive than the op at hand needs: a model is run in float64 though its
weights do not fit there all at once. What happens at a node can be watched, or changed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from fxgrow.ir.memory import Memory
from fxgrow.ir.ops import schema_of
from fxgrow.ir.traits import Trait, is_dropout_probability, traits_of

#: called after each op with the node, its operands and its result; returns the result to go on with
After = Callable[[fx.Node, tuple[Any, ...], dict[str, Any], Any], Any]


def op_of(node: fx.Node) -> str:
    """``aten.add.Tensor`` -> ``add``; empty for what is no ATen op."""
    name = str(node.target)
    return name.split(".")[1] if name.startswith("aten.") else ""


@functools.cache
def _dropout_argument(target: Any) -> tuple[int, str] | None:
    """Place and name of an op's dropout probability; None where it has none."""
    schema = schema_of(target)
    if schema is None:
        return None
    for place, argument in enumerate(schema.arguments):
        if is_dropout_probability(schema, argument.name):
            return place, str(argument.name)
    return None


def drops_out(node: fx.Node) -> bool:
    """Whether an op is dropout, or attention or a recurrent layer with dropout inside."""
    argument = _dropout_argument(node.target)
    if argument is None:
        return False
    place, name = argument
    given = node.args[place] if len(node.args) > place else node.kwargs.get(name, 0.0)
    return isinstance(given, fx.Node) or bool(given)


def draws(node: fx.Node) -> bool:
    """Whether an op draws random numbers in train mode."""
    if _dropout_argument(node.target) is not None:
        return drops_out(node)
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def heeds_mode(graph: fx.Graph) -> bool:
    """Whether anything in a graph hangs on the module's mode; dropout with probability 0 does not."""
    return any(
        _dropout_argument(user.target) is None or drops_out(user)
        for n in graph.nodes
        if n.op == "get_attr" and n.target == "training"
        for user in n.users
    )


def _drawn(node: fx.Node) -> float | None:
    """What an op draws where nothing is left to chance: ``bernoulli`` keeps everything. None: it draws nothing."""
    traits = traits_of(node.target)
    return None if Trait.DRAWS not in traits else 1.0 if Trait.KEEPS in traits else 0.5


class Runner:
    """The graph of one call, ready to run.

    Args:
        graph: of ops; ``get_attr`` nodes are read by name, ``training`` is the mode.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.inputs = [n for n in graph.nodes if n.op == "placeholder"]
        self.reads = {str(n.target) for n in graph.nodes if n.op == "get_attr"}
        last: dict[fx.Node, fx.Node] = {}
        for node in graph.nodes:
            for operand in node.all_input_nodes:
                last[operand] = node
        frees: dict[fx.Node, list[fx.Node]] = {}
        for operand, node in last.items():
            frees.setdefault(node, []).append(operand)
        #: what to do, looked up once: op, what stands for a draw, where its dropout probability stands, what nobody
        #: reads afterwards
        self._steps = [
            (n, n.target, _drawn(n), _dropout_argument(n.target), tuple(frees.get(n, ())))
            for n in graph.nodes
            if n.op == "call_function"
        ]

    @functools.cached_property
    def written(self) -> set[str]:
        """Names of the parameters and buffers whose memory the graph may write into."""
        memory = Memory(self.graph)
        return {str(n.target) for n in self.graph.nodes if n.op == "get_attr" and memory.written(n)}

    def run(
        self,
        inputs: Sequence[Any],
        read: Callable[[str], torch.Tensor],
        *,
        training: bool,
        chance: bool = False,
        after: After | None = None,
    ) -> Any:
        """What the graph returns.

        Args:
            inputs: one for each placeholder.
            read: a parameter, buffer or constant by name.
            training: the value of the ``training`` flag.
            chance: let dropout drop and random numbers be random; else every dropout probability is 0, every draw is
                0.5 and ``bernoulli`` keeps everything. A grown model may draw more numbers than the old one, so that a
                seed is not enough.
            after: see :data:`After`.
        """
        env: dict[fx.Node, Any] = dict(zip(self.inputs, inputs, strict=True))

        def value(given: Any) -> Any:
            if isinstance(given, fx.Node):
                if given not in env and given.op == "get_attr":
                    env[given] = training if given.target == "training" else read(str(given.target))
                return env[given]
            if isinstance(given, list | tuple):
                return [value(g) for g in given]
            if isinstance(given, slice):
                return slice(value(given.start), value(given.stop), value(given.step))
            return given

        for node, op, drawn, dropout, done in self._steps:
            args = [value(a) for a in node.args]
            kwargs = {k: value(a) for k, a in node.kwargs.items()}
            if dropout is not None and not chance:
                place, key = dropout
                if len(args) > place:
                    args[place] = 0.0
                if key in kwargs:
                    kwargs[key] = 0.0
            result = op(*args, **kwargs)
            if not chance and drawn is not None:
                result.fill_(drawn)
            env[node] = result if after is None else after(node, tuple(args), kwargs, result)
            for operand in done:
                env.pop(operand, None)
        return fx.map_arg(self.graph.output_node().args[0], value)


class Tensors:
    """The tensors that a graph reads, made on demand.

    Args:
        make: a fresh tensor by name.
        written: names that keep what the graph writes into them.
        keep: hold every tensor after it was made; else only the written ones.
        trained: names that need a gradient.
    """

    def __init__(
        self,
        make: Callable[[str], torch.Tensor],
        written: set[str],
        *,
        keep: bool,
        trained: Mapping[str, bool] | None = None,
    ) -> None:
        self._make, self.written, self._keep, self._trained = make, written, keep, trained or {}
        self.held: dict[str, torch.Tensor] = {}

    def __call__(self, name: str) -> torch.Tensor:
        found = self.held.get(name)
        if found is None:
            found = self._make(name)
            if self._trained.get(name) and found.is_floating_point():
                found.requires_grad_()
            if self._keep or name in self.written:
                self.held[name] = found
        return found

    def state(self) -> dict[str, torch.Tensor]:
        """What the graph has written, by name."""
        return {n: t.detach() for n, t in self.held.items() if n in self.written}
