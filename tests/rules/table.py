"""The list of rules in docs/rules.md, printed from the table: ``python -m tests.rules.table --write``."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import fxgrow.rules  # noqa: F401 - the table
from fxgrow.report.rules import counts, entries, markdown

PAGE = Path(__file__).parents[2] / "docs" / "rules.md"
MARKED = re.compile(r"(?<=<!-- rules: begin -->\n).*?(?=<!-- rules: end -->)", re.DOTALL)


def listed() -> str:
    """The list, as the page has to show it."""
    own = [e for e in entries() if e.family != "plug-ins"]
    return f"{counts(own)}.\n\n{markdown()}\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.rules.table", description=__doc__)
    parser.add_argument("--write", action="store_true", help="put it into docs/rules.md")
    text = PAGE.read_text(encoding="utf-8")
    if parser.parse_args().write:
        PAGE.write_text(MARKED.sub(lambda _: listed(), text), encoding="utf-8")
        return 0
    print(listed())
    return int(listed() not in text)


if __name__ == "__main__":
    raise SystemExit(main())
