"""Plans and receipts as tables."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fxgrow.limits import bytes_in_words
from fxgrow.plan import GrowthPlan
from fxgrow.program import Program
from fxgrow.report.plans import graph_lines, step_rows
from fxgrow.verify.receipt import Receipt


def show_plan(console: Console, made: GrowthPlan, program: Program | None = None) -> None:
    """A plan as tables: axes, blocks and layers, then what changes in the graph."""
    console.print(f"[bold]{escape(made.model)}[/]: [bold]{made.exactness}[/]")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("operation", "what", "from", "to", "how"):
        table.add_column(column, overflow="fold", justify="right" if column in ("from", "to") else "left")
    for (op, what, old, new, how), count in step_rows(made, program):
        table.add_row(op, escape(what) + (f" ×{count}" if count > 1 else ""), old, new, escape(how))
    if table.row_count:
        console.print(table)
    lines = graph_lines(made)
    if lines:
        console.print("in the graph")
        for text, count in lines.items():
            console.print("  " + escape(text) + (f"  ×{count}" if count > 1 else ""), soft_wrap=True)
    for constant in made.constants:
        console.print(f"[yellow]stays in the graph[/] {escape(str(constant))}", soft_wrap=True)
    for note in made.notes:
        console.print(f"[yellow]note[/] {escape(note)}", soft_wrap=True)


def show_receipt(console: Console, receipt: Receipt, said: Sequence[str] = ()) -> None:
    """What was measured; notes that were ``said`` already are left out."""

    def error(value: float | None) -> str:
        return "not measured" if value is None else f"{value:.1e}"

    table = Table(title="receipt", title_justify="left", box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    rows = [
        ("function", receipt.exactness),
        ("relative error, float64", error(receipt.error_float64)),
        ("  train mode", error(receipt.error_float64_train)),
        ("relative error, own dtype", error(receipt.error_native)),
        ("relative error, gradients", error(receipt.gradient_error)),
        ("compared on", "; ".join(["the example", *receipt.inputs]) if receipt.measured != "nothing" else "nothing"),
        ("not exercised", "; ".join(receipt.unexercised) or "nothing was found"),
        ("new weights without gradient", ", ".join(receipt.dead_parameters) or "none"),
        ("parameters", f"{receipt.params_before:,} → {receipt.params_after:,}"),
        ("bytes", f"{bytes_in_words(receipt.bytes_before)} → {bytes_in_words(receipt.bytes_after)}"),
        ("seconds", ", ".join(f"{k} {v:.2f}" for k, v in receipt.seconds.items())),
    ]
    for name, text in rows:
        table.add_row(name, escape(text))
    console.print(table)
    for note in dict.fromkeys(n for n in receipt.notes if n not in said):
        console.print(f"[yellow]note[/] {escape(note)}", soft_wrap=True)
