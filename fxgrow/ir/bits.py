"""Tensors to the bit."""

from __future__ import annotations

import torch


def same_to_the_bit(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors hold the same bits; on the meta device, where there are none, whether they could."""
    if (a.dtype, a.shape, a.device, a.layout) != (b.dtype, b.shape, b.device, b.layout):
        return False
    if a is b or a.is_meta:
        return True
    if a.layout != torch.strided or a.is_quantized:
        return False
    return torch.equal(_bytes(a), _bytes(b))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach().resolve_conj().resolve_neg()
    parts = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return parts.contiguous().flatten().view(torch.uint8)
