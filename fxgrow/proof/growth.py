"""The proof: grow one axis through the whole graph, op by op, and decide what each parameter does about it.

The pass is an abstract interpretation. Every tensor's occurrence of the axis carries a :class:`Content`, what is known
of its newborn entries. Parameters that *write* the axis start out free; an op that needs more (a norm needs the mean,
a score needs zero keys) demands it of the writers that reach it, and the pass starts over with that pinned. Parameters
that *read* the axis are then given what makes the sum come out: shares for copies, zeros where newborn entries are not
zero already. If every op agrees, the growth is exact; else it is refused with the op, the source line and the reason.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import fx

from fxgrow.algebra import (
    Axis,
    Concat,
    Conflict,
    Expr,
    Leaf,
    Product,
    Size,
    Unifier,
    is_unit,
    leaves,
    map_leaves,
    product,
    quotient,
    size_of,
)
from fxgrow.analysis.axes import Axes
from fxgrow.analysis.call import CallContext, constant_value
from fxgrow.errors import GrowthRefused, Refusal
from fxgrow.ir.dtypes import is_fine
from fxgrow.ir.memory import returns_what_it_writes, writes
from fxgrow.ir.ops import bound_arguments, nodes_among, op_name
from fxgrow.ir.sizes import result_sizes, sizes_of
from fxgrow.plan import FILL_RANDOM, FILL_ZERO, AxisMap, DimPlan, Edit
from fxgrow.proof.ties import Ties
from fxgrow.rules.annotation import COMBINE, Content, Dims, Info, Site, annotate, flat_dims, infos
from fxgrow.rules.base import Rule, is_linear, moves, rule_of
from fxgrow.rules.reduction import reduced_dims
from fxgrow.rules.resize import Resize


class _Restart(Exception):
    """A demand was recorded; interpret again."""


class UnequalCopies(GrowthRefused):
    """Refused because units have different numbers of copies; whole copies plus newborn units may still do."""


@dataclass
class Outcome:
    """What growing one axis does: to parameters, and to the graph.

    ``carriers`` are sites whose entries appear in the result of the op that uses them; ``readers`` are contracted, with
    the contents they meet.
    """

    growth: AxisMap
    carriers: dict[Site, Content] = field(default_factory=dict)
    readers: dict[Site, set[Content]] = field(default_factory=dict)
    constants: dict[str, float] = field(default_factory=dict)
    scales: dict[str, tuple[float, bool]] = field(default_factory=dict)  # tensor -> (factor, a fold of a share)
    edits: dict[tuple[str, str], Any] = field(default_factory=dict)
    rescales: dict[str, float] = field(default_factory=dict)
    input_rescales: dict[tuple[str, str], float] = field(default_factory=dict)  # (user, operand node) -> factor
    scale_requests: dict[str, dict[str, float]] = field(default_factory=dict)  # tensor -> user node -> factor
    fold_requests: dict[str, dict[str, float]] = field(default_factory=dict)  # the same, for shares of copies
    statistics: bool = False
    uneven_gradients: bool = False  # an op gives one of several equal copies all the gradient
    multiplied: bool = False  # two activations are multiplied and summed over the axis
    silenced: bool = False  # both of them are zero in new units, so that neither gets a gradient through the other


class Grow(CallContext):
    """What a rule sees while an axis grows. See :mod:`fxgrow.rules.base` for the vocabulary."""

    verb = "grow"  # in refusals

    def __init__(self, axes: Axes, axis: Axis, name: str, growth: AxisMap, default: Content = Content.FREE) -> None:
        super().__init__(Unifier())
        self.axes, self.axis, self.name, self.growth, self.default = axes, axis, name, growth, default
        self.pinned: dict[Site, Content] = {}
        self.reasons: dict[Site, str] = {}
        self.forced: set[Site] = set()
        self.loose: set[Site] = set()  # written by the forward, so that new entries may hold anything
        self.held: set[Site] = set()  # written by the forward, which has to write what was asked for
        self.no_fold = False
        self.env: dict[fx.Node, Any] = {}
        self.read_here: set[Site] = set()
        self.outcome = Outcome(growth)

    # the run -----------------------------------------------------------------------------------------------------

    def run(self) -> Outcome:
        """Interpret until no op demands anything new.

        Raises:
            GrowthRefused: naming the op, its source line and the reason.
        """
        for _ in range(200):
            try:
                self._interpret()
                self._settle_scales()
            except _Restart:
                continue
            self._check_alive()
            return self.outcome
        raise self.refuse_all("no choice of its new weights suits every op")

    def _interpret(self) -> None:
        self.env, self.outcome = {}, Outcome(self.growth)
        ties = Ties(self.dims_of)
        call = 0
        for node in self.axes.uses.get(self.axis.id, []):
            if node.op == "get_attr":
                self.env[node] = self._load(node)
            elif node.op == "call_function":
                if sizes_of(node) is None and all(r is None for r in result_sizes(node) or []):
                    continue
                if node.meta.get("call", 0) != call:  # calls are made in any order: each begins with what all assume
                    self._check_state()
                    call = node.meta.get("call", 0)
                    self.env |= {n: self._load(n) for n in self.env if n.op == "get_attr"}
                self.at(node)
                self.read_here = set()
                rule = rule_of(node)
                if rule is None:
                    raise self.refuse(f"fxgrow has no rule for {op_name(node.target)}")
                try:
                    result = self._grow(rule)
                except Conflict as conflict:
                    raise self.refuse(str(conflict)) from None
                except (GrowthRefused, _Restart):
                    raise
                except Exception as error:  # a proof that fails is no proof
                    raise self.refuse(f"fxgrow's rule fails here ({type(error).__name__}: {error})") from error
                if self.growth.counts.max() > 1 and not ties.follow(node, rule, result):
                    raise self.refuse(
                        "it tells numbers apart that are equal by construction, such as a maximum and the entries that "
                        "it is taken of; between copies they are equal up to rounding only. With a margin it grows: "
                        "torch.isclose, or x >= maximum - 1e-6"
                    )
                passes = rule.moves and is_linear(node)
                self._carry_rest(node, result if passes else None)
                self.env[node] = self._settle(self.axes.dims.get(node), result if passes else _values(result))
                for target in writes(node):
                    self._write(node, target)
        self._check_state()

    def _grow(self, rule: Rule) -> Any:
        result = rule.grow(self)
        for name, operand in self.unseen_operands(rule):
            if any(self.grows(d) for d in flat_dims(self.env.get(operand))):
                raise self.refuse(f"fxgrow's rule for it does not follow its operand {name}")
        return result

    def _carry_rest(self, node: fx.Node, result: Any) -> None:
        """A parameter that the op neither reads nor passes on has become part of a value, whatever the rule did."""
        passed = {i.site for i in infos_of(result)}
        for source in node.all_input_nodes:
            for dim in flat_dims(self.env.get(source)):
                for info in infos(dim):
                    if info.site is not None and info.site not in self.read_here and info.site not in passed:
                        self._carry(info)

    def _write(self, node: fx.Node, target: fx.Node) -> None:
        """Later uses of the memory that ``node`` writes into see what it wrote."""
        memory = self.axes.memory
        declared = returns_what_it_writes(node)
        found = infos_of(self.env[node] if declared else self.env.get(target))
        if not found:
            return
        new = functools.reduce(Info.join, (i.closed() for i in found))
        if not declared:
            new = new.becomes(Content.FREE)
        fresh = self.is_zero(memory.sharing(target)[0])  # zeros go with any content
        for alias in memory.sharing(target):
            if alias is node or alias not in self.env:
                continue
            if declared and memory.same(alias, target):
                self.env[alias] = self.env[node]
                continue
            # a view of other entries, or one that may be a copy: what it held, or what was written

            def either(x: Axis | Leaf) -> Expr:
                return Leaf(x.axis, new if fresh else x.info.join(new)) if isinstance(x, Leaf) else x

            self.env[alias] = _each_dim(self.env[alias], lambda d: map_leaves(self.close(d), either))

    def is_zero(self, value: Any) -> bool:
        """Whether a value is known to be zero in every entry when the current op reads it, whatever the sizes."""
        if not isinstance(value, fx.Node):
            return isinstance(value, int | float) and value == 0
        memory = self.axes.memory
        lasting = any(n.op in ("get_attr", "placeholder") for n in memory.sharing(value))
        return not memory.written(value, None if lasting else self.node) and self._made_of_zeros(value)

    def _made_of_zeros(self, node: fx.Node) -> bool:
        while node.op == "call_function" and len(node.all_input_nodes) == 1:
            if not moves(node) or not is_linear(node):
                break
            node = node.all_input_nodes[0]
        if node.op == "get_attr":
            constant = self.axes.program.constants.get(str(node.target))
            return constant is not None and not constant.is_meta and not bool(constant.count_nonzero())
        name = op_name(node.target)
        if name in ("aten.full.default", "aten.full_like.default", "aten.new_full.default"):
            return self.is_zero(bound_arguments(node)["fill_value"])
        return name in ("aten.zeros.default", "aten.zeros_like.default", "aten.new_zeros.default")

    def _check_state(self) -> None:
        """What a call assumes of the new entries of a buffer that it writes into, it must leave behind for the next.

        Where it does not, the buffer's new entries may hold anything; and where an op cannot do with that, what is
        written has to be what it asks for.
        """
        for node, dims in self.env.items() if self.newborn else ():
            if node.op != "get_attr" or not self.axes.memory.written(node):
                continue
            for assumed, left in zip(infos_of(self._load(node)), infos_of(dims), strict=True):
                mean = assumed.content is Content.MEAN and left.content is Content.CONST
                if assumed.content is Content.FREE or left.content is assumed.content or mean:
                    continue
                (site,) = assumed.sources
                if site not in self.held:
                    self.loose.add(site)
                    self.pinned.pop(site, None)
                    raise _Restart
                self.node = self.axes.memory.writers(node)[-1]
                why = f"the forward writes into {site[0]}, and the next call reads it"
                self.demand(Info(left.content, left.sources - {site}), assumed.content, why)

    def _settle(self, known: Any, result: Any) -> Any:
        """Dims that do not grow are those of the analysis; dims that do keep their annotations."""
        if result is None or known is None:
            return known
        if result and isinstance(result[0], list):
            return [self._settle(k, r) for k, r in zip(known, result, strict=True)]
        out = []
        for k, r in zip(known, result, strict=True):
            grows = any(x is self.axis for x in leaves(k))
            if grows and not infos(r):
                r = self._annotate(k, lambda _: Info(Content.CONST))
            out.append(r if grows else k)
        return out

    def _load(self, node: fx.Node) -> Dims:
        name = str(node.target)
        trainable = name in self.axes.program.parameters  # a table of zeros would leave its partner without gradient
        written = self.axes.memory.written(node)  # a value that changes is no weight: it takes no shares
        out = []
        for i, dim in enumerate(self.axes.dims[node]):

            def info(number: int, i: int = i) -> Info:
                site = (name, i, number)
                content = self.pinned.get(site, Content.FREE if site in self.loose else self.default)
                if written:
                    self.outcome.carriers[site] = content
                return Info(content, frozenset([site]), None if written else site, zeroable=trainable)

            out.append(self._annotate(dim, info))
        return out

    def _annotate(self, dim: Expr, info: Callable[[int], Info]) -> Expr:
        counter = iter(range(1 << 30))
        return map_leaves(dim, lambda x: Leaf(x, info(next(counter))) if x is self.axis else x)

    # what rules ask ----------------------------------------------------------------------------------------------

    @property
    def newborn(self) -> bool:
        return self.growth.newborn > 0

    @property
    def in_eval(self) -> bool:
        calls, number = self.axes.program.calls, self.node.meta.get("call", 0)
        return number >= len(calls) or calls[number].serves(False)

    @property
    def result_dims(self) -> Any:
        return self.axes.dims[self.node]

    def dims_of(self, node: fx.Node) -> Any:
        return self.env.get(node, self.axes.dims.get(node))

    def grows(self, expr: Expr) -> bool:
        return any(isinstance(x, Leaf) or x is self.axis for x in leaves(expr))

    def is_whole(self, expr: Expr) -> bool:
        """The dim is the growing axis and nothing else."""
        return isinstance(expr, Leaf)

    def is_factor(self, expr: Expr, centred: bool) -> bool:
        """The dim is the growing axis, a product with it, or several alike: new zeros then only rescale its mean.

        A statistic that is ``centred`` needs the whole dim: slices have means of their own.
        """

        def one(part: Expr) -> bool:
            factors = part.factors if isinstance(part, Product) else (part,)
            return sum(self.is_whole(f) for f in factors) == 1 == len(infos(part))

        return self.is_whole(expr) or (not centred and all(one(p) for p in _parts(expr)))

    # the part that analysis and growth share ---------------------------------------------------------------------

    def unify(self, a: Expr, b: Expr) -> None:
        """Nothing to do: analysis has tied them."""

    def freeze(self, expr: Expr, why: str) -> None:
        if self.grows(expr):
            raise self.refuse(why)

    def role(self, expr: Expr, role: str, weight: int = 1) -> None:
        """Nothing to do."""

    def units(self, dim: Expr) -> list[Expr] | None:
        if self.grows(dim):
            return None
        return super().units(dim)

    def opaque(self, size: Size, why: str) -> Expr:
        return self.unifier.fresh(size)

    def constant_dim(self, i: int) -> Expr:
        return self._annotate(self.axes.dims[self.node][i], lambda _: Info(Content.CONST))

    def inner(self, i: int, size: int) -> Expr:
        whole = self._annotate(self.axes.dims[self.node][i], lambda _: Info(Content.CONST))
        return self.unifier.split_product(whole, size)[1]

    def outer(self, i: int, size: Size) -> Expr:
        whole = self._annotate(self.axes.dims[self.node][i], lambda _: Info(Content.CONST))
        inner = quotient(size_of(whole), size)
        if inner is None:
            raise Conflict(f"size {size_of(whole)} is no multiple of {size}")
        return self.unifier.split_product(whole, inner)[0]

    def constant_like(self, dim: Expr) -> Expr:
        return map_leaves(dim, lambda x: Leaf(x.axis, Info(Content.CONST)) if isinstance(x, Leaf) else x)

    def from_input(self, value: Any) -> bool:
        return False  # roles are found in analysis

    def constant(self, value: Any) -> torch.Tensor | None:
        return constant_value(value, self.axes.program.constants)

    def merge(self, exprs: Sequence[Expr]) -> Expr:
        """One dim shared by operands with entries of their own: known is what all agree on."""
        total = exprs[0]
        for other in exprs[1:]:
            theirs = iter(infos(other))

            def join(x: Axis | Leaf, theirs: Iterator[Info] = theirs) -> Expr:
                return Leaf(x.axis, x.info.join(next(theirs))) if isinstance(x, Leaf) else x

            total = map_leaves(total, join)
        return total

    # growth ------------------------------------------------------------------------------------------------------

    def opaque_results(self, why: str) -> Any:
        raise self.refuse(why)

    def refuse(self, why: str, kind: type[GrowthRefused] = GrowthRefused) -> GrowthRefused:
        """The growth fails at the call at hand."""
        return self.refuse_at(self.node, why, kind)

    def refuse_at(self, node: fx.Node, why: str, kind: type[GrowthRefused] = GrowthRefused) -> GrowthRefused:
        """The growth fails at an op of the graph."""
        op, line = str(node.target), node.meta.get("source", "")
        return kind(Refusal(self.name, why, self.verb, self.growth.old, self.growth.new, op, line))

    def refuse_all(self, why: str) -> GrowthRefused:
        """The growth fails, at no op in particular."""
        return GrowthRefused(Refusal(self.name, why, self.verb, self.growth.old, self.growth.new))

    def combine(self, a: Expr, b: Expr, how: str) -> Expr:
        """Meet of two operands along one dim, either of which may be broadcast (size 1)."""
        if (is_unit(a) and is_unit(b)) or not (self.grows(a) or self.grows(b)):
            return a if not is_unit(a) else b
        f = _mul_first if how == "mul_first" else COMBINE[how]
        const = Info(Content.CONST)
        if is_unit(b):
            return map_leaves(a, lambda x: _meet(x, const, f))
        if is_unit(a):
            return map_leaves(b, lambda x: _meet(x, const, f, swap=True))
        self.close(a)
        self.close(b)
        mine, other = list(leaves(a)), list(leaves(b))
        if [isinstance(x, Leaf) for x in mine] != [isinstance(y, Leaf) for y in other]:
            raise self.refuse("its operands hold these units in different places")
        theirs = iter(other)

        def one(x: Axis | Leaf) -> Expr:
            y = next(theirs)
            if isinstance(x, Leaf) and isinstance(y, Leaf):
                return _meet(x, y.info, f)
            return x

        return map_leaves(a, one)

    def close(self, expr: Expr) -> Expr:
        """Parameters seen so far are now values: they carry the axis with the content they were given."""
        for info in infos(expr):
            if info.site is not None:
                self._carry(info)
        return map_leaves(expr, lambda x: Leaf(x.axis, x.info.closed()) if isinstance(x, Leaf) else x)

    def _carry(self, info: Info) -> None:
        assert info.site is not None
        if info.site in self.outcome.readers:
            self.forced.add(info.site)
            raise _Restart
        self.outcome.carriers[info.site] = info.content

    def contract(self, exprs: Sequence[Expr], owners: Sequence[str], zero: str | None = None) -> float:
        """A sum of products over the axis.

        Returns:
            The factor by which the sum comes out too large: 1 where a parameter takes the shares, n where n copies meet
            n copies. ``zero`` names the operand that is asked to be zero in newborn entries where neither is.
        """
        sides = [infos(e) for e in exprs]
        if len(sides) == 1:
            raise self.refuse("it sums these units up without weights, so that copies would count several times")
        if len({len(s) for s in sides}) != 1:
            raise self.refuse("the operands it multiplies hold these units in different places")
        read: list[bool] = []
        for column in zip(*sides, strict=True):
            here = [x.site for x in column]
            open_ = [
                i
                for i, x in enumerate(column)
                if x.site is not None
                and here.count(x.site) == 1
                and self._takes_shares(x.site)
                and x.site not in self.forced
                and x.site not in self.outcome.carriers
            ]
            if open_:
                reader = next((i for i in reversed(open_) if owners[i] in ("weight", "mat2", "other")), open_[-1])
                for i, x in enumerate(column):
                    if i != reader and x.site is not None:
                        self._carry(x)
                site = column[reader].site
                assert site is not None
                others = {x.content for i, x in enumerate(column) if i != reader}
                self.outcome.readers.setdefault(site, set()).update(others)
                self.read_here.add(site)
                read.append(True)
                continue
            for x in column:
                if x.site is not None:
                    self._carry(x)
            read.append(False)
            self.outcome.multiplied = True
            self.outcome.silenced |= self.newborn and all(x.content is Content.ZERO for x in column)
            if self.newborn and not any(x.content is Content.ZERO for x in column):
                changing = [bool(x.sources & self.loose) for x in column]
                order = sorted(range(len(column)), key=lambda i: (changing[i], owners[i] != zero, i != len(column) - 1))
                self.demand(column[order[0]], Content.ZERO, "it multiplies two activations and sums over these units")
        if all(read):
            return 1.0
        if any(read):
            raise self.refuse("part of what it sums over is multiplied by weights, and part by activations")
        return float(self.uniform_factor(exprs[:1]))

    def selects_among(self, *, one: bool) -> None:
        self.outcome.statistics = True
        self.outcome.uneven_gradients |= one

    def multiplies(self, *, silenced: bool) -> None:
        self.outcome.multiplied = True
        self.outcome.silenced |= silenced

    def _takes_shares(self, site: Site) -> bool:
        """Whether the entries of a parameter or buffer can be divided among copies."""
        return is_fine(self.axes.program.tensor(site[0]).dtype)

    def uniform_factor(self, exprs: Sequence[Expr]) -> int:
        """How often each term of a sum over these dims is repeated, if all are repeated alike.

        Raises:
            UnequalCopies: units have different numbers of copies.
            GrowthRefused: only part of the dim is repeated.
        """
        self.outcome.statistics = True
        if self.growth.copies == 1:
            return 1
        if self.growth.copies == 0:
            raise self.refuse(
                f"{self.growth.new} is no multiple of {self.growth.old}: some units would be copied more often than "
                "others, and it sums or averages over all of them",
                UnequalCopies,
            )
        total = 1
        for expr in exprs:
            parts = _parts(expr)
            counts = {sum(isinstance(x, Leaf) for x in leaves(p)) for p in parts}
            if len(counts) != 1:
                raise self.refuse("only part of the entries it sums over would be copied, which changes the sum")
            total *= self.growth.copies ** counts.pop()
        return total

    def statistic(self, over: Sequence[Expr], needed: Content, rank: int) -> float:
        """A mean and variance (or mean square) over these dims.

        Returns:
            eta, with eta^2 = copies * old / new: by how much the statistic's root shrinks. 1 for whole copies.
        """
        self.uniform_factor(over)
        for expr in over:
            self.close(expr)
        if not self.newborn:
            return 1.0
        if rank != 1 or len(over) != 1 or not self.is_factor(over[0], needed is Content.MEAN):
            raise self.refuse("new units in only a part of the dim it normalises over; grow by whole copies instead")
        for info in infos(over[0]):
            if info.content is not needed and not (info.content is Content.CONST and needed is Content.MEAN):
                self.demand(info, needed, "it normalises over these units")
        return float(np.sqrt(self.growth.copies * self.growth.old / self.growth.new))

    def demand(self, info: Info, content: Content, why: str) -> None:
        """Ask the writers that reach this value for a content of newborn entries, and start over."""
        if not info.sources:
            raise self.refuse(f"{why}, and no weights of the model decide what new units hold there")
        changed = False
        for site in info.sources:
            changed |= self._pin(site, content, why)
        if not changed:
            raise self.refuse(
                f"{why}, so that new units have to {_HOLD[content]} there, which no choice of the weights that make "
                "them brings about"
            )
        raise _Restart

    def pin(self, expr: Expr, content: Content) -> None:
        """A parameter must hold this content in its newborn entries."""
        changed = False
        for info in infos(expr):
            if info.site is not None:
                changed |= self._pin(info.site, content, "its new entries must not show in the result")
        if changed:
            raise _Restart

    def _pin(self, site: Site, content: Content, why: str) -> bool:
        known = self.pinned.get(site)
        if known is content:
            return False
        if site in self.loose:
            self.loose.discard(site)
            self.held.add(site)
        if content is Content.MEAN and not self._takes_shares(site):
            raise self.refuse(f"{why}; {site[0]} holds {self.axes.program.tensor(site[0]).dtype}, which has no means")
        if content is Content.MEAN and not self._fills_dim(site):
            raise self.refuse(
                f"{why}, for which {site[0]} would need means over a part of a dim, which fxgrow does not make"
            )
        if known is not None:
            raise self.refuse(
                f"{why}, so that new entries of {site[0]} have to {_HOLD[content]}; but for {self.reasons[site]} they "
                f"have to {_HOLD[known]}"
            )
        self.pinned[site] = content
        self.reasons[site] = f"{self.op} at {self.node.meta.get('source', '')}"
        return True

    def _fills_dim(self, site: Site) -> bool:
        """Whether the growing axis is all there is to the dim of a parameter."""
        for node in self.axes.uses[self.axis.id]:
            if node.op == "get_attr" and str(node.target) == site[0]:
                return self.axes.dims[node][site[1]] is self.axis
        return False

    def newborn_constants(self, values: dict[str, float]) -> None:
        """Values for newborn entries of parameters named by operand, where random ones make no sense."""
        for operand, value in values.items():
            node = self.args.get(operand)
            if isinstance(node, fx.Node) and node.op == "get_attr":
                self.outcome.constants[str(node.target)] = value

    def edit(self, argument: str, value: Any) -> None:
        """Set a literal of the current op."""
        self.outcome.edits[self.node.name, argument] = value

    def scale_shared(self, operand: str, factor: float) -> bool:
        """Multiply a parameter, provided that every op that uses it asks for the same. False where that is hopeless."""
        value = self.args.get(operand)
        if not isinstance(value, fx.Node) or value.op != "get_attr" or self.axes.memory.written(value):
            return False
        if any(u.target != self.node.target for u in value.users):
            return False
        again = [n for _, n in nodes_among(self.args) if n.op == "get_attr" and n.target == value.target]
        if len(again) > 1:
            return False  # the op reads it a second time, as a bias say, which keeps its scale
        self.outcome.scale_requests.setdefault(str(value.target), {})[self.node.name] = factor
        return True

    def _settle_scales(self) -> None:
        """Apply the scales that every op using a parameter agreed on."""
        users: dict[str, set[str]] = {}
        for node in self.axes.uses.get(self.axis.id, []):
            if node.op == "get_attr":
                users.setdefault(str(node.target), set()).update(u.name for u in node.users)

        def agreed(name: str, requests: dict[str, float]) -> bool:
            return len(set(requests.values())) == 1 and users[name] == set(requests)

        if not all(agreed(name, requests) for name, requests in self.outcome.fold_requests.items()):
            self.no_fold = True  # another op uses the norm's weight too: scale the product instead
            raise _Restart
        for name, requests in self.outcome.scale_requests.items():
            if not agreed(name, requests):
                raise self.refuse_all(f"several ops use {name}, and would need it multiplied by different factors")
        for fold, table in ((False, self.outcome.scale_requests), (True, self.outcome.fold_requests)):
            for name, requests in table.items():
                before, folded = self.outcome.scales.get(name, (1.0, False))
                self.outcome.scales[name] = (before * next(iter(requests.values())), folded or fold)

    def rescale_output(self, factor: float) -> None:
        """Multiply the op's result by a constant: in a literal that follows it, or by a new node.

        Raises:
            GrowthRefused: the result is of whole numbers, which do not stay what they are.
        """
        node = self.node
        users = list(node.users)
        if not _continuous(node):
            self._check_whole(factor)
            users = []  # a literal that follows may be a whole number itself
        if len(users) == 1 and users[0].args and users[0].args[0] is node:
            name = op_name(users[0].target)
            literal = users[0].args[1] if len(users[0].args) > 1 else None
            if name in ("aten.mul.Tensor", "aten.mul.Scalar") and isinstance(literal, float | int):
                self.outcome.edits[users[0].name, "other"] = literal * factor
                return
            if name in ("aten.div.Tensor", "aten.div.Scalar") and isinstance(literal, float | int):
                self.outcome.edits[users[0].name, "other"] = literal / factor
                return
        self.outcome.rescales[node.name] = self.outcome.rescales.get(node.name, 1.0) * factor

    def _check_whole(self, factor: float) -> None:
        """Sums of whole numbers over n copies are n-fold, without remainder, as long as none is too large."""
        dtype = self.node.meta["val"].dtype
        if abs(round(1 / factor) * factor - 1) > 1e-12:
            raise self.refuse(f"its result is of whole numbers ({dtype}), which cannot be multiplied by {factor:g}")
        if dtype is not torch.int64:
            raise self.refuse(
                f"it sums whole numbers in {dtype}, which sums over copies may overflow; sum with dtype=torch.int64"
            )

    def rescale_product(self, factor: float, operand: str, biases: Iterable[str]) -> None:
        """Multiply the op's sum of products by a constant, but not the bias that is added to it."""
        if op_name(self.node.target) == "aten.linear.default" and self._fold_into_norm(factor):
            return
        if not any(isinstance(self.args.get(b), fx.Node) for b in biases):
            self.rescale_output(factor)
            return
        if not _continuous(self.node):
            raise self.refuse("a sum of products of whole numbers, to which a bias is added, cannot be rescaled")
        if isinstance(self.args.get("alpha"), int | float):
            self.edit("alpha", self.args["alpha"] * factor)
            return
        source = self.args[operand]
        if sum(a is source for a in self.args.values()) != 1:
            raise self.refuse("a sum of products of a value with itself, to which a bias is added, cannot be rescaled")
        key = (self.node.name, source.name)
        self.outcome.input_rescales[key] = self.outcome.input_rescales.get(key, 1.0) * factor

    def _fold_into_norm(self, factor: float) -> bool:
        """Scale the weight and bias of the norm that alone feeds the current op, through ops that only move entries."""
        source = self.args.get("input")
        while isinstance(source, fx.Node) and len(source.users) == 1 and _keeps_scale(source):
            source = source.args[0]
        if self.no_fold or not isinstance(source, fx.Node) or len(source.users) != 1:
            return False
        if op_name(source.target) not in ("aten.layer_norm.default", "aten.rms_norm.default"):
            return False
        args = bound_arguments(source)
        names = []
        for operand in ("weight", "bias"):
            value = args.get(operand)
            if value is None and operand == "bias":
                continue
            if not isinstance(value, fx.Node) or value.op != "get_attr" or self.axes.memory.written(value):
                return False
            names.append(str(value.target))
        for name in names:
            self.outcome.fold_requests.setdefault(name, {})[source.name] = factor
        return True

    def mean_of(self, value: Any) -> tuple[fx.Node, list[int]] | None:
        """(x, dims) where ``value`` is ``x.mean(dims, keepdim=True)``."""
        while isinstance(value, fx.Node) and op_name(value.target) == "aten.mul.Tensor" and value.meta.get("rescale"):
            value = value.args[0]
        if not isinstance(value, fx.Node) or op_name(value.target) != "aten.mean.dim":
            return None
        args = bound_arguments(value)
        source = args["self"]
        dims = self.axes.dims.get(source)
        if not args["keepdim"] or dims is None or self.axes.memory.written(source):
            return None
        return source, reduced_dims(args, len(dims))

    def of_square(self) -> bool:
        """Whether the operand of the current reduction is a square."""
        value = self.args.get("self")
        while isinstance(value, fx.Node) and moves(value):
            value = value.all_input_nodes[0]
        if not isinstance(value, fx.Node):
            return False
        name = op_name(value.target)
        if name == "aten.pow.Tensor_Scalar":
            return bool(value.args[1] == 2)
        return name == "aten.square.default" or (name == "aten.mul.Tensor" and value.args[0] is value.args[1])

    def _check_alive(self) -> None:
        """Zero incoming and zero outgoing weights together would never give the new units a gradient."""
        if not self.newborn:
            return
        weights = {s: c for s, c in self.outcome.carriers.items() if s[0] in self.axes.program.parameters}
        if self.outcome.silenced and not self.outcome.readers:
            raise self.refuse_all(
                "two activations are multiplied or compared over it, and both would be zero in new "
                "units, which then never get a gradient"
            )
        paired = self.growth.ids < self.growth.newborn and bool(self.outcome.readers)
        if not weights or paired or not (self.outcome.readers or self.outcome.multiplied):
            return
        silent_in = all(c is Content.ZERO for c in weights.values())
        fed = self.outcome.multiplied and not self.outcome.silenced  # by what they are multiplied with
        silent_out = not fed and all(reader_fill(c) == FILL_ZERO for c in self.outcome.readers.values())
        trained = [s for s in self.outcome.readers if s[0] in self.axes.program.parameters]
        if silent_out and self.outcome.readers and not trained and not self.outcome.multiplied:
            raise self.refuse_all("only buffers multiply its new units, with zeros that no training changes")
        if silent_in and silent_out:
            raise self.refuse_all(
                "the weights into its new units and those out of them would both be zero, so that neither ever "
                "gets a gradient"
            )


