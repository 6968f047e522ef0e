"""A graph as plain data, with nothing in it that could run code when it is read.

The graph of a :class:`~fxgrow.ir.traced.Traced` is flat and made of ATen ops, so that a list of nodes says all of it.
Ops are written by name and found again among registered PyTorch operators only; every name that would end up in
generated code is checked; sizes are parsed by hand as integer arithmetic. Reading never evaluates anything.
"""

from __future__ import annotations

import ast
import builtins
import keyword
import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import sympy
import torch
from torch import fx
from torch.fx.experimental.sym_node import SymNode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy.functions import CeilToInt, CleanDiv, FloorDiv, FloorToInt, Max, Min, Mod, PythonMod, TruncToInt

from fxgrow.errors import CheckpointError
from fxgrow.ir.nodes import info_of, note
from fxgrow.ir.ops import OpOverload
from fxgrow.ir.sizes import result_sizes, sizes_of
from fxgrow.ir.values import decode_value, encode_value

#: the only Python functions a graph may call; everything else is a registered operator
FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{
        f"operator.{f.__name__}": f
        for f in (
            *(operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv, operator.truediv),
            *(operator.mod, operator.neg, operator.pow, operator.eq, operator.ne, operator.lt, operator.le),
            *(operator.gt, operator.ge, operator.and_, operator.or_),
        )
    },
    **{
        f"torch.{f.__name__}": f
        for f in (torch.sym_max, torch.sym_min, torch.sym_int, torch.sym_float, torch.sym_not, torch.sym_ite)
    },
    **{f"math.{f.__name__}": f for f in (math.ceil, math.floor, math.trunc, round)},
    "builtins.getattr": builtins.getattr,  # of a tensor's device only
}
_NAMES = {f: name for name, f in FUNCTIONS.items()}

_OPERATOR = re.compile(r"[A-Za-z]\w*(\.[A-Za-z_]\w*){2}")
_PATH = re.compile(r"[^\s\"'\\.]([^\"'\\\x00-\x1f]*[^\s\"'\\.])?")


# sizes ----------------------------------------------------------------------------------------------------------------


def encode_size(size: Any) -> int | str:
    """An int, or the text of a sympy expression; one that cannot be read back becomes a symbol of its own."""
    if isinstance(size, int):
        return size
    text = str(size)
    try:
        if str(decode_size(text)) == text:
            return text
    except CheckpointError:
        pass
    return "opaque_" + re.sub(r"\W+", "_", text).strip("_")


_CALLS: dict[str, Callable[..., Any]] = {
    f.__name__: f for f in (CeilToInt, CleanDiv, FloorDiv, FloorToInt, Max, Min, Mod, PythonMod, TruncToInt)
}
_BINARY: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: FloorDiv,
    ast.Mod: Mod,
    ast.Pow: operator.pow,
}


def decode_size(text: int | str, where: str = "size") -> Any:
    """An int, or a sympy expression of symbols and integer arithmetic.

    Raises:
        CheckpointError: anything else.
    """

    def build(node: ast.AST) -> Any:
        if isinstance(node, ast.Constant) and type(node.value) is int:
            return sympy.Integer(node.value)
        if isinstance(node, ast.Name):
            return sympy.Symbol(node.id, integer=True, positive=True)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -build(node.operand)
        if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
            left, right = build(node.left), build(node.right)
            if isinstance(node.op, ast.Pow) and not (right.is_Integer and abs(int(right)) <= 64 and left.free_symbols):
                raise ValueError("a power of numbers can be huge")
            return _BINARY[type(node.op)](left, right)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _CALLS:
            if node.keywords or len(node.args) > 8:
                raise ValueError("arguments")
            return _CALLS[node.func.id](*(build(a) for a in node.args))
        raise ValueError(type(node).__name__)

    if type(text) is int:
        return text
    if not isinstance(text, str) or len(text) > 500:
        raise CheckpointError(f"{where}: {str(text)[:80]!r} is not a size")
    try:
        size = build(ast.parse(text, mode="eval").body)
    except (ValueError, SyntaxError, TypeError, ArithmeticError, AttributeError, RecursionError, MemoryError) as error:
        raise CheckpointError(f"{where}: {text[:80]!r} is not a size (integers, names and arithmetic)") from error
    if not size.is_Integer and not size.free_symbols:
        raise CheckpointError(f"{where}: {text[:80]!r} is not a size: it is no whole number")
    return int(size) if size.is_Integer else size


# graphs ---------------------------------------------------------------------------------------------------------------


