"""What a start costs: importing fxgrow, and the command line's answers, against ``import torch`` in the same run.

Each start is a fresh process; they take turns, round by round. With ``--base REV`` that revision's starts are measured
among them. ``python -m benchmarks face --base v0.1.0``.
"""

from __future__ import annotations

import compileall
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from benchmarks import common

_COMMAND = "from fxgrow.cli import main; main({!r})"
#: what is measured, and its code; the first two are the yardsticks
STARTS = {
    "Python": "pass",
    "import torch": "import torch",
    "import fxgrow": "import fxgrow",
    "import torch, fxgrow": "import torch, fxgrow",
    "import fxgrow.kernels": "import fxgrow.kernels",
    "from fxgrow import grow": "from fxgrow import grow",
    "--help": _COMMAND.format(["--help"]),
    "grow --help": _COMMAND.format(["grow", "--help"]),
    "--version": _COMMAND.format(["--version"]),
    "schema spec": _COMMAND.format(["schema", "spec"]),
}
YARDSTICK = "import torch"
#: largest CPU time over that of `import torch`
BOUNDS = {"import torch, fxgrow": 1.1, "--help": 0.3}
Samples = dict[str, list[float]]

# The process itself reports, as what its parent would be told of its memory includes the parent's.
_REPORT = """
import sys
try:
{code}
finally:
    import json, resource
    used = resource.getrusage(resource.RUSAGE_SELF)
    peak = 0
    try:
        lines = open("/proc/self/status").read().splitlines()
        peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        peak = used.ru_maxrss * 1024
    found = {{"cpu": used.ru_utime + used.ru_stime, "peak": peak, "torch": float("torch" in sys.modules)}}
    print("@@start " + json.dumps(found), file=sys.stderr)
"""


def start(code: str, environment: Mapping[str, str]) -> dict[str, float]:
    """CPU seconds and peak bytes of a fresh process that runs ``code``, and whether it loaded torch.

    Raises:
        RuntimeError: it reported nothing, or ended with another status than 0 or, for usage, 2.
    """
    text = _REPORT.format(code="\n".join("    " + line for line in code.splitlines()))
    done = subprocess.run(
        [sys.executable, "-c", text],
        capture_output=True,
        text=True,
        cwd=common.ROOT,
        env={**os.environ, **environment},
        timeout=600,
        check=False,
    )
    lines = [x for x in done.stderr.splitlines() if x.startswith("@@start ")]
    if not lines or done.returncode not in (0, 2):
        raise RuntimeError(f"{code!r} failed ({done.returncode}):\n{done.stderr[-3000:]}")
    return dict(json.loads(lines[-1].removeprefix("@@start ")))


def measure(starts: Mapping[str, str], trees: Mapping[str, Path], repeats: int) -> dict[str, dict[str, Samples]]:
    """Every start with the fxgrow of every tree, taking turns.

    Returns:
        Of each tree, of each start, its figures in each round.
    """
    for tree in trees.values():
        compileall.compile_dir(tree, quiet=1)  # as an installer does
    turns = [(tree, name) for tree in trees for name in starts]
    out: dict[str, dict[str, Samples]] = {tree: {name: {} for name in starts} for tree in trees}
    for number in range(repeats):
        for tree, name in turns if number % 2 == 0 else reversed(turns):
            for key, value in start(starts[name], common.tree_environment(trees[tree])).items():
                out[tree][name].setdefault(key, []).append(value)
    return out


def over(found: Mapping[str, Samples], name: str) -> float:
    """CPU time of a start over that of ``import torch``: the median of the rounds' ratios."""
    return common.ratio(found[name]["cpu"], found[YARDSTICK]["cpu"])["median"]


def run(argv: list[str]) -> int:
    """Measure; exit status 1 where a bound is missed."""
    arguments = common.parser("face", __doc__)
    arguments.add_argument("--base", metavar="REV", help="another revision, measured in the same run")
    arguments.add_argument("--repeats", type=int, default=5, help="rounds (5)")
    options = arguments.parse_args(argv)
    repeats = 1 if options.quick else options.repeats
    with tempfile.TemporaryDirectory(prefix="fxgrow-face-") as name:
        folder = Path(name)
        trees = {"here": common.installed(common.ROOT, folder / "here")}
        if options.base:
            trees["base"] = common.installed(common.checkout(options.base, folder / "archive"), folder / "base")
        samples = measure(STARTS, trees, repeats)
    for tree, found in samples.items():
        common.table(
            f"starts, {options.base if tree == 'base' else 'this tree'}",
            ["", "CPU s", f"of {YARDSTICK}", "MB", "loads torch"],
            [
                [
                    *(name, min(figures["cpu"]), over(found, name), f"{min(figures['peak']) / 1e6:.0f}"),
                    "yes" if figures["torch"][0] else "no",
                ]
                for name, figures in found.items()
            ],
        )
    bounds = [
        common.verdict(f"{name} over {YARDSTICK}", over(samples["here"], name), bound) for name, bound in BOUNDS.items()
    ]
    with common.figure(options.out, "face", size=(6.4, 3.6)) as (ax,):
        names = list(STARTS)[::-1]
        for offset, tree in enumerate(trees):
            places = [i + 0.4 * (offset - (len(trees) - 1) / 2) for i in range(len(names))]
            ax.barh(places, [over(samples[tree], n) for n in names], 0.8 / len(trees), label=tree)
        ax.set_yticks(range(len(names)), names, fontsize=8)
        ax.axvline(1.0, color="black", linewidth=0.8)
        ax.set_xlabel(f"CPU time over that of {YARDSTICK}")
        if options.base:
            ax.legend(frameon=False)
    common.save(
        options.json,
        {"environment": common.environment(1), "base": options.base, "samples": samples, "bounds": bounds},
    )
    return 0 if all(b["met"] for b in bounds) or options.quick else 1
