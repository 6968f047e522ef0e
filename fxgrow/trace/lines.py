"""The user's own lines among the frames of a stack."""

from __future__ import annotations

import functools
import linecache
import os
import re
import sysconfig
import traceback
from pathlib import Path
from typing import Any

import torch


def user_line(frame: Any) -> str:
    """A frame of the user's own code as ``file.py:12: code``, empty for one of a library."""
    if not isinstance(frame, traceback.FrameSummary) or library_file(frame.filename):
        return ""
    file = frame.filename.removeprefix(
        f"{Path.cwd()}{os.sep}"
    )  # it is printed and stored: without this machine's folders
    return f"{file}:{frame.lineno}: {(frame.line or '').strip()}"


def source_line(stack_trace: str) -> str:
    """The innermost frame of the user's own code, as ``file.py:12: code``."""
    best = ""
    for file, line, _, code in re.findall(r'File "([^"]+)", line (\d+), in (\S+)\n\s*(.*)', stack_trace):
        if not library_file(file):
            best = f"{file}:{line}: {(code or linecache.getline(file, int(line))).strip()}"
    return best


def place_of(error: Exception, text: str) -> str:
    """The user's line that an error came from, or that its text names."""
    frames = [(f.filename, f.lineno, f.name, f.line or "") for f in traceback.extract_tb(error.__traceback__)]
    named = re.findall(r'File "([^"]+)", line (\d+), in (\S+)\n\s*(.*)', text)
    for file, line, name, code in (*reversed(frames), *reversed(named)):
        if not library_file(file):
            return f"\n  at {file}:{line} in {name}: {code.strip()}"
    return ""


@functools.cache
def _library_roots() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Folders whose code is never the user's model (torch, fxgrow, Python itself), and where others are installed."""
    here, paths = Path(__file__).parents[1], sysconfig.get_paths()
    own = [here, here.parent / "passes", here.parent / "kernels", Path(torch.__file__).parent]
    installed = {paths[k] for k in ("purelib", "platlib")} | {paths["stdlib"] + "/site-packages"}
    return tuple(f"{p}{os.sep}" for p in (*own, paths["stdlib"])), tuple(f"{p}{os.sep}" for p in installed)


def library_file(path: str) -> bool:
    """Whether a frame is in torch, fxgrow or Python; a model of another package (torchvision, ...) is the user's."""
    roots, installed = _library_roots()
    if path.startswith(("<", *roots[:-1])):
        return True
    return path.startswith(roots[-1]) and not path.startswith(installed)
