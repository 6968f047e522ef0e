"""Which growths land in the user's own class: ``growth.apply_`` on models that know nothing of it.

Every model is grown in the ways that people ask for, and each growth that is exact in ``growth.module`` is applied to a
copy of the living model. What counts as landed: the class itself computes the old function, to 1e-10 in float64, on the
example and on inputs of other sizes, its gradients are those of the grown graph, it generates the tokens that it
generated, with a cache and without, and what it saves is loaded by its own class to the same function. What counts as
refused: a ``GrowthRefused``, after which no bit of the model has changed. All else is an error.

``python -m benchmarks landing gpt2 llama --rows docs/landing-table.json`` replaces the rows of two models.
"""

from __future__ import annotations

import copy
import fnmatch
import re
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from benchmarks.families import Example, Maker, perturbed, sources
from benchmarks.living import Wide, differences, picture, reloaded, spoken
from benchmarks.rows import Table, anonymous, cell, errors_in, first, label, matrix, reasons, versions

LIMIT = 1e-10
#: gradients pass through every op twice, and are compared relative to each tensor's largest
GRADIENT_LIMIT = 1e-8

#: a class whose config has no key for what grew says so when it loads; that is for the growth of the config to mend,
#: and no wrong number
UNBUILT = "its config does not build it"
#: nor is one that ``apply_`` has warned of
WARNED = "apply_ warns that it cannot be saved so"
_TELLS = re.compile("its config cannot say so|buffers that its state dict does not")

#: name of a growth to the roles it widens and the factor
WIDTHS: dict[str, tuple[tuple[str, ...], float]] = {
    "hidden ×2": (("hidden",), 2),
    "heads ×2": (("heads", "kv_heads"), 2),
    "stream ×2": (("residual",), 2),
    "stream by half": (("residual",), 1.5),
    "channels ×2": (("channels",), 2),
    "channels by half": (("channels",), 1.5),
    "head width ×2": (("head_dim", "value_dim"), 2),
    "heads and stream ×2": (("heads", "kv_heads", "residual"), 2),
    "head width and stream ×2": (("head_dim", "value_dim", "residual"), 2),
    "heads, stream and hidden ×2": (("heads", "kv_heads", "residual", "hidden"), 2),
    "head width, stream and hidden ×2": (("head_dim", "value_dim", "residual", "hidden"), 2),
}
#: combinations are asked for where a model has every part of them
_PARTS = {"heads": {"heads", "kv_heads"}, "head width": {"head_dim", "value_dim"}}
DEPTH, WORDS = "one more block", "three more tokens or classes"
GROWTHS = (*WIDTHS, DEPTH, WORDS)


