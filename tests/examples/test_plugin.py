"""The plug-in in an environment of its own, installed as pip installs it and imported by nobody."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GROW = """
import torch, fxgrow
from torch import nn
from swish_growth.ops import gated  # the op; fxgrow finds the rest

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 2)
    def forward(self, x):
        return self.down(gated(self.up(x), self.gate(x)))

model, x = Model().double(), torch.randn(5, 3, dtype=torch.float64)
growth = fxgrow.grow(model, {"op": "widen_role", "role": "hidden", "factor": 1.5}, (x,))
assert growth.receipt.error_float64 < 1e-12 and growth.receipt.gradient_error < 1e-9
assert growth.apply_(model).up.weight.shape == (6, 3)
try:
    fxgrow.grow(model, {"op": "widen_role", "role": "heads"}, (x,))
except fxgrow.SpecError as error:
    assert "no axis has the role 'heads'; there are hidden" in str(error)
else:
    raise AssertionError
from fxgrow.plugins import plugins
print(sorted({(p.group, p.name) for p in plugins() if p.package == "swish-growth"}))

from fxgrow.testing.judge import Sample, check
report = check("swish.gated.default", [Sample(x, x.flip(0))])
assert report.accepted and not report.wrong and not report.strict, report
"""


@pytest.mark.slow
def test_the_plugin_installs_and_works(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    source = tmp_path / "plugin"  # a build leaves files beside its source
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "swish_growth"):
        (source / name).symlink_to(ROOT / "examples" / "plugin" / name)
    subprocess.run([*pip, "--target", str(tmp_path / "installed"), str(source)], check=True, timeout=300)
    paths = os.pathsep.join([str(tmp_path / "installed"), *(p for p in sys.path if p)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", GROW], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    groups = ("fxgrow.operations", "widen_role"), ("fxgrow.passes", "widen_role"), ("fxgrow.rules", "swish")
    assert done.stdout.strip() == str(list(groups))
