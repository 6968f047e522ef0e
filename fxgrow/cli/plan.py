"""``fxgrow plan``: a growth on paper."""

from __future__ import annotations

import sys
import warnings
from typing import Annotated

import typer

from fxgrow.cli.console import out, working
from fxgrow.cli.options import Class, Config, Input, Json, Model, Seed, Spec


def plan(
    model: Model,
    spec: Spec,
    config: Config = None,
    input: Input = None,
    class_: Class = None,
    ranks: Annotated[int, typer.Option(min=1, help="how many ranks share the rows of every weight, as under FSDP")] = 1,
    json_: Json = False,
    seed: Seed = 0,
) -> None:
    """Dry run of a growth: what grows, by how much, what it costs. Needs no weights and computes nothing.

    \b
    fxgrow plan examples.gpt.train:task spec.yaml
    fxgrow plan llama '{op: widen, axis: "*/residual", factor: 2}'
    fxgrow plan examples.gpt.train:task '{op: widen, axis: "*/hidden", factor: 1.5}'
    fxgrow plan examples.gpt.train:task '{op: extend, axis: "*/positions", factor: 2}'
    fxgrow plan examples.gpt.train:task '{op: widen, axis: "*/hidden", factor: 2}' --ranks 8
    fxgrow plan examples.gpt.train:task '[{op: deepen, stack: transformer.h, factor: 2}]' --json > plan.json
    """
    from fxgrow.cli.models import captured, named_model
    from fxgrow.cli.tables import show_plan
    from fxgrow.growth import plan_growth
    from fxgrow.ir.dtensors import Rows
    from fxgrow.limits import bytes_in_words
    from fxgrow.report.plans import parameter_bytes
    from fxgrow.spec import GrowthSpec
    from fxgrow.weights.exchange import Traffic
    from fxgrow.weights.shards import count_traffic

    parsed = GrowthSpec.parse(spec)
    named = named_model(model, config=config or (), inputs=input or (), seed=seed, dry=True, named=class_)
    program = captured(named)
    with working("planning"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made, grown = plan_growth(program, parsed)
    if json_:
        sys.stdout.write(made.to_json(indent=2) + "\n")
        return
    console = out()
    show_plan(console, made, program)
    before, after = parameter_bytes(program, made, grown)
    times = made.parameters_after / max(1, made.parameters_before)
    console.print(
        f"parameters {made.parameters_before:,} → {made.parameters_after:,} (×{times:.2f}), "
        f"{bytes_in_words(before)} → {bytes_in_words(after)}"
    )
    if ranks > 1:
        traffic = Traffic()
        for name, tensor in made.tensors.items():
            if name in grown.parameters and tensor.source is not None:
                old = program.tensor(tensor.source)
                count_traffic(tensor, old.shape, Rows(ranks), old.element_size(), traffic)
        console.print(f"on {ranks} ranks, each with an equal part of the rows (FSDP): {traffic.words}")
