"""Writes by index: scatter, index_add, index_copy, index_fill, index_put, select_scatter."""

from __future__ import annotations

import torch
from torch import fx

from fxgrow.algebra import Conflict, Expr, is_unit, same_size, size_of
from fxgrow.rules.annotation import Dims
from fxgrow.rules.base import Rule, register_table
from fxgrow.rules.context import Context
from fxgrow.rules.forms import Opaque, Written
from fxgrow.rules.forms.written import Places
from fxgrow.rules.indexing import indexed_dims


def table() -> dict[str, Rule]:
    """Where the entries are written, and what is."""
    return {
        # one number for each entry
        "aten.scatter(_).src aten.scatter(_).reduce aten.scatter_add(_) aten.scatter_reduce(_).two": Written(
            one_by_one, "src"
        ),
        "aten.scatter(_).value aten.scatter(_).value_reduce": Written(one_by_one, "value"),
        # one number for each slice
        "aten.index_add(_) aten.index_copy(_)": Written(slice_by_slice, "source"),
        "aten.index_fill(_).int_Scalar aten.index_fill(_).int_Tensor": Written(slice_by_slice, "value"),
        "aten.select_scatter": Written(one_slice, "src"),
        "aten.slice_scatter": Written(some_slices, "src"),
        # an index for each of several dims
        "aten.index_put(_)": Written(at_indices, "values"),
        # in their order
        "aten.masked_scatter(_) aten.take aten.put(_)": Opaque("its entries are taken or written in their order"),
    }


WHY = "its entries are written by number"


def one_by_one(ctx: Context, source: Dims | None) -> Places:
    """x[…, index[…, j, …], …] = source[…, j, …] along dim"""
    dims, index = ctx.dims("self"), ctx.dims("index")
    if not dims or not index:
        raise Conflict("writes into a scalar")
    at = int(ctx.args["dim"]) % len(dims)
    numbered: dict[int, str] = {}
    frozen: list[tuple[Expr, str]] = []
    for i, theirs in enumerate(zip(*([index, source] if source is not None else [index]), strict=True)):
        if i == at or not all(same_size(size_of(d), size_of(dims[i])) for d in theirs):
            numbered[i] = WHY if i == at else "only its first entries are written"
            frozen += [(d, numbered[i]) for d in theirs]
    met = [i for i in range(len(dims)) if i not in numbered]
    return Places(
        numbered, {i: source[i] for i in met} if source is not None else {}, {i: index[i] for i in met}, frozen
    )


def slice_by_slice(ctx: Context, source: Dims | None) -> Places:
    """x[…, index[j], …] = source[…, j, …] along dim"""
    dims, source = ctx.dims("self"), source or None
    if not dims or (source is not None and len(source) != len(dims)):
        raise Conflict("writes into a scalar, or of one")
    at = int(ctx.args["dim"]) % len(dims)
    written = [source[at]] if source is not None else []
    met = {i: d for i, d in enumerate(source or []) if i != at}
    return Places({at: WHY}, met, frozen=[(d, WHY) for d in (*(ctx.dims("index") or []), *written)])


def one_slice(ctx: Context, source: Dims | None) -> Places:
    """x[…, index, …] = source along dim"""
    dims = ctx.operand("self")
    at = int(ctx.args["dim"]) % len(dims)
    return Places({at: WHY}, dict(zip([i for i in range(len(dims)) if i != at], source or [], strict=True)))


def some_slices(ctx: Context, source: Dims | None) -> Places:
    """x[…, start … end, …] = source along dim"""
    at = int(ctx.args["dim"]) % len(ctx.operand("self"))
    met = dict(enumerate(source or []))
    return Places({at: WHY}, frozen=[(met.pop(at), WHY)], source=met)


def at_indices(ctx: Context, source: Dims | None) -> Places:
    """x[indices] = source"""
    dims = ctx.operand("self")
    at: list[int] = []
    groups: list[int] = []  # where runs of indexed dims start
    frozen: list[tuple[Expr, str]] = []
    rank = 0
    for node, covered in indexed_dims(ctx.args["indices"]):
        value = node.meta["val"]
        rank = max(rank, 1 if value.dtype in (torch.bool, torch.uint8) else value.dim())
        if not at or at[-1] != covered.start - 1:
            groups.append(covered.start)
        at += covered
    for node in ctx.args["indices"]:
        if isinstance(node, fx.Node):
            frozen += [(d, "it indexes another tensor") for d in ctx.dims(node) or []]
    first = groups[0] if len(groups) == 1 else 0
    kept = [i for i in range(len(dims)) if i not in at]
    # the dim that each dim of the source belongs to; None for those of the indices
    order = [*kept[:first], *[None] * rank, *kept[first:]]
    if source is None or len(source) > len(order):
        raise Conflict("its values do not fit what they are written to")
    met: dict[int, Expr] = {}
    for i, theirs in zip(order[len(order) - len(source) :], source, strict=True):
        if i is None:
            frozen.append((theirs, WHY))
        elif not is_unit(theirs):
            met[i] = theirs
    return Places(dict.fromkeys(at, WHY), met, frozen=frozen)


register_table(__name__, table())
