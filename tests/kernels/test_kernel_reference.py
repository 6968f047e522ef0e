"""The torch backend against an element-by-element oracle, and the promises the other backends inherit."""

import math
import warnings
from fractions import Fraction

import pytest
import torch
from kernel_oracle import DTYPES, exact_sums, expected, interleaved, padded, same_bits, shares, tiled

from fxgrow.kernels import (
    FILL_CONSTANT,
    FILL_MEAN,
    FILL_RANDOM,
    FILL_ZERO,
    DimMap,
    Noise,
    NoiseTooSmall,
    materialise,
    philox,
)


def source(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter: tuple[int, ...], key: tuple[int, int], words: tuple[int, ...]) -> None:
    """The vectors of Random123 (Salmon et al. 2011)."""
    c0, c1, c2 = (torch.tensor([c]) for c in counter[:3])
    assert tuple(int(w) for w in philox.philox(c0, c1, c2, counter[3], key)) == words


CASES = {
    "identity": [None, None],
    "rows tiled": [tiled(5, 12), None],
    "columns split": [None, tiled(6, 15, split=True)],
    "both": [tiled(5, 10), interleaved(6, 3, split=True)],
    "uneven shares": [None, tiled(6, 18, split=True, uneven=True)],
    "zero": [padded(5, 7, FILL_ZERO), tiled(6, 9, split=True)],
    "mean": [padded(5, 8, FILL_MEAN), None],
    "mean and split": [padded(5, 8, FILL_MEAN), tiled(6, 12, split=True)],
    "mean both": [padded(5, 8, FILL_MEAN), padded(6, 8, FILL_MEAN)],
    "constant wins over mean": [padded(5, 8, FILL_MEAN), padded(6, 8, FILL_CONSTANT)],
    "zero wins over constant": [padded(5, 8, FILL_ZERO), padded(6, 8, FILL_CONSTANT)],
    "scaled": [tiled(5, 10, scale=torch.linspace(0.5, 2, 10).double()), tiled(6, 6, scale=torch.arange(6).double())],
    "random": [padded(5, 8, FILL_RANDOM), padded(6, 8, FILL_ZERO)],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_values(case: str, dtype: torch.dtype) -> None:
    x, dims = source(5, 6), CASES[case]
    got = materialise(x, dims, dtype=dtype, scale=0.75, constant=3.0)
    want, random = expected(x, dims, 0.75, 3.0)
    eps = torch.finfo(dtype).eps
    assert got.dtype == dtype
    # a share is a difference of rounded values: the error is relative to the whole, not to the share
    tolerance = 3 * eps * float(want.abs().max())
    assert ((got.double() - want).abs() <= tolerance)[~random].all()
    if random.any():
        assert 0 < got[random].double().std() < 0.06


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool])
def test_integers_are_gathered(dtype: torch.dtype) -> None:
    x = (torch.arange(12).reshape(3, 4) % 2 if dtype == torch.bool else torch.arange(12).reshape(3, 4)).to(dtype)
    got = materialise(x, [tiled(3, 5), padded(4, 6, FILL_CONSTANT)], constant=1)
    assert got.dtype == dtype
    assert torch.equal(got[:, :4], x[[0, 1, 2, 0, 1]])
    assert (got[:, 4:] == 1).all()
    with pytest.raises(ValueError, match="split needs"):
        materialise(x, [tiled(3, 6, split=True), None])


EDGES = [0.0, -0.0, 1.0, -3.0, 1 / 3]


def edge_values(dtype: torch.dtype) -> torch.Tensor:
    info = torch.finfo(dtype)
    tiny = info.smallest_normal * info.eps
    values = [0.0, -0.0, tiny, -tiny, 3 * tiny, 5 * tiny, -7 * tiny, info.smallest_normal, -info.smallest_normal]
    values += [2 * info.smallest_normal - tiny, info.max, -info.max, info.max * (1 - info.eps), 1.0, -1 - info.eps]
    return torch.tensor(values, dtype=torch.float64).to(dtype)


