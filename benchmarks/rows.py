"""A table of one row a model: each in a fresh process with a time limit, the rows kept as JSON, a page made of them.

``docs/NAME.json`` has the rows and ``docs/NAME.md`` is the page, so that a few models, or an environment with other
libraries, replace their own rows only: ``python -m benchmarks NAME gpt2 --rows docs/NAME.json``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.families import Maker, from_file

ROOT = Path(__file__).resolve().parent.parent
_MARK = "@@row "


def errors_in(
    results: list[dict[str, Any]], what: Sequence[str], named: Callable[[dict[str, Any], dict[str, Any], str], str]
) -> list[str]:
    """What is neither exact nor refused: of the entries ``what`` of every axis, in the words of ``named``."""
    return [
        f"{named(r, a, k)}: {a[k]}"
        for r in results
        for a in r["axes"]
        for k in what
        if str(a.get(k, "")).startswith("ERROR")
    ]


@dataclass
class Table:
    """A benchmark that says something of every model.

    Attributes:
        name: of the benchmark and its page.
        examine: (model, source, its maker, options) to a row, which has ``model``, ``source``, ``axes`` and perhaps
            ``failed`` and ``seconds``; runs in a process of its own.
        report: rows, and notes on libraries that are missing, to the page.
        line: what is printed of a row as soon as it is there.
        sources: as :func:`benchmarks.families.sources` gives them.
        page: file in docs/, where it is not called as the benchmark is.
    """

    name: str
    examine: Callable[..., dict[str, Any]]
    report: Callable[[list[dict[str, Any]], list[str]], str]
    line: Callable[[dict[str, Any]], str]
    sources: Mapping[str, tuple[dict[str, Maker], str]]
    page: str = ""

    def parser(self, doc: str | None) -> argparse.ArgumentParser:
        """The options that every table has."""
        parser = argparse.ArgumentParser(prog=f"python -m benchmarks {self.name}", description=doc)
        parser.add_argument("models", nargs="*", help="names of models, or of the libraries they are from; all if none")
        parser.add_argument("--limit", type=float, default=600.0, help="seconds per model")
        parser.add_argument("--jobs", type=int, default=1, help="models at a time")
        parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
        parser.add_argument("--out", type=Path, metavar="FILE", help="where the table goes")
        parser.add_argument(
            "--source",
            nargs="+",
            default=[],
            metavar="FILE.py:FUNCTION",
            help="models of your own, instead: functions that return a module and the tuple of its example inputs",
        )
        parser.add_argument(
            "--merge",
            type=Path,
            nargs="+",
            default=[],
            metavar="FILE",
            help="earlier --json files, of other environments for instance; what is run now replaces what they say",
        )
        short = f"short for --merge FILE --json FILE --out docs/{self.page or self.name}.md"
        parser.add_argument("--rows", type=Path, metavar="FILE", help=short)
        parser.add_argument("--report-only", action="store_true", help="run nothing: the table of --merge")
        parser.add_argument("--child", nargs=2, metavar=("SOURCE", "MODEL"), help=argparse.SUPPRESS)
        return parser

    def run(self, options: argparse.Namespace, arguments: Mapping[str, str]) -> list[dict[str, Any]]:
        """Examine what the options choose, write rows and page; returns all rows.

        Args:
            options: parsed by :meth:`parser`.
            arguments: further options by name, which ``examine`` takes too.
        """
        if options.child:
            source, name = options.child
            maker = from_file(name) if source == "file" else self.sources[source][0][name]
            row = self.examine(_stem(source, name), source, maker, **arguments)
            print("\n" + _MARK + json.dumps(row))
            raise SystemExit(0)
        page = ROOT / "docs" / f"{self.page or self.name}.md"
        if options.rows:
            options.merge = [*options.merge, *([options.rows] if options.rows.exists() else [])]
            options.json, options.out = options.rows, options.out or page
        chosen = [
            (source, name)
            for source, (table, _) in self.sources.items()
            for name in table
            if not options.models or name in options.models or source in options.models
        ]
        if options.source:
            chosen = [("file", place) for place in options.source]
        rows = {(r["source"], r["model"]): r for file in options.merge for r in json.loads(file.read_text())}

        def one(item: tuple[str, str]) -> dict[str, Any]:
            result = self._in_process(*item, options.limit, arguments)
            what = f"{result.get('failed') or ''} {self.line(result)}, {result.get('seconds', 0):.0f} s"
            print(f"{result['model']:20} {what}", flush=True)
            return result

        def save() -> None:
            if options.json:
                lines = ",\n".join(anonymous(json.dumps(r, ensure_ascii=False)) for r in rows.values())
                options.json.write_text(f"[\n{lines}\n]\n")

        with ThreadPoolExecutor(options.jobs) as pool:
            for result in pool.map(one, [] if options.report_only else chosen):
                rows[result["source"], result["model"]] = result
                save()  # a long run that is cut short keeps what it has
        save()
        results = list(rows.values())
        there = {r["source"] for r in results}
        text = self.report(results, [note for s, (_, note) in self.sources.items() if note and s not in there])
        if options.out:
            options.out.write_text(text)
        elif not options.models and not options.source:
            page.write_text(text)
        else:
            print(text)
        return results

    def _in_process(self, source: str, name: str, limit: float, arguments: Mapping[str, str]) -> dict[str, Any]:
        """``examine`` in a fresh interpreter."""
        command = [sys.executable, "-m", "benchmarks", self.name, "--child", source, name]
        command += [x for key, value in arguments.items() for x in (f"--{key}", value)]
        empty = {"model": _stem(source, name), "source": source, "axes": []}
        start = time.perf_counter()
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit)
        except subprocess.TimeoutExpired:
            return {**empty, "failed": f"not finished in {limit:.0f} s", "seconds": limit}
        for line in done.stdout.splitlines():
            if line.startswith(_MARK):
                return dict(json.loads(line[len(_MARK) :]))
        lines = done.stderr.strip().splitlines()
        failed = lines[-1] if lines else f"ended with status {done.returncode}"
        return {**empty, "failed": failed, "seconds": time.perf_counter() - start}


def _stem(source: str, name: str) -> str:
    """A model from a file is called as the file and the function are; where the file lies is nobody's business."""
    return f"{Path(name.rpartition(':')[0]).stem}:{name.rpartition(':')[2]}" if source == "file" else name


