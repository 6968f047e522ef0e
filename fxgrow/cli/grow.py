"""``fxgrow grow``: a checkpoint in, a larger one out."""

from __future__ import annotations

import json
import warnings
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from fxgrow.cli.console import out, print_json, working
from fxgrow.cli.options import Class, Config, Device, Input, Json, Model, NoSpec, Seed, Weights


class Level(str, Enum):
    """How a growth is measured."""

    auto = "auto"
    float64 = "float64"
    native = "native"
    off = "off"


def grow(
    model: Model,
    spec: NoSpec = None,
    out_: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder of the grown checkpoint.", show_default=False)
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", metavar="KEY=VALUE", help="A size in the words of config.json; repeat it."),
    ] = None,
    like: Annotated[Path | None, typer.Option(help="A larger model's config.json: grow to its sizes.")] = None,
    class_: Class = None,
    optimizer: Annotated[
        Path | None,
        typer.Option(help="State of an optimizer to grow as well; one in the file, or optimizer.pt beside, is found."),
    ] = None,
    no_optimizer: Annotated[bool, typer.Option("--no-optimizer", help="Leave optimizers' states out.")] = False,
    policy: Annotated[
        str, typer.Option(help="How an optimizer's state grows: asymmetric, copy, reset or exact.")
    ] = "asymmetric",
    make_optimizer: Annotated[
        str | None,
        typer.Option(help="package.module:function that makes the optimizer over a model as the script does."),
    ] = None,
    rates: Annotated[
        bool,
        typer.Option("--rates", help="Learning rates per slice in the state: for scripts that import fxgrow."),
    ] = False,
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
    fxgrow grow llama '{op: widen, axis: "*/residual", factor: 2}' --out larger
    fxgrow grow llama --set hidden_size=4096 --set num_hidden_layers=40 --out larger
    fxgrow grow llama --like larger/config.json --out larger
    fxgrow grow out/ckpt.pt --set n_embd=64 --class examples.nanogpt.model:GPT --out larger/ckpt.pt
    fxgrow grow my.models:gpt spec.yaml --checkpoint small.safetensors --out big
    fxgrow grow out/big '{op: widen, axis: "*/heads", factor: 2}' --out out/bigger

    A folder with a config.json, as transformers has them, becomes such a folder; it may be larger than memory, and a
    run that was killed goes on where it was. Of package.module:callable, and of a folder that fxgrow wrote, fxgrow's
    own folder is made; without --checkpoint the weights are those the callable makes. A file of torch.save that holds
    weights, settings and an optimizer's state becomes such a file, and so does optimizer.pt of a Trainer's checkpoint.
    """
    from fxgrow import growth
    from fxgrow.checkpoint import save
    from fxgrow.cli.folders import State, grow_folder
    from fxgrow.cli.models import is_folder_of_a_class, named_model
    from fxgrow.cli.tables import show_plan, show_receipt
    from fxgrow.errors import SpecError
    from fxgrow.spec import GrowthSpec

    if out_ is None:
        raise SpecError("say where the grown checkpoint goes: --out FOLDER")
    if is_folder_of_a_class(model):
        state = State(optimizer, no_optimizer, policy, make_optimizer, rates)
        grow_folder(
            Path(model), spec, out_, set_ or (), like, class_, input or (), state, verify is not Level.off, json_
        )
        return
    if set_ or like or class_ or optimizer or no_optimizer or make_optimizer or rates:
        raise SpecError(
            "--set, --like, --class and what is said of optimizers are for folders with a config.json and for files "
            f"with settings, and {model} is none"
        )
    if spec is None:
        raise SpecError("say how to grow: a spec file, or YAML")
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
