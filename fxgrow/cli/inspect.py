"""``fxgrow inspect``: what can grow in a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from fxgrow.cli.console import out, print_json, say, working
from fxgrow.cli.options import Class, Config, Device, Input, Json, Model, Seed


def inspect(
    model: Model,
    config: Config = None,
    input: Input = None,
    class_: Class = None,
    json_: Json = False,
    why: Annotated[
        str | None, typer.Option(metavar="AXIS", help="What grows with an axis, or why it cannot grow.")
    ] = None,
    all_: Annotated[bool, typer.Option("--all", help="List the axes of each block one by one.")] = False,
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw the axes and the tensors they tie.")
    ] = None,
    device: Device = "cpu",
    seed: Seed = 0,
) -> None:
    """What can grow in a model: its axes and its repeated blocks.

    \b
    fxgrow inspect examples.gpt.train:task
    fxgrow inspect llama
    fxgrow inspect examples.gpt.train:task --why "transformer.h.0.attn/heads"
    fxgrow inspect my.models:cnn -c width=16 -i "float32[2,3,32,32]" --picture axes.png
    """
    from fxgrow.cli.models import captured, named_model
    from fxgrow.explanation import explain
    from fxgrow.limits import bytes_in_words
    from fxgrow.report.axes import axis_groups, inspection
    from fxgrow.report.pictures import draw_axes

    named = named_model(
        model, config=config or (), inputs=input or (), device=device, seed=seed, dry=True, named=class_
    )
    program = captured(named)
    if picture is not None:
        with working("drawing"):
            draw_axes(program, picture)
        say().print(f"picture  {picture}", soft_wrap=True)
    if why is not None:
        infos = program.axes.find(why)
        texts = [explain(program, i.name) for i in infos]
        if json_:
            print_json({i.name: text for i, text in zip(infos, texts, strict=True)})
        else:
            for text in texts:
                out().print(escape(text), soft_wrap=True)
        return
    data = inspection(program)
    if json_:
        print_json(data)
        return
    console = out()
    console.print(
        f"[bold]{escape(data['model'])}[/]  {data['parameters']:,} parameters, {bytes_in_words(data['bytes'])}; "
        f"captured for {data['modes']}" + (f" ({escape(data['mode_reason'])})" if data["mode_reason"] else "")
    )
    table = Table(title="axes", title_justify="left", box=None, pad_edge=False, header_style="bold")
    table.add_column("name", overflow="fold")
    table.add_column("size", justify="right")
    table.add_column("where it is used, or why it cannot grow", overflow="fold", ratio=1)
    for group in axis_groups(program):
        names, sizes = group["names"], group["sizes"]
        text = _members(group["members"]) if group["growable"] else f"frozen: {group['reason']}"
        style = "" if group["growable"] else "dim"
        if all_:
            for name, size in zip(names, sizes, strict=True):
                table.add_row(escape(name), str(size), escape(text), style=style)
        else:
            count = f" ×{len(names)}" if len(names) > 1 else ""
            shown = "/".join(map(str, dict.fromkeys(sizes)))
            table.add_row(escape(group["pattern"]) + count, shown, escape(text), style=style)
    console.print(table)
    for stack in data["stacks"]:
        console.print(f"stack [bold]{escape(stack['stack'])}[/]: {stack['blocks']} × {escape(stack['kind'])}")
    if data["ties"]:
        console.print("tied: " + escape(", ".join(f"{a} = {b}" for a, b in data["ties"].items())))
    if data["ops_without_a_rule"]:
        console.print(
            f"[yellow]no rule for {escape(', '.join(data['ops_without_a_rule']))}[/]: what they touch is frozen; "
            "docs/rules.md says how to add one"
        )


def _members(members: Sequence[str], most: int = 4) -> str:
    more = f" and {len(members) - most} more" if len(members) > most else ""
    return ", ".join(members[:most]) + more
