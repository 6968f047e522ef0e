"""One model: made, captured, grown in several ways, judged. What fails is tried again with other weights."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import re
import time
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import fxgrow
from fxgrow.errors import CaptureError, FxgrowError
from fxgrow.ir.nodes import info_of
from fxgrow.ir.ops import op_name
from tests.fuzz import specs
from tests.fuzz.compose import Rejected
from tests.fuzz.generate import generate
from tests.fuzz.judge import Judge, Probe, compare, copied
from tests.fuzz.text import SIZES, Model

Spec = list[dict[str, Any]]

#: weights of the first try, and those that must agree with it
SEEDS = (1, 2, 3)
#: findings in one model after which it is left
PER_MODEL = 2


@dataclass
class Case:
    """Everything that a finding depends on: the model, its weights, and the growths in a row.

    ``before`` are growths of the same captured program whose results are thrown away; they should change nothing.
    """

    model: Model
    growths: list[Spec]
    seed: int = SEEDS[0]
    before: list[Spec] = field(default_factory=list)


@dataclass
class Finding:
    """A growth that is wrong, or that raises what is no fxgrow error."""

    kind: str  # "wrong", "raw" or "crash"
    detail: str
    case: Case
    probe: Probe | None = None
    number: int = 0
    shrunk: bool = False

    @property
    def kin(self) -> str:
        """What findings that are probably one fault share."""
        return f"{self.kind} {re.sub(r'[-+.0-9e]+', 'N', self.detail)}"

    @property
    def key(self) -> str:
        """What findings of one kind share: the error, without the numbers in it."""
        words = self.detail.partition(":")[0] if self.kind == "raw" else ""
        return f"{self.kind} {words}".strip()


@dataclass
class Outcome:
    """What came of one model."""

    number: int
    discarded: str = ""
    exact: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    inputs_refused: int = 0
    flickers: int = 0  # wrong with some weights only: values at a jump
    ops: set[str] = field(default_factory=set)  # of models that grew
    touched: set[str] = field(default_factory=set)  # ops whose operands or results grew
    findings: list[Finding] = field(default_factory=list)
    seconds: float = 0.0
    scripts: list[str] = field(default_factory=list)


def run(
    seed: int, number: int, growths: int = 16, database: bool = True, focus: str = "", seconds: float = 60.0
) -> Outcome:
    """Make, grow and judge model ``number`` of a seed; no further growth begins after so many seconds."""
    start = time.perf_counter()
    out = Outcome(number)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _run(out, seed, number, growths, database, focus, time.monotonic() + seconds)
    out.seconds = time.perf_counter() - start
    return out


def _run(out: Outcome, seed: int, number: int, growths: int, database: bool, focus: str, end: float) -> None:
    try:
        model = generate(seed, number, database, focus)
        small = model.build(SEEDS[0])
        judge = Judge(model, small)
        out.discarded = judge.usable()
    except Rejected:
        out.discarded = "nothing composed"
    except Exception as error:
        out.discarded = f"does not build: {type(error).__name__}"
    if out.discarded:
        return
    rng = random.Random(f"{seed}/{number}/growths")
    try:
        program = captured(model, small)
        axes = list(program.axes)
    except CaptureError as error:
        out.discarded = f"capture: {_words(error)}"
        return
    except Exception as error:
        out.findings.append(Finding("raw", _raised(error), Case(model, []), number=number))
        return
    if not axes:
        out.discarded = "no axes"
        return
    tried: list[Spec] = []
    for _ in range(growths):
        if len({f.kin for f in out.findings}) + out.flickers >= PER_MODEL or time.monotonic() > end:
            break
        spec = specs.draw(rng, program)
        if spec is None:
            out.discarded = "nothing can grow"
            return
        case = Case(model, [spec], before=list(tried))
        tried.append(spec)
        grown = _grown(out, judge, case, program, number)
        if grown is not None and rng.random() < 0.25:
            try:
                again = specs.draw(rng, grown.program)
            except Exception as error:
                out.findings.append(Finding("raw", _raised(error), case, number=number))
                continue
            if again is not None:
                _grown(out, judge, Case(model, [spec, again], before=case.before), grown.program, number)


def captured(model: Model, module: nn.Module) -> fxgrow.Program:
    """The captured model with an example of each of its calls."""
    values = model.draw(SIZES[0], 0)
    args = tuple(values[n] for n in model.ways()["forward"])
    calls = {name: tuple(values[n] for n in names) for name, names in model.calls.items()}
    return fxgrow.capture(module, args, calls=calls or None, dynamic=model.dynamic)  # type: ignore[arg-type]


def _grown(out: Outcome, judge: Judge, case: Case, program: fxgrow.Program, number: int) -> fxgrow.Growth | None:
    """Grow once more and judge; the growth if it is exact."""
    growth, finding, refusal, refused = attempt(judge, case, program)
    if refusal:
        out.refused[refusal] += 1
    if finding is not None:
        finding.number = number
        finding.case = _alone(case, finding)
        if finding.kind == "wrong" and not confirmed(finding.case, finding):
            out.flickers += 1
            return None
        out.findings.append(finding)
        return None
    if growth is None:
        return None
    out.exact += 1
    out.inputs_refused += refused
    _count(out, growth)
    return growth


def attempt(judge: Judge, case: Case, program: fxgrow.Program) -> tuple[fxgrow.Growth | None, Finding | None, str, int]:
    """The last growth of a case, judged: the growth, what is wrong with it, why it was refused, inputs it refuses."""
    spec = case.growths[-1]
    try:
        growth = fxgrow.grow(program, spec, verify=False)
    except FxgrowError as error:
        return None, None, _words(error), 0
    except Exception as error:
        return None, Finding("raw", _raised(error), case), "", 0
    operations = [op for s in case.growths for op in s]
    extended = any(op["op"] == "extend" for op in operations)
    normed = any(op.get("layer") == "batch_norm" for op in operations)  # exact in eval mode only, as documented
    verdict = judge.judge(growth.module, extended, eval_only=normed)
    if verdict.wrong.startswith("the grown module raises"):
        return None, Finding("raw", "in use: " + verdict.wrong, case, verdict.probe), "", 0
    if verdict.wrong:
        return None, Finding("wrong", verdict.wrong, case, verdict.probe), "", 0
    return growth, None, "", verdict.refused


def check(case: Case) -> Finding | None:
    """A case from its beginning: what is wrong with its last growth, None where nothing is or where it is refused."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = case.model.build(case.seed)
        judge = Judge(case.model, module)
        if judge.usable():
            return None
        try:
            program = captured(case.model, module)
            list(program.axes)
            for spec in case.before:
                with contextlib.suppress(Exception):
                    fxgrow.grow(program, spec, verify=False)
            for spec in case.growths[:-1]:
                program = fxgrow.grow(program, spec, verify=False).program
        except FxgrowError:
            return None
        except Exception as error:
            return Finding("raw", _raised(error), case)
        if not case.growths:
            return None
        return attempt(judge, case, program)[1]


