"""Tensors made from numbers alone: of one value, counted, drawn."""

from __future__ import annotations

from fxgrow.rules import values
from fxgrow.rules.base import Rule, register_table
from fxgrow.rules.forms import Made


def table() -> dict[str, Rule]:
    """The rows of this family."""
    return {
        # one value, whatever the sizes
        "aten.zeros aten.new_zeros": Made("size", value=0),
        "aten.ones aten.new_ones": Made("size", value=1),
        "aten.full aten.new_full": Made("size", value="fill_value"),
        # told apart
        "aten.arange aten.arange.start aten.arange.start_step": Made(
            why="its entries are consecutive numbers", range=values.counted
        ),
        "aten.linspace": Made(why="its entries are consecutive numbers"),
        "aten.eye aten.eye.m": Made(why="its entries are consecutive numbers"),
        "aten.scalar_tensor": Made(why="its entries are consecutive numbers", value="s"),
        "aten.tril_indices aten.triu_indices": Made(why="its entries are consecutive numbers"),
        "aten.rand aten.randn aten.randint aten.randint.low aten.randperm aten.normal.float_float": Made(
            why="its entries are drawn at random or not set"
        ),
        "aten.empty.memory_format aten.new_empty": Made(why="its entries are drawn at random or not set"),
    }


register_table(__name__, table())
