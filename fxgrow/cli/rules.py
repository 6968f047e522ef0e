"""``fxgrow rules``: what fxgrow knows of ops."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from fxgrow.cli.console import out, print_json
from fxgrow.cli.options import Json


def rules(
    name: Annotated[str, typer.Argument(help="Part of an op's name, or a pattern such as 'aten.conv*'.")] = "*",
    json_: Json = False,
    classes: Annotated[bool, typer.Option("--classes", help="Only those that are no row of a form, and why.")] = False,
) -> None:
    """What fxgrow knows of an op: the table of rules, one line for the ops that share a row.

    \b
    fxgrow rules silu
    fxgrow rules "aten.conv*" --json
    fxgrow rules --classes

    docs/rules.md says what the columns mean and how to add a rule.
    """
    from fxgrow.errors import SpecError
    from fxgrow.ir.traits import Trait
    from fxgrow.plugins import load_plugins
    from fxgrow.report.rules import counts, entries, in_words

    load_plugins("fxgrow.rules")
    found = [e for e in entries(name) if not (classes and e.is_row)]
    if not found:
        raise SpecError(f"no op with a rule matches {name!r}; an op without one freezes the axes it touches")
    if json_:
        print_json([op for entry in found for op in entry.json()])
        return
    console = out()
    table = Table(box=None, pad_edge=False, header_style="bold", show_header=True)
    for column in ("ops", "form", "says"):
        table.add_column(column, overflow="fold", ratio=None if column == "form" else 1)
    family = ""
    for entry in found:
        if entry.family != family:
            family = entry.family
            table.add_row(f"[bold cyan]{family}[/]")
        more = in_words(entry.columns) if entry.is_row else f"a class: {entry.special}"
        ops = " ".join(op.removesuffix(".default") for op in entry.ops)
        table.add_row(escape(ops), entry.form, escape(entry.says + (f"; {more}" if more else "")))
    console.print(table)
    if len(found) == 1:
        said = {t for traits in found[0].traits.values() for t in traits}
        for trait in Trait:
            if trait.name.lower() in said:
                console.print(f"[dim]{trait.name.lower()}[/]: {escape(trait.value)}")
    console.print(counts(found))