# words ---------------------------------------------------------------------------------------------------------------


def versions(source: str) -> dict[str, str]:
    """What a row was measured with: torch, and the library that the model is from."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"torch": torch.__version__.partition("+")[0]}
    with contextlib.suppress(PackageNotFoundError):  # models of this repository
        found[source] = version(source)
    return found


def environments(results: list[dict[str, Any]]) -> list[str]:
    """One line per library and set of versions, with the number of its rows."""
    groups: Counter[tuple[str, str]] = Counter()
    for r in results:
        known = r.get("versions") or {"torch": "unknown"}
        groups[r["source"], ", ".join(f"{k} {v}" for k, v in known.items())] += 1
    return [f"- {n} models of {source}: {found}" for (source, found), n in groups.items()]


def first(error: BaseException) -> str:
    """The first line of an error's message."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def label(result: dict[str, Any]) -> str:
    """Models of one name from two libraries are told apart."""
    return str(result["model"]) if result["source"] == "plain" else f"{result['source']}/{result['model']}"


def anonymous(text: str) -> str:
    """Without folders of the machine the table was made on."""
    import re

    return re.sub(r"(/[^\s:/\"]+)+/(?=[^\s:/]+\.py)", "", text)


def cell(text: str) -> str:
    """Text that stands in a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("\n", " ")


def matrix(
    results: list[dict[str, Any]],
    growths: Sequence[str],
    sign: Callable[[dict[str, Any] | None], str],
    missing: list[str],
) -> list[str]:
    """The lines of a table with a row a model and a column a growth, and what it was measured with.

    Args:
        sign: of what a row says of a growth; of None where it says nothing.
        missing: what is left out.
    """
    lines = [
        *environments(results),
        "",
        "| model | parameters | " + " | ".join(growths) + " | s |",
        "|---|---:|" + ":-:|" * len(growths) + "---:|",
    ]
    for r in results:
        if r.get("failed"):
            lines.append(f"| {label(r)} | | {cell(anonymous(r['failed']))} |" + " |" * len(growths))
            continue
        rows = {a["growth"]: a for a in r["axes"]}
        signs = [sign(rows.get(g)) for g in growths]
        lines.append(f"| {label(r)} | {r['parameters']:,} | " + " | ".join(signs) + f" | {r['seconds']:.0f} |")
    if missing:
        lines += ["", "Left out: " + "; ".join(missing) + "."]
    return lines


def reasons(said: Iterable[tuple[str, str]]) -> list[str]:
    """The lines of a list of reasons, each with all places that it was given for."""
    found: dict[str, list[str]] = {}
    for reason, place in said:
        found.setdefault(reason, []).append(place)
    return [f"- {', '.join(places)}: {cell(anonymous(reason))}" for reason, places in found.items()]
