"""What a growth pass is: a planner that decides, and a :class:`torch.fx.passes.infra.pass_base.PassBase` that applies.

Planning turns one operation of a spec into a :class:`~fxgrow.plan.Step` (and tensor plans); the pass applies the
step's changes to a flat ATen graph. The pass alone can run inside another compiler's :class:`PassManager`.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from fxgrow.algebra import axes_of, size_of
from fxgrow.analysis.axes import Axes, AxisInfo
from fxgrow.analysis.relate import analyse
from fxgrow.devices import check_memory
from fxgrow.errors import GrowthRefused
from fxgrow.ir.graphs import copy_graph
from fxgrow.ir.ops import operator_named, schema_of, set_argument
from fxgrow.ir.sizes import sizes_of
from fxgrow.ir.traced import Traced
from fxgrow.limits import check_elements, check_units
from fxgrow.plan import Change, DimPlan, Edit, Rescale, Step, TensorPlan, resolve_references
from fxgrow.plugins import load_plugins
from fxgrow.spec import Operation


@dataclass
class State:
    """A growth being planned: the working graph, its axes, and the plan of every tensor so far.

    ``graph`` is a copy; the program it came from stays as it is.
    """

    program: Traced
    tensors: dict[str, TensorPlan]
    _axes: Axes | None = None
    counter: int = 0

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

    def structure_changed(self) -> None:
        """Modules were added: the axes have to be found anew."""
        self._axes = None

    def next_unique(self) -> int:
        self.counter += 1
        return self.counter

    def is_parameter(self, name: str) -> bool:
        return name in self.program.parameters

    def rename(self, f: Callable[[str], str]) -> None:
        """Rename modules everywhere but in the graph itself."""
        program = self.program
        self.tensors = {f(k): v for k, v in self.tensors.items()}
        program.parameters = {f(k): v for k, v in program.parameters.items()}
        program.buffers = {f(k): v for k, v in program.buffers.items()}
        program.aliases = {f(k): f(v) for k, v in program.aliases.items()}
        program.requires_grad = {f(k): v for k, v in program.requires_grad.items()}
        program.persistent = {f(k) for k in program.persistent}
        program.containers = {f(k): v for k, v in program.containers.items()}
        program.module_types = {f(k): v for k, v in program.module_types.items()}

    def order_blocks(self, stack: str) -> None:
        """Bring everything under a container into the order of its numbers; all else keeps its place."""
        program = self.program
        self.tensors = _ordered(self.tensors, stack)
        program.parameters = _ordered(program.parameters, stack)
        program.buffers = _ordered(program.buffers, stack)
        program.containers = _ordered(program.containers, stack)

    def check_room(self, info: AxisInfo, new: int) -> None:
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


def _ordered(table: dict[str, Any], stack: str) -> dict[str, Any]:
    prefix = stack + "." if stack else ""

    def number(name: str) -> int | None:
        head = name[len(prefix) :].partition(".")[0] if name.startswith(prefix) else ""
        return int(head) if head.isdigit() else None

    inside = sorted((n for n in table if number(n) is not None), key=lambda n: number(n) or 0)
    queue = iter(inside)
    return {n: table[n] for n in (next(queue) if number(name) is not None else name for name in list(table))}


class GrowthPass(PassBase):
    """Applies the changes of one planned step to a graph module.

    ``call`` edits ``graph_module.graph`` in place and reports whether anything changed. Parameters that do not exist
    yet are left as dangling ``get_attr`` targets, to be materialised from the plan's tensors. Passes that move modules
    need the graph's :class:`~fxgrow.ir.traced.Traced`, which ``graph_module.meta["fxgrow"]`` holds.
    """

    op = ""

    def __init__(self, step: Step, program: Traced | None = None) -> None:
        self.step, self.program = step, program

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        self.program = self.program or graph_module.meta.get("fxgrow")
        graph = graph_module.graph
        for change in self.step.changes:
            self.apply(graph, change)
        return PassResult(graph_module, bool(self.step.changes))

    def apply(self, graph: fx.Graph, change: Change) -> None:
        if isinstance(change, Edit):
            apply_edit(graph, change)
        elif isinstance(change, Rescale):
            apply_rescale(graph, change)
        else:
            raise GrowthRefused(f"pass {self.op} cannot apply a change of kind {change.kind}")


def node_named(graph: fx.Graph, name: str) -> fx.Node:
    for node in graph.nodes:
        if node.name == name:
            return node
    raise GrowthRefused(f"the graph has no node {name!r}; the plan belongs to another graph")


def apply_edit(graph: fx.Graph, edit: Edit, nodes: dict[str, fx.Node] | None = None) -> None:
    """Set arguments of a call, and its target where the plan changes it."""
    nodes = nodes if nodes is not None else {n.name: n for n in graph.nodes}
    node = nodes.get(edit.node)
    if node is None:
        raise GrowthRefused(f"the graph has no node {edit.node!r}; the plan belongs to another graph")
    times = functools.partial(_times, node)
    arguments = {k: resolve_references(v, nodes, times) for k, v in edit.arguments.items()}
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
    out.meta = {**before.meta, "val": size.meta["val"] * factor}
    for key in ("sizes", "result_sizes"):
        out.meta.pop(key, None)
    return out


def rescale(node: fx.Node, factor: float, name: str, user: str | None = None) -> Rescale:
    """The change that multiplies a node's value; one of whole numbers is divided."""
    value = node.meta.get("val")
    whole = isinstance(value, torch.Tensor) and not (value.is_floating_point() or value.is_complex())
    divisor = round(1 / factor) if whole else None
    return Rescale(node=node.name, factor=factor, divisor=divisor, name=name, user=user, why="constant")


