"""What new entries hold, and sums over them: asked for, refused, begun again; which tensors read and which carry."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxgrow
from fxgrow.algebra import Axis, Leaf
from fxgrow.errors import GrowthRefused
from fxgrow.ir.ops import op_name
from fxgrow.plan import AxisMap
from fxgrow.proof.call import GrowingCall
from fxgrow.proof.contents import AskedContents, GivenContents, Restart
from fxgrow.proof.sums import Sums, UnequalCopies
from fxgrow.rules.annotation import Content, Info, Site

W, V = ("w", 0, 0), ("v", 1, 0)
ADDED = AxisMap.add(6, 9, paired=False)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.v = nn.Parameter(torch.ones(6, 4)), nn.Parameter(torch.ones(3, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ self.w.T) @ self.v.T


@pytest.fixture(scope="module")
def axes() -> fxgrow.Axes:
    return fxgrow.capture(Model(), (torch.ones(2, 4),)).axes


def call_of(axes: fxgrow.Axes, growth: AxisMap = ADDED) -> GrowingCall:
    info = next(i for i in axes if i.size == 6)
    call = GrowingCall(axes, info.axis, info.name, growth)
    call.at(next(n for n in axes.program.graph.nodes if op_name(n.target) == "aten.tanh.default"))
    return call


def leaf(call: GrowingCall, content: Content, *sources: Site, site: Site | None = None) -> Leaf:
    assert isinstance(call.axis, Axis)
    return Leaf(call.axis, Info(content, frozenset(sources), site))


# contents -----------------------------------------------------------------------------------------------------------


def test_what_is_asked_for_holds_from_the_next_attempt_on(axes: fxgrow.Axes) -> None:
    call, contents = call_of(axes), AskedContents(Content.FREE)
    assert contents.of(W) is Content.FREE
    with pytest.raises(Restart):
        contents.demand(call, Info(Content.FREE, frozenset([W])), Content.ZERO, "it sums")
    assert contents.of(W) is Content.ZERO
    assert not contents.pin(call, W, Content.ZERO, "it sums")


def test_two_ops_cannot_ask_for_different_things(axes: fxgrow.Axes) -> None:
    call, contents = call_of(axes), AskedContents(Content.FREE)
    contents.pin(call, W, Content.ZERO, "it sums")
    with pytest.raises(GrowthRefused, match=r"new entries of w have to hold the mean .*; but for aten.tanh.* be zero"):
        contents.pin(call, W, Content.MEAN, "it normalises")


def test_nothing_can_be_asked_of_values_that_no_weights_make(axes: fxgrow.Axes) -> None:
    with pytest.raises(GrowthRefused, match="no weights of the model decide"):
        AskedContents(Content.FREE).demand(call_of(axes), Info(Content.FREE), Content.ZERO, "it sums")


def test_given_entries_are_what_they_are(axes: fxgrow.Axes) -> None:
    contents = GivenContents()
    with pytest.raises(GrowthRefused, match="it sums, so that new entries would change its result"):
        contents.demand(call_of(axes), Info(Content.FREE, frozenset([W])), Content.ZERO, "it sums")
    assert contents.of(W) is Content.FREE


# sums ---------------------------------------------------------------------------------------------------------------


def test_a_weight_that_is_multiplied_with_values_reads(axes: fxgrow.Axes) -> None:
    call = call_of(axes)
    sums = Sums(call, AskedContents(Content.FREE))
    value, weight = leaf(call, Content.FREE, W), leaf(call, Content.FREE, V, site=V)
    assert sums.contract([value, weight], ["input", "weight"]) == 1.0
    assert call.outcome.readers == {V: {Content.FREE}}
    with pytest.raises(Restart):  # it is seen in a result too
        sums.close(weight)
    assert sums.forced == {V}


def test_of_two_values_one_is_zero_in_new_entries(axes: fxgrow.Axes) -> None:
    call, contents = call_of(axes), AskedContents(Content.FREE)
    with pytest.raises(Restart):
        Sums(call, contents).contract([leaf(call, Content.FREE, W), leaf(call, Content.FREE, V)], ["self", "mat2"])
    assert contents.pinned == {V: Content.ZERO}


def test_sums_of_copies_are_multiples_of_what_they_were(axes: fxgrow.Axes) -> None:
    call = call_of(axes, AxisMap.copy(6, 18, "even"))
    sums = Sums(call, AskedContents(Content.FREE))
    assert sums.contract([leaf(call, Content.FREE), leaf(call, Content.FREE)], ["self", "mat2"]) == 3.0
    assert call.outcome.statistics
    uneven = call_of(axes, AxisMap.copy(6, 8, "even"))
    with pytest.raises(UnequalCopies, match="8 is no multiple of 6"):
        Sums(uneven, AskedContents(Content.FREE)).uniform_factor([leaf(uneven, Content.FREE)])


def test_a_mean_square_of_old_entries_and_new_zeros_shrinks(axes: fxgrow.Axes) -> None:
    call, contents = call_of(axes), AskedContents(Content.FREE)
    sums = Sums(call, contents)
    with pytest.raises(Restart):
        sums.statistic([leaf(call, Content.FREE, W)], Content.ZERO, 1)
    assert contents.pinned == {W: Content.ZERO}
    assert sums.statistic([leaf(call, Content.ZERO, W)], Content.ZERO, 1) == pytest.approx((6 / 9) ** 0.5)
