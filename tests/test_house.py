"""The house: what import-linter cannot see. The layers themselves are a contract in pyproject.toml (`make lint`)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import fxgrow
from tests.layers import GUIDE, picture

ROOT = Path(fxgrow.__file__).parent
FOLDERS = [ROOT, ROOT.parent / "passes", ROOT.parent / "kernels"]
FILES = [f for folder in FOLDERS for f in folder.rglob("*.py")]


def private_torch(tree: ast.AST) -> Iterator[str]:
    """Modules of torch that are imported, or reached by their names, and are private or experimental."""

    def private(name: str) -> bool:
        parts = name.split(".")
        return parts[0] == "torch" and (
            any(p.startswith("_") and not p.endswith("__") for p in parts) or "experimental" in parts
        )

    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{a.name}" for a in node.names]
        elif isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        else:
            continue
        yield from (n for n in names if private(n) and "\n" not in n)


def test_private_torch_is_for_ir_alone() -> None:
    assert FILES
    found = {
        f"{f.relative_to(ROOT.parent)}: {name}"
        for f in FILES
        if f.parent != ROOT / "ir"
        for name in private_torch(ast.parse(f.read_text(encoding="utf-8")))
    }
    assert not found, "\n".join(sorted(found))


def test_private_torch_is_seen() -> None:
    code = "from torch._ops import x\nimport torch.utils._pytree\nfrom torch.fx.experimental import y\ntorch._C.z"
    assert len(set(private_torch(ast.parse(code)))) >= 4
    assert not list(private_torch(ast.parse("import torch\nfrom torch.fx import Graph\ntorch.ops.aten.add")))


def test_nothing_is_imported_for_types_alone() -> None:
    assert not [f for f in FILES if "TYPE_CHECKING:" in f.read_text(encoding="utf-8")]


def test_the_guide_shows_the_layers_of_the_contract() -> None:
    assert picture() in GUIDE.read_text(encoding="utf-8"), "python -m tests.layers --write"
