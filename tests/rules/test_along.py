"""The form of ops that do something along some dims: the judge finds every column that is wrong."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rows import saying

from fxgrow import GrowthRefused, grow
from fxgrow.program import capture
from fxgrow.rules import RULES
from fxgrow.rules.forms import Along
from fxgrow.rules.forms.along import in_whole_numbers
from fxgrow.testing.judge import Report, Sample, check


def r(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def judged(op: str, sample: Sample) -> Report:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # analysis says so too, where dims of results do not fit
        return check(op, [sample])


IMAGE, PLACES = r(2, 3, 4, 4), r(2, 5, 5, 2).tanh()
POOLED, INDICES = torch.nn.functional.max_pool2d(IMAGE, 2, return_indices=True)


@pytest.mark.parametrize(
    ("op", "columns", "sample", "complaint"),
    [
        ("aten.sum.dim_IntList", {"over": 1}, Sample(r(4, 4), [0]), "claims the shape"),
        ("aten.softmax.int", {"over": 1}, Sample(r(3, 4), 0), "copies do not hold"),
        ("aten.roll.default", {"over": 1}, Sample(r(3, 4), [1], [0]), "copies do not hold"),
        ("aten.renorm.default", {"over": "dim"}, Sample(r(3, 4), 2, 0, 0.5), "copies do not hold"),
        ("aten.mean.dim", {"kind": "sum"}, Sample(r(3, 4), [1]), "copies do not hold"),
        ("aten.sum.dim_IntList", {"kind": "mean"}, Sample(r(3, 4), [1]), "copies do not hold"),
        ("aten.count_nonzero.dim_IntList", {"kind": "mean"}, Sample(r(3, 4), [1]), "copies do not hold"),
        ("aten.linalg_vector_norm.default", {"kind": "sum"}, Sample(r(3, 4), 2, [1]), "copies do not hold"),
        ("aten.sum.dim_IntList", {"kind": "norm"}, Sample(r(3, 4), [1]), "copies do not hold"),
        ("aten.var.correction", {"kind": "deviation"}, Sample(r(3, 4), [1]), "copies do not hold"),
        ("aten.std.correction", {"kind": "variance"}, Sample(r(3, 4), [1]), "copies do not hold"),
        ("aten.var.correction", {"kind": "mean"}, Sample(r(3, 4), [1]), "copies do not hold"),
        ("aten.amax.default", {"kind": "mean"}, Sample(r(3, 4), [1]), "said to hold the mean"),
        ("aten.softmax.int", {"kind": "mean"}, Sample(r(3, 4), 1), "copies do not hold"),
        ("aten.cumprod.default", {"kind": "interpolation"}, Sample(r(3, 4), 1), "said to hold the mean"),
        ("aten.log_softmax.int", {"kind": "softmax", "why": ""}, Sample(r(3, 4), 1), "copies do not hold"),
        ("aten.linalg_vector_norm.default", {"why": ""}, Sample(r(3, 4), 1, [1]), "copies do not hold"),
        ("aten.grid_sampler_2d.default", {"others": {}}, Sample(IMAGE, PLACES, 0, 0, False), "fails"),
        ("aten.diff.default", {"others": {"prepend": None}}, Sample(r(3, 4), 1, 1, None, r(3, 2)), "fails"),
        (
            "aten.diff.default",
            {"linear": False, "kind": "interpolation"},
            Sample(r(3, 4), 1, 1, None, r(3, 2)),
            "said to be zero",
        ),
        ("aten.pad.default", {"linear": True}, Sample(r(3, 4), [1, 2], "constant", 1.0), "said to be linear"),
        ("aten.max.dim", {"jumps": False}, Sample(r(3, 4), 1), "jumps where numbers are equal"),
        (
            "aten.linalg_vector_norm.default",
            {"jumps": in_whole_numbers},
            Sample(r(3, 4), 0, [1]),
            "jumps where numbers",
        ),
        ("aten.grid_sampler_2d.default", {"jumps": False}, Sample(IMAGE, PLACES, 1, 0, False), "jumps where numbers"),
        ("aten.cumsum.default", {"linear": True}, Sample(r(3, 4), 1, dtype=torch.int64), "said to be linear"),
        ("aten.sum.dim_IntList", {"selects": True}, Sample(r(3, 4), [1]), "said to pick entries"),
    ],
)
def test_the_judge_finds_a_column_that_is_wrong(
    op: str, columns: dict[str, Any], sample: Sample, complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not judged(op, sample).wrong
    monkeypatch.setitem(RULES, op, saying(op, **columns))
    report = judged(op, sample)
    assert any(complaint in f.detail for f in report.wrong), report


@pytest.mark.parametrize(
    ("op", "columns", "sample", "complaint"),
    [
        ("aten.mean.dim", {"why": "nobody looked"}, Sample(r(3, 4), [1]), "nobody looked"),
        ("aten.softmax.int", {"result": "reduced"}, Sample(r(3, 4), 1), "does not fit this call"),
        ("aten.sum.dim_IntList", {"result": "same"}, Sample(r(3, 4), [1]), "does not fit this call"),
        ("aten.pad.default", {"result": "same"}, Sample(r(3, 4), [1, 2]), "does not fit this call"),
        ("aten.roll.default", {"result": "reduced"}, Sample(r(3, 4), [1], [1]), "does not fit this call"),
        (
            "aten.grid_sampler_2d.default",
            {"others": {"grid": 2}},
            Sample(IMAGE, PLACES, 0, 0, False),
            "size 3 meets size 5",
        ),
    ],
)
def test_the_judge_finds_a_column_that_is_too_strict(
    op: str, columns: dict[str, Any], sample: Sample, complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = judged(op, sample)
    assert not any(complaint in f.detail for f in before.strict)
    monkeypatch.setitem(RULES, op, saying(op, **columns))
    report = judged(op, sample)
    assert any(complaint in f.detail for f in report.strict), report


def test_indices_of_an_unpooling_follow_its_operand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where entries go grows with them; said otherwise, neither grows, and what comes before them does not."""

    def there_and_back(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.max_unpool2d(*torch.nn.functional.max_pool2d(x, 2, return_indices=True), 2)

    report = check(there_and_back, [Sample(IMAGE)])
    assert report.accepted > 0
    assert not report.wrong, report.wrong
    monkeypatch.setitem(RULES, "aten.max_unpool2d.default", saying("aten.max_unpool2d.default", others={}))
    assert any("does not follow its operand indices" in f.detail for f in check(there_and_back, [Sample(IMAGE)]).strict)


def test_sums_in_whole_numbers_do_not_keep_the_mean() -> None:
    def rounded(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.layer_norm((4 * x).sum(0, dtype=torch.int64).to(torch.float64), [x.shape[-1]])

    report = check(rounded, [Sample(r(3, 5))])
    assert report.accepted > 0
    assert not report.wrong, report.wrong


class Router(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = torch.nn.Linear(3, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gate(x).topk(2).values


def test_roles_name_axes(monkeypatch: pytest.MonkeyPatch) -> None:
    def names() -> set[str]:
        return {axis.name.rpartition("/")[2] for axis in capture(Router(), (torch.randn(2, 3),)).axes}

    assert "experts" in names()
    monkeypatch.setitem(RULES, "aten.topk.default", saying("aten.topk.default", role=""))
    assert "experts" not in names()


def test_dims_that_growth_would_mix_need_a_reason() -> None:
    with pytest.raises(ValueError, match="say why"):
        Along("dim", "mixed")
    with pytest.raises(ValueError, match="say why"):
        Along("dim", "mean", result="new")
    with pytest.raises(ValueError, match="none of mean, sum"):
        Along("dim", "average")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("over", "args", "dims"),
    [
        ("dim", {}, [0, 1, 2]),
        ("dim", {"dim": None}, [0, 1, 2]),
        ("dim", {"dim": []}, [0, 1, 2]),
        ("dim", {"dim": -1}, [2]),
        ("dims", {"dims": [-1, 0, 2]}, [0, 2]),
        (2, {}, [1, 2]),
        (5, {}, [0, 1, 2]),
        (lambda args, rank: [rank - 2], {}, [1]),
    ],
)
def test_dims_over(over: str | int | Callable[..., list[int]], args: dict[str, Any], dims: list[int]) -> None:
    assert Along(over, "mean").dims_over(args, 3) == dims
    assert Along(over, "mean").dims_over(args, 0) == []


@pytest.mark.parametrize(("ops", "refused"), [("sort", True), ("cumsum", False)])
def test_what_depends_on_all_entries_leaves_no_old_one(ops: str, refused: bool) -> None:
    """Appended to a vocabulary, entries change a sort of the logits and no running sum."""

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.Linear(3, 5)

        def forward(self, x: torch.Tensor) -> Any:
            logits = self.head(x)
            return logits, logits.sort(-1).values if ops == "sort" else logits.cumsum(-1)

    spec = {"operations": [{"op": "extend", "axis": "head.weight:0", "to": 7}]}
    with pytest.raises(GrowthRefused) as error:
        grow(Model(), spec, (torch.randn(2, 3),))
    assert ("Only what is computed from it changes" in str(error.value)) is refused
