"""``python -m benchmarks NAME [options]``: runs ``benchmarks/NAME.py``."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

_HIDDEN = {"__init__", "__main__", "common", "living", "rows"}


def names() -> list[str]:
    """The benchmarks there are."""
    return sorted(p.stem for p in Path(__file__).parent.glob("*.py") if p.stem not in _HIDDEN)


def main(argv: list[str] | None = None) -> int:
    """Run one benchmark; returns its exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] not in names():
        print(f"usage: python -m benchmarks NAME [--help] [--json FILE]\nNAME is one of: {', '.join(names())}")
        return 0 if argv[:1] in (["-h"], ["--help"]) else 2
    return int(importlib.import_module(f"benchmarks.{argv[0]}").run(argv[1:]))


if __name__ == "__main__":
    sys.exit(main())
