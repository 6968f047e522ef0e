"""Ten million pairs and triples in each dtype: the copies sum to their source exactly."""

import pytest
import torch
from kernel_oracle import DTYPES, tiled

from fxgrow.kernels import Noise, materialise

SIDE = 1024
COUNT = SIDE * SIDE
SCALES = [1e-40, 1e-12, 1e-5, 1e-3, 1e-2, 0.1, 1.0, 30.0, 1e4, 1e30]  # of the noise; ten tensors of 2^20 values


def two_sum(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum and its rounding error, exactly (Knuth)."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def values(dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Half random bit patterns (every exponent, subnormals), half a bell curve; then the edges of the format."""
    generator = torch.Generator().manual_seed(seed)
    ints = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    info = torch.iinfo(ints)
    bits = torch.randint(info.min, info.max, (COUNT // 2,), generator=generator, dtype=torch.int64).to(ints).view(dtype)
    x = torch.cat([bits, torch.randn(COUNT // 2, generator=generator).to(dtype)])
    x = torch.where(x.isfinite(), x, torch.zeros_like(x))
    limits = torch.finfo(dtype)
    tiny = limits.smallest_normal * limits.eps
    edges = [0.0, tiny, 2 * tiny, 3 * tiny, 7 * tiny, limits.smallest_normal - tiny, limits.smallest_normal]
    edges += [
        limits.smallest_normal + tiny,
        2 * limits.smallest_normal - tiny,
        limits.max,
        limits.max * (1 - limits.eps),
    ]
    signed = torch.tensor([s * e for e in edges for s in (1, -1)], dtype=torch.float64).to(dtype)
    x[: len(signed)] = signed
    return x


@pytest.mark.filterwarnings("ignore::fxgrow.kernels.NoiseTooSmall")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("copies", "uneven"), [(2, False), (3, False), (3, True)], ids=["pairs", "triples", "1:2:3"])
def test_sums_are_exact(copies: int, uneven: bool, dtype: torch.dtype) -> None:
    checked = mismatches = parted = 0
    dims = [None, tiled(SIDE, copies * SIDE, split=True, uneven=uneven)]
    for k, scale in enumerate(SCALES):
        x = values(dtype, k).view(SIDE, SIDE)
        got = materialise(x, dims, noise=Noise("antisymmetric", scale, seed=k)).view(SIDE, copies, SIDE).unbind(1)
        parts = [part.double() for part in got]
        total, wrong = parts[0], torch.zeros(SIDE, SIDE, dtype=torch.bool)
        for part in parts[1:]:
            total, error = two_sum(total, part)
            wrong |= error != 0
        wrong |= (total != x.double()) | (torch.stack(got).signbit() != x.signbit()).any(0)
        mismatches += int(wrong.sum())
        parted += int((parts[0] != parts[1]).sum())
        checked += COUNT
    assert checked >= 10**7
    assert mismatches == 0
    assert parted > checked // 4  # the noise is there
