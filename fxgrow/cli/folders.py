"""``fxgrow grow`` and ``verify`` of folders with a config, and of files; the larger one with a bar meanwhile."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from fxgrow.cli.console import out, print_json, say, working
from fxgrow.cli.models import find_callable, named_inputs, parse_settings
from fxgrow.cli.tables import show_plan, show_receipt
from fxgrow.errors import SpecError
from fxgrow.folders import compare_folders, grow_checkpoint
from fxgrow.folders.comparing import LIMIT
from fxgrow.limits import bytes_in_words

#: seconds between lines of progress where there is no terminal
_EVERY = 10.0


@dataclass(frozen=True)
class State:
    """What is to become of optimizers' states, as :func:`fxgrow.folders.grow_checkpoint` takes it."""

    optimizer: Path | None
    left_out: bool
    policy: str
    make: str | None
    rates: bool


def grow_folder(
    folder: Path,
    spec: str | None,
    target: Path,
    settings: Sequence[str],
    like: Path | None,
    named: str | None,
    inputs: Sequence[str],
    state: State,
    verify: bool,
    as_json: bool,
) -> None:
    """Grow a folder and say what was done."""
    if state.optimizer and state.left_out:
        raise SpecError("--optimizer grows an optimizer's state, --no-optimizer leaves it out: give one of them")
    with progress_bar(f"writing {target}") as wrote, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        done = grow_checkpoint(
            folder,
            spec,
            target,
            settings=parse_settings(settings, "--set", nested=True) if settings else None,
            like=like,
            model_class=None if named is None else find_callable(named),
            inputs=named_inputs(inputs),
            optimizer=state.optimizer or not state.left_out,
            policy=state.policy,
            make_optimizer=None if state.make is None else find_callable(state.make),
            rates=state.rates,
            verify=verify,
            progress=wrote,
        )
    changed = {k: {"old": old, "new": new} for k, (old, new) in done.settings.items()}
    if as_json:
        receipt = json.loads(done.receipt.model_dump_json())
        print_json({**receipt, "out": str(target), "settings": changed, "seconds": done.seconds})
        return
    console = out()
    show_plan(console, done.plan)
    show_receipt(console, done.receipt, done.plan.notes)
    for name, values in changed.items():
        console.print(f"config {name}: {values['old']} → {values['new']}")
    console.print(f"written to {target}", soft_wrap=True)


def verify_folders(first: Path, second: Path, named: str | None, inputs: Sequence[str], as_json: bool) -> bool:
    """Compare two folders and say how far apart they are; whether they compute the same."""
    kind = None if named is None else find_callable(named)
    with working("comparing"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = compare_folders(first, second, model_class=kind, inputs=named_inputs(inputs))
    if as_json:
        print_json({"ok": found.same, "limit": LIMIT, **asdict(found)})
        return found.same
    console = out()
    for number, error in enumerate(found.errors):
        mark = "[green]same[/]" if error <= LIMIT else "[red]differs[/]"
        console.print(f"{mark}  output {number}: {error:.1e}, relative, in float64 (at most {LIMIT:.0e})")
    if found.parting is not None:
        p = found.parting
        console.print(escape(f"they part at {p.op} in {p.module or 'the model'}, by {p.error:.1e}: {p.source}"))
    return found.same


@contextmanager
def progress_bar(what: str) -> Iterator[Any]:
    """What takes bytes written and bytes in all: a bar on a terminal, a line now and then elsewhere."""
    console = say()
    if not console.is_terminal:
        yield _Lines(what)
        return
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(TextColumn("{task.description}"), *columns, console=console, transient=True) as bar:
        task = bar.add_task("capturing and planning", total=None)

        def wrote(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, description=what)

        yield wrote


class _Lines:
    def __init__(self, what: str) -> None:
        self._what, self._start, self._begun, self._last = what, 0.0, 0, 0.0

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if not self._start:
            self._start, self._begun, self._last = now, done, now
        elif now - self._last >= _EVERY:
            self._last = now
            rate = (done - self._begun) / (now - self._start)
            left = (total - done) / rate if rate else float("inf")
            say().print(
                f"{self._what}: {bytes_in_words(done)} of {bytes_in_words(total)}, "
                f"{bytes_in_words(int(rate))}/s, {left:.0f} s left"
            )
