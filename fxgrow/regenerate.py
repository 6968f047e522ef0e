"""From a flat graph and its tensors to a hierarchical GraphModule.

Repeated blocks become child modules at their own paths. Blocks whose graphs are equal share one generated class, and so
one code object: compiling block by region compiles one of them.
"""

from __future__ import annotations

import builtins
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from fxgrow.axes.analysis import sizes_of
from fxgrow.capture import Program

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def regenerate(
    program: Program,
    tensors: Mapping[str, torch.Tensor],
    *,
    hierarchical: bool = True,
    double: bool = False,
) -> fx.GraphModule:
    """Build a module that runs ``program.graph`` with the given tensors.

    Args:
        program: graph, names, ties; its own tensors are not used.
        tensors: parameters, buffers and constants by name, in the shapes the graph expects.
        hierarchical: one child module per repeated block; else one flat graph.
        double: replace the floating-point dtypes baked into the graph by float64, to verify in float64.

    Returns:
        A GraphModule in the program's train or eval mode, with the original parameter names, ties, ``requires_grad``
        and buffer persistence. Hooks of the original are not carried over.
    """
    graph = _clean(program.graph, double)
    root = nn.Module()
    own: dict[str, nn.Module] = {}
    target: fx.Graph = graph
    if hierarchical:
        target, own = _split_blocks(program, graph)
    module = fx.GraphModule(root, fx.Graph(), class_name=_identifier(program.class_name))
    for path, child in own.items():
        _attach(module, program, path, child)
    holders = {**own, "": module}
    for name, tensor in tensors.items():
        if name in program.constants:
            _register(module, program, holders, name, tensor, constant=True)
        else:
            _register(module, program, holders, name, tensor)
    for alias, name in program.aliases.items():
        _register_alias(module, program, holders, alias, name)
    module.graph = target
    _share_classes(own)
    module.train(program.training)
    module.meta["fxgrow"] = program
    module.meta["fxgrow_code"] = code_of(module)
    return module


def code_of(module: fx.GraphModule) -> str:
    """The generated code of a module and its blocks, to tell whether somebody changed it."""
    return "\n".join(
        [module.code, *(m.code for m in module.modules() if isinstance(m, fx.GraphModule) and m is not module)]
    )


def _identifier(name: str) -> str:
    return re.sub(r"\W", "_", name) or "Model"


# graph ------------------------------------------------------------------------------------------------------------


def _clean(graph: fx.Graph, double: bool) -> fx.Graph:
    """A copy without baked devices (and, to verify, without baked float dtypes)."""
    out = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    device: Any = None
    for node in graph.nodes:
        new = env[node] = out.node_copy(node, lambda n: env[n])
        if node.op == "call_function":
            if isinstance(new.kwargs.get("device"), torch.device):
                if device is None:
                    device = _device_node(out, new, env.values())
                new.kwargs = {**new.kwargs, "device": device}
            if double:
                new.args = fx.map_arg(new.args, lambda n: n)
                new.args = _to_double(new.args)
                new.kwargs = _to_double(new.kwargs)
    return out


def _device_node(graph: fx.Graph, before: fx.Node, nodes: Any) -> fx.Node | torch.device | None:
    """The device of the first tensor input (or parameter), read when the module runs."""
    candidates = [n for n in nodes if n.op == "placeholder" and isinstance(n.meta.get("val"), torch.Tensor)]
    candidates += [n for n in nodes if n.op == "get_attr" and isinstance(n.meta.get("val"), torch.Tensor)]
    if not candidates:
        return before.kwargs["device"]  # type: ignore[return-value]
    last = [n for n in graph.nodes if n.op == "placeholder"]
    place = last[-1] if last and candidates[0].op == "placeholder" else candidates[0]
    with graph.inserting_after(place):
        node = graph.create_node("call_function", builtins.getattr, (candidates[0], "device"), name="device")
    node.meta = {"module_path": "", "val": None, "source": ""}
    return node