def graph_to_json(graph: fx.Graph) -> list[dict[str, Any]]:
    """The nodes of a flat ATen graph, in order, as JSON data.

    Raises:
        CheckpointError: a node that is no registered operator, or an argument that cannot be stored.
    """
    out = []
    for node in graph.nodes:
        where = f"node {node.name}"
        entry: dict[str, Any] = {"op": node.op, "name": node.name}
        if node.op == "call_function":
            entry["target"] = target_name(node.target)
        elif node.op in ("placeholder", "get_attr"):
            entry["target"] = str(node.target)
        elif node.op != "output":
            raise CheckpointError(f"{where} is a {node.op}; only flat graphs of operators can be stored")
        if node.args:
            entry["args"] = [encode_value(a, f"{where}: args.{i}", _refer) for i, a in enumerate(node.args)]
        if node.kwargs:
            entry["kwargs"] = {k: encode_value(v, f"{where}: {k}", _refer) for k, v in node.kwargs.items()}
        if (value := _encode_result(node)) is not None:
            entry["value"] = value
        info = info_of(node)
        entry |= {
            key: value
            for key, value in (
                ("module", info.module_path),
                ("module_call", info.module_call),
                ("source", _relative(info.source) if info.source else ""),
                ("is_flag", info.is_flag),
                ("rescale", info.rescale),
                ("numbers", dict(info.numbers)),
                ("checkpointed", info.checkpointed),
                ("call", info.call),
                ("input", info.input),
            )
            if value
        }
        out.append(entry)
    return out


def _refer(value: Any, where: str) -> tuple[str, str] | None:
    return ("node", value.name) if isinstance(value, fx.Node) else None


def _relative(source: str) -> str:
    """A source line without the place of the user's own folder on this machine."""
    here = str(Path.cwd()) + "/"
    return source.removeprefix(here)


def target_name(target: Any) -> str:
    """The name a call's target is stored under.

    Raises:
        CheckpointError: it is neither a registered operator nor one of :data:`FUNCTIONS`.
    """
    if isinstance(target, OpOverload):
        return str(target)
    try:
        name = _NAMES.get(target)
    except TypeError:
        name = None
    if name is None:
        raise CheckpointError(
            f"the graph calls {target}, which is no registered operator; make it one with torch.library.custom_op"
        )
    return name


def find_target(name: Any, where: str) -> Callable[..., Any]:
    """The operator or function of a name.

    Raises:
        CheckpointError: this process knows no such operator.
    """
    if isinstance(name, str) and name in FUNCTIONS:
        return FUNCTIONS[name]
    if not isinstance(name, str) or not _OPERATOR.fullmatch(name):
        raise CheckpointError(f"{where} calls {str(name)[:80]!r}, which is not the name of an operator")
    namespace, op, overload = name.split(".")
    try:
        found = getattr(getattr(getattr(torch.ops, namespace), op), overload)
    except (AttributeError, RuntimeError):
        found = None
    if not isinstance(found, OpOverload):
        raise CheckpointError(
            f"{where} calls {name}, which this process does not know. "
            + (
                f"This PyTorch is {torch.__version__}; the checkpoint's version is in its manifest"
                if namespace in ("aten", "prims")
                else f"Import the package that registers {namespace!r} before loading"
            )
        )
    if any(a.name == "filename" for a in found._schema.arguments):
        raise CheckpointError(f"{where} calls {name}, which reads files; a model's graph may not")
    return found


def _encode_result(node: fx.Node) -> Any:
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        return {"dtype": encode_value(value.dtype)["dtype"], "sizes": [encode_size(s) for s in sizes_of(node) or []]}
    if isinstance(value, list | tuple):
        several = result_sizes(node) or []
        return {
            "results": [
                None if s is None else {"dtype": encode_value(v.dtype)["dtype"], "sizes": [encode_size(x) for x in s]}
                for v, s in zip(value, several, strict=True)
            ]
        }
    if isinstance(value, torch.SymInt):
        return {"int": encode_size(value.node.expr)}
    return None


