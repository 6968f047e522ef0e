"""Where the graphs of train and eval mode differ, and whether one of them can serve both."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.export.graph_signature import InputKind

from fxgrow.ir.bits import same_to_the_bit
from fxgrow.ir.ops import schema_of
from fxgrow.ir.traits import is_mode_literal

#: by train node, the (path, eval literal) pairs where eval mode differs
Flags = dict[str, list[tuple[Any, Any]]]


def align(train: torch.export.ExportedProgram, evaluation: torch.export.ExportedProgram) -> tuple[bool, str, Flags]:
    """Where the train and the eval graph differ in literals.

    Returns:
        Whether one graph can serve both modes; otherwise why not; and, by train node, the (path, eval literal) pairs.
    """
    if train.call_spec.out_spec != evaluation.call_spec.out_spec:
        return False, "train and eval return different structures", {}
    flags: Flags = {}
    names: dict[str, str] = {}  # eval node -> train node
    todo = list(evaluation.graph.nodes)[::-1]
    for node in train.graph.nodes:
        if not todo:
            return False, "the eval graph is shorter than the train graph", {}
        other = todo[-1]
        while other.target == _CONTIGUOUS and node.target != _CONTIGUOUS:
            todo.pop()  # a copy that only eval needs; views are traced as reshapes, which make it themselves
            names[other.name] = names[other.args[0].name]
            other = todo[-1]
        if node.op != other.op or (node.op == "call_function" and node.target != other.target):
            if node.target == _CONTIGUOUS:
                continue
            if _counts_batches(node):
                flags[node.name] = [(("args", 1), 0)]
                continue
            return False, f"train runs {node.target} where eval runs {other.target}", {}
        todo.pop()
        names[other.name] = _through_copies(node).name
        if node.op == "placeholder" and (node.name != other.name or not _same_constant(node, train, evaluation)):
            return False, "the inputs differ between train and eval", {}
        if node.op == "get_attr" and not _same_region(node, other, train, evaluation):
            return False, "train and eval differ inside of a region", {}
        _fill_defaults(node, other)
        differences: list[tuple[Any, Any]] = []
        if not _compare(node.args, other.args, names, ("args",), differences) or not _compare(
            dict(node.kwargs), dict(other.kwargs), names, ("kwargs",), differences
        ):
            return False, f"train and eval compute {node.name} from different values", {}
        if differences and not all(is_mode_literal(node.target, path) for path, _ in differences):
            return False, f"train and eval give {node.target} different literals", {}
        if differences:
            flags[node.name] = differences
    if todo:
        return False, "the eval graph is longer than the train graph", {}
    return True, "", flags


def _same_constant(
    node: fx.Node, train: torch.export.ExportedProgram, evaluation: torch.export.ExportedProgram
) -> bool:
    """Whether an input that is a constant, such as ``torch.tensor(0.5)``, has one value in both modes."""
    (spec,) = [s for s in train.graph_signature.input_specs if s.arg.name == node.name]
    if spec.kind is not InputKind.CONSTANT_TENSOR:
        return True
    a, b = (p.constants.get(str(spec.target)) for p in (train, evaluation))
    return a is b or (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and same_to_the_bit(a, b))


def _same_region(
    node: fx.Node, other: fx.Node, train: torch.export.ExportedProgram, evaluation: torch.export.ExportedProgram
) -> bool:
    """Whether the bodies that two higher-order operators run, such as one without gradients, are one to the letter."""
    bodies = [getattr(p.graph_module, str(n.target), None) for p, n in ((train, node), (evaluation, other))]
    texts = [str(b.graph) if isinstance(b, fx.GraphModule) else None for b in bodies]
    return texts[0] is not None and texts[0] == texts[1]


def _fill_defaults(a: fx.Node, b: fx.Node) -> None:
    """Give two calls of one op equally many positional arguments: one may spell out what the other leaves out."""
    schema = schema_of(a.target)
    for node, other in ((a, b), (b, a)):
        for i in range(len(node.args), len(other.args)):
            if schema is None or not schema.arguments[i].has_default_value():
                return
            node.args = (*node.args, schema.arguments[i].default_value)


_CONTIGUOUS = torch.ops.aten.contiguous.default


def _through_copies(node: fx.Node) -> fx.Node:
    """The node whose values these are: a copy into another memory layout is the same value."""
    while node.target == _CONTIGUOUS:
        node = node.args[0]  # type: ignore[assignment]
    return node


def _counts_batches(node: fx.Node) -> bool:
    """``num_batches_tracked.add_(1)``, the one op that only the train graph of a batch norm has."""
    if node.op != "call_function" or str(node.target) != "aten.add_.Tensor" or node.args[1] != 1 or node.kwargs:
        return False
    counter = node.args[0]
    return isinstance(counter, fx.Node) and counter.op == "placeholder" and not counter.meta["val"].is_floating_point()


def _compare(a: Any, b: Any, names: dict[str, str], path: tuple[Any, ...], out: list[tuple[Any, Any]]) -> bool:
    if isinstance(a, fx.Node) or isinstance(b, fx.Node):
        return isinstance(a, fx.Node) and isinstance(b, fx.Node) and names.get(b.name) == _through_copies(a).name
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(
            _compare(x, y, names, (*path, i), out) for i, (x, y) in enumerate(zip(a, b, strict=True))
        )
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_compare(a[k], b[k], names, (*path, k), out) for k in a)
    if type(a) is type(b) and (a == b or a is b):
        return True
    if isinstance(a, bool | int | float) and isinstance(b, bool | int | float):
        if float(a) != float(b):
            out.append((path, b))
        return True
    return False
