"""``python -m tests.fuzz.without``: does the fuzzer find a fault again when its mend is taken back?

Each entry of :data:`MENDS` undoes one mend of the compiler in this process. The search that follows goes through models
that all have the feature in which it tells (``--anywhere``: through all) and stops at the first finding; the table says
after how many models, and what it was. A mend that is never missed is one that the fuzzer cannot see.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fxgrow.analysis.context import AnalysisContext
from fxgrow.ir import replay
from fxgrow.ir.ops import bound_arguments
from fxgrow.passes import changes
from fxgrow.proof import interpreter, scales, ties
from fxgrow.rules import norm
from fxgrow.rules.base import RULES, moves
from fxgrow.rules.forms import Cast, Structural
from fxgrow.trace import export, modes


def _replace(owner: Any, name: str, new: Any) -> None:
    """Put another function in a place that there is: a name that has moved is not set for nothing."""
    assert hasattr(owner, name), f"{owner.__name__} has no {name} any more"
    setattr(owner, name, new)


def _implied_constants() -> None:
    """A norm without eps is taken to have that of its result's dtype."""

    def implied(node: torch.fx.Node) -> dict[str, float]:
        given = bound_arguments(node).get("eps")
        return {} if given is not None else {"eps": float(torch.finfo(node.meta["val"].dtype).eps)}

    _replace(norm, "implied_arguments", implied)


def _guards() -> None:
    """The conditions of the trace on sizes are dropped."""
    _replace(export, "find_guards", lambda *_: [])


def _whole_numbers() -> None:
    """Sums of whole numbers over copies are multiplied by a fraction."""
    _replace(scales.Scales, "_check_whole", lambda *_: None)
    exact = changes.rescale

    def rescale(*args: Any, **kwargs: Any) -> Any:
        return exact(*args, **kwargs).model_copy(update={"divisor": None})

    for module in list(sys.modules.values()):
        if getattr(module, "rescale", None) is exact:
            module.rescale = rescale  # type: ignore[attr-defined]


def _mode_literals() -> None:
    """Literals that differ between train and eval are all taken to be flags."""
    for module in (modes, replay):
        _replace(module, "is_mode_literal", lambda *_: True)


def _state() -> None:
    """What a call leaves in a buffer is not held against what the next one assumes."""
    _replace(interpreter.Interpreter, "_check_state", lambda _: None)


def _casts() -> None:
    """A parameter seen through any cast is still the parameter."""
    for name, rule in RULES.items():
        if isinstance(rule, Cast):
            RULES[name] = dataclasses.replace(rule, linear=True)


def _scales() -> None:
    """A scale passes through every op that moves elements."""

    def keeps(node: Any) -> bool:
        return moves(node) and isinstance(node.args[0], torch.fx.Node)

    _replace(scales, "_keeps_scale", keeps)


def _ties() -> None:
    """Ops that jump where copies are equal by construction are taken to keep them equal."""
    _replace(ties.Ties, "follow", lambda *_: True)


def _unseen_operands() -> None:
    """Operands that a rule never asked for do not freeze; ``diff``, which looks at all of them now, is as it was."""
    _replace(AnalysisContext, "freeze_unseen", lambda *_: None)
    _replace(interpreter.FollowRule, "take", lambda self, rule: rule.grow(self.context))

    def diff(ctx: Any, dims: Any) -> Any:
        i = ctx.args["dim"] % len(dims)
        ctx.freeze(dims[i], "neighbouring entries are subtracted")
        return [*dims[:i], ctx.opaque(ctx.shape[i], ""), *dims[i + 1 :]]

    RULES["aten.diff.default"] = Structural(diff)


@dataclass(frozen=True)
class Mend:
    """What takes a mend back, and the feature of models in which it tells."""

    undo: Callable[[], None]
    feature: str


MENDS: dict[str, Mend] = {
    "implied constants": Mend(_implied_constants, "casts.computed_coarse"),
    "guards": Mend(_guards, "sizes.guard"),
    "whole numbers": Mend(_whole_numbers, "casts.counts"),
    "ties": Mend(_ties, "indexing.equality"),
    "mode literals": Mend(_mode_literals, "modes.literal"),
    "state": Mend(_state, "state.fast_weight"),
    "casts": Mend(_casts, "casts.weights"),
    "scales": Mend(_scales, "sharing.head"),
    "unseen operands": Mend(_unseen_operands, "indexing.neighbours"),
}


def _search(name: str, options: dict[str, Any], out: Any) -> None:
    from tests.fuzz.__main__ import search

    MENDS[name].undo()
    report = search(**options, stop=True)
    first = report.findings[0] if report.findings else None
    out.send((report.models, report.seconds, None if first is None else (first.kind, first.detail, first.script)))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.without", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "mends", nargs="*", metavar="MEND", help=f"of {', '.join(MENDS)}; all of them where none is named"
    )
    parser.add_argument("--models", type=int, default=300, help="how many models to try at most")
    parser.add_argument("--seconds", type=float, default=None, help="how long to try at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--growths", type=int, default=14, help="growths of each model")
    parser.add_argument("--jobs", type=int, default=2, help="worker processes")
    parser.add_argument(
        "--anywhere", action="store_true", help="random models as they come, not those with the mend's feature"
    )
    parser.add_argument("--json", type=Path, default=None, help="a file for the figures")
    options = parser.parse_args(argv)
    unknown = [m for m in options.mends if m not in MENDS]
    if unknown:
        parser.error(f"no mend {unknown[0]!r}; there are: {', '.join(MENDS)}")
    table = Table("mend taken back", "found after", "seconds", "finding")
    figures = []
    for name in options.mends or MENDS:
        given, pipe = multiprocessing.Pipe(duplex=False)
        search = {k: getattr(options, k) for k in ("models", "seconds", "seed", "growths", "jobs")} | {
            "shrink_for": 20.0,
            "focus": "" if options.anywhere else MENDS[name].feature,
        }
        process = multiprocessing.get_context("fork").Process(target=_search, args=(name, search, pipe))
        start = time.monotonic()
        process.start()
        pipe.close()
        models, seconds, found = given.recv()
        process.join()
        said = f"{found[0]}: {found[1]}" if found else "nothing"
        print(f"{name}: {said} after {models} models, {time.monotonic() - start:.0f} s", flush=True)
        table.add_row(name, f"{models} models" if found else f"not in {models}", f"{seconds:.0f}", said[:80])
        figures.append({"mend": name, "models": models, "seconds": seconds, "found": found})
    Console(width=140).print(table)
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    return int(any(f["found"] is None for f in figures))


if __name__ == "__main__":
    sys.exit(main())
