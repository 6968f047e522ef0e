"""What the benchmarks share: fresh processes, meters for time and memory, side-by-side timing, tables, JSON, plots."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
_MARK = "@@result "


# command line -----------------------------------------------------------------------------------------------------


def parser(name: str, doc: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    out = argparse.ArgumentParser(
        prog=f"python -m benchmarks {name}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    out.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    out.add_argument("--out", type=Path, default=Path("out/benchmarks"), metavar="DIR", help="where the plot goes")
    out.add_argument("--quick", action="store_true", help="small sizes and few repeats: does it run at all")
    out.add_argument("--threads", type=int, default=None, help="threads of torch; the number of cores if not given")
    return out


def threads(options: argparse.Namespace) -> int:
    return int(options.threads or os.cpu_count() or 1)


# where it ran -----------------------------------------------------------------------------------------------------


def environment(thread_count: int | None = None) -> dict[str, Any]:
    """Machine and versions, for the JSON."""
    cpu, memory = platform.processor(), 0
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.partition(":")[2].strip()
                break
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gb": round(memory / 1e9, 1),
        "load": [round(x, 1) for x in os.getloadavg()],
        "threads": thread_count or torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": platform.platform(),
    }


# fresh processes --------------------------------------------------------------------------------------------------


def isolated(
    target: str, arguments: Mapping[str, Any], *, env: Mapping[str, str] | None = None, timeout: float = 1800
) -> dict[str, Any]:
    """Call ``module:function(**arguments)`` in a process of its own; arguments and result are JSON.

    Raises:
        RuntimeError: the process failed; the message has the end of its error output.
    """
    code = "from benchmarks.common import _child; _child()"
    done = subprocess.run(
        [sys.executable, "-c", code, target, json.dumps(dict(arguments))],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **(env or {})},
        timeout=timeout,
        check=False,
    )
    lines = [x for x in done.stdout.splitlines() if x.startswith(_MARK)]
    if done.returncode or not lines:
        raise RuntimeError(f"{target} {dict(arguments)} failed ({done.returncode}):\n{done.stderr[-3000:]}")
    return dict(json.loads(lines[-1].removeprefix(_MARK)))


def _child() -> None:
    target, arguments = sys.argv[1], json.loads(sys.argv[2])
    module, _, function = target.partition(":")
    result = getattr(importlib.import_module(module), function)(**arguments)
    print("\n" + _MARK + json.dumps(result), flush=True)


@contextlib.contextmanager
def fresh_caches() -> Iterator[dict[str, str]]:
    """Environment of a process that finds nothing compiled: an Inductor cache of its own, removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="fxgrow-bench-") as folder:
        yield {
            "TORCHINDUCTOR_CACHE_DIR": folder,
            "TORCHINDUCTOR_FX_GRAPH_CACHE": "0",
            "TORCHINDUCTOR_AUTOGRAD_CACHE": "0",
        }


# revisions -----------------------------------------------------------------------------------------------------


def installed(source: Path, target: Path) -> Path:
    """Lay a tree out as an installed package, of which passes and kernels are folders; returns ``target``."""
    shutil.copytree(source / "fxgrow", target / "fxgrow")
    for name in ("passes", "kernels"):
        shutil.copytree(source / name, target / "fxgrow" / name)
    return target


def checkout(revision: str, folder: Path) -> Path:
    """The files of a revision.

    Raises:
        SystemExit: git knows no such revision.
    """
    done = subprocess.run(
        ["git", "archive", revision, "fxgrow", "passes", "kernels"], cwd=ROOT, capture_output=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"cannot read revision {revision!r}: {done.stderr.decode().strip()}")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        archive.extractall(folder, filter="data")
    return folder


