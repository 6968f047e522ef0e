"""What a growth pass is: a :class:`torch.fx.passes.infra.pass_base.PassBase` that applies a planned step's changes.

A planner turns one operation of a spec into :class:`~fxgrow.plan.Step` s and tensor plans (:mod:`fxgrow.passes.state`);
the pass applies the changes of a step to a flat ATen graph, also inside another compiler's :class:`PassManager`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from fxgrow.errors import GrowthRefused
from fxgrow.ir.graphs import NodesByName
from fxgrow.ir.provenance import provenance_of, remember
from fxgrow.ir.traced import Traced
from fxgrow.passes.changes import apply_edit, apply_rescale, apply_unscale, rename_modules, renamed_path
from fxgrow.plan import Change, Edit, Renumber, Rescale, Step, Unscale


class GrowthPass(PassBase):
    """Applies the changes of one planned step to a graph: the one way in which a growth reaches one.

    Planning applies them by ``State.apply``; in a pass manager ``call`` edits ``graph_module.graph`` in place and
    reports whether anything changed. Parameters that do not exist yet are left as dangling ``get_attr`` targets, to be
    materialised from the plan's tensors. Passes that move modules need the graph's
    :class:`~fxgrow.ir.traced.Traced`: ``program``, or what the graph module remembers (:mod:`fxgrow.ir.provenance`),
    whose module tree (``containers``) then follows the graph.

    A pass of another operation overrides :meth:`apply` where it has changes of its own.
    """

    op = ""

    def __init__(self, step: Step, program: Traced | None = None) -> None:
        self.step, self.program = step, program
        self._named: NodesByName | None = None

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        held, given = provenance_of(graph_module), self.program
        program = held.program if held is not None else given
        self.program = program and replace(program, containers=dict(program.containers))
        try:
            self.change(graph_module.graph, self.step.changes)
            if held is not None and self.program is not None:  # for the pass that comes next
                remember(graph_module, replace(held, program=self.program))
        finally:
            self.program = given
        return PassResult(graph_module, bool(self.step.changes))

    def change(self, graph: fx.Graph, changes: Sequence[Change]) -> None:
        """Apply changes, in their order."""
        for change in changes:
            self.apply(graph, change)

    def apply(self, graph: fx.Graph, change: Change) -> None:
        """Apply one change.

        Raises:
            GrowthRefused: the graph is not the one that was planned with, or the pass does not know such changes.
        """
        if isinstance(change, Edit):
            apply_edit(change, self.named(graph))
        elif isinstance(change, Rescale):
            apply_rescale(change, self.named(graph))
        elif isinstance(change, Unscale):
            apply_unscale(change, self.named(graph))
        elif isinstance(change, Renumber):
            rename_modules(graph, change.prefixes)
            program = self.traced()
            program.containers = {renamed_path(k, change.prefixes): v for k, v in program.containers.items()}
        else:
            raise GrowthRefused(f"pass {self.op} cannot apply a change of kind {change.kind}")

    def named(self, graph: fx.Graph) -> NodesByName:
        """Finds the nodes of a graph by name."""
        if self._named is None or self._named.graph is not graph:
            self._named = NodesByName(graph)
        return self._named

    def traced(self) -> Traced:
        """What the graph was traced from.

        Raises:
            GrowthRefused: nobody said.
        """
        if self.program is None:
            raise GrowthRefused(
                f"pass {self.op} moves modules, and needs the program that the graph is of: its second argument, or "
                "what fxgrow.ir.provenance.remember gave the graph module"
            )
        return self.program


Planner = Callable[..., list[Step]]
PASSES: dict[str, tuple[Planner, type[GrowthPass]]] = {}


def register_pass(op: str, planner: Planner, growth_pass: type[GrowthPass]) -> None:
    """Teach fxgrow an operation: how it is decided, and how its changes are applied.

    Args:
        op: the operation's name in a spec; its pydantic class is registered with
            :func:`fxgrow.spec.register_operation`.
        planner: ``f(state, operation) -> steps``; decides, sets the maps of ``state.tensors``, and changes the graph by
            ``state.apply``.
        growth_pass: applies a step's changes to a graph.
    """
    PASSES[op] = (planner, growth_pass)


def registered(op: str) -> tuple[Planner, type[GrowthPass]]:
    """The planner and the pass of an operation.

    Raises:
        GrowthRefused: it has none.
    """
    if op not in PASSES:
        raise GrowthRefused(f"no pass is registered for operation {op!r}; see fxgrow.passes.register_pass")
    return PASSES[op]