def apply_rescale(graph: fx.Graph, change: Rescale, nodes: dict[str, fx.Node] | None = None) -> fx.Node:
    """Insert ``node * factor`` after a node and send its users, or the one that is named, there."""
    node = nodes[change.node] if nodes is not None else node_named(graph, change.node)
    target: Any = torch.ops.aten.mul.Tensor
    args: tuple[Any, ...] = (node, change.factor)
    kwargs: dict[str, Any] = {}
    if change.divisor is not None:
        target, args, kwargs = torch.ops.aten.div.Tensor_mode, (node, change.divisor), {"rounding_mode": "floor"}
    with graph.inserting_after(node):
        new = graph.create_node("call_function", target, args, kwargs, name=change.name)
    new.meta = dict(node.meta)
    new.meta["rescale"] = True
    only = (
        None if change.user is None else (nodes[change.user] if nodes is not None else node_named(graph, change.user))
    )
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new and only in (None, user))
    return new


def update_sizes(axes: Axes, touched: list[fx.Node]) -> None:
    """Write the dims' current sizes into the nodes' metadata."""
    for node in touched:
        dims = axes.dims.get(node)
        if dims is None:
            continue
        if dims and any(isinstance(d, list) or d is None for d in dims):
            node.meta["result_sizes"] = [None if d is None else [size_of(x) for x in d] for d in dims]
        elif sizes_of(node) is not None:
            node.meta["sizes"] = [size_of(d) for d in dims]


Planner = Callable[[State, Any], list[Step]]
PASSES: dict[str, tuple[Planner, type[GrowthPass]]] = {}


def register_pass(op: str, planner: Planner, growth_pass: type[GrowthPass]) -> None:
    """Teach fxgrow an operation: how it is decided, and how its changes are applied.

    Args:
        op: the operation's name in a spec; its pydantic class is registered with
            :func:`fxgrow.spec.register_operation`.
        planner: ``f(state, operation) -> steps``; decides, updates ``state.tensors`` and applies its own pass.
        growth_pass: applies a step's changes to a graph module.
    """
    PASSES[op] = (planner, growth_pass)


def run_operation(state: State, operation: Operation) -> list[Step]:
    """Plan one operation of a spec and apply it to the working graph."""
    load_plugins("fxgrow.passes")
    name = operation.op  # type: ignore[attr-defined]
    if name not in PASSES:
        raise GrowthRefused(f"no pass is registered for operation {name!r}; see fxgrow.passes.register_pass")
    planner, _ = PASSES[name]
    return planner(state, operation)


__all__ = [
    "PASSES",
    "GrowthPass",
    "State",
    "apply_edit",
    "apply_rescale",
    "axes_of",
    "copy_graph",
    "node_named",
    "operator_named",
    "register_pass",
    "rescale",
    "run_operation",
    "update_sizes",
]
