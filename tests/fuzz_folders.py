"""Damage the checkpoints of other classes, and grow them: ``python -m tests.fuzz_folders --files 10000 --seed 0``.

A folder with config, index, shards, a Trainer's state and more, a file of ``torch.save``, and a growth that was cut off
are damaged in their structure and their bytes, and handed to ``grow_checkpoint``. Right is a larger checkpoint that
computes what the small one does as plain PyTorch and safetensors load both, or an error of fxgrow's that names the
place in a line. Wrong is anything else, and: a byte changed outside the new folder, a class or function unpickled that
``weights_only`` does not know, a process begun. Running, limits and ``--only`` are those of ``tests.fuzz_files``.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import pickle
import random
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from fxgrow.errors import FxgrowError, GrowthRefused
from fxgrow.folders import grow_checkpoint
from fxgrow.ir.packing import pack
from tests import fuzz_files
from tests.fuzz_files import damage, json_of, mutate, odd_value, tensors_damaged

CONFIG: dict[str, Any] = {"width": 4, "hidden": 6, "layers": 1, "vocab": 7}
HIDDEN, DEPTH = {"hidden": 12}, {"layers": 2}
INDEX = "model.safetensors.index.json"
#: how a growth goes that is cut off
RESUMED: dict[str, Any] = {"settings": HIDDEN, "shard_bytes": 300}
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


class Block(nn.Sequential):
    """What adds to its input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.as_tensor(super().forward(x))


class Tiny(nn.Module):
    """Blocks and a tie of four sizes."""

    def __init__(self, width: int, hidden: int, layers: int, vocab: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.h = nn.ModuleList(
            [Block(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, width)) for _ in range(layers)]
        )
        self.head = nn.Linear(width, vocab)
        self.register_buffer("gain", torch.ones(width))

    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        x = self.embed(idx) * self.gain
        for block in self.h:
            x = block(x)
        return torch.as_tensor(self.head(x))


IDX = torch.arange(6).reshape(2, 3)


class Seeds:
    """Good checkpoints of every kind."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.folder = folder
        model = Tiny(**CONFIG).double()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        model(IDX).sum().backward()
        optimizer.step()
        tensors = dict(model.state_dict())
        self.state = optimizer.state_dict()
        self.table = {
            "model": model.state_dict(),
            "optimizer": self.state,
            "model_args": CONFIG,
            "iter_num": 3,
            "config": {"out_dir": "x", "learning_rate": 1e-3},
        }
        self.single, self.sharded = folder / "single", folder / "sharded"
        for place in (self.single, self.sharded):
            place.mkdir()
            (place / "config.json").write_text(json.dumps(CONFIG | {"note": "kept"}))
            (place / "tokenizer.json").write_text('{"words": ["a"]}')
            (place / "README.md").write_text("# A model\n")
        save_file(tensors, self.single / "model.safetensors", {"format": "pt"})
        places = {n: SHARDS[i % 2] for i, n in enumerate(sorted(tensors))}
        for shard in SHARDS:
            save_file({n: t for n, t in tensors.items() if places[n] == shard}, self.sharded / shard, {"format": "pt"})
        self.index = {"metadata": {"total_size": 1}, "weight_map": places}
        (self.sharded / INDEX).write_text(json.dumps(self.index))
        self.notes = {
            "global_step": 3,
            "best_metric": 0.1,
            "best_model_checkpoint": "x/checkpoint-2",
            "log_history": [],
        }
        (self.sharded / "trainer_state.json").write_text(json.dumps(self.notes))
        torch.save(self.state, self.sharded / "optimizer.pt")
        self.file = folder / "ckpt.pt"
        torch.save(self.table, self.file)
        packed: dict[str, torch.Tensor] = {}
        said = {"optimizer": pack(self.state, "optimizer", packed)}
        (folder / "state.json").write_text(json.dumps(said))
        save_file(packed, folder / "optimizer.safetensors")
        self.packed = said
        self.begun = Path(shutil.copytree(self.sharded, folder / "begun"))
        self.part = cut_off(self.begun, folder / "begun-grown")
        for name in ("first", "second"):  # kernels are built, modules imported
            grow_checkpoint(self.sharded, None, folder / name, settings=HIDDEN, model_class=Tiny, inputs={"idx": IDX})
            shutil.rmtree(folder / name)


# what is watched -----------------------------------------------------------------------------------------------------

_WATCH: dict[str, Any] = {"allowed": None, "seen": []}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = {"os.remove": 1, "os.rmdir": 1, "os.mkdir": 1, "os.truncate": 1, "os.chmod": 1, "os.rename": 2, "os.link": 2}
_NEVER = ("pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect")


def _audit(event: str, args: tuple[Any, ...]) -> None:
    """Note what must not happen while a file is read; Python's own list of such events is in its documentation."""
    allowed = _WATCH["allowed"]
    if allowed is None:
        return
    if event in _NEVER:
        _WATCH["seen"].append(f"{event} {args!r}"[:300])
        return
    paths: tuple[Any, ...] = ()
    if event == "open" and isinstance(args[2], int) and args[2] & _WRITES:
        paths = args[:1]
    elif event in _CHANGES:
        paths = args[: _CHANGES[event]]
    elif event == "os.symlink":
        paths = args[1:2]
    for path in paths:
        if isinstance(path, str | bytes | os.PathLike):
            text = os.fsdecode(path)
            parent, name = os.path.split(text)
            # what removes or renames a link touches the link; what opens one touches what it leads to
            real = os.path.realpath(text) if event == "open" else os.path.join(os.path.realpath(parent), name)
            known = real == os.devnull or (event == "os.mkdir" and os.path.isdir(real))  # which is no change
            if os.path.isabs(text) and not allowed(real) and not known:
                _WATCH["seen"].append(f"{event} {real}")


