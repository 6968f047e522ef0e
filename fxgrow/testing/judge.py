"""A brute-force judge of rules: grow an op's inputs in every way, run the real op, and hold the rule to its word.

For one op and one set of sample arguments, a program of that op alone is built. Every tensor argument of floating point
stands once for a parameter whose use decides how it grows, and once for an activation whose newborn entries hold what
the judge imposes (anything, zero, the mean of the others, or what a broadcast holds). For each axis the analysis finds
and each way of growing it, the rule's claim is executed: the copies in the results must equal the old entries, and
newborn entries what the rule says of them (:class:`~fxgrow.rules.base.Content`). A claim that does not hold is
*wrong*. A refusal, or a frozen axis, where growth by whole copies would have left the result as it was is *stricter*
than needed. The facts that a rule states of its op (that a call is linear, say) are held against the op as well.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from fxgrow.algebra import Axis, Expr, Leaf, Product, is_static, leaves, resolve
from fxgrow.analysis.axes import Axes
from fxgrow.analysis.relate import analyse
from fxgrow.errors import GrowthRefused
from fxgrow.ir import trees
from fxgrow.ir.draws import same_draws
from fxgrow.ir.dtypes import is_fine
from fxgrow.ir.graphs import copy_graph
from fxgrow.ir.memory import writes
from fxgrow.ir.nodes import meta_of
from fxgrow.ir.ops import OpOverload, operator_named, set_argument
from fxgrow.ir.traced import Traced
from fxgrow.passes.base import GrowthPass
from fxgrow.passes.changes import changes_of
from fxgrow.plan import FILL_CONSTANT, FILL_MEAN, FILL_RANDOM, FILL_ZERO, AxisMap, DimPlan, Rescale, Step
from fxgrow.proof.growth import GrowthProof
from fxgrow.proof.maps import dim_plan
from fxgrow.proof.outcome import Outcome
from fxgrow.proof.resize import size_edits
from fxgrow.proof.sums import UnequalCopies
from fxgrow.proof.ties import NUDGE, equal_almost
from fxgrow.rules.annotation import Content, Site
from fxgrow.rules.base import (
    RULES,
    casts,
    copies,
    detaches,
    factors,
    idempotent,
    implied_arguments,
    is_linear,
    jumping_operands,
    keeps_zero,
    picks,
    range_of,
    rule_of,
    selects,
    weights,
)
from fxgrow.rules.forms import Opaque
from fxgrow.rules.values import ANYTHING, Bound, Range
from fxgrow.trace.tracer import trace

#: largest relative error of a claim that holds, in float64; in a coarser dtype it is that dtype's rounding
LIMIT = 1e-9


@dataclass
class Sample:
    """Arguments of one call. Tensors of integers are inputs, whose dims never grow, and once more buffers, which may.

    ``activations``: positions and names of arguments that are never parameters (the input of a batch norm, say).
    ``unchecked``: the op reads out of bounds where sizes do not fit, so that refusals are not tried by brute force.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    activations: tuple[int | str, ...] = ()
    unchecked: bool = False

    def __init__(
        self, *args: Any, activations: Iterable[int | str] = (), unchecked: bool = False, **kwargs: Any
    ) -> None:
        self.args, self.kwargs, self.activations, self.unchecked = args, kwargs, tuple(activations), unchecked


@dataclass(frozen=True)
class Finding:
    """One thing that a rule got wrong, or refused without need."""

    op: str
    axis: str
    growth: str
    detail: str

    def __str__(self) -> str:
        return f"{self.op}: {self.axis}, {self.growth}: {self.detail}"


@dataclass
class Report:
    """What the judge found. ``accepted`` and ``refused`` count the growths that the rule claimed or declined."""

    wrong: list[Finding] = field(default_factory=list)
    strict: list[Finding] = field(default_factory=list)
    accepted: int = 0
    refused: int = 0

    def __iadd__(self, other: Report) -> Report:
        self.wrong += other.wrong
        self.strict += other.strict
        self.accepted += other.accepted
        self.refused += other.refused
        return self


def check(op: Any, samples: Iterable[Sample]) -> Report:
    """Judge the rules that an op (an overload, its name, or a function of tensors) goes through.

    Args:
        op: an ``OpOverload``, a name such as ``"aten.linear.default"``, or a callable, which is exported.
        samples: calls to judge it by; float64 tensors are expected.
    """
    if isinstance(op, str):
        op = operator_named(op)
    report = Report()
    for sample in samples:
        report += _Judge(op, sample).run()
        if any(_whole(t) for t in trees.tensors_in((sample.args, sample.kwargs))):
            report += _Judge(op, sample, buffers=True).run()
    return report