def tree_environment(tree: Path) -> dict[str, str]:
    """Of a process that finds that tree's fxgrow, and not the one in the working directory."""
    return {"PYTHONPATH": f"{tree}{os.pathsep}{ROOT}", "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}


# meters -----------------------------------------------------------------------------------------------------------


def resident() -> int:
    """Bytes of this process in memory now; 0 where the system does not tell."""
    return _status("VmRSS")


def peak() -> int:
    """Most bytes in memory since :func:`reset_peak` (Linux), else since the start."""
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _status(key: str) -> int:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    return 0


class Meter:
    """Wall and CPU seconds (all threads, user and system apart) and peak bytes of what runs inside ``with``."""

    wall = cpu = user = system = 0.0
    before = peak = 0

    def __enter__(self) -> Meter:
        reset_peak()
        self.before = resident()
        self._usage = resource.getrusage(resource.RUSAGE_SELF)
        self._wall = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.wall = time.perf_counter() - self._wall
        usage = resource.getrusage(resource.RUSAGE_SELF)
        self.user, self.system = usage.ru_utime - self._usage.ru_utime, usage.ru_stime - self._usage.ru_stime
        self.cpu = self.user + self.system
        self.peak = peak()

    def figures(self) -> dict[str, float]:
        return {
            "wall": self.wall,
            "cpu": self.cpu,
            "user": self.user,
            "system": self.system,
            "before": self.before,
            "peak": self.peak,
        }


def side_by_side(
    candidates: Mapping[str, Callable[..., Any]],
    repeats: int,
    *,
    warmup: int = 1,
    prepare: Mapping[str, Callable[[], Any]] | None = None,
) -> dict[str, dict[str, list[float]]]:
    """Time candidates round by round in changing order, so that a busy machine disturbs all alike.

    Args:
        prepare: for each candidate, what makes its argument anew before the clock starts; without, they take none.

    Returns:
        name -> {"cpu": seconds of each round, "wall": likewise}.
    """
    names = list(candidates)
    out: dict[str, dict[str, list[float]]] = {n: {"cpu": [], "wall": []} for n in names}
    for _ in range(warmup):
        for n in names:
            candidates[n](*((prepare[n](),) if prepare else ()))
    for r in range(repeats):
        for n in names if r % 2 == 0 else names[::-1]:
            given = (prepare[n](),) if prepare else ()
            cpu, wall = time.process_time(), time.perf_counter()
            candidates[n](*given)
            out[n]["cpu"].append(time.process_time() - cpu)
            out[n]["wall"].append(time.perf_counter() - wall)
    return out


def ratio(a: Sequence[float], b: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of a/b round by round."""
    ratios = [x / y for x, y in zip(a, b, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else (ratios[0],) * 3
    return {"median": middle, "low": low, "high": high}


# results ----------------------------------------------------------------------------------------------------------


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table; the first column is text, the others are right-aligned."""
    from rich.console import Console
    from rich.table import Table

    out = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        out.add_column(column, justify="left" if i == 0 else "right", no_wrap=i > 0)
    for row in rows:
        out.add_row(*[x if isinstance(x, str) else f"{x:.2f}" if isinstance(x, float) else str(x) for x in row])
    width = None if sys.stdout.isatty() else 140
    Console(width=width).print(out)


def verdict(what: str, value: float, bound: float, unit: str = "") -> dict[str, Any]:
    """State a bound and whether it was met."""
    ok = value <= bound
    print(f"{'meets' if ok else 'MISSES'}: {what}: {value:.3g}{unit} (at most {bound:.3g}{unit})")
    return {"what": what, "value": value, "bound": bound, "unit": unit, "met": ok}


def save(path: Path | None, result: Mapping[str, Any]) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(f"figures: {path}")


@contextlib.contextmanager
def figure(folder: Path, name: str, *, columns: int = 1, size: tuple[float, float] = (5.0, 3.6)) -> Iterator[Any]:
    """Axes to draw on (a list of them); saved as ``folder/name.png``."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, columns, figsize=(size[0] * columns, size[1]), squeeze=False)
    yield list(axes[0])
    for ax in axes[0]:
        ax.spines[["top", "right"]].set_visible(False)
    fig.tight_layout()
    folder.mkdir(parents=True, exist_ok=True)
    fig.savefig(folder / f"{name}.png", dpi=130)
    plt.close(fig)
    print(f"plot: {folder / f'{name}.png'}")
