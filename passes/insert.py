"""``insert``: an identity layer after a named layer (Net2DeeperNet, Chen et al. 2015, section 3.2)."""

from __future__ import annotations

import fnmatch
import math
from typing import Any

import torch
from torch import fx

from fxgrow.errors import GrowthRefused, Refusal, SpecError, did_you_mean
from fxgrow.ir.nodes import NodeInfo, info_of, meta_like, meta_of, note
from fxgrow.ir.ops import bound_arguments, op_name, operator_named
from fxgrow.ir.sizes import sizes_of
from fxgrow.ir.stacks import block_path
from fxgrow.ir.traced import Traced
from fxgrow.passes.base import GrowthPass, register_pass
from fxgrow.passes.changes import renamed_path
from fxgrow.passes.state import State
from fxgrow.plan import Change, InsertLayer, Renumber, Step, TensorPlan
from fxgrow.rules.base import idempotent, jumping_operands, moves, rule_of, selects
from fxgrow.rules.forms import Pointwise
from fxgrow.spec import Insert

BATCH_NORM_EPS = 1e-5


class InsertPass(GrowthPass):
    """Puts identity layers into a graph."""

    op = "insert"

    def apply(self, graph: fx.Graph, change: Change) -> None:
        if not isinstance(change, InsertLayer):
            super().apply(graph, change)
            return
        insert_layer(self.named(graph)(change.node), change)
        containers = self.traced().containers
        containers[change.path] = _TYPES[change.layer]
        parent, _, last = change.path.rpartition(".")
        if change.activation is not None and last.isdigit():
            containers[block_path(parent, int(last) + 1)] = "ReLU"


def plan_insert(state: State, op: Insert) -> list[Step]:
    """Decide where identity layers go, and apply it.

    Raises:
        SpecError: no layer matches, or its output has no dim for the layer.
        GrowthRefused: the layer's output is not one value, or its width is dynamic.
    """
    ran = {info_of(n).module_path for n in state.graph.nodes if n.op == "call_function"} - {""}
    ran |= {p for path in ran for p in _ancestors(path)}
    names = [p for p in state.program.containers if p in ran and fnmatch.fnmatchcase(p, op.after)]
    if not names:
        raise SpecError(f"no layer matches {op.after!r}; {did_you_mean(op.after, sorted(ran), cutoff=0.4)}")
    step = Step(op="insert", request=op.model_dump(exclude_defaults=True, mode="json"))
    for name in reversed(names):
        _insert_after(state, op, name, step)
    if op.layer == "batch_norm":
        step.eval_only = True
        step.notes.append("an inserted batch norm is the identity in eval mode; in train mode it normalises each batch")
    return [step]


