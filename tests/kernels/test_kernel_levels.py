"""Every level of the native backend that this processor has (AVX-512, AVX2, neither): equal to torch to the bit."""

from __future__ import annotations

import functools
import itertools
import os

import pytest
import torch
from kernel_oracle import DTYPES, interleaved, random_case, same_bits, tiled

from fxgrow.kernels import Noise, builder, dispatch, materialise, native

missing = native.available()
pytestmark = [
    pytest.mark.skipif(missing is not None, reason=str(missing)),
    pytest.mark.filterwarnings("ignore::fxgrow.kernels.NoiseTooSmall"),
]
LEVELS = builder.supported()


@functools.cache
def library(level: str) -> object:
    found = [path for path in builder.candidates(level) if path.exists()]
    if not found:
        found = [builder.writable(level)]
        builder.build(level, found[0])
    return native._open(found[0])


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch):
    """Take a level's library from here on; no call may be handed to the torch backend meanwhile."""
    torch_run = dispatch.reference.run

    def choose(level: str | None) -> None:
        if level is None:
            monkeypatch.setattr(dispatch.reference, "run", torch_run)
        else:
            monkeypatch.setattr(native, "library", lambda: library(level))
            monkeypatch.setattr(dispatch.reference, "run", lambda *_: pytest.fail("fell back to torch"))

    return choose


def any_bits(shape: list[int], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Every kind of value: subnormals, infinities, NaNs."""
    ints = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    info = torch.iinfo(ints)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(info.min, info.max, shape, dtype=torch.int64, generator=generator).to(ints).view(dtype)


def test_random_cases_equal_to_the_bit(use) -> None:
    """300 calls over every map, dtype, noise, fill and shard, at every level."""
    for seed in range(300):
        x, dims, arguments = random_case(seed)
        if seed % 3 == 0:
            x = any_bits(list(x.shape), x.dtype, seed)
        use(None)
        want = materialise(x, dims, backend="torch", **arguments)
        for level in LEVELS:
            use(level)
            got = materialise(x, dims, backend="cpu", **arguments)
            assert same_bits(got, want), (level, seed, x.shape, x.dtype, arguments)


def raw(x: torch.Tensor) -> torch.Tensor:
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.dtype.itemsize])


def test_conversions_of_every_half_and_of_ties(use) -> None:
    """All float16 values, points half-way between them and their neighbours; all levels agree on NaNs too."""
    halves = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.float16).double()
    ordered = halves[halves.isfinite()].sort().values
    middle = ((ordered[1:] + ordered[:-1]) / 2)[::3].float()
    near = [
        middle,
        middle.nextafter(torch.tensor(2.0**20)),
        middle.nextafter(-middle),
        any_bits([999], torch.float32, 1),
    ]
    points = torch.cat([halves, *(part.double() for part in near)])
    copied, split = tiled(len(points), len(points) + 1), tiled(len(points), 2 * len(points), split=True)
    for source, target in itertools.product(DTYPES, DTYPES):
        x = points.to(source)
        first = None
        for level in LEVELS:
            use(level)
            assert same_bits(materialise(x, [copied], backend="cpu", dtype=target)[:-1], x.to(target)), level
            pairs = raw(materialise(x, [split], backend="cpu", dtype=target))
            first = pairs if first is None else first
            assert torch.equal(pairs, first), f"{level} and {LEVELS[0]}, {source} to {target}"
        if target == torch.float16:
            nans = x.isnan()
            signs = torch.where(x.signbit(), 0xFE00 - (1 << 16), 0x7E00).to(torch.int16)[nans]
            assert first is not None and torch.equal(first[: len(x)][nans], signs), "the one NaN of each sign"


@pytest.mark.parametrize("level", LEVELS)
def test_places_that_are_not_aligned_and_sizes_that_are_not_whole_vectors(level: str, use) -> None:
    noise = Noise("antisymmetric", 0.1, seed=1)
    memory = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    for dtype, shift, columns in itertools.product(DTYPES, (0, 1, 3), (1, 2, 7, 16, 33, 130)):
        x = memory.to(dtype)[shift : shift + 3 * columns].view(3, columns)
        for columns_map in (tiled(columns, 2 * columns, split=True), interleaved(columns, 2, split=True)):
            use(None)
            want = materialise(x, [tiled(3, 5), columns_map], noise=noise, backend="torch")
            use(level)
            room = torch.full((want.numel() + 4,), 7.0, dtype=dtype)
            out = room[shift : shift + want.numel()].view(want.shape)
            materialise(x, [tiled(3, 5), columns_map], noise=noise, backend="cpu", out=out)
            assert same_bits(out, want), (dtype, shift, columns)
            assert (room[:shift] == 7).all() and (room[shift + want.numel() :] == 7).all(), "nothing beside it"


def test_subnormal_values_are_kept_where_the_process_flushes_them() -> None:
    x = any_bits([64, 64], torch.float32, 3)
    x = torch.where(x.isfinite(), raw(x) & ~0x7F800000, 0).to(torch.int32).view(torch.float32)
    index = tiled(64, 128, split=True)
    want = materialise(x, [None, index], backend="cpu")
    assert torch.set_flush_denormal(True)
    try:
        got = materialise(x, [None, index], backend="cpu")
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(raw(got), raw(want))
    assert torch.equal(got[:, :64].double() + got[:, 64:].double(), x.double())


def test_draws_past_the_32nd_bit_of_the_counter(use) -> None:
    """A shard of rows whose entries have numbers on both sides of 2^34."""
    rows, columns = 1 << 20, 1 << 15
    x = torch.randn(1, columns, generator=torch.Generator().manual_seed(0)).expand(rows, columns)
    noise = Noise("antisymmetric", 0.1)
    place = {"offset": [(1 << 19) - 1, 0], "local_shape": [2, 2 * columns]}
    dims = [None, tiled(columns, 2 * columns, split=True)]
    want = materialise(x, dims, noise=noise, backend="torch", **place)
    for level in LEVELS:
        use(level)
        assert same_bits(materialise(x, dims, noise=noise, backend="cpu", **place), want)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_makes_tensors_on_two_threads() -> None:
    x = torch.randn(1024, 1024)
    dims = [None, tiled(1024, 2048, split=True)]
    torch.set_num_threads(2)
    try:
        want = materialise(x, dims, backend="cpu")
        child = os.fork()
        if child == 0:
            os._exit(0 if torch.equal(raw(materialise(x, dims, backend="cpu")), raw(want)) else 1)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        torch.set_num_threads(1)
