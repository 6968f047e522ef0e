"""Does growing pay? One budget of FLOPs, spent in many ways on real text: loss against FLOPs and against seconds.

Contestants train a small GPT from scratch at its large size, at a small size only, and from small to large by growths
of many kinds (``benchmarks/payoff/contestants.py``). Each is tuned alike: the learning rate by factors of two on the
first seed, until the best is not at the edge; then the other seeds with that one. It does not fit one sitting: finished
runs are kept in ``--rows``, a killed one goes on where it was, and the page is made of what there is.

    python -m benchmarks training --minutes 30          whatever is missing, for half an hour
    python -m benchmarks training scratch --budgets 2   one contestant at twice the budget
    python -m benchmarks training --report-only         the page and the picture
    python -m benchmarks training --scale gpu           GPT-2's size, where there is a GPU
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.payoff import page
from benchmarks.payoff.contestants import BY_NAME, CONTESTANTS, SCALES, Scale, Work, pending


def run(argv: list[str]) -> int:
    """Run what is missing, keep the rows, write the page; 1 where a run failed."""
    parser = common.parser("training", __doc__)
    parser.add_argument("contestants", nargs="*", metavar="NAME", help="; ".join(BY_NAME) + "; all if none")
    parser.add_argument("--scale", choices=sorted(SCALES), default="cpu", help="sizes and budget")
    parser.add_argument("--budgets", type=float, nargs="+", default=[1.0], help="of the scale's budget (default: 1)")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="default: docs/payoff-SCALE.json")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each on one thread")
    parser.add_argument("--minutes", type=float, help="begin no further run after so many")
    parser.add_argument("--seconds", action="store_true", help="measure how long steps take, on a machine left alone")
    parser.add_argument("--report-only", action="store_true", help="run nothing")
    options = parser.parse_args(argv)
    scale = SCALES["quick" if options.quick else options.scale]
    for name in options.contestants:
        if name not in BY_NAME:
            parser.error(f"no contestant {name!r}; they are: {'; '.join(BY_NAME)}")
    file = options.rows or common.ROOT / "docs" / f"payoff-{scale.name}.json"
    kept = json.loads(file.read_text()) if file.exists() else {"environment": {}, "seconds": {}, "rows": {}}

    def keep() -> None:
        rows = ",\n".join(f"{json.dumps(key)}: {json.dumps(row)}" for key, row in sorted(kept["rows"].items()))
        head = ",\n".join(f"{json.dumps(key)}: {json.dumps(kept[key])}" for key in ("environment", "seconds"))
        part = file.with_suffix(".part")
        part.write_text(f'{{\n{head},\n"rows": {{\n{rows}\n}}\n}}\n')
        part.replace(file)

    failed = 0
    if not options.report_only:
        before = kept["environment"].get("cpu", "")
        kept["environment"] = {k: v for k, v in common.environment(1).items() if k not in ("load", "system")}
        if before and kept["environment"]["cpu"] not in before:  # it does not fit one sitting, nor one machine
            kept["environment"]["cpu"] = f"{before}; {kept['environment']['cpu']}"
        elif before:
            kept["environment"]["cpu"] = before
        if options.seconds or not kept["seconds"]:
            kept["seconds"] = common.isolated("benchmarks.training:step_seconds", {"scale": scale.name})
        names = options.contestants or [contestant.name for contestant in CONTESTANTS]
        end = time.monotonic() + 60 * options.minutes if options.minutes is not None else None
        for work, result in carried_out(kept["rows"], scale, names, options, end):
            if isinstance(result, Exception):
                failed += 1
                print(f"{work.key}: FAILED\n{result}", flush=True)
            else:
                kept["rows"][work.key] = result
                print(f"{work.key}: {result['loss']:.4f}", flush=True)
                keep()
        keep()
    page.write(kept, scale, common.ROOT / "docs" if options.rows is None else file.parent)
    return int(failed > 0)


def carried_out(
    rows: dict[str, Any], scale: Scale, names: list[str], options: Any, end: float | None
) -> Iterator[tuple[Work, dict[str, Any] | Exception]]:
    """Every run that is missing, as it ends; ``rows`` is to have it before the next is asked for."""
    folder = str((options.out / "training" / scale.name).resolve())
    locks: dict[tuple[Any, ...], threading.Lock] = {}
    tried: set[Work] = set()
    with ThreadPoolExecutor(options.jobs) as pool:
        running: dict[Future[dict[str, Any]], Work] = {}
        while True:
            late = end is not None and time.monotonic() > end
            for work in () if late else pending(rows, scale, names, options.budgets):
                if len(running) < options.jobs and work not in tried:
                    tried.add(work)
                    # those that share their first part wait for each other
                    start = BY_NAME[work.contestant]
                    lock = locks.setdefault((start.start, start.optimizer, work.rate, work.seed), threading.Lock())
                    running[pool.submit(_isolated, work, scale, folder, lock)] = work
            if not running:
                return
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                work = running.pop(done)
                error = done.exception()
                yield work, done.result() if error is None else RuntimeError(str(error))


def _isolated(work: Work, scale: Scale, folder: str, lock: threading.Lock) -> dict[str, Any]:
    arguments = {"scale": scale.name, "contestant": work.contestant, "rate": work.rate, "seed": work.seed}
    with lock:
        return common.isolated(
            "benchmarks.payoff.work:perform",
            {**arguments, "budget": work.budget, "folder": folder},
            env={"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
            timeout=86_400,
        )


def step_seconds(scale: str) -> dict[str, float]:
    """How long a step takes at each of a scale's sizes, measured in turns; seconds by the size's name."""
    import statistics

    import torch

    from benchmarks.payoff.work import step_of

    torch.set_num_threads(1)
    where = SCALES[scale]
    found = common.side_by_side({n: step_of(where, s) for n, s in where.sizes.items()}, 25, warmup=3)
    key = "cpu" if where.device == "cpu" else "wall"
    return {name: statistics.median(times[key]) for name, times in found.items()}
