"""Reductions over dims (means, sums, variances, extrema), softmax, pooling, and sampling of images."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import fx

from fxgrow.algebra import product, quotient, size_of
from fxgrow.ir.ops import bound_arguments
from fxgrow.rules import values
from fxgrow.rules.annotation import Dims
from fxgrow.rules.base import Rule, register_table
from fxgrow.rules.context import Context
from fxgrow.rules.forms import Along, Opaque, Structural
from fxgrow.rules.forms.along import in_whole_numbers
from fxgrow.rules.values import of_operand


def table() -> dict[str, Rule]:
    """Statistics that growth leaves exact, those that it does not, softmax, and windows over space."""
    frozen = "its entries are reduced in a way that growth would change"
    pooled, sampled = "pooling runs over it", "its entries are interpolated"
    return {
        # statistics
        "aten.mean aten.mean.dim": Along("dim", "mean"),
        "aten.sum aten.sum.dim_IntList": Along("dim", "sum"),
        "aten.count_nonzero aten.count_nonzero.dim_IntList": Along("dim", "count"),
        "aten.linalg_vector_norm aten.norm.ScalarOpt_dim": Along(
            "dim", "norm", _other_norm, jumps=_where_order_0_counts
        ),
        """
        aten.var aten.var.dim aten.var.correction
        aten.var_mean.dim aten.var_mean.correction
        """: Along("dim", "variance"),
        "aten.std aten.std.dim aten.std.correction": Along("dim", "deviation"),
        """
        aten.amax aten.amin aten.max aten.max.dim aten.min aten.min.dim
        """: Along("dim", "extremum", selects=True, range=of_operand),
        """
        aten.any aten.any.dim aten.any.dims aten.all aten.all.dim aten.all.dims
        """: Along("dim", "extremum", selects=True),
        # statistics that cannot take copies, or that no model has needed yet
        """
        aten.median aten.median.dim aten.nanmedian aten.nanmedian.dim
        aten.aminmax aten.kthvalue aten.mode
        """: Along("dim", "mixed", frozen, selects=True),
        """
        aten.argmax aten.argmin aten.quantile.scalar
        aten.prod aten.prod.dim_int aten.logsumexp aten.nansum aten.nanmean
        aten.var_mean aten.std_mean aten.std_mean.dim aten.std_mean.correction
        aten.trapezoid.dx aten.trapz.dx
        """: Along("dim", "mixed", frozen),
        "aten.quantile": Opaque(frozen),
        "aten.trapezoid.x aten.trapz.x": Opaque("it is integrated over places of its own"),
        # softmax: n copies of an entry share its weight, so that the result times n is as it was
        "aten.softmax.int aten._softmax aten._safe_softmax": Along(
            "dim", "softmax", result="same", range=values.fraction
        ),
        "aten.log_softmax.int aten._log_softmax": Along(
            "dim", "log_softmax", "softmax runs over it", result="same"
        ),  # a logarithm cannot be scaled
        # windows
        "aten.avg_pool1d aten.adaptive_avg_pool1d": Along(1, "mean", pooled, result="new", role="spatial"),
        "aten.avg_pool2d aten.adaptive_avg_pool2d aten._adaptive_avg_pool2d": Along(
            2, "mean", pooled, result="new", role="spatial"
        ),
        "aten.avg_pool3d aten.adaptive_avg_pool3d": Along(3, "mean", pooled, result="new", role="spatial"),
        "aten.max_pool1d aten.max_pool1d_with_indices aten.adaptive_max_pool1d": Along(
            1, "extremum", pooled, result="new", role="spatial", selects=True
        ),
        "aten.max_pool2d aten.max_pool2d_with_indices aten.adaptive_max_pool2d": Along(
            2, "extremum", pooled, result="new", role="spatial", selects=True
        ),
        "aten.max_pool3d aten.max_pool3d_with_indices aten.adaptive_max_pool3d": Along(
            3, "extremum", pooled, result="new", role="spatial", selects=True
        ),
        "aten.max_unpool2d": Along(
            2, "mixed", "unpooling runs over it", result="new", role="spatial", others={"indices": None}
        ),
        "aten.max_unpool3d": Along(
            3, "mixed", "unpooling runs over it", result="new", role="spatial", others={"indices": None}
        ),
        "aten.im2col": Structural(_patches, moves=False, range=None),
        "aten.col2im": Structural(_folded, moves=False, range=None),
        # images at other places
        """
        aten.upsample_nearest1d aten.upsample_nearest1d.vec
        aten._upsample_nearest_exact1d aten._upsample_nearest_exact1d.vec
        """: Along(1, "interpolation", pooled, result="new", role="spatial", selects=True),
        "aten.upsample_linear1d aten.upsample_linear1d.vec": Along(
            1, "interpolation", pooled, result="new", role="spatial"
        ),
        """
        aten.upsample_nearest2d aten.upsample_nearest2d.vec
        aten._upsample_nearest_exact2d aten._upsample_nearest_exact2d.vec
        """: Along(2, "interpolation", pooled, result="new", role="spatial", selects=True),
        """
        aten.upsample_bilinear2d aten.upsample_bilinear2d.vec
        aten._upsample_bilinear2d_aa aten._upsample_bilinear2d_aa.vec
        aten.upsample_bicubic2d aten.upsample_bicubic2d.vec
        aten._upsample_bicubic2d_aa aten._upsample_bicubic2d_aa.vec
        """: Along(2, "interpolation", pooled, result="new", role="spatial"),
        """
        aten.upsample_nearest3d aten.upsample_nearest3d.vec
        aten._upsample_nearest_exact3d aten._upsample_nearest_exact3d.vec
        """: Along(3, "interpolation", pooled, result="new", role="spatial", selects=True),
        "aten.upsample_trilinear3d aten.upsample_trilinear3d.vec": Along(
            3, "interpolation", pooled, result="new", role="spatial"
        ),
        "aten.grid_sampler aten.grid_sampler_2d aten.grid_sampler_3d": Along(
            _space, "interpolation", sampled, result="new", others={"grid": 1}, jumps=_where_nearest
        ),
    }


def _order(args: Mapping[str, Any]) -> float:
    order = args.get("ord", args.get("p"))
    return 2.0 if order is None else float(order)


def _other_norm(args: Mapping[str, Any]) -> str:
    """a norm of another order than 2"""
    return "" if _order(args) == 2 else "its entries are reduced in a way that growth would change"


def _where_order_0_counts(node: fx.Node) -> list[fx.Node]:
    """where order 0 counts the entries that are not zero"""
    return node.all_input_nodes if _order(bound_arguments(node)) == 0 else in_whole_numbers(node)


def _space(args: Mapping[str, Any], rank: int) -> list[int]:
    """the dims after samples and channels"""
    return list(range(2, rank))


def _where_nearest(node: fx.Node) -> list[fx.Node]:
    """the grid, where the nearest pixel is taken"""
    args = bound_arguments(node)
    return [args["grid"]] if args["interpolation_mode"] == 1 else []


def _patches(ctx: Context, dims: Dims) -> Dims:
    """``unfold``: every window of an image laid out beside its channel."""
    *lead, channels, height, width = dims
    size = math.prod(ctx.args["kernel_size"])
    for d in (height, width):
        ctx.freeze(d, "windows are cut out of it")
        ctx.role(d, "spatial", 100)
    window = ctx.inner(len(lead), size)
    ctx.freeze(window, "the window of an unfold")
    ctx.role(window, "kernel", 100)
    windows = ctx.opaque(ctx.shape[-1], "windows are cut out of it")
    return [*map(ctx.close, lead), product([ctx.close(channels), window]), windows]


def _folded(ctx: Context, dims: Dims) -> Dims:
    """``fold``: windows summed into an image, channel by channel."""
    *lead, columns, windows = dims
    size = math.prod(ctx.args["kernel_size"])
    ctx.freeze(windows, "windows are laid over each other")
    channels, window = ctx.regroup([ctx.close(columns)], [quotient(size_of(columns), size), size])
    ctx.freeze(window, "the window of a fold")
    ctx.role(window, "kernel", 100)
    space = [ctx.opaque(s, "windows are laid over each other") for s in ctx.shape[-2:]]
    for d in space:
        ctx.role(d, "spatial", 100)
    return [*map(ctx.close, lead), channels, *space]


register_table(__name__, table())