NOISES = {
    "none": None,
    "small": Noise("antisymmetric", 1e-3, seed=3),
    "large": Noise("antisymmetric", 2.0, seed=4),
    "huge": Noise("antisymmetric", 1e30, seed=4, distribution="normal"),
}


@pytest.mark.filterwarnings("ignore::fxgrow.kernels.NoiseTooSmall")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("uneven", [False, True])
def test_copies_sum_exactly(dtype: torch.dtype, noise: str, uneven: bool) -> None:
    """Multiplicities 1 to 8 in one tensor, edge values included, in rational arithmetic."""
    x = torch.cat([edge_values(dtype), source(40).to(dtype)])
    x = torch.stack([x, x.flip(0)])
    index = torch.cat([torch.arange(x.shape[1])[k:] for k in range(0, 48, 6)])
    dims = [None, DimMap(index, split=shares(index, uneven))]
    got = materialise(x, dims, noise=NOISES[noise])
    sums = exact_sums(got, index, 1, x.shape[1])
    assert sums == [Fraction(v) for v in x.T.flatten().tolist()]
    # no copy has the opposite sign: cutting never overshoots
    gathered = x[:, index]
    assert (got.signbit() == gathered.signbit())[got != 0].all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("copies", [2, 3])
def test_many_copies_sum_exactly(dtype: torch.dtype, copies: int) -> None:
    """Random bit patterns, every exponent: sums of the copies in exact two-term arithmetic."""
    count = 1 << 16
    width = dtype.itemsize * 8
    bits = torch.randint(
        -(1 << (width - 1)), (1 << (width - 1)) - 1, (count,), generator=torch.Generator().manual_seed(1)
    )
    x = bits.to({16: torch.int16, 32: torch.int32, 64: torch.int64}[width]).view(dtype)
    x = torch.where(x.isfinite(), x, torch.ones_like(x))[None]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoiseTooSmall)
        got = materialise(x, [None, tiled(count, copies * count, split=True)], noise=Noise("antisymmetric", 0.5))
    parts = got.reshape(copies, count).double()
    # fold the tree as it was cut: every partial sum is a value of the dtype, so each addition is exact when it closes
    left = parts[0] + parts[1] if copies > 1 else parts[0]
    if dtype == torch.float64:
        assert torch.equal(left - parts[1], parts[0])  # two-sum: no rounding error
        assert torch.equal(left - parts[0], parts[1])
    total = left + parts[2] if copies == 3 else left
    assert torch.equal(total, x[0].double())


def test_infinite_and_nan_are_copied() -> None:
    x = torch.tensor([[math.inf, -math.inf, math.nan]])
    got = materialise(x, [None, tiled(3, 6, split=True)], noise=Noise("antisymmetric", 1.0))
    assert same_bits(got, torch.cat([x, x], 1))


@pytest.mark.parametrize("distribution", ["bytes", "normal", "rademacher"])
@pytest.mark.parametrize("kind", ["antisymmetric", "independent"])
@pytest.mark.parametrize("columns", [12, 15])
def test_shards_equal_slices(kind: str, distribution: str, columns: int) -> None:
    """Every layout over 1, 2, 3 and 8 ranks; 15 columns straddle the quads of the generator."""
    x = source(6, columns)
    noise = Noise(kind, 0.1, newborn_scale=0.3, distribution=distribution, seed=9)  # type: ignore[arg-type]
    births = torch.tensor([-1, -1, -2, -2, -2, -3])
    index = torch.cat([torch.arange(columns) for _ in range(2)] + [births])
    split = torch.cat([torch.full((2 * columns,), 0.5), torch.ones(6)]).double()
    rows = DimMap(torch.tensor([0, 1, 2, 3, 4, 5, 0, 2, -1, -2, -1]), fill=torch.tensor([0] * 8 + [1, 2, 1]).byte())
    dims = [rows, DimMap(index, split=split)]
    whole = materialise(x, dims, noise=noise, key=5)
    n, k = whole.shape
    for ranks in (1, 2, 3, 8):
        for rank in range(ranks):
            a, b = n * rank // ranks, n * (rank + 1) // ranks
            shard = materialise(x, dims, noise=noise, key=5, offset=[a, 0], local_shape=[b - a, k])
            assert same_bits(shard, whole[a:b])
            a, b = k * rank // ranks, k * (rank + 1) // ranks
            shard = materialise(x, dims, noise=noise, key=5, offset=[0, a], local_shape=[n, b - a])
            assert same_bits(shard, whole[:, a:b])
    assert not same_bits(materialise(x, dims, noise=noise, key=6), whole)


