"""The tests on other versions of Python and torch: an environment for each pair, one after the other.

``python -m benchmarks versions --quick`` makes a virtual environment for each pair of versions, runs in it the part of
the tests that touches PyTorch most (all of them without ``--quick``), removes it, and writes what came out into
``docs/versions.json`` and a table into ``docs/versions.md``; pairs that were tried before stay, and ``--pairs
3.10:2.9.1`` chooses. A Python is looked for on the path and among pyenv's. uv installs where it is found, and pip
elsewhere, which takes minutes longer. One environment takes up to 7 GB while it lasts.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import common
from tests.project import settings

#: what touches PyTorch most, a few minutes of two cores: traces, generated code, op schemas and guards, the proof,
#: growths of living models, optimizers, kernels, files, compiled code, command line
QUICK = (
    "tests/trace/test_modes.py",
    "tests/emit",
    "tests/ir",
    "tests/proof",
    "tests/landing/test_apply.py",
    "tests/optim/test_optimizer.py",
    "tests/kernels/test_kernel_native.py",
    "tests/kernels/test_kernel_reference.py",
    "tests/weights/test_shards.py",
    "tests/test_formats.py",
    "tests/test_face.py",
    "tests/test_compile.py",
)
PAIRS = ("3.10:2.9.1", "3.11:2.10.0", "3.12:2.11.0", "3.13:2.12.1", "3.11:2.13.0", "3.13:2.14.1")
TOOLS = ("pytest", "pytest-xdist", "hypothesis", "expecttest", "setuptools", "wheel")
#: kept for this long before they are given up, in seconds
INSTALL, TESTS = 1800, 7200


def python_of(version: str) -> str | None:
    """An interpreter of a version such as ``3.12``; None where there is none."""
    pyenv = sorted(
        Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions").glob(f"{version}*/bin/python")
    )
    candidates = [*map(str, pyenv), shutil.which(f"python{version}")]
    for candidate in candidates:
        if candidate is None:
            continue
        shown = subprocess.run([candidate, "--version"], capture_output=True, text=True, check=False).stdout
        if shown.startswith(f"Python {version}."):
            return candidate
    return None


def requirements(torch: str) -> list[str]:
    """What an environment needs: fxgrow's own dependencies, one torch, and what runs the tests."""
    return [f"torch=={torch}", *(d for d in settings()["project"]["dependencies"] if not d.startswith("torch")), *TOOLS]


def attempt(pair: str, tests: list[str], folder: Path) -> dict[str, Any]:
    """Make an environment and run tests in it; the environment is removed."""
    version, _, torch = pair.partition(":")
    out: dict[str, Any] = {"python": version, "torch": torch, "tests": tests, "date": time.strftime("%Y-%m-%d")}
    interpreter = python_of(version)
    if interpreter is None:
        return {**out, "outcome": "not tried", "why": f"no Python {version} here"}
    home = folder / f"py{version}-torch{torch}"
    try:
        subprocess.run([interpreter, "-m", "venv", str(home)], check=True, capture_output=True)
        own = str(home / "bin" / "python")
        uv = shutil.which("uv")
        install = [uv, "pip", "install", "--python", own] if uv else [own, "-m", "pip", "install"]
        install += ["--quiet", "--no-cache-dir", *requirements(torch)]
        done = subprocess.run(install, capture_output=True, text=True, timeout=INSTALL, check=False)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or [done.stderr[-300:]]
            return {**out, "outcome": "not tried", "why": f"does not install: {errors[-1].strip()}"}
        return {**out, **_run(own, tests)}
    except subprocess.TimeoutExpired as error:
        return {**out, "outcome": "not tried", "why": f"took longer than {error.timeout:.0f} s"}
    finally:
        shutil.rmtree(home, ignore_errors=True)


def _run(own: str, tests: list[str]) -> dict[str, Any]:
    began = time.perf_counter()
    # no -q beside the one in pyproject.toml: two leave out the counts
    done = subprocess.run(
        [own, "-m", "pytest", "-n", str(os.cpu_count()), "-p", "no:cacheprovider", "-rfE", *tests],
        cwd=common.ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=TESTS,
        check=False,
    )
    lines = done.stdout.splitlines()
    counts = {
        word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|error)", lines[-1] if lines else "")
    }
    failed = [line.split()[1] for line in lines if line.startswith(("FAILED", "ERROR")) and len(line.split()) > 1]
    shown = subprocess.run([own, "-c", _ABOUT], capture_output=True, text=True, check=False).stdout.split()
    return {
        "outcome": "passes" if done.returncode == 0 else "fails" if counts else "breaks",
        "why": "" if counts else (done.stdout + done.stderr)[-400:],
        "counts": counts,
        "failed": failed,
        "seconds": round(time.perf_counter() - began),
        "installed": shown,
    }


_ABOUT = "import platform, torch, numpy; print(platform.python_version(), torch.__version__, numpy.__version__)"


def page(rows: list[dict[str, Any]]) -> str:
    """The table as a page."""
    lines = [
        "# Versions of Python and torch",
        "",
        "Made by `python -m benchmarks versions`: an environment for each pair, one after the other, with the newest",
        "other dependencies that it takes. CI runs the whole suite on the versions in `constraints.txt`.",
        "",
        "| Python | torch | outcome | passed | failed | skipped | what was run | on |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in sorted(rows, key=lambda r: ([int(x) for x in r["torch"].split(".")], int(r["python"].split(".")[1]))):
        counts = r.get("counts", {})
        numbers = [str(counts.get(k, 0)) if counts else "" for k in ("passed", "failed", "skipped")]
        ran = "all tests" if r["tests"] == ["tests"] else ", ".join(f"`{t}`" for t in r["tests"])
        cells = [r["python"], r["torch"], r["outcome"], *numbers, ran, r["date"]]
        lines.append(f"| {' | '.join(cells)} |")
    noted = [r for r in rows if r.get("failed") or r.get("why")]
    for r in noted:
        what = ", ".join(f"`{n}`" for n in r.get("failed", [])[:12]) or " ".join(r["why"].split())[:300]
        lines += ["", f"Python {r['python']}, torch {r['torch']}: {what}."]
    return "\n".join(lines) + "\n"


def run(argv: list[str]) -> int:
    """Run the tests in each environment, write the table."""
    options = common.parser("versions", __doc__)
    options.add_argument("--pairs", nargs="*", default=list(PAIRS), metavar="PYTHON:TORCH")
    options.add_argument("--tests", nargs="*", default=None, help="in place of all")
    options.add_argument("--folder", type=Path, default=None, help="where environments are made")
    given = options.parse_args(argv)
    tests = given.tests or (list(QUICK) if given.quick else ["tests"])
    target = given.json or common.ROOT / "docs" / "versions.json"
    rows: list[dict[str, Any]] = json.loads(target.read_text())["rows"] if target.is_file() else []
    with tempfile.TemporaryDirectory(prefix="fxgrow-versions-", dir=given.folder) as folder:
        for pair in given.pairs:
            found = attempt(pair, tests, Path(folder))
            rows = [r for r in rows if (r["python"], r["torch"]) != (found["python"], found["torch"])] + [found]
            print(f"Python {found['python']}, torch {found['torch']}: {found['outcome']} {found.get('counts', '')}")
            common.save(target, {"rows": rows})
            target.with_suffix(".md").write_text(page(rows), encoding="utf-8")
    return 0 if all(r["outcome"] == "passes" for r in rows) else 1


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
