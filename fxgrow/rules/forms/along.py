"""Ops that do something along some dims of an operand, and nothing along the others: statistics, softmax, windows."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import fx

from fxgrow.algebra import UNIT, Expr, Size, is_static, is_unit, resolve, size_of
from fxgrow.ir.ops import used
from fxgrow.rules.annotation import Content, Dims, Info, annotate, infos
from fxgrow.rules.base import Fact, Row, is_linear, rule_of
from fxgrow.rules.context import Context, GrowthContext

Kind = Literal[
    "mean",
    "sum",
    "count",
    "norm",
    "variance",
    "deviation",
    "extremum",
    "softmax",
    "log_softmax",
    "sorted",
    "interpolation",
    "mixed",
]

#: what growth of the dims can leave exact
_STATISTICS = ("mean", "sum", "count", "norm", "variance", "deviation", "extremum", "softmax")

#: sums of entries times constants: along the other dims, zeros give zeros and the mean of operands that of results
_SUMS = ("mean", "sum", "interpolation")


def in_whole_numbers(node: fx.Node) -> list[fx.Node]:
    """All of them, where a result is of whole numbers or truth values, or is one of several."""
    return [] if _is_real(node) else node.all_input_nodes


def _is_real(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())


def keeps_fractions(node: fx.Node) -> bool:
    """unless dtype makes whole numbers of real ones"""
    return _is_real(node) or not _is_real(node.all_input_nodes[0])


@dataclass(frozen=True, eq=False)
class Along(Row):
    """An op that does something along some dims of its first operand, while the other dims pass.

    Attributes:
        over: which dims: the argument that lists them (all where it is left out), how many last ones, or a function of
            the arguments and the rank.
        kind: what happens there. Statistics, which growth may leave exact: ``mean``; ``sum``; ``count`` of the entries
            that are not zero; ``norm``, of order 2; ``variance`` and ``deviation``, with their correction;
            ``extremum``, of truth values too; ``softmax``. Others: ``log_softmax``; entries ``sorted`` by size;
            ``interpolation``; ``mixed`` in any other way.
        why: why the dims cannot grow, in words or as a function of the arguments that gives them; empty where they can.
        result: what becomes of the dims: ``reduced`` to nothing, or to 1 where the call keeps them; the ``same``;
            ``new``, dims of their own, which cannot grow.
        role: what the dims are called.
        others: further operands, and how many of their first dims are those of the first operand; None: all of them.
            Where the op is linear they are summed with it; else they say where its entries come from or go.
    """

    over: str | int | Callable[[Mapping[str, Any], int], list[int]]
    kind: Kind
    why: str | Callable[[Mapping[str, Any]], str] = ""
    result: Literal["reduced", "same", "new"] = field(default="reduced", kw_only=True)
    role: str = field(default="", kw_only=True)
    others: Mapping[str, int | None] = field(default_factory=dict, kw_only=True)
    jumps: bool | Callable[[fx.Node], list[fx.Node]] = field(default=in_whole_numbers, kw_only=True)
    linear: Fact | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind {self.kind!r} is none of {', '.join(get_args(Kind))}")
        if not self.why and (self.kind not in _STATISTICS or self.result == "new"):
            raise ValueError(f"kind {self.kind!r} with {self.result} dims: say why these cannot grow")

    @property
    def notation(self) -> str:
        if isinstance(self.over, int):
            where = f"last {self.over}" if self.over > 1 else "last"
        elif isinstance(self.over, str):
            where = self.over
        else:
            where = (inspect.getdoc(self.over) or self.over.__name__).partition("\n")[0]
        after = {"reduced": "", "same": f" [{where}]", "new": " [new]"}
        return f"... [{where}] -> ...{after[self.result]}"

    def dims_over(self, args: Mapping[str, Any], rank: int) -> list[int]:
        """The dims that it runs over in a call on an operand of this rank, as numbers that are not negative."""
        if isinstance(self.over, int):
            return list(range(max(rank - self.over, 0), rank))
        value: Any = args.get(self.over) if isinstance(self.over, str) else self.over(args, rank)
        if isinstance(self.over, str) and (value is None or value == []):
            return list(range(rank))
        return sorted({int(v) % rank for v in (value if isinstance(value, list | tuple) else [value])}) if rank else []

    def reason(self, args: Mapping[str, Any]) -> str:
        """Why the dims cannot grow in a call; empty where they can."""
        return self.why(args) if callable(self.why) else self.why

    # analysis ----------------------------------------------------------------------------------------------------

    @property
    def depends_on_all(self) -> bool:
        return self.result == "reduced" or self.kind in ("softmax", "log_softmax", "sorted")

    def relate(self, ctx: Context) -> Dims | list[Dims] | None:
        dims = ctx.operand(ctx.first)
        over, why = self.dims_over(ctx.args, len(dims)), self.reason(ctx.args)
        if self.kind == "extremum" and not why and used(ctx.node, 1):
            why = "the number of its largest or smallest entry is used"
        for i in over:
            if self.role:
                ctx.role(dims[i], self.role, 100)
            if why:
                ctx.freeze(dims[i], why)
        out = list(dims)
        for other, shared in self._others(ctx):
            for i, dim in enumerate(other):
                if i < shared and i not in over:
                    out[i] = ctx.merge([out[i], dim])
                else:
                    ctx.freeze(dim, why)
        return self._results(ctx, [resolve(d) for d in out], over, why)

    def _others(self, ctx: Context) -> list[tuple[Dims, int]]:
        """The dims of the further operands that a call has, and how many of the first ones they share."""
        found = [(ctx.dims(name), shared) for name, shared in self.others.items()]
        return [(d, len(d) if shared is None else shared) for d, shared in found if d is not None]

    def _results(self, ctx: Context, dims: Dims, over: list[int], why: str) -> Dims | list[Dims]:
        out: Dims = []
        for i, dim in enumerate(dims):
            if i not in over or self.result == "same":
                out.append(dim)
            elif self.result == "new":
                out.append(ctx.opaque(ctx.shape[i], why))
                if self.role:
                    ctx.role(out[-1], self.role, 100)
            elif ctx.args.get("keepdim"):
                out.append(UNIT)
        return out if ctx.result_count is None else [list(out) for _ in range(ctx.result_count)]

    # growth ------------------------------------------------------------------------------------------------------

    def grow(self, ctx: GrowthContext) -> Dims | list[Dims] | None:
        dims = ctx.operand(ctx.first)
        over, why = self.dims_over(ctx.args, len(dims)), self.reason(ctx.args)
        grown = [dims[i] for i in over if ctx.grows(dims[i])]
        if grown and why:
            raise ctx.refuse(why)
        if grown:
            self._statistic(ctx, grown, [dims[i] for i in over if not is_unit(dims[i])])
        linear = is_linear(ctx.node)
        out = list(dims)
        for other, shared in self._others(ctx):
            for i, dim in enumerate(other):
                if i < shared and i not in over:
                    out[i] = ctx.merge([out[i], dim]) if linear else ctx.combine(out[i], dim, "mul_first")
                else:
                    ctx.freeze(dim, why)
        if not linear:
            keep = self.kind in _SUMS and keeps_fractions(ctx.node)
            out = [d if keep else annotate(d, Info.changed) for d in map(ctx.close, out)]
        return self._results(ctx, out, over, why)

    def _statistic(self, ctx: GrowthContext, grown: Dims, over: Dims) -> None:
        """What growth of some of the dims does to a statistic over them, and what makes up for it."""
        for d in grown:
            ctx.close(d)
        if self.kind == "extremum":
            contents = {i.content for d in grown for i in infos(d)}
            ctx.selects_among(one=ctx.result_count is not None)  # amax shares a gradient evenly among equal copies
            if ctx.newborn and contents not in ({Content.CONST}, {Content.MEAN}):
                raise ctx.refuse("an extremum over new units")
        elif self.kind in ("variance", "deviation"):
            self._variance(ctx, grown, over)
        elif self.kind == "softmax":
            # what sums over the dim afterwards (attention, split attention) takes the factor out again
            n = ctx.uniform_factor(grown)
            if ctx.newborn:
                raise ctx.refuse("new units under a softmax; grow by whole copies instead")
            if n != 1:
                ctx.rescale_output(float(n))
        elif ctx.newborn:
            self._with_new(ctx, grown)
        else:
            self._copied(ctx, ctx.uniform_factor(grown))

    def _copied(self, ctx: GrowthContext, n: int) -> None:
        """n copies of every entry leave a mean, and make a sum n times as large."""
        if self.kind != "mean" and n != 1:
            ctx.rescale_output(n**-0.5 if self.kind == "norm" else 1.0 / n)

    def _with_new(self, ctx: GrowthContext, grown: Dims) -> None:
        """New entries that hold the mean leave a mean, and zeros a sum."""
        if len(grown) != 1 or not ctx.is_factor(grown[0], False):
            raise ctx.refuse("a statistic over a dim of which the growing axis is only a part")
        mean = self.kind == "mean"
        contents = {i.content for i in infos(grown[0])}
        if mean and contents == {Content.ZERO}:
            ctx.uniform_factor(grown)
            ctx.rescale_output(ctx.growth.new / (ctx.growth.copies * ctx.growth.old))
            return
        wanted = Content.MEAN if mean else Content.ZERO
        for info in infos(grown[0]):
            if info.content is Content.FREE:
                # a mean of squares is a root mean square's: zeros are what it can take
                ctx.demand(info, Content.ZERO if mean and ctx.of_square() else wanted, "a statistic runs over the axis")
        if len(contents) != 1:
            raise ctx.refuse("new units hold different things in the parts that a statistic runs over")
        (content,) = contents
        if self.kind == "count" and _is_real(ctx.node.all_input_nodes[0]):
            raise ctx.refuse("new units may be zero up to rounding only, and would be counted; grow by whole copies")
        if content not in ((Content.MEAN, Content.CONST) if mean else (Content.ZERO,)):
            raise ctx.refuse(f"new units hold {content.value} where {wanted.value} would be exact")
        self._copied(ctx, ctx.uniform_factor(grown))

    def _variance(self, ctx: GrowthContext, grown: Dims, over: Dims) -> None:
        """S / (N - c) for N entries: n copies make S n times as large, new entries at the mean leave it.

        What is left is a constant factor.
        """
        if ctx.newborn:
            _check_new_at_mean(ctx, grown, over)
        n = ctx.uniform_factor(grown)
        before: Size = 1
        for d in over:
            before = before * size_of(d)
        after = ctx.growth.new if ctx.newborn else n * before
        c = _correction(ctx.args)
        if c == 0 and not ctx.newborn:
            return
        if not is_static(before) or before <= c:
            raise ctx.refuse("an unbiased variance over a dynamic number of entries, or over one alone")
        factor = (after - c) / (n * (before - c))
        if factor != 1.0:
            if ctx.result_count is not None:
                raise ctx.refuse("variance and mean come from one op; take var() and mean() by themselves")
            ctx.rescale_output(factor**0.5 if self.kind == "deviation" else factor)


def _check_new_at_mean(ctx: GrowthContext, grown: Dims, over: list[Expr]) -> None:
    if len(grown) != 1 or len(infos(grown[0])) != 1 or not ctx.is_whole(grown[0]):
        raise ctx.refuse("a statistic over a dim of which the growing axis is only a part")
    if len(over) != 1:
        raise ctx.refuse("a variance over several dims, where new units that hold the mean of one still vary")
    (info,) = infos(grown[0])
    if info.content is Content.FREE:
        ctx.demand(info, Content.MEAN, "a statistic runs over the axis")
    if info.content is not Content.MEAN:
        raise ctx.refuse(f"new units hold {info.content.value} where mean would be exact")


def _correction(args: Mapping[str, Any]) -> float:
    if "correction" in args:
        return 1.0 if args["correction"] is None else float(args["correction"])
    return 1.0 if args.get("unbiased", True) else 0.0


# what others ask ------------------------------------------------------------------------------------------------------


def along_of(node: Any) -> Along | None:
    """The row of a call that does something along dims; None for any other value."""
    rule = rule_of(node)
    return rule if isinstance(rule, Along) else None
