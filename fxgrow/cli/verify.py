"""``fxgrow verify``: does a checkpoint compute what it should."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from fxgrow.cli.console import out, print_json, working
from fxgrow.cli.options import Class, Config, Device, Input, Json, Seed, Weights


def verify(
    checkpoint_dir: Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint folder.", show_default=False)],
    other: Annotated[
        Path | None, typer.Argument(metavar="OTHER", help="Two folders with a config.json: compare them.")
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Compare with this model (package.module:callable or a checkpoint)."),
    ] = None,
    checkpoint: Weights = None,
    config: Config = None,
    input: Input = None,
    class_: Class = None,
    json_: Json = False,
    device: Device = "cpu",
    seed: Seed = 0,
) -> None:
    """Check a grown checkpoint: that it loads, that it computes what it computed, and the same as another model.

    Of two folders with a config.json, as transformers has them: how far apart what they compute is in float64, and
    where they part.

    \b
    fxgrow verify out/big
    fxgrow verify out/big --against my.models:gpt --checkpoint small.safetensors
    fxgrow verify llama larger

    Exit code 1 when the outputs differ by more than rounding.
    """
    from fxgrow.checkpoint import load
    from fxgrow.cli.folders import verify_folders
    from fxgrow.cli.models import is_folder_of_a_class, named_model
    from fxgrow.comparison import TOLERANCE, errors_against, stored_dtype
    from fxgrow.errors import SpecError

    if other is not None or is_folder_of_a_class(checkpoint_dir):
        if other is None:
            raise SpecError(f"{checkpoint_dir} is a folder of another class: name the one to compare it with, too")
        if not verify_folders(checkpoint_dir, other, class_, input or (), json_):
            raise typer.Exit(1)
        return
    with working(f"loading {checkpoint_dir}"):
        loaded = load(checkpoint_dir, device=device)
    dtype = stored_dtype(loaded)
    limit = TOLERANCE.get(dtype, 5e-2)
    data: dict[str, Any] = {
        "checkpoint": str(checkpoint_dir),
        "model": loaded.manifest.class_name,
        "parameters": loaded.manifest.parameters,
        "written_by": f"fxgrow {loaded.manifest.fxgrow}, torch {loaded.manifest.torch}",
        "exactness": loaded.plan.exactness if loaded.plan is not None else None,
        "tolerance": limit,
    }
    if loaded.outputs is not None:
        with working("running"):
            data["error_replay"] = loaded.replay_error()
    if against is not None:
        named = named_model(
            against, config=config or (), inputs=input or (), weights=checkpoint, device=device, seed=seed, dry=False
        )
        with working("comparing"):
            data |= errors_against(loaded, named.module, named.args, named.kwargs, stored=not input)
    measured = {k: v for k, v in data.items() if k.startswith("error_")}
    lossy = against is not None and loaded.plan is not None and not loaded.plan.exact_elsewhere
    wrong = {k: v for k, v in measured.items() if not v <= limit and (k == "error_replay" or not lossy)}
    data["ok"] = not wrong
    if json_:
        print_json(data)
    else:
        console = out()
        console.print(
            f"[bold]{escape(str(checkpoint_dir))}[/]: {escape(data['model'])}, {data['parameters']:,} parameters, "
            f"written by {data['written_by']}",
            soft_wrap=True,
        )
        names = {
            "error_replay": "against what it computed when it was written",
            "error_native": f"against {against}, own dtype",
            "error_float64": f"against {against}, computed in float64 from the stored {dtype} weights",
        }
        for key, value in measured.items():
            mark = "[red]differs[/]" if key in wrong else "[green]ok[/]"
            console.print(f"{mark}  {value:.1e}  {escape(names[key])}", soft_wrap=True)
        if not measured:
            console.print("it loads; nothing was measured: no examples are stored. Give --against MODEL")
        if lossy:
            console.print(f"[yellow]note[/] the growth was {data['exactness']}: it may differ")
    if wrong:
        raise typer.Exit(1)
