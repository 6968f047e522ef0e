"""What `pyproject.toml` says."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:  # pytest brings it there
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent


def settings() -> dict[str, Any]:
    """The file's tables."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
