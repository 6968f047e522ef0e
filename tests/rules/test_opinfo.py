"""A part of the database's entries, judged in every run; ``python -m tests.rules.opinfo --all`` judges all of them."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

import fxgrow
from fxgrow.ir.ops import op_name
from fxgrow.rules.forms import Opaque, Pointwise

pytest.importorskip("expecttest")  # the database's module needs it

from tests.rules.database import entries
from tests.rules.opinfo import calls, judge, passing, table, trace, without_rule

#: what models are made of, and what has once been wrong
NAMES = (
    "nn.functional.linear nn.functional.conv1d nn.functional.conv2d nn.functional.conv_transpose1d bmm matmul "
    "einsum addmm nn.functional.layer_norm nn.functional.rms_norm nn.functional.group_norm "
    "nn.functional.batch_norm nn.functional.scaled_dot_product_attention nn.functional.embedding softmax "
    "nn.functional.gelu nn.functional.glu nn.functional.normalize nn.functional.cross_entropy add sub mul "
    "div.no_rounding_mode where masked_fill clamp view reshape permute transpose unbind split chunk narrow expand "
    "repeat cat stack "
    "index_select gather cumsum sum mean var_mean amax linalg.vector_norm bfloat16 long "
    "nn.functional.interpolate.bilinear nn.functional.max_pool2d "
)
ENTRIES = NAMES.split()


@pytest.mark.parametrize("name", ENTRIES)
def test_rules_hold_on_the_calls_of_the_database(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        row = judge(entries()[name], limit=8, per_overload=2)
    assert not row.error
    assert not row.wrong, "\n".join(map(str, row.wrong[:10]))
    assert not row.strict, "\n".join(map(str, row.strict[:10]))
    assert row.judged


@pytest.mark.parametrize("name", ["nn.functional.normalize", "nn.functional.linear", "nn.functional.gelu", "narrow"])
def test_a_trace_holds_the_ops_that_a_capture_does(name: str) -> None:
    args, kwargs = entries()[name].samples()[0]

    class Call(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x = nn.Parameter(args[0])

        def forward(self) -> Tensor:
            return entries()[name].function(self.x, *args[1:], **kwargs)

    def ops(graph: torch.fx.Graph) -> list[str]:
        return [op_name(n.target) for n in graph.nodes if n.op == "call_function"]

    mine = ops(trace(entries()[name].function, args, kwargs).graph)
    assert mine
    assert mine == ops(fxgrow.capture(Call()).graph)


def test_a_wrong_rule_is_found_and_a_missing_one_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    from fxgrow.rules import RULES

    monkeypatch.setitem(RULES, "aten.cumsum.default", Pointwise())
    monkeypatch.delitem(RULES, "aten.tanh.default")
    wrong, missing = judge(entries()["cumsum"], limit=4), judge(entries()["tanh"], limit=4)
    assert any("copies do not hold" in f.detail for f in wrong.wrong)
    assert missing.missing["aten.tanh.default"] >= 1
    assert without_rule([wrong, missing])[0][0] == "aten.tanh.default"
    assert "aten.tanh.default" in table([wrong, missing])


def test_a_rule_that_refuses_without_need_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from fxgrow.rules import RULES

    monkeypatch.setitem(RULES, "aten.tanh.default", Opaque("nobody looked"))
    assert judge(entries()["tanh"], limit=4).strict


@pytest.mark.parametrize(("name", "grows"), [("tanh", True), ("add", True), ("linalg.det", False), ("cumsum", True)])
def test_what_a_missing_rule_would_let_grow(name: str, grows: bool) -> None:
    found = [passing(target, sample) for target, sample in calls(entries()[name], 4) if sample.args[0].dim() > 1]
    assert found
    assert any(found) is grows
