"""Tensors to the bit."""

from __future__ import annotations

import hashlib

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


def checksum(tensor: torch.Tensor) -> str:
    """Sixteen hexadecimal digits that tensors with other bits have others of, but for chance.

    Sums along rows and columns of the memory stand for it, and are what leaves the device.
    """
    raw = _bytes(tensor)
    if raw.storage_offset() % 8:
        raw = raw.clone()
    words = raw[: raw.numel() // (8 * _ROW) * (8 * _ROW)].view(torch.int64).view(-1, _ROW)
    digest = hashlib.blake2b(repr((tensor.dtype, tuple(tensor.shape))).encode(), digest_size=8)
    for part in (words.sum(0), words.sum(1), raw[words.numel() * 8 :]):
        digest.update(part.cpu().numpy().tobytes())
    return digest.hexdigest()


_ROW = 1024


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach().resolve_conj().resolve_neg()
    parts = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return parts.contiguous().flatten().view(torch.uint8)
