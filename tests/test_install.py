"""An installed wheel works in any folder, the repository's root included."""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

GROW = """
import torch, fxgrow
from torch import nn
model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
growth = fxgrow.grow(model, {"op": "widen", "axis": "./hidden", "factor": 2}, (torch.randn(2, 3).double(),))
assert growth.receipt.error_float64 < 1e-12
print(fxgrow.__file__, fxgrow.passes.__file__, fxgrow.kernels.__file__, sep="\\n")
"""


def python(code: str, cwd: Path, *paths: Path) -> subprocess.CompletedProcess[str]:
    """Run code without what an editable install adds to the path."""
    packages = [p for p in sys.path if p and "site-packages" in p] or site.getsitepackages()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, paths), *packages]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-S", "-W", "ignore", "-c", code]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_a_wheel_in_any_folder(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "installed"
    for name in ("fxgrow", "passes", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--target", str(target), str(source)], check=True, timeout=300)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for folder, home in ((elsewhere, target / "fxgrow"), (ROOT, ROOT)):
        done = python(GROW, folder, target)
        assert done.returncode == 0, done.stderr[-2000:]
        files = [Path(line).resolve() for line in done.stdout.split()]
        assert len(files) == 3 and all(f.is_relative_to(home.resolve()) for f in files), files


def test_a_part_of_it_says_so(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "fxgrow", tmp_path / "fxgrow", ignore=shutil.ignore_patterns("__pycache__"))
    done = python("import fxgrow", tmp_path)
    assert "fxgrow without its passes and kernels; install the whole of it" in done.stderr
