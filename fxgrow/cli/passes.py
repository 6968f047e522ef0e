"""``fxgrow passes``: what a spec can ask for."""

from __future__ import annotations

from typing import Any

from rich.markup import escape
from rich.table import Table

from fxgrow.cli.console import out, print_json
from fxgrow.cli.options import Json


def passes(json_: Json = False) -> None:
    """The operations a spec can ask for, their fields, and what is plugged in."""
    from fxgrow.passes import PASSES
    from fxgrow.plugins import load_plugins, plugins
    from fxgrow.rules import RULES
    from fxgrow.spec import operations

    for group in ("fxgrow.passes", "fxgrow.rules"):
        load_plugins(group)
    rows: list[dict[str, Any]] = []
    for name, cls in operations().items():
        rows.append(
            {
                "op": name,
                "pass": PASSES[name][1].__name__ if name in PASSES else None,
                "from": cls.__module__,
                "says": (cls.__doc__ or "").strip().splitlines()[0] if cls.__doc__ else "",
                "fields": [f for f in cls.model_fields if f != "op"],
            }
        )
    extra = [p.__dict__ for p in plugins()]
    if json_:
        print_json({"operations": rows, "plugins": extra, "rules": sorted(RULES)})
        return
    console = out()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("operation", "what it does", "fields"):
        table.add_column(column, overflow="fold")
    for row in rows:
        what = row["says"] if row["pass"] else f"{row['says']} [no pass is registered]"
        table.add_row(row["op"], escape(str(what)), ", ".join(row["fields"]))
    console.print(table)
    console.print(f"{len(RULES)} ops have rules: fxgrow rules")
    for plugin in plugins():
        console.print(f"plug-in {plugin.name} of {plugin.group}: {plugin.value} ({plugin.package})")
    if not extra:
        console.print("no plug-ins are installed; docs/passes.md and docs/rules.md say how to write one")