def _decode_result(node: fx.Node, value: Any, environment: ShapeEnv, where: str) -> None:
    """Put ``val`` and the sizes into a node's metadata; tensors are meta tensors that carry rank and dtype."""

    def tensor(entry: Mapping[str, Any]) -> tuple[torch.Tensor, list[Any]]:
        sizes = [decode_size(s, where) for s in entry["sizes"]]
        dtype = decode_value({"dtype": entry["dtype"]}, {}, where)
        shape = [s if isinstance(s, int) else 2 for s in sizes]
        if any(s < 0 for s in shape):
            raise CheckpointError(f"{where} has a negative size: {entry['sizes']}")
        return torch.empty(shape, dtype=dtype, device="meta"), sizes

    node.meta["val"] = None
    try:
        if value is None:
            return
        if "int" in value:
            size = decode_size(value["int"], where)
            node.meta["val"] = size if isinstance(size, int) else torch.SymInt(SymNode(size, environment, int, 2))
        elif "results" in value:
            pairs = [None if e is None else tensor(e) for e in value["results"]]
            node.meta["val"] = [None if p is None else p[0] for p in pairs]
            note(node, result_sizes=[None if p is None else p[1] for p in pairs])
        else:
            node.meta["val"], sizes = tensor(value)
            note(node, sizes=sizes)
    except (KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{where}: cannot read its value {str(value)[:80]}") from error


def graph_from_json(entries: Iterable[Mapping[str, Any]]) -> fx.Graph:
    """The inverse of :func:`graph_to_json`. Nothing is run.

    Raises:
        CheckpointError: the data is not a graph, or calls something unknown; the message names the node.
    """
    graph = fx.Graph()
    environment = ShapeEnv()
    nodes: dict[str, fx.Node] = {}
    for number, entry in enumerate(entries):
        where = f"graph node {number}"
        try:
            op, name = entry["op"], entry["name"]
        except (KeyError, TypeError):
            raise CheckpointError(f"{where} has no op or no name") from None
        _identifier(name, where)
        where = f"graph node {name}"
        if name in nodes:
            raise CheckpointError(f"{where} appears twice")
        target: Any
        if op == "call_function":
            target = find_target(entry.get("target"), where)
        elif op == "placeholder":
            target = _identifier(entry.get("target"), where)
        elif op == "get_attr":
            target = path_name(entry.get("target"), where)
        elif op == "output":
            target = "output"
        else:
            raise CheckpointError(f"{where} is a {op!r}, which a stored graph does not have")
        args = tuple(decode_value(a, {"node": nodes}, where) for a in _typed(entry.get("args", []), list, where))
        kwargs = {
            _identifier(k, where): decode_value(v, {"node": nodes}, where)
            for k, v in _typed(entry.get("kwargs", {}), dict, where).items()
        }
        if target is builtins.getattr and args[1:] != ("device",):
            raise CheckpointError(f"{where} reads an attribute other than a tensor's device")
        node = graph.create_node(op, target, args, kwargs, name=name)
        if node.name != name:  # a name that FX would not give by itself
            node.name = name
        _decode_result(node, entry.get("value"), environment, where)
        note(
            node,
            module_path=str(entry.get("module", "")),
            module_call=str(entry.get("module_call", "")),
            source=str(entry.get("source", "")),
            is_flag=bool(entry.get("is_flag")),
            rescale=bool(entry.get("rescale")),
            numbers=_numbers(entry.get("numbers", {}), where),
            checkpointed=bool(entry.get("checkpointed")),
            call=_typed(entry.get("call", 0), int, where),
            input=_identifier(entry["input"], where) if "input" in entry else None,
        )
        nodes[name] = node
    if not nodes or next(iter(reversed(graph.nodes))).op != "output" or sum(n.op == "output" for n in graph.nodes) != 1:
        raise CheckpointError("the stored graph does not end in one output")
    try:
        graph.lint()
    except RuntimeError as error:
        raise CheckpointError(f"the stored graph is not consistent: {error}") from error
    return graph


def _typed(value: Any, kind: type, where: str) -> Any:
    if not isinstance(value, kind):
        raise CheckpointError(f"{where}: expected a {kind.__name__}, got {str(value)[:80]}")
    return value


def _numbers(value: Any, where: str) -> tuple[tuple[str, float | None], ...]:
    pairs = _typed(value, dict, where)
    if not all(v is None or type(v) in (int, float) for v in pairs.values()):
        raise CheckpointError(f"{where}: numbers expected, got {str(value)[:80]}")
    return tuple((_identifier(k, where), v) for k, v in pairs.items())


def _identifier(name: Any, where: str) -> str:
    """Names of nodes, inputs and arguments become names in generated code."""
    if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
        raise CheckpointError(f"{where}: {str(name)[:80]!r} is not a Python name")
    return name


def path_name(name: Any, where: str) -> str:
    """A dotted module or tensor path that is safe in generated code.

    Raises:
        CheckpointError: it is empty, or holds quotes, backslashes, control characters or names like ``__class__``.
    """
    if (
        not isinstance(name, str)
        or not _PATH.fullmatch(name)
        or any(not part or part.startswith("__") for part in name.split("."))
    ):
        raise CheckpointError(f"{where}: {str(name)[:80]!r} is not a path of modules")
    return name
