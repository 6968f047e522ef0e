"""The model card's lines on how a checkpoint was grown, and the same as data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fxgrow.plan import GrowthPlan
from fxgrow.verify.receipt import Receipt
from fxgrow.version import __version__

CARD, RECORD = "README.md", "growth.json"


def write(
    folder: Path, source: str, plan: GrowthPlan, receipt: Receipt, settings: Mapping[str, tuple[Any, Any]]
) -> None:
    """Add the lines to a folder's card, which is made if there is none.

    Args:
        source: the name of the small checkpoint's folder.
        settings: of the config, old and new.
    """
    file = folder / CARD
    before = file.read_text(encoding="utf-8", errors="replace").rstrip() + "\n\n" if file.is_file() else ""
    lines = [f"## Grown from {source}", "", f"With fxgrow {__version__}, {receipt.summary()}.", ""]
    lines += [f"- `{name}`: {old} → {new}" for name, (old, new) in sorted(settings.items())]
    file.write_text(before + "\n".join(lines) + "\n", encoding="utf-8")
    record = {
        "fxgrow": __version__,
        "source": source,
        "operations": [step.request for step in plan.steps],
        "settings": {k: {"old": a, "new": b} for k, (a, b) in settings.items()},
        "receipt": json.loads(receipt.model_dump_json()),
    }
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
