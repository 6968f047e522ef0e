"""Floating-point operations, counted by PyTorch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from fxgrow.ir.compiled import as_written
from fxgrow.ir.ops import operator_named


def flop_counter() -> FlopCounterMode:
    """Counts forward and backward; PyTorch's own table lacks the CPU's fused attention."""

    def forward(q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return sdpa_flop_count(q, k, v)

    def backward(grad: Any, q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return sdpa_backward_flop_count(grad, q, k, v)

    name = "aten._scaled_dot_product_flash_attention_for_cpu"
    table = {
        operator_named(f"{name}.default").overloadpacket: forward,
        operator_named(f"{name}_backward.default").overloadpacket: backward,
    }
    return FlopCounterMode(display=False, custom_mapping=table)


@contextlib.contextmanager
def flops_of(model: nn.Module) -> Iterator[FlopCounterMode]:
    """Counts what a model does as it is written: compiled code hides its ops."""
    with as_written(model), flop_counter() as counter:
        yield counter


__all__ = ["flop_counter", "flops_of"]
