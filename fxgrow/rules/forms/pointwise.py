"""Element-wise ops with broadcasting."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import fx

from fxgrow.algebra import UNIT, Expr, is_unit, resolve
from fxgrow.ir.ops import bound_arguments
from fxgrow.rules.annotation import Content, Dims, Info, Site, annotate, infos
from fxgrow.rules.base import Row, jumping_operands
from fxgrow.rules.context import Context, GrowthContext

#: what a call's arguments say
Given = Callable[[dict[str, Any]], bool]


@dataclass(frozen=True, eq=False)
class Pointwise(Row):
    """An element-wise op with broadcasting.

    Attributes:
        combine: how two operands' new entries meet: ``add``, ``mul``, ``zero`` (zero where all are zero) or ``any``
            (nothing is kept).
        zero: f(0) = 0, for the op with its literals.
        mean: the op is affine, so that the mean of the results is the result of the mean.
        neutral: where one of ``self`` and ``other`` is a tensor of zeros the result is the other one, or its negative.
        centres: ``self`` minus its mean is zero in new entries that hold the mean.
        branches: operands of which each entry of the result is one: zero where all of them are.
        into: the operand that is written over, or only lends its shape: what it held does not show in the result.
        domain: the operands that are taken only from a part of the numbers, so that new units, whose values are not
            known, may give no finite result. Of some ops it depends on the arguments.
        why: the words of that refusal; ``{op}``, ``{name}`` (the operand's) and arguments of the call are filled in.
        drawn: the number of leading dims over which a draw at random runs, in train mode, and in eval mode where the
            flag is a plain True; 0 where nothing is drawn. Such a draw is part of the function, and every copy would
            have one of its own.
    """

    combine: str = "any"
    zero: bool | Given = field(default=False, kw_only=True)
    mean: bool | Given = field(default=False, kw_only=True)
    neutral: bool = field(default=False, kw_only=True)
    centres: bool = field(default=False, kw_only=True)
    branches: tuple[str, ...] = field(default=(), kw_only=True)
    into: str = field(default="", kw_only=True)
    domain: tuple[str, ...] | Callable[[dict[str, Any]], tuple[str, ...]] = field(default=(), kw_only=True)
    why: str = field(default="the new units' values may be outside the domain of {op} (operand {name})", kw_only=True)
    drawn: int | Literal["all"] = field(default=0, kw_only=True)

    @property
    def notation(self) -> str:
        return "..., ... -> ..."

    def factors(self, node: fx.Node) -> list[fx.Node]:
        """Those of a product, without a divisor and what was written over."""
        if self.combine != "mul":
            return []
        others = [*jumping_operands(node), bound_arguments(node).get(self.into)]
        return [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor) and n not in others]

    def relate(self, ctx: Context) -> Dims:
        shape = ctx.shape
        out: Dims = []
        operands = [dims for name, dims in ctx.tensor_operands() if name not in self.ignored]
        for i in range(-len(shape), 0):
            exprs = [d[i] for d in operands if -i <= len(d) and not is_unit(d[i])]
            for other in exprs[1:]:
                ctx.unify(exprs[0], other)
            out.append(resolve(exprs[0]) if exprs else ctx.sized(shape[i]))
        return out

    def grow(self, ctx: GrowthContext) -> Dims:
        self._check_domain(ctx)
        self._check_draws(ctx)
        out = self._meet(ctx)
        if self.neutral:
            _add_zeros(ctx, out)
        if self.centres:
            _centre(ctx, out)
        if self.branches:
            _choose(ctx, self.branches, out)
        return out

    def _check_domain(self, ctx: GrowthContext) -> None:
        if not ctx.newborn:
            return
        for name in self.domain(ctx.args) if callable(self.domain) else self.domain:
            if any(info.content is not Content.CONST for dim in ctx.dims(name) or [] for info in infos(dim)):
                raise ctx.refuse(self.why.format_map({**ctx.args, "op": ctx.op, "name": name}))

    def _check_draws(self, ctx: GrowthContext) -> None:
        always = ctx.args.get("train", ctx.args.get("training")) is True and ctx.args.get("p", 1) != 0
        if not self.drawn or not always or not ctx.in_eval:
            return
        dims = ctx.operand(ctx.first)
        if any(ctx.grows(d) for d in (dims if self.drawn == "all" else dims[: self.drawn])):
            raise ctx.refuse(
                "it draws at random in eval mode too, and every copy would have a draw of its own. Give it the mode of "
                "the module: training=self.training"
            )

    def _meet(self, ctx: GrowthContext) -> Dims:
        """What becomes of new entries where the operands meet, dim by dim."""
        given = [(name, dims) for name, dims in ctx.tensor_operands() if name not in self.ignored]
        rank = max((len(d) for _, d in given), default=0)
        operands = [dims for name, dims in given if name != self.into]
        out: Dims = []
        for i in range(-rank, 0):
            exprs = [d[i] if -i <= len(d) else UNIT for d in operands]
            present = [e for e in exprs if not is_unit(e)]
            if not present:
                out.append(UNIT)
            elif not any(ctx.grows(e) for e in present):
                out.append(present[0])
            elif len(operands) == 1:
                zero = self.zero(ctx.args) if callable(self.zero) else self.zero
                mean = self.mean(ctx.args) if callable(self.mean) else self.mean
                out.append(through(present[0], zero=zero, mean=mean))
            else:
                total = exprs[0]
                for e in exprs[1:]:
                    total = ctx.combine(total, e, self.combine)
                out.append(ctx.close(total))
        return out


def through(expr: Expr, *, zero: bool, mean: bool = False) -> Expr:
    """A dim of an operand after a function of each entry: what of its new entries' content is kept."""

    def one(info: Info) -> Info:
        keep = (
            info.content is Content.CONST
            or (info.content is Content.ZERO and zero)
            or (info.content is Content.MEAN and mean)
        )
        return info.becomes(info.content if keep else Content.FREE, zeroable=zero)

    return annotate(expr, one)


def _add_zeros(ctx: GrowthContext, out: Dims) -> None:
    """``a + 0`` is ``a``."""
    for name, other in (("self", "other"), ("other", "self")):
        kept = ctx.dims(name)
        if not kept or not ctx.is_zero(ctx.args[other]) or ctx.args.get("alpha", 1) != 1:
            continue
        for i in range(-len(kept), 0):
            if not is_unit(kept[i]):
                out[i] = ctx.close(kept[i])


def _centre(ctx: GrowthContext, out: Dims) -> None:
    """``x - mean(x)`` is zero where new entries hold the mean."""
    reduced, left = ctx.mean_of(ctx.args["other"]), ctx.dims("self")
    if reduced is None or left is None or reduced[0] is not ctx.args["self"] or ctx.args.get("alpha", 1) != 1:
        return
    wide = [i for i in reduced[1] if not is_unit(left[i])]
    if len(wide) == 1 and ctx.is_whole(left[wide[0]]):
        (i,) = wide
        if all(info.content is Content.MEAN for info in infos(left[i])):
            out[i] = annotate(out[i], lambda info: info.becomes(Content.ZERO))


def _zero_of(sources: frozenset[Site], info: Info) -> Info:
    return Info(Content.ZERO, sources)


def _choose(ctx: GrowthContext, branches: tuple[str, ...], out: Dims) -> None:
    """Where each entry is one of several values, it is zero where all of them are."""
    dims = [ctx.dims(name) or [] for name in branches if not ctx.is_zero(ctx.args[name])]
    for i in range(-len(out), 0):
        found = [infos(d[i]) if -i <= len(d) else [] for d in dims]
        if found and all(here and all(x.content is Content.ZERO for x in here) for here in found):
            sources = frozenset().union(*(info.sources for here in found for info in here))
            out[i] = annotate(out[i], functools.partial(_zero_of, sources))