def _keeps_scale(node: fx.Node) -> bool:
    """Whether scaling the op's first operand scales its result, and no other numbers go in."""
    if not is_linear(node):
        return False
    return [n for n in node.all_input_nodes if _continuous(n)] == [node.args[0]]


def _continuous(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return not isinstance(value, torch.Tensor) or value.is_floating_point() or value.is_complex()


def _values(dims: Any) -> Any:
    """Dims of a result in which no parameter is seen any more."""
    if not isinstance(dims, list):
        return dims
    return [_values(d) if isinstance(d, list) or d is None else annotate(d, lambda info: info.closed()) for d in dims]


#: what new entries have to be, in words
_HOLD = {
    Content.ZERO: "be zero",
    Content.MEAN: "hold the mean of the old ones",
    Content.CONST: "hold what all others hold",
    Content.FREE: "hold anything",
}


def _mul_first(a: Content, b: Content) -> Content:
    """``a * f(b)`` with f(0) != 0."""
    if a is Content.ZERO:
        return Content.ZERO
    return Content.CONST if a is b is Content.CONST else Content.FREE


def _meet(x: Axis | Leaf, other: Info, f: Callable[[Content, Content], Content], swap: bool = False) -> Expr:
    if not isinstance(x, Leaf):
        return x
    a, b = (other, x.info) if swap else (x.info, other)
    content = f(a.content, b.content)
    return Leaf(x.axis, Info(content, _deciding(a, b, f), zeroable=_zeroable(a, b, f)))


def _deciding(a: Info, b: Info, f: Callable[[Content, Content], Content]) -> frozenset[Site]:
    """The parameters to ask for another content: one factor of a product is enough to make it zero.

    Were both asked, each would wait for the other to get a gradient.
    """
    if f not in (COMBINE["mul"], _mul_first):
        return a.sources | b.sources
    for one, other in ((a, b), (b, a)):
        if one.content is Content.CONST and other.content is not Content.CONST:
            return other.sources
    for one in (a, b):
        if one.content is Content.ZERO:
            return one.sources
    for one in (b, a):
        if one.zeroable and one.sources:
            return one.sources
    return a.sources | b.sources


def _zeroable(a: Info, b: Info, f: Callable[[Content, Content], Content]) -> bool:
    return (a.zeroable or b.zeroable) if f is COMBINE["mul"] else (a.zeroable and b.zeroable)


def infos_of(dims: Any) -> list[Info]:
    """Annotations of the growing axis in all dims of a value, or of several."""
    return [i for d in flat_dims(dims) for i in infos(d)]


def _each_dim(dims: Any, f: Callable[[Expr], Expr]) -> Any:
    if dims is None:
        return None
    return [_each_dim(d, f) if isinstance(d, list) or d is None else f(d) for d in dims]


def _parts(expr: Expr) -> list[Expr]:
    """The dim as a list of products without concatenation."""
    if isinstance(expr, Concat):
        return [q for p in expr.parts for q in _parts(p)]
    if isinstance(expr, Product) and expr.factors and isinstance(expr.factors[-1], Concat):
        return [product([*expr.factors[:-1], q]) for p in expr.factors[-1].parts for q in _parts(p)]
    return [expr]


def reader_fill(contents: set[Content]) -> int:
    """Fill of a reader's newborn entries: free where they only ever meet zeros."""
    return FILL_RANDOM if contents <= {Content.ZERO} else FILL_ZERO


def dim_plan(
    dim: Expr, tensor: str, i: int, axis: Axis, outcome: Outcome, carrier_fill: Callable[[Site], int]
) -> DimPlan:
    """The map of one dim of a parameter when ``axis`` grows: index, shares, gradients and fills, entry by entry."""
    growth = outcome.growth
    counter = iter(range(1 << 30))

    def leaf() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, int, int]:
        site = (tensor, i, next(counter))
        reads = site in outcome.readers and site not in outcome.carriers
        ones = np.ones(growth.new)
        split = growth.share if reads else ones
        gradient = ones if reads else growth.share
        paired = growth.ids < growth.newborn  # +z and -z are not drawn as a fill
        code = (FILL_ZERO if paired else reader_fill(outcome.readers[site])) if reads else carrier_fill(site)
        fill = np.where(growth.index < 0, float(code), -1.0)
        return growth.index, split, gradient, fill, growth.old, growth.old + growth.ids

    def walk(e: Expr) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, int, int]:
        if isinstance(e, Axis | Leaf):
            if e is axis:
                return leaf()
            n = int(e.size)
            return np.arange(n), np.ones(n), np.ones(n), np.full(n, -1.0), n, n
        if isinstance(e, Product):
            out = (np.zeros(1, np.int64), np.ones(1), np.ones(1), np.full(1, -1.0), 1, 1)
            for f in e.factors:
                out = _outer(out, walk(f))
            return out
        pieces = [walk(p) for p in e.parts]
        index, old, extended = [], 0, 0
        total = sum(p[4] for p in pieces)
        total_extended = total + sum(p[5] for p in pieces)
        for p in pieces:
            # extended coordinates of newborn entries are unique across the parts
            index.append(np.where(p[0] >= 0, p[0] + old, p[0] - extended))
            old += p[4]
            extended += p[5]
        cat = [np.concatenate([p[k] for p in pieces]) for k in (1, 2, 3)]
        return np.concatenate(index), cat[0], cat[1], cat[2], total, total_extended

    index, split, gradient, fill, _, _ = walk(dim)
    return DimPlan(
        index=index,
        split=None if np.all(split == 1) else split,
        gradient=None if np.all(gradient == 1) else gradient,
        fill=None if np.all(fill < 0) else np.maximum(fill, 0.0),
    )


