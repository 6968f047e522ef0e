"""Every rule judged by the calls of PyTorch's own operator database.

Each entry's sample calls are traced to the ATen overloads that a capture would hold, and every distinct call of an
overload that has a rule goes to the judge (:mod:`fxgrow.testing.judge`). ``python -m tests.rules.opinfo --all`` prints
one line per entry, and the ops without a rule, those first that a rule would let grow.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from fxgrow.ir.ops import op_name
from fxgrow.rules import RULES
from fxgrow.testing.judge import Finding, Sample, check
from tests.rules.database import Entry, entries
from tests.rules.reasons import explained

#: larger tensors are left out: brute force takes all entries of all axes
ELEMENTS = 4096


@dataclass
class Row:
    """What judging one entry of the database found."""

    name: str
    judged: list[str] = field(default_factory=list)  # overloads with a rule, one per distinct call
    accepted: int = 0
    refused: int = 0
    wrong: list[Finding] = field(default_factory=list)
    strict: list[Finding] = field(default_factory=list)  # refusals that no known reason explains
    explained: int = 0
    missing: Counter[str] = field(default_factory=Counter)  # overload without a rule -> axes that could grow
    seconds: float = 0.0
    error: str = ""  # why nothing could be traced


class _Recorder(fx.Interpreter):
    """Runs a traced graph and keeps the arguments of every call of an overload."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if isinstance(target, torch._ops.OpOverload):
            kept = pytree.tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, (args, kwargs))
            self.calls.append((target, *kept))
        return super().call_function(target, args, kwargs)


