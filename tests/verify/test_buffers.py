"""Putting back what a forward writes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fxgrow.verify.buffers import state_of, values_of


def test_what_is_written_or_replaced_is_put_back() -> None:
    module = nn.Sequential(nn.BatchNorm1d(3))
    names = {"0.running_mean", "0.running_var", "0.weight", "0.no_such", "nowhere.weight"}
    before, mean, spread = values_of(module, names), module[0].running_mean, module[0].running_var
    assert sorted(before) == ["0.running_mean", "0.running_var", "0.weight"]

    def raises() -> None:
        with state_of(module, names):
            mean.add_(1.0)
            module[0].running_var = torch.full((3,), 7.0)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        raises()
    assert module[0].running_mean is mean and module[0].running_var is spread
    assert all(torch.equal(t, before[n]) for n, t in values_of(module, names).items())


def test_what_is_not_named_stays_as_it_was_left() -> None:
    module = nn.BatchNorm1d(3)
    with state_of(module, {"running_var"}):
        module.running_mean.add_(1.0)
    assert torch.equal(module.running_mean, torch.ones(3))
