"""Models that return dataclasses or named tuples, as Hugging Face's and torchvision's do."""

from __future__ import annotations

import dataclasses
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import nn

import fxgrow
from fxgrow.ir import treespecs
from tests.models import trained

Both = namedtuple("Both", "logits aux")


@dataclasses.dataclass
class Output:
    logits: torch.Tensor
    hidden: list[torch.Tensor] | None = None


pytree.register_pytree_node(
    Output,
    lambda o: ([o.logits, o.hidden], None),
    lambda leaves, _: Output(*leaves),
    serialized_type_name="tests.ir.test_treespecs.Output",
)


class Net(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.up, self.down, self.aux = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> Any:
        h = torch.tanh(self.up(x))
        logits, aux = self.down(h), self.aux(h)
        if self.kind == "nested":
            return {"a": Both(logits, (aux, logits.sum())), "b": Output(logits, [aux])}
        if self.kind == "dataclass":
            return Output(logits)
        return Both(logits, aux) if self.training else logits


def grown(kind: str) -> tuple[nn.Module, fxgrow.Growth, torch.Tensor]:
    model = trained(Net(kind).double()).eval()
    x = torch.randn(5, 4, dtype=torch.float64)
    return model, fxgrow.grow(model, {"op": "widen", "axis": "./hidden", "factor": 2}, (x,)), x


def test_dataclass_comes_back() -> None:
    model, growth, x = grown("dataclass")
    out = growth.module(x)
    assert type(out) is Output
    assert out.hidden is None
    torch.testing.assert_close(out.logits, model(x).logits, rtol=0, atol=1e-12)


def test_nested_structures_chain_and_are_stored(tmp_path: Path) -> None:
    model, growth, x = grown("nested")
    again = fxgrow.grow(growth.module, {"op": "widen", "axis": "./hidden", "to": 15}, (x,))
    fxgrow.save(again, tmp_path / "grown")
    loaded = fxgrow.load(tmp_path / "grown")
    assert loaded.replay_error() <= 1e-12
    expected = model(x)
    for module in (growth.module, again.module, loaded.module):
        out = module(x)
        assert (type(out["a"]), type(out["a"].aux), type(out["b"])) == (Both, tuple, Output)
        torch.testing.assert_close(pytree.tree_leaves(out), pytree.tree_leaves(expected), rtol=0, atol=1e-12)


def test_modes_may_return_different_structures() -> None:
    model, growth, x = grown("modes")
    assert isinstance(growth.module.train()(x), Both)
    torch.testing.assert_close(growth.module.eval()(x), model(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(growth.module.train()(x), model.train()(x), rtol=0, atol=1e-12)


def test_an_unknown_class_is_named_when_loading() -> None:
    text = treespecs.describe(Output(torch.ones(1)), pytree.tree_flatten(Output(torch.ones(1)))[1])
    with pytest.raises(fxgrow.CheckpointError, match=r"other\.Output.*import the package"):
        treespecs.check(text.replace("tests.ir.test_treespecs.Output", "other.Output"))


class Takes(nn.Module):
    """A batch as people write it: a dict, a list, a plain value, and an input that may be missing."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(4, 6), nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, batch: dict[str, Any], more: Any = (), *, scale: float = 1.0, y: Any = None) -> torch.Tensor:
        h = self.a(batch["a"]) + sum(self.b(b) for b in [*batch["bs"], *more]) * scale
        out = self.out(torch.tanh(h))
        return out if y is None else (out - y).square().mean()


def batch(n: int = 5) -> dict[str, Any]:
    double = torch.float64
    return {"a": torch.randn(n, 4, dtype=double), "bs": [torch.randn(n, 3, dtype=double) for _ in range(2)]}


def test_lists_and_dicts_of_tensors_go_in(tmp_path: Path) -> None:
    model = trained(Takes().double()).eval()
    more = (torch.randn(5, 3, dtype=torch.float64),)
    growth = fxgrow.grow(model, {"op": "widen", "axis": "./hidden", "factor": 2}, (batch(),), {"more": more})
    again = fxgrow.grow(growth.module, {"op": "widen", "axis": "./hidden", "to": 15}, (batch(), more))
    fxgrow.save(again, tmp_path / "grown")
    loaded = fxgrow.load(tmp_path / "grown")
    assert loaded.replay_error() <= 1e-12
    given, extra = batch(7), (torch.randn(7, 3, dtype=torch.float64),)
    for module in (growth.module, again.module, loaded.module):
        torch.testing.assert_close(module(given, extra), model(given, extra), rtol=0, atol=1e-12)
        torch.testing.assert_close(module(batch=given, more=extra), model(given, extra), rtol=0, atol=1e-12)
        with pytest.raises(TypeError, match="no call with these arguments"):
            module({**given, "bs": given["bs"][:1]}, extra)


def test_nested_inputs_and_several_calls() -> None:
    model = trained(Takes().double()).eval()
    y = torch.randn(5, 2, dtype=torch.float64)
    calls = {"loss": {"batch": batch(), "y": y}, "predict": (batch(),), "half": {"batch": batch(), "scale": 0.5}}
    growth = fxgrow.grow(model, {"op": "widen", "axis": "./hidden", "factor": 2}, calls=calls)
    given = batch()
    for kwargs in ({}, {"y": y}, {"scale": 0.5}):
        torch.testing.assert_close(growth.module(given, **kwargs), model(given, **kwargs), rtol=0, atol=1e-12)


@dataclasses.dataclass
class Scored:
    """Registered as torch's documentation shows it, without a name to be stored under."""

    scores: torch.Tensor
    total: torch.Tensor | None = None


torch.export.register_dataclass(Scored)


def test_registered_dataclasses_come_out(tmp_path: Path) -> None:
    class Scores(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.out = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: torch.Tensor, both: bool = True) -> Scored:
            h = torch.tanh(self.up(x))
            return Scored(self.out(h), h.sum(-1) if both else None)

    model = trained(Scores().double()).eval()
    x = torch.randn(5, 4, dtype=torch.float64)
    for kwargs in ({}, {"both": False}):
        growth = fxgrow.grow(model, {"op": "widen", "axis": "./hidden", "factor": 2}, (x,), kwargs, verify=False)
        loaded = fxgrow.load(fxgrow.save(growth, tmp_path / str(len(kwargs))))
        more = torch.randn(7, 4, dtype=torch.float64)
        for module in (growth.module, loaded.module):
            out, expected = module(more, **kwargs), model(more, **kwargs)
            assert type(out) is Scored
            torch.testing.assert_close(out.scores, expected.scores, rtol=0, atol=1e-12)
            assert (out.total is None) == (expected.total is None)