def _alone(case: Case, finding: Finding) -> Case:
    """The case without the growths before it, where it fails without them as well."""
    alone = dataclasses.replace(case, before=[])
    if case.before:
        try:
            found = check(alone)
        except Exception:
            found = None
        if found is None or found.kind != finding.kind:
            return case
    return alone


def confirmed(case: Case, finding: Finding) -> bool:
    """Whether a wrong growth is wrong with most weights, and ``torch.export`` itself agrees with the model."""
    if finding.probe is not None and not exported_agrees(case, finding.probe):
        return False
    found = 1
    for seed in SEEDS[1:]:
        try:
            again = check(dataclasses.replace(case, seed=seed))
        except Exception:
            continue
        found += again is not None and again.kind == "wrong"
    return found >= 2


def exported_agrees(case: Case, probe: Probe) -> bool:
    """Whether the graph that ``torch.export`` makes of the model gives what the model does, where it runs at all."""
    model, module = case.model, case.model.build(case.seed)
    names = model.ways()[probe.call]
    values = model.draw(SIZES[0], 0)
    given = tuple(values[n] for n in names)
    dims = tuple(None if x is None else dict.fromkeys(range(x.dim()), torch.export.Dim.AUTO) for x in given)
    module.train(probe.training)
    try:
        exported = torch.export.export(copied(module), given, dynamic_shapes=dims).module()
        drawn = model.draw(SIZES[probe.sizes], probe.seed, probe.scale)
        inputs = [drawn[n] for n in names]
        theirs = exported(*inputs)
    except Exception:
        return True
    mine = module(*inputs)
    leaves = [torch.utils._pytree.tree_leaves(x) for x in (mine, theirs)]
    return not compare(*leaves, [None] * len(leaves[0]), 1e-6)


def _count(out: Outcome, growth: fxgrow.Growth) -> None:
    for node in growth.program.graph.nodes:
        if node.op != "call_function":
            continue
        name = op_name(node.target)
        out.ops.add(name)
        known = [info_of(n) for n in (node, *node.all_input_nodes)]
        if any(i.sizes is not None or i.result_sizes is not None for i in known):
            out.touched.add(name)


def _words(error: Exception) -> str:
    """A refusal without names and numbers, so that equal reasons count together."""
    text = str(error).strip().splitlines()[0] if str(error).strip() else ""
    text = re.sub(r"operations\.\d+ \(\w+\): ", "", text)
    text = re.sub(r"<fuzz \d+>:\d+", "LINE", text)
    text = re.sub(r"'[^']*'|\bv\d+\b|[\w.]*/\w+(-\d+)?|\bself\.\w+|\b[wbl]\d+(\.\w+)*(:\d+)?", "NAME", text)
    text = re.sub(r"\d+(\.\d+)?(e[-+]\d+)?", "N", text)
    return f"{type(error).__name__}: {text[:110]}"


def _raised(error: Exception) -> str:
    """An error and where it was raised."""
    frames = [
        f for f in traceback.extract_tb(error.__traceback__) if "/fxgrow/" in f.filename or "/passes/" in f.filename
    ]
    last = frames[-1] if frames else traceback.extract_tb(error.__traceback__)[-1]
    place = f"{last.filename.rpartition('/')[2]}, {last.name}"
    text = str(error).strip().splitlines()[0][:160] if str(error).strip() else ""
    return f"{type(error).__name__} in {place}: {text}"
