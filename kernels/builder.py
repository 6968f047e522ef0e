"""Builds `native.cpp`, for one of three kinds of processor: ``python builder.py LEVEL FILE``.

Uses the standard library alone, so that a process which only builds starts at once. What a library is made from is in
its name: whoever finds that name, in the package (a wheel may carry libraries) or in a cache, need not build it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

SOURCE = Path(__file__).with_name("native.cpp")
PACKAGED = Path(__file__).with_name("built")  # libraries that a wheel carries
VARIABLE = "FXGROW_ISA"
FLAGS = [
    "-O2",
    "-std=c++17",
    "-fPIC",
    "-shared",
    "-pthread",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-w",
]
_AVX2 = ["-mavx2", "-mf16c", "-mfma", "-mbmi", "-mbmi2", "-mpopcnt"]
_AVX512 = [*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mprefer-vector-width=512"]
LEVELS = {"avx512": _AVX512, "avx2": _AVX2, "plain": []}  # best first; flags of the compiler
NEEDS = {  # as /proc/cpuinfo has it
    "avx512": {"avx2", "f16c", "fma", "bmi1", "bmi2", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"},
    "avx2": {"avx2", "f16c", "fma", "bmi1", "bmi2"},
    "plain": set(),
}
SECONDS = 300  # that a compiler may take


class NoCompiler(RuntimeError):
    """The CPU backend cannot be built or loaded here; the message says why."""


@functools.cache
def supported() -> tuple[str, ...]:
    """The levels that this processor has, best first."""
    found: set[str] = set()
    if platform.machine().lower() in ("x86_64", "amd64"):
        with contextlib.suppress(OSError):
            for line in Path("/proc/cpuinfo").read_text().splitlines():
                if line.startswith("flags"):
                    found = set(line.partition(":")[2].split())
                    break
    return tuple(level for level, needed in NEEDS.items() if needed <= found)


def level() -> str:
    """The level to use: the best that the processor has, or what ``FXGROW_ISA`` says.

    Raises:
        NoCompiler: it names a level that is not known, or that the processor does not have.
    """
    named = os.environ.get(VARIABLE)
    if not named:
        return supported()[0]
    if named not in supported():
        raise NoCompiler(f"{VARIABLE} says {named!r}: this processor has {', '.join(supported())}")
    return named


def library_name(which: str) -> str:
    """Name of the file of a level, of what it is made from and the C library that it needs."""
    parts = [SOURCE.read_text(), *FLAGS, *LEVELS[which], platform.system(), platform.machine()]
    return f"kernels-{which}-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}.so"


def cache_folder() -> Path:
    """Where built libraries are kept."""
    if folder := os.environ.get("FXGROW_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fxgrow"


def _own_folder() -> Path | None:
    """A folder for temporary files that nobody else can write to, or has made."""
    if not hasattr(os, "getuid"):
        return None
    folder = Path(tempfile.gettempdir()) / f"fxgrow-{os.getuid()}"
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
        if folder.is_dir() and not folder.is_symlink() and status.st_uid == os.getuid() and not status.st_mode & 0o077:
            return folder
    return None


def candidates(which: str) -> Iterator[Path]:
    """Where the library of a level may lie, best first; the C library it was built against is in the cache's name."""
    name = library_name(which)
    yield PACKAGED / name
    libc = "-".join(part for part in platform.libc_ver() if part) or "libc"
    local = name.replace(".so", f"-{libc}.so")
    yield cache_folder() / local
    if (own := _own_folder()) is not None:
        yield own / local


def writable(which: str) -> Path:
    """Where a library that is not there is built: the cache, or where that is read-only, a temporary folder.

    Raises:
        NoCompiler: neither can be written to.
    """
    why = ""
    for path in list(candidates(which))[1:]:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path.parent):
                return path
        except OSError as error:
            why = why or str(error)
    raise NoCompiler(f"the built library cannot be kept: {why}")


def compiler() -> list[str]:
    """The command of a C++ compiler.

    Raises:
        NoCompiler: there is none.
    """
    named = os.environ.get("CXX")
    for candidate in [named] if named else ["g++", "clang++", "c++"]:
        command = shlex.split(candidate)
        if command and shutil.which(command[0]):
            return command
    raise NoCompiler(f"no C++ compiler: {named or 'g++, clang++ and c++ are'} not found on PATH (set CXX to name one)")


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One build at a time in a folder, where the system has locks."""
    handle = None
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        if fcntl is not None:
            fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def build(which: str, target: Path, extra: tuple[str, ...] = ()) -> None:
    """Build the library of a level as `target`, which appears whole. Processes that want the same one wait.

    Args:
        which: the level.
        target: the file; its folder is there.
        extra: further flags of the compiler.

    Raises:
        NoCompiler: there is no compiler, or it fails.
        OSError: the folder cannot be written to.
    """
    command = [*compiler(), *FLAGS, *LEVELS[which], *extra, str(SOURCE)]
    with _alone(target.parent):
        if target.exists():
            return
        made = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            result = subprocess.run(
                [*command, "-o", str(made)], capture_output=True, text=True, check=False, timeout=SECONDS
            )
            if result.returncode or not made.exists():
                raise NoCompiler(f"{' '.join(command)} failed: {result.stderr.strip()[-500:]}")
            os.replace(made, target)
        except subprocess.TimeoutExpired as error:
            raise NoCompiler(f"{command[0]} took longer than {SECONDS // 60} minutes") from error
        finally:
            made.unlink(missing_ok=True)


def start(which: str, target: Path) -> subprocess.Popen[str]:
    """Build in a process of its own, which goes on when this one ends. What it says on failure is its error output."""
    return subprocess.Popen(
        [sys.executable, "-S", str(Path(__file__)), which, str(target)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def main(which: str, target: str) -> int:
    """Entry of the process that builds; returns its exit status."""
    try:
        build(which, Path(target))
    except (NoCompiler, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