def test_newborn_pairs_cancel() -> None:
    index = torch.tensor([0, 1, 2, -1, -1, -2, -2, -2, -3])
    split = torch.ones(9, dtype=torch.float64)
    noise = Noise("antisymmetric", 0.0, newborn_scale=0.5)
    got = materialise(source(64, 3), [None, DimMap(index, split=split)], noise=noise, dtype=torch.bfloat16)
    assert torch.equal(got[:, 3], -got[:, 4])
    assert torch.equal(got[:, 5], -got[:, 6])
    assert (got[:, 7:] == 0).all()
    assert 0.3 < got[:, 3].float().std() < 0.7
    assert not torch.equal(got[:, 3], got[:, 5])


def test_newborn_copies_are_equal_and_independent_of_shape() -> None:
    dims = [DimMap(torch.tensor([0, -1, 1, -2, -1]), fill=torch.ones(5, dtype=torch.uint8)), None]
    got = materialise(source(2, 64), dims, random_std=0.5)
    assert torch.equal(got[1], got[4])
    assert not torch.equal(got[1], got[3])
    assert 0.35 < got[1].std() < 0.65
    again = materialise(source(2, 64), [DimMap(torch.tensor([-1]), fill=torch.ones(1).byte()), None], random_std=0.5)
    assert torch.equal(again[0], got[1])
    other = materialise(source(2, 64), dims, random_std=0.5, random_seed=1)
    assert not torch.equal(other[1], got[1])


def test_mean_of_random_columns() -> None:
    """A mean row is the mean of the old rows at randomly filled columns too (LEMON's padded stream stays exact)."""
    y = materialise(source(7, 5), [padded(7, 9, FILL_MEAN), padded(5, 11, FILL_RANDOM)], dtype=torch.float64)
    assert torch.allclose(y[:7].mean(0), y[7], rtol=1e-12, atol=1e-15)
    assert torch.equal(y[7], y[8])


def test_four_dims_and_more() -> None:
    x = source(3, 4, 3, 2)
    dims = [tiled(3, 7), tiled(4, 8, split=True), None, None]
    got = materialise(x, dims, noise=Noise("antisymmetric", 0.01))
    want, _ = expected(x, dims)
    assert (got.double() - want).abs().max() < 0.06
    assert torch.allclose(got[:, :4] + got[:, 4:], x[[0, 1, 2, 0, 1, 2, 0]], atol=0, rtol=0)
    six = materialise(x.reshape(3, 2, 2, 3, 2, 1), [None, None, tiled(2, 6), None, None, None])
    assert torch.equal(six, x.reshape(3, 2, 2, 3, 2, 1).repeat(1, 1, 3, 1, 1, 1))


def test_zero_dim_empty_and_strided() -> None:
    assert materialise(torch.tensor(3.0), [], scale=2.0).item() == 6.0
    assert materialise(None, [], shape=(), constant=4.0, fill=FILL_CONSTANT).item() == 4.0
    assert materialise(torch.empty(0, 3), [None, tiled(3, 5)]).shape == (0, 5)
    assert torch.equal(materialise(torch.empty(0, 3), [padded(0, 2, FILL_ZERO), None]), torch.zeros(2, 3))
    x = source(6, 4).T
    assert torch.equal(materialise(x, [tiled(4, 8), None]), torch.cat([x, x]))
    out = torch.empty(6, 8).T
    assert materialise(x, [tiled(4, 8), None], out=out) is not None
    assert torch.equal(out, torch.cat([x, x]))
    copy = materialise(x, [None, None], dtype=torch.bfloat16)
    assert torch.equal(copy, x.bfloat16())
    leaf = torch.nn.Parameter(source(3))
    assert not materialise(leaf, [tiled(3, 4)]).requires_grad


