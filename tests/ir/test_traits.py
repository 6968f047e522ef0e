"""The table of traits, against the ops."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxgrow.ir.ops import operator_named
from fxgrow.ir.traits import TRAITS, Trait, follows_mode, traits_of
from tests.rules.samples import SAMPLES

#: what a sample of the op would show draws at random, or reads the dtype it is given
SKIPPED = {
    "aten.dropout",
    "aten.dropout_",
    "aten.empty",
    "aten.empty_like",
    "aten.new_empty",
    "aten.to",
    "aten._to_copy",
}


def calls(trait: Trait) -> Iterator[tuple[str, Any]]:
    for op, samples in SAMPLES.items():
        if trait in traits_of(op) and op.rpartition(".")[0] not in SKIPPED:
            yield from ((op, s) for s in samples)


def run(op: str, sample: Any, dtype: torch.dtype) -> list[Tensor]:
    """The results of a call whose numbers are those of float32, computed in ``dtype``."""

    def cast(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x.float().to(dtype) if x.is_floating_point() else x.clone()

    args, kwargs = pytree.tree_map(cast, (sample.args, sample.kwargs))
    return [t for t in pytree.tree_leaves(operator_named(op)(*args, **kwargs)) if isinstance(t, Tensor)]


def test_every_op_of_the_table_exists() -> None:
    missing = [n for names in TRAITS.values() for n in names if not hasattr(torch.ops.aten, n.removeprefix("aten."))]
    assert not missing


def test_nothing_is_rounded_by_exact_ops() -> None:
    tried = set()
    for op, sample in calls(Trait.EXACT):
        if any(isinstance(x, Tensor) and x.is_complex() for x in pytree.tree_leaves((sample.args, sample.kwargs))):
            continue
        for coarse, fine in zip(run(op, sample, torch.float32), run(op, sample, torch.float64), strict=True):
            if coarse.is_floating_point():
                assert torch.equal(coarse, fine.to(coarse.dtype)), op
        tried.add(op)
    assert len(tried) > 100


def test_ops_that_hand_on_their_operand_do() -> None:
    x = torch.randn(3, 4)
    for name in TRAITS[Trait.SAME]:
        (overload,) = getattr(torch.ops.aten, name.removeprefix("aten.")).overloads()[:1]
        assert torch.equal(operator_named(f"{name}.{overload}")(x.clone()), x), name


@pytest.mark.parametrize("name", sorted(TRAITS[Trait.PRODUCT]))
def test_a_product_with_zero_is_zero(name: str) -> None:
    found = [(op, s) for op, s in calls(Trait.PRODUCT) if op.rpartition(".")[0] == name and "Scalar" not in op]
    assert found
    op, sample = found[0]
    place = 1 if name in ("aten.addcmul", "aten.addmm", "aten.baddbmm") else 0  # what is added comes first
    zeroed = [torch.zeros_like(x) if i == place else x for i, x in enumerate(sample.args)]
    added = [i for i, x in enumerate(sample.args) if i > 1 and isinstance(x, Tensor) and not place]  # biases
    zeroed = [torch.zeros_like(x) if i in added else x for i, x in enumerate(zeroed)]
    result = operator_named(op)(*zeroed, **sample.kwargs)
    assert torch.equal(result, sample.args[0].expand_as(result) if place else torch.zeros_like(result))


def test_draws_differ_from_call_to_call() -> None:
    for name in sorted(TRAITS[Trait.DRAWS] - TRAITS[Trait.KEEPS]):
        base = name.removeprefix("aten.")
        if base.endswith("_"):
            a, b = (getattr(torch.zeros(50), base)() for _ in range(2))
        elif base in ("rand", "randn"):
            a, b = (getattr(torch, base)(50) for _ in range(2))
        elif base.endswith("_like"):
            a, b = (getattr(torch, base)(torch.zeros(50)) for _ in range(2))
        elif base == "normal":
            a, b = (torch.normal(0.0, 1.0, (50,)) for _ in range(2))
        else:
            a, b = (operator_named("aten.uniform.default")(torch.zeros(50)) for _ in range(2))
        assert not torch.equal(a, b), name


def test_arguments_that_follow_the_mode() -> None:
    dropout, linear = torch.ops.aten.dropout.default._schema, torch.ops.aten.cdist.default._schema
    assert follows_mode(dropout, "train") and follows_mode(dropout, "p")
    assert not follows_mode(linear, "p")
    assert traits_of(len) == frozenset()
