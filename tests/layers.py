"""The picture of the layers in CONTRIBUTING.md, drawn from the import contract: ``python -m tests.layers --write``."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from tests import pages, project

ROOT = Path(__file__).parents[1]
GUIDE = ROOT / "CONTRIBUTING.md"
MARKED = re.compile(r"(?<=<!-- layers: begin -->\n).*?(?=<!-- layers: end -->)", re.DOTALL)

#: what is in a layer, where its name does not say it
WORDS = {
    "trace": "a model to a traced graph",
    "emit": "a graph to a module",
    "ir": "the traced graph; alone touches private torch",
    "algebra": "what a dim is made of",
    "analysis": "axes, names, ranges",
    "proof": "one axis through the graph",
    "passes": "widen, deepen, insert, extend",
    "plan": "decisions as data",
    "growth": "grow, plan_growth",
    "program": "capture",
    "verify": "the receipt",
    "weights": "grown tensors",
    "rules": "one for each op",
    "report": "tables and pictures",
    "testing": "the judge",
}


def layers() -> list[list[str]]:
    """The contract's layers, the highest first."""
    (contract,) = [c for c in project.settings()["tool"]["importlinter"]["contracts"] if c["type"] == "layers"]
    return [re.split(r" [|:] ", line) for line in contract["layers"]]


def picture() -> str:
    """The layers as a mermaid flowchart."""
    lines = ["```mermaid", "flowchart TD"]
    for number, names in enumerate(layers()):
        text = " · ".join(f"{n}: {WORDS[n]}" if n in WORDS else n for n in names)
        lines.append(f'    l{number}["{text}"]' + (f" --> l{number + 1}" if number + 1 < len(layers()) else ""))
    return "\n".join([*lines, "```", ""])


def main() -> int:
    return pages.main("python -m tests.layers", __doc__, GUIDE, MARKED, picture)


if __name__ == "__main__":
    sys.exit(main())