def _to_double(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return torch.float64 if value in _FLOATS else value
    if isinstance(value, tuple | list):
        return type(value)(_to_double(v) for v in value)
    if isinstance(value, dict):
        return {k: _to_double(v) for k, v in value.items()}
    return value


# blocks -----------------------------------------------------------------------------------------------------------


def stacks_of(program: Program) -> dict[str, list[int]]:
    """Repeated stacks of the module tree: path of the container to the numbers of its blocks.

    A block is a numbered child that has modules of its own; a chain of plain layers is no stack.
    """
    paths = set(program.containers)
    out: dict[str, list[int]] = {}
    for path in program.containers:
        parent, _, number = path.rpartition(".")
        if number.isdigit() and any(p.startswith(path + ".") for p in paths):
            out.setdefault(parent, []).append(int(number))
    return {k: sorted(v) for k, v in out.items()}


def block_of(path: str, stacks: Mapping[str, Any], inside: str = "") -> str | None:
    """The outermost block a module path lies in, as ``stack.number``."""
    parts = path.split(".")
    for i in range(1, len(parts)):
        stack = ".".join(parts[:i])
        if stack in stacks and parts[i].isdigit() and int(parts[i]) in stacks[stack]:
            found = f"{stack}.{parts[i]}"
            if found != inside:
                return found
    return None


@dataclass
class Region:
    """A block's nodes in the flat graph, one contiguous run.

    ``sizes`` are inputs that are dynamic sizes and can be read off a tensor input: (tensor, dim).
    """

    path: str
    nodes: list[fx.Node]
    inputs: list[fx.Node]
    outputs: list[fx.Node]
    sizes: dict[fx.Node, tuple[fx.Node, int]]


def block_regions(program: Program, graph: fx.Graph) -> list[Region]:
    """The blocks whose nodes form one run; parameters of their own and training flags belong to them."""
    stacks = stacks_of(program)
    runs: list[tuple[str | None, list[fx.Node]]] = []
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        path = block_of(node.meta.get("module_path", ""), stacks)
        if not runs or runs[-1][0] != path:
            runs.append((path, []))
        runs[-1][1].append(node)
    counts: dict[str, int] = {}
    for path, _ in runs:
        if path is not None:
            counts[path] = counts.get(path, 0) + 1
    out = []
    for path, nodes in runs:
        if path is None or counts[path] != 1:
            continue
        inside = set(nodes)
        inputs: dict[fx.Node, None] = {}
        for n in nodes:
            for a in n.all_input_nodes:
                if a not in inside and not _owned(a, path, inside):
                    inputs.setdefault(a)
        outputs = [n for n in nodes if any(u not in inside for u in n.users)]
        out.append(Region(path, nodes, list(inputs), outputs, _readable_sizes(list(inputs))))
    return out


def _readable_sizes(inputs: list[fx.Node]) -> dict[fx.Node, tuple[fx.Node, int]]:
    known: dict[str, tuple[fx.Node, int]] = {}
    for n in inputs:
        for i, size in enumerate(sizes_of(n) or []):
            known.setdefault(str(size), (n, i))
    out = {}
    for n in inputs:
        value = n.meta.get("val")
        if isinstance(value, torch.SymInt) and str(value.node.expr) in known:
            out[n] = known[str(value.node.expr)]
    return out


def _owned(node: fx.Node, path: str, inside: set[fx.Node]) -> bool:
    if node.op != "get_attr":
        return False
    if node.target == "training":
        return True
    return str(node.target).startswith(path + ".") and all(u in inside for u in node.users)


def _split_blocks(program: Program, graph: fx.Graph) -> tuple[fx.Graph, dict[str, nn.Module]]:
    regions = {r.nodes[0]: r for r in block_regions(program, graph)}
    member = {n: r for r in regions.values() for n in r.nodes}
    children: dict[str, nn.Module] = {}
    out = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}

    def value(n: fx.Node) -> fx.Node:
        if n not in env:  # parameters and flags are read where they are used
            env[n] = out.get_attr(str(n.target))
            env[n].meta = dict(n.meta)
        return env[n]

    for node in graph.nodes:
        if node.op == "get_attr":
            continue
        region = member.get(node)
        if region is None:
            env[node] = out.node_copy(node, value)
            continue
        if node is not region.nodes[0]:
            continue
        inner = _block_graph(region)
        kind = program.containers.get(region.path, "Block")
        child = fx.GraphModule(nn.Module(), fx.Graph(), class_name=_identifier(kind))
        child.graph = inner
        children[region.path] = child
        call = out.call_module(region.path, tuple(value(n) for n in region.inputs if n not in region.sizes))
        call.meta = {"module_path": region.path, "source": "", "val": region.outputs[0].meta.get("val")}
        if len(region.outputs) == 1:
            env[region.outputs[0]] = call
        else:
            for i, n in enumerate(region.outputs):
                env[n] = out.call_function(__import__("operator").getitem, (call, i))
                env[n].meta = dict(n.meta)
    return out, children


