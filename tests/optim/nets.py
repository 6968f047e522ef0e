"""A small model and its training, for tests of optimizers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn, optim

import fxgrow


class Sized(nn.Module):
    """Embedding, a residual branch, a head: writers, readers and a tensor that no growth here touches."""

    def __init__(self, stream: int = 6, hidden: int = 8, sparse: bool = False) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, stream, sparse=sparse)
        self.up, self.down = nn.Linear(stream, hidden), nn.Linear(hidden, stream)
        self.out = nn.Linear(stream, 3)

    def forward(self, i: torch.Tensor) -> torch.Tensor:
        x = self.emb(i)
        return self.out(x + self.down(torch.tanh(self.up(x))))


def sized(dtype: torch.dtype = torch.float64, **how: Any) -> Sized:
    torch.manual_seed(0)
    return Sized(**how).to(dtype)


HIDDEN = {"op": "widen", "axis": "up.weight:0", "factor": 3}
STREAM = {"op": "widen", "axis": "out.weight:1", "factor": 2}


def loss_of(model: nn.Module, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randint(11, (4, 5), generator=g), torch.randn(4, 5, 3, generator=g, dtype=torch.float64)
    return (model(x) - y.to(next(model.parameters()).dtype)).square().mean()


def step(model: nn.Module, optimizers: Any, seed: int) -> float:
    """One step of one optimizer, or of several; those of SparseAdam need no closure."""
    several = optimizers if isinstance(optimizers, list) else [optimizers]
    for one in several:
        one.zero_grad(set_to_none=bool(seed % 3))
    loss = loss_of(model, seed)
    loss.backward()
    for one in several:
        one.step()
    return float(loss.detach())


def closure_step(model: nn.Module, optimizer: optim.Optimizer, seed: int) -> float:
    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, seed)
        loss.backward()
        return loss

    return float(optimizer.step(closure).detach())  # type: ignore[union-attr]


def either(model: nn.Module, optimizer: optim.Optimizer, seed: int) -> float:
    """With a closure and without, in turns."""
    return (closure_step if seed % 2 else step)(model, optimizer, seed)


def grown(model: nn.Module, *spec: dict[str, Any], **how: Any) -> fxgrow.Growth:
    return fxgrow.grow(model, list(spec), (torch.arange(20).remainder(11).view(4, 5),), verify=False, **how)


Make = Callable[[Any], optim.Optimizer]


def _variants() -> dict[str, Make]:
    """Every optimizer that works entry by entry, in each of its implementations that runs here."""
    settings: dict[type[optim.Optimizer], dict[str, Any]] = {
        optim.ASGD: {"lr": 1e-2, "t0": 2, "weight_decay": 0.1},
        optim.Adadelta: {"lr": 1.0, "weight_decay": 0.01},
        optim.Adagrad: {"lr": 1e-2, "initial_accumulator_value": 0.1, "lr_decay": 0.01},
        optim.Adam: {"lr": 1e-2, "weight_decay": 0.1, "amsgrad": True},
        optim.AdamW: {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-4},
        optim.Adamax: {"lr": 1e-2, "weight_decay": 0.1},
        optim.NAdam: {"lr": 1e-2, "decoupled_weight_decay": True, "weight_decay": 0.1},
        optim.RAdam: {"lr": 1e-2, "weight_decay": 0.1},
        optim.RMSprop: {"lr": 1e-3, "momentum": 0.9, "centered": True, "weight_decay": 0.1},
        optim.Rprop: {"lr": 1e-3},
        optim.SGD: {"lr": 1e-2, "momentum": 0.9, "weight_decay": 0.05, "nesterov": True},
    }
    fused = (optim.Adagrad, optim.Adam, optim.AdamW, optim.SGD)
    out: dict[str, Make] = {}
    for kind, given in settings.items():
        ways = [{}, {"foreach": True}, *([{"fused": True}] if kind in fused else [])]
        for way in ways:
            out[" ".join([kind.__name__, *way])] = lambda p, kind=kind, how={**given, **way}: kind(p, **how)
    return out


VARIANTS = _variants()