def growths(program: Any) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The growths of :data:`GROWTHS` that a model has the axes for, as specs."""
    from fxgrow.ir.stacks import stack_name, stacks_of

    names: dict[str, list[str]] = {}
    for info in program.axes:
        if info.growable or info.role == "vocab":
            names.setdefault(info.role, []).append(info.name)
    for name, (roles, factor) in WIDTHS.items():
        if not all(any(r in names for r in _PARTS.get(part, {part})) for part in _parts(name, roles)):
            continue
        chosen = [(r, n) for r in roles for n in names.get(r, [])]
        if chosen:
            yield name, [{"op": "widen", "axis": n, "factor": factor} for _, n in chosen]
    stacks = [stack_name(s) for s in stacks_of(program)]
    if stacks:
        yield DEPTH, [{"op": "deepen", "stack": s, "by": 1} for s in stacks]
    words = names.get("vocab") or [i.name for i in program.axes if i.role == "outputs"]
    if words:
        yield WORDS, [{"op": "extend", "axis": n, "by": 3} for n in words]


def _parts(name: str, roles: tuple[str, ...]) -> list[str]:
    wanted = [p for p in _PARTS if p in name]
    return [*wanted, *(r for r in roles if not any(r in _PARTS[p] for p in _PARTS))]


# one model ---------------------------------------------------------------------------------------------------------


def examine(name: str, source: str, maker: Maker, only: str = "*") -> dict[str, Any]:
    """Everything there is to say of one model, in this process."""
    import fxgrow

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    start = time.perf_counter()
    out: dict[str, Any] = {"model": name, "source": source, "axes": []}
    torch.manual_seed(0)
    example = maker()
    perturbed(example.model)
    try:
        program = fxgrow.capture(example.model, example.args, example.kwargs, dynamic=example.dynamic)
    except Exception as error:
        return {**out, "failed": f"capture: {first(error)}", "seconds": time.perf_counter() - start}
    trial = Trial(example, program)
    out |= {"versions": versions(source), "parameters": sum(p.numel() for p in example.model.parameters())}
    for growth, operations in growths(program):
        if fnmatch.fnmatchcase(growth, only):
            began = time.perf_counter()
            row = trial.grow(operations)
            out["axes"].append({"growth": growth, **row, "seconds": round(time.perf_counter() - began, 2)})
    return {**out, "seconds": time.perf_counter() - start}


class Trial:
    """A model as it is, and what it says: every growth is held against it."""

    def __init__(self, example: Example, program: Any) -> None:
        self.example, self.program = example, program
        self.inputs = [(example.args, example.kwargs)]
        if example.other is not None:
            self.inputs.append((example.other_args, example.other))
        self.outputs = self._outputs(example.model)
        self.spoken = spoken(copy.deepcopy(example.model), example)
        self.warned: list[str] = []
        try:
            made = reloaded(copy.deepcopy(example.model).eval())
        except Exception:
            made = None
        #: what saving and loading costs without any growth: constants that a config holds in float32
        self.saved = 0.0 if made is None else self._error(made)

    def _outputs(self, model: nn.Module) -> list[Any]:
        model.eval()
        with torch.no_grad(), Wide():
            return [model(*args, **kwargs) for args, kwargs in self.inputs]

    def grow(self, operations: list[dict[str, Any]]) -> dict[str, Any]:
        """What one growth comes to: ``module``, ``landed`` (exact, or why not), figures."""
        from fxgrow.errors import FxgrowError

        model, growth, said = copy.deepcopy(self.example.model), None, ""
        for fill in ("copy", "add"):
            widens = [o for o in operations if o["op"] == "widen"]
            if fill == "add" and not widens:
                continue
            try:
                growth = self._module(model, [{**o, "fill": fill} if o["op"] == "widen" else o for o in operations])
                break
            except FxgrowError as refusal:
                said = said or first(refusal)
            except Exception as error:
                return {"module": f"ERROR: {type(error).__name__}: {first(error)}"}
        if growth is None:
            return {"module": said}
        try:
            return {"module": "exact", "fill": fill, **self._land(growth, model)}
        except Exception as error:
            return {"module": "exact", "fill": fill, "landed": f"ERROR: {type(error).__name__}: {first(error)}"}

    def _module(self, model: nn.Module, operations: list[dict[str, Any]]) -> Any:
        """The growth of a model in a graph of our own; measured here, so that no receipt is needed."""
        import fxgrow
        from fxgrow.errors import ExactnessError

        fxgrow.plan_growth(self.program, fxgrow.GrowthSpec.parse(operations))  # a refusal needs no trace
        example = self.example
        program = fxgrow.capture(model, example.args, example.kwargs, dynamic=example.dynamic)
        growth = fxgrow.grow(program, operations, verify=False)
        error = self._error(growth.module, growth.plan)
        if growth.plan.exactness != "exact" or not error <= LIMIT:
            raise ExactnessError(f"the grown module is {growth.plan.exactness} and differs by {error:.1e}")
        return growth

    def _error(self, model: nn.Module, plan: Any = None) -> float:
        from fxgrow.verify.outputs import relative_errors

        found = zip(self.outputs, self._outputs(model), strict=True)
        return max(e.relative_error for old, new in found for e in relative_errors(old, new, plan))

    def _land(self, growth: Any, model: nn.Module) -> dict[str, Any]:
        from fxgrow.errors import GrowthRefused

        if not hasattr(growth, "apply_"):
            return {"landed": "not yet: a growth has no apply_"}
        before = picture(model)
        try:
            with warnings.catch_warnings(record=True) as given:
                warnings.simplefilter("always")
                growth.apply_(model)
            self.warned = [str(w.message) for w in given if _TELLS.search(str(w.message))]
        except GrowthRefused as refusal:
            changed = differences(before, picture(model))
            if changed:
                return {"landed": f"ERROR: refused, and {', '.join(changed[:3])} changed: {reason(refusal)}"}
            return {"landed": reason(refusal)}
        out: dict[str, Any] = {"error": self._error(model, growth.plan)}
        wrong = [] if out["error"] <= LIMIT else [f"the class differs by {out['error']:.1e}"]
        out["gradients"] = gradient_error(model, growth.module, *self.inputs[0])
        if isinstance(out["gradients"], float) and not out["gradients"] <= GRADIENT_LIMIT:
            wrong.append(f"its gradients differ by {out['gradients']:.1e}")
        for what, check in (("generates", self._speaks), ("saves", self._saves)):
            out[what] = check(model, growth.plan)
            if out[what] not in ("same", None) and not str(out[what]).startswith((UNBUILT, WARNED)):
                wrong.append(f"{what}: {out[what]}")
        return {**out, "landed": "exact" if not wrong else f"ERROR: {'; '.join(wrong)}"}

    def _speaks(self, model: nn.Module, _: Any) -> str | None:
        if self.spoken is None:
            return None
        try:
            now = spoken(model.eval(), self.example) or {}
        except Exception as error:
            return f"{type(error).__name__}: {first(error)}"
        other = [k for k, tokens in self.spoken.items() if not torch.equal(tokens, now[k])]
        return "same" if not other else f"other tokens ({', '.join(other)})"

    def _saves(self, model: nn.Module, plan: Any) -> str | None:
        try:
            made = reloaded(model.eval())
        except Exception as error:
            return f"{UNBUILT}: {first(error)}"
        if made is None:
            return None
        difference = self._error(made, plan)
        if difference <= LIMIT + 2 * self.saved:
            return "same"
        said = f"what its class loads differs by {difference:.1e}"
        return f"{WARNED}: {said}" if self.warned else said


def reason(refusal: BaseException) -> str:
    """A refusal in one line: what cannot be, and the first literal or line that shows it."""
    lines = [part.strip() for part in str(refusal).strip().splitlines()]
    return " ".join(lines[: 3 if lines[0].endswith(":") else 1])


def gradient_error(model: nn.Module, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float | str:
    """How far the class's gradients in train mode are from the grown graph's, relative to each tensor's largest."""
    gradients = []
    for each in (model, module):
        try:
            each.train()
            torch.manual_seed(0)
            for p in each.parameters():
                p.grad = None
            with Wide():
                tensors = [t for t in _tensors(each(*args, **kwargs)) if t.is_floating_point() and t.requires_grad]
                sum(t.square().mean() for t in tensors).backward()
        except Exception as error:
            return f"{type(error).__name__}: {first(error)}"
        finally:
            each.eval()
        gradients.append({n: p.grad for n, p in each.named_parameters() if p.grad is not None})
    ours, theirs = gradients
    if ours.keys() != theirs.keys():
        return f"other parameters have gradients: {', '.join(sorted(ours.keys() ^ theirs.keys())[:3])}"
    most = max((float(g.abs().max()) for g in theirs.values()), default=0.0)
    return max(
        (float((ours[n] - g).abs().max()) / max(float(g.abs().max()), 1e-9 * most, 1e-300) for n, g in theirs.items()),
        default=0.0,
    )


