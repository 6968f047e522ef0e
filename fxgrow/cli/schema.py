"""``fxgrow schema``: JSON Schemas, for editors and other tools. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Annotated, Any

import typer

from fxgrow.cli.console import print_json


class Kind(str, Enum):
    """What a schema is of."""

    spec = "spec"
    schedule = "schedule"
    plan = "plan"
    manifest = "manifest"


def schema(kind: Annotated[Kind, typer.Argument(help="Of which file.")] = Kind.spec) -> None:
    """JSON Schema of a file, plug-ins included, for editors that check YAML as you type.

    \b
    fxgrow schema spec > spec.schema.json
    # first line of a spec: yaml-language-server: $schema=spec.schema.json
    """
    from fxgrow import schedule, spec
    from fxgrow.manifest import Manifest
    from fxgrow.plan import GrowthPlan

    made: dict[Kind, Callable[[], dict[str, Any]]] = {
        Kind.spec: spec.json_schema,
        Kind.schedule: schedule.json_schema,
        Kind.plan: lambda: GrowthPlan.model_json_schema(mode="serialization"),
        Kind.manifest: Manifest.model_json_schema,
    }
    print_json(made[kind]())