def _ancestors(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def _insert_after(state: State, op: Insert, name: str, step: Step) -> None:
    graph, program = state.graph, state.program
    nodes = [_output_of(graph, name, call) for call in range(max(1, len(program.calls)))]
    found = [n for n in nodes if n is not None]
    if not found:
        raise _refusal(name, "nothing that it computes is used outside it")
    for node in found if op.layer != "batch_norm" else ():
        infinite = _infinite(node)
        if infinite is not None:
            raise _refusal(
                name,
                f"{op_name(infinite.target)} at {info_of(infinite).source} puts infinities into its output, which the "
                "new layer would multiply by 0; insert it before they are put in",
            )
    changes = [_layer_after(op, name, n) for n in found]
    if len({(c.size, c.rank, c.activation) for c in changes}) > 1:
        raise _refusal(name, "its output differs from call to call in shape or op")
    width = 2 if changes[0].activation else 1
    path, prefixes = _place(program, name, width)
    for change in changes:
        change.path = path
    value = found[0].meta.get("val")
    state.apply(step, [*([Renumber(prefixes=prefixes)] if prefixes else []), *changes])
    state.rename(lambda name: renamed_path(name, prefixes))
    _add_layer(state, changes[0], value.dtype if isinstance(value, torch.Tensor) else torch.float32)
    state.order_blocks(name.rpartition(".")[0])


def _refusal(name: str, why: str) -> GrowthRefused:
    return GrowthRefused(Refusal(name, why, "insert after"))


def _output_of(graph: fx.Graph, name: str, call: int) -> fx.Node | None:
    """The one tensor that a module hands on in one of the model's calls; None where that call does not run it."""
    inside = [n for n in graph.nodes if n.op == "call_function" and info_of(n).call == call and info_of(n).inside(name)]
    members = set(inside)
    outputs = [n for n in inside if sizes_of(n) is not None and any(u not in members for u in n.users)]
    if not inside:
        return None
    if len(outputs) != 1:
        raise _refusal(
            name,
            f"{len(outputs)} tensors that it computes are used outside it, and the new layer can follow one only; name "
            "a layer inside it",
        )
    times = {info_of(n).module_call for n in inside}
    if any("@" in t for t in times):
        raise _refusal(name, "the forward calls it more than once")
    return outputs[0]


def _infinite(output: fx.Node) -> fx.Node | None:
    """The op that fills a value with infinities, as masks before a softmax do; None where none is seen."""
    todo, seen = [output], set[fx.Node]()
    while todo:
        node = todo.pop()
        if node in seen or node.op != "call_function":
            continue
        seen.add(node)
        arguments = bound_arguments(node)
        filled = [arguments.get(name) for name in ("value", "fill_value", "self", "other")]
        if any(isinstance(x, float) and math.isinf(x) for x in filled):
            return node
        if moves(node) or selects(node) or isinstance(rule_of(node), Pointwise):
            todo += node.all_input_nodes
    return None


def _layer_after(op: Insert, name: str, node: fx.Node) -> InsertLayer:
    sizes = sizes_of(node)
    assert sizes is not None
    rank = len(sizes)
    if op.layer == "conv" and rank not in (3, 4, 5):
        raise SpecError(f"cannot insert a convolution after {name}: its output has {rank} dims, and needs 3, 4 or 5")
    if rank < 2:
        raise SpecError(f"cannot insert after {name}: its output has {rank} dims, and needs at least 2")
    dim = rank - 1 if op.layer == "linear" else 1
    if not isinstance(sizes[dim], int):
        raise _refusal(
            name, f"the new layer would be as wide as dim {dim} of its output, whose size varies with the input"
        )
    value = node.meta.get("val")
    dtype = value.dtype if isinstance(value, torch.Tensor) else torch.float32
    if not dtype.is_floating_point:
        raise _refusal(name, f"its output is {dtype}, and a layer needs floating point")
    return InsertLayer(
        layer=op.layer,
        after=name,
        node=node.name,
        path="",
        dim=dim,
        size=int(sizes[dim]),
        rank=rank,
        kernel_size=op.kernel_size,
        bias=op.bias,
        activation=op_name(node.target) if op.activation == "auto" and _repeats(node) else None,
    )


def _repeats(node: fx.Node) -> bool:
    """Whether an activation may follow the layer once more, and lets gradients through to it."""
    return idempotent(node) and not jumping_operands(node)


def _place(program: Traced, name: str, width: int) -> tuple[str, dict[str, str]]:
    """Path of the new layer; in a Sequential the layers after it move up, elsewhere it gets a name of its own."""
    parent, _, last = name.rpartition(".")
    if last.isdigit() and program.containers.get(parent) in ("Sequential", "ModuleList"):
        numbers = sorted(
            int(p[len(parent) + 1 :] if parent else p)
            for p in program.containers
            if p.rpartition(".")[0] == parent and p.rpartition(".")[2].isdigit()
        )
        dot = parent + "." if parent else ""
        prefixes = {f"{dot}{n}": f"{dot}{n + width}" for n in reversed(numbers) if n > int(last)}
        return f"{dot}{int(last) + 1}", prefixes
    path, number = f"{name}_identity", 1
    while path in program.containers:
        number += 1
        path = f"{name}_identity{number}"
    return path, {}


_TYPES = {"linear": "Linear", "conv": "Conv", "batch_norm": "BatchNorm"}


def _add_layer(state: State, change: InsertLayer, dtype: torch.dtype) -> None:
    program, n = state.program, change.size
    spatial = [change.kernel_size] * (change.rank - 2)
    kind = str(dtype).removeprefix("torch.")
    tensors: dict[str, TensorPlan] = {}

    def new(leaf: str, shape: list[int], init: Any, scale: float = 1.0, dtype_name: str = kind) -> None:
        tensors[f"{change.path}.{leaf}"] = TensorPlan(
            source=None,
            shape=list(shape),
            initial=list(shape),
            dims=[None] * len(shape),
            init=init,
            scale=scale,
            fresh=True,
            dtype=dtype_name,
        )

    if change.layer == "batch_norm":
        new("weight", [n], "ones", math.sqrt(1 + BATCH_NORM_EPS))
        new("bias", [n], "zeros")
        new("running_mean", [n], "zeros")
        new("running_var", [n], "ones")
        new("num_batches_tracked", [], "zeros", dtype_name="int64")
    else:
        new(
            "weight",
            [n, n, *spatial] if change.layer == "conv" else [n, n],
            "dirac" if change.layer == "conv" else "identity",
        )
        if change.bias:
            new("bias", [n], "zeros")
    device = next((p.device for p in program.parameters.values()), torch.device("cpu"))
    for name, plan in tensors.items():
        state.tensors[name] = plan
        value = torch.empty(plan.shape, dtype=getattr(torch, plan.dtype or kind), device="meta")
        leaf = name.rpartition(".")[2]
        if leaf in ("weight", "bias"):
            program.parameters[name] = value
            program.requires_grad[name] = True
        else:
            program.buffers[name] = value
            program.persistent.add(name)
        plan.device = str(device)


def insert_layer(node: fx.Node, change: InsertLayer) -> None:
    """Insert the layer's nodes after a node and send its users there."""
    graph, users = node.graph, list(node.users)
    aten = torch.ops.aten
    template = node.meta.get("val")
    dtype = template.dtype if isinstance(template, torch.Tensor) else torch.float32

    def attribute(leaf: str, shape: list[int], kind: torch.dtype = dtype) -> fx.Node:
        out = graph.get_attr(f"{change.path}.{leaf}")
        out.meta = meta_of(torch.empty(shape, dtype=kind, device="meta"), NodeInfo(module_path=change.path))
        return out

    meta = meta_like(node, module_path=change.path, module_call=change.path, source="")
    n = change.size
    with graph.inserting_after(node):
        anchor = graph.call_function(aten.alias.default, (node,))
    with graph.inserting_before(anchor):
        if change.layer == "linear":
            bias = attribute("bias", [n]) if change.bias else None
            out = graph.call_function(aten.linear.default, (node, attribute("weight", [n, n]), bias))
        elif change.layer == "conv":
            spatial = change.rank - 2
            weight = attribute("weight", [n, n, *[change.kernel_size] * spatial])
            bias = attribute("bias", [n]) if change.bias else None
            target = operator_named(f"aten.conv{spatial}d.default")
            out = graph.call_function(
                target, (node, weight, bias, [1] * spatial, [change.kernel_size // 2] * spatial, [1] * spatial, 1)
            )
        else:
            flag = graph.get_attr("training")
            flag.meta = meta_of(None, NodeInfo(module_path=change.path, is_flag=True, call=info_of(node).call))
            count = attribute("num_batches_tracked", [], torch.int64)
            counted = graph.call_function(aten.add_.Tensor, (count, flag))
            counted.meta = {**meta, "val": count.meta["val"]}
            note(counted, sizes=None)
            statistics = [attribute(x, [n]) for x in ("weight", "bias", "running_mean", "running_var")]
            out = graph.call_function(aten.batch_norm.default, (node, *statistics, flag, 0.1, BATCH_NORM_EPS, True))
        out.meta = dict(meta)
        if change.activation is not None:
            out = graph.call_function(operator_named(change.activation), (out, *node.args[1:]), dict(node.kwargs))
            out.meta = dict(meta)
    graph.erase_node(anchor)
    for user in users:
        user.replace_input_with(node, out)


register_pass("insert", plan_insert, InsertPass)