def _tensors(value: Any) -> list[torch.Tensor]:
    from fxgrow.ir.trees import tensors_in

    return tensors_in(value)


# the page ----------------------------------------------------------------------------------------------------------


def exact(row: dict[str, Any], what: str) -> bool:
    return row.get(what) == "exact"


def errors_of(results: list[dict[str, Any]]) -> list[str]:
    """What is neither exact nor refused."""
    return errors_in(results, ("module", "landed"), lambda r, a, what: f"{label(r)}, {a['growth']}, {what}")


#: what a class can be asked for: by which of the growths it is given, alone or with axes that the class ties to it
KINDS = {
    "hidden": tuple(g for g, (roles, _) in WIDTHS.items() if "hidden" in roles),
    "heads": tuple(g for g, (roles, _) in WIDTHS.items() if {"heads", "head_dim"} & {*roles}),
    "stream": tuple(g for g, (roles, _) in WIDTHS.items() if "residual" in roles),
    "channels": tuple(g for g, (roles, _) in WIDTHS.items() if "channels" in roles),
    "depth": (DEPTH,),
    "vocabulary or classes": (WORDS,),
}


def kinds_of(results: list[dict[str, Any]], kind: str) -> tuple[int, int]:
    """(classes that land one of the growths of a kind, classes of which one is exact in ``growth.module``)."""
    rows = [[a for a in r["axes"] if a["growth"] in KINDS[kind] and exact(a, "module")] for r in results]
    return sum(any(exact(a, "landed") for a in row) for row in rows), sum(map(bool, rows))


def share(results: list[dict[str, Any]], growth: str = "*") -> tuple[int, int]:
    """(growths that land, growths that are exact in ``growth.module``)."""
    rows = [a for r in results for a in r["axes"] if fnmatch.fnmatchcase(a["growth"], growth) and exact(a, "module")]
    return sum(exact(a, "landed") for a in rows), len(rows)


def line(result: dict[str, Any]) -> str:
    """What a model's row says, in a line."""
    landed, possible = share([result])
    return f"{landed} of {possible} land, {len(errors_of([result]))} errors"


