"""What must not grow is refused with its reason, and what is not known is frozen and explained."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxgrow.errors import GrowthRefused, SpecError
from fxgrow.growth import grow
from fxgrow.program import Program, capture
from fxgrow.verify.outputs import relative_errors

from .adversarial import Fn
from .zoo import ZOO, floats, tokens, trained

L = nn.Linear


def program(f: Any, *, x: Tensor | None = None, **members: Any) -> Program:
    torch.manual_seed(0)
    return capture(trained(Fn(f, **members)), (floats(6, 5) if x is None else x,))


def frozen(found: Program) -> dict[str, str]:
    return {a.name: str(a.reason) for a in found.axes if not a.growable}


def widen(axis: str, **options: Any) -> list[dict[str, Any]]:
    return [{"op": "widen", "axis": axis, **(options or {"factor": 2})}]


@pytest.fixture(scope="module")
def gpt() -> Program:
    example = ZOO["gpt-depth=2"]()
    return capture(example.model, example.args)


def test_logits_and_vocabulary_are_frozen(gpt: Program) -> None:
    with pytest.raises(GrowthRefused, match=r"wte/vocab|\./vocab") as error:
        grow(gpt, widen("*/vocab"))
    assert "looked up by number" in str(error.value) or "which the model returns" in str(error.value)
    assert "zoo.py" in str(error.value), "the user's source line is missing"


def test_positions_are_frozen_by_their_look_up(gpt: Program) -> None:
    with pytest.raises(GrowthRefused, match="looked up by number"):
        grow(gpt, widen("wpe/positions"))


def test_a_name_that_does_not_exist_lists_its_neighbours(gpt: Program) -> None:
    with pytest.raises(SpecError, match=r"no axis matches 'blocks.0.mlp/hiden'.*blocks\.0\.mlp/hidden"):
        grow(gpt, widen("blocks.0.mlp/hiden"))
    with pytest.raises(SpecError, match=r"no parameter matches 'blocks.0.mlp.0.wieght'.*blocks\.0\.mlp\.0\.weight"):
        grow(gpt, widen("blocks.0.mlp.0.wieght:0"))
    with pytest.raises(SpecError, match="has 2 dims"):
        grow(gpt, widen("blocks.0.mlp.0.weight:5"))


def test_a_dim_of_several_axes_is_ambiguous_and_names_them(gpt: Program) -> None:
    with pytest.raises(SpecError, match=r"ambiguous.*heads.*head_dim.*value_dim"):
        grow(gpt, widen("blocks.0.attn.qkv.weight:0"))


def test_sizes_that_are_none() -> None:
    found = program(lambda s, x: s.b(torch.tanh(s.a(x))), a=L(5, 8), b=L(8, 3))
    for options, words in (
        ({"to": 4}, "would shrink"),
        ({"factor": 1.3}, "no whole number"),
        ({"factor": 0.5}, "shrink"),
    ):
        with pytest.raises(SpecError, match=words):
            grow(found, widen("./hidden", **options))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(bad: float) -> None:
    example = ZOO["mlp"]()
    with torch.no_grad():
        example.model.get_parameter("layers.1.weight")[0, 0] = bad
    before = {n: t.clone() for n, t in example.model.state_dict().items()}
    with pytest.raises(GrowthRefused, match=r"layers\.1\.weight \(1 of 96 values\)"):
        grow(example.model, widen("./hidden"), example.args)
    for n, t in example.model.state_dict().items():
        assert torch.equal(t.nan_to_num(1e9), before[n].nan_to_num(1e9))


def matrix_exp(s: Any, x: Tensor) -> Tensor:
    return s.d(torch.tanh(s.c(torch.tanh(s.a(x)) @ torch.linalg.matrix_exp(s.w))))  # type: ignore[no-any-return]


def test_an_unknown_op_freezes_what_it_touches_and_says_how_to_go_on() -> None:
    found = program(matrix_exp, a=L(5, 8), w=floats(8, 8), c=L(8, 7), d=L(7, 3))
    with pytest.warns(UserWarning, match=r"no rule for aten\.linalg_matrix_exp\.default .*register_rule"):
        reasons = frozen(found)
    assert any("fxgrow has no rule for aten.linalg_matrix_exp.default" in r for r in reasons.values())
    assert all("no rule" in r or "input" in r or "returns" in r for r in reasons.values()), reasons
    with pytest.raises(GrowthRefused, match=r"frozen by aten\.linalg_matrix_exp.*no rule"):
        grow(found, widen("w:0"))
    beside = grow(found, widen("c.weight:0")).receipt.error_float64
    assert beside is not None
    assert beside <= 1e-12


IN_PLACE: dict[str, Any] = {
    "a slice of an activation": lambda s, x: _sliced(s.a(x), s.b),
    "a view beside its base": lambda s, x: _viewed(s.a(x), s.b),
    "the base beside its view": lambda s, x: _based(s.a(x), s.b),
    "an entry": lambda s, x: _entry(s.a(x), s.b),
}


def _sliced(h: Tensor, out: nn.Module) -> Tensor:
    h[:, :4].mul_(2.0)
    return out(h)


def _viewed(h: Tensor, out: nn.Module) -> Tensor:
    h.view(-1, 4, 2).add_(1.0)
    return out(h)


def _based(h: Tensor, out: nn.Module) -> Tensor:
    v = h.view(-1, 4, 2)
    h.add_(1.0)
    return out(v.flatten(1))


def _entry(h: Tensor, out: nn.Module) -> Tensor:
    h[:, 1] = 0.5
    return out(h)


@pytest.mark.parametrize("kind", IN_PLACE)
@pytest.mark.parametrize(
    "request_", [{"factor": 2}, {"by": 2, "fill": "add"}, {"by": 3, "fill": "add", "fan_in": "zero"}]
)
def test_values_written_in_place_through_views_grow_exactly_or_not_at_all(kind: str, request_: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = trained(Fn(IN_PLACE[kind], a=L(5, 8), b=L(8, 3)))
    found = capture(model, (floats(6, 5),))
    x, refused = floats(4, 5), []
    for axis in found.axes:
        if not axis.growable:
            continue
        try:
            growth = grow(found, widen(axis.name, **request_), verify=False)
        except GrowthRefused as refusal:
            words = str(refusal)
            silent = request_.get("fan_in") == "zero" and "would both be zero" in words
            assert "in place" in words or "hold" in words or silent, words
            continue
        with torch.no_grad():
            assert relative_errors(model(x), growth.module.eval()(x))[0].relative_error <= 1e-12
    assert all("in place" in words for words in refused), refused


def two(f: Callable[[Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    """A linear layer, ``f`` of its output, and a linear layer that reads it."""
    return lambda s, x: s.b(f(s.a(x)))  # type: ignore[no-any-return]


FROZEN: dict[str, tuple[Any, str]] = {
    "log-softmax": (two(lambda h: torch.log_softmax(h, -1)), "softmax runs over it"),
    "cumsum": (two(lambda h: h.cumsum(-1)), "depend on their order"),
    "arange": (two(lambda h: h * torch.arange(8)), "consecutive numbers"),
    "index": (two(lambda h: h[:, torch.tensor([0, 2, 1, 3, 4, 5, 7, 6])]), "looked up by number"),
    "random": (two(lambda h: h + torch.randn_like(h)), "drawn at random"),
    "roll": (two(lambda h: h.roll(1, -1)), "rolled"),
    "output": (lambda s, x: torch.tanh(s.a(x)), "which the model returns"),
}


@pytest.mark.parametrize("kind", FROZEN)
def test_frozen_axes_name_the_op_and_the_reason(kind: str) -> None:
    f, words = FROZEN[kind]
    with pytest.raises(GrowthRefused, match=f"frozen by .*{words}"):
        grow(program(f, a=L(5, 8), b=L(8, 3)), widen("a.weight:0"))


COPY: dict[str, Any] = {"factor": 2}
ADD: dict[str, Any] = {"by": 2, "fill": "add"}
REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "a norm over a concatenation": (
        lambda s, x: s.d(F.layer_norm(torch.cat([s.a(x), s.c(x)], -1), (16,))),
        COPY,
        "only part of the entries",
    ),
    "a sum over a concatenation": (
        lambda s, x: torch.cat([s.a(x), s.c(x)], -1).sum(-1),
        COPY,
        "only part of the entries",
    ),
    "a softmax over new units": (two(lambda h: torch.softmax(h, -1)), ADD, "new units under a softmax"),
    "an unbiased variance of a dynamic number of entries": (
        lambda s, x: s.b(s.a(x)) * s.a(x).var(),
        COPY,
        "unbiased variance over a dynamic number",
    ),
    "a logarithm": (two(lambda h: torch.log(h.exp())), ADD, "outside the domain"),
    "a reciprocal": (two(lambda h: 1 / h), ADD, "outside the domain"),
    "a quotient": (two(lambda h: h.new_ones(8) / h), ADD, "values may be 0"),
    "a maximum": (two(lambda h: h * h.amax(-1, keepdim=True)), ADD, "extremum over new units"),
    "a sum of exponentials": (two(lambda h: h * h.exp().sum(-1, keepdim=True)), ADD, "have to be zero there"),
    "an exponential weight": (lambda s, x: F.linear(torch.tanh(s.a(x)).exp(), s.w.exp()), ADD, "have to be zero there"),
    "zeros on both sides of a score": (
        lambda s, x: F.normalize(s.a(x), dim=-1) @ F.normalize(s.c(x), dim=-1).T,
        ADD,
        "both would be zero in new units, which then never get a gradient",
    ),
    "new channels inside a group": (
        lambda s, x: s.b(F.group_norm(s.a(x), 2)),
        {"by": 1, "fill": "add"},
        "inside a group|group norm|do not divide|new channels",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_growth_that_would_not_be_exact_is_refused(kind: str) -> None:
    f, options, words = REFUSED[kind]
    found = program(f, a=L(5, 8), b=L(8, 3), c=L(5, 8), d=L(16, 3), w=floats(3, 8))
    names = [i.name for i in found.axes if any(str(m) == "a.weight:0" for m in i.members)]
    with pytest.raises(GrowthRefused, match=words):
        grow(found, widen(names[-1], **options))


def test_equal_sizes_do_not_make_one_axis() -> None:
    """Hidden, stream, vocabulary and heads x width are all 16."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.e, self.f1, self.f2, self.o = nn.Embedding(16, 16), L(16, 16), L(16, 16), L(16, 16)
            self.n = nn.LayerNorm(16)

        def forward(self, i: Tensor) -> Tensor:
            x = self.e(i)
            x = x + self.f2(torch.relu(self.f1(self.n(x))))
            return self.o(x)

    found = capture(trained(Model()), (tokens(2, 5) % 16,))
    assert {a.name: a.growable for a in found.axes} == {
        "e/vocab": False,
        "./residual": True,
        "./hidden": True,
        "o/vocab": False,
    }
    assert grow(found, widen("./hidden", factor=1.5)).plan.tensors["f1.weight"].shape == [24, 16]


