"""Philox 4x32-10 (Salmon et al., SC 2011) in torch integer operations, and the draws made of its words.

A value is addressed by a linear index L: its quad ``L >> 2`` and a node make the counter, its lane ``L & 3`` picks one
of the four words. Every backend computes these same integers and the same float32 operations on them, in the same order
and without fused multiply-adds, so that draws are equal to the bit.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

M0, M1 = 0xD2511F53, 0xCD9E8D57
W0, W1 = 0x9E3779B9, 0xBB67AE85
MASK = 0xFFFFFFFF

# counter word 3: what a draw is for
SPLIT, PAIR, INDEPENDENT, RANDOM = 0, 1, 2, 3

# factor that brings a draw to unit variance; a byte has variance (256² - 1) / 12
UNIT = {"bytes": 1 / math.sqrt(4 * (256**2 - 1) / 12), "normal": math.sqrt(2.0), "rademacher": 1.0}
DISTRIBUTIONS = {"bytes": 0, "normal": 1, "rademacher": 2}


def _mix(x: int) -> int:
    """The finaliser of splitmix64 (Steele et al., OOPSLA 2014)."""
    x = (x + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return x ^ (x >> 31)


def key_words(seed: int, key: int) -> tuple[int, int]:
    """The two 32-bit key words of a (seed, tensor key) pair."""
    mixed = _mix(_mix(seed & 0xFFFFFFFFFFFFFFFF) ^ (key & 0xFFFFFFFFFFFFFFFF))
    return mixed & MASK, mixed >> 32


def philox(c0: Tensor, c1: Tensor, c2: Tensor, c3: int, key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds on int64 tensors that hold 32-bit words; counters broadcast."""
    k0, k1 = key
    w0, w1, w2, w3 = c0, c1, c2, torch.full_like(c0, c3)
    for _ in range(10):
        p0, p1 = w0 * M0, w2 * M1  # wraps modulo 2^64, as it should
        w0, w1 = ((p1 >> 32) & MASK) ^ w1 ^ k0, p1 & MASK
        w2, w3 = ((p0 >> 32) & MASK) ^ w3 ^ k1, p0 & MASK
        k0, k1 = (k0 + W0) & MASK, (k1 + W1) & MASK
    return w0, w1, w2, w3


def _log(y: Tensor) -> Tensor:
    """Natural logarithm of float32 in (0, 1] (Cephes' logf), from multiplications and additions alone."""
    bits = y.view(torch.int32)
    exponent = ((bits >> 23) - 126).to(torch.float32)
    m = ((bits & 0x007FFFFF) | 0x3F000000).view(torch.float32)
    low = m < 0.70710677
    exponent = torch.where(low, exponent - 1.0, exponent)
    m = torch.where(low, m + m, m) - 1.0
    z = m * m
    p = torch.full_like(m, 7.0376836292e-2)
    for c in LOG_POLYNOMIAL:
        p = p * m + c
    p = p * m * z
    p = p + exponent * -2.12194440e-4
    p = p - z * 0.5
    return (m + p) + exponent * 0.693359375


LOG_POLYNOMIAL = (
    -1.1514610310e-1,
    1.1676998740e-1,
    -1.2420140846e-1,
    1.4249322787e-1,
    -1.6668057665e-1,
    2.0000714765e-1,
    -2.4999993993e-1,
    3.3333331174e-1,
)
# Giles, "Approximating the erfinv function", GPU Computing Gems 2011: centre and tails
ERFINV_CENTRE = (
    2.81022636e-08,
    3.43273939e-07,
    -3.5233877e-06,
    -4.39150654e-06,
    0.00021858087,
    -0.00125372503,
    -0.00417768164,
    0.246640727,
    1.50140941,
)
ERFINV_TAIL = (
    -0.000200214257,
    0.000100950558,
    0.00134934322,
    -0.00367342844,
    0.00573950773,
    -0.0076224613,
    0.00943887047,
    1.00167406,
    2.83297682,
)


def _horner(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    p = torch.full_like(x, coefficients[0])
    for c in coefficients[1:]:
        p = p * x + c
    return p


def draw(words: Tensor, distribution: str) -> Tensor:
    """float32 values of the distribution from int64 tensors of 32-bit words; multiply by `UNIT` for unit variance."""
    if distribution == "bytes":
        pairs = (words & 0x00FF00FF) + ((words >> 8) & 0x00FF00FF)
        return ((pairs & 0xFFFF) + (pairs >> 16) - 510).to(torch.float32)
    if distribution == "rademacher":
        return 1.0 - (words >> 31).to(torch.float32) * 2.0
    x = ((words >> 8) * 2 + (1 - (1 << 24))).to(torch.float32) * 2.0**-24  # odd multiples of 2^-24: exact
    w = -_log((1.0 - x) * (1.0 + x))
    centre = _horner(ERFINV_CENTRE, w - 2.5)
    # torch's float32 square root is not correctly rounded everywhere (vendor maths libraries); float64 rounded is
    tail = _horner(ERFINV_TAIL, w.to(torch.float64).sqrt().to(torch.float32) - 3.0)
    return torch.where(w < 5.0, centre, tail) * x
