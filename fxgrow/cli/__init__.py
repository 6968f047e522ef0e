"""The command line: ``fxgrow inspect | plan | grow | verify | train | schema | passes | rules | env``.

Results go to standard output (``--json`` where a program reads them), progress and errors to standard error. Exit code
0: done; 1: a verification measured a difference; 2: refused or wrong, with one message that says why.

A command is a file. What it says of itself (``--help``, completion) must not wait for torch: a command imports what it
works with when it runs, in its first lines, and nowhere else.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.markup import escape

from fxgrow.cli import env, grow, inspect, passes, plan, rules, schema, train, verify
from fxgrow.cli.console import say
from fxgrow.errors import FxgrowError

app = typer.Typer(
    name="fxgrow",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _command in (
    *(inspect.inspect, plan.plan, grow.grow, verify.verify, train.train),
    *(schema.schema, passes.passes, rules.rules, env.env),
):
    app.command()(_command)

_state = {"traceback": False}


def _version(value: bool) -> None:
    if value:
        for name, text in env.versions().items():
            sys.stdout.write(f"{name:<16} {text}\n")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Versions; `fxgrow env` says more.")
    ] = False,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error comes from.")] = False,
) -> None:
    """Grow neural networks while they train, exactly.

    \b
    See what can grow:  fxgrow inspect examples.gpt.train:task
    Why, or why not:    fxgrow inspect examples.gpt.train:task --why ./vocab
    Try it on paper:    fxgrow plan examples.gpt.train:task spec.yaml
    Grow a checkpoint:  fxgrow grow my.models:gpt spec.yaml -w w.safetensors -o big
    Check it later:     fxgrow verify big
    Train and grow:     fxgrow train examples.gpt.train:task --out out/run
    What is installed:  fxgrow env
    Tab completes:      fxgrow --install-completion

    A spec is a file or YAML: '{op: widen, axis: "*/hidden", factor: 2}'.

    The current folder is importable. `fxgrow COMMAND --help` explains each command with examples.
    """
    _state["traceback"] = traceback


def main(argv: list[str] | None = None) -> None:
    """Run the command line; errors of fxgrow become one message and exit code 2."""
    try:
        app(args=argv, prog_name="fxgrow")
    except FxgrowError as error:
        if _state["traceback"]:
            raise
        say().print(f"[bold red]error[/] {escape(str(error))}", soft_wrap=True)
        raise SystemExit(2) from None
    except BrokenPipeError:
        raise SystemExit(0) from None