_installed: list[bool] = []


@contextlib.contextmanager
def watched(folder: Path) -> Iterator[None]:
    """See to it that nothing but the new folder, and its hidden forerunner, is written meanwhile."""
    if not _installed:
        sys.addaudithook(_audit)
        _installed.append(True)
    home = os.path.realpath(folder)

    def allowed(real: str) -> bool:
        inside = os.path.relpath(real, home).split(os.sep)[0]
        return inside == "out" or inside.startswith((".out.", "out."))

    _WATCH.update(allowed=allowed, seen=[])
    try:
        yield
    finally:
        _WATCH["allowed"] = None


def print_of(folder: Path) -> dict[str, str]:
    """Every file, link and folder below a folder: its digest, or where it leads to."""
    out = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            out[name] = f"link to {os.readlink(path)}"
        elif path.is_file():
            out[name] = hashlib.sha256(path.read_bytes()).hexdigest() + f" {path.stat().st_mtime_ns}"
        else:
            out[name] = "no file"
    return out


@dataclass
class Case:
    """A damaged checkpoint and what is asked of it."""

    source: Path
    how: dict[str, Any] = field(default_factory=dict)


def read(seeds: Seeds, rng: random.Random, folder: Path, make: Callable[[Seeds, random.Random, Path], Case]) -> Any:
    """Grow a damaged checkpoint; whatever is wrong is an AssertionError."""
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere" / "kept.txt").write_text("not yours")
    save_file({"x": torch.ones(2)}, folder / "elsewhere" / "model.safetensors")
    case = make(seeds, rng, folder)
    before = {name: print_of(folder / name) for name in ("in", "elsewhere")}
    seeds_before = print_of(seeds.sharded)
    out = folder / ("out.pt" if case.source.is_file() else "out")
    how = {"settings": rng.choice([HIDDEN, HIDDEN, DEPTH])} | case.how
    try:
        with watched(folder):
            grow_checkpoint(case.source, None, out, model_class=Tiny, inputs={"idx": IDX}, **how)
        _computes_the_same(case.source, out)
    except FxgrowError as error:
        said = str(error)
        if os.path.lexists(out):
            raise AssertionError(f"refused ({said[:100]}), and something is there") from error
        if len(said) >= 1500:
            raise AssertionError(f"an error of {len(said)} characters: {said[:300]}") from error
        if not isinstance(error, GrowthRefused) and "\n" in said.strip():
            raise AssertionError(f"an error of several lines: {said}") from error
        if not isinstance(error, GrowthRefused) and str(case.source.parent) not in said and str(folder) not in said:
            raise AssertionError(f"no file is named: {said}") from error
        raise
    finally:
        seen = list(_WATCH["seen"])
        after = {name: print_of(folder / name) for name in ("in", "elsewhere")}
        assert not seen, f"touched: {seen[:3]}"
        assert after == before, f"changed: {[k for k in before if before[k] != after[k]]}"
        assert print_of(seeds.sharded) == seeds_before, "the seeds have changed"
        there = {p.name for p in folder.iterdir()} - {"in", "elsewhere", out.name, f".{out.name}.growing"}
        assert not there, f"left over: {there}"
    return out


