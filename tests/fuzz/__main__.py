"""``python -m tests.fuzz``: the command."""

from __future__ import annotations

import argparse
import difflib
import functools
import itertools
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from tests.fuzz.calls import OPS
from tests.fuzz.features import FEATURES
from tests.fuzz.report import Report

EPILOG = """\
examples:
  python -m tests.fuzz --models 200 --seed 1              # some 10 minutes on two cores
  python -m tests.fuzz --seconds 1800 --jobs 2 --out out/fuzz --json out/fuzz/report.json
  python -m tests.fuzz --seed 1 --only 117 --verbose      # one model of a run again, its text printed

Each model is made of ops of the rule table and of features (attention, norms, state, guards, casts ...), captured,
grown at random without the receipt, and compared with the small one by a judge of the fuzzer's own. A finding is
shrunk and written as a script that stands alone. docs/testing.md says more. The exit status is 1 if there is a finding.
"""


_FOCI = ("state.average", "indexing.equality", "aten.diff.default", "... (a wrong name lists them)")
#: scripts of findings that look alike, shrunk by one worker; further ones are printed as they are
_ALIKE = 2
_seen: Counter[str] = Counter()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz",
        description="Compose random models, grow them at random, and look for a wrong growth.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--models", type=int, default=None, help="how many models (100, unless --seconds is given)")
    parser.add_argument("--seconds", type=float, default=None, help="stop after this long instead")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other models")
    parser.add_argument("--first", type=int, default=0, help="number of the first model")
    parser.add_argument("--only", type=int, default=None, help="one model, by its number, in this process")
    parser.add_argument("--growths", type=int, default=16, help="growths of each model (capturing it costs most)")
    parser.add_argument("--focus", default="", help="a feature or an op that every model has: " + ", ".join(_FOCI))
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="worker processes")
    parser.add_argument("--timeout", type=float, default=240.0, help="seconds that a model may take")
    parser.add_argument("--shrink", type=float, default=60.0, help="seconds for shrinking a finding; 0: as it is")
    parser.add_argument("--no-database", action="store_true", help="the judge's samples alone, not PyTorch's database")
    parser.add_argument("--out", type=Path, default=None, help="a folder for the scripts of findings")
    parser.add_argument("--json", type=Path, default=None, help="a file for all figures")
    parser.add_argument("--verbose", action="store_true", help="also list ops never reached and reasons")
    options = parser.parse_args(argv)
    if options.focus and options.focus not in {*FEATURES, *OPS}:
        near = difflib.get_close_matches(options.focus, [*FEATURES, *OPS], 5)
        parser.error(f"no feature or op {options.focus!r}; near: {', '.join(near)}; features: {', '.join(FEATURES)}")
    console = Console(highlight=False, soft_wrap=True)
    report = Report(options.seed, options.out)
    if options.only is not None:
        return _one(options, report, console)
    models = options.models if options.models is not None or options.seconds else 100
    report = search(
        seed=options.seed,
        first=options.first,
        models=models,
        seconds=options.seconds,
        growths=options.growths,
        jobs=options.jobs,
        timeout=options.timeout,
        shrink_for=options.shrink,
        database=not options.no_database,
        focus=options.focus,
        out=options.out,
        console=console,
    )
    report.summary(console, options.verbose)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report.figures(), indent=2) + "\n")
    return int(bool(report.findings))


def search(
    *,
    seed: int,
    models: int | None,
    first: int = 0,
    seconds: float | None = None,
    growths: int = 16,
    jobs: int = 1,
    timeout: float = 240.0,
    shrink_for: float = 60.0,
    database: bool = True,
    focus: str = "",
    out: Path | None = None,
    console: Console | None = None,
    stop: bool = False,
) -> Report:
    """Run models in workers; what each does hangs on the seed and its number alone. ``stop``: at the first finding."""
    from tests.fuzz import generate  # noqa: F401  (imported before the fork)
    from tests.fuzz.pool import each

    if database:
        from tests.rules.database import entries

        entries()
    report = Report(seed, out)
    end = time.monotonic() + seconds if seconds else None

    def numbers() -> Iterator[int]:
        for n in itertools.count(first) if models is None else range(first, first + models):
            if end is not None and time.monotonic() > end:
                return
            yield n

    job = functools.partial(
        _job, seed=seed, growths=growths, database=database, focus=focus, shrink_for=shrink_for, timeout=timeout
    )
    said = time.monotonic()
    for number, outcome, problem in each(job, numbers(), jobs, timeout):
        for text in report.add(number, outcome, problem):
            if console is not None:
                console.print(text, markup=False)
        if stop and report.findings:
            break
        if console is not None and time.monotonic() - said > 15:
            said = time.monotonic()
            console.print(report.line())
    return report


def _job(number: int, *, seed: int, growths: int, database: bool, focus: str, shrink_for: float, timeout: float) -> Any:
    from tests.fuzz.script import script
    from tests.fuzz.shrink import shrink
    from tests.fuzz.trial import run

    start = time.monotonic()
    outcome = run(seed, number, growths, database, focus, timeout / 4)
    for n, finding in enumerate(outcome.findings):
        left = timeout * 0.8 - (time.monotonic() - start)
        _seen[finding.kin] += 1
        if shrink_for and left > 0 and _seen[finding.kin] <= _ALIKE:
            outcome.findings[n] = shrink(finding, min(shrink_for, left / (len(outcome.findings) - n)))
    outcome.scripts = [script(f) for f in outcome.findings]
    return outcome


def _one(options: argparse.Namespace, report: Report, console: Console) -> int:
    import torch

    from tests.fuzz.compose import Rejected
    from tests.fuzz.generate import generate

    torch.set_num_threads(1)
    try:
        model = generate(options.seed, options.only, not options.no_database, options.focus)
        console.print(model.definition(), markup=False)
    except Rejected as error:
        console.print(f"nothing composed: {error}", markup=False)
        return 0
    outcome = _job(
        options.only,
        seed=options.seed,
        growths=options.growths,
        database=not options.no_database,
        focus=options.focus,
        shrink_for=options.shrink,
        timeout=options.timeout,
    )
    for text in report.add(options.only, outcome, ""):
        console.print(text, markup=False)
    report.summary(console, options.verbose)
    return int(bool(report.findings))


if __name__ == "__main__":
    sys.exit(main())