# programs of one op -------------------------------------------------------------------------------------------------


def _single(op: Any, sample: Sample, buffers: bool) -> tuple[fx.Graph, dict[str, Tensor], list[fx.Node]]:
    """A graph of one call; tensor arguments become ``get_attr`` nodes, integer ones placeholders or buffers, too."""
    graph = fx.Graph()
    tensors: dict[str, Tensor] = {}

    def node(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return type(value)(map(node, value)) if isinstance(value, list | tuple) else value
        name = f"t{len(tensors)}"
        tensors[name] = value
        fixed = _whole(value) and not buffers
        made = graph.placeholder(name) if fixed else graph.get_attr(name)
        made.meta = meta_of(value)
        return made

    args = tuple(node(a) for a in sample.args)
    kwargs = {k: node(v) for k, v in sample.kwargs.items()}
    result = op(*trees.clones(sample.args), **trees.clones(sample.kwargs))
    call = graph.call_function(op, args, kwargs)
    call.meta = meta_of(result)
    results = [call]
    if isinstance(result, list | tuple):
        results = []
        for i, value in enumerate(result):
            if isinstance(value, Tensor):
                part = graph.call_function(operator.getitem, (call, i))
                part.meta = meta_of(value)
                results.append(part)
    return graph, tensors, results


def _exported(
    f: Callable[..., Any], sample: Sample, _buffers: bool
) -> tuple[fx.Graph, dict[str, Tensor], list[fx.Node]]:
    """The graph of a function of tensors, through ``torch.export``."""
    tensors = {f"t{i}": a for i, a in enumerate(sample.args) if isinstance(a, Tensor)}

    class Call(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, value in tensors.items():
                self.register_buffer(name, value)

        def forward(self) -> Any:
            return f(
                *(getattr(self, f"t{i}") if isinstance(a, Tensor) else a for i, a in enumerate(sample.args)),
                **sample.kwargs,
            )

    graph = trace(Call().eval()).graph
    output = next(n for n in graph.nodes if n.op == "output")
    results = list(output.all_input_nodes)
    graph.erase_node(output)
    return graph, tensors, results


def _call(node: fx.Node, operands: Mapping[fx.Node, Any], given: Mapping[str, Any] | None = None) -> Any:
    """One op on other values of its operands, with some arguments given."""
    if given:
        node = fx.Graph().node_copy(node, lambda n: n)
        for name, value in given.items():
            set_argument(node, name, value)
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: trees.clones(operands[n]))
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _tensors(value: Any) -> list[Tensor]:
    return [x for x in (value if isinstance(value, list | tuple) else [value]) if isinstance(x, Tensor)]


def _from_the_end(numbers: Any) -> bool:
    """Whether numbers may count from the end, or are a mask, which has no entries for more."""
    if isinstance(numbers, Tensor):
        return numbers.dtype is torch.bool or bool((numbers < 0).any())
    return bool(numbers < 0)


def _real_or_complex(value: Any) -> bool:
    return isinstance(value, Tensor) and is_fine(value.dtype)


def _continuous(t: Tensor) -> bool:
    return t.is_floating_point() or t.is_complex()


def _whole(t: Tensor) -> bool:
    return not _continuous(t) and t.dtype is not torch.bool


def _identical(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same numbers; one that is none is the same as another."""
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def _execute(graph: fx.Graph, tensors: Mapping[str, Tensor], results: Sequence[str]) -> list[Tensor]:
    """Run a graph node by node."""
    env: dict[fx.Node, Any] = {}
    with same_draws():  # an op that draws draws the same as long as its sizes are
        for node in graph.nodes:
            if node.op in ("placeholder", "get_attr"):
                env[node] = tensors[str(node.target)].clone()
            elif node.op == "call_function":
                args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: env[n])
                env[node] = node.target(*args, **kwargs)
    byname = {n.name: v for n, v in env.items()}
    return [byname[r] for r in results]


def _program(graph: fx.Graph, tensors: dict[str, Tensor]) -> Traced:
    attributes = {str(n.target) for n in graph.nodes if n.op == "get_attr"}
    own = {n: t for n, t in tensors.items() if n in attributes}
    return Traced(
        graph=graph,
        parameters={n: t for n, t in own.items() if _continuous(t)},
        buffers={n: t for n, t in own.items() if not _continuous(t)},
        constants={},
        aliases={},
        persistent=set(),
        requires_grad={},
        module_types={},
        class_name="Judged",
        training=False,
        mode_reason="",
        args=(),
        kwargs={},
    )


class _Observed:
    """The ranges of a call's operands, as they are."""

    def __init__(self, operands: Mapping[fx.Node, Any]) -> None:
        self.operands = operands

    def of(self, value: Any) -> Range:
        if isinstance(value, fx.Node):
            return self.range(self.operands[value])
        return Range(value, value) if isinstance(value, int | float) else ANYTHING

    def size(self, value: Any) -> Bound:
        found = self.of(value)
        return found.low if found.low == found.high else None

    @staticmethod
    def range(value: Any) -> Range:
        if not isinstance(value, Tensor) or value.is_complex():
            return ANYTHING
        numbers = value[~value.isnan()]
        return Range(numbers.min().item(), numbers.max().item()) if numbers.numel() else ANYTHING


# the judge ----------------------------------------------------------------------------------------------------------


@dataclass
class _Case:
    """One way of growing: the map, who is an activation, and what activations hold in newborn entries."""

    words: str
    growth: AxisMap
    activations: frozenset[str]
    content: Content


class _Judge:
    def __init__(self, op: Any, sample: Sample, buffers: bool = False) -> None:
        single = isinstance(op, OpOverload)
        self.buffers = buffers
        self.graph, self.tensors, nodes = (_single if single else _exported)(op, sample, buffers)
        self.results = [n.name for n in nodes]
        self.op = str(op) if single else getattr(op, "__name__", str(op))
        self.sample = sample
        self.program = _program(self.graph, self.tensors)
        self.random = torch.Generator().manual_seed(0)
        self.report = Report()

    @functools.cached_property
    def axes(self) -> Axes:
        return analyse(self.program)

    def run(self) -> Report:
        self._check_facts()
        axes = self.axes
        for axis in self._axes(axes):
            for case in self._cases(axis):
                self._judge(axes, axis, case)
        return self.report

    def _axes(self, axes: Axes) -> list[Axis]:
        found: dict[int, Axis] = {}
        for dims in axes.tensor_dims().values():
            for dim in dims:
                for leaf in leaves(resolve(dim)):
                    if isinstance(leaf, Axis) and is_static(leaf.size):
                        found.setdefault(leaf.id, leaf)
        return list(found.values())

    def _cases(self, axis: Axis) -> Iterator[_Case]:
        n = int(axis.size)
        names = [str(x.target) for x in self.graph.nodes if x.op == "get_attr" and self._carries(x, axis)]
        always = {f"t{i}" for i in self._positions(self.sample.activations)}
        optional = [x for x in names if x not in always][:3]
        maps = [
            ("2 copies", AxisMap.copy(n, 2 * n, "even")),
            ("2 copies, uneven", AxisMap.copy(n, 2 * n, "uneven")),
            ("copies of one unit", AxisMap.copy(n, n + 1, "even")),
            ("2 new units", AxisMap.add(n, n + 2, paired=False)),
            ("2 copies and a new unit", AxisMap.copy(n, 2 * n + 1, "even", "newborn")) if n > 1 else None,
            ("a pair of new units", AxisMap.add(n, n + 2, paired=True)),
        ]
        for chosen in [(), *((x,) for x in optional), tuple(optional)][: 2 + len(optional) * (len(optional) > 1)]:
            activations = frozenset(always | set(chosen) | set([] if optional else names))
            for entry in maps:
                if entry is None:
                    continue
                words, growth = entry
                for content in Content if growth.newborn else (Content.FREE,):
                    yield _Case(f"{words} ({content.value})", growth, activations, content)

    def _positions(self, which: Iterable[int | str]) -> list[int]:
        """Numbers of the tensors among the arguments named."""
        order: list[int | str] = []
        pairs: list[tuple[int | str, Any]] = [*enumerate(self.sample.args), *self.sample.kwargs.items()]
        for key, value in pairs:
            for item in value if isinstance(value, list | tuple) else [value]:
                if isinstance(item, Tensor):
                    order.append(key)
        return [i for i, key in enumerate(order) if key in which]

    def _carries(self, node: fx.Node, axis: Axis) -> bool:
        dims = self.axes.tensor_dims().get(str(node.target), [])
        return any(leaf is axis for dim in dims for leaf in leaves(dim))

    # facts --------------------------------------------------------------------------------------------------------

    def _check_facts(self) -> None:
        """What the rules say of their ops, whatever grows."""
        for node in self.graph.nodes:
            rule = rule_of(node)
            if rule is None:
                continue
            if is_linear(node):
                self._check_linear(node, node.all_input_nodes, "said to be linear")
            if weights(node):
                self._check_linear(node, weights(node), "said to be linear in its weights")
            for operand in factors(node):
                self._check_zero(node, [operand], f"said to be zero where its operand {operand.name} is")
            if selects(node):
                self._check_selects(node)
            self._check_picks(node)
            if rule.value is not None or rule.range is not None:
                self._check_range(node)
            if rule.implied:
                self._check_implied(node)
            if not isinstance(rule, Opaque) and not jumping_operands(node):
                self._check_smooth(node)
            if keeps_zero(node) and not is_linear(node):
                self._check_zero(node, node.all_input_nodes, "said to keep zeros")
            if casts(node) or copies(node):
                self._check_copies(node)
            if idempotent(node):
                self._check_idempotent(node)

    def _check_linear(self, node: fx.Node, operands: Sequence[fx.Node], said: str) -> None:
        first, second = self._operands(node), self._operands(node)
        second = {n: self._drawn_like(v) if n in operands else v for n, v in second.items()}
        sum_of_two = dict(first)
        for n in operands:
            if _real_or_complex(first[n]):
                sum_of_two[n] = 2 * first[n] - 3 * second[n]
        a, b, both = (_tensors(_call(node, x)) for x in (first, second, sum_of_two))
        for x, y, z in zip(a, b, both, strict=True):
            if _real_or_complex(z) and not _close(2 * x - 3 * y, z):
                self._fact_wrong(node, f"{said}, and is not")
            if not _real_or_complex(z) and not torch.equal(x, z):
                self._fact_wrong(node, f"{said}, with a result that counts and depends on values")

    def _check_zero(self, node: fx.Node, operands: Sequence[fx.Node], said: str) -> None:
        values = self._operands(node)
        zeros = {n: torch.zeros_like(values[n]) for n in operands if _real_or_complex(values[n])}
        if zeros and any(bool(result.count_nonzero()) for result in _tensors(_call(node, values | zeros))):
            self._fact_wrong(node, f"{said}, and is not")

    def _check_selects(self, node: fx.Node) -> None:
        operands = self._operands(node)
        numbers = [v.flatten() for v in operands.values() if _real_or_complex(v)]
        for result in _tensors(_call(node, operands)):
            if numbers and _real_or_complex(result) and not torch.isin(result, torch.cat(numbers)).all():
                self._fact_wrong(node, "said to pick entries of its operand, and gives others")

    def _check_smooth(self, node: fx.Node) -> None:
        """Numbers many of which are equal, or whole, give almost the same results when they are nudged."""
        for _ in range(10):
            operands = self._operands(node)
            near = dict(operands)
            places = torch.randint(0, 5, (64,), generator=self.random)  # one draw for all operands, which so meet
            for n, v in operands.items():
                if _real_or_complex(v):
                    values = torch.tensor([0.0, 0.5, 1.0, -1.0, 2.0])[places].to(v.dtype)
                    operands[n] = values.repeat(-(-v.numel() // 64))[: v.numel()].view(v.shape)
                    near[n] = operands[n] + (NUDGE * self._drawn_like(v).real.sign()).to(v.dtype)
            if not any(map(_real_or_complex, operands.values())):
                return
            results = (_tensors(_call(node, x)) for x in (operands, operands, near))
            for a, same, b in zip(*results, strict=True):
                unset = not equal_almost(a, same)  # memory that the op leaves as it was
                if not unset and not equal_almost(a, b):
                    self._fact_wrong(node, "its result jumps where numbers are equal, and its rule does not say so")
                    return

    def _check_picks(self, node: fx.Node) -> None:
        """Further entries, after those of a dim that numbers pick from, change nothing."""
        operands = self._operands(node)
        before = _tensors(_call(node, operands))
        for one in picks(node):
            table, numbers = operands[one.operand], one.first if one.numbers is None else one.numbers
            counted = operands[numbers] if isinstance(numbers, fx.Node) else numbers
            if counted is None or not table.dim() or _from_the_end(counted):
                continue
            more = torch.cat([table, self._drawn_like(table).narrow(one.dim, 0, 1)], one.dim)
            try:
                after = _tensors(_call(node, {**operands, one.operand: more}))
                if writes(node):  # the table is the result
                    after = [x.narrow(one.dim, 0, table.shape[one.dim]) for x in after]
            except (RuntimeError, IndexError) as error:
                self._fact_wrong(node, f"said to pick entries of dim {one.dim} by number, and fails with more: {error}")
                continue
            if not all(map(_close, before, after)):
                self._fact_wrong(node, f"said to pick entries of dim {one.dim} by number, and uses others")

    def _check_range(self, node: fx.Node) -> None:
        """Every entry of the result is what the rule says, whatever the operands hold."""
        for sign in (None, 1, -1):
            operands = self._operands(node)
            for n, v in operands.items() if sign is not None else ():
                if _real_or_complex(v) and not v.is_complex():
                    operands[n] = sign * v.abs()
            results = _tensors(_call(node, operands))
            found = range_of(node, _Observed(operands))
            if len(results) == 1 and not results[0].isnan().all() and not found.holds(_Observed.range(results[0])):
                self._fact_wrong(node, f"its entries are said to be from {found.low} to {found.high}, and are not")
                return

    def _check_copies(self, node: fx.Node) -> None:
        """The operand's numbers, its gradient, and for copies its dtype."""
        operands, first = self._operands(node), node.all_input_nodes[0]
        source = operands[first]
        (result,) = _tensors(_call(node, operands))
        if not _identical(result, source.to(result.dtype)):
            self._fact_wrong(node, "said to hold its operand's numbers, and does not")
        if copies(node) and result.dtype != source.dtype:
            self._fact_wrong(node, f"said to be a copy, and makes {result.dtype} of {source.dtype}")
        if _continuous(source) and copies(node):
            followed = source.clone().requires_grad_()
            args, kwargs = fx.map_arg(
                (node.args, dict(node.kwargs)), lambda n: followed.clone() if n is first else operands[n]
            )
            if node.target(*args, **kwargs).requires_grad is detaches(node):  # type: ignore[operator]
                self._fact_wrong(node, f"its gradient {'passes' if detaches(node) else 'does not pass'} through")

    def _check_idempotent(self, node: fx.Node) -> None:
        """Twice is once: for the sample, and for numbers of several sizes."""
        for size in (None, 1e-3, 1.0, 100.0):
            operands = self._operands(node)
            if size is not None:
                operands = {n: size * self._drawn_like(v) if _real_or_complex(v) else v for n, v in operands.items()}
            (result,) = _tensors(_call(node, operands))
            (again,) = _tensors(_call(node, {**operands, node.all_input_nodes[0]: result}))
            if not _identical(again, result):
                self._fact_wrong(node, "said to be idempotent, and is not")

    def _check_implied(self, node: fx.Node) -> None:
        """Spelled out or not, in every dtype, for small numbers, large ones, and ones that are not finite."""
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            for size in (1e-4, 1e4, math.inf):
                operands = {
                    n: (v * size).to(dtype) if _real_or_complex(v) else v for n, v in self._operands(node).items()
                }
                for n in operands:
                    n.meta["val"] = operands[n]
                implied = implied_arguments(node)
                (left,), (spelled,) = _tensors(_call(node, operands)), _tensors(_call(node, operands, implied))
                if not torch.equal(left.nan_to_num(), spelled.nan_to_num()):
                    self._fact_wrong(node, f"in {dtype} its arguments are not {implied} where they are left out")
        for n, v in self._operands(node).items():
            n.meta["val"] = v

    def _operands(self, node: fx.Node) -> dict[fx.Node, Any]:
        """The values of a node's operands, for the sample."""
        names = [n.name for n in node.all_input_nodes]
        return dict(zip(node.all_input_nodes, _execute(self.graph, self.tensors, names), strict=True))

    def _drawn_like(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or not _real_or_complex(value):
            return value
        return torch.randn(value.shape, generator=self.random, dtype=torch.float64).to(value.dtype)

    def _fact_wrong(self, node: fx.Node, detail: str) -> None:
        self.report.wrong.append(Finding(str(node.target), "all", "as it is", detail))

    # one case -------------------------------------------------------------------------------------------------------

    def _judge(self, axes: Axes, axis: Axis, case: _Case) -> None:
        tensors = self._constant_along(axes, axis, case)
        if tensors is None:
            return
        old = _execute(self.graph, tensors, self.results)
        name = f"axis of size {axis.size} in {self._where(axes, axis)}"
        if axis.frozen is not None:
            self._too_strict(axes, axis, case, tensors, old, name, str(axis.frozen))
            return
        proof = GrowthProof(axes, axis, name, case.growth)
        for site in self._sites(axes, axis):
            if site[0] in case.activations:
                proof.impose(site, case.content, "the judge")
        try:
            outcome = proof.run()
            edits = size_edits(axes, axis, case.growth.new, lambda node, why: GrowthRefused(why))
        except GrowthRefused as refusal:
            self.report.refused += 1
            if not isinstance(refusal, UnequalCopies):
                self._too_strict(axes, axis, case, tensors, old, name, str(refusal))
            return
        except Exception as error:
            self._wrong(name, case, f"re-emitting its literals fails: {type(error).__name__}: {error}")
            return
        self.report.accepted += 1
        try:
            new = self._grown(axes, axis, outcome, proof, edits, tensors)
        except Exception as error:
            self._wrong(name, case, f"the grown op fails: {type(error).__name__}: {error}")
            return
        finite = all(bool(t.isfinite().all()) for t in tensors.values())
        for result, before, after in zip(self.results, old, new, strict=True):
            node = next(n for n in self.graph.nodes if n.name == result)
            dims = proof.context.dims_of(node)
            problem = _compare(dims, axis, case.growth, before, after, finite)
            if problem:
                self._wrong(name, case, f"{result}: {problem}")

    def _wrong(self, name: str, case: _Case, detail: str) -> None:
        acting = ", ".join(sorted(case.activations)) or "none"
        self.report.wrong.append(Finding(self.op, name, f"{case.words}, activations {acting}", detail))

    def _where(self, axes: Axes, axis: Axis) -> str:
        return ", ".join(f"{s[0]}:{s[1]}" for s in self._sites(axes, axis))

    def _sites(self, axes: Axes, axis: Axis) -> list[Site]:
        out = []
        for name, dims in axes.tensor_dims().items():
            for i, dim in enumerate(dims):
                count = sum(leaf is axis for leaf in leaves(resolve(dim)))
                out += [(name, i, k) for k in range(count)]
        return out

    def _constant_along(self, axes: Axes, axis: Axis, case: _Case) -> dict[str, Tensor] | None:
        """The sample, its activations made constant along the axis where a broadcast is what they stand for.

        None where the imposed content makes no sense for a part of a dim.
        """
        if not case.growth.newborn or case.content not in (Content.CONST, Content.MEAN):
            return self.tensors
        out = dict(self.tensors)
        for name, i, _ in self._sites(axes, axis):
            if name not in case.activations:
                continue
            if resolve(axes.tensor_dims()[name][i]) is not axis or not _continuous(out[name]):
                return None
            if case.content is Content.CONST:
                out[name] = out[name].mean(i, keepdim=True).expand_as(out[name]).contiguous()
        return out

    def _grown(
        self,
        axes: Axes,
        axis: Axis,
        outcome: Outcome,
        proof: GrowthProof,
        edits: Sequence[Any],
        tensors: Mapping[str, Tensor],
    ) -> list[Tensor]:
        def fill(site: Site) -> int:
            content = proof.contents.pinned.get(site, outcome.carriers.get(site, Content.FREE))
            if content is Content.ZERO:
                return FILL_ZERO
            if content in (Content.MEAN, Content.CONST):
                return FILL_MEAN
            return FILL_CONSTANT if site[0] in outcome.constants else FILL_RANDOM

        grown = dict(tensors)
        for name, dims in axes.tensor_dims().items():
            for i, dim in enumerate(dims):
                if any(leaf is axis for leaf in leaves(resolve(dim))):
                    plan = dim_plan(dim, name, i, axis, outcome, fill)
                    constant = outcome.constants.get(name, 0.0)
                    grown[name] = self._materialise(grown[name], i, plan, constant)
            if name in outcome.scales:
                grown[name] = grown[name] * outcome.scales[name].factor
        graph = copy_graph(self.graph)
        changes = changes_of(graph, outcome, edits)
        GrowthPass(Step(op="judge", request={})).change(graph, changes)
        scaled = {c.node: c.name for c in changes if isinstance(c, Rescale) and c.user is None}
        return _execute(graph, grown, [scaled.get(n, n) for n in self.results])

    def _materialise(self, t: Tensor, dim: int, plan: DimPlan, constant: float) -> Tensor:
        """Plainly: take, share, fill. Entries with one newborn id are the same but for a reader's sign."""
        index = torch.from_numpy(np.maximum(plan.index, 0))
        shape = [-1 if i == dim else 1 for i in range(t.dim())]
        out = t.index_select(dim, index)
        if plan.split is not None and _continuous(t):
            out = out * torch.from_numpy(plan.split).view(shape)
        drawn: dict[int, Tensor] = {}
        for k in np.flatnonzero(plan.index < 0):
            code = FILL_ZERO if plan.fill is None else int(plan.fill[k])
            entry = out.select(dim, int(k))
            if code == FILL_ZERO:
                entry.zero_()
            elif code == FILL_MEAN and _continuous(t):
                entry.copy_(t.mean(dim))
            elif code == FILL_CONSTANT:
                entry.fill_(constant)
            else:
                ident = int(plan.index[k])
                if ident not in drawn:
                    drawn[ident] = self._drawn(t, entry.shape)
                entry.copy_(drawn[ident])
        return out

    def _drawn(self, like: Tensor, shape: torch.Size) -> Tensor:
        """Numbers such as a tensor holds: whole ones are among those that it has, as they may be indices."""
        if _whole(like):
            return torch.randint(int(like.min()), int(like.max()) + 1, shape, generator=self.random)
        drawn = torch.randn(shape, generator=self.random, dtype=torch.float64)
        return drawn if _continuous(like) else drawn > 0

    def _too_strict(
        self, axes: Axes, axis: Axis, case: _Case, tensors: Mapping[str, Tensor], old: list[Tensor], name: str, why: str
    ) -> None:
        """Whether growing every activation by whole copies would have been exact after all."""
        if (
            self.sample.unchecked
            or self.buffers  # more indices than an op has room for are read out of bounds
            or case.words != "2 copies (free)"
            or len(case.activations) < len({s[0] for s in self._sites(axes, axis)})
        ):
            return
        if any(finding.axis == name for finding in self.report.strict):
            return
        grown = dict(tensors)
        for tensor, dims in axes.tensor_dims().items():
            for i, dim in enumerate(dims):
                if any(leaf is axis for leaf in leaves(resolve(dim))):
                    plan = dim_plan(dim, tensor, i, axis, Outcome(case.growth), lambda _: FILL_ZERO)
                    grown[tensor] = self._materialise(grown[tensor], i, plan, 0.0)
        try:
            new = _execute(self.graph, grown, self.results)
        except Exception:
            return  # literals would have to follow, so nothing can be said
        if all(_gathered(a, b, case.growth) for a, b in zip(old, new, strict=True)):
            self.report.strict.append(Finding(self.op, name, case.words, why))


def _gathered(old: Tensor, new: Tensor, growth: AxisMap) -> bool:
    """Whether a result is unchanged, or has some of its dims repeated as the axis was."""
    if old.dim() != new.dim() or not _continuous(old):
        return False
    for i, (a, b) in enumerate(zip(old.shape, new.shape, strict=True)):
        if a != b:
            if (a, b) != (growth.old, growth.new):
                return False
            old = old.index_select(i, torch.from_numpy(growth.index))
    return _close(old, new)


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    if a.is_complex():
        return b.is_complex() and _close(torch.view_as_real(a.resolve_conj()), torch.view_as_real(b.resolve_conj()))
    if not a.is_floating_point():
        return torch.equal(a, b)
    limit = max(LIMIT, 8 * torch.finfo(a.dtype).eps)
    a, b = a.double(), b.double()
    same = (a == b) | (a.isnan() & b.isnan())
    difference = torch.where(same, torch.zeros_like(a), (a - b).abs())
    finite = a[a.isfinite()]
    scale = float(finite.abs().max()) if finite.numel() else 1.0
    return not difference.numel() or float(difference.max()) <= limit * max(scale, 1.0)


_Entries = tuple[np.ndarray, np.ndarray]  # old index or -1; content of newborn entries as a number, -1 elsewhere
_CONTENTS = list(Content)


def _entries(dim: Expr, axis: Axis, growth: AxisMap) -> _Entries:
    """What a rule claims of every entry along one dim of a result."""
    if isinstance(dim, Axis | Leaf):
        owner = dim.axis if isinstance(dim, Leaf) else dim
        if owner is not axis:
            n = int(owner.size)
            return np.arange(n), np.full(n, -1)
        claim = dim.info.content if isinstance(dim, Leaf) else Content.FREE
        new = growth.index < 0
        return np.where(new, -1, growth.index), np.where(new, _CONTENTS.index(claim), -1)
    if isinstance(dim, Product):
        index, content, size = np.zeros(1, np.int64), np.full(1, -1), 1
        for f in dim.factors:
            i, c = _entries(f, axis, growth)
            n = _old_size(f)
            both = (index[:, None] >= 0) & (i[None, :] >= 0)
            pair = np.maximum(content[:, None], c[None, :])
            twice = (content[:, None] >= 0) & (c[None, :] >= 0)
            zero = _CONTENTS.index(Content.ZERO)
            either = (content[:, None] == zero) | (c[None, :] == zero)
            pair = np.where(twice, np.where(either, zero, _CONTENTS.index(Content.FREE)), pair)
            index = np.where(both, index[:, None] * n + i[None, :], -1).reshape(-1)
            content, size = pair.reshape(-1), size * n
        return index, content
    pieces = [(_entries(p, axis, growth), _old_size(p)) for p in dim.parts]
    offset, indices, contents = 0, [], []
    for (i, c), n in pieces:
        indices.append(np.where(i >= 0, i + offset, -1))
        contents.append(c)
        offset += n
    empty = [np.zeros(0, np.int64)]  # a part of no entries
    return np.concatenate(empty + indices), np.concatenate(empty + contents)


def _old_size(dim: Expr) -> int:
    if isinstance(dim, Axis | Leaf):
        return int(dim.size)
    if isinstance(dim, Product):
        return int(np.prod([_old_size(f) for f in dim.factors], dtype=np.int64))
    return sum(_old_size(p) for p in dim.parts)


def _compare(dims: Any, axis: Axis, growth: AxisMap, old: Tensor, new: Tensor, finite: bool = True) -> str:
    """What of a result contradicts its claimed dims; empty where nothing does.

    ``finite``: no operand holds an infinity (a mask does), so that results may not either.
    """
    if old.dtype != new.dtype:
        return f"the result is {new.dtype}, and was {old.dtype}"
    if dims is None or len(dims) != old.dim():
        return f"claims {len(dims or [])} dims of a result that has {old.dim()}"
    claims = [_entries(d, axis, growth) for d in dims]
    if [len(i) for i, _ in claims] != list(new.shape):
        return f"claims the shape {[len(i) for i, _ in claims]}, and the op gives {list(new.shape)}"
    kept, expected = new, old
    for k, (index, _) in enumerate(claims):
        here = torch.from_numpy(np.flatnonzero(index >= 0))
        kept = kept.index_select(k, here)
        expected = expected.index_select(k, torch.from_numpy(index[index >= 0]))
    if not _close(expected, kept):
        return "copies do not hold what the old entries held"
    if finite and new.is_floating_point() and old.isfinite().all() and not new.isfinite().all():
        return "new entries are not finite"
    for k, (index, content) in enumerate(claims):
        newborn = np.flatnonzero(index < 0)
        for entry in newborn:
            problem = _newborn(_CONTENTS[content[entry]], dims[k], axis, claims, k, int(entry), old, new)
            if problem:
                return problem
    return ""


def _newborn(
    content: Content, dim: Expr, axis: Axis, claims: list[_Entries], k: int, entry: int, old: Tensor, new: Tensor
) -> str:
    """Check one newborn slice against its claim, at the old entries of the other dims."""
    if content is Content.FREE or not _continuous(new):
        return ""
    part, whole = new.select(k, entry), old
    for j, (index, _) in enumerate(claims):
        if j != k:
            place = j if j < k else j - 1
            part = part.index_select(place, torch.from_numpy(np.flatnonzero(index >= 0)))
            whole = whole.index_select(j, torch.from_numpy(index[index >= 0]))
    if content is Content.ZERO:
        return "" if _close(torch.zeros_like(part), part) else "new entries said to be zero are not"
    if not (isinstance(dim, Leaf) and dim.axis is axis):
        return ""  # the mean over a part of a dim is never relied on
    if content is Content.CONST and not _close(whole.select(k, 0).unsqueeze(k).expand_as(whole), whole):
        return "said not to vary along the axis, and does"
    if not _close(whole.mean(k), part):
        return f"new entries said to hold the {content.value} do not"
    return ""


def unjudged(judged: Iterable[str]) -> list[str]:
    """Registered rules that no sample has exercised."""
    return sorted(set(RULES) - set(judged))


__all__ = ["Finding", "Report", "Sample", "check", "unjudged"]