def _model(settings: dict[str, Any], tensors: dict[str, torch.Tensor]) -> nn.Module:
    model = Tiny(**{k: settings[k] for k in CONFIG}).double()
    model.load_state_dict(tensors)
    return model


def _tables(data: Any) -> Iterator[dict[Any, Any]]:
    """The tables in data, whatever they are called."""
    if isinstance(data, dict):
        yield data
        for value in data.values():
            yield from _tables(value)


def _loaded(path: Path) -> nn.Module:
    """As a user loads it, without fxgrow."""
    if path.is_file():
        data = torch.load(path, weights_only=True)
        weights = next(t for t in _tables(data) if t and all(isinstance(v, torch.Tensor) for v in t.values()))
        settings = next(t for t in _tables(data) if set(CONFIG) <= set(t))
        prefix = "_orig_mod." if all(n.startswith("_orig_mod.") for n in weights) else ""
        return _model(settings, {n.removeprefix(prefix): t for n, t in weights.items()})
    tensors: dict[str, torch.Tensor] = {}
    if (path / INDEX).is_file():
        for name in set(json.loads((path / INDEX).read_bytes())["weight_map"].values()):
            tensors |= load_file(path / name)
    else:
        tensors = load_file(path / "model.safetensors")
    return _model(json.loads((path / "config.json").read_bytes()), tensors)


def _steps(path: Path) -> bool:
    """Whether a training script goes on from a file."""
    model = _loaded(path)
    try:
        state = next(t for t in _tables(torch.load(path, weights_only=True)) if "param_groups" in t)
        optimizer = torch.optim.AdamW(model.parameters())
        optimizer.load_state_dict(state)
        model(IDX).sum().backward()
        optimizer.step()
    except Exception:  # of a state that is none
        return False
    return True


def _computes_the_same(small: Path, large: Path) -> None:
    """Hold both against each other."""
    try:
        model = _loaded(small)
    except (
        SafetensorError,
        RuntimeError,
        TypeError,
        KeyError,
        ValueError,
        StopIteration,
        pickle.UnpicklingError,
    ) as error:
        raise AssertionError(f"grown, though it cannot be loaded: {type(error).__name__}: {error}") from error
    one, two = model(IDX).detach(), _loaded(large)(IDX).detach()
    assert torch.equal(one, two) or float((one - two).abs().max()) <= 1e-10 * float(one.abs().max()), "not the same"
    assert large.is_dir() or _steps(large) or not _steps(small), "the optimizer does not go on"


# kinds ---------------------------------------------------------------------------------------------------------------


def config_json(seeds: Seeds, rng: random.Random, folder: Path) -> Case:
    place = Path(shutil.copytree(rng.choice([seeds.single, seeds.sharded]), folder / "in"))
    (place / "config.json").write_bytes(json_of(CONFIG | {"note": "kept"}, rng))
    return Case(place, {"optimizer": False})


def index_json(seeds: Seeds, rng: random.Random, folder: Path) -> Case:
    place = Path(shutil.copytree(seeds.sharded, folder / "in"))
    index: Any = json.loads(json.dumps(seeds.index))
    if rng.random() < 0.5:
        name = rng.choice(list(index["weight_map"]))
        index["weight_map"][name] = rng.choice(
            [
                *(
                    "../elsewhere/model.safetensors",
                    str(folder / "elsewhere" / "model.safetensors"),
                    "/etc/passwd",
                    "..",
                ),
                *(
                    ".",
                    "",
                    "sub/../" + SHARDS[0],
                    "./" + SHARDS[0],
                    SHARDS[0] + "/",
                    "\0",
                    "a" * 300,
                    "config.json",
                    INDEX,
                ),
                *("\\..\\x", "~", "C:\\x", "model-00003-of-00002.safetensors", SHARDS[0].upper(), SHARDS[0] + "\n"),
            ]
        )
        (place / INDEX).write_text(json.dumps(index))
    else:
        (place / INDEX).write_bytes(json_of(index, rng))
    return Case(place, {"optimizer": False})


