"""Tensors past 2^31 elements and coordinates past 2^32: no index and no counter wraps."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_oracle import DTYPES, same_bits, tiled

from fxgrow.kernels import DimMap, Noise, materialise, native, philox

pytestmark = pytest.mark.filterwarnings("ignore::fxgrow.kernels.NoiseTooSmall")
BACKENDS = [
    "torch",
    pytest.param("cpu", marks=pytest.mark.skipif(native.available() is not None, reason="no compiler")),
]
ROWS, WIDTH = 1 << 34, 16  # of a source that is one row, repeated with stride 0
FAR = (1 << 33) + 5


def words_at(linear: int, key: tuple[int, int]) -> int:
    """The Philox word of a split draw (root node) at one linear index, in Python's integers."""
    c, k = [linear >> 2 & 0xFFFFFFFF, linear >> 34, 1, philox.SPLIT], list(key)
    for _ in range(10):
        p, q = c[0] * philox.M0, c[2] * philox.M1
        c = [q >> 32 ^ c[1] ^ k[0], q & 0xFFFFFFFF, p >> 32 ^ c[3] ^ k[1], p & 0xFFFFFFFF]
        k = [(k[0] + philox.W0) & 0xFFFFFFFF, (k[1] + philox.W1) & 0xFFFFFFFF]
    return c[linear & 3]


@pytest.mark.parametrize("backend", BACKENDS)
def test_noise_counts_past_two_to_the_32(backend: str) -> None:
    """The noise of a shard 2^37 elements into a tensor is that of its own coordinates, not of any that wrapped."""
    x = torch.full((1, WIDTH), 1.0).expand(ROWS, WIDTH)
    dims = [None, tiled(WIDTH, 2 * WIDTH, split=True)]
    noise = Noise("antisymmetric", 1e-3, seed=3)
    at = {"offset": [FAR, 0], "local_shape": [2, 2 * WIDTH]}
    got = materialise(x, dims, noise=noise, backend=backend, **at)
    key = philox.key_words(3, 0)
    for row in range(2):
        for column in range(WIDTH):
            word = words_at((FAR + row) * WIDTH + column, key)
            e = (sum(word.to_bytes(4, "little")) - 510) * 1e-3 * philox.UNIT["bytes"]
            assert float(got[row, column]) == pytest.approx(0.5 + e, abs=1e-6)
            assert float(got[row, column]) + float(got[row, WIDTH + column]) == 1.0
    for wrapped in (FAR - (1 << 32), FAR - (1 << 28), 5):
        other = materialise(x, dims, noise=noise, backend=backend, offset=[wrapped, 0], local_shape=[2, 2 * WIDTH])
        assert not torch.equal(got, other)


CASES = f"""
import torch
from kernel_oracle import DTYPES, same_bits, tiled
from fxgrow.kernels import DimMap, Noise, materialise

def far(dtype, backend):
    x = torch.linspace(-1, 1, {WIDTH}).to(dtype)[None].expand({ROWS}, {WIDTH})
    uneven = torch.cat([torch.arange({WIDTH}), torch.arange(5)])
    born = torch.cat([torch.arange({WIDTH}), torch.tensor([-1])])
    maps = [
        (tiled({WIDTH}, 2 * {WIDTH}, True), Noise("antisymmetric", 0.1)),
        (tiled({WIDTH}, {WIDTH} + 5, True), Noise("antisymmetric", 0.1, distribution="normal")),
        (DimMap(uneven), Noise("independent", 0.1)),
        (DimMap(born, fill=torch.ones({WIDTH} + 1, dtype=torch.uint8)), None),
    ]
    for columns, noise in maps:
        yield materialise(
            x, [None, columns], noise=noise, backend=backend, offset=[{FAR}, 0], local_shape=[2, len(columns.index)]
        )
"""


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.skipif(native.available() is not None, reason="no compiler")
def test_far_shards_are_equal_on_the_cpu(dtype: torch.dtype) -> None:
    scope: dict = {}
    exec(CASES, scope)
    for got, want in zip(scope["far"](dtype, "cpu"), scope["far"](dtype, "torch"), strict=True):
        assert same_bits(got, want)


def test_far_shards_are_equal_in_the_triton_interpreter() -> None:
    pytest.importorskip("triton")
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})" + CASES
    code += (
        "for dtype in DTYPES:\n    for a, b in zip(far(dtype, 'triton'), far(dtype, 'torch')): assert same_bits(a, b)"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_more_than_two_to_the_31_elements(backend: str) -> None:
    """Rows around element 2^31 and at the end are what the same rows are when made alone: bfloat16 and noise from the
    CPU backend (4 GiB), bytes copied by the torch backend, which is slow."""
    rows, width = (1 << 16) + 16, 1 << 14
    index = torch.arange(2 * width) % width
    row = torch.randn(1, width, generator=torch.Generator().manual_seed(0)).bfloat16()
    dims, noise = [None, DimMap(index, split=torch.full((2 * width,), 0.5).double())], Noise("antisymmetric", 0.1)
    if backend == "torch":
        row, dims, noise = row.view(torch.uint8)[:, :width], [None, DimMap(index)], None
    x = row.expand(rows, width)
    whole = materialise(x, dims, noise=noise, backend=backend)
    assert whole.numel() > 1 << 31
    for lo in (0, (1 << 15) - 1, (1 << 16) - 2, rows - 2):
        alone = materialise(x, dims, noise=noise, backend="torch", offset=[lo, 0], local_shape=[2, 2 * width])
        assert same_bits(whole[lo : lo + 2], alone)
    copies = whole[1 << 16].double().view(2, width)
    assert torch.equal(copies.sum(0), row[0].double()) if noise else torch.equal(copies, row.double().expand(2, width))
