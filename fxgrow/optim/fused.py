"""Adam's fused kernel on parts of a tensor, each while it is in the processor's cache.

An optimizer's own step takes lists: everything would be kept aside before it, and brought back after it, by when
nothing is in the cache any more. And the way through a step in Python takes as long as the kernel does for 50,000
entries. So Adam's and AdamW's kernel is called part by part where the optimizer itself would call it, with the same
numbers. Other optimizers are not bound by memory alone, and go through their own step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxgrow.ir.foreach import adam_each
from fxgrow.weights.moments import steps_like

#: entries that are stepped together on one thread: with gradient and state, they fill a cache of a few megabytes
CACHED = 1 << 18


@dataclass(frozen=True)
class Fused:
    """The kernel with the numbers of one parameter group."""

    lr: float | Tensor
    decoupled: bool
    amsgrad: bool
    numbers: Mapping[str, Any]

    def takes(self, p: Tensor, state: Mapping[str, Any]) -> bool:
        """Whether a parameter and its state are what the kernel works on."""
        held = [state.get(key) for key in ("step", "exp_avg", "exp_avg_sq", *["max_exp_avg_sq"][: self.amsgrad])]
        return all(isinstance(v, Tensor) and v.device == p.device for v in held)

    def counted(self, state: Mapping[str, Any]) -> Tensor:
        """The parameter's count with this step."""
        count: Tensor = state["step"]
        return count.add_(1)

    def uncounted(self, state: Mapping[str, Any]) -> None:
        """Take a step back that a gradient scaler skips."""
        found = self.numbers["found_inf"]
        if found is not None:
            state["step"].sub_(found)

    def __call__(self, tensor: Tensor, grad: Tensor, state: Mapping[str, Any], count: Tensor, rate: float) -> None:
        """Step a part, ``state`` being that part's, at so much of the learning rate."""
        adam_each(
            [tensor],
            [grad],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [state["max_exp_avg_sq"]] if self.amsgrad else [],
            [count],
            decoupled=self.decoupled,
            lr=self.lr if rate == 1.0 else self.lr * rate,
            amsgrad=self.amsgrad,
            **self.numbers,
        )


def fused_kernels(optimizer: torch.optim.Optimizer) -> dict[Tensor, Fused]:
    """The kernel of each parameter on a processor that the optimizer's step would call one for."""
    out: dict[Tensor, Fused] = {}
    if not steps_like(optimizer, {torch.optim.Adam, torch.optim.AdamW}):
        return out
    scaling = {key: getattr(optimizer, key, None) for key in ("grad_scale", "found_inf")}
    for group in optimizer.param_groups:
        if group.get("fused") is not True or any(isinstance(b, Tensor) for b in group["betas"]):
            continue
        numbers = {key: group[key] for key in ("weight_decay", "eps", "maximize")}
        beta1, beta2 = group["betas"]
        kernel = Fused(
            group["lr"],
            bool(group.get("decoupled_weight_decay")),
            bool(group["amsgrad"]),
            {"beta1": beta1, "beta2": beta2, **numbers, **scaling},
        )
        out.update((p, kernel) for p in group["params"] if p.device.type == "cpu")
    return out


__all__ = ["CACHED", "Fused", "fused_kernels"]
