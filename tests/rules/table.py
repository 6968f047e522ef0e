"""The list of rules in docs/rules.md, printed from the table: ``python -m tests.rules.table --write``."""

from __future__ import annotations

import re
from pathlib import Path

import fxgrow.rules  # noqa: F401 - the table
from fxgrow.report.rules import counts, entries, markdown
from tests import pages

PAGE = Path(__file__).parents[2] / "docs" / "rules.md"
MARKED = re.compile(r"(?<=<!-- rules: begin -->\n).*?(?=<!-- rules: end -->)", re.DOTALL)


def listed() -> str:
    """The list, as the page has to show it."""
    own = [e for e in entries() if e.family != "plug-ins"]
    return f"{counts(own)}.\n\n{markdown()}\n"


def main() -> int:
    return pages.main("python -m tests.rules.table", __doc__, PAGE, MARKED, listed)


if __name__ == "__main__":
    raise SystemExit(main())
