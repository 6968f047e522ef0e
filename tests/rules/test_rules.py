"""Every registered rule against the real op, by brute force."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from reasons import explained
from rows import saying
from samples import SAMPLES

from fxgrow.errors import GrowthRefused
from fxgrow.ir.ops import operator_named
from fxgrow.program import capture
from fxgrow.rules import RULES
from fxgrow.rules.annotation import Content
from fxgrow.rules.base import FAMILIES, op_names, register_rule
from fxgrow.rules.forms import Made, Opaque, Pattern, Pointwise, Structural, parse_pattern
from fxgrow.testing.judge import Sample, check, unjudged


def exists(name: str) -> bool:
    try:
        operator_named(name)
    except GrowthRefused:
        return False
    return True


#: ops that run over all of their operand, which cannot grow along it
FROZEN = {
    *(
        f"aten.{n}.default"
        for n in ("prod", "aminmax", "nansum", "nanmean", "median", "nanmedian", "var_mean", "std_mean")
    ),
    *("aten.cross_entropy_loss.default", "aten.nll_loss.default", "aten.nll_loss_nd.default"),
}


@pytest.mark.parametrize("op", [name for name in SAMPLES if exists(name)])
def test_what_a_rule_claims_holds(op: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message="Using padding='same'")
        report = check(op, SAMPLES[op])
    assert not report.wrong, "\n".join(map(str, report.wrong[:10]))
    unexplained = [f for f in report.strict if not explained(f.detail)]
    assert not unexplained, "\n".join(map(str, unexplained))
    if op not in FROZEN and not isinstance(RULES[op], Opaque | Made):
        assert report.accepted, "nothing of these samples grows: the rule is judged by none of them"


def test_every_rule_is_judged() -> None:
    assert all(exists(name) for name in FAMILIES if name != "getitem")
    missing = [name for name in unjudged(SAMPLES) if name != "getitem" and exists(name)]
    assert not missing, f"no samples for {missing}"


def holds_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor) or (isinstance(value, list | tuple) and any(map(holds_tensor, value)))


def test_every_tensor_that_an_op_takes_is_judged() -> None:
    """Optional ones too: a rule that forgets one is right about every call without it."""
    missing = []
    for name, rule in RULES.items():
        if isinstance(rule, Opaque) or name == "getitem" or not exists(name):
            continue
        for place, argument in enumerate(operator_named(name)._schema.arguments):
            given = [s.args[place] if place < len(s.args) else s.kwargs.get(argument.name) for s in SAMPLES[name]]
            if "Tensor" in str(argument.type) and not any(map(holds_tensor, given)):
                missing.append(f"{name}: {argument.name}")
    assert not missing


@pytest.mark.parametrize(
    ("op", "rule", "call", "operand"),
    [
        (
            "aten.diff.default",
            Structural(lambda ctx, dims: dims),
            lambda x, y: torch.diff(x, dim=1, append=y),
            "append",
        ),
        ("aten.lerp.Tensor", Structural(lambda ctx, dims: dims), lambda x, y: torch.lerp(x, x, y), "weight"),
        ("aten.addcmul.default", Structural(lambda ctx, dims: dims), lambda x, y: torch.addcmul(x, x, y), "tensor2"),
    ],
)
def test_operands_that_a_rule_never_asks_for_freeze(
    op: str,
    rule: Structural,
    call: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    operand: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(r(3, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return call(x, self.weight).sum()

    monkeypatch.setitem(RULES, op, rule)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        axes = capture(Model(), (r(3, 4),)).axes
    (frozen,) = {str(a.reason) for a in axes if any(m.dim == 0 for m in a.members)}
    assert f"does not follow its operand {operand}" in frozen


def r(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize(
    ("op", "rule", "sample", "complaint"),
    [
        ("aten.softmax.int", Pointwise(), Sample(r(3, 4), 1), "copies do not hold"),
        ("aten.cumsum.default", Structural(lambda ctx, dims: dims), Sample(r(3, 4), 1), "copies do not hold"),
        ("aten.sigmoid.default", Pointwise(zero=True), Sample(r(3, 4)), "said to be zero"),
        ("aten.exp.default", Pointwise(mean=True), Sample(r(3, 4)), "said to hold the mean"),
        ("aten.linear.default", Pattern("... i, o i, o? -> ... o", ["input", "weight", "bias"]), None, "copies do not"),
        ("aten.view.default", Structural(lambda ctx, dims: ctx.regroup(dims, ctx.shape)), None, "fails"),
        ("aten.transpose.int", Structural(lambda ctx, dims: dims), Sample(r(4, 4), 0, 1), "claims the shape"),
        ("aten.mul.Tensor", Pointwise("add"), Sample(r(3, 4), r(4)), "said to hold the mean"),
    ],
)
def test_the_judge_finds_a_rule_that_is_wrong(
    op: str, rule: object, sample: Sample | None, complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RULES, op, rule)
    report = check(op, [sample] if sample is not None else SAMPLES[op])
    assert any(complaint in f.detail for f in report.wrong), report


@pytest.mark.parametrize("op", ["aten.floor.default", "aten.ge.Tensor", "aten.sort.default", "aten.reciprocal.default"])
def test_the_judge_finds_a_rule_that_is_silent_about_jumps(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, op, saying(op, jumps=False))
    assert any("jumps where numbers are equal" in f.detail for f in check(op, SAMPLES[op]).wrong)


def test_the_judge_finds_a_rule_that_is_wrong_about_what_an_op_implies(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {"eps": lambda dtype: torch.finfo(dtype).eps}  # half precision takes float32's
    monkeypatch.setattr(RULES["aten.rms_norm.default"], "implied", wrong)
    report = check("aten.rms_norm.default", [Sample(r(3, 4), [4])])
    assert {f.detail.partition(" its")[0] for f in report.wrong} == {"in torch.bfloat16", "in torch.float16"}


@pytest.mark.parametrize(
    ("op", "sample"),
    [
        ("aten.pad.default", Sample(r(3, 4), [1, 2], "constant", 1.0)),
        ("aten.cumprod.default", Sample(r(3, 4), 1)),
        ("aten.to.dtype", Sample(r(3, 4), torch.int64)),
        ("aten.relu.default", Sample(r(3, 4))),
        ("aten.mul.Tensor", Sample(r(3, 4), r(4))),
        ("aten.sort.default", Sample(r(3, 4), 1)),
    ],
)
def test_the_judge_finds_a_rule_that_says_linear_of_an_op_that_is_not(
    op: str, sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RULES, op, saying(op, linear=True))
    report = check(op, [sample])
    assert any("said to be linear" in f.detail for f in report.wrong), report


def test_the_judge_finds_a_rule_that_is_stricter_than_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, "aten.tanh.default", Opaque("nobody looked"))
    report = check("aten.tanh.default", [Sample(r(3, 4))])
    assert not report.wrong
    assert {f.detail.rpartition(": ")[2] for f in report.strict} == {"nobody looked"}
    assert len(report.strict) == 2


def test_the_judge_takes_functions_of_several_ops() -> None:
    def normalise(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3)

    report = check(normalise, [Sample(r(3, 4), r(4))])
    assert not report.wrong, report.wrong
    assert report.accepted


def test_integers_do_not_keep_the_mean() -> None:
    """Rounded one by one, the mean of the others is not the mean of the others rounded."""

    def centred(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.layer_norm((4 * x).to(torch.int64).to(torch.float64), [x.shape[-1]])

    report = check(centred, [Sample(r(3, 5))])
    assert not report.wrong, report.wrong
    assert report.accepted


def test_several_scalars_are_results_too() -> None:
    """Entries picked by number freeze the axis, though each of them is a scalar."""
    from fxgrow import GrowthRefused, SpecError, grow

    class Mix(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = torch.nn.Parameter(r(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            a, b = self.mix.unbind(0)
            return a * x + b * x.flip(0)

    class Range(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.levels = torch.nn.Parameter(r(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            spread, centre = torch.var_mean(self.levels)
            return x * spread + centre

    for model, name in ((Mix(), "mix"), (Range(), "levels")):
        with pytest.raises((GrowthRefused, SpecError), match=name):
            grow(model, {"operations": [{"op": "widen", "axis": f"{name}:0", "by": 1}]}, (r(3),))


def test_a_rule_is_registered_once_unless_overridden(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="has a rule already"):
        register_rule("aten.relu.default", Pointwise())
    monkeypatch.setitem(RULES, "aten.relu.default", RULES["aten.relu.default"])
    mine = Pointwise()
    register_rule("aten.relu.default", mine, override=True)
    assert RULES["aten.relu.default"] is mine


@pytest.mark.parametrize("pattern", ["a b", "a (b -> a", "a b) -> a", "a, b -> c", "((a) -> a"])
def test_a_pattern_that_makes_no_sense_is_an_error(pattern: str) -> None:
    with pytest.raises(ValueError, match="pattern"):
        parse_pattern(pattern)


def test_contents_join_to_what_both_agree_on() -> None:
    for a in Content:
        for b in Content:
            assert Content.join(a, b) is (a if a is b else Content.FREE)


def test_names_of_a_row() -> None:
    names = "aten.relu aten.tanh(_) aten.add(_).Tensor my.op.out prims::op.one"
    assert list(op_names(names)) == [
        *("aten.relu.default", "aten.tanh.default", "aten.tanh_.default", "aten.add.Tensor", "aten.add_.Tensor"),
        *("my.op.out", "prims::op.one.default"),
    ]
    with pytest.raises(ValueError, match="not the name of an op"):
        list(op_names("relu"))


def test_a_column_is_given_and_not_defined() -> None:
    with pytest.raises(TypeError, match="column"):

        class Mine(Pointwise):
            def linear(self, node: torch.fx.Node) -> bool:  # type: ignore[override]
                return True