def _block_graph(region: Region) -> fx.Graph:
    """The block's own graph. Node names come from ops alone, so that equal blocks give equal code."""
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for number, node in enumerate(n for n in region.inputs if n not in region.sizes):
        env[node] = graph.placeholder("x" if number == 0 else f"x{number}")
        env[node].meta = dict(node.meta)
    for node, (tensor, dim) in region.sizes.items():
        env[node] = graph.call_function(torch.ops.aten.sym_size.int, (env[tensor], dim))
        env[node].meta = dict(node.meta)

    def value(n: fx.Node) -> fx.Node:
        if n not in env:
            name = str(n.target)
            env[n] = graph.get_attr(name if name == "training" else name.removeprefix(region.path + "."))
            env[n].meta = dict(n.meta)
        return env[n]

    for node in region.nodes:
        args = fx.map_arg(node.args, value)
        kwargs = fx.map_arg(node.kwargs, value)
        env[node] = graph.create_node("call_function", node.target, args, kwargs)
        env[node].meta = dict(node.meta)
    results = tuple(env[n] for n in region.outputs)
    graph.output(results[0] if len(results) == 1 else results)
    return graph


def _share_classes(children: Mapping[str, nn.Module]) -> None:
    """Give blocks with equal code one class, that of the first."""
    first: dict[str, type] = {}
    for child in children.values():
        assert isinstance(child, fx.GraphModule)
        cls = first.setdefault(type(child).__name__ + "\n" + child.code, type(child))
        child.__class__ = cls


# modules ----------------------------------------------------------------------------------------------------------


def _parent(module: nn.Module, program: Program, path: str) -> nn.Module:
    """The container at ``path``, made where it is missing; lists stay lists."""
    here = ""
    for part in path.split(".") if path else []:
        here = f"{here}.{part}" if here else part
        if part not in module._modules:
            kind = program.containers.get(here, "")
            module.add_module(part, nn.ModuleList() if kind in ("ModuleList", "Sequential") else nn.Module())
        child = module._modules[part]
        assert child is not None
        module = child
    return module


def _attach(module: nn.Module, program: Program, path: str, child: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    _parent(module, program, parent).add_module(name, child)


def _register(
    module: nn.Module,
    program: Program,
    holders: Mapping[str, nn.Module],
    name: str,
    tensor: torch.Tensor,
    constant: bool = False,
) -> None:
    path, _, leaf = name.rpartition(".")
    holder = _parent(module, program, path)
    if name in program.parameters:
        holder.register_parameter(leaf, nn.Parameter(tensor, requires_grad=program.requires_grad.get(name, True)))
    else:
        holder.register_buffer(leaf, tensor, persistent=not constant and name in program.persistent)


def _register_alias(
    module: nn.Module, program: Program, holders: Mapping[str, nn.Module], alias: str, name: str
) -> None:
    path, _, leaf = name.rpartition(".")
    tensor = getattr(_parent(module, program, path), leaf)
    path, _, leaf = alias.rpartition(".")
    holder = _parent(module, program, path)
    if isinstance(tensor, nn.Parameter):
        holder.register_parameter(leaf, tensor)
    else:
        holder.register_buffer(leaf, tensor, persistent=alias in program.persistent)
