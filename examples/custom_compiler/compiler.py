"""A small compiler: a front end, a pass manager with passes of several hands, and a back end.

``python -m examples.custom_compiler.compiler`` runs it on a model's graph from ``torch.export`` and from
``torch.fx.symbolic_trace``. fxgrow's growth passes stand between passes that know nothing of them, and the grown graph
goes on to ``torch.compile`` with a back end of the compiler's own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassBase, PassResult
from torch.fx.passes.infra.pass_manager import PassManager

import fxgrow
from fxgrow import passes
from fxgrow.ir.graphs import copy_graph
from fxgrow.weights.materialise import materialise_all

aten = torch.ops.aten


# passes of the compiler's own -----------------------------------------------------------------------------------------


class TanhOfTwice(PassBase):
    """``2 * sigmoid(2 * x) - 1`` is ``tanh(x)``: one op in the place of four."""

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        changed = False
        for node in list(graph_module.graph.nodes):
            x = _tanh_of(node)
            if x is None:
                continue
            with graph_module.graph.inserting_before(node):
                tanh = graph_module.graph.call_function(aten.tanh.default, (x,))
            tanh.meta = dict(node.meta)
            node.replace_all_uses_with(tanh)
            changed = True
        if changed:
            graph_module.graph.eliminate_dead_code()
            graph_module.recompile()
        return PassResult(graph_module, changed)


def _tanh_of(node: fx.Node) -> fx.Node | None:
    """The operand, where a node is the last one of the four."""
    if node.target != aten.sub.Tensor or node.args[1] != 1:
        return None
    twice = node.args[0]
    if not isinstance(twice, fx.Node) or twice.target != aten.mul.Tensor or twice.args[1] != 2:
        return None
    sigmoid = twice.args[0]
    if not isinstance(sigmoid, fx.Node) or sigmoid.target != aten.sigmoid.default:
        return None
    inner = sigmoid.args[0]
    if not isinstance(inner, fx.Node) or inner.target != aten.mul.Tensor or inner.args[1] != 2:
        return None
    return inner.args[0] if isinstance(inner.args[0], fx.Node) else None


@dataclass
class Census(PassBase):
    """Counts ops and changes nothing."""

    counts: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        super().__init__()

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        self.counts = Counter(str(n.target) for n in graph_module.graph.nodes if n.op == "call_function")
        return PassResult(graph_module, False)


class WithTensors(PassBase):
    """Gives a graph the grown weights: what a growth pass leaves to whoever keeps the weights."""

    def __init__(self, program: fxgrow.Program, plan: fxgrow.GrowthPlan) -> None:
        super().__init__()
        self.program, self.plan = program, plan

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        for name, tensor in materialise_all(self.plan, self.program.tensor):
            path, _, leaf = name.rpartition(".")
            holder = graph_module.get_submodule(path)
            learns = self.program.requires_grad.get(name, True)
            value = nn.Parameter(tensor, learns) if name in self.program.parameters else tensor
            setattr(holder, leaf, value)
        return PassResult(graph_module, True)


def exported_graph(model: nn.Module, args: tuple[Any, ...]) -> fx.GraphModule:
    """A model's graph by ``torch.export``, any size of the first dim, as a module whose mode can be set."""
    shapes = tuple({0: torch.export.Dim.AUTO} for _ in args)
    module = torch.export.export(model, args, dynamic_shapes=shapes).module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    return fx.GraphModule(module, module.graph)


# the compiler ---------------------------------------------------------------------------------------------------------


@dataclass
class Compiled:
    """What comes out.

    Attributes:
        module: the graph with its weights; trains like any module.
        run: it, by the back end.
        plan: what the growth decided.
        before, after: ops before the first and after the last pass.
    """

    module: fx.GraphModule
    run: Callable[..., Any]
    plan: fxgrow.GrowthPlan
    before: Counter[str]
    after: Counter[str]


class Compiler:
    """Front end, passes, back end.

    Args:
        spec: the growth.
        first, last: passes before and after it.
    """

    def __init__(self, spec: Any, first: Sequence[PassBase] = (), last: Sequence[PassBase] = ()) -> None:
        self.spec, self.first, self.last = spec, list(first), list(last)
        self.seen: list[int] = []

    def compile(self, module: fx.GraphModule, args: tuple[Any, ...]) -> Compiled:
        """Grow a module's graph and compile it.

        Args:
            module: of :func:`exported_graph` or of ``torch.fx.symbolic_trace``.
            args: example inputs.

        Raises:
            fxgrow.FxgrowError: it cannot be grown so.
        """
        before, after = Census(), Census()
        program = fxgrow.capture(module, args)
        flat = fx.GraphModule(module, copy_graph(program.graph))
        result = PassManager(passes=[before, *self.first])(flat)
        # the growth is planned on what the first passes made
        program = fxgrow.capture(result.graph_module, args)
        plan, _ = fxgrow.plan_growth(program, fxgrow.GrowthSpec.parse(self.spec))
        flat = fx.GraphModule(result.graph_module, copy_graph(program.graph))
        growing = [passes.PASSES[step.op][1](step) for step in plan.steps]
        grown = PassManager(passes=[*growing, WithTensors(program, plan), *self.last, after])(flat).graph_module
        return Compiled(grown, torch.compile(grown, backend=self.backend), plan, before.counts, after.counts)

    def backend(self, graph_module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """The last stage: here it notes how many nodes it was given, and runs them one by one."""
        self.seen.append(len(graph_module.graph.nodes))
        return graph_module.forward


# a run ----------------------------------------------------------------------------------------------------------------


class Model(nn.Module):
    """Somebody's model, with a tanh of his own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.first(x))
        return self.second(torch.sigmoid(x * 2) * 2 - 1)


def main() -> None:
    """Both front ends, one back end."""
    torch.manual_seed(0)
    model, x = Model().double(), torch.randn(4, 5, dtype=torch.float64)
    expected = model(x)
    fronts = {"torch.export": exported_graph(model, (x,)), "symbolic_trace": fx.symbolic_trace(model)}
    for name, module in fronts.items():
        compiler = Compiler([{"op": "widen", "axis": "first.weight:0", "factor": 2}], first=[TanhOfTwice()])
        compiled = compiler.compile(module, (x,))
        out = compiled.run(x)
        out.sum().backward()
        error = float((out - expected).detach().abs().max())
        sizes = {n: tuple(p.shape) for n, p in compiled.module.named_parameters()}
        print(
            f"{name}: {sum(compiled.before.values())} ops, then {sum(compiled.after.values())}; "
            f"off by {error:.1e}; {sizes}"
        )


if __name__ == "__main__":
    main()
