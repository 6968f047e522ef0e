"""Files of a folder that are replaced together: whenever one reads or a writer dies, it is the old or the new ones.

One file is the pointer (a manifest). The others are written beside it under names of their own (``model-<id>.bin``);
then the pointer, which holds the id, is renamed over the old one: that one step is the replacement. Afterwards the
others take their plain names. A reader takes ``model-<id>.bin`` where it is there and ``model.bin`` otherwise, so that
it finds the pointer's files before and after. The next writer cleans up after one that died. Renaming a file over
another is atomic on every system; writers of one folder wait for each other where the system has locks.

:func:`publish` replaces the files of a folder so, :func:`create` makes a new one, :func:`replacing` replaces one file.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

#: what a dead writer left is older than this where there are no locks to tell
_SECONDS = 86400
#: a file that waits for its plain name, and one that safetensors is writing
_VERSIONED = re.compile(r"(\w+)-([0-9a-f]{32})(\.\w+)")
_PARTIAL = re.compile(r"\.tmp[A-Za-z0-9]{6}")

Write = Callable[[Callable[[str], Path]], None]


def new_id() -> str:
    """An id that no other save has."""
    return uuid.uuid4().hex


def versioned(name: str, saved: str) -> str:
    """The name that a file has until it takes its plain one."""
    stem, dot, suffix = name.partition(".")
    return f"{stem}-{saved}{dot}{suffix}"


def find(folder: Path, name: str, saved: str | None) -> Path:
    """Where the file of a save is."""
    if saved is not None and (folder / versioned(name, saved)).is_file():
        return folder / versioned(name, saved)
    return folder / name


def publish(
    path: Path,
    names: Sequence[str],
    write: Write,
    saved: str,
    before: Callable[[], tuple[str, Sequence[str]] | None],
    optional: Sequence[str] = (),
) -> None:
    """Make new files the folder's.

    Args:
        path: of the folder; made where there is none, and it appears whole then.
        names: of the files, the pointer last.
        write: writes them all; it is given a function from name to path.
        saved: their id, which the pointer holds.
        before: id and names of the files that are there now, None where there are none.
        optional: names of files that other saves may have; one that this save lacks is removed.

    Raises:
        OSError: something cannot be written. What was there is unchanged, and nothing is left over.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() and create(path, names, write):
        clean(path.parent, path.name)
        return
    with locked(path):
        found = before()
        if found is not None:  # a writer may have died before it gave its files their names
            _settle(path, *found, optional)
        new = {name: path / versioned(name, saved) for name in names}
        try:
            write(new.__getitem__)
            for file in new.values():
                sync(file)
            sync_folder(path)
            os.replace(new[names[-1]], path / names[-1])
        except BaseException:
            for file in new.values():
                file.unlink(missing_ok=True)
            for file in path.glob(".tmp*"):
                if _PARTIAL.fullmatch(file.name):
                    file.unlink(missing_ok=True)
            raise
        sync_folder(path)
        _settle(path, saved, names, optional)
    clean(path.parent, path.name)


def create(path: Path, names: Sequence[str], write: Write) -> bool:
    """Make a folder beside its place and move it there whole.

    Args:
        path: of the folder, which is not there yet.
        names, write: see :func:`publish`.

    Returns:
        False where somebody else made one meanwhile, which is left as it is.

    Raises:
        OSError: something cannot be written. Nothing is left over.
    """
    with _new_folder(path) as temporary:
        write(lambda name: temporary / name)
        for name in names:
            sync(temporary / name)
        temporary.chmod(0o755)
        sync_folder(temporary)
        try:
            os.rename(temporary, path)
        except OSError:
            if path.exists():
                return False
            raise
        sync_folder(path.parent)
        return True


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside ``path`` to write a file under. At the end it becomes ``path``; where the block fails, it goes.

    Raises:
        OSError: it cannot be written. What was there is unchanged.
    """
    temporary = path.with_name(f".{path.name}.{new_id()}.tmp")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _new_folder(path: Path) -> Iterator[Path]:
    """A hidden folder beside ``path``, locked so that others know it is in use; what is left of it goes at the end."""
    with contextlib.ExitStack() as stack:
        while True:
            made = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
            stack.enter_context(locked(made))
            if made.exists():  # nobody took it for a dead writer's before it was locked
                break
        stack.callback(shutil.rmtree, made, ignore_errors=True)
        yield made


def _settle(folder: Path, saved: str, names: Sequence[str], optional: Sequence[str]) -> None:
    """Give the files of a save their plain names, and remove those of others. Whatever fails is left to the next."""
    for name in names:
        if (own := folder / versioned(name, saved)).exists():
            with contextlib.suppress(OSError):  # on Windows, somebody who is reading it
                os.replace(own, folder / name)
    for file in folder.iterdir():
        found = _VERSIONED.fullmatch(file.name)
        known = found is not None and found[1] + found[3] in {*names, *optional} and found[2] != saved
        if known or _PARTIAL.fullmatch(file.name) or file.name in set(optional) - set(names):
            with contextlib.suppress(OSError):
                file.unlink()
    sync_folder(folder)


def clean(folder: Path, name: str | None = None) -> None:
    """Remove what writers that died left in a folder: of ``name``, or of anything."""
    own = r".+" if name is None else re.escape(name)
    made = re.compile(rf"\.{own}\.[a-z0-9_]{{8}}\.(tmp|old)")
    written = re.compile(rf"\.{own}\.[0-9a-f]{{32}}\.tmp")
    for item in folder.iterdir():
        if made.fullmatch(item.name) and item.is_dir() and not item.is_symlink():
            with contextlib.suppress(OSError), locked(item, wait=False) as held:
                if held or time.time() - item.stat().st_mtime > _SECONDS:
                    shutil.rmtree(item, ignore_errors=True)
        elif written.fullmatch(item.name):
            with contextlib.suppress(OSError):
                if time.time() - item.stat().st_mtime > _SECONDS:
                    item.unlink()


@contextlib.contextmanager
def locked(folder: Path, *, wait: bool = True) -> Iterator[bool | None]:
    """Keep other writers out; whether that worked, None where there are no locks. A process that dies lets go."""
    if fcntl is None:
        yield None
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        held: bool | None = True
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            held = False
        except OSError:  # a file system without locks
            held = None
        yield held
    finally:
        os.close(handle)


def sync(file: Path) -> None:
    """What was written to a file is kept through a loss of power."""
    handle = os.open(file, os.O_RDWR if os.name == "nt" else os.O_RDONLY)  # it may be one that is not to be written
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_folder(folder: Path) -> None:
    """Names that were given are kept through a loss of power, on systems where folders can be opened."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
