"""A traced model: one clean ATen graph with names, and the ways in which the model is called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from fxgrow.errors import CaptureError
from fxgrow.ir.guards import Guard, broken
from fxgrow.ir.modules import named_tensors
from fxgrow.ir.treespecs import take_apart


@dataclass
class Call:
    """One way of calling a model: its name, example inputs, and what tells it from the others.

    ``inputs`` are the forward parameters that take tensors, ``constants`` the values of those that do not.
    ``nested`` are the parameters that take a list, tuple or dict of them: each to its treespec (see
    :mod:`fxgrow.ir.treespecs`) and the names of its leaves. ``training`` is the mode it serves, None for both.
    ``sizes`` are those of the tensors, None in dims that may differ from call to call.
    ``guards`` are the conditions on them under which the graph is the model (see :mod:`fxgrow.ir.guards`).
    ``dtypes`` are those that inputs must have, of a graph that was cast.
    ``treespec`` describes what it returns where that is no plain tuple, list or dict; the graph then returns leaves.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: list[str] = field(default_factory=list)
    constants: dict[str, Any] = field(default_factory=dict)
    training: bool | None = None
    treespec: str | None = None
    nested: dict[str, tuple[str, list[str]]] = field(default_factory=dict)
    sizes: dict[str, list[int | None]] = field(default_factory=dict)
    guards: list[Guard] = field(default_factory=list)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)

    def flatten(self, given: Mapping[str, Any]) -> dict[str, Any] | None:
        """The arguments with nested ones taken apart; None where they are not built like the example's."""
        out = dict(given)
        for name, (treespec, names) in self.nested.items():
            found = take_apart(out.pop(name, None), treespec)
            if found is None:
                return None
            out |= dict(zip(names, found, strict=True))
        return out

    def fits(self, shapes: Mapping[str, Sequence[int]]) -> bool:
        """Whether the graph is for inputs of these shapes, by name."""
        for name, sizes in self.sizes.items():
            shape = shapes[name]
            if len(shape) != len(sizes) or any(s is not None and s != n for s, n in zip(sizes, shape, strict=True)):
                return False
        return broken(self.guards, shapes) is None

    @property
    def label(self) -> str:
        return self.name if self.training is None else f"{self.name}_{'train' if self.training else 'eval'}"

    def serves(self, training: bool | None) -> bool:
        """Whether the call's graph is that of the mode; None asks for any."""
        return self.training is None or training is None or self.training == training


@dataclass
class Traced:
    """A captured model.

    Attributes:
        graph: ATen ops; parameters, buffers and constants are ``get_attr`` nodes, inputs placeholders, and the output
            node holds the model's own output structure. ``node.meta["val"]`` is a fake tensor;
            :func:`fxgrow.ir.nodes.info_of` tells the module the op ran in, the user's line and more.
        parameters, buffers, constants: by name; the tensors are the model's own, not copies.
        aliases: further names of a tied parameter or buffer, to the name it is kept under.
        persistent: names of the buffers that are in the state dict.
        module_types: module path to class name, in order of first use.
        training: the mode the model was in.
        mode_reason: why train and eval have graphs of their own; empty where they share one.
        args, kwargs: the example inputs (clones), of the first call where there are several.
        calls: every way of calling the model that was captured. With several, the graph holds them side by side: the
            nodes know the number of their call, parameters are shared, the output node is a tuple.
        signature, defaults: the forward method's parameters in order, and the plain values they default to.
        members: names of the methods and attributes that the class has and a graph module lacks; empty where they are
            not known.
        twins: parameters that no call reads while another stands in for them, and that one: they grow alike.
        asks_dtype: the forward asks for dtypes of tensors: in another dtype its graph may be another.
    """

    graph: fx.Graph
    parameters: dict[str, torch.Tensor]
    buffers: dict[str, torch.Tensor]
    constants: dict[str, torch.Tensor]
    aliases: dict[str, str]
    persistent: set[str]
    requires_grad: dict[str, bool]
    module_types: dict[str, str]
    class_name: str
    training: bool
    mode_reason: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    containers: dict[str, str] = field(default_factory=dict)  # module path -> class name of the whole module tree
    calls: list[Call] = field(default_factory=list)
    signature: list[str] = field(default_factory=list)
    defaults: dict[str, Any] = field(default_factory=dict)
    members: frozenset[str] = frozenset()
    twins: dict[str, str] = field(default_factory=dict)
    asks_dtype: bool = True
    seconds: float = 0.0

    def tensor(self, name: str) -> torch.Tensor:
        """A parameter, buffer or constant by any of its names."""
        name = self.aliases.get(name, name)
        for table in (self.parameters, self.buffers, self.constants):
            if name in table:
                return table[name]
        raise KeyError(name)

    def without_tensors(self) -> Traced:
        """The same program with shapes in place of tensors, so that remembering it keeps no weights alive."""

        def empty(table: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {
                n: t if type(t) is torch.Tensor and t.is_meta else torch.empty_like(t, device="meta")
                for n, t in table.items()
            }

        return replace(
            self,
            parameters=empty(self.parameters),
            buffers=empty(self.buffers),
            constants=empty(self.constants),
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Traced:
        """Programs are not changed once they are made: copies share the graph."""
        return replace(self)

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        return {**self.parameters, **self.buffers, **self.constants}


def matching_calls(
    program: Traced, args: Sequence[Any], kwargs: Mapping[str, Any], training: bool | None = None
) -> list[int]:
    """Which calls take these arguments, by their place among the calls; of one mode or of any.

    The tensors given must be those of the example; every other argument, given or left at its default, must have the
    example's value, which is part of the graph.
    """
    calls, names = program.calls, program.signature
    asked = [n for n, c in enumerate(calls) if c.serves(training)]
    alone = len({c.name for c in calls}) == 1
    if len(args) > len(names):  # forward(*args)
        return asked if alone else []
    together = by_name(names, args, kwargs)
    found = []
    for number in asked:
        call, given = calls[number], calls[number].flatten(together)
        if given is None or {n for n, v in given.items() if isinstance(v, torch.Tensor)} != set(call.inputs):
            continue
        others = {n for n in (*given, *call.constants) if n not in call.inputs}
        here, there = {**program.defaults, **given}, {**program.defaults, **call.constants}
        if all(same_constant(here.get(n), there.get(n)) for n in others):
            found.append(number)
    if alone and not found and not any(isinstance(v, torch.Tensor) for v in together.values()):
        return [n for n in asked if not calls[n].inputs]
    return found


def by_name(names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What is given, by the parameters' names; what is one too many is left out."""
    given = args[: len(names)]
    # no zip with strict=: Dynamo of torch 2.9 fails where a graph breaks while one is at hand
    return {**{names[n]: value for n, value in enumerate(given)}, **kwargs}


def same_constant(a: Any, b: Any) -> bool:
    """Whether two plain values are the same argument: 2 is 2.0, and True is not "True"."""
    return a is b or (type(a) is type(b) and bool(a == b)) or (isinstance(a, int | float) and bool(a == b))


def program_of(module: fx.GraphModule, program: Traced) -> Traced:
    """A regenerated module's program with the module's present tensors."""
    own = named_tensors(module)
    missing = [n for n in program.tensors if n not in own]
    if missing:
        raise CaptureError(f"the regenerated module has lost {missing[0]!r}; rebuild it from its checkpoint")
    return replace(
        program,
        parameters={n: own[n] for n in program.parameters},
        buffers={n: own[n] for n in program.buffers},
        constants={n: own[n] for n in program.constants},
        requires_grad={n: own[n].requires_grad for n in program.parameters},
        training=module.training,
        seconds=0.0,
    )
