"""The Triton kernels without a GPU: equal bits in the interpreter, and what the machine code says."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fxgrow.kernels import aot

pytest.importorskip("triton")
HERE = Path(__file__).parent

INTERPRETED = """
import sys, warnings
sys.path.insert(0, {here!r})
warnings.simplefilter("ignore")
import torch
from kernel_oracle import DTYPES, interleaved, random_case, same_bits, tiled
from fxgrow.kernels import Noise, gpu, materialise, reference
torch.set_num_threads(1)
forms = {{"scatter": 0, "gather": 0}}
for name in forms:
    def counted(*a, name=name, run=getattr(gpu, "_" + name)):
        forms[name] += 1
        return run(*a)
    setattr(gpu, "_" + name, counted)

def check(x, dims, **arguments):
    want = materialise(x, dims, backend="torch", **arguments)
    assert same_bits(materialise(x, dims, backend="triton", **arguments), want), (x.shape, x.dtype, arguments)
"""

SCATTER = """
S = 16
columns = [tiled(S, 2 * S, True), tiled(S, 3 * S, True), tiled(S, 4 * S, True), interleaved(S, 2, True)]
columns += [tiled(S, 3 * S, True, True), tiled(S, 2 * S), interleaved(S, 2), tiled(S, S)]
for dtype in DTYPES:
    x = torch.randn(4, S, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[0, :4] = torch.tensor([0.0, -0.0, float("inf"), float("-inf")])
    x[1, :3] = torch.tensor([1e-40, -3e-45, 6e-8]).to(dtype)
    for k, column in enumerate(columns):
        row = [None, tiled(4, 8), interleaved(4, 2)][k % 3]
        noise = Noise("antisymmetric", 0.3, distribution=["bytes", "normal", "rademacher"][(k // 2) % 3])
        check(x, [row, column])
        check(x, [row, column], noise=noise)
        check(x, [row, column], noise=noise, offset=[2, 0], local_shape=[2, len(column.index)])
        check(x.float(), [row, column], noise=noise, dtype=dtype)
assert forms["scatter"] > 80, forms
print("ok", forms)
"""

GATHER = """
for seed in range({lo}, {hi}):
    x, dims, arguments = random_case(seed)
    want = materialise(x, dims, backend="torch", **arguments)
    # the interpreter pays by the row: few rows, of any length
    if want.dim() < 2 or want.numel() <= 12 * want.shape[-1]:
        assert same_bits(materialise(x, dims, backend="triton", **arguments), want), (seed, x.shape, x.dtype, arguments)
assert forms["gather"] > 20, forms
print("ok", forms)
"""


def interpret(code: str) -> str:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("ok"), done.stdout
    return done.stdout.strip()


def test_scatter_form_equals_the_reference() -> None:
    """Every dtype, multiplicity, order of copies, shares, noise and row shard; infinities, subnormals, signed zeros."""
    interpret(INTERPRETED.format(here=str(HERE)) + SCATTER)


def test_general_form_equals_the_reference() -> None:
    """Random maps, fills, scales, noise and shards."""
    interpret(INTERPRETED.format(here=str(HERE)) + GATHER.format(lo=0, hi=150))


TUNED = """
import os
from pathlib import Path
timed = []
def clock(call):
    call()
    timed.append(gpu._tuned[here, "plain float32 noise"])
    return abs(timed[-1][0] - 1024) + timed[-1][1]
here = gpu._device_name(torch.device("cpu"))
gpu._milliseconds, gpu.tune.__defaults__ = clock, (torch.bfloat16, True, False, 16, "cuda")

def calls():
    x, dims, noise = torch.randn(4, 16), [None, tiled(16, 32, True)], Noise("antisymmetric", 0.1)
    timed.clear()
    check(x, dims, noise=noise)
    check(x, dims, noise=noise)
    return len(timed), gpu.tile_of("plain float32 noise", torch.device("cpu"))

untuned = calls()
os.environ["FXGROW_TUNE"] = "1"
tuned = calls()
Path(os.environ["FXGROW_CACHE"], "tiles.json").write_text("[1, 2")
gpu._tuned.clear()
print("ok", untuned[0], *tuned, *calls())
"""
KEPT = """
os.environ["FXGROW_TUNE"] = "1"
print("ok", *calls())
"""


def test_tiles_are_timed_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With FXGROW_TUNE the first call of a kind times every tile, the next process reads the best; a broken file counts
    as none; without the variable nothing is timed."""
    code = INTERPRETED.format(here=str(HERE)) + TUNED
    monkeypatch.setenv("FXGROW_CACHE", str(tmp_path))
    assert interpret(code) == "ok 0 6 (1024, 2) 6 (1024, 2)"
    assert interpret(code.partition("untuned = ")[0] + KEPT) == "ok 0 (1024, 2)"


@pytest.fixture(scope="module", params=list(aot.TARGETS))
def machine_code(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """Every variant, compiled for one target."""
    if request.param.startswith("sm_") and not all(aot.tools().values()):
        pytest.skip("cuobjdump and nvdisasm are neither in Triton's wheel nor on PATH: NVIDIA code cannot be read")
    rows = aot.table([request.param])
    assert len(rows) == len(aot.VARIANTS)
    return rows


def pick(rows: list[dict[str, Any]], *kernels: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["kernel"] in kernels]


@pytest.mark.slow
def test_machine_code(machine_code: list[dict[str, Any]]) -> None:
    """No spills and no shared memory anywhere; the scatter form loads and stores 128 bits; instructions per output."""
    nvidia = machine_code[0]["target"].startswith("sm_")
    for row in machine_code:
        assert row["spills"] == row["shared_bytes"] == 0, row
        assert 0 < row["registers"] <= 168, row
    for row in pick(machine_code, "copy", "pair", "triple", "quad", "woven"):
        assert row["widest_load_bits"] == row["widest_store_bits"] == 128, row
    if not nvidia:
        return
    for row in pick(machine_code, "copy"):
        assert row["instructions_per_output"] <= 4, row
    for row in pick(machine_code, "pair", "triple", "quad", "woven"):
        if row["kernel"] in ("triple", "quad") and row["dtype"] == "float64":
            # a cut is 10 instructions of Philox and 16 of two registers each; two cuts for three outputs make 18,
            # three for four 20, before the first load, store or address
            assert row["instructions_per_output"] <= 27, row
        else:
            assert row["instructions_per_output"] <= 21, row
