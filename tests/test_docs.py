"""Every Python block of README, CONTRIBUTING and docs runs, in order, file by file; links and images lead somewhere."""

from __future__ import annotations

import re
import sys
import warnings
from pathlib import Path

import pytest
import torch

import fxgrow
from fxgrow import spec
from fxgrow.passes import PASSES
from fxgrow.rules import RULES
from fxgrow.weights.moments import MOMENTS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> str:
    """The page's Python blocks as one program; line numbers are those of the page."""
    text = page.read_text(encoding="utf-8")
    lines = [""] * (text.count("\n") + 1)
    for found in BLOCK.finditer(text):
        first = text.count("\n", 0, found.start(1))
        for i, line in enumerate(found[1].splitlines()):
            lines[first + i] = line
    return "\n".join(lines)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p).strip()], ids=lambda p: p.name)
def test_python_blocks(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if str(ROOT) not in sys.path:
        monkeypatch.syspath_prepend(str(ROOT))
    tables = (RULES, PASSES, spec._OPERATIONS, MOMENTS)
    for table in tables:  # what a page registers goes with it
        for key in list(table):
            monkeypatch.setitem(table, key, table[key])  # type: ignore[index]
    known = [(table, set(table)) for table in tables]
    torch.manual_seed(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec(compile(blocks(page), str(page), "exec", dont_inherit=True), {"__name__": f"docs_{page.stem}"})
    finally:
        for table, keys in known:
            for key in set(table) - keys:
                del table[key]  # type: ignore[arg-type]
        fxgrow.GrowthSpec._adapter = None


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_images_are_small() -> None:
    images = list((ROOT / "docs" / "images").iterdir())
    assert images and all(i.stat().st_size < 150_000 for i in images)


def test_commands_of_the_readme_exist() -> None:
    from fxgrow.cli import app

    known = {c.name or c.callback.__name__ for c in app.registered_commands if c.callback is not None}
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^ {4}fxgrow (\w+)", text, re.MULTILINE))
    assert named and named <= known
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^ {4}make (\w+)", text, re.MULTILINE):
        assert f"\n{target}:" in makefile
