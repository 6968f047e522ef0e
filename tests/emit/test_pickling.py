"""Grown modules go through pickle, ``torch.save``, ``copy.deepcopy`` and into spawned processes."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fxgrow
from tests.models import small_gpt, tokens, trained
from tests.test_growth import GROWTHS
from tests.trace.test_modes import Net


def saved(module: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS: dict[str, Callable[[nn.Module], Any]] = {
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch.save": saved,
    "deepcopy": copy.deepcopy,
}


@pytest.fixture(scope="module")
def gpt() -> Any:
    """Repeated blocks, ties, two calls, one of them with a plain value."""
    model = trained(small_gpt()).eval()
    x, y = tokens()
    return model, fxgrow.grow(model, GROWTHS["hidden x2"], calls={"train": (x, y), "generate": (x,)}, verify=False)


@pytest.mark.parametrize("way", WAYS)
def test_a_grown_module_comes_back(gpt: Any, way: str) -> None:
    model, growth = gpt
    module = growth.module
    module.get_parameter("transformer.h.0.ln_1.weight").requires_grad_(False)
    module.transformer.h[1].train()
    again = WAYS[way](module)
    x, y = tokens(4, batch=2, length=9)
    torch.testing.assert_close(again(x, y), module(x, y), rtol=0, atol=0)
    torch.testing.assert_close(again(x)[0], module(x)[0], rtol=0, atol=0)
    assert {n: p.requires_grad for n, p in again.named_parameters()} == {
        n: p.requires_grad for n, p in module.named_parameters()
    }
    assert {n: m.training for n, m in again.named_modules()} == {n: m.training for n, m in module.named_modules()}
    assert again.lm_head.weight is again.transformer.wte.weight
    assert again.code == module.code
    second = fxgrow.grow(again, GROWTHS["stream x2"], calls={"train": (x, y), "generate": (x,)}, verify=False).module
    torch.testing.assert_close(second.eval()(x, y), model(x, y), rtol=0, atol=1e-12)
    module.transformer.h[1].eval()


@pytest.mark.parametrize("way", WAYS)
def test_both_modes_and_a_plain_graph(way: str) -> None:
    x = torch.randn(4, 6, dtype=torch.float64)
    for model in (trained(Net(aux=True).double()), trained(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3)).double())):
        axis = "stem.weight:0" if isinstance(model, Net) else "0.weight:0"
        module = fxgrow.grow(model, {"op": "widen", "axis": axis, "factor": 2}, (x,), verify=False).module
        again = WAYS[way](module)
        for mode in (True, False):
            torch.manual_seed(0)
            expected = module.train(mode)(x)
            torch.manual_seed(0)
            torch.testing.assert_close(again.train(mode)(x), expected, rtol=0, atol=1e-12)


def _run(module: nn.Module, x: torch.Tensor, queue: Any) -> None:
    queue.put(module(x).detach().tolist())


def test_a_spawned_process_gets_it() -> None:
    x = torch.randn(4, 6, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3)).double()
    module = fxgrow.grow(model, {"op": "widen", "axis": "0.weight:0", "factor": 2}, (x,), verify=False).module
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    process = context.Process(target=_run, args=(module, x, queue))
    process.start()
    result = torch.tensor(queue.get(), dtype=torch.float64)
    process.join()
    torch.testing.assert_close(result, model(x).detach(), rtol=0, atol=1e-12)


def test_an_edited_graph_is_refused_with_the_reason() -> None:
    x = torch.randn(4, 6)
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3))
    module = fxgrow.grow(model, {"op": "widen", "axis": "0.weight:0", "factor": 2}, (x,), verify=False).module
    node = next(n for n in module.graph.nodes if "linear" in str(n.target))
    with module.graph.inserting_after(node):
        new = module.graph.call_function(torch.ops.aten.relu.default, (node,))
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    module.recompile()
    with pytest.raises(pickle.PicklingError, match="edited after the growth"):
        pickle.dumps(module)


def test_tensors_that_came_or_went_after_the_growth_are_not_lost_in_silence() -> None:
    model, x = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)), torch.randn(5, 4)
    growth = fxgrow.grow(model, {"op": "widen", "axis": "0.weight:0", "factor": 2}, (x,), verify=False)
    more, pruned = copy.deepcopy(growth.module), copy.deepcopy(growth.module)
    more.head = nn.Linear(2, 2)
    with pytest.raises(pickle.PicklingError, match=r"has a tensor head\.weight now"):
        pickle.dumps(more)
    nn.utils.parametrizations.weight_norm(pruned.get_submodule("2"))
    with pytest.raises(pickle.PicklingError, match=r"2\.parametrizations|2\.weight"):
        pickle.dumps(pruned)