def weights(seeds: Seeds, rng: random.Random, folder: Path) -> Case:
    sharded = rng.random() < 0.5
    place = Path(shutil.copytree(seeds.sharded if sharded else seeds.single, folder / "in"))
    file = place / (rng.choice(SHARDS) if sharded else "model.safetensors")
    file.write_bytes(tensors_damaged(file.read_bytes(), rng))
    return Case(place, {"optimizer": False})


class Harmful:
    """What makes a file where it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.file}",)


def _not_data(rng: random.Random, folder: Path) -> Any:
    """What ``weights_only`` does not take, or takes and is no plain data."""
    return rng.choice(
        [
            *(Harmful(folder / "elsewhere" / "run"), Path("x"), nn.Linear(1, 1), {1, 2}, 1j, b"x", slice(1), print),
            *(torch.ones(2).to_sparse(), torch.ones(2, requires_grad=True), nn.Parameter(torch.ones(2)), torch.float32),
            *(torch.empty(2**40, device="meta"), torch.ones(1).expand(2**33), torch.ones(4)[1:2], torch.Size([2])),
            *(torch.tensor(float("nan")), torch.tensor(2**62), torch.ones(0), torch.ones(2, dtype=torch.bfloat16)),
            *(torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), torch.device("cpu"), float("nan")),
        ]
    )


def _changed(value: Any, rng: random.Random, folder: Path) -> Any:
    """Nested data of a ``torch.save`` with some changes, tensors among them."""
    value = mutate(value, rng) if rng.random() < 0.6 else mutate_tensors(value, rng, folder)
    return value


def mutate_tensors(value: Any, rng: random.Random, folder: Path) -> Any:
    """One tensor, or one other value, becomes something that may stand in a file of ``torch.save``."""
    value = fuzz_files.copy.deepcopy(value)
    found = fuzz_files.places(value)
    at, key = rng.choice(found)
    if isinstance(at[key], torch.Tensor) and rng.random() < 0.7:
        t = at[key]
        at[key] = rng.choice(
            [
                *(t.float(), t.reshape(-1), t.to(torch.int64), t[:0], t.unsqueeze(0), t.T if t.dim() == 2 else -t),
                *(
                    t * float("nan"),
                    t * float("inf"),
                    t.clone().as_strided(t.shape, [0] * t.dim()),
                    t.to("meta"),
                    t.sum(),
                ),
            ]
        )
    else:
        at[key] = _not_data(rng, folder)
    return value


def _saved(value: Any, rng: random.Random) -> bytes:
    out = io.BytesIO()
    torch.save(value, out, _use_new_zipfile_serialization=rng.random() < 0.85)
    return out.getvalue()


def _damaged_archive(data: bytes, rng: random.Random) -> bytes:
    """A zip archive with entries that are damaged, lost, twice there, compressed or named otherwise."""
    out = io.BytesIO()
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
            names = old.namelist()
            odd = rng.choice(names)
            for name in names:
                held = old.read(name)
                if name == odd:
                    what = rng.choice(["damage", "damage", "lose", "rename", "double", "deflate", "climb", "bomb"])
                    if what == "lose":
                        continue
                    if what == "damage":
                        held = damage(held, rng)
                    if what == "rename":
                        name = str(odd_value(rng))[:50].replace("\0", "0") or "x"
                    if what == "climb":
                        name = rng.choice(["../elsewhere/kept.txt", "/tmp/x", "a/../../x"])
                    if what == "double":
                        new.writestr(name, held[::-1])
                    if what in ("deflate", "bomb"):
                        held = held if what == "deflate" else bytes(1 << 26)
                        new.writestr(name, held, zipfile.ZIP_DEFLATED)
                        continue
                new.writestr(name, held)
    except zipfile.BadZipFile:
        return damage(data, rng)
    return out.getvalue()


def _pickled(value: Any, rng: random.Random, folder: Path) -> bytes:
    """A file of ``torch.save``, damaged in one of the ways that it can be."""
    kind = rng.choice(["data", "data", "bytes", "archive", "archive", "pickle"])
    try:
        if kind == "data":
            return _saved(_changed(value, rng, folder), rng)
        good = _saved(value, rng)
    except Exception:  # not everything can be saved
        return b"\x80\x02."
    if kind == "bytes":
        return damage(good, rng)
    if kind == "pickle":
        return pickle.dumps(
            _not_data(rng, folder) if rng.random() < 0.5 else {"state": {}}, protocol=rng.choice([2, 4])
        )
    return _damaged_archive(good, rng)


def ckpt_pt(seeds: Seeds, rng: random.Random, folder: Path) -> Case:
    (folder / "in").mkdir()
    file = folder / "in" / "ckpt.pt"
    file.write_bytes(_pickled(seeds.table, rng, folder))
    return Case(file)


def optimizer_pt(seeds: Seeds, rng: random.Random, folder: Path) -> Case:
    place = Path(shutil.copytree(seeds.sharded, folder / "in"))
    (place / "optimizer.pt").write_bytes(_pickled(seeds.state, rng, folder))
    return Case(place, {"policy": rng.choice(["asymmetric", "copy", "reset"])})


def optimizer_safetensors(seeds: Seeds, rng: random.Random, folder: Path) -> Case:
    place = Path(shutil.copytree(seeds.single, folder / "in" / "model"))
    beside = folder / "in" / "state"
    beside.mkdir()
    shutil.copy(seeds.folder / "optimizer.safetensors", beside)
    shutil.copy(seeds.folder / "state.json", beside)
    file = beside / "optimizer.safetensors"
    if rng.random() < 0.5:
        file.write_bytes(tensors_damaged(file.read_bytes(), rng))
    else:
        (beside / "state.json").write_bytes(json_of(seeds.packed, rng))
    return Case(place, {"optimizer": file})


class CutOff(BaseException):
    """A growth ends here."""


def cut_off(source: Path, out: Path) -> Path:
    """Grow a folder until some of its shards are written; returns the hidden folder that is left."""
    parts = 0

    def stop(done: int, total: int) -> None:
        nonlocal parts
        parts += 1
        if parts > 5:
            raise CutOff

    with contextlib.suppress(CutOff):
        how: dict[str, Any] = {"model_class": Tiny, "inputs": {"idx": IDX}, "progress": stop} | RESUMED
        grow_checkpoint(source, None, out, **how)
    return out.with_name(f".{out.name}.growing")


def in_the_way(rng: random.Random, folder: Path) -> None:
    """What stands where the hidden folder goes."""
    part = folder / ".out.growing"
    what = rng.choice(["file", "link", "folder", "pipe", "dangling"])
    if what == "file":
        part.write_bytes(b"x")
    elif what == "link":
        part.symlink_to(folder / "elsewhere")
    elif what == "folder":
        part.mkdir()
        (part / "model.safetensors").symlink_to(folder / "elsewhere" / "model.safetensors")
        (part / "sub").symlink_to(folder / "elsewhere")
    elif what == "pipe":
        os.mkfifo(part)
    else:
        part.symlink_to(folder / "elsewhere" / "nothing")


def resumed(seeds: Seeds, rng: random.Random, folder: Path) -> Case:
    """A growth that was cut off, whose hidden folder is damaged."""
    (folder / "in").mkdir()
    part = Path(shutil.copytree(seeds.part, folder / ".out.growing"))
    place = seeds.begun
    files = sorted(p for p in part.iterdir())
    whole = [p for p in files if p.suffix == ".safetensors"]
    assert whole, "nothing was written before it was cut off"
    odd = rng.choice(files if rng.random() < 0.5 else whole)
    changes = ["cut", "header", "flip", "exchange", "link", "folder", "lose", "journal", "extra", "all", "other"]
    what = rng.choice([*changes, "pipe", "in the way"])
    if what == "cut":
        odd.write_bytes(odd.read_bytes()[: rng.randrange(odd.stat().st_size + 1)])
    elif what in ("header", "flip"):
        data = bytearray(odd.read_bytes())
        if data:
            header = len(data) if what == "flip" else 8 + int.from_bytes(data[:8], "little")
            data[rng.randrange(min(len(data), header))] ^= 1 << rng.randrange(8)
        odd.write_bytes(bytes(data))
    elif what == "exchange":
        odd.write_bytes(rng.choice(files).read_bytes())
    elif what in ("link", "folder", "lose", "pipe"):
        held = odd.read_bytes()
        odd.unlink()
        if what == "link":
            target = folder / "elsewhere" / rng.choice(["kept.txt", "new.txt"])
            if rng.random() < 0.3:
                target.write_bytes(held)
            odd.symlink_to(target)
        elif what == "folder":
            odd.mkdir()
        elif what == "pipe":
            os.mkfifo(odd)
    elif what == "journal":
        file = part / ".growing"
        file.write_bytes(damage(file.read_bytes(), rng))
    elif what == "extra":
        name = rng.choice(["config.json", "tokenizer.json", "README.md", "optimizer.pt", "growth.json", "x", *SHARDS])
        if not (part / name).exists():
            (part / name).symlink_to(folder / "elsewhere" / "kept.txt")
    elif what == "all":
        target = folder / "elsewhere" / "part"
        shutil.move(part, target)
        part.symlink_to(target)
    elif what == "other":  # what was begun is of another source
        place = Path(shutil.copytree(place, folder / "in" / "small"))
    elif what == "in the way":
        shutil.rmtree(part)
        in_the_way(rng, folder)
    return Case(place, RESUMED)


#: changes of a folder that leave the files in it as they are
BESIDE = ("stale", "round", "deep", "notes")


def whole_folder(seeds: Seeds, rng: random.Random, folder: Path) -> Case:
    """Files lost, exchanged, turned into folders, links and pipes; others that are in the way."""
    place = Path(shutil.copytree(rng.choice([seeds.single, seeds.sharded]), folder / "in"))
    names = sorted(p.name for p in place.iterdir())
    for _ in range(rng.choice([1, 1, 2])):
        name, other = rng.choice(names), rng.choice(names)
        target = place / name
        what = rng.choice([*fuzz_files.FOLDER, "outside", *BESIDE])
        if what in BESIDE:
            held = target.read_bytes() if target.is_file() else b""
        else:
            held = fuzz_files.taken_away(target)
        if fuzz_files.stood_in(target, what, seeds.sharded / other):
            continue
        if what == "outside":
            target.symlink_to(folder / "elsewhere" / rng.choice(["kept.txt", "model.safetensors"]))
        elif what in ("exchange", "copy") and (place / other).is_file():
            target.write_bytes((place / other).read_bytes())
        elif what == "versioned":
            (place / f"{name}.part").write_bytes(held)
        elif what == "round":
            (place / "round").unlink(missing_ok=True)
            (place / "round").symlink_to(place)
        elif what == "deep":
            (place / ("d" * 200) / ("e" * 200)).mkdir(parents=True, exist_ok=True)
            (place / ("d" * 200) / ("e" * 200) / name).write_bytes(held)
        elif what == "notes":
            (place / "trainer_state.json").write_bytes(json_of(seeds.notes, rng))
        elif what == "stale":
            stale = rng.choice(["model.safetensors", INDEX, SHARDS[0], "pytorch_model.bin", ".growing", "optimizer_0"])
            source = rng.choice([seeds.single / "model.safetensors", seeds.sharded / INDEX])
            if not (place / stale).exists():
                (place / stale).write_bytes(source.read_bytes())
    return Case(place)


def _kind(make: Callable[[Seeds, random.Random, Path], Case]) -> fuzz_files.Kind:
    return lambda seeds, rng, folder: read(seeds, rng, folder, make)


KINDS: dict[str, fuzz_files.Kind] = {
    f.__name__: _kind(f)
    for f in (*(config_json, index_json, weights, ckpt_pt, optimizer_pt, optimizer_safetensors, resumed, whole_folder),)
}
#: what is refused before a model is traced comes oftener: it takes milliseconds
TURNS = [
    *("config_json", "index_json", "weights", "ckpt_pt", "optimizer_safetensors", "ckpt_pt", "index_json", "weights")
    * 2,
    *("optimizer_pt", "resumed", "whole_folder"),
]


if __name__ == "__main__":
    sys.exit(fuzz_files.main(KINDS, Seeds, __doc__, TURNS))