def test_relative_noise_follows_the_deviation() -> None:
    x = source(64, 64) * 7
    dims = [None, tiled(64, 128, split=True)]
    a = materialise(x, dims, noise=Noise("antisymmetric", 0.01, relative=True))
    e = (a[:, :64] - a[:, 64:]) / 2
    assert 0.06 < e.std() < 0.075


def test_warns_when_noise_cannot_part_the_copies() -> None:
    x, dims = source(64, 64), [None, tiled(64, 128, split=True)]
    with pytest.warns(NoiseTooSmall, match=r"\d+% of the copies"):
        got = materialise(x, dims, dtype=torch.bfloat16, noise=Noise("antisymmetric", 1e-3))
    assert 0.4 < (got[:, :64] == got[:, 64:]).double().mean() < 0.8
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        materialise(x, dims, dtype=torch.bfloat16, noise=Noise("antisymmetric", 1e-1))
        materialise(x, dims, dtype=torch.float32, noise=Noise("antisymmetric", 1e-3))


@pytest.mark.parametrize(
    ("dims", "arguments", "message"),
    [
        ([None], {}, "1 dim maps"),
        ([DimMap(torch.tensor([3])), None], {}, "outside the source"),
        ([None, DimMap(torch.tensor([0, 0]), split=torch.tensor([0.5, 0.6]))], {}, "sum to 1"),
        ([None, DimMap(torch.tensor([0, 0]), split=torch.tensor([1.5, -0.5]))], {}, "sum to 1"),
        ([None, DimMap(torch.tensor([0, 1]), split=torch.tensor([0.5, 1.0]))], {}, "only copy"),
        ([tiled(3, 6, split=True), tiled(2, 4, split=True)], {}, "at most one dim"),
        ([None, None], {"offset": [0, 1]}, None),
        ([None, None], {"offset": [0, 1], "local_shape": [3, 2]}, "leaves the tensor"),
        ([None, None], {"shape": [4, 2]}, "shape= says"),
        ([DimMap(torch.tensor([-1, -1]), fill=torch.tensor([0, 1]).byte()), None], {}, "same fill code"),
        ([DimMap(torch.tensor([-1]), fill=torch.tensor([9]).byte()), None], {}, "fill code 9"),
        ([DimMap(torch.tensor([[0]])), None], {}, "one-dimensional"),
        ([DimMap(torch.tensor([0.5])), None], {}, "must be integers"),
        ([tiled(3, 3, scale=torch.ones(2).double()), None], {}, "length 3"),
        ([None, None], {"out": torch.empty(3, 3)}, "out is"),
    ],
)
def test_errors_name_what_is_wrong(dims: list, arguments: dict, message: str | None) -> None:
    if message is None:
        assert materialise(source(3, 2), dims, **arguments).shape == (3, 1)
        return
    with pytest.raises(ValueError, match=message):
        materialise(source(3, 2), dims, **arguments)


def test_fill_without_a_source() -> None:
    born = DimMap(torch.tensor([-1, -2]), fill=torch.tensor([FILL_CONSTANT, FILL_ZERO]).byte())
    got = materialise(None, [born, None], shape=(2, 3), constant=2.5, dtype=torch.float16)
    assert got.tolist() == [[2.5] * 3, [0.0] * 3]
    draws = materialise(None, [None, None], shape=(300, 300), fill=FILL_RANDOM, random_std=0.1)
    assert abs(float(draws.std()) - 0.1) < 0.001
    with pytest.raises(ValueError, match="mean needs a source"):
        materialise(None, [None], shape=(2,), fill=FILL_MEAN)
