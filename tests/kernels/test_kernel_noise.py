"""The noise against its distributions. Seeds are fixed; each bound is two-sided at 1 - 1e-6, on 10^6 draws."""

import math

import numpy as np
import pytest
import torch
from kernel_oracle import tiled

from fxgrow.kernels import FILL_RANDOM, Noise, materialise

ROWS, COLUMNS = 512, 2048
Z = 4.892  # two-sided 1e-6 of the normal distribution
KURTOSIS = {
    "bytes": 3 - 1.2 * (65537 / 65535) / 4,
    "normal": 3.0,
    "rademacher": 1.0,
}  # of four bytes: excess -6/5 · (n²+1)/(n²-1) / 4


def noise_of(distribution: str, seed: int = 0, key: int = 0, copies: int = 2, scale: float = 1.0) -> torch.Tensor:
    """Noise of the copies of a constant far above it: (copies, rows, columns), unit variance, float64."""
    x = torch.full((ROWS, COLUMNS), 1024.0, dtype=torch.float64)
    how = Noise("antisymmetric", scale, distribution=distribution, seed=seed)  # type: ignore[arg-type]
    got = materialise(x, [None, tiled(COLUMNS, copies * COLUMNS, split=True)], noise=how, key=key)
    return (got.view(ROWS, copies, COLUMNS).movedim(1, 0) - 1024.0 / copies) / scale


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """In standard errors of the correlation of independent samples."""
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) * math.sqrt(a.numel())


@pytest.mark.parametrize("distribution", ["bytes", "normal", "rademacher"])
def test_moments(distribution: str) -> None:
    e = noise_of(distribution)[0].flatten()
    n, kurtosis = e.numel(), KURTOSIS[distribution]
    assert abs(float(e.mean())) < Z / math.sqrt(n)
    assert abs(float((e**2).mean()) - 1) < Z * math.sqrt(max(kurtosis - 1, 1e-9) / n) + 1e-6
    assert abs(float((e**3).mean())) < Z * math.sqrt(15 / n)
    fourth = {"bytes": 60.0, "normal": 96.0, "rademacher": 1e-6}[distribution]  # bounds of the variance of e⁴
    assert abs(float((e**4).mean()) - kurtosis) < Z * math.sqrt(fourth / n) + 1e-5


@pytest.mark.parametrize("distribution", ["bytes", "normal", "rademacher"])
def test_no_correlation_between_neighbours_tensors_and_seeds(distribution: str) -> None:
    e = noise_of(distribution)[0]
    pairs = [
        (e[:, :-1], e[:, 1:]),
        (e[:, :-4], e[:, 4:]),
        (e[:-1], e[1:]),
        (e[:-1, :-1], e[1:, 1:]),
        (e, noise_of(distribution, key=1)[0]),
        (e, noise_of(distribution, seed=1)[0]),
        (noise_of(distribution, seed=1)[0], noise_of(distribution, key=1)[0]),
        (e[:, :-1] ** 2, e[:, 1:] ** 2) if distribution != "rademacher" else (e[:, :-2], e[:, 2:]),
    ]
    for a, b in pairs:
        assert abs(correlation(a, b)) < Z


@pytest.mark.parametrize("copies", [2, 3, 4, 5])
def test_copies_share_one_deviation_and_sum_to_zero(copies: int) -> None:
    e = noise_of("bytes", copies=copies)
    assert float(e.sum(0).abs().max()) < 1e-9
    spread = (e**2).mean((1, 2))
    assert bool((abs(spread - 1) < Z * math.sqrt(2 / (ROWS * COLUMNS)) + 1e-4).all())
    for k in range(1, copies):
        # exchangeable: every two copies correlate by -1 / (n - 1)
        assert abs(float((e[0] * e[k]).mean()) + 1 / (copies - 1)) < Z * 1.5 / math.sqrt(ROWS * COLUMNS)


def test_bytes_have_the_distribution_of_four_bytes() -> None:
    """Chi-square over all sums of four bytes with an expectation of at least 20."""
    e = noise_of("bytes")[0].flatten() * math.sqrt(4 * (256**2 - 1) / 12)
    sums = (e.round() + 510).long()
    one = np.full(256, 1 / 256)
    law = np.convolve(np.convolve(one, one), np.convolve(one, one)) * e.numel()
    seen = np.bincount(sums.numpy(), minlength=len(law))
    keep = law >= 20
    chi, freedom = float((((seen - law) ** 2 / law)[keep]).sum()), int(keep.sum())
    assert abs(chi - freedom) < Z * math.sqrt(2 * freedom)


def test_normal_has_the_distribution_of_the_normal() -> None:
    """Kolmogorov–Smirnov: the critical value at 1e-6 is 2.69 / √n; tails at 4 deviations by count."""
    e = noise_of("normal")[0].flatten().sort().values
    n = e.numel()
    law = 0.5 * (1 + torch.erf(e / math.sqrt(2)))
    steps = torch.arange(1, n + 1, dtype=torch.float64) / n
    assert float((law - steps).abs().max()) < 2.69 / math.sqrt(n) + 1e-6
    expected = n * math.erfc(4 / math.sqrt(2))
    assert abs(int((e.abs() > 4).sum()) - expected) < Z * math.sqrt(expected)


def test_random_fill_is_white_and_of_unit_variance() -> None:
    e = materialise(None, [None, None], shape=(ROWS, COLUMNS), fill=FILL_RANDOM, random_std=1.0, dtype=torch.float64)
    n = e.numel()
    assert abs(float(e.mean())) < Z / math.sqrt(n)
    assert abs(float((e**2).mean()) - 1) < Z * math.sqrt((KURTOSIS["bytes"] - 1) / n)
    assert abs(correlation(e[:, :-1], e[:, 1:])) < Z
    assert abs(correlation(e, noise_of("bytes")[0])) < Z


def test_independent_noise_leaves_the_first_copy() -> None:
    x = torch.zeros(ROWS, COLUMNS)
    got = materialise(x, [None, tiled(COLUMNS, 2 * COLUMNS)], noise=Noise("independent", 0.5))
    assert (got[:, :COLUMNS] == 0).all()
    assert abs(float(got[:, COLUMNS:].std()) - 0.5) < 0.5 * Z / math.sqrt(2 * ROWS * COLUMNS)