def test_names_do_not_depend_on_hashing() -> None:
    code = (
        "from zoo.zoo import ZOO; from fxgrow.program import capture; e = ZOO['llama'](); "
        "print([(a.name, a.size, a.role, list(map(str, a.members))) for a in capture(e.model, e.args).axes])"
    )
    elsewhere = subprocess.run(
        [sys.executable, "-c", code],
        cwd=os.path.dirname(os.path.dirname(__file__)),
        env={**os.environ, "PYTHONHASHSEED": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    example = ZOO["llama"]()
    here = [(a.name, a.size, a.role, list(map(str, a.members))) for a in capture(example.model, example.args).axes]
    assert elsewhere.strip() == str(here)
    assert "./kv_heads" in elsewhere


class Named(nn.Module):
    """An input named like a parameter but for its case."""

    def __init__(self) -> None:
        super().__init__()
        self.W = nn.Parameter(floats(8, 6))
        self.b = L(8, 2)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        return self.b(torch.relu(w @ self.W.t()) + x.sum(-1, keepdim=True))  # type: ignore[no-any-return]


def test_an_input_named_like_a_parameter_is_not_overwritten() -> None:
    torch.manual_seed(0)
    model, inputs = trained(Named()), (floats(4, 5), floats(4, 6))
    growth = grow(model, widen("W:0"), inputs)
    assert relative_errors(model(*inputs), growth.module.eval()(*inputs))[0].relative_error <= 1e-12


def test_the_number_of_the_largest_entry_pins_what_it_counts() -> None:
    def f(s: Any, x: Tensor) -> Tensor:
        h = torch.cat([s.a(x), s.c(x)], -1)
        values, numbers = h.max(-1, keepdim=True)
        return s.d(h) * values + numbers  # type: ignore[no-any-return]

    with pytest.raises(GrowthRefused, match="the number of its largest or smallest entry is used"):
        grow(program(f, a=L(5, 8), c=L(5, 8), d=L(16, 3)), widen("a.weight:0"))


def test_a_rule_that_fails_freezes_and_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    from fxgrow.rules import RULES, Pointwise

    class Failing(Pointwise):
        def relate(self, ctx: Any) -> Any:
            raise KeyError("dim")

    monkeypatch.setitem(RULES, "aten.tanh.default", Failing())
    found = program(two(torch.tanh), a=L(5, 8), b=L(8, 3))
    with pytest.warns(UserWarning, match=r"the rule for aten\.tanh\.default fails .*a bug in the rule"):
        reasons = frozen(found)
    assert any("does not fit this call" in r for r in reasons.values())

    class FailingLater(Pointwise):
        def grow(self, ctx: Any) -> Any:
            raise KeyError("dim")

    monkeypatch.setitem(RULES, "aten.tanh.default", FailingLater())
    with pytest.raises(GrowthRefused, match=r"aten\.tanh\.default at .*rule fails here \(KeyError"):
        grow(program(two(torch.tanh), a=L(5, 8), b=L(8, 3)), widen("a.weight:0"))


def test_a_parameter_without_entries_is_left_alone() -> None:
    """A model may have a layer of no outputs: its axis cannot grow, and the others do."""
    found = program(
        lambda s, x: s.b(torch.cat([torch.tanh(s.a(x)), s.none(x)], -1)), a=L(5, 8), none=L(5, 0), b=L(8, 3)
    )
    names = {a.name: a for a in found.axes}
    (empty,) = [a for a in names.values() if a.size == 0]
    assert "has no entries" in str(empty.reason)
    growth = grow(found, widen("a.weight:0"))
    assert growth.receipt.error_float64 is not None
    assert growth.receipt.error_float64 <= 1e-12
