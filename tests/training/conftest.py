"""Growth of the toy net by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fxgrow.scheduler import scheduler
from tests.training.toy import Net


@pytest.fixture
def by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Growth of :class:`Net` written by hand, so that the loop is tested apart from the compiler."""

    def grow(model: Net, spec: Any, args: Any, kwargs: Any = None, **how: Any) -> SimpleNamespace:
        new = Net(2 * model.up.out_features, model.dropout.p).double()
        with torch.no_grad():
            for name, old in model.up.named_parameters():
                new.up.get_parameter(name).copy_(torch.cat([old, old]))
            noise = 0.01 * torch.ones_like(model.down.weight)
            new.down.weight.copy_(torch.cat([model.down.weight / 2 + noise, model.down.weight / 2 - noise], 1))
            new.down.bias.copy_(model.down.bias)

        def carry(optimizer: torch.optim.Optimizer, policy: str, warmup: int) -> torch.optim.Optimizer:
            groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
            matrices = [[p for p in new.parameters() if p.dim() == 2], [p for p in new.parameters() if p.dim() < 2]]
            return torch.optim.AdamW([{**g, "params": p} for g, p in zip(groups, matrices, strict=True)])

        return SimpleNamespace(
            module=new,
            carry=carry,
            plan=SimpleNamespace(steps=[SimpleNamespace(op="widen")]),
            new_parameters=(),
            receipt=SimpleNamespace(exactness="exact", error_float64=0.0, error_native=None),
        )

    monkeypatch.setattr(scheduler, "grow", grow)
