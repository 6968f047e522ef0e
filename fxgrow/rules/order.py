"""Ops that put the entries of a dim into another order, or mix them with their neighbours: the other dims pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx

from fxgrow.ir.ops import bound_arguments
from fxgrow.rules.base import Rule, register_table
from fxgrow.rules.forms import Along, Opaque
from fxgrow.rules.forms.along import keeps_fractions
from fxgrow.rules.values import of_operand, running_sum


def table() -> dict[str, Rule]:
    """Orders of a dim, and what is computed along it entry after entry."""
    reversed_ = "its entries are reversed"
    ordered = "its entries depend on their order"
    return {
        # entries elsewhere
        "aten.roll": Along("dims", "mixed", "its entries are rolled", result="new", moves=True, range=of_operand),
        "aten.flip": Along("dims", "mixed", reversed_, result="new", moves=True, range=of_operand),
        "aten.fliplr": Along(_second, "mixed", reversed_, result="new", moves=True, range=of_operand),
        "aten.flipud": Along(_first, "mixed", reversed_, result="new", moves=True, range=of_operand),
        "aten.rot90": Along("dims", "mixed", "it is rotated", result="new", moves=True, range=of_operand),
        "aten.tril aten.triu": Along(2, "mixed", "a triangle is cut out", result="new", moves=True),
        "aten.pad aten.constant_pad_nd": Along(
            _padded, "mixed", "it is padded", result="new", moves=True, linear=_pads_with_zeros
        ),
        # entries by size
        "aten.sort aten.sort.stable aten.argsort aten.argsort.stable": Along(
            "dim", "sorted", ordered, result="new", moves=True, linear=False
        ),
        "aten.msort": Along(_first, "sorted", ordered, result="new", moves=True, linear=False),
        "aten.topk": Along(  # routers pick experts so
            "dim",
            "sorted",
            "the largest of its entries are picked, and copies would crowd others out",
            result="new",
            moves=True,
            linear=False,
            role="experts",
        ),
        # entry after entry
        "aten.cumsum": Along(
            "dim", "mixed", ordered, result="new", moves=True, linear=keeps_fractions, range=running_sum
        ),
        "aten.cumprod aten.logcumsumexp aten.cummax aten.cummin": Along(
            "dim", "mixed", ordered, result="new", moves=True, linear=False
        ),
        "aten.diff": Along(
            "dim",
            "mixed",
            "neighbouring entries are subtracted",
            result="new",
            moves=True,
            others={"prepend": None, "append": None},
        ),
        "aten.renorm": Along(_all_but_dim, "mixed", "a norm runs over it", result="new", moves=True, linear=False),
        # places of their own
        "aten.affine_grid_generator": Opaque("it makes the places that an image is sampled at"),
        "aten.diag aten.trace": Opaque("it runs along a diagonal, which copies would leave"),
    }


def _first(args: Mapping[str, Any], rank: int) -> list[int]:
    """the first dim"""
    return [0]


def _second(args: Mapping[str, Any], rank: int) -> list[int]:
    """the second dim"""
    return [1]


def _all_but_dim(args: Mapping[str, Any], rank: int) -> list[int]:
    """all dims but dim"""
    return [i for i in range(rank) if i != args["dim"] % rank]


def _padded(args: Mapping[str, Any], rank: int) -> list[int]:
    """the dims that pad widens: pairs of numbers, those of the last dim first"""
    return [rank - 1 - i // 2 for i, p in enumerate(args["pad"]) if p != 0]


def _pads_with_zeros(node: fx.Node) -> bool:
    """The entries around are zeros, or copies."""
    return not bound_arguments(node)["value"]


register_table(__name__, table())
