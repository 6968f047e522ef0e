"""The run of the proof: one axis through the graph, op by op, again and again until no op asks for anything new.

An abstract interpretation: the dims of every value carry what is known of the new entries of the growing axis. What a
tensor is read with is an assumption (:mod:`fxgrow.proof.contents`); an op that needs another starts the run over.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

from torch import fx

from fxgrow.algebra import Axis, Conflict, Expr, Leaf, leaves, map_leaves
from fxgrow.errors import GrowthRefused
from fxgrow.ir.memory import returns_what_it_writes, writes
from fxgrow.ir.nodes import info_of
from fxgrow.ir.ops import op_name
from fxgrow.ir.sizes import result_sizes, sizes_of
from fxgrow.proof.contents import Restart
from fxgrow.proof.context import ProofContext
from fxgrow.proof.outcome import Outcome
from fxgrow.proof.ties import Ties
from fxgrow.rules.annotation import Content, Dims, Info, annotate, flat_dims, infos
from fxgrow.rules.base import Rule, is_linear, rule_of

#: attempts after which it is given up; every one but the last has found out something new
_MOST = 200


class Step(Protocol):
    """What is done with the call at hand."""

    def begin(self) -> None:
        """Start a new attempt."""

    def take(self, rule: Rule) -> Any:
        """Annotated dims of the call's results.

        Raises:
            GrowthRefused: the growth cannot be exact here.
            Restart: something is asked of a tensor.
        """


class FollowRule:
    """The rule is followed, and says something of every operand that grows."""

    def __init__(self, context: ProofContext) -> None:
        self.context = context

    def begin(self) -> None:
        """Nothing is kept from one call to the next."""

    def take(self, rule: Rule) -> Any:
        result = rule.grow(self.context)
        for name, operand in self.context.unseen_operands(rule):
            if any(map(self.context.grows, flat_dims(self.context.env.get(operand)))):
                raise self.context.refuse(f"fxgrow's rule for it does not follow its operand {name}")
        return result


class Interpreter:
    """Runs the ops that an axis goes through."""

    def __init__(self, context: ProofContext, step: Step) -> None:
        self.context, self.step = context, step
        self.axes, self.axis, self.growth = context.axes, context.axis, context.growth
        self.memory = context.axes.memory

    def run(self) -> Outcome:
        """Interpret until no op asks for anything new.

        Raises:
            GrowthRefused: naming the op, its source line and the reason.
        """
        for _ in range(_MOST):
            self.context.begin()
            self.step.begin()
            try:
                self._interpret()
                self.context.scales.settle()
            except Restart:
                continue
            return self.context.outcome
        raise self.context.refuse_all("no choice of its new weights suits every op")

    def _interpret(self) -> None:
        env, call = self.context.env, 0
        ties = Ties(self.context.dims_of) if self.growth.counts.max() > 1 else None
        for node in self.axes.uses.get(self.axis.id, []):
            if node.op == "get_attr":
                env[node] = self._load(node)
            elif node.op == "call_function":
                if sizes_of(node) is None and all(r is None for r in result_sizes(node) or []):
                    continue
                if info_of(node).call != call:  # calls are made in any order: each begins with what all assume
                    self._check_state()
                    call = info_of(node).call
                    env |= {n: self._load(n) for n in env if n.op == "get_attr"}
                env[node] = self._call(node, ties)
                for target in writes(node):
                    self._write(node, target)
        self._check_state()

    # one op

    def _call(self, node: fx.Node, ties: Ties | None) -> Any:
        """Annotated dims of an op's results; ``ties``: where units have copies."""
        self.context.at(node)
        rule = rule_of(node)
        if rule is None:
            raise self.context.refuse(f"fxgrow has no rule for {op_name(node.target)}")
        try:
            result = self.step.take(rule)
        except Conflict as conflict:
            raise self.context.refuse(str(conflict)) from None
        except (GrowthRefused, Restart):
            raise
        except Exception as error:  # a proof that fails is no proof
            raise self.context.refuse(f"fxgrow's rule fails here ({type(error).__name__}: {error})") from error
        if ties is not None and not ties.follow(node, rule, result):
            raise self.context.refuse(
                "it tells numbers apart that are equal by construction, such as a maximum and the entries that "
                "it is taken of; between copies they are equal up to rounding only. With a margin it grows: "
                "torch.isclose, or x >= maximum - 1e-6"
            )
        passes = rule.moves and is_linear(node)
        self._carry_rest(node, result if passes else None)
        return self._settle(self.axes.dims.get(node), result if passes else _values(result))

    def _carry_rest(self, node: fx.Node, result: Any) -> None:
        """A parameter that the op neither reads nor passes on has become part of a value, whatever the rule did."""
        passed = {i.site for i in _infos_of(result)}
        for source in node.all_input_nodes:
            for info in _infos_of(self.context.env.get(source)):
                if info.site is not None and info.site not in self.context.read_here and info.site not in passed:
                    self.context.sums.carry(info.site, info.content)

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
                r = self.context.mark(k, lambda _: Info(Content.CONST))
            out.append(r if grows else k)
        return out

    # tensors

    def _load(self, node: fx.Node) -> Dims:
        """Dims of a parameter, buffer or constant, with what is assumed of its new entries."""
        name = str(node.target)
        trainable = name in self.axes.program.parameters  # a table of zeros would leave its partner without gradient
        written = self.memory.written(node)  # a value that changes is no weight: it takes no shares
        out = []
        for i, dim in enumerate(self.axes.dims[node]):

            def info(number: int, i: int = i) -> Info:
                site = (name, i, number)
                content = self.context.contents.of(site)
                if written:
                    self.context.outcome.carriers[site] = content
                return Info(content, frozenset([site]), None if written else site, zeroable=trainable)

            out.append(self.context.mark(dim, info))
        return out

    def _write(self, node: fx.Node, target: fx.Node) -> None:
        """Later uses of the memory that ``node`` writes into see what it wrote."""
        env = self.context.env
        declared = returns_what_it_writes(node)
        found = _infos_of(env[node] if declared else env.get(target))
        if not found:
            return
        new = functools.reduce(Info.join, (i.closed() for i in found))
        if not declared:
            new = new.becomes(Content.FREE)
        fresh = self.context.is_zero(self.memory.sharing(target)[0])  # zeros go with any content
        for alias in self.memory.sharing(target):
            if alias is node or alias not in env:
                continue
            if declared and self.memory.same(alias, target):
                env[alias] = env[node]
                continue
            # a view of other entries, or one that may be a copy: what it held, or what was written

            def either(x: Axis | Leaf) -> Expr:
                return Leaf(x.axis, new if fresh else x.info.join(new)) if isinstance(x, Leaf) else x

            env[alias] = _each_dim(env[alias], lambda d: map_leaves(self.context.close(d), either))

    def _check_state(self) -> None:
        """What a call assumes of the new entries of a buffer that it writes into, it must leave behind for the next."""
        for node, dims in self.context.env.items() if self.context.newborn else ():
            if node.op == "get_attr" and self.memory.written(node):
                for assumed, left in zip(_infos_of(self._load(node)), _infos_of(dims), strict=True):
                    self.context.contents.check_state(self.context, node, assumed, left)


def _infos_of(dims: Any) -> list[Info]:
    """Annotations of the growing axis in all dims of a value, or of several."""
    return [i for d in flat_dims(dims) for i in infos(d)]


def _each_dim(dims: Any, f: Callable[[Expr], Expr]) -> Any:
    if dims is None:
        return None
    return [_each_dim(d, f) if isinstance(d, list) or d is None else f(d) for d in dims]


def _values(dims: Any) -> Any:
    """Dims of a result in which no parameter is seen any more."""
    return _each_dim(dims, lambda d: annotate(d, Info.closed)) if isinstance(dims, list) else dims


__all__ = ["FollowRule", "Interpreter", "Step"]
