"""What a run has seen: counts, refusals by reason, ops by coverage, findings by kind."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from fxgrow.rules import RULES
from tests.fuzz.calls import OPS


@dataclass
class Found:
    """One finding: what it is, the model it is of, and its script."""

    kind: str
    detail: str
    number: int
    script: str
    after: int  # models that were done when it was found


class Report:
    """Adds up outcomes."""

    def __init__(self, seed: int, out: Path | None = None) -> None:
        self.seed, self.out = seed, out
        self.start = time.monotonic()
        self.models = self.kept = self.exact = self.inputs_refused = self.flickers = 0
        self.discarded: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.ops: set[str] = set()
        self.touched: set[str] = set()
        self.findings: list[Found] = []

    def add(self, number: int, outcome: Any, problem: str) -> Iterator[str]:
        """Count one model; yields what to print of it."""
        self.models += 1
        if outcome is None:
            self.discarded[problem if "signal" not in problem else "crashed"] += 1
            if "signal" in problem:
                yield from self._keep(Found("crash", problem, number, "", self.models))
            return
        if outcome.discarded:
            self.discarded[outcome.discarded] += 1
        else:
            self.kept += 1
        self.exact += outcome.exact
        self.refused.update(outcome.refused)
        self.inputs_refused += outcome.inputs_refused
        self.flickers += outcome.flickers
        self.ops |= outcome.ops & set(RULES)
        self.touched |= outcome.touched & set(RULES)
        for finding, text in zip(outcome.findings, outcome.scripts, strict=True):
            yield from self._keep(Found(finding.kind, finding.detail, number, text, self.models))

    def _keep(self, found: Found) -> Iterator[str]:
        self.findings.append(found)
        yield f"\nFINDING {len(self.findings)} ({found.kind}), model {found.number}: {found.detail}\n{found.script}"
        if self.out is not None:
            self.out.mkdir(parents=True, exist_ok=True)
            path = self.out / f"{found.kind}-{self.seed}-{found.number}-{len(self.findings)}.py"
            path.write_text(
                found.script or f"# {found.detail}; python -m tests.fuzz --seed {self.seed} --only {found.number}\n"
            )

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start

    @property
    def wrong(self) -> list[Found]:
        return [f for f in self.findings if f.kind == "wrong"]

    @property
    def raw(self) -> list[Found]:
        return [f for f in self.findings if f.kind != "wrong"]

    @property
    def growths(self) -> int:
        return self.exact + sum(self.refused.values()) + len(self.findings)

    def line(self) -> str:
        return (
            f"{self.seconds:6.0f} s  {self.models} models ({self.kept} kept)  {self.growths} growths: "
            f"{self.exact} exact, {sum(self.refused.values())} refused, {len(self.wrong)} wrong, {len(self.raw)} raw  "
            f"{len(self.ops)} of {len(OPS) + 1} ops  {self.models / max(self.seconds, 1e-9):.2f} models/s"
        )

    def unreached(self) -> list[str]:
        return sorted({*OPS, "getitem"} - self.ops)

    def summary(self, console: Console, verbose: bool = False) -> None:
        def table(title: str, counts: Counter[str], most: int) -> None:
            console.print(f"\n{title}: {sum(counts.values())}")
            for words, n in counts.most_common(most):
                console.print(f"  {n:5} {words}", markup=False)

        table("models discarded", self.discarded, 200 if verbose else 12)
        table("growths refused", self.refused, 200 if verbose else 12)
        console.print(f"\n{self.line()}")
        console.print(
            f"  {len(self.touched)} of these ops had an operand or a result that grew; {self.inputs_refused} inputs "
            f"refused by grown modules; {self.flickers} differences with few weights only (values at a jump)"
        )
        console.print(f"  ops never reached: {len(self.unreached())}")
        if verbose:
            console.print("  " + " ".join(self.unreached()))
        for kind, n in Counter(f"{f.kind}: {f.detail}" for f in self.findings).most_common():
            console.print(f"  {n} x {kind}", markup=False)

    def figures(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "seconds": round(self.seconds, 1),
            "models": self.models,
            "kept": self.kept,
            "growths": self.growths,
            "exact": self.exact,
            "refused": sum(self.refused.values()),
            "wrong": len(self.wrong),
            "raw": len(self.raw),
            "inputs_refused": self.inputs_refused,
            "flickers": self.flickers,
            "ops": len(self.ops),
            "ops_touched": len(self.touched),
            "ops_of": len(OPS) + 1,
            "discarded_by_reason": dict(self.discarded.most_common()),
            "refused_by_reason": dict(self.refused.most_common()),
            "ops_never_reached": self.unreached(),
            "ops_never_touched": sorted({*OPS, "getitem"} - self.touched),
            "findings": [vars(f) for f in self.findings],
        }
