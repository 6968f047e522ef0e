"""Guards: a grown module runs only the inputs that its graph is the model for, and says by name why not the others."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor, nn
from torch.utils._sympy.functions import FloorDiv, Mod

import fxgrow
from fxgrow.ir.guards import Guard, _at_residue, _residue, broken, compile_condition, moved
from tests.models import trained

DOUBLE = {"op": "widen", "axis": "up.weight:0", "factor": 2}


class M(nn.Module):
    """``f`` decides what is computed with the layers."""

    def __init__(self, f: Callable[..., Any]) -> None:
        super().__init__()
        self.up, self.out, self.f = nn.Linear(5, 8), nn.Linear(8, 3), f
        self.w = nn.Parameter(4 * torch.randn(12, 5))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        return self.f(self, x) if y is None else self.f(self, x, y)

    def mlp(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.up(x)))


def example(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def grown(f: Callable[..., Any], *args: Tensor, **options: Any) -> tuple[nn.Module, fxgrow.Growth]:
    model = trained(M(f).double()).eval()
    return model, fxgrow.grow(model, DOUBLE, args, verify=False, **options)


def same(model: nn.Module, module: nn.Module, *args: Tensor) -> None:
    torch.testing.assert_close(module(*args), model(*args), rtol=0, atol=1e-12)


CASES: dict[str, tuple[Callable[..., Any], tuple[int, ...], list[tuple[int, ...]], list[tuple[int, ...]], str]] = {
    # what is computed, the example's shape, shapes that must run, shapes that must not, the condition
    "the last four of a longer one": (
        lambda m, x: m.mlp(x[:, -4:] if x.shape[1] > 4 else x),
        (2, 3, 5),
        [(1, 4, 5), (7, 1, 5), (2, 2, 5)],
        [(2, 9, 5), (2, 5, 5)],
        r"x\.shape\[1\] <= 4",
    ),
    "the first four of a shorter one": (
        lambda m, x: m.mlp(x[:, :4] if x.shape[1] > 4 else x),
        (2, 9, 5),
        [(1, 5, 5), (3, 12, 5)],
        [(2, 3, 5), (2, 4, 5)],
        r"x\.shape\[1\] >= 5",
    ),
    "one is special": (
        lambda m, x: m.mlp(x * 2 if x.shape[0] == 1 else x),
        (3, 4, 5),
        [(2, 4, 5), (5, 1, 5)],
        [(1, 4, 5)],
        r"x\.shape\[0\] != 1",
    ),
    "more than one is special": (
        lambda m, x: m.mlp(x - x.mean(0) if x.shape[0] > 1 else x),
        (3, 4, 5),
        [(2, 4, 5)],
        [(1, 4, 5)],
        r"x\.shape\[0\] >= 2",
    ),
    "padded to a multiple of four": (
        lambda m, x: m.mlp(x if x.shape[1] % 4 == 0 else nn.functional.pad(x, (0, 0, 0, 1))),
        (2, 8, 5),
        [(2, 4, 5), (1, 12, 5)],
        [(2, 9, 5), (2, 3, 5)],
        r"x\.shape\[1\] % 4 == 0",
    ),
    "two sizes together": (
        lambda m, x: m.mlp(x.relu() if x.shape[0] * x.shape[1] < 20 else x),
        (2, 4, 5),
        [(1, 19, 5), (4, 4, 5)],
        [(4, 5, 5), (1, 20, 5)],
        r"x\.shape\[0\] < 20",
    ),
    "as many pieces as the example's": (
        lambda m, x: (
            sum(m.mlp(c) * (i + 1) for i, c in enumerate(x.split(2, 1))).sum(1)  # type: ignore[union-attr]
            if x.shape[1] % 2 == 0
            else m.mlp(x)
        ),
        (3, 4, 5),
        [(1, 4, 5)],
        [(3, 6, 5), (3, 2, 5), (3, 3, 5)],
        r"takes \(any, 4, 5\)",
    ),
    "ones squeezed": (
        lambda m, x: m.mlp(x.squeeze(0)).reshape(x.squeeze(0).shape[0], -1),
        (3, 4, 5),
        [(2, 4, 5), (3, 1, 5)],
        [(1, 4, 5)],
        r"x\.shape\[0\]",
    ),
    "rows of a table": (
        lambda m, x: m.mlp(x + m.w[: x.shape[1]]),
        (2, 3, 5),
        [(1, 12, 5), (3, 1, 5)],
        [(2, 13, 5)],
        r"takes only x\.shape\[1\] <= 12",
    ),
    "a table whose end is cut": (
        lambda m, x: m.mlp(x[:, : m.w.shape[0]] + m.w[: x.shape[1]]),
        (2, 3, 5),
        # torch before 2.10 traces a slice that is not cut, which fits fewer sizes
        *(
            ([(3, 1, 5)], [(1, 12, 5), (2, 13, 5)], r"takes only x\.shape\[1\] <= 11")
            if torch.__version__ < (2, 10)
            else ([(1, 12, 5), (3, 1, 5), (2, 13, 5)], [], "")
        ),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_graph_runs_where_its_guards_hold(name: str) -> None:
    f, shape, inside, outside, words = CASES[name]
    model, growth = grown(f, example(*shape))
    for good in (shape, *inside):
        same(model, growth.module, example(*good))
    for bad in outside:
        with pytest.raises(fxgrow.InputError, match=words) as caught:
            growth.module(example(*bad))
        assert f"input x has shape {bad}" in str(caught.value)
        assert isinstance(caught.value, ValueError)
        if "last four" in name or "special" in name or "padded" in name:
            assert "test_guards.py" in str(caught.value)


def test_another_rank_is_another_graph() -> None:
    _, growth = grown(lambda m, x: m.mlp(x).mean(-1) if x.dim() == 2 else m.mlp(x).sum(-1), example(4, 5))
    with pytest.raises(fxgrow.InputError, match="shape"):
        growth.module(example(2, 4, 5))


def test_inputs_that_must_agree() -> None:
    def f(m: Any, x: Tensor, y: Tensor) -> Tensor:
        return m.mlp(x + y).reshape(x.shape[0], -1, 3)

    model, growth = grown(f, example(2, 3, 5), example(2, 3, 5))
    same(model, growth.module, example(4, 7, 5), example(4, 7, 5))
    same(model, growth.module, example(1, 1, 5), example(1, 1, 5))
    with pytest.raises(fxgrow.InputError, match=r"x has shape \(1, 3, 5\).* y has shape \(4, 3, 5\)|y has.* x has"):
        growth.module(example(1, 3, 5), example(4, 3, 5))  # the model broadcasts x; its reshape reads x's size


def test_two_calls_serve_both_branches() -> None:
    def f(m: Any, x: Tensor) -> Tensor:
        return m.mlp(x[:, -4:] if x.shape[1] > 4 else x)

    model = trained(M(f).double()).eval()
    calls = {"short": (example(2, 3, 5),), "long": (example(2, 9, 5),)}
    program = fxgrow.capture(model, calls=calls)
    module = fxgrow.grow(program, DOUBLE).module
    for length in (1, 3, 4, 5, 9, 20):
        same(model, module, example(3, length, 5))
    again = fxgrow.grow(module, DOUBLE, calls=calls, verify=False).module
    for length in (1, 4, 5, 20):
        same(model, copy.deepcopy(again), example(3, length, 5))
    model, growth = grown(lambda m, x: m.mlp(x) if 4 < x.shape[1] < 9 else m.mlp(x) * x.shape[1], example(2, 5, 5))
    with pytest.raises(fxgrow.InputError, match="calls="):
        growth.module(example(2, 9, 5))


def test_guards_of_one_mode_hold_for_its_graph_and_of_a_shared_graph_for_both() -> None:
    def stochastic(m: Any, x: Tensor) -> Tensor:
        if m.training:
            return m.mlp(x[:, -4:] if x.shape[1] > 4 else x)
        return m.mlp(x.flip(1).relu())

    model, growth = grown(stochastic, example(2, 3, 5))
    same(model, growth.module, example(2, 9, 5))
    model.train()
    growth.module.train()
    same(model, growth.module, example(2, 4, 5))
    with pytest.raises(fxgrow.InputError, match="<= 4"):
        growth.module(example(2, 9, 5))

    def only_eval(m: Any, x: Tensor) -> Tensor:
        return m.mlp(x[:, -4:] if not m.training and x.shape[1] > 4 else x)

    model, growth = grown(only_eval, example(2, 3, 5))
    with pytest.raises(fxgrow.InputError, match="<= 4"):
        growth.module(example(2, 9, 5))


def test_guards_of_nested_inputs_and_of_keywords() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.out = nn.Linear(5, 8), nn.Linear(8, 3)

        def forward(self, batch: dict[str, Tensor], *, scale: Tensor) -> Tensor:
            x = batch["x"] if batch["x"].shape[1] < 6 else batch["x"].relu()
            return self.out(torch.tanh(self.up(x)) * scale)

    model = trained(Nested().double()).eval()
    args, kwargs = ({"x": example(2, 3, 5)},), {"scale": example(3, 1)}
    module = fxgrow.grow(model, DOUBLE, args, kwargs, verify=False).module
    torch.testing.assert_close(module(*args, **kwargs), model(*args, **kwargs), rtol=0, atol=1e-12)
    with pytest.raises(fxgrow.InputError, match=r"x has shape \(2, 7, 5\)"):
        module({"x": example(2, 7, 5)}, scale=example(7, 1))


def test_guards_survive_checkpoints_and_further_growths(tmp_path: Path) -> None:
    f, shape, inside, outside, _ = CASES["the last four of a longer one"]
    model, growth = grown(f, example(*shape))
    fxgrow.save(growth, tmp_path / "a")
    loaded = fxgrow.load(tmp_path / "a")
    second = fxgrow.grow(loaded.module, DOUBLE, (example(*shape),), verify=False)
    for module in (loaded.module, second.module, copy.deepcopy(second.module)):
        for good in inside:
            same(model, module, example(*good))
        for bad in outside:
            with pytest.raises(fxgrow.InputError, match=r"x\.shape\[1\] <= 4"):
                module(example(*bad))
    manifest = tmp_path / "a" / "manifest.json"
    data = json.loads(manifest.read_text())
    for text in ("__import__('os').system('true')", "y.shape[0] == 1", "x.shape[0] ** 99999 > 1", "x", 7):
        data["calls"][0]["guards"][0]["condition"] = text
        manifest.write_text(json.dumps(data))
        with pytest.raises(fxgrow.CheckpointError, match="guard"):
            fxgrow.load(tmp_path / "a")


def test_a_longer_table_moves_the_end_of_what_the_model_takes() -> None:
    model = trained(M(CASES["rows of a table"][0]).double()).eval()
    extend = {"op": "extend", "axis": "w:0", "by": 4}
    module = fxgrow.grow(model, extend, (example(2, 3, 5),), verify=False).module
    same(model, module, example(2, 12, 5))
    assert module(example(2, 16, 5)).shape == (2, 16, 3)
    with pytest.raises(fxgrow.InputError, match=r"takes only x\.shape\[1\] <= 16"):
        module(example(2, 17, 5))
    edge, branch = Guard("x.shape[1] <= 12", edge=True), Guard("x.shape[1] <= 12", "model.py:3")
    assert moved([edge, branch], 12, 16) == [Guard("x.shape[1] <= 16", edge=True), branch]
    assert moved([edge], 11, 16) == [edge]


def test_compiled_modules_check_too() -> None:
    f = CASES["two sizes together"][0]
    model, growth = grown(f, example(2, 4, 5))
    torch._dynamo.reset()
    compiled = torch.compile(growth.module, fullgraph=True, dynamic=True, backend="eager")
    for shape in ((2, 4, 5), (3, 6, 5), (1, 7, 5)):
        same(model, compiled, example(*shape))
    with pytest.raises(Exception, match="< 20"):
        compiled(example(5, 6, 5))


@pytest.mark.parametrize("text", ["x.shape[1] + x.shape[0] * 2 <= 7", "max(3, x.shape[0]) == 3 and not x.shape[1] < 2"])
def test_conditions_are_read_without_running_code(text: str) -> None:
    condition = compile_condition(text)
    assert condition({"x": (2, 3)}) is True
    assert condition({"x": (4, 9)}) is False
    assert broken([Guard(text)], {"x": (4, 9)}) == Guard(text)
    multiple = "x.shape[0] % (x.shape[1] // 2) == 0"
    assert [compile_condition(multiple)({"x": (4, n)}) for n in (4, 6, 1)] == [True, False, False]
    for bad in (
        "x.data",
        "x.shape",
        "open('a')",
        "[1][0] == 1",
        "x.shape[-1:] == 3",
        "(lambda: 1)()",
        "x.shape[y]",
        "",
    ):
        with pytest.raises(ValueError):
            compile_condition(bad)


def test_lengths_of_whole_chunks() -> None:
    """A length padded to whole chunks is the length itself where a guard says that nothing is padded."""

    def chunks(m: M, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        pad = (4 - n % 4) % 4
        h = nn.functional.pad(torch.tanh(m.up(x)), (0, 0, 0, pad)).reshape(b, -1, 4, 8)
        h = (h + h.cumsum(2)).reshape(b, -1, 8)
        if pad > 0:
            h = h[:, :n]
        return m.out(h.reshape(b, n, -1))

    x = example(2, 8, 5)
    model, growth = grown(chunks, x)
    for shape in ((2, 8, 5), (3, 4, 5), (1, 16, 5)):
        same(model, growth.module, example(*shape))
    with pytest.raises(fxgrow.InputError, match=r"x\.shape\[1\]"):
        growth.module(example(2, 7, 5))

    s = sympy.Symbol("s", integer=True, positive=True)
    assert _residue(sympy.Eq(Mod(4 - Mod(s, 4), 4), 0)) == {s: (0, 4)}
    assert _residue(sympy.Eq(Mod(s, 6), 5)) == {s: (5, 6)}
    assert _residue(sympy.Eq(Mod(s, 2) + s, 8)) == {}  # not of the rest alone
    assert _residue(sympy.Le(Mod(s, 3), 1)) == {}  # two rests are left
    assert _residue(sympy.Ne(Mod(s, 2), 0)) == {}  # a guard that may be dropped
    assert _at_residue(FloorDiv(256 * FloorDiv(s, 4), s), s, 0, 4) == 64
    assert _at_residue(4 * FloorDiv(s, 4), s, 0, 4) == s
    for size in (FloorDiv(s, 4), FloorDiv(s + 1, 6), Mod(s, 3), 4 * FloorDiv(s + 3, 4)):
        for rest, period in ((0, 4), (3, 4), (5, 6)):
            settled = _at_residue(size, s, rest, period)
            for n in range(rest + period, 40, period):
                assert settled.subs(s, n) == size.subs(s, n), (size, rest, period, n)
