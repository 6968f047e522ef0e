"""Ops that only move elements: reshapes, permutations, splits, concatenations, slices, broadcasts.

The functions on dims stand in :mod:`fxgrow.rules.layout`.
"""

from __future__ import annotations

from fxgrow.rules import layout
from fxgrow.rules.base import Rule, register_table
from fxgrow.rules.forms import Structural


def table() -> dict[str, Rule]:
    """The rows of this family."""
    return {
        # other sizes
        "aten.view aten._unsafe_view": Structural(layout.reshape, layout.resize_view),
        "aten.reshape": Structural(layout.reshape, layout.resize_reshape),
        "aten.flatten.using_ints aten.ravel": Structural(layout.reshape),
        "aten.unflatten.int": Structural(layout.reshape, layout.resize_unflatten),
        "aten.view_as aten.reshape_as": Structural(layout.view_as),
        # another order
        "aten.transpose.int aten.swapaxes": Structural(layout.transpose),
        "aten.permute": Structural(layout.permute),
        "aten.mT aten.mH aten.matrix_H aten.adjoint": Structural(layout.swap_last),
        "aten.t aten.numpy_T": Structural(layout.reverse),
        "aten.movedim.int aten.movedim.intlist": Structural(layout.movedim),
        # dims of size one
        "aten.unsqueeze": Structural(layout.unsqueeze),
        "aten.squeeze aten.squeeze.dim aten.squeeze.dims": Structural(layout.squeeze),
        "aten.atleast_1d": Structural(layout.at_least_1d),
        "aten.atleast_2d": Structural(layout.at_least_2d),
        "aten.atleast_3d": Structural(layout.at_least_3d),
        # broadcasts
        "aten.expand aten.broadcast_to": Structural(layout.expand, layout.resize_expand),
        "aten.expand_as": Structural(layout.expand_as),
        "aten.broadcast_tensors": Structural(layout.broadcast, operand="tensors"),
        "aten.meshgrid aten.meshgrid.indexing": Structural(layout.mesh_grid, operand="tensors"),
        # repetitions
        "aten.repeat": Structural(layout.repeat, layout.resize_repeat),
        "aten.tile": Structural(layout.tile, layout.resize_tile),
        "aten.repeat_interleave.self_int": Structural(layout.repeat_interleave, layout.resize_repeat_interleave),
        # channels, windows, diagonals, complex numbers
        "aten.channel_shuffle aten.native_channel_shuffle": Structural(
            layout.channel_shuffle, layout.resize_channel_shuffle
        ),
        "aten.pixel_shuffle": Structural(layout.pixel_shuffle),
        "aten.pixel_unshuffle": Structural(layout.pixel_unshuffle),
        "aten.unfold": Structural(layout.unfold),
        "aten.diagonal": Structural(layout.diagonal),
        "aten.diag_embed": Structural(layout.diag_embed, range=None),
        "aten.view_as_real": Structural(layout.view_as_real),
        "aten.view_as_complex": Structural(layout.view_as_complex),
        # into parts
        "aten.split.Tensor aten.unsafe_split.Tensor": Structural(layout.split, layout.resize_split),
        "aten.split.sizes aten.split_with_sizes aten.unsafe_split_with_sizes": Structural(
            layout.split_with_sizes, layout.resize_split
        ),
        "aten.chunk aten.unsafe_chunk": Structural(layout.chunk, layout.resize_split),
        "aten.tensor_split.sections aten.tensor_split.indices": Structural(layout.tensor_split, layout.resize_split),
        "aten.hsplit.int aten.hsplit.array": Structural(layout.hsplit, layout.resize_hsplit),
        "aten.vsplit.int aten.vsplit.array": Structural(layout.vsplit, layout.resize_vsplit),
        "aten.dsplit.int aten.dsplit.array": Structural(layout.dsplit, layout.resize_dsplit),
        "aten.unbind.int": Structural(layout.unbind),
        # together
        "aten.cat aten.concat aten.concatenate": Structural(layout.cat, operand="tensors"),
        "aten.hstack": Structural(layout.hstack, operand="tensors"),
        "aten.vstack aten.row_stack": Structural(layout.vstack, operand="tensors"),
        "aten.dstack": Structural(layout.dstack, operand="tensors"),
        "aten.column_stack": Structural(layout.column_stack, operand="tensors"),
        "aten.stack": Structural(layout.stack, operand="tensors"),
        # one part
        "aten.slice.Tensor": Structural(layout.slice_range, layout.resize_slice, picks=layout.sliced),
        "aten.narrow": Structural(layout.narrow, layout.resize_narrow),
        "aten.select.int": Structural(layout.select, picks=layout.selected),
    }


register_table(__name__, table())