def report(results: list[dict[str, Any]], missing: list[str]) -> str:
    """The table, in Markdown."""
    landed, possible = share(results)
    kinds = [kinds_of(results, kind) for kind in KINDS]
    lines = [
        "# What lands in the class itself",
        "",
        "Generated by `python -m benchmarks landing`. Models that know nothing of growth, in float64, their weights",
        "and norms off their initial values. Each is grown in the ways below; one that is exact in `growth.module` is",
        "applied to a copy of the living model with `growth.apply_(model)`.",
        "",
        "- **✓** landed: the class itself computes the old function to 1e-10 on two inputs of different sizes, its",
        "  gradients in train mode are those of the grown graph, `generate` gives the tokens it gave (greedy, with a",
        "  cache and without), and `save_pretrained` → `from_pretrained` (or the class built of its config and a",
        "  strict load) gives the same function.",
        "- **r** refused by `apply_`, with a reason (below), and no bit, attribute or hook of the model changed.",
        "- **–** not exact in `growth.module` either. Empty: the model has no such axes.",
        "- **E** neither: an error.",
        "",
        f"**{landed} of {possible}** growths that are exact in `growth.module` land "
        f"({landed / max(possible, 1):.1%}), in {sum(bool(r['axes']) for r in results)} classes.",
        "A class that ties two axes (`n_embd` is the stream, and the heads times their width) refuses to grow one of",
        "them alone, and lands them together: of what a class can be asked for, "
        f"**{sum(n for n, _ in kinds)} of {sum(of for _, of in kinds)}**",
        f"({sum(n for n, _ in kinds) / max(sum(of for _, of in kinds), 1):.1%}) land in one of the ways below.",
        "",
        *matrix(results, GROWTHS, _sign, missing),
    ]
    lines += ["", "## By growth", "", "| growth | land | exact in `growth.module` | share |", "|---|---:|---:|---:|"]
    for g in GROWTHS:
        n, of = share(results, g)
        if of:
            lines.append(f"| {g} | {n} | {of} | {n / of:.0%} |")
    lines += ["", "## By what a class is asked for", "", "| asked | lands | of | share |", "|---|---:|---:|---:|"]
    for kind, (n, of) in zip(KINDS, kinds, strict=True):
        lines += [f"| {kind}, alone or with what the class ties to it | {n} | {of} | {n / of:.0%} |"] if of else []
    done = [a for r in results for a in r["axes"] if exact(a, "landed")]
    lines += ["", "## What was compared", ""]
    lines.append(f"- largest difference of an output: {max((a['error'] for a in done), default=0.0):.1e}")
    floats = [a["gradients"] for a in done if isinstance(a["gradients"], float)]
    lines.append(f"- largest difference of a gradient, in {len(floats)} growths: {max(floats, default=0.0):.1e}")
    for what, text in (("generates", "generate as before"), ("saves", "load what they save")):
        asked = [a[what] for a in done if a.get(what)]
        lines.append(f"- models that {text}: {sum(said == 'same' for said in asked)} of {len(asked)} growths")
        if what == "saves":
            warned = sum(str(said).startswith((UNBUILT, WARNED)) for said in asked)
            lines[-1] += f"; in {warned}, no config of the class makes the grown model, of which `apply_` warns"
    lines += ["", "## Errors", "", *([f"- {cell(anonymous(e))}" for e in errors_of(results)] or ["None."])]
    lines += ["", "## Refused by `apply_`", "", *(_refusals(results, "landed") or ["None."])]
    lines += ["", "## Not exact in `growth.module`", "", *(_refusals(results, "module") or ["None."]), ""]
    return "\n".join(lines)


def _sign(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    if any(str(row.get(what, "")).startswith("ERROR") for what in ("module", "landed")):
        return "E"
    return "–" if not exact(row, "module") else "✓" if exact(row, "landed") else "r"


def _refusals(results: list[dict[str, Any]], what: str) -> list[str]:
    said = [(str(a.get(what) or ""), f"{label(r)} ({a['growth']})") for r in results for a in r["axes"]]
    return reasons((why, where) for why, where in said if why and why != "exact" and not why.startswith("ERROR"))


def run(argv: list[str]) -> int:
    """The command line; returns the exit status: 1 where something is neither exact nor refused."""
    table = Table("landing", examine, report, line, sources("defaults"), page="landing-table")
    options = table.parser(__doc__)
    options.add_argument("--only", default="*", metavar="GLOB", help="growths, for example 'heads*'")
    parsed = options.parse_args(argv)
    results = table.run(parsed, {"only": parsed.only})
    kinds = Counter(_sign(a) for r in results for a in r["axes"])
    print(", ".join(f"{n} {sign}" for sign, n in kinds.items()))
    return 1 if errors_of(results) else 0
