"""The native CPU backend: equal to the torch backend to the bit, built once, replaced by it where it cannot be."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from kernel_oracle import DTYPES, interleaved, padded, same_bits, shares, tiled

from fxgrow.kernels import FILL_MEAN, DimMap, Noise, backends, dispatch, materialise, materialise_many, native

missing = native.available()
needs_compiler = pytest.mark.skipif(missing is not None, reason=str(missing))
pytestmark = pytest.mark.filterwarnings("ignore::fxgrow.kernels.NoiseTooSmall")


LAYOUTS = {
    "rows": (lambda n, k, r, i: ([n * i // r, 0], [n * (i + 1) // r - n * i // r, k])),
    "columns": (lambda n, k, r, i: ([0, k * i // r], [n, k * (i + 1) // r - k * i // r])),
    "uneven": (lambda n, k, r, i: ([min(n, i * (n // r + 1)), 0], [max(0, min(n - i * (n // r + 1), n // r + 1)), k])),
    "replicated": (lambda n, k, r, i: ([0, 0], [n, k])),
}


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_shards_of_the_grown_are_grown_shards(layout: str, dtype: torch.dtype) -> None:
    x = torch.randn(48, 640, generator=torch.Generator().manual_seed(1)).to(dtype)
    dims = [tiled(48, 100), tiled(640, 1500, split=True)]
    noise = Noise("antisymmetric", 0.05, seed=2)
    whole = materialise(x, dims, noise=noise, backend="cpu")
    n, k = whole.shape
    for ranks in (1, 2, 3, 8):
        for rank in range(ranks):
            offset, size = LAYOUTS[layout](n, k, ranks, rank)
            shard = materialise(x, dims, noise=noise, backend="cpu", offset=offset, local_shape=size)
            assert same_bits(shard, whole[offset[0] : offset[0] + size[0], offset[1] : offset[1] + size[1]])


@needs_compiler
def test_convolutions_and_large_tensors_on_two_threads() -> None:
    """Sizes that stream, split rows among threads and fold the kernel of a convolution into the columns."""
    x = torch.randn(64, 96, 3, 3, generator=torch.Generator().manual_seed(3))
    born = torch.cat([torch.arange(96), torch.arange(96), torch.tensor([-1, -1])])
    dims = [padded(64, 80, FILL_MEAN), DimMap(born, split=shares(born)), None, None]
    noise = Noise("antisymmetric", 0.02, newborn_scale=0.1)
    wide = torch.randn(4, 100_000, generator=torch.Generator().manual_seed(4))
    random_map = torch.randint(100_000, (130_000,), generator=torch.Generator().manual_seed(5))
    random_map[:100_000] = torch.randperm(100_000, generator=torch.Generator().manual_seed(6))
    calls = [
        (x, dims),
        (wide, [None, DimMap(random_map, split=shares(random_map))]),
        (wide.T, [tiled(100_000, 100_007), None]),
    ]
    torch.set_num_threads(2)
    try:
        for source, maps in calls:
            want = materialise(source, maps, noise=noise, backend="torch")
            assert same_bits(materialise(source, maps, noise=noise, backend="cpu"), want)
    finally:
        torch.set_num_threads(1)


@needs_compiler
def test_dear_huge_pages_are_left_alone_for_longer_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    pages, fresh = native.HugePages(), 8 << 20  # 32 MiB of float32
    monkeypatch.setattr(native, "DEAR", (0.0, 1e9))
    assert not pages.take(torch.empty(fresh))
    assert pages.left == native.PATIENCE[0], "the next destinations do not ask"
    assert not pages.take(torch.empty(fresh))
    assert pages.left == native.PATIENCE[0] - 4 * fresh
    for k in (1, 2, 3, 4, 5):
        pages.left = 0
        assert not pages.take(torch.empty(fresh))
        assert pages.left == min(native.PATIENCE[0] << k, native.PATIENCE[1])
    out = torch.full((fresh,), 7.0)
    pages.take(out)
    assert (out == 7).all(), "what is there is kept"
    assert not pages.take(torch.empty(1000)), "not worth a call"


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8, torch.bool, torch.complex128])
def test_other_types_are_gathered(dtype: torch.dtype) -> None:
    x = torch.arange(30).reshape(5, 6).to(dtype)
    dims = [tiled(5, 13), interleaved(6, 3)]
    assert torch.equal(materialise(x, dims, backend="cpu"), materialise(x, dims, backend="torch"))


@needs_compiler
def test_many_equal_one_by_one() -> None:
    x = torch.randn(8, 12, generator=torch.Generator().manual_seed(0))
    noise = Noise("antisymmetric", 0.1)
    calls = [
        {"source": x, "dims": [tiled(8, 8 + k), tiled(12, 24, split=True)], "noise": noise, "key": k, "dtype": dtype}
        for k in range(20)
        for dtype in DTYPES
    ]
    out = torch.empty(8, 24)
    calls.append({"source": x, "dims": [None, tiled(12, 24)], "out": out})
    got = materialise_many(calls)
    for call, result in zip(calls, got, strict=True):
        assert same_bits(result, materialise(**{**call, "out": None}))
    assert got[-1].data_ptr() == out.data_ptr()
    with pytest.raises(ValueError, match="one backend"):
        materialise_many([{"source": x, "dims": [None, None], "backend": "cpu"}])


def test_environment_variable_forces_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    monkeypatch.setattr(dispatch.reference, "run", lambda job, out: used.append(job))
    monkeypatch.setenv("FXGROW_KERNELS", "torch")
    materialise(torch.ones(3), [None])
    assert len(used) == 1
    monkeypatch.setenv("FXGROW_KERNELS", "abacus")
    with pytest.raises(ValueError, match=r"FXGROW_KERNELS 'abacus': choose one of torch, cpu, triton"):
        materialise(torch.ones(3), [None])
    with pytest.raises(ValueError, match="backend 'gpu'"):
        materialise(torch.ones(3), [None], backend="gpu")


def test_backends_say_why_not() -> None:
    listed = {b.name: b for b in backends()}
    assert list(listed) == ["torch", "cpu", "triton"]
    assert listed["torch"].available
    for backend in listed.values():
        assert backend.available or len(backend.reason) > 10, backend
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="triton backend is not available: "):
            materialise(torch.ones(2), [tiled(2, 4)], backend="triton")


def _run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, timeout=120
    )


def test_without_a_compiler_it_falls_back_with_one_warning(tmp_path: Path) -> None:
    code = (
        "import torch, warnings\n"
        "from fxgrow.kernels import DimMap, materialise, backends, native\n"
        "asked = []\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        "    find = native.builder.compiler\n"
        "    native.builder.compiler = lambda: asked.append(1) or find()\n"
        "    for _ in range(3):\n"
        "        y = materialise(torch.arange(3.0), [DimMap(torch.tensor([0, 1, 2, 0]))])\n"
        "assert y.tolist() == [0, 1, 2, 0]\n"
        "print(len(seen), seen[0].message)\n"
        "print([str(b) for b in backends()][1])\n"
        "assert asked == [1], 'a compiler that is not there is looked for once'\n"
    )
    done = _run(code, CXX="no-such-compiler", FXGROW_CACHE=str(tmp_path))
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith("1 growing with plain torch")
    assert "no-such-compiler" in first
    assert second.startswith("cpu: not available, no C++ compiler")


@pytest.mark.parametrize(
    ("environment", "used"),
    [
        ({}, "cpu" if missing is None else "torch"),
        ({"FXGROW_KERNELS": "torch"}, "torch"),
        ({"FXGROW_KERNELS": "cpu"}, "cpu"),
        ({"CXX": "no-such-compiler"}, "torch"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU two backends are in use")
def test_env_lists_the_backends_and_which_is_used(environment: dict[str, str], used: str, tmp_path: Path) -> None:
    if "CXX" in environment:
        environment = {**environment, "FXGROW_CACHE": str(tmp_path)}
    done = _run("from fxgrow.cli import app; app(['env'])", **environment)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("kernels: ")]
    assert [line.split()[1] for line in lines] == ["torch", "cpu", "triton"]
    marked = [line.split()[1] for line in lines if "(used" in line]
    assert marked == ([used] if used == "torch" or missing is None else [])


@needs_compiler
def test_no_warning_and_no_temporaries() -> None:
    """Peak memory above the source is the destination: measured over a tensor of 64 MiB."""
    code = (
        "import torch, warnings, resource\n"
        "from fxgrow.kernels import DimMap, Noise, materialise\n"
        "warnings.simplefilter('error')\n"
        "torch.set_num_threads(2)\n"
        "i = torch.arange(2048) % 1024; s = torch.full((2048,), 0.5, dtype=torch.float64)\n"
        "dims = [DimMap(torch.arange(8192) % 4096), DimMap(i, split=s)]\n"
        "x = torch.ones(4096, 1024)\n"
        "materialise(x[:8], [None, DimMap(i, split=s)], noise=Noise('antisymmetric', .1))\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "before = peak()\n"
        "y = materialise(x, dims, noise=Noise('antisymmetric', .1))\n"
        "print((peak() - before) / (y.numel() * 4))\n"
    )
    done = _run(code)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1.05


def test_warnings_are_not_errors_of_ours() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        materialise(torch.ones(4, 4), [None, tiled(4, 8, split=True)], noise=Noise("antisymmetric", 0.1))


@needs_compiler
@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.float8_e4m3fn])
def test_copies_that_are_only_converted_to_floats(kind: torch.dtype) -> None:
    x = torch.tensor([[0, 1], [1, 1], [1, 0]]).to(kind)
    index = torch.tensor([0, 1, 2, 0])
    got = materialise(x, [DimMap(index), None], backend="cpu", dtype=torch.float64)
    assert torch.equal(got, x.double()[index])
