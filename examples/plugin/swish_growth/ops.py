"""An op of this package's own."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("swish::gated", mutates_args=())
def gated(x: Tensor, gate: Tensor) -> Tensor:
    """``x * sigmoid(gate)``, element by element."""
    return x * torch.sigmoid(gate)


@gated.register_fake
def _(x: Tensor, gate: Tensor) -> Tensor:
    return torch.empty_like(x)


def _setup(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, Tensor]:
    x, gate = ctx.saved_tensors  # type: ignore[attr-defined]
    open_ = torch.sigmoid(gate)
    return gradient * open_, gradient * x * open_ * (1 - open_)


gated.register_autograd(_backward, setup_context=_setup)
