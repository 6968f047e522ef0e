"""Damage files, and see what reads them: ``python -m tests.fuzz_files --files 10000 --seed 0``.

Every kind of file that fxgrow reads is damaged, by structure (values of other types, keys lost or doubled, deep
nesting, parts of other places) or by bytes (flips, cuts, repeats), and read. What is right: an fxgrow error, or a
result, as not all damage matters. What is wrong: any other exception, a death of the process, a file that takes longer
than ``--limit`` seconds of processor time or a GiB of memory. The files are the same for the same seed, and each
failure prints the number that makes it again: ``--only N``.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

import fxgrow
from fxgrow import training
from fxgrow.checkpoint import load_weights
from fxgrow.errors import FxgrowError
from fxgrow.ir.serialize import graph_from_json
from fxgrow.plan import GrowthPlan
from fxgrow.schedule import Schedule
from fxgrow.scheduler import GrowthScheduler
from fxgrow.spec import GrowthSpec

SPEC: dict[str, Any] = {
    "version": 1,
    "operations": [
        {
            "op": "widen",
            "axis": "*/hidden",
            "factor": 2,
            "noise": {"kind": "antisymmetric", "scale": 1e-3, "seed": 3},
            "preserve": "exact",
        },
        {"op": "widen", "axis": "./residual", "to": 48, "fill": "add", "fan_out": "paired"},
        {"op": "deepen", "stack": "h", "after": [0, 1], "order": "append"},
        {"op": "extend", "axis": "*/vocab", "by": 7, "init": "zero"},
        {"op": "insert", "layer": "conv", "after": "features.*", "kernel_size": 5, "bias": False},
    ],
}
SCHEDULE: dict[str, Any] = {
    "version": 2,
    "events": [
        {
            "name": "wider",
            "trigger": {"step": 200},
            "operations": [
                *SPEC["operations"][:2],
                {"op": "learning_rate", "rewarm": 50, "from": 0.2},
                {"op": "accumulation", "factor": 2, "learning_rate": "sqrt"},
                {"op": "dropout", "p": 0.1, "modules": "h.*"},
            ],
            "optimizer": {"policy": "asymmetric", "warmup": 100},
            "on_error": "skip",
        },
        {"trigger": {"plateau": {"metric": "val_loss", "patience": 3}}, "operations": SPEC["operations"][2:]},
        {
            "trigger": {"epoch": 2.5},
            "operations": [*SPEC["operations"][:1], {"op": "widen_mlp", "value": 2}],
        },
    ],
}

# seeds ----------------------------------------------------------------------------------------------------------------


class Model(nn.Module):
    """Blocks, a tie, buffers of both kinds, a nested result: what a manifest can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.h = nn.ModuleList(
            [nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4)) for _ in "ab"]
        )
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("kept", torch.ones(4))
        self.register_buffer("hidden", torch.arange(4.0), persistent=False)

    def forward(self, tokens: torch.Tensor, scale: float = 1.0) -> dict[str, Any]:
        x = self.embed(tokens) * scale
        for block in self.h:
            x = x + block(x)
        return {"logits": self.head(x * self.kept + self.hidden), "size": tokens.shape[1]}


def task() -> training.Task:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))

    def batch(split: str, generator: torch.Generator) -> tuple[Any, ...]:
        return (torch.randn(2, 4, generator=generator),)

    made: dict[str, Any] = {"name": "fuzz", "model": model, "batches": batch, "hyper": training.Hyper(steps=2)}
    return training.Task(**made)


def run_of(folder: Path) -> training.Run:
    """A fresh run, whose optimizer has stepped once where it is to be saved."""
    made = task()
    optimizer = torch.optim.AdamW(made.model.parameters(), lr=1e-3)
    return training.Run(made, folder, made.model, optimizer, GrowthScheduler([SCHEDULE["events"][0]]))


