"""Entry points: operations, passes and rules of other packages, and plug-ins that cannot be loaded."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from typing import Any, Literal

import pytest
import torch
from torch import nn

import fxgrow
from fxgrow import passes, plugins, spec
from fxgrow.rules import RULES, Pointwise

Fake = Callable[[str, str, Any], None]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    """Install an object of a made-up package as an entry point; everything is as before afterwards."""
    entries: list[EntryPoint] = []
    module = types.ModuleType("made_up_package")
    monkeypatch.setitem(sys.modules, "made_up_package", module)
    monkeypatch.setattr(plugins, "entry_points", lambda group: [e for e in entries if e.group == group])
    monkeypatch.setattr(plugins, "_loaded", set())
    monkeypatch.setattr(spec, "_OPERATIONS", dict(spec._OPERATIONS))
    monkeypatch.setattr(spec.GrowthSpec, "_adapter", None)
    for table in (passes.PASSES, RULES):
        for key in list(table):
            monkeypatch.setitem(table, key, table[key])  # type: ignore[index]
    before = (set(passes.PASSES), set(RULES))

    def install(group: str, name: str, value: Any) -> None:
        setattr(module, name, value)
        entries.append(EntryPoint(name, f"made_up_package:{name}", group))

    yield install
    for table, known in zip((passes.PASSES, RULES), before, strict=True):
        for key in set(table) - known:
            del table[key]  # type: ignore[arg-type]
    spec.GrowthSpec._adapter = None


def test_an_operation_and_its_pass(fake: Fake) -> None:
    class Double(spec.Operation):
        """Widen by two."""

        op: Literal["double"] = "double"
        axis: str

    def planner(state: passes.State, operation: Double) -> list[Any]:
        return passes.run_operation(state, spec.Widen(axis=operation.axis, factor=2))

    fake("fxgrow.operations", "Double", Double)
    fake("fxgrow.passes", "register", lambda: passes.register_pass("double", planner, passes.PASSES["widen"][1]))
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    growth = fxgrow.grow(model, {"op": "double", "axis": "./hidden"}, (torch.randn(2, 3),))
    assert growth.module.get_parameter("0.weight").shape == (8, 3)
    assert "double" in str(spec.json_schema())
    assert {(p.group, p.name) for p in plugins.plugins()} == {
        ("fxgrow.operations", "Double"),
        ("fxgrow.passes", "register"),
    }


def test_rules(fake: Fake) -> None:
    @torch.library.custom_op("made_up_plugin::cube", mutates_args=())
    def cube(x: torch.Tensor) -> torch.Tensor:
        return x**3

    cube.register_fake(torch.empty_like)
    cube.register_autograd(
        lambda ctx, g: g * 3 * ctx.saved_tensors[0] ** 2,
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]),
    )

    class Cube(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.made_up_plugin.cube(x)

    model, args = nn.Sequential(nn.Linear(3, 4), Cube(), nn.Linear(4, 2)), (torch.randn(2, 3),)
    fake("fxgrow.rules", "register", lambda: fxgrow.register_rule("made_up_plugin.cube.default", Pointwise(zero=True)))
    growth = fxgrow.grow(model, {"op": "widen", "axis": "0.weight:0", "factor": 2}, args)
    assert growth.receipt.error_float64 is not None and growth.receipt.error_float64 < 1e-12


def test_a_broken_plugin_is_a_warning(fake: Fake) -> None:
    def register() -> None:
        raise RuntimeError("needs a newer fxgrow")

    fake("fxgrow.rules", "register", register)
    with pytest.warns(UserWarning, match=r"made_up_package:register of fxgrow\.rules cannot be loaded.*newer fxgrow"):
        plugins.load_plugins("fxgrow.rules")
    plugins.load_plugins("fxgrow.rules")  # once is enough


def test_a_broken_operation_neither_stops_the_parse_nor_drops_the_others(fake: Fake) -> None:
    class Third(spec.Operation):
        """Widen by three."""

        op: Literal["third"] = "third"

    class Taken(spec.Operation):
        """A name that fxgrow has."""

        op: Literal["widen"] = "widen"

    fake("fxgrow.operations", "NoClass", "text")
    fake("fxgrow.operations", "Taken", Taken)
    fake("fxgrow.operations", "Third", Third)
    with pytest.warns(UserWarning, match="cannot be loaded") as caught:
        parsed = spec.GrowthSpec.parse({"op": "third"})
    assert isinstance(parsed.operations[0], Third)
    said = [str(w.message) for w in caught]
    assert len(said) == 2 and "NoClass" in said[0] and "test_plugins is taken by fxgrow.spec" in said[1]
    assert isinstance(spec.GrowthSpec.parse({"op": "widen", "axis": "a", "to": 3}).operations[0], spec.Widen)
