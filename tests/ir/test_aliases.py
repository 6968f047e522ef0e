"""Who shares memory and who writes into it, held against what the ops really do."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from fxgrow.errors import GrowthRefused
from fxgrow.ir.memory import Memory, returns_what_it_writes, viewed, writes
from fxgrow.ir.ops import operator_named

sys.path.append(str(Path(__file__).parents[1] / "rules"))
from samples import SAMPLES

aten = torch.ops.aten


def r(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def stats() -> tuple[Tensor, Tensor]:
    return torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)


#: calls that share or write where those of the rule table's samples do not
FURTHER: list[tuple[Any, tuple[Any, ...]]] = [
    (aten.einsum.default, ("ij->ji", [r(3, 4)])),
    (aten.dropout.default, (r(3, 4), 0.5, False)),
    (aten.cartesian_prod.default, ([r(3)],)),
    (aten.to.dtype, (r(3, 4), torch.float64)),
    (aten.to.dtype, (r(3, 4), torch.float32)),
    (aten.type_as.default, (r(3, 4), r(2))),
    (aten.batch_norm.default, (r(3, 4), None, None, *stats(), True, 0.1, 1e-5, False)),
    (aten.instance_norm.default, (r(3, 4, 5), None, None, *stats(), True, 0.1, 1e-5, False)),
    (aten.native_batch_norm.default, (r(3, 4), None, None, *stats(), True, 0.1, 1e-5)),
    (aten._native_batch_norm_legit.default, (r(3, 4), None, None, *stats(), True, 0.1, 1e-5)),
    (aten.embedding_renorm_.default, (r(6, 4) * 9, torch.tensor([1, 2]), 1.0, 2.0)),
    (aten.div.out, (r(3), r(3))),
    (aten.detach_.default, (r(3),)),
    (aten.unbind.int, (r(3, 4),)),
    (aten.tensor_split.sections, (r(4, 4), 2)),
    (aten.constant_pad_nd.default, (r(3, 4), [0, 0])),
    (aten.repeat.default, (r(3, 4), [1, 1])),
    (aten.roll.default, (r(3, 4), [0], [0])),
    (aten.flip.default, (r(3, 4), [])),
    (aten.cat.default, ([r(3, 4)],)),
    (aten.index_select.default, (r(3, 4), 0, torch.arange(3))),
]


def measured(op: Any, args: Any, kwargs: Any) -> tuple[fx.Node, set[int], set[int]]:
    """The op's node over one placeholder per tensor, and the numbers of the tensors it viewed and wrote into."""
    args, kwargs = pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, (args, kwargs))
    leaves, spec = pytree.tree_flatten((args, kwargs))
    graph = fx.Graph()
    nodes = [graph.placeholder(f"t{i}") if isinstance(x, Tensor) else x for i, x in enumerate(leaves)]
    tensors = {i: x for i, x in enumerate(leaves) if isinstance(x, Tensor)}
    before = {i: x.clone() for i, x in tensors.items()}
    made_args, made_kwargs = pytree.tree_unflatten(nodes, spec)
    node = graph.call_function(op, made_args, made_kwargs)
    results = [t for t in pytree.tree_leaves(op(*args, **kwargs)) if isinstance(t, Tensor)]
    storages = {t.untyped_storage()._cdata for t in results}
    shared = {i for i, x in tensors.items() if x.untyped_storage()._cdata in storages}
    changed = {i for i, x in tensors.items() if not torch.equal(torch.nan_to_num(x), torch.nan_to_num(before[i]))}
    return node, shared, changed


def numbers(nodes: list[fx.Node]) -> set[int]:
    return {int(str(n.target)[1:]) for n in nodes}


@pytest.mark.parametrize("op", list(SAMPLES))
def test_no_op_shares_or_writes_unseen(op: str) -> None:
    try:
        target = operator_named(op)
    except GrowthRefused:
        pytest.skip("this torch has no such op")
    for sample in SAMPLES[op]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            node, shared, changed = measured(target, sample.args, sample.kwargs)
        assert shared <= numbers(viewed(node)), f"{op} returns memory of its operands"
        assert changed <= numbers(writes(node)), f"{op} writes into its operands"


@pytest.mark.parametrize(("op", "args"), FURTHER, ids=[f"{i}-{op}" for i, (op, _) in enumerate(FURTHER)])
def test_calls_that_share_only_sometimes(op: Any, args: tuple[Any, ...]) -> None:
    kwargs = {"out": r(3)} if op is aten.div.out else {}
    node, shared, changed = measured(op, args, kwargs)
    assert shared <= numbers(viewed(node))
    assert changed <= numbers(writes(node))


def test_copies_share_nothing() -> None:
    for op, args in (
        (aten.clone.default, (r(3),)),
        (aten.cat.default, ([r(3), r(3)],)),
        (aten.repeat.default, (r(3), [2])),
    ):
        node, shared, _ = measured(op, args, {})
        assert not viewed(node)
        assert not shared


def graph_of(f: Callable[..., Any], *args: Tensor) -> fx.Graph:
    class Model(torch.nn.Module):
        def forward(self, *inputs: Tensor) -> Any:
            return f(*inputs)

    return torch.export.export(Model(), args, strict=False).graph


def named(graph: fx.Graph, name: str) -> fx.Node:
    return next(n for n in graph.nodes if n.name == name)


def test_groups_follow_views_of_views_and_writes_reach_all_of_them() -> None:
    def f(x: Tensor) -> tuple[Tensor, ...]:
        y = x * 2
        row, rest = y.view(2, 6).split([2, 4], 1)
        rest.add_(1)
        other = x + 1
        return y, row, other

    graph = graph_of(f, r(3, 4))
    memory = Memory(graph)
    y, other = named(graph, "mul"), named(graph, "add")
    assert memory.written(y)
    assert not memory.written(other)
    assert [str(n.target) for n in memory.writers(y)] == ["aten.add_.Tensor"]
    assert {n.name for n in memory.sharing(y)} >= {"mul", "view", "getitem", "getitem_1", "add_"}


def test_what_is_surely_one_tensor() -> None:
    def f(x: Tensor) -> Tensor:
        y = x * 2
        y.mul_(3).add_(1)
        return y.view(12).add_(2)

    graph = graph_of(f, r(3, 4))
    memory = Memory(graph)
    y = named(graph, "mul")
    assert memory.same(y, named(graph, "add_"))
    assert not memory.same(y, named(graph, "view"))
    assert memory.same(named(graph, "view"), named(graph, "add__1"))
    assert len(memory.writers(y)) == 3


def test_a_batch_norm_writes_its_running_statistics() -> None:
    graph = graph_of(torch.nn.BatchNorm1d(4).double(), r(3, 4))
    (norm,) = (n for n in graph.nodes if str(n.target) == "aten.batch_norm.default")
    assert writes(norm) == [norm.args[3], norm.args[4]]
    assert not returns_what_it_writes(norm)


def test_several_nodes_that_read_one_buffer_are_one_tensor() -> None:
    graph = fx.Graph()
    first, second, other = graph.get_attr("m"), graph.get_attr("m"), graph.get_attr("n")
    graph.call_function(aten.add_.Tensor, (first, 1))
    memory = Memory(graph)
    assert memory.written(second)
    assert memory.same(first, second)
    assert not memory.written(other)
