"""``fxgrow grow``: a checkpoint in, a larger one out."""

from __future__ import annotations

import json
import warnings
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from fxgrow.cli.console import out, print_json, working
from fxgrow.cli.options import Config, Device, Input, Json, Model, Seed, Spec, Weights


class Level(StrEnum):
    """How a growth is measured."""

    auto = "auto"
    float64 = "float64"
    native = "native"
    off = "off"


def grow(
    model: Model,
    spec: Spec,
    out_: Annotated[Path, typer.Option("--out", "-o", help="Folder of the grown checkpoint.", show_default=False)],
    checkpoint: Weights = None,
    config: Config = None,
    input: Input = None,
    verify: Annotated[Level, typer.Option(help="What to measure it in.")] = Level.auto,
    examples: Annotated[bool, typer.Option(help="Store the example inputs and outputs, for `fxgrow verify`.")] = True,
    json_: Json = False,
    device: Device = "cpu",
    seed: Seed = 0,
) -> None:
    """Grow a checkpoint: weights in, a larger checkpoint that computes the same out.

    \b
    fxgrow grow my.models:gpt spec.yaml --checkpoint small.safetensors --out big
    fxgrow grow out/big '{op: widen, axis: "*/heads", factor: 2}' --out out/bigger

    Without --checkpoint the weights are those the callable makes.
    """
    from fxgrow import growth
    from fxgrow.checkpoint import save
    from fxgrow.cli.models import named_model
    from fxgrow.cli.tables import show_plan, show_receipt
    from fxgrow.spec import GrowthSpec

    parsed = GrowthSpec.parse(spec)
    named = named_model(
        model, config=config or (), inputs=input or (), weights=checkpoint, device=device, seed=seed, dry=False
    )
    level: Any = False if verify is Level.off else verify.value
    with working("growing"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = growth.grow(named.module, parsed, named.args, named.kwargs, verify=level)
    with working(f"writing {out_}"):
        save(made, out_, examples=examples)
    if json_:
        print_json({"out": str(out_), **json.loads(made.receipt.model_dump_json())})
        return
    console = out()
    show_plan(console, made.plan)
    show_receipt(console, made.receipt, made.plan.notes)
    console.print(f"written to {out_}", soft_wrap=True)
