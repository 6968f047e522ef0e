"""Numbers that a forward holds sizes against, else it raises: ``if x.shape[-1] != self.dim``. No graph has them."""

from __future__ import annotations

import ast
import inspect
import linecache
import textwrap
import traceback
from collections.abc import Mapping
from types import FrameType
from typing import Any

from torch import nn

from fxgrow.landing.literals import Literal
from fxgrow.landing.living import attributes_of


def literals_of_raise(model: nn.Module, error: BaseException, sizes: Mapping[int, int]) -> list[Literal]:
    """What the condition reads that made a module's own code raise, of the sizes that a growth changed.

    An op that raises has its numbers in the graph.

    Args:
        error: what the model's forward raised, or was raised from that.
        sizes: old size to new size.
    """
    root = error
    while root.__cause__ is not None:
        root = root.__cause__
    paths = {id(m): p for p, m in reversed(list(model.named_modules()))}
    for frame, line in reversed(list(traceback.walk_tb(root.__traceback__))):
        owner = frame.f_locals.get("self")
        if id(owner) in paths and not frame.f_code.co_filename.endswith(_CALLS):
            path = paths[id(owner)]
            text, names = _read_at(frame, line)
            shown = f"{frame.f_code.co_filename}:{line}: {text}"
            held = attributes_of(owner)
            values = [held[n] for n in names if type(held.get(n)) is int]
            return [Literal(path, v, sizes[v], shown) for v in dict.fromkeys(values) if v in sizes]
    return []


#: the file by whose frames modules are called
_CALLS = inspect.getsourcefile(nn.Module) or ""


def _read_at(frame: FrameType, line: int) -> tuple[str, list[str]]:
    """The condition under which a line raises, and the attributes that it reads; nothing where the line does not."""
    code = frame.f_code
    lines = inspect.getblock(linecache.getlines(code.co_filename, frame.f_globals)[code.co_firstlineno - 1 :])
    try:
        tree: ast.AST = ast.parse(textwrap.dedent("".join(lines)))
    except SyntaxError:  # a lambda in the middle of a statement
        return "", []
    at = line - code.co_firstlineno + 1
    around = [n for n in ast.walk(tree) if isinstance(n, ast.stmt) and n.lineno <= at <= (n.end_lineno or n.lineno)]
    tests = [n.test for n in around if isinstance(n, ast.If | ast.Assert)]
    if not tests or not isinstance(around[-1], ast.Raise | ast.Assert):
        return "", []
    read = [
        n.attr
        for n in ast.walk(tests[-1])
        if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id == "self"
    ]
    return ast.unparse(tests[-1]), list(dict.fromkeys(read))


def changed_sizes(axes: list[Any]) -> dict[int, int]:
    """Old to new size of the axes of a plan, where all that had a size got the same."""
    new: dict[int, set[int]] = {}
    for axis in axes:
        new.setdefault(axis.old, set()).add(axis.new)
    return {old: sizes.pop() for old, sizes in new.items() if len(sizes) == 1}


__all__ = ["changed_sizes", "literals_of_raise"]
