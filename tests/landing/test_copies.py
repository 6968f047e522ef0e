"""Moving averages and other copies of a model grow by the plan that the model grew by."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fxgrow
from tests.models import relative_error, small_gpt, tokens

SPEC = [{"op": "widen", "axis": "*/hidden", "factor": 2}, {"op": "deepen", "stack": "transformer.h", "by": 1}]


def moved(model: nn.Module) -> None:
    with torch.no_grad():
        for number, p in enumerate(model.parameters()):
            p.add_(0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(number)).to(p))


def test_an_average_and_a_teacher_grow_with_their_model() -> None:
    model = small_gpt()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    teacher = copy.deepcopy(model).requires_grad_(False)
    for _ in range(2):
        moved(model)
        average.update_parameters(model)
    before = [copy.deepcopy(m).eval() for m in (average.module, teacher)]
    growth = fxgrow.grow(model, SPEC, tokens(), verify=False)
    growth.apply_(model)
    assert growth.apply_to_copy_(average) is average
    growth.apply_to_copy_(teacher)
    for old, new in zip(before, (average.module, teacher), strict=True):
        assert relative_error(old, new.eval(), tokens(3)) <= 1e-12
        assert type(new) is type(model)
        assert new.transformer.wte.weight is new.lm_head.weight
    assert int(average.n_averaged) == 2
    assert not any(p.requires_grad for p in teacher.parameters())
    moved(model)
    average.update_parameters(model)
    assert int(average.n_averaged) == 3
    mine = dict(model.named_parameters())
    assert all(p is not mine[n] for m in (average.module, teacher) for n, p in m.named_parameters())


def test_what_is_no_copy_is_refused_and_left_alone() -> None:
    model = small_gpt()
    growth = fxgrow.grow(model, SPEC, tokens(), verify=False)
    other = copy.deepcopy(model).float()
    state = {n: t.clone() for n, t in other.state_dict().items()}
    with pytest.raises(fxgrow.FxgrowError, match=r"no copy of the model as it was captured: .* is float32"):
        growth.apply_to_copy_(other)
    assert all(torch.equal(t, state[n]) for n, t in other.state_dict().items())


def test_copies_get_more_positions_and_outputs() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    teacher, x = copy.deepcopy(model), torch.randn(5, 4, dtype=torch.float64)
    moved(teacher)
    before = teacher(x)
    growth = fxgrow.grow(model, {"op": "extend", "axis": "2.weight:0", "by": 2}, (x,), verify=False)
    after = growth.apply_to_copy_(teacher)(x)
    assert after.shape == (5, 5)
    torch.testing.assert_close(after[:, :3], before, rtol=1e-12, atol=1e-12)


def test_a_copy_that_holds_the_models_own_parameters_is_refused() -> None:
    model, x = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double(), torch.randn(5, 4).double()
    target = copy.deepcopy(model)
    target[0].weight = model[0].weight
    growth = fxgrow.grow(model, {"op": "widen", "axis": "0.weight:0", "factor": 2}, (x,), verify=False)
    for one in (target, model):
        with pytest.raises(fxgrow.FxgrowError, match=r"0\.weight of this Sequential is the model's own parameter"):
            growth.apply_to_copy_(one)
    assert target[0].weight is model[0].weight and target[0].weight.shape == (8, 4)
