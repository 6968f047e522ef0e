"""Where the native library comes from: built in the background, found, kept elsewhere, or not to be had."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fxgrow.kernels import builder, native

missing = native.available()
needs_compiler = pytest.mark.skipif(missing is not None, reason=str(missing))
#: writes half a library, waits for a file called "go" where there is one to wait for, and writes the rest
SLOW = """#!/bin/sh
while [ "$1" != -o ]; do shift; done
echo >> "{folder}/asked"; printf half > "$2"
while [ ! -e "{folder}/go" ]; do sleep 0.05; done
{then}
"""
MAKE = """
import torch, time, warnings
from fxgrow.kernels import DimMap, backends, dispatch, materialise, native
index = DimMap(torch.tensor([0, 1, 2, 0]))
def make(): return materialise(torch.arange(3.0), [index]).tolist()
"""


def run(code: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def output(process: subprocess.Popen[str]) -> list[str]:
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return out.splitlines()


def compiler(folder: Path, then: str) -> str:
    fake = folder / "compiler"
    fake.write_text(SLOW.format(folder=folder, then=then))
    fake.chmod(0o755)
    return str(fake)


@needs_compiler
def test_the_first_call_does_not_wait(tmp_path: Path) -> None:
    """While the library is built torch does the work; then the library is used, without a word about it."""
    (built,) = [path for path in builder.candidates(builder.level()) if path.exists()][:1]
    code = MAKE + (
        "warnings.simplefilter('error')\n"
        "from pathlib import Path\n"
        "runs = []\n"
        "reference = dispatch.reference.run\n"
        "dispatch.reference.run = lambda job, out: (runs.append(1), reference(job, out))\n"
        "native.get_ready()\n"
        "assert make() == [0, 1, 2, 0] and runs == [1] and not native.is_there()\n"
        f"Path({str(tmp_path / 'go')!r}).touch()\n"
        "while not native.is_there(): time.sleep(0.01)\n"
        "assert make() == [0, 1, 2, 0] and runs == [1]\n"
    )
    output(run(code, CXX=compiler(tmp_path, f'cp "{built}" "$2"'), FXGROW_CACHE=str(tmp_path / "cache")))


@needs_compiler
def test_two_processes_build_once_and_a_call_that_must_have_it_waits(tmp_path: Path) -> None:
    (built,) = [path for path in builder.candidates(builder.level()) if path.exists()][:1]
    cache = tmp_path / "cache"
    environment = {"CXX": compiler(tmp_path, f'cp "{built}" "$2"'), "FXGROW_CACHE": str(cache)}
    both = [run(MAKE + "native.get_ready(); print(backends()[1])", **environment) for _ in "ab"]
    while not (tmp_path / "asked").exists():
        pass
    (tmp_path / "go").touch()
    for process in both:
        assert output(process) == ["cpu: CPU (used)"]
    assert (tmp_path / "asked").read_text() == "\n", "one asks the compiler, the other waits"
    (library,) = cache.iterdir()
    assert library.read_bytes() == built.read_bytes()


@pytest.mark.parametrize(("then", "says"), [("exit 1", "compiler"), ('printf whole > "$2"', "kept or loaded")])
def test_a_build_that_fails_is_reported_once_and_leaves_nothing(then: str, says: str, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    (tmp_path / "go").touch()
    code = MAKE + (
        "native.get_ready()\n"
        "while native._library.found() is None: time.sleep(0.01)\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        "    assert make() == make() == [0, 1, 2, 0]\n"
        "print(len(seen), seen[0].message)\n"
        "try: materialise(torch.arange(3.0), [index], backend='cpu')\n"
        "except RuntimeError as error: print(error)\n"
    )
    first, second, *_ = output(run(code, CXX=compiler(tmp_path, then), FXGROW_CACHE=str(cache)))
    assert first.startswith("1 growing with plain torch, which is slower: ") and says in first
    assert second.startswith("the cpu backend is not available: ") and says in second
    assert not list(cache.glob("*.tmp"))
    assert (tmp_path / "asked").read_text() == "\n"


@needs_compiler
def test_a_cache_that_cannot_be_written_to(tmp_path: Path) -> None:
    """The library goes to a folder for temporary files that is the user's own, and is found there again."""
    (built,) = [path for path in builder.candidates(builder.level()) if path.exists()][:1]
    (tmp_path / "go").touch()
    (tmp_path / "file").touch()
    environment = {"FXGROW_CACHE": str(tmp_path / "file" / "cache"), "TMPDIR": str(tmp_path)}
    environment["CXX"] = compiler(tmp_path, f'cp "{built}" "$2"')
    for _ in "ab":
        assert output(run(MAKE + "print(backends()[1])", **environment)) == ["cpu: CPU (used)"]
    assert (tmp_path / "asked").read_text() == "\n"
    own = tmp_path / f"fxgrow-{os.getuid()}"
    own.chmod(0o777)  # others could have put a library there
    (line,) = output(run(MAKE + "print(backends()[1])", **environment))
    assert line.startswith("cpu: not available, the built library cannot be kept: ")


@needs_compiler
def test_a_level_that_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXGROW_ISA", "plain")
    assert builder.level() == "plain"
    monkeypatch.setenv("FXGROW_ISA", "mmx")
    with pytest.raises(native.NoCompiler, match=r"FXGROW_ISA says 'mmx': this processor has .*plain"):
        builder.level()


def test_importing_builds_nothing(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    code = "import fxgrow, fxgrow.kernels\nfrom fxgrow.kernels import native\nassert native._library._target is None"
    output(run(code, FXGROW_CACHE=str(cache)))
    assert not cache.exists()
