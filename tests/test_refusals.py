"""What must be refused, with its reason, and nothing changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fxgrow
from tests.models import small_gpt, tokens


@pytest.fixture(scope="module")
def model() -> Any:
    return small_gpt()


REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "vocabulary logits": ({"axis": "*/vocab", "factor": 2}, fxgrow.GrowthRefused, r"embedding.*looked up by number"),
    "positions": ({"axis": "*/positions", "factor": 2}, fxgrow.GrowthRefused, "looked up by number"),
    "frozen among growable": ({"axis": "*", "factor": 2}, fxgrow.GrowthRefused, "name only those that can grow"),
    "no such name": ({"axis": "*/hiden", "factor": 2}, fxgrow.SpecError, r"no axis matches.*mlp/hidden"),
    "no such parameter": ({"axis": "transformer.wt.weight:0", "factor": 2}, fxgrow.SpecError, "transformer.wte.weight"),
    "ambiguous dim": (
        {"axis": "transformer.h.0.attn.c_attn.weight:0", "factor": 2},
        fxgrow.SpecError,
        r"ambiguous.*heads 4 x head_dim 8.*attn/value_dim",
    ),
    "factor below 1": ({"axis": "*/hidden", "factor": 0.5}, fxgrow.SpecError, "shrink"),
    "smaller size": ({"axis": "*/hidden", "to": 8}, fxgrow.SpecError, "shrink"),
    "no whole number": ({"axis": "*/heads", "factor": 1.3}, fxgrow.SpecError, "no whole number"),
    "two sizes": ({"axis": "*/hidden", "factor": 2, "to": 8}, fxgrow.SpecError, "exactly one of"),
    "noise on a writer": (
        {"axis": "*/hidden", "factor": 2, "noise": {"on": "writers"}},
        fxgrow.SpecError,
        "noise on writers changes the function",
    ),
    "independent noise": (
        {"axis": "*/hidden", "factor": 2, "noise": {"kind": "independent"}},
        fxgrow.SpecError,
        "independent noise changes the function",
    ),
    "gradients that stay zero": (
        {"axis": "*/hidden", "by": 4, "fill": "add", "fan_in": "zero", "fan_out": "zero"},
        fxgrow.SpecError,
        "gradients of the new units would always stay 0",
    ),
    "random in and out": (
        {"axis": "*/hidden", "by": 4, "fill": "add", "fan_in": "random", "fan_out": "random"},
        fxgrow.SpecError,
        "change the function",
    ),
    "unknown field": ({"axis": "*/hidden", "factor": 2, "splitt": "even"}, fxgrow.SpecError, "did you mean split"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_its_reason(model: Any, name: str) -> None:
    operation, kind, reason = REFUSED[name]
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(kind, match=reason):
        fxgrow.grow(model, [{"op": "widen", **operation}], tokens())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_refusal_names_the_users_line(model: Any) -> None:
    with pytest.raises(fxgrow.GrowthRefused, match=r"model\.py:\d+: .*wte"):
        fxgrow.grow(model, [{"op": "widen", "axis": "*/vocab", "factor": 2}], tokens())


def test_nan_weights_are_refused() -> None:
    model = small_gpt()
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[2, 3] = float("nan")
    with pytest.raises(fxgrow.GrowthRefused, match=r"transformer.h.1.mlp.c_fc.weight \(1 of"):
        fxgrow.grow(model, [{"op": "widen", "axis": "*/hidden", "factor": 2}], tokens())


def test_unknown_stack_and_layer(model: Any) -> None:
    with pytest.raises(fxgrow.SpecError, match=r"transformer\.h"):
        fxgrow.grow(model, [{"op": "deepen", "stack": "layers", "factor": 2}], tokens())
    with pytest.raises(fxgrow.SpecError, match="no layer matches"):
        fxgrow.grow(model, [{"op": "insert", "layer": "linear", "after": "nothing"}], tokens())


def test_the_failing_operation_is_numbered(model: Any) -> None:
    spec = [{"op": "widen", "axis": "*/hidden", "factor": 2}, {"op": "widen", "axis": "*/vocab", "factor": 2}]
    with pytest.raises(fxgrow.GrowthRefused, match=r"operations\.1 \(widen\)"):
        fxgrow.grow(model, spec, tokens())


def test_a_wrong_rule_is_caught_by_the_receipt(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the planner errs, the measurement aborts the growth and the original stays."""
    from fxgrow.proof.context import ProofContext

    monkeypatch.setattr(ProofContext, "contract", lambda self, exprs, owners, zero=None: 1.0)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(fxgrow.ExactnessError, match="bug in fxgrow"):
        fxgrow.grow(model, [{"op": "widen", "axis": "*/hidden", "factor": 2}], tokens())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_a_refused_size_comes_with_sizes_that_work() -> None:
    class PostNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Linear(5, 8), nn.Linear(8, 3)
            self.mid, self.a, self.b = nn.Linear(8, 8), nn.LayerNorm(8), nn.LayerNorm(8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.a(self.stem(x))
            return self.head(self.b(h + self.mid(h)))

    model, x = PostNorm().double(), torch.randn(4, 5, dtype=torch.float64)
    spec = {"op": "widen", "axis": "./residual", "to": 20}
    with pytest.raises(fxgrow.GrowthRefused, match=r"exact for ./residual: `to: 16` or `to: 24`\)"):
        fxgrow.grow(model, spec, (x,))
    for size in (16, 24):
        assert fxgrow.grow(model, {**spec, "to": size}, (x,)).receipt.error_float64 <= 1e-12  # type: ignore[operator]


def test_a_stack_says_which_of_its_blocks_can_be_copied() -> None:
    class Block(nn.Module):
        def __init__(self, a: int, b: int) -> None:
            super().__init__()
            self.norm, self.fc = nn.LayerNorm(a), nn.Linear(a, b)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.fc(self.norm(x))
            return x + y if x.shape == y.shape else y

    model = nn.Sequential(Block(4, 6), Block(6, 6), Block(6, 6), Block(6, 3)).double()
    model = nn.Sequential(model, nn.Linear(3, 2).double())
    x = torch.randn(5, 4, dtype=torch.float64)
    with pytest.raises(fxgrow.GrowthRefused, match=r"blocks of 0 that can be copied: use `after: \[1, 2\]`"):
        fxgrow.grow(model, {"op": "deepen", "stack": "0", "by": 1}, (x,))
    growth = fxgrow.grow(model, {"op": "deepen", "stack": "0", "after": [1, 2]}, (x,))
    assert growth.receipt.error_float64 is not None and growth.receipt.error_float64 <= 1e-12


class Two(torch.nn.Module):
    """A hidden layer with something in the middle."""

    def __init__(self, f: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.up, self.out, self.f = torch.nn.Linear(5, 8), torch.nn.Linear(8, 3), f

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.f(self.up(x)))


def words_of(f: Callable[[torch.Tensor], torch.Tensor], **how: Any) -> str:
    model, x = Two(f).double(), torch.randn(4, 5, dtype=torch.float64)
    with pytest.raises(fxgrow.FxgrowError) as error:
        fxgrow.grow(model, {"op": "widen", "axis": "up.weight:0", **how}, (x,))
    return str(error.value)


def test_a_refusal_names_op_line_reason_and_what_works_each_once() -> None:
    text = words_of(lambda h: h / h.exp().sum(-1, keepdim=True), to=12)
    first, second, ways = text.splitlines()
    assert first.startswith("cannot grow ./rank from 8 to 12: aten.sum.dim_IntList at ")
    assert "test_refusals.py" in first
    assert "12 is no multiple of 8: some units would be copied more often than others" in first
    assert second.startswith("nor as one copy of every unit and 4 padded ones: ")
    assert ways == "(exact for ./rank: `to: 16`)"
    reasons = [line.partition(": ")[2] for line in (first, second)]
    assert reasons[0] != reasons[1]


@pytest.mark.parametrize(
    ("f", "how"),
    [
        (lambda h: h / h.exp().sum(-1, keepdim=True), {"to": 12}),
        (lambda h: torch.nn.functional.layer_norm(torch.tanh(h), (8,)), {"by": 4, "fill": "add"}),
        (lambda h: torch.sigmoid(h), {"by": 3, "fill": "add", "fan_in": "zero"}),
        (lambda h: h.cumsum(-1), {"factor": 2}),
        (lambda h: 1 / h, {"by": 4, "fill": "add"}),
    ],
)
def test_refusals_use_words_of_a_pytorch_user(f: Callable[[torch.Tensor], torch.Tensor], how: dict[str, Any]) -> None:
    text = words_of(f, **how)
    for word in ("writer", "reader", "saddle", " say", "newborn", "carrier", "site"):
        assert word not in text.replace("test_refusals.py", ""), text
    lines = [line for line in text.splitlines() if not line.startswith("(")]
    assert len(set(lines)) == len(lines)


def test_one_reason_for_many_axes_is_given_once() -> None:
    layers = torch.nn.Sequential(*(torch.nn.Linear(5, 5) for _ in range(3)), torch.nn.Softmax(-1)).double()
    with pytest.raises(fxgrow.GrowthRefused) as error:
        fxgrow.grow(layers, {"op": "widen", "axis": "*", "factor": 2}, (torch.randn(4, 5, dtype=torch.float64),))
    lines = str(error.value).splitlines()
    assert len({line.partition(" by ")[2] for line in lines}) == len(lines)


def test_pairs_of_units_that_start_at_zero() -> None:
    """Two units whose incoming weights are zero, read with +z and -z: exact, and they get gradients at once."""
    model, x = Two(torch.tanh).double(), torch.randn(4, 5, dtype=torch.float64)
    spec = {"op": "widen", "axis": "up.weight:0", "by": 2, "fill": "add", "fan_in": "zero", "fan_out": "paired"}
    growth = fxgrow.grow(model, spec, (x,))
    assert growth.receipt.error_float64 is not None
    assert growth.receipt.error_float64 < 1e-12
    weight = growth.module.out.weight
    assert torch.equal(weight[:, 8], -weight[:, 9])
    assert float(weight[:, 8:].detach().abs().min()) > 0
    assert float(growth.module.up.weight[8:].detach().abs().max()) == 0
    growth.module(x).pow(2).sum().backward()
    assert float(growth.module.up.weight.grad[8:].abs().max()) > 0
    with pytest.raises(fxgrow.SpecError, match=r"3 is odd\. Use to: 12"):
        fxgrow.grow(model, {**spec, "by": 3}, (x,))
