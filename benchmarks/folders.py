"""Which growths make a larger checkpoint of a checkpoint's folder: ``fxgrow.folders.grow_checkpoint``, many families.

Every model is saved by ``save_pretrained``, in shards, in float64, its weights off their initial values; its folder is
grown in the ways that people ask for. What counts as exact: ``from_pretrained`` loads the new folder without a missing,
unexpected or mismatched name, the class computes the old outputs to 1e-10 on two inputs of different sizes, and
generates the tokens it generated, with a cache and without. What counts as refused: an error of fxgrow's own after
which nothing is there that was not there before. All else is an error. At last the settings that the specs came to are
asked for by name, together.

``python -m benchmarks folders gpt2 llama --rows docs/folders-table.json`` replaces the rows of two models.
"""

from __future__ import annotations

import fnmatch
import hashlib
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.families import Example, Maker, perturbed, sources
from benchmarks.families.huggingface import Logits
from benchmarks.living import Wide, spoken
from benchmarks.rows import Table, anonymous, cell, errors_in, first, label, matrix, reasons, versions

LIMIT = 1e-10

#: name of a growth to the roles it widens and the factor
WIDTHS: dict[str, tuple[tuple[str, ...], float]] = {
    "hidden ×2": (("hidden",), 2),
    "heads ×2": (("heads", "kv_heads"), 2),
    "stream ×2": (("residual",), 2),
    "stream by half": (("residual",), 1.5),
    "heads and stream ×2": (("heads", "kv_heads", "residual"), 2),
    "heads and stream by half": (("heads", "kv_heads", "residual"), 1.5),
}
#: those that are asked for where a class refuses one of them alone
TIED = {
    "heads and stream ×2": ("heads ×2", "stream ×2"),
    "heads and stream by half": ("stream by half",),
}
SHARED, DEPTH, WORDS = "KV heads ×2", "one more block", "three more tokens or classes"
SETTINGS = "by settings"
GROWTHS = (*WIDTHS, SHARED, DEPTH, WORDS, SETTINGS)
#: what a checkpoint can be asked for, and the growths that give it: a class may tie two axes
KINDS = {
    "stream": tuple(g for g, (roles, factor) in WIDTHS.items() if "residual" in roles and factor == 2),
    "stream by half": tuple(g for g, (roles, factor) in WIDTHS.items() if "residual" in roles and factor != 2),
    "hidden": ("hidden ×2",),
    "heads": tuple(g for g, (roles, _) in WIDTHS.items() if "heads" in roles),
    "KV heads": (SHARED,),
    "depth": (DEPTH,),
    "vocabulary or classes": (WORDS,),
    "several at a time, by the settings of the config": (SETTINGS,),
}


def growths(program: Any) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The growths of :data:`GROWTHS` that a model has the axes for, as specs."""
    from fxgrow.ir.stacks import stack_name, stacks_of

    names: dict[str, list[str]] = {}
    for info in program.axes:
        if info.growable or info.role == "vocab":
            names.setdefault(info.role, []).append(info.name)
    for name, (roles, factor) in WIDTHS.items():
        asked = [(r, n) for r in roles for n in names.get(r, [])]
        parts = [{"heads", "kv_heads"} & {*roles}, {*roles} - {"heads", "kv_heads"}]
        if all(any(r in names for r in part) for part in parts if part):
            yield name, [{"op": "widen", "axis": n, "factor": factor} for _, n in asked]
    if {"kv_heads", "groups"} <= {a.role for a in program.axes}:
        yield SHARED, [{"op": "widen", "axis": n, "factor": 2, "groups": "share"} for n in names.get("kv_heads", [])]
    stacks = [stack_name(s) for s in stacks_of(program)]
    if stacks:
        yield DEPTH, [{"op": "deepen", "stack": s, "by": 1} for s in stacks]
    words = names.get("vocab") or [i.name for i in program.axes if i.role == "outputs"]
    if words:
        yield WORDS, [{"op": "extend", "axis": n, "by": 3} for n in words]


# one model ---------------------------------------------------------------------------------------------------------


def examine(name: str, source: str, maker: Maker, only: str = "*") -> dict[str, Any]:
    """Everything there is to say of one model, in this process."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    start = time.perf_counter()
    out: dict[str, Any] = {"model": name, "source": source, "axes": [], "versions": versions(source)}
    with tempfile.TemporaryDirectory() as folder:
        try:
            trial = Trial(Path(folder), maker)
        except Exception as error:
            return {**out, "failed": f"{type(error).__name__}: {first(error)}", "seconds": time.perf_counter() - start}
        out["parameters"] = trial.parameters
        rows: dict[str, dict[str, Any]] = {}

        def note(growth: str, **how: Any) -> None:
            if fnmatch.fnmatchcase(growth, only):
                began = time.perf_counter()
                rows[growth] = trial.grow(**how)
                rows[growth]["seconds"] = round(time.perf_counter() - began, 2)

        for growth, operations in trial.asked:
            if any(not exact(rows.get(alone, {})) for alone in TIED.get(growth, [growth])):
                note(growth, operations=operations)
        settings: dict[str, Any] = {}
        for growth in ("heads and stream ×2", "stream ×2", "hidden ×2", DEPTH, WORDS):
            for key, (_, new) in rows.get(growth, {}).get("changed", {}).items():
                settings.setdefault(key, new)
        if settings:
            note(SETTINGS, settings=settings)
        out["axes"] = [{"growth": g, **rows[g]} for g in GROWTHS if g in rows]
    return {**out, "seconds": time.perf_counter() - start}


