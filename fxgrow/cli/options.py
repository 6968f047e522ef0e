"""Arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str,
    typer.Argument(
        help="package.module:callable that returns a module, (module, args), (module, args, kwargs) or a Task; "
        "or a checkpoint folder.",
        show_default=False,
    ),
]
Config = Annotated[
    list[str] | None, typer.Option("--config", "-c", metavar="KEY=VALUE", help="Argument of the callable; repeat it.")
]
Input = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        "-i",
        metavar="[NAME=]DTYPE[SIZES]<MAX",
        help='Example input, as in "int64[2,16]<65" or "x=float32[2,3,32,32]"; repeat it. Sizes of at least 2.',
    ),
]
Spec = Annotated[
    str, typer.Argument(help="A spec file, or YAML: '{op: widen, axis: \"*/hidden\", factor: 2}'.", show_default=False)
]
NoSpec = Annotated[
    str | None,
    typer.Argument(help="A spec file, or YAML; not with --set or --like.", show_default=False),
]
Weights = Annotated[
    Path | None,
    typer.Option("--checkpoint", "-w", help="Weights of the model: a .safetensors state dict or a checkpoint folder."),
]
Class = Annotated[
    str | None,
    typer.Option("--class", help="package.module:Class of a folder with a config.json, where it is not transformers'."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, …")]
Seed = Annotated[int, typer.Option(help="Of new weights and example inputs.")]