class Seeds:
    """Good files of every kind."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.folder = folder
        spec = [{"op": "widen", "axis": "h.0.1.weight:0", "by": 3}, {"op": "deepen", "stack": "h", "factor": 2}]
        self.growth = fxgrow.grow(Model(), spec, (torch.randint(7, (2, 5)),), {"scale": 2.0}, verify=False)
        self.checkpoint = fxgrow.save(self.growth, folder / "checkpoint")
        self.weights = folder / "weights.safetensors"
        shutil.copy(self.checkpoint / "model.safetensors", self.weights)
        self.plan: dict[str, Any] = json.loads(self.growth.plan.to_json())
        self.manifest: dict[str, Any] = json.loads((self.checkpoint / "manifest.json").read_text())
        scheduler = GrowthScheduler(SCHEDULE)
        wider = Schedule.parse(SCHEDULE).events[0]
        self.state = scheduler.state_dict() | {
            "done": [{"event": wider.to_dict(), "steps": [200, 200], "errors": {}, "rates": {}}]
        }
        run = run_of(folder / "run")
        run.out.mkdir()
        run.model(torch.randn(2, 4)).sum().backward()
        run.optimizer.step()
        self.training = training.save(run)


# damage ---------------------------------------------------------------------------------------------------------------


def odd_value(rng: random.Random) -> Any:
    """Something that is not what is expected."""
    depth = rng.choice([3, 30, 70, 400])
    nested: Any = 1
    for _ in range(depth):
        nested = [nested] if rng.random() < 0.5 else {"a": nested}
    return rng.choice(
        [
            *(None, True, False, 0, -1, 1, 7, 2**31, 2**63, -(2**63) - 1, 10**30, 10**400, 0.5, -0.5, 1e308, 1e-320),
            *(float("nan"), float("inf"), float("-inf"), "", "x", "0", "nan", "inf", "../../etc/passwd", "/etc/passwd"),
            *(
                "a" * 3000,
                "\0",
                "\u0000\uffff",
                "é\u202e",
                "__class__",
                "h.0.1.weight",
                "x]+print(1)#",
                "s0*2",
                "9" * 5000,
            ),
            *([], {}, [[]], [None], {"": None}, {"node": "x"}, {"tensor": "input.0"}, {"tuple": []}, nested),
            *(
                "x**9**9**9",
                "Max(s0, 1)",
                "aten.add.Tensor",
                "float32",
                "torch.float32",
                "parameter",
                "widen",
                "-" * 200 + "1",
            ),
        ]
    )


CHANGES = ["odd", "odd", "lose", "near", "near", "other", "double", "rename", "extra", "wrap", "swap"]
BYTES = ["flip", "flip", "cut", "lose", "repeat", "insert", "zero", "open", "mark", "number", "quote"]
FOLDER = ["lose", "empty", "folder", "link", "loop", "dangling", "pipe", "exchange", "copy", "versioned"]
MARKS = [b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff", b"\0", b"%YAML 9.9\n---\n", b"---\n---\n"]
QUOTES = [b"'", b'"', b"&a ", b"*a ", b"!!python/object ", b"!!binary ", b"<<: ", b"#", b"\\ud800"]
Place = tuple[Any, Any]


def places(value: Any, most: int = 4000) -> list[Place]:
    """Every (container, key) of nested data."""
    found: list[Place] = []
    stack = [value]
    while stack and len(found) < most:
        at = stack.pop()
        keys = list(at) if isinstance(at, dict) else range(len(at)) if isinstance(at, list) else ()
        for key in keys:
            found.append((at, key))
            if isinstance(at[key], dict | list):
                stack.append(at[key])
    return found


def mutate(value: Any, rng: random.Random) -> Any:
    """A copy of nested data with one to four changes."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        found = places(value)
        if not found:
            return odd_value(rng)
        # by depth first, so that the few places near the top are changed as often as the many at the bottom
        at, key = rng.choice(found) if rng.random() < 0.7 else rng.choice(found[: 1 + len(found) // 20])
        change = rng.choice(
            ["odd", "odd", "lose", "near", "near", "other", "double", "rename", "extra", "wrap", "swap"]
        )
        now = at[key]
        if change == "odd":
            at[key] = odd_value(rng)
        elif change == "lose":
            del at[key]
        elif change == "near":
            at[key] = near(now, rng)
        elif change == "other":
            from_, which = rng.choice(found)
            with_ = from_[which] if (which in from_ if isinstance(from_, dict) else which < len(from_)) else None
            at[key] = copy.deepcopy(with_)
        elif change == "double" and isinstance(at, list):
            at.insert(key, copy.deepcopy(now))
        elif change == "rename" and isinstance(at, dict):
            at[str(near(key, rng))[:200] if rng.random() < 0.7 else str(odd_value(rng))[:200]] = at.pop(key)
        elif change == "extra":
            if isinstance(now, dict):
                now[str(odd_value(rng))[:100]] = odd_value(rng)
            elif isinstance(now, list):
                now.append(odd_value(rng))
        elif change == "wrap":
            at[key] = rng.choice([[now], {"tuple": now}, {"a": now}, str(now)[:1000]])
        elif change == "swap":
            other, which = rng.choice(found)
            if which in other if isinstance(other, dict) else which < len(other):
                at[key], other[which] = copy.deepcopy(other[which]), copy.deepcopy(now)
    return value


def near(value: Any, rng: random.Random) -> Any:
    """A value of the same type, a little or much off."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int):
        return rng.choice(
            [value + 1, value - 1, -value, value * 10**6, value * 10**12, value + 0.5, str(value), value << 40]
        )
    if isinstance(value, float):
        return rng.choice([-value, value * 1e30, value * 1e-30, int(value) if abs(value) < 1e300 else 0, str(value)])
    if isinstance(value, str):
        if not value:
            return "."
        i = rng.randrange(len(value))
        return rng.choice(
            [
                value[:i] + value[i + 1 :],
                value[:i] + rng.choice(".0:/*\"'\\\n _-A9é") + value[i:],
                value[::-1],
                value + value,
                value.upper(),
                value[:i],
            ]
        )
    if isinstance(value, list):
        return rng.choice(
            [value[::-1], value * 2, value[:-1], value[1:], [value], value * 500 if len(value) < 5 else []]
        )
    return dict(list(value.items())[1:])


def damage(data: bytes, rng: random.Random) -> bytes:
    """Bytes changed in one to three places."""
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 3])):
        n = len(out)
        i, j = sorted((rng.randrange(n + 1), rng.randrange(n + 1)))
        if rng.random() < 0.5:  # most of what matters stands at the start of a file
            i, j = i % min(n + 1, 400), min(j % min(n + 1, 400) + 1, n)
            i, j = min(i, j), max(i, j)
        kind = rng.choice(
            ["flip", "flip", "cut", "lose", "repeat", "insert", "zero", "open", "mark", "number", "quote"]
        )
        if kind == "flip" and n:
            out[rng.randrange(n)] ^= 1 << rng.randrange(8)
        elif kind == "cut":
            del out[i:]
        elif kind == "lose":
            del out[i : min(j, i + rng.choice([1, 4, 100, n]))]
        elif kind == "repeat":
            out[i:i] = out[i:j] * rng.choice([1, 3])
        elif kind == "insert":
            out[i:i] = rng.randbytes(rng.choice([1, 3, 50]))
        elif kind == "zero":
            out[i : min(j, i + 64)] = bytes(min(j, i + 64) - i)
        elif kind == "open":
            out[i:i] = rng.choice([b"[", b"{", b'{"a":', b"- ", b"[[", b"? "]) * rng.choice([1, 30, 2000])
        elif kind == "mark":
            out[0:0] = rng.choice(
                [b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff", b"\0", b"%YAML 9.9\n---\n", b"---\n---\n"]
            )
        elif kind == "number":
            out[i:i] = rng.choice([b"9" * 5000, b"1e999", b"-", b"0x", b"NaN", b"1" * 30, b"_", b"1:60:60"])
        elif kind == "quote":
            out[i:i] = rng.choice(
                [b"'", b'"', b"&a ", b"*a ", b"!!python/object ", b"!!binary ", b"<<: ", b"#", b"\\ud800"]
            )
        if len(out) > 1 << 21:
            del out[1 << 21 :]
    return bytes(out)


def tensors_damaged(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file whose header says something else, or whose bytes are damaged."""
    if rng.random() < 0.4:
        return damage(data, rng)
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    text = json.dumps(mutate(header, rng)).encode()
    text += b" " * (-len(text) % 8)
    size = len(text) if rng.random() < 0.85 else rng.choice([0, 1, length, 2**20, 2**31, 2**63, 2**64 - 1])
    body = data[8 + length :]
    if rng.random() < 0.15:
        body = rng.choice([body[:-4], body + b"1234", b"", body * 2])
    return struct.pack("<Q", size) + text + body


# kinds ----------------------------------------------------------------------------------------------------------------


def text_of(data: Any, rng: random.Random) -> bytes:
    """Mutated data as YAML or JSON, or as text that is damaged."""
    if rng.random() < 0.35:
        written = yaml.safe_dump(data, sort_keys=False) if rng.random() < 0.5 else json.dumps(data)
        return damage(written.encode(), rng)
    changed = mutate(data, rng)
    try:
        written = yaml.safe_dump(changed, sort_keys=False) if rng.random() < 0.5 else json.dumps(changed)
    except (RecursionError, yaml.YAMLError, ValueError):
        written = str(data)
    return written.encode("utf-8", "surrogatepass")


def json_of(data: Any, rng: random.Random) -> bytes:
    if rng.random() < 0.35:
        return damage(json.dumps(data).encode(), rng)
    try:
        return json.dumps(mutate(data, rng)).encode()
    except (RecursionError, ValueError):
        return b"[" * 3000


Kind = Callable[[Seeds, random.Random, Path], Any]


def spec_text(seeds: Seeds, rng: random.Random, folder: Path) -> Any:
    text = text_of(SPEC, rng).decode("utf-8", "replace")
    return GrowthSpec.parse(text).to_yaml()


def spec_file(seeds: Seeds, rng: random.Random, folder: Path) -> Any:
    path = folder / rng.choice(["spec.yaml", "spec.json", "spec.yml"])
    path.write_bytes(text_of(SPEC, rng))
    return GrowthSpec.parse(path if rng.random() < 0.5 else str(path)).to_dict()


def spec_python(seeds: Seeds, rng: random.Random, folder: Path) -> Any:
    data = mutate(SPEC, rng)
    if rng.random() < 0.5:
        return GrowthSpec.parse(data).to_dict()
    return GrowthSpec(operations=data.get("operations") if isinstance(data, dict) else data).to_dict()


def schedule_file(seeds: Seeds, rng: random.Random, folder: Path) -> Any:
    path = folder / rng.choice(["schedule.yaml", "schedule.json"])
    path.write_bytes(text_of(SCHEDULE, rng))
    return Schedule.parse(path).to_yaml()


def schedule_state(seeds: Seeds, rng: random.Random, folder: Path) -> Any:
    scheduler = GrowthScheduler(SCHEDULE)
    scheduler.load_state_dict(mutate(seeds.state, rng))
    return scheduler.state_dict()


def plan_json(seeds: Seeds, rng: random.Random, folder: Path) -> Any:
    return GrowthPlan.from_json(json_of(seeds.plan, rng).decode("utf-8", "replace")).to_json()


def graph_json(seeds: Seeds, rng: random.Random, folder: Path) -> Any:
    entries = mutate(seeds.manifest["graph"], rng)
    return str(graph_from_json(entries))


def manifest(seeds: Seeds, rng: random.Random, folder: Path) -> Any:
    path = Path(shutil.copytree(seeds.checkpoint, folder / "checkpoint"))
    (path / "manifest.json").write_bytes(json_of(seeds.manifest, rng))
    return fxgrow.load(path).module.code


def model_tensors(seeds: Seeds, rng: random.Random, folder: Path) -> Any:
    path = Path(shutil.copytree(seeds.checkpoint, folder / "checkpoint"))
    name = rng.choice(["model.safetensors", "examples.safetensors"])
    (path / name).write_bytes(tensors_damaged((path / name).read_bytes(), rng))
    return fxgrow.load(path).module.code


def weights(seeds: Seeds, rng: random.Random, folder: Path) -> Any:
    path = folder / "weights.safetensors"
    path.write_bytes(tensors_damaged(seeds.weights.read_bytes(), rng))
    module = copy.deepcopy(seeds.growth.module)
    return load_weights(module, path)


def taken_away(target: Path) -> bytes:
    """Remove a file, a link or a folder, and return what the file held."""
    if target.is_dir() and not target.is_symlink():
        shutil.rmtree(target)
    held = target.read_bytes() if target.is_file() else b""
    target.unlink(missing_ok=True)
    return held


def stood_in(target: Path, what: str, source: Path) -> bool:
    """Put something that is no such file in a file's place; whether ``what`` is one of these things.

    Args:
        source: what a link leads to.
    """
    if what == "empty":
        target.touch()
    elif what == "folder":
        target.mkdir()
    elif what == "link":
        target.symlink_to(source)
    elif what == "loop":
        target.symlink_to(target.name)
    elif what == "dangling":
        target.symlink_to("/nowhere/" + target.name)
    elif what == "pipe":
        os.mkfifo(target)
    else:
        return False
    return True


def whole_folder(seeds: Seeds, rng: random.Random, folder: Path) -> Any:
    """Files lost, exchanged, turned into folders, links and pipes; then loaded, and saved over."""
    path = Path(shutil.copytree(seeds.checkpoint, folder / "checkpoint"))
    names = ["manifest.json", "model.safetensors", "examples.safetensors"]
    for _ in range(rng.choice([1, 1, 2])):
        name, other = rng.choice(names), rng.choice(names)
        target = path / name
        change = rng.choice(FOLDER)
        held = taken_away(target)
        if stood_in(target, change, seeds.checkpoint / other):
            continue
        if change == "exchange" and (path / other).is_file():
            target.write_bytes((path / other).read_bytes())
            (path / other).unlink()  # it may be a link to the seed
            (path / other).write_bytes(held)
        elif change == "copy":
            target.write_bytes((seeds.checkpoint / other).read_bytes())
        elif change == "versioned":
            stem, _, suffix = name.partition(".")
            (path / f"{stem}-{seeds.manifest['saved']}.{suffix}").write_bytes(damage(held, rng))
    try:
        return fxgrow.load(path).module.code
    finally:
        if rng.random() < 0.3:
            try:
                fxgrow.save(seeds.growth, path)
            except FxgrowError:
                pass
            else:
                fxgrow.load(path)


def training_run(seeds: Seeds, rng: random.Random, folder: Path) -> Any:
    run = run_of(folder / "run")
    shutil.copytree(seeds.training.parent, folder / "run" / "checkpoints")
    path = folder / "run" / "checkpoints" / seeds.training.name
    what = rng.choice(["state", "state", "optimizer", "optimizer", "model", "latest", "lose"])
    if what == "state":
        file = path / "state.json"
        file.write_bytes(json_of(json.loads(file.read_text()), rng))
    elif what in ("optimizer", "model"):
        file = path / f"{what}.safetensors"
        file.write_bytes(tensors_damaged(file.read_bytes(), rng))
    elif what == "latest":
        file = folder / "run" / "checkpoints" / "latest"
        file.write_bytes(rng.choice([b"", b"..", b"/etc", b"\0", b"step-1.0", damage(file.read_bytes(), rng)]))
    else:
        (path / rng.choice(["state.json", "optimizer.safetensors", "model.safetensors"])).unlink()
    training.restore(run)
    run.model(torch.randn(2, 4)).sum().backward()
    run.optimizer.step()  # what was restored is a state that steps
    return run.step


KINDS: dict[str, Kind] = {
    f.__name__: f
    for f in (
        *(spec_text, spec_file, spec_python, schedule_file, schedule_state, plan_json, graph_json, manifest),
        *(model_tensors, weights, whole_folder, training_run),
    )
}


# running --------------------------------------------------------------------------------------------------------------


class TooSlow(BaseException):
    """A file took longer than the limit."""


@dataclass
class Result:
    """What came of the files, and the largest memory of a process that read them."""

    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    peak: int = 0
    slowest: float = 0.0


def one(seeds: Any, seed: int, number: int, limit: float, kind: str, read: Kind) -> tuple[str, str]:
    """Read one damaged file: its kind, and ``ok``, ``refused`` or what went wrong."""
    rng = random.Random(f"{seed}-{number}")
    folder = Path(tempfile.mkdtemp(dir=seeds.folder))

    def stop(*_: Any) -> None:
        raise TooSlow

    signal.signal(signal.SIGPROF, stop)
    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_PROF, limit)
    signal.setitimer(signal.ITIMER_REAL, 30 * limit)  # a pipe that nobody writes to takes no processor time
    try:
        read(seeds, rng, folder)
        return kind, "ok"
    except FxgrowError as error:
        return kind, "refused" if str(error).strip() else "an error without words"
    except TooSlow:
        return kind, f"took longer than {limit:g} s"
    except BaseException as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return kind, f"{type(error).__name__}: {str(error)[:200]} at {place.filename}:{place.lineno}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        shutil.rmtree(folder, ignore_errors=True)


def run(
    files: int,
    seed: int,
    *,
    limit: float = 20.0,
    only: int | None = None,
    verbose: bool = False,
    kinds: dict[str, Kind] | None = None,
    good: Callable[[Path], Any] | None = None,
    turns: Sequence[str] = (),
) -> Result:
    """Read so many damaged files, in processes of their own, so that one that dies is one failure.

    Args:
        kinds: by name, each of which damages a file and reads it; those of fxgrow's own files if None.
        good: makes what they damage.
        turns: their names in the order in which they come again and again; each once if none.
    """
    kinds = KINDS if kinds is None else kinds
    turns = list(turns or kinds)
    torch.set_num_threads(1)
    result = Result()
    with tempfile.TemporaryDirectory(prefix="fxgrow-fuzz-") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seeds = (good or Seeds)(Path(folder))
        number, last = (only, only + 1) if only is not None else (0, files)
        while number < last:
            reading, writing = os.pipe()
            process = os.fork()
            if process == 0:
                os.close(reading)
                base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # not what the parent once had
                try:
                    for n in range(number, last):
                        start = time.process_time()
                        kind, what = one(seeds, seed, n, limit, turns[n % len(turns)], kinds[turns[n % len(turns)]])
                        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                        if peak - base > 1 << 20:
                            what = f"took {(peak - base) >> 10} MiB ({what})"
                        line = json.dumps([n, kind, what, time.process_time() - start, peak])
                        os.write(writing, line.encode() + b"\n")
                        if peak - base > 1 << 20:
                            break  # a fresh process for the next
                finally:
                    os._exit(0)
            os.close(writing)
            with os.fdopen(reading, encoding="utf-8") as lines:
                for line in lines:
                    n, kind, what, seconds, peak = json.loads(line)
                    number = n + 1
                    result.peak, result.slowest = max(result.peak, peak << 10), max(result.slowest, seconds)
                    right = what in ("ok", "refused")
                    result.outcomes[f"{kind} {what}" if right else f"{kind} failed"] += 1
                    if verbose and seconds > 3:
                        print(f"--seed {seed} --only {n}: {kind} took {seconds:.1f} s ({what})", flush=True)
                    if not right:
                        result.failures.append(f"{kind} {n}: {what}")
                        if verbose:
                            print(f"--seed {seed} --only {n}: {kind}: {what}", flush=True)
            status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
            if status:
                result.failures.append(f"{turns[number % len(turns)]} {number}: the process died ({status})")
                if verbose:
                    print(f"--seed {seed} --only {number}: {result.failures[-1]}", flush=True)
                number += 1
    return result


def main(kinds: dict[str, Kind], good: Callable[[Path], Any], words: str | None, turns: Sequence[str] = ()) -> int:
    """The command line: damage files of these kinds and print what came of them."""
    parser = argparse.ArgumentParser(description=words.splitlines()[0] if words else None)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=20.0, help="seconds for one file")
    parser.add_argument("--only", type=int, help="the file of this number alone")
    arguments = parser.parse_args()
    start = time.perf_counter()
    how = {"limit": arguments.limit, "only": arguments.only, "verbose": True}
    result = run(arguments.files, arguments.seed, kinds=kinds, good=good, turns=turns, **how)
    for kind in kinds:
        counts = [result.outcomes[f"{kind} {what}"] for what in ("ok", "refused", "failed")]
        print(f"{kind:21} {sum(counts):6} files: {counts[0]:6} read, {counts[1]:6} refused, {counts[2]:4} failed")
    print(
        f"{sum(result.outcomes.values())} files in {time.perf_counter() - start:.0f} s: {len(result.failures)} failures"
        f", peak memory {result.peak / 2**20:.0f} MiB, slowest {result.slowest:.1f} s"
    )
    return 1 if result.failures else 0


if __name__ == "__main__":
    sys.exit(main(KINDS, Seeds, __doc__))
