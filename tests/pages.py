"""Parts of pages that are made from the code: printed, or put between their marks with ``--write``."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path


def main(prog: str, description: str | None, page: Path, marked: re.Pattern[str], made: Callable[[], str]) -> int:
    """The command of one part; the exit code is 1 where the page shows something else."""
    parser = argparse.ArgumentParser(prog=prog, description=description)
    parser.add_argument("--write", action="store_true", help=f"put it into {page.name}")
    text = page.read_text(encoding="utf-8")
    if parser.parse_args().write:
        page.write_text(marked.sub(lambda _: made(), text), encoding="utf-8")
        return 0
    print(made())
    return int(made() not in text)
