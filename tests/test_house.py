"""The house: what import-linter cannot see. The layers themselves are a contract in pyproject.toml (`make lint`)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import fxgrow
from tests import project
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
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr"):
            key = ast.literal_eval(node.args[1]) if isinstance(node.args[1], ast.Constant) else ""
            names = [f"torch.{key}"]
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
    code = "from torch._ops import x\nimport torch.utils._pytree\nfrom torch.fx.experimental import y\ntorch._C.z\n"
    code += "getattr(op, '_schema')"
    assert len(set(private_torch(ast.parse(code)))) >= 5
    assert not list(private_torch(ast.parse("import torch\nfrom torch.fx import Graph\ntorch.ops.aten.add")))


def test_nothing_is_imported_for_types_alone() -> None:
    assert not [f for f in FILES if "TYPE_CHECKING:" in f.read_text(encoding="utf-8")]


def test_the_guide_shows_the_layers_of_the_contract() -> None:
    assert picture() in GUIDE.read_text(encoding="utf-8"), "python -m tests.layers --write"


#: keys of ``node.meta`` that torch itself writes
TORCHS = {"val", "stack_trace", "nn_module_stack"}


def metadata_keys(tree: ast.AST) -> Iterator[str]:
    """Keys of some ``x.meta`` that are spelled as text."""
    for node in ast.walk(tree):
        key: ast.AST | None = None
        if isinstance(node, ast.Subscript) and ast.unparse(node.value).endswith(".meta"):
            key = node.slice
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith((".meta.get", ".meta.pop")):
            key = node.args[0]
        elif isinstance(node, ast.Compare) and ast.unparse(node.comparators[0]).endswith(".meta"):
            key = node.left
        if isinstance(key, ast.Constant):
            yield str(key.value)


def test_what_is_known_of_nodes_and_modules_is_typed() -> None:
    found = {
        f"{f.relative_to(ROOT.parent)}: {key}"
        for f in FILES
        for key in metadata_keys(ast.parse(f.read_text(encoding="utf-8")))
        if key not in TORCHS
    }
    assert not found, "fields of fxgrow.ir.nodes.NodeInfo and fxgrow.ir.provenance.Provenance: " + ", ".join(found)
    assert list(metadata_keys(ast.parse("n.meta['a'], n.meta.get('b', 0), n.meta.pop('c'), 'd' in n.meta"))) != []


def test_every_folder_is_installed() -> None:
    listed = set(project.settings()["tool"]["setuptools"]["packages"])
    folders = {f.parent.relative_to(ROOT.parent) for f in FILES}
    own = {".".join(f.parts) if f.parts[0] == "fxgrow" else f"fxgrow.{'.'.join(f.parts)}" for f in folders}
    assert listed == own


def test_test_files_have_names_of_their_own() -> None:
    """Pytest imports them by their names, and stops where one is there twice."""
    names = [f.name for f in Path(__file__).parent.rglob("test_*.py")]
    assert not {n for n in names if names.count(n) > 1}