_Walked = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, int, int]


def _outer(a: _Walked, b: _Walked) -> _Walked:
    """Row-major product of two maps; a newborn entry's id is its coordinate in the extended product."""
    ia, ib = a[0][:, None], b[0][None, :]
    xa = np.where(ia >= 0, ia, a[4] + (-ia - 1))
    xb = np.where(ib >= 0, ib, b[4] + (-ib - 1))
    both = (ia >= 0) & (ib >= 0)
    index = np.where(both, ia * b[4] + ib, -(xa * b[5] + xb) - 1).reshape(-1)
    fa, fb = a[3][:, None], b[3][None, :]
    zero = (fa == FILL_ZERO) | (fb == FILL_ZERO)
    fill = np.where(zero, float(FILL_ZERO), np.maximum(fa, fb)).reshape(-1)
    return (
        index,
        (a[1][:, None] * b[1][None, :]).reshape(-1),
        (a[2][:, None] * b[2][None, :]).reshape(-1),
        fill,
        a[4] * b[4],
        a[4] * b[4] + a[5] * b[5],
    )


def size_edits(axes: Axes, axis: Axis, new: int, refuse: Callable[[fx.Node, str], GrowthRefused]) -> list[Edit]:
    """Literal arguments that have to follow when ``axis`` takes its new size."""

    def new_size(dim: Expr) -> Size:
        if isinstance(dim, Axis):
            return new if dim is axis else dim.size
        if isinstance(dim, Product):
            total: Size = 1
            for f in dim.factors:
                total = total * new_size(f)
            return total
        assert isinstance(dim, Concat)
        total = 0
        for p in dim.parts:
            total = total + new_size(p)
        return total

    out = []
    for node in axes.uses.get(axis.id, []):
        rule = rule_of(node)
        if rule is None:
            continue
        ctx = Resize(node, axes.dims.get, new_size, functools.partial(refuse, node))
        rule.resize(ctx)
        if ctx.edit is not None:
            out.append(ctx.edit)
    return out


__all__ = ["Grow", "Outcome", "UnequalCopies", "dim_plan", "reader_fill", "size_edits"]
