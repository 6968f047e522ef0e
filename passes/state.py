"""A growth being planned: the graph as it is so far, its axes, and the plan of every tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from fxgrow.algebra import Axis, size_of
from fxgrow.analysis.axes import Axes, NamedAxis
from fxgrow.analysis.relate import analyse
from fxgrow.devices import check_memory
from fxgrow.errors import SpecError
from fxgrow.ir.graphs import copy_graph
from fxgrow.ir.nodes import info_of, note
from fxgrow.ir.sizes import sizes_of
from fxgrow.ir.traced import Traced
from fxgrow.limits import check_elements, check_units
from fxgrow.passes.base import registered
from fxgrow.plan import Change, DimPlan, Edit, Rescale, Step, TensorPlan, Unscale
from fxgrow.plugins import load_plugins
from fxgrow.spec import Extend, Operation, Widen


@dataclass
class State:
    """A growth being planned: the working graph, its axes, and the plan of every tensor so far.

    ``graph`` is a copy; the program it came from stays as it is. ``kept`` says why numbers of nodes, by name, could not
    be folded into weights (:mod:`fxgrow.passes.constants`).
    """

    program: Traced
    tensors: dict[str, TensorPlan]
    _axes: Axes | None = None
    counter: int = 0
    kept: dict[str, str] = field(default_factory=dict)

    @classmethod
    def start(cls, program: Traced) -> State:
        work = replace(program, graph=copy_graph(program.graph))
        for table in ("parameters", "buffers", "requires_grad", "aliases", "containers", "module_types"):
            setattr(work, table, dict(getattr(program, table)))
        work.calls = [replace(c) for c in program.calls]
        work.persistent = set(program.persistent)
        tensors = {
            name: TensorPlan(
                source=name,
                shape=list(t.shape),
                dims=[None] * t.dim(),
                requires_grad=program.requires_grad.get(name, False),
            )
            for name, t in program.tensors.items()
        }
        return cls(work, tensors)

    @property
    def graph(self) -> fx.Graph:
        return self.program.graph

    @property
    def axes(self) -> Axes:
        if self._axes is None:
            self._axes = analyse(self.program)
        return self._axes

    def apply(self, step: Step, changes: Sequence[Change], grown: Mapping[Axis, int] | None = None) -> None:
        """Record changes in a step, and make them in the working graph by the pass of its operation; the axes follow.

        Args:
            step: of an operation that has a pass; so the step does the same in anybody's pass manager.
            changes: further ones, in their order.
            grown: axes that take a new size with them.
        """
        before = set(self.graph.nodes) if any(isinstance(c, Rescale | Unscale) for c in changes) else set()
        _, growth_pass = registered(step.op)
        growth_pass(step, self.program).change(self.graph, changes)
        step.changes.extend(changes)
        if self._axes is None or not all(isinstance(c, Edit | Rescale | Unscale) for c in changes):
            self._axes = None  # there are other modules now: axes are found anew
            return
        axes = self._axes
        if before:
            added = [n for n in self.graph.nodes if n not in before and info_of(n).rescale]
            removed = before.difference(self.graph.nodes)
            axes = axes.with_nodes({n: n.all_input_nodes[0] for n in added}, removed)
        for axis, size in (grown or {}).items():
            axes = axes.resized(axis, size)
            _note_sizes(axes, axes.uses.get(axis.id, ()))
        self._axes = axes

    def analyse_again(self) -> None:
        """Find the axes anew: the graph ties others than before."""
        self._axes = None

    def next_unique(self) -> int:
        self.counter += 1
        return self.counter

    def is_parameter(self, name: str) -> bool:
        return name in self.program.parameters

    def rename(self, f: Callable[[str], str]) -> None:
        """Rename modules in everything that a :class:`~fxgrow.plan.Renumber` does not: the names of tensors."""
        program = self.program
        self.tensors = {f(k): v for k, v in self.tensors.items()}
        program.parameters = {f(k): v for k, v in program.parameters.items()}
        program.buffers = {f(k): v for k, v in program.buffers.items()}
        program.aliases = {f(k): f(v) for k, v in program.aliases.items()}
        program.requires_grad = {f(k): v for k, v in program.requires_grad.items()}
        program.persistent = {f(k) for k in program.persistent}
        program.module_types = {f(k): v for k, v in program.module_types.items()}

    def order_blocks(self, stack: str) -> None:
        """Bring everything under a container into the order of its numbers; all else keeps its place."""
        program = self.program
        self.tensors = _ordered(self.tensors, stack)
        program.parameters = _ordered(program.parameters, stack)
        program.buffers = _ordered(program.buffers, stack)
        program.containers = _ordered(program.containers, stack)

    def check_room(self, info: NamedAxis, new: int) -> None:
        """Whether there is memory for an axis of ``new`` units, from sizes alone: nothing is made yet.

        Raises:
            SpecError: the axis would have too many units, or the tensors along it do not fit.
        """
        check_units(info.name, info.size, new)
        needed: dict[torch.device, int] = {}
        for name, dim in {(m.tensor, m.dim) for m in info.members}:
            tensor, shape = self.program.tensor(name), list(self.tensors[name].shape)
            shape[dim] += new - info.size  # at least: a product with other axes grows by more
            check_elements(name, shape)
            if not tensor.is_meta:
                needed[tensor.device] = needed.get(tensor.device, 0) + math.prod(shape) * tensor.element_size()
        check_memory(needed)

    def compose(self, name: str, i: int, dim: DimPlan) -> None:
        """Put a dim's map on top of what the tensor's plan has."""
        self.tensors[name].grow(i, dim, self.next_unique() << 32)


def _note_sizes(axes: Axes, nodes: Sequence[fx.Node]) -> None:
    """Write the dims' sizes into the nodes' metadata."""
    for node in nodes:
        dims = axes.dims.get(node)
        if dims is None:
            continue
        if dims and any(isinstance(d, list) or d is None for d in dims):
            note(node, result_sizes=[None if d is None else [size_of(x) for x in d] for d in dims])
        elif sizes_of(node) is not None:
            note(node, sizes=[size_of(d) for d in dims])


def _ordered(table: dict[str, Any], stack: str) -> dict[str, Any]:
    prefix = stack + "." if stack else ""

    def number(name: str) -> int | None:
        head = name[len(prefix) :].partition(".")[0] if name.startswith(prefix) else ""
        return int(head) if head.isdigit() else None

    inside = sorted((n for n in table if number(n) is not None), key=lambda n: number(n) or 0)
    queue = iter(inside)
    return {n: table[n] for n in (next(queue) if number(name) is not None else name for name in list(table))}


def new_size(op: Widen | Extend, info: NamedAxis) -> int:
    """The size asked for.

    Raises:
        SpecError: it is no whole number, or smaller than the present one.
    """
    if op.to is not None:
        size = op.to
    elif op.by is not None:
        size = info.size + op.by
    else:
        assert op.factor is not None
        exact = info.size * op.factor
        check_units(info.name, info.size, exact)
        size = round(exact)
        if abs(exact - size) > 1e-6:
            raise SpecError(
                f"{info.name} has {info.size} units; factor {op.factor:g} makes {exact:g}, which is no whole number. "
                f"Use to: {int(exact)} or to: {int(exact) + 1}"
            )
    if size < info.size:
        raise SpecError(f"{info.name} has {info.size} units; {size} would shrink it, and fxgrow only grows")
    return size


def run_operation(state: State, operation: Operation) -> list[Step]:
    """Plan one operation of a spec and apply it to the working graph."""
    load_plugins("fxgrow.passes")
    planner, _ = registered(operation.op)  # type: ignore[attr-defined]
    return planner(state, operation)