class Trial:
    """A folder as ``save_pretrained`` makes it, what its model says, and which growths it can be asked for."""

    def __init__(self, folder: Path, maker: Maker) -> None:
        self.folder, self.small = folder, folder / "small"
        torch.manual_seed(0)
        self.example = maker()
        model: Any = perturbed(self.example.model)
        model = model.model if isinstance(model, Logits) else model
        if hasattr(model.config, "use_cache"):
            model.config.use_cache = True  # as it is where nobody says anything
        self.kind = type(model)
        self.parameters = sum(p.numel() for p in model.parameters())
        size = sum(p.nbytes for p in model.parameters())
        model.save_pretrained(self.small, max_shard_size=max(size // 3, 1000))
        self.inputs = [i for i in (self.example.kwargs, self.example.other) if i is not None]
        loaded = self._loaded(self.small)
        self.outputs, self.spoken = self._outputs(loaded), self._spoken(loaded)
        self.asked = list(growths(self._program()))
        self.there = _digests(folder)

    def _program(self) -> Any:
        """The axes, as ``grow_checkpoint`` sees them."""
        from fxgrow.folders.opened import opened

        return opened(self.small).capture()

    def _loaded(self, folder: Path) -> nn.Module:
        how = {"dtype": torch.float64, "output_loading_info": True}
        made, said = self.kind.from_pretrained(folder, **how)  # type: ignore[operator]
        wrong = {k: v for k, v in said.items() if v}
        assert not wrong, f"from_pretrained says {wrong}"
        made.set_experts_implementation("batched_mm")  # the default one has no kernel for float64
        made.eval()
        return made  # type: ignore[no-any-return]

    def _outputs(self, model: nn.Module) -> list[Any]:
        with torch.no_grad(), Wide():
            return [model(**inputs)[0] for inputs in self.inputs]

    def _spoken(self, model: nn.Module) -> dict[str, torch.Tensor] | None:
        with Wide():
            return spoken(model, Example(model, self.example.kwargs))

    def grow(
        self, operations: list[dict[str, Any]] | None = None, settings: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """What one growth comes to: ``grown`` (exact, or why not), figures."""
        if operations is None:
            return self._grown(settings=settings)
        said: dict[str, Any] = {}
        for fill in ("copy", "add"):
            widens = [o for o in operations if o["op"] == "widen"]
            if fill == "add" and (not widens or "groups" in widens[0]):
                continue
            out = self._grown(spec=[{**o, "fill": fill} if o["op"] == "widen" else o for o in operations])
            if exact(out) or out["grown"].startswith("ERROR"):
                return {**out, "fill": fill}
            said = said or out
            if "made from the grown config" in said["grown"]:
                break  # how the new units are filled is no matter then
        return said

    def _grown(self, **how: Any) -> dict[str, Any]:
        from fxgrow.errors import FxgrowError
        from fxgrow.folders import grow_checkpoint

        large = self.folder / "large"
        try:
            done = grow_checkpoint(self.small, out=large, shard_bytes=50_000, **how)
            return {"grown": "exact", "error": self._compared(large), "changed": done.settings}
        except FxgrowError as refusal:
            if _digests(self.folder) != self.there:
                return {"grown": f"ERROR: refused, and something was written: {first(refusal)}"}
            return {"grown": reason(refusal)}
        except Exception as error:
            return {"grown": f"ERROR: {type(error).__name__}: {first(error)}"}
        finally:
            _remove(large)

    def _compared(self, large: Path) -> float:
        """How far the new folder's model is from the old one's.

        Raises:
            AssertionError: too far, or it says other tokens.
        """
        now = _digests(self.folder)
        assert {k: v for k, v in now.items() if not k.startswith("large/")} == self.there, "the old folder has changed"
        assert not [k for k in now if k.startswith("large/") and ".growing" in k]
        model = self._loaded(large)
        assert sum(p.numel() for p in model.parameters()) > self.parameters, "it is no larger"
        error = 0.0
        for old, new in zip(self.outputs, self._outputs(model), strict=True):
            cut = new[..., : old.shape[-1]]
            error = max(error, float((old - cut).abs().max()) / max(1.0, float(old.abs().max())))
        assert error <= LIMIT, f"the outputs differ by {error:.1e}"
        said = self._spoken(model) or {}
        for how, tokens in (self.spoken or {}).items():
            assert torch.equal(said[how], tokens), f"other tokens ({how})"
        return error


def _digests(folder: Path) -> dict[str, str]:
    """Every file below a folder, with a digest of its bytes."""
    return {
        str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in sorted(folder.rglob("*"))
        if f.is_file()
    }


def _remove(folder: Path) -> None:
    import shutil

    for each in folder.parent.iterdir():
        if each.name != "small":
            shutil.rmtree(each, ignore_errors=True)


def reason(refusal: BaseException) -> str:
    """A refusal in one line: what cannot be, and the first literal or line that shows it."""
    lines = [part.strip() for part in str(refusal).strip().splitlines()]
    return " ".join(lines[: 3 if lines[0].endswith(":") else 1])


# the page ----------------------------------------------------------------------------------------------------------


def exact(row: dict[str, Any]) -> bool:
    return row.get("grown") == "exact"


def errors_of(results: list[dict[str, Any]]) -> list[str]:
    """What is neither exact nor refused."""
    return errors_in(results, ("grown",), lambda r, a, _: f"{label(r)}, {a['growth']}")


def kinds_of(results: list[dict[str, Any]], kind: str) -> tuple[int, int]:
    """(families whose folder grows in one of the ways of a kind, families that were asked)."""
    rows = [[a for a in r["axes"] if a["growth"] in KINDS[kind]] for r in results]
    return sum(any(exact(a) for a in row) for row in rows), sum(map(bool, rows))


def share(results: list[dict[str, Any]]) -> tuple[int, int]:
    """(exact growths, growths that were asked for)."""
    rows = [a for r in results for a in r["axes"]]
    return sum(exact(a) for a in rows), len(rows)


def line(result: dict[str, Any]) -> str:
    """What a model's row says, in a line."""
    done, asked = share([result])
    return f"{done} of {asked} exact, {len(errors_of([result]))} errors"


def report(results: list[dict[str, Any]], missing: list[str]) -> str:
    """The table, in Markdown."""
    done, asked = share(results)
    wrong = errors_of(results)
    kinds = [kinds_of(results, kind) for kind in KINDS]
    lines = [
        "# Checkpoints that become larger checkpoints",
        "",
        "Generated by `python -m benchmarks folders`. Small models of transformers, in float64, their weights off",
        "their initial values, saved by `save_pretrained` in shards. Each folder is grown by",
        "`fxgrow.folders.grow_checkpoint` in the ways below.",
        "",
        "- **✓** exact: `from_pretrained` loads the new folder without a missing or unexpected name, its outputs are",
        "  the old ones to 1e-10 on two inputs of different sizes, and `generate` gives the tokens it gave (greedy,",
        "  with a cache and without).",
        "- **r** refused with a reason (below), and nothing was written. **E** neither: an error.",
        "- Empty: the model has no such axes, or, where two axes grow together, each grows alone.",
        "",
        f"**{len(results)} families, {done} of {asked} growths exact, {asked - done - len(wrong)} refused,",
        f"{len(wrong)} errors.** A class that ties two axes (`hidden_size` is the stream, and the heads times their",
        "width) refuses to grow one of them alone, and grows them together: of what a checkpoint can be asked for,",
        f"**{sum(n for n, _ in kinds)} of {sum(n for _, n in kinds)}** is exact in one of the ways below.",
        "",
        *matrix(results, GROWTHS, _sign, missing),
    ]
    lines += ["", "## By what is asked for", "", "| asked | exact | of | share |", "|---|---:|---:|---:|"]
    for kind, (n, of) in zip(KINDS, kinds, strict=True):
        lines += [f"| {kind} | {n} | {of} | {n / of:.0%} |"] if of else []
    floats = [a["error"] for r in results for a in r["axes"] if exact(a)]
    lines += ["", f"The largest difference of an output is {max(floats, default=0.0):.1e}."]
    lines += ["", "## Errors", "", *([f"- {cell(anonymous(e))}" for e in wrong] or ["None."])]
    lines += ["", "## Refused", "", *(_refusals(results) or ["None."]), ""]
    return "\n".join(lines)


def _sign(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    return "✓" if exact(row) else "E" if row["grown"].startswith("ERROR") else "r"


def _refusals(results: list[dict[str, Any]]) -> list[str]:
    return reasons((a["grown"], f"{label(r)} ({a['growth']})") for r in results for a in r["axes"] if _sign(a) == "r")


def run(argv: list[str]) -> int:
    """The command line; returns the exit status: 1 where something is neither exact nor refused."""
    families = {"transformers": sources("checkpoints")["checkpoints"]}
    table = Table("folders", examine, report, line, families, page="folders-table")
    options = table.parser(__doc__)
    options.add_argument("--only", default="*", metavar="GLOB", help="growths, for example 'heads*'")
    parsed = options.parse_args(argv)
    results = table.run(parsed, {"only": parsed.only})
    kinds = Counter(_sign(a) for r in results for a in r["axes"])
    print(", ".join(f"{n} {sign}" for sign, n in kinds.items()))
    failed = [r for r in results if r.get("failed")]
    return 1 if errors_of(results) or failed else 0
