"""What ``import fxgrow`` costs and offers: its names load on first use, and nothing is loaded before it is needed."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import fxgrow
from fxgrow.lazy import read_stub
from tests import project

ROOT = Path(__file__).parents[1]

#: fails when one of these is imported, whoever asks
FORBID = """
import sys
class Forbid:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names!r}:
            raise ImportError(f"{{name}} is imported")
sys.meta_path.insert(0, Forbid())
"""


def python(code: str, *forbidden: str) -> str:
    """Output of a fresh process in which the forbidden packages cannot be imported."""
    code = FORBID.format(names=set(forbidden)) + code
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_every_public_name_is_the_object_of_its_module() -> None:
    home = read_stub(ROOT / "fxgrow" / "__init__.pyi")
    assert set(fxgrow.__all__) == set(home) and home.keys() <= set(dir(fxgrow)) and "__version__" in dir(fxgrow)
    for name, module in home.items():
        expected = import_module("fxgrow.passes") if name == "passes" else getattr(import_module(module), name)
        assert getattr(fxgrow, name) is expected, name


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="module 'fxgrow' has no attribute 'grwo'"):
        _ = fxgrow.grwo  # type: ignore[attr-defined]
    assert not hasattr(fxgrow, "_private")


@pytest.mark.parametrize("first", ["import fxgrow.expand", "from fxgrow.growth import grow", "fxgrow"])
def test_a_module_does_not_take_the_place_of_the_function_of_its_name(first: str) -> None:
    code = "import fxgrow; print(fxgrow.capture.__name__, fxgrow.expand.__name__, fxgrow.passes.__name__)"
    assert python(f"import fxgrow\n{first}\n{code}") == "capture expand fxgrow.passes\n"


def test_importing_it_loads_nothing_else() -> None:
    packages = ("torch", "numpy", "pydantic", "networkx", "yaml", "safetensors", "typer", "rich", "matplotlib")
    assert python("import fxgrow; print(fxgrow.__version__)", *packages) == f"{fxgrow.__version__}\n"


def test_a_spec_needs_no_torch() -> None:
    code = "import fxgrow; print(fxgrow.GrowthSpec.parse('{op: deepen, stack: h, factor: 2}').operations[0].factor)"
    assert python(code, "torch", "networkx", "safetensors", "typer", "rich", "matplotlib") == "2.0\n"


def test_kernels_need_torch_and_numpy_only() -> None:
    code = """
import torch
from fxgrow import kernels
twice = kernels.DimMap(torch.tensor([0, 0, 1]).numpy())
print(kernels.materialise(torch.arange(2.0), [twice]).tolist(), "fxgrow.rules" in sys.modules)
"""
    packages = ("pydantic", "yaml", "safetensors", "typer", "rich", "matplotlib", "triton")
    assert python(code, *packages) == "[0.0, 0.0, 1.0] False\n"
    ours = "import fxgrow.kernels, sys; print(sorted(m for m in sys.modules if m.startswith('fxgrow.')))"
    loaded = [m.strip("'\n[]") for m in python(ours).split(", ")]
    assert {m.split(".")[1] for m in loaded} == {"kernels", "lazy", "publish", "saved", "version", "warn"}


def test_there_is_one_version() -> None:
    assert project.settings()["project"]["version"] == fxgrow.__version__