def trace(function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> fx.GraphModule:
    """The graph of one call before autograd decomposes it: the ops that ``torch.export`` keeps."""
    leaves, spec = pytree.tree_flatten((tuple(args), kwargs))
    at = [i for i, x in enumerate(leaves) if isinstance(x, Tensor)]

    def call(*tensors: Tensor) -> Any:
        filled = list(leaves)
        for i, tensor in zip(at, tensors, strict=True):
            filled[i] = tensor
        a, k = pytree.tree_unflatten(filled, spec)
        return function(*a, **k)

    inputs = [leaves[i].detach().clone() for i in at]
    collecting = gc.isenabled()
    gc.disable()  # collecting an unfinished generator of samples would switch gradients inside the trace
    try:
        return make_fx(call, pre_dispatch=True)(*inputs)
    finally:
        if collecting:
            gc.enable()


def calls(entry: Entry, limit: int | None = None) -> Iterator[tuple[Any, Sample]]:
    """Distinct calls of overloads that the entry's first ``limit`` samples are made of.

    Raises:
        Exception: whatever the entry itself raises when it is traced; the caller says so and goes on.
    """
    for args, kwargs in entry.samples(limit):
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if any(not 0 < x.numel() <= ELEMENTS or x.layout is not torch.strided for x in tensors):
            continue
        module = trace(entry.function, args, kwargs)
        recorder = _Recorder(module)
        recorder.run(*(x.detach().clone() for x in tensors))
        for target, a, k in recorder.calls:
            yield target, Sample(*a, **k)


def extent(sample: Sample) -> int:
    """How many dims a call has that could grow."""
    leaves = pytree.tree_leaves((sample.args, sample.kwargs))
    return sum(n > 1 for x in leaves if isinstance(x, Tensor) for n in x.shape)


def signature(target: Any, sample: Sample) -> str:
    """What tells one call from another: shapes and literals, not values."""

    def one(x: Any) -> Any:
        return (str(x.dtype), *x.shape) if isinstance(x, Tensor) else x

    return repr((op_name(target), pytree.tree_map(one, (sample.args, sample.kwargs))))


def repeatable(target: Any, sample: Sample) -> bool:
    """Whether two calls give the same: what draws at random agrees in expectation only."""

    def run() -> list[Any]:
        args, kwargs = pytree.tree_map(
            lambda x: x.clone() if isinstance(x, Tensor) else x, (sample.args, sample.kwargs)
        )
        return pytree.tree_leaves(target(*args, **kwargs))

    pairs = [(a, b) for a, b in zip(run(), run(), strict=True) if isinstance(a, Tensor)]
    return all(torch.allclose(a, b, equal_nan=True) if a.numel() else True for a, b in pairs)


def passing(target: Any, sample: Sample) -> int:
    """How many dims of its operands an op without a rule would let grow: whole copies go in, and come out as copies.

    Tried are each dim of each tensor by itself, and the dims of all tensors that stand at one place from the right or
    from the left, as a rule would tie them.
    """
    leaves, spec = pytree.tree_flatten((sample.args, sample.kwargs))
    tensors = {i: x for i, x in enumerate(leaves) if isinstance(x, Tensor)}
    single = [{i: d} for i, x in tensors.items() for d in range(x.dim()) if x.shape[d] > 1]
    rank = max((x.dim() for x in tensors.values()), default=0)
    places = [
        {i: d % x.dim() for i, x in tensors.items() if x.dim() and -x.dim() <= d < x.dim()} for d in range(-rank, rank)
    ]
    aligned = [{i: d for i, d in place.items() if tensors[i].shape[d] > 1} for place in places if len(place) > 1]

    def run(grown: dict[int, int]) -> list[Any]:
        filled = [x.clone() if isinstance(x, Tensor) else x for x in leaves]
        for i, d in grown.items():
            filled[i] = filled[i].repeat_interleave(2, d)
        args, kwargs = pytree.tree_unflatten(filled, spec)
        return pytree.tree_leaves(target(*args, **kwargs))

    before, found = run({}), set()
    for grown in (*single, *aligned):
        try:
            after = run(grown)
        except Exception:
            continue  # sizes that do not fit, or a literal that would have to follow
        pairs = [(a, b) for a, b in zip(before, after, strict=False) if isinstance(a, Tensor)]
        grew = len(before) == len(after) and any(a.shape != b.shape for a, b in pairs)
        if grew and all(a.dim() == b.dim() and _repeated(a, b) for a, b in pairs):
            found |= set(grown.items())
    return len(found)


def _repeated(a: Tensor, b: Tensor) -> bool:
    for d, (m, n) in enumerate(zip(a.shape, b.shape, strict=True)):
        a = a.repeat_interleave(2, d) if n == 2 * m else a
    return a.shape == b.shape and bool(torch.allclose(a, b, equal_nan=True))


def judge(entry: Entry, limit: int | None = None, per_overload: int = 4) -> Row:
    """Judge every rule that an entry's samples go through.

    Args:
        entry: of the database.
        limit: how many of its samples to trace; None: all.
        per_overload: how many distinct calls of one overload to judge; those with the most dims come first.
    """
    row, seen, count = Row(entry.name), set[str](), Counter[str]()
    try:
        for target, sample in sorted(calls(entry, limit), key=lambda c: -extent(c[1])):
            name, key = op_name(target), signature(target, sample)
            if key in seen or count[name] >= per_overload:
                continue
            seen.add(key)
            if not repeatable(target, sample):
                continue
            count[name] += 1
            if name not in RULES:
                row.missing[name] = max(row.missing[name], passing(target, sample))
                continue
            report = check(target, [sample])
            row.judged.append(name)
            row.accepted += report.accepted
            row.refused += report.refused
            row.wrong += report.wrong
            row.strict += [f for f in report.strict if not explained(f.detail)]
            row.explained += sum(explained(f.detail) for f in report.strict)
    except Exception as error:
        row.error = f"{type(error).__name__}: {error}".splitlines()[0][:160]
    return row


def survey(names: Iterable[str], limit: int | None, per_overload: int, workers: int = 2) -> Iterator[Row]:
    """Judge entries by name, each in a process of its own: a call that no rule vouches for may crash."""
    entries()  # imported before the fork
    pending, running = list(names)[::-1], dict[str, tuple[Any, Any]]()
    while pending or running:
        while pending and len(running) < workers:
            name = pending.pop()
            mine, theirs = _FORK.Pipe(duplex=False)
            process = _FORK.Process(target=_alone, args=(name, limit, per_overload, theirs))
            process.start()
            theirs.close()
            running[name] = (process, mine)
        ready = wait([pipe for _, pipe in running.values()])
        for name, (process, pipe) in list(running.items()):
            if pipe not in ready:
                continue
            try:
                row = pipe.recv()
            except EOFError:
                process.join()
                row = Row(name, error=f"crashed with signal {-(process.exitcode or 0)}")
            process.join()
            del running[name]
            yield row


_FORK = multiprocessing.get_context("fork")


def _alone(name: str, limit: int | None, per_overload: int, pipe: Any) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    start = time.process_time()
    row = judge(entries()[name], limit, per_overload)
    row.seconds = time.process_time() - start
    pipe.send(row)


def without_rule(rows: Iterable[Row]) -> list[tuple[str, int, list[str]]]:
    """(overload, dims that could grow, entries that need it), those first that a rule would let grow."""
    dims, users = Counter[str](), dict[str, list[str]]()
    for row in rows:
        for name, n in row.missing.items():
            dims[name] = max(dims[name], n)
            users.setdefault(name, []).append(row.name)
    return sorted(((n, dims[n], users[n]) for n in users), key=lambda x: (-bool(x[1]), -len(x[2]), -x[1], x[0]))


def table(rows: Sequence[Row]) -> str:
    """One line per entry: samples judged, growths claimed and declined, wrong, stricter than needed, without a rule."""
    lines = [f"{'entry':48} judged claimed refused wrong stricter (explained)  without rule"]
    for r in rows:
        rest = r.error or ", ".join(sorted(r.missing))
        counts = f"{len(r.judged):6} {r.accepted:7} {r.refused:7} {len(r.wrong):5} {len(r.strict):8} {r.explained:11}"
        lines.append(f"{r.name:48} {counts}  {rest}".rstrip())
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.rules.opinfo", description=__doc__)
    parser.add_argument("entries", nargs="*", help="names of entries, e.g. nn.functional.linear")
    parser.add_argument("--all", action="store_true", help="every entry (4 minutes on two cores)")
    parser.add_argument("--limit", type=int, default=12, help="samples of each entry to trace")
    parser.add_argument("--per-overload", type=int, default=3, help="distinct calls of one overload to judge per entry")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    names = list(entries()) if options.all else options.entries
    if not names or any(n not in entries() for n in names):
        parser.error(f"no such entries: {[n for n in names if n not in entries()]}" if names else "name some, or --all")
    rows = list(survey(names, options.limit, options.per_overload, options.workers))
    rows.sort(key=lambda r: names.index(r.name))
    print(table(rows))
    print("\nwithout a rule: overload, dims that a rule would let grow, entries")
    for name, dims, users in without_rule(rows):
        print(f"  {name:50} {dims}  {', '.join(users[:3])}{' ...' if len(users) > 3 else ''}")
    wrong, strict = ([f for r in rows for f in getattr(r, kind)] for kind in ("wrong", "strict"))
    for title, findings in (("wrong", wrong), ("stricter than needed", strict)):
        print(f"\n{title}: {len(findings)}")
        for finding in findings[:50]:
            print(f"  {finding}")
    judged = sum(len(r.judged) for r in rows)
    claimed = sum(r.accepted for r in rows)
    print(f"\n{len(rows)} entries, {judged} calls judged, {claimed} growths claimed, {len(wrong)} wrong")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
