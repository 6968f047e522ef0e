"""Graph modules that run as fast as hand-written ones: their code calls ops as a person's code does.

Generated code says ``torch.ops.aten.linear.default(x, w, b)``: four look-ups, a function in Python, and arguments that
are matched with a schema, 2 µs in all, where ``torch.nn.functional.linear`` goes to the same op through PyTorch's own
parser. What runs is the printed code with such functions in place; ``code`` and ``graph`` stay as they are.
"""

from __future__ import annotations

import ast
import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

#: functions that dispatch to one overload with the arguments as the schema has them (tests/ir/test_direct.py)
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "aten.linear.default": F.linear,
    "aten.gelu.default": F.gelu,
    "aten.silu.default": torch._C._nn.silu,
    "aten.scaled_dot_product_attention.default": F.scaled_dot_product_attention,
    "aten.adaptive_avg_pool2d.default": torch._C._nn.adaptive_avg_pool2d,
    "aten.flatten.using_ints": torch.flatten,
    "aten.softmax.int": torch.softmax,
    "aten.mean.dim": torch.mean,
    "aten.transpose.int": torch.transpose,
    "aten.select.int": torch.select,
    **{f"aten.{name}.Tensor": getattr(torch, name) for name in ("add", "sub", "mul", "div")},
    **{
        f"aten.{name}.default": getattr(torch, name)
        for name in (
            *("layer_norm", "batch_norm", "dropout", "embedding", "conv1d", "conv2d", "max_pool2d", "matmul", "bmm"),
            *("relu", "sigmoid", "tanh", "exp", "sqrt", "rsqrt", "neg", "reshape", "permute", "unsqueeze"),
            *("cat", "stack"),
        )
    },
}
#: source of a forward -> its code, and what its names are
_known: dict[str, tuple[types.CodeType, dict[str, Callable[..., Any]]]] = {}
_MOST = 256


class DirectModule(fx.GraphModule):
    """A GraphModule that runs :func:`direct` code."""

    def recompile(self) -> Any:
        code = super().recompile()
        kind = type(self)
        kind.forward = direct(kind.forward, self.code)
        return code


def direct(forward: Callable[..., Any], source: str) -> Callable[..., Any]:
    """The function that ``source`` defines, with the ops that it names looked up before.

    Args:
        forward: what fx made of ``source``; tracebacks go on to show its lines.
    """
    if source not in _known:
        if len(_known) >= _MOST:
            _known.clear()
        ops = _Ops()
        tree = ast.fix_missing_locations(ops.visit(ast.parse(source)))
        _known[source] = compile(tree, forward.__code__.co_filename, "exec"), ops.found
    code, found = _known[source]
    table = {**forward.__globals__, **found}
    exec(code, table)
    return functools.update_wrapper(table.pop("forward"), forward, updated=())


class _Ops(ast.NodeTransformer):
    """Calls of ``torch.ops.space.name.overload`` become calls of a name."""

    def __init__(self) -> None:
        self.found: dict[str, Callable[..., Any]] = {}

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        parts = ast.unparse(node.func).split(".") if isinstance(node.func, ast.Attribute) else []
        if len(parts) != 5 or parts[:2] != ["torch", "ops"]:
            return node
        name = "_".join(("op", *parts[2:]))
        if name not in self.found:
            key = ".".join(parts[2:])
            made = FUNCTIONS.get(key)
            op: Any = torch.ops
            self.found[name] = made or functools.reduce(getattr, parts[2:], op)
        node.func = ast.copy_location(ast.Name(name, ast.Load()), node.func)
        return node
