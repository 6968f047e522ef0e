"""Ops that put the entries of a dim into another order, or mix them with their neighbours: the other dims pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from fxgrow.ir.ops import bound_arguments
from fxgrow.rules.annotation import Content, Dims, Info, annotate
from fxgrow.rules.base import register_rule
from fxgrow.rules.context import Context
from fxgrow.rules.forms import Opaque, Structural


def _nonlinear(info: Info) -> Info:
    return info.becomes(info.content if info.content is Content.CONST else Content.FREE, zeroable=False)


def Blocked(
    which: Callable[[Any, int], list[int]], why: str, linear: bool | Callable[[Any], bool] = True, role: str = ""
) -> Structural:
    """Mixes or reorders entries along some dims, which cannot grow; the others pass."""

    def f(ctx: Context, dims: Dims) -> Dims:
        blocked = {w % max(len(dims), 1) for w in which(ctx.args, len(dims))}
        out: Dims = []
        for i, dim in enumerate(dims):
            if i in blocked:
                if role:
                    ctx.role(dim, role, 100)
                ctx.freeze(dim, why)
                out.append(ctx.opaque(ctx.shape[i], why))
            else:
                keep = linear(ctx.args) if callable(linear) else linear
                out.append(dim if keep else annotate(ctx.close(dim), _nonlinear))
        n = ctx.result_count
        return out if n is None else [list(out) for _ in range(n)]  # type: ignore[misc]

    def is_linear(node: fx.Node) -> bool:
        return linear(bound_arguments(node)) if callable(linear) else linear

    return Structural(f, linear=is_linear, jumps=lambda node: [] if is_linear(node) else node.all_input_nodes)


def _listed(name: str) -> Callable[[Any, int], list[int]]:
    def which(args: Any, rank: int) -> list[int]:
        value = args.get(name)
        if value is None or value == []:
            return list(range(rank))
        return list(value) if isinstance(value, list | tuple) else [int(value)]

    return which


register_rule(["aten.roll.default"], Blocked(_listed("dims"), "its entries are rolled"))
register_rule(["aten.flip.default"], Blocked(_listed("dims"), "its entries are reversed"))
register_rule("aten.rot90.default", Blocked(_listed("dims"), "it is rotated"))
register_rule(
    [f"aten.{n}.default" for n in ("cumprod", "sort", "argsort", "logcumsumexp", "cummax", "cummin")]
    + ["aten.sort.stable", "aten.argsort.stable"],
    Blocked(_listed("dim"), "its entries depend on their order", linear=False),
)
register_rule("aten.cumsum.default", Blocked(_listed("dim"), "its entries depend on their order"))
register_rule("aten.msort.default", Blocked(lambda a, rank: [0], "its entries depend on their order", linear=False))
register_rule("aten.fliplr.default", Blocked(lambda a, rank: [1], "its entries are reversed"))
register_rule("aten.flipud.default", Blocked(lambda a, rank: [0], "its entries are reversed"))
register_rule(
    "aten.renorm.default",
    Blocked(lambda a, rank: [i for i in range(rank) if i != a["dim"] % rank], "a norm runs over it", linear=False),
)


def _diff(ctx: Context, dims: Dims) -> Dims:
    """Differences of neighbours, those of other tensors before and behind among them."""
    i, why = int(ctx.args["dim"]) % len(dims), "neighbouring entries are subtracted"
    operands = [dims, *(d for d in (ctx.dims("prepend"), ctx.dims("append")) if d is not None)]
    for d in operands:
        ctx.freeze(d[i], why)
    columns = list(zip(*operands, strict=True))
    return [ctx.opaque(ctx.shape[i], why) if j == i else ctx.merge(list(c)) for j, c in enumerate(columns)]


register_rule("aten.diff.default", Structural(_diff))


register_rule(
    "aten.topk.default",
    Blocked(  # routers pick experts so
        _listed("dim"),
        "the largest of its entries are picked, and copies would crowd others out",
        linear=False,
        role="experts",
    ),
)


def _padded(args: Any, rank: int) -> list[int]:
    pad = list(args["pad"])
    return [rank - 1 - i // 2 for i, p in enumerate(pad) if p != 0]


register_rule(
    ["aten.pad.default", "aten.constant_pad_nd.default"],
    Blocked(_padded, "it is padded", linear=lambda a: not a["value"]),
)
register_rule(
    ["aten.tril.default", "aten.triu.default"], Blocked(lambda a, rank: [rank - 2, rank - 1], "a triangle is cut out")
)


register_rule("aten.affine_grid_generator.default", Opaque("it makes the places that an image is sampled at"))
register_rule(["aten.diag.default", "aten.trace.default"], Opaque("it runs along a diagonal, which copies would leave"))
