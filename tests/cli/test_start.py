"""What the command line says of itself comes at once: without torch, on every way of starting it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

#: runs the command line where torch cannot be imported, nor what only needs it
WITHOUT_TORCH = """
import sys
class Forbid:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "networkx", "sympy", "safetensors", "matplotlib", "triton"):
            raise ImportError(f"{name} is imported")
sys.meta_path.insert(0, Forbid())
from fxgrow.cli import main
main()
"""


def without_torch(*argv: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *argv],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_help_loads_what_prints_it_only() -> None:
    code = "import sys, fxgrow.cli; print(sorted(m for m in sys.modules if m.startswith('fxgrow.') or m == 'pydantic'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    loaded = done.stdout.strip("[]\n").replace("'", "").split(", ")
    allowed = {"fxgrow.cli", "fxgrow.errors", "fxgrow.lazy", "fxgrow.saved", "fxgrow.version"}
    assert {".".join(m.split(".")[:2]) for m in loaded} == allowed, loaded


COMMANDS = ("inspect", "plan", "grow", "verify", "train", "schema", "passes", "env")


def test_help() -> None:
    text = without_torch("--help", COLUMNS="160")
    assert all(f" {command} " in text for command in COMMANDS)
    assert "Grow neural networks while they train, exactly." in text and "--install-completion" in text
    assert "--checkpoint" in without_torch("grow", "--help", COLUMNS="160")


def test_version() -> None:
    assert [line.split()[0] for line in without_torch("--version").splitlines()] == [
        "fxgrow",
        "Python",
        "torch",
        "triton",
    ]


@pytest.mark.parametrize("kind", ["spec", "schedule", "plan", "manifest"])
def test_schema(kind: str) -> None:
    assert json.loads(without_torch("schema", kind))["properties"]["version"]


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("fxgrow ins", ["inspect"]),
        ("fxgrow schema ", ["spec", "schedule", "plan", "manifest"]),
        ("fxgrow grow --verify f", ["float64"]),
        ("fxgrow verify --aga", ["--against"]),
    ],
)
def test_completion_offers(words: str, offered: list[str]) -> None:
    asked = {"_FXGROW_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    assert without_torch(**asked).split() == offered


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_completion_in_a_shell(tmp_path: Path) -> None:
    """As a user does: show it, install it, press the tab key."""
    binary = tmp_path / "bin" / "fxgrow"
    binary.parent.mkdir()
    binary.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m fxgrow "$@"\n')
    binary.chmod(0o755)
    script = r"""
    fxgrow --show-completion | grep -c _FXGROW_COMPLETE
    fxgrow --install-completion
    source "$HOME/.bashrc"
    COMP_WORDS=(fxgrow pa); COMP_CWORD=1
    $(complete -p fxgrow | sed 's/.*-F \([^ ]*\).*/\1/') fxgrow
    echo "offered: ${COMPREPLY[*]}"
    """
    environment = {**os.environ, "HOME": str(tmp_path), "PATH": f"{binary.parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert "offered: passes" in done.stdout, done.stdout + done.stderr
    assert "bash completion installed in" in done.stdout and done.stdout.startswith("1\n")


def test_as_a_module_without_arguments() -> None:
    done = subprocess.run([sys.executable, "-m", "fxgrow"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert "Usage: fxgrow [OPTIONS] COMMAND" in done.stdout and done.returncode == 2


def test_matplotlib_waits_for_a_picture() -> None:
    code = """
import sys
import fxgrow, fxgrow.training, fxgrow.report.pictures
from fxgrow import *
print("matplotlib" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout == "False\n", done.stderr
