"""Saving over a checkpoint: at every instant it is the old or the new one, and nothing stays behind."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

import fxgrow
from fxgrow import checkpoint, manifest, publish
from fxgrow.errors import CheckpointError, DiskError
from tests import kills

FIXTURES = Path(__file__).parent / "fixtures"
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")


@pytest.fixture(scope="module")
def made() -> fxgrow.Growth:
    return kills.growth()


def names(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir())


def value(path: Path) -> float:
    found = kills.Outcome()
    kills.look(path, found)
    assert not found.missing and not found.torn, (found.missing, found.torn)
    return float(next(iter(fxgrow.load(path).module.parameters())).flatten()[0].detach())


@needs_fork
@pytest.mark.parametrize("fresh", [False, True])
def test_kills(fresh: bool) -> None:
    found = kills.run(10, seed=1, fresh=fresh)
    assert found.kills == 10
    assert not found.missing and not found.torn and not found.left, str(found)


STEPS = ["os.replace", "os.rename", "os.fsync", "shutil.rmtree", "save_file", "Path.write_text", "Path.unlink"]


@pytest.fixture
def dying(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``dying(n)``: the process ends at the n-th step that changes a disk; before or after doing it."""
    count = [0, 0, 0]  # steps so far, the one to die at, whether to do it first

    def wrap(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def step(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            if count[0] == count[1] and not count[2]:
                os._exit(7)
            result = original(*args, **kwargs)
            if count[0] == count[1]:
                os._exit(7)
            return result

        monkeypatch.setattr(owner, name, step)

    for owner, name in (
        (publish.os, "replace"),
        (publish.os, "rename"),
        (publish.os, "fsync"),
        (publish.shutil, "rmtree"),
        (checkpoint, "save_file"),
        (Path, "write_text"),
        (Path, "unlink"),
    ):
        wrap(owner, name)

    def set_to(number: int, after: bool = False) -> None:
        count[:] = [0, number, int(after)]

    return set_to


@needs_fork
@pytest.mark.parametrize("second", [True, False], ids=["with examples", "without examples"])
def test_a_death_at_every_step(made: fxgrow.Growth, dying: Any, tmp_path: Path, second: bool) -> None:
    """Old until the pointer is renamed, new from there on; the next save leaves nothing of it."""
    path, seen = tmp_path / "grown", set()
    for number in range(1, 60):
        for after in (False, True)[: 1 + second]:
            dying(0)
            kills.fill(made.module, 1.0)
            fxgrow.save(made, path)
            assert names(path) == kills.NAMES and names(tmp_path) == ["grown"], "what the death before left is gone"
            process = os.fork()
            if process == 0:
                try:
                    dying(number, after)
                    kills.fill(made.module, 2.0)
                    fxgrow.save(made, path, examples=second)
                finally:
                    os._exit(0)
            status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
            seen.add(value_without_examples(path) if not second else value(path))
        if status == 0:
            break
    assert status == 0 and number > 8, "every step was tried"
    assert seen == {1.0, 2.0}


def value_without_examples(path: Path) -> float:
    loaded = fxgrow.load(path)
    (found,) = {float(v) for p in loaded.module.parameters() for v in p.detach().flatten().unique()}
    assert (loaded.outputs is None) == (found == 2.0)
    return found


@needs_fork
def test_a_death_at_every_step_of_the_first_save(made: fxgrow.Growth, dying: Any, tmp_path: Path) -> None:
    path = tmp_path / "grown"
    kills.fill(made.module, 2.0)
    for number in range(1, 60):
        process = os.fork()
        if process == 0:
            try:
                dying(number)
                fxgrow.save(made, path)
            finally:
                os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        if path.exists():
            assert value(path) == 2.0 and names(path) == kills.NAMES
            shutil.rmtree(path)
        if status == 0:
            break
    assert status == 0 and number > 5
    dying(0)
    fxgrow.save(made, path)
    assert names(tmp_path) == ["grown"]


def test_readers_while_others_write(made: fxgrow.Growth, tmp_path: Path) -> None:
    path = tmp_path / "grown"
    kills.fill(made.module, 1.0)
    fxgrow.save(made, path)
    problems: list[BaseException] = []
    done = threading.Event()

    def read() -> None:
        try:
            while not done.is_set():
                value(path)
        except BaseException as error:
            problems.append(error)

    def write(number: int) -> None:
        try:
            own = fxgrow.load(path)
            for i in range(12):
                kills.fill(own.module, float(number + i))
                fxgrow.save(own, path)
        except BaseException as error:
            problems.append(error)

    reader = threading.Thread(target=read)
    writers = [threading.Thread(target=write, args=(n,)) for n in (10, 40)]
    for thread in (reader, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    reader.join()
    assert not problems, problems
    assert names(path) == kills.NAMES and names(tmp_path) == ["grown"]


def test_a_loaded_model_does_not_depend_on_its_file(made: fxgrow.Growth, tmp_path: Path) -> None:
    """What others do to the file (cp over it, truncate it) ended the process or changed the weights."""
    kills.fill(made.module, 1.0)
    path = fxgrow.save(made, tmp_path / "grown")
    loaded = fxgrow.load(path)
    for name in kills.NAMES:
        with (path / name).open("r+b") as file:
            file.truncate(0)
    assert all(bool((p == 1.0).all()) for p in loaded.module.parameters())
    assert loaded.replay_error() == 0.0


def test_other_files_stay_and_what_earlier_versions_left_goes(made: fxgrow.Growth, tmp_path: Path) -> None:
    path = fxgrow.save(made, tmp_path / "grown")
    (path / "notes.txt").write_text("mine")
    (path / ("notes-" + 32 * "a" + ".txt")).write_text("mine too")
    for name in (".grown.abcdefgh.tmp", ".grown.abc_efg1.old", ".grown.mine.old", ".other.abcdefgh.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").touch()
    (path / ("model-" + 32 * "b" + ".safetensors")).touch()
    (path / ("manifest-" + 32 * "b" + ".json")).touch()
    (path / ".tmpAb3dE6").touch()
    fxgrow.save(made, path)
    assert names(path) == sorted([*kills.NAMES, "notes.txt", "notes-" + 32 * "a" + ".txt"])
    assert names(tmp_path) == [".grown.mine.old", ".other.abcdefgh.tmp", "grown"]
    fxgrow.save(made, path, examples=False)
    assert "examples.safetensors" not in names(path)


def test_a_folder_that_somebody_writes_is_not_taken_for_a_leftover(made: fxgrow.Growth, tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    path = tmp_path / "grown"
    with publish._new_folder(path) as temporary:
        fxgrow.save(made, path)
        assert temporary.exists()
    assert names(tmp_path) == ["grown"]


def test_weights_of_another_save_are_refused(made: fxgrow.Growth, tmp_path: Path) -> None:
    a, b = (fxgrow.save(made, tmp_path / n) for n in "ab")
    shutil.copy(a / "model.safetensors", b / "model.safetensors")
    with pytest.raises(CheckpointError, match="is of another save than its manifest"):
        fxgrow.load(b)
    module = fxgrow.load(a).module
    checkpoint.load_weights(module, a / "model.safetensors")  # a file alone is of no save
    with pytest.raises(CheckpointError, match="is of another save than its manifest"):
        checkpoint.load_weights(module, b)


def test_checkpoints_of_version_1(tmp_path: Path, made: fxgrow.Growth) -> None:
    """A folder that fxgrow wrote before saves had ids."""
    path = Path(shutil.copytree(FIXTURES / "checkpoint-v1", tmp_path / "old"))
    loaded = fxgrow.load(path)
    assert loaded.manifest.version == 1 and loaded.manifest.saved is None
    assert loaded.replay_error() <= 1e-6
    assert loaded.module.get_parameter("head.weight") is loaded.module.get_parameter("emb.weight")
    assert loaded.module.get_parameter("up.weight").shape == (12, 4)
    assert loaded.plan is not None and loaded.plan.exactness == "exact"
    expected = {n: p.detach().clone() for n, p in loaded.module.named_parameters()}
    fxgrow.save(loaded, path)
    again = fxgrow.load(path)
    assert again.manifest.version == manifest.VERSION and again.manifest.saved
    assert all(torch.equal(p, expected[n]) for n, p in again.module.named_parameters())
    shutil.copy(path / "model.safetensors", tmp_path / "new.safetensors")
    shutil.copytree(FIXTURES / "checkpoint-v1", path, dirs_exist_ok=True)
    shutil.copy(tmp_path / "new.safetensors", path / "model.safetensors")
    with pytest.raises(CheckpointError, match="is of another save"):  # as a reader would find it amid a replacement
        fxgrow.load(path)


# no space -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["safetensors", "text", "sync"])
def test_a_full_disk_is_called_one(
    made: fxgrow.Growth, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    kills.fill(made.module, 1.0)
    path = fxgrow.save(made, tmp_path / "grown")
    before = {p.name: p.read_bytes() for p in path.iterdir()}

    def full(*_: Any, **__: Any) -> None:
        if where == "safetensors":
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    owner, name = {
        "safetensors": (checkpoint, "save_file"),
        "text": (Path, "write_text"),
        "sync": (publish, "sync"),
    }[where]
    monkeypatch.setattr(owner, name, full)
    for target in (path, tmp_path / "new"):
        with pytest.raises(DiskError, match=r"(?i)cannot be written: no space left on device\. What was there"):
            fxgrow.save(made, target)
    assert {p.name: p.read_bytes() for p in path.iterdir()} == before
    assert names(tmp_path) == ["grown"]


def test_a_disk_that_is_really_full(made: fxgrow.Growth, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting a small disk is not permitted here")
    try:
        path = fxgrow.save(made, disk / "grown")
        (disk / "filler").write_bytes(bytes(os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize - 4096))
        before = {p.name: p.read_bytes() for p in path.iterdir()}
        for target in (path, disk / "new"):
            with pytest.raises(DiskError, match=r"(?i)no space left on device"):
                fxgrow.save(made, target)
        assert {p.name: p.read_bytes() for p in path.iterdir()} == before
        assert names(disk) == ["filler", "grown"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@needs_fork
def test_a_file_over_the_limit(made: fxgrow.Growth, tmp_path: Path) -> None:
    import resource

    process = os.fork()
    if process == 0:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
            fxgrow.save(made, tmp_path / "grown")
        except DiskError as error:
            os._exit(9 if "cannot be written: File too large" in str(error) else 1)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 9
    assert names(tmp_path) == []


def test_a_place_where_nothing_can_be_written(made: fxgrow.Growth, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DiskError, match="cannot be written"):
        fxgrow.save(made, tmp_path / "file" / "grown")
    with pytest.raises(CheckpointError, match="is not a checkpoint; choose another path"):
        fxgrow.save(made, tmp_path / "file")
    with pytest.raises(DiskError, match="cannot be written"):
        fxgrow.save(made, tmp_path / ("x" * 300))
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "real")
    with pytest.raises(DiskError, match="cannot be written"):
        fxgrow.save(made, link)
    fxgrow.save(made, tmp_path / "real")
    fxgrow.save(made, link)  # through a link to a checkpoint
    assert link.is_symlink() and fxgrow.load(link).replay_error() == 0.0


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    def fill(file: Path) -> None:
        file.write_text("ne")
        raise OSError("the disk is full")

    path = tmp_path / "tiles.json"
    with publish.replacing(path) as made:
        made.write_text("old")
        assert not path.exists()
    with pytest.raises(OSError, match="full"), publish.replacing(path) as made:
        fill(made)
    assert path.read_text() == "old" and names(tmp_path) == ["tiles.json"]


def test_what_dead_writers_of_files_left_goes_after_a_day(tmp_path: Path) -> None:
    old, new = (tmp_path / f".latest.{publish.new_id()}.tmp" for _ in range(2))
    for file in (old, new):
        file.touch()
    os.utime(old, (0, 0))
    publish.clean(tmp_path)
    assert names(tmp_path) == [new.name]
