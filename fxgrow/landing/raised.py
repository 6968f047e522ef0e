"""Numbers that a forward holds sizes against, else it raises: ``if x.shape[-1] != self.dim``. No graph has them."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import linecache
import re
import textwrap
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

from fxgrow.errors import CaptureError
from fxgrow.landing.literals import Literal
from fxgrow.plan import AxisGrowth


def literals_of_raise(model: nn.Module, error: BaseException, sizes: Mapping[int, int]) -> list[Literal]:
    """What the condition reads that made a model's code raise, of the sizes that a growth changed.

    The condition may stand in a function that a module calls: then what is given to that counts too. An op that raises
    has its numbers in the graph.

    Args:
        error: what the model's forward raised, or was raised from that.
        sizes: old size to new size.
    """
    paths = {id(m): p for p, m in reversed(list(model.named_modules()))}
    errors, after = [error], error.__cause__ or error.__context__
    while after is not None and after not in errors:
        errors, after = [after, *errors], after.__cause__ or after.__context__
    for each in errors:
        frames = [f for f in reversed(list(traceback.walk_tb(each.__traceback__))) if not _is_call(f[0])]
        if any(map(_is_op, [f for f, _ in frames if Path(f.f_code.co_filename) != _CHECK][:1])):
            continue
        for whole, plain in ((False, False), (False, True), (True, False), (True, True)):
            found = _read_in(frames, paths, sizes, whole, plain)
            if found:
                return found
    return []


#: the file by whose frames modules are called
_CALLS = inspect.getsourcefile(nn.Module) or ""


def _is_call(frame: FrameType) -> bool:
    return frame.f_code.co_filename.endswith(_CALLS)


def _is_op(frame: FrameType) -> bool:
    """Whether it is torch's own code below its layers: an op that raises, as it does in a trace."""
    path = Path(frame.f_code.co_filename)
    return path.is_relative_to(_CHECK.parent) and not path.is_relative_to(_CHECK.parent / "nn")


#: where ``torch._check`` raises
_CHECK = Path(torch.__file__)


def _read_in(
    frames: list[tuple[FrameType, int]], paths: Mapping[int, str], sizes: Mapping[int, int], whole: bool, plain: bool
) -> list[Literal]:
    """Numbers that the frame reads that raised, or one that called it, up to the first of a module.

    Args:
        whole: all that the code reads, not the condition alone.
        plain: local names, not attributes and entries.
    """
    for n, (frame, line) in enumerate(frames):
        read, raises = _read_at(frame, line, whole)
        owners = [paths[id(v)] for f, _ in frames[n:] for v in f.f_locals.values() if id(v) in paths]
        if not owners or not (n or raises):
            return []
        read = [e for e in read if isinstance(e, ast.Name) == plain]
        values = dict.fromkeys(v for e in read for v in _numbers(_value(e, frame.f_locals)))
        shown = f"{frame.f_code.co_filename}:{line}: {', '.join(map(ast.unparse, read))}"
        found = [Literal(owners[0], v, sizes[v], shown) for v in values if v in sizes]
        if not found and not plain:  # a part of the size, or the size is a part of it
            found = [
                Literal(owners[0], v, v * new // old, shown)
                for v in values
                for old, new in sizes.items()
                if v > 1 and (old % v == 0 or v % old == 0) and v * new % old == 0
            ]
        if found or any(id(v) in paths for v in frame.f_locals.values()):
            return found
    return []


def _read_at(frame: FrameType, line: int, whole: bool) -> tuple[list[ast.expr], bool]:
    """What a line reads, and the conditions that it stands under; and whether it raises by itself."""
    code = frame.f_code
    lines = inspect.getblock(linecache.getlines(code.co_filename, frame.f_globals)[code.co_firstlineno - 1 :])
    try:
        tree: ast.AST = ast.parse(textwrap.dedent("".join(lines)))
    except SyntaxError:  # a lambda in the middle of a statement
        return [], False
    at = line - code.co_firstlineno + 1
    around = [n for n in ast.walk(tree) if isinstance(n, ast.stmt) and n.lineno <= at <= (n.end_lineno or n.lineno)]
    if not around:
        return [], False
    last = around[-1]
    raises = isinstance(last, ast.Raise | ast.Assert)
    tests = [n.test for n in around if isinstance(n, ast.If | ast.Assert)]
    parts: list[ast.AST] = [tree] if whole else [tests[-1]] if raises and tests else [] if raises else [last]
    return list({ast.unparse(e): e for part in parts for e in _reads(part)}.values()), raises


def _reads(tree: ast.AST) -> Iterator[ast.expr]:
    """Names, attributes and entries that are read, the longest chains alone: ``self.config.dim``, not ``self``."""
    if isinstance(tree, ast.Attribute | ast.Subscript | ast.Name):
        if isinstance(tree.ctx, ast.Load):
            yield tree
        return
    for child in ast.iter_child_nodes(tree):
        yield from _reads(child)


def _value(tree: ast.expr, names: Mapping[str, Any]) -> Any:
    """What an expression of names, attributes and entries holds; None where it cannot be said."""
    try:
        match tree:
            case ast.Name():
                return names.get(tree.id)
            case ast.Attribute():
                holder = _value(tree.value, names)
                return None if isinstance(holder, torch.Tensor) else getattr(holder, tree.attr, None)
            case ast.Subscript():
                return _value(tree.value, names)[ast.literal_eval(tree.slice)]
    except Exception:  # the user's own code may run here, as it did in the forward
        return None
    return None


def _numbers(value: Any) -> list[int]:
    entries = value if type(value) in (list, tuple) and len(value) <= 8 else [value]
    return [v for v in entries if type(v) is int]


def changed_sizes(axes: Iterable[AxisGrowth]) -> dict[int, int]:
    """Old to new size of the axes of a plan, where all that had a size got the same."""
    new: dict[int, set[int]] = {}
    for axis in axes:
        new.setdefault(axis.old, set()).add(axis.new)
    return {old: sizes.pop() for old, sizes in new.items() if len(sizes) == 1}


def literals_at(error: CaptureError, literals: Sequence[Literal]) -> list[Literal]:
    """Numbers that still differ, as if they stood in the line that raised: it reads the attribute that is meant."""
    found = re.search(r"^ +at (.+)$", str(error), re.MULTILINE)
    return [dataclasses.replace(x, line=found[1]) for x in literals] if found else []


__all__ = ["changed_sizes", "literals_at", "literals_of_raise"]
